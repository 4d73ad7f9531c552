"""An estimate after the first 1,000 documents of an encode: the size of the run and of the index.

In: the parts of shards as they are written. Out: one note after the row group with the 1,000th document.
cluster/index_size.py predicts the size of the index.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from sparse_ingest.cluster.index_size import IndexSize
from sparse_ingest.reporting import Reporter, size_text
from sparse_ingest.runs.shards import ShardPart, take_rows

DOCUMENTS = 1000
_SAMPLE_BYTES = 4 << 20  # of the fields of a part whose words are counted, which takes about half a second


class Estimate:
    """Watches the parts of one process, and reports its estimate once."""

    def __init__(self, rows: Callable[[], int | None], reporter: Reporter) -> None:
        """`rows` returns the number of rows of the corpus, if it is known."""
        self._rows, self._reporter = rows, reporter
        self._documents = self._terms = 0
        self._index = IndexSize()  # of a sample of the documents
        self._read = self._run_bytes = 0
        self._reported = False

    def watch(self, parts: Iterator[ShardPart], file: Path, *, first_row: int) -> Iterator[ShardPart]:
        """Yield the same parts of a shard; each is in `file` when the next one is requested."""
        if self._reported:
            yield from parts
            return
        before, earlier = self._run_bytes, self._read
        for part in parts:
            documents, terms = len(part.rows), len(part.vectors.weights)
            yield part
            self._documents += documents
            self._terms += terms
            self._read = earlier + int(part.rows[-1]) + 1 - first_row
            self._run_bytes = before + file.stat().st_size
            if not self._reported:
                step = 1 + sum(map(len, part.fields)) // _SAMPLE_BYTES
                self._index.add(part if step == 1 else take_rows(part, np.arange(0, documents, step)))
                if self._documents >= DOCUMENTS:
                    self._reported = True
                    self._reporter.note(self._message())
                    self._index = IndexSize()  # frees the sample

    def _message(self) -> str:
        """Return the measured averages, extrapolated to the complete corpus if its size is known."""
        terms, size = self._terms / self._documents, self._run_bytes / self._documents
        averages = (
            f"After {self._documents:,} documents: {terms:.1f} terms and {size:,.0f} bytes of the run per document"
        )
        if (rows := self._rows()) is None:
            each = self._index_bytes(1.0) / self._documents
            return f"{averages}, about {each:,.0f} of a merged index. The size of the corpus is unknown."
        scale = rows / max(1, self._read)
        run, index = size_text(self._run_bytes * scale), size_text(self._index_bytes(scale))
        return f"{averages}. {rows:,} rows in all: a run of about {run}, a merged index of about {index}."

    def _index_bytes(self, scale: float) -> float:
        """Return about how many bytes an index of `scale` times these documents has, without replicas."""
        return self._index.bytes(scale * self._documents / max(1, self._index.documents))
