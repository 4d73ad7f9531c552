"""What a run will cost, reported once its first 1,000 documents are encoded: time left, size of run and index.

In: the parts of shards as they are written. Out: one note, after the row group in which the 1,000th document is:
within a row group the longest documents come first, so anything said before its end would be wrong. All is in
proportion to the rows read so far; an index is the postings that cluster/scores.py predicts, and its text.

Not covered: progress from one minute to the next (cli/progress.py).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sparse_ingest.cluster.scores import posting_bytes
from sparse_ingest.corpora.sources import Cursor
from sparse_ingest.reporting import Reporter
from sparse_ingest.runs.shards import ShardPart

DOCUMENTS = 1000
# Bytes of an index that a byte of the fields takes, where title and text are mapped as text and kept in _source:
# 4,998 documents of 716 bytes and 185 terms were 6.82 MB on OpenSearch 3.6.0 in one segment, of which 3.47 are
# postings. Until segments merge after the load it is more than twice that, since the sources wait for a recovery.
BYTES_PER_FIELD_BYTE = 0.93


class Estimate:
    """Watches the parts that one process makes, of several at that speed, and gives its note once."""

    def __init__(self, cursor: Cursor, limit: int | None, processes: int, reporter: Reporter) -> None:
        self._cursor, self._limit, self._processes, self._reporter = cursor, limit, processes, reporter
        self._row = 0  # up to which the parts reach
        self._documents = self._terms = self._field_bytes = 0
        self._frequencies = np.zeros(0, dtype=np.int64)  # of each token id
        self._read = self._run_bytes = 0
        self._seconds = 0.0
        self._told = False

    def watch(self, parts: Iterator[ShardPart], file: Path, *, first_row: int) -> Iterator[ShardPart]:
        """The same parts of a shard; each is in `file` when the next one is asked for."""
        if self._told:
            yield from parts
            return
        before, earlier = self._run_bytes, self._read
        began = time.monotonic()
        for part in parts:
            documents, terms = len(part.rows), len(part.vectors.weights)
            field_bytes = sum(len(fields.encode()) for fields in part.fields)
            yield part
            self._documents += documents
            self._terms += terms
            found = np.bincount(part.vectors.token_ids.astype(np.int64), minlength=len(self._frequencies))
            found[: len(self._frequencies)] += self._frequencies
            self._frequencies = found
            self._field_bytes += field_bytes
            self._row = int(part.rows[-1]) + 1
            self._read = earlier + self._row - first_row
            self._run_bytes = before + file.stat().st_size
            now = time.monotonic()
            self._seconds, began = self._seconds + now - began, now
            if self._documents >= DOCUMENTS and not self._told:
                self._told = True
                self._reporter.note(self._message())

    def _message(self) -> str:
        """What is known so far, and what follows for the whole corpus if its size is known."""
        terms, size = self._terms / self._documents, self._run_bytes / self._documents
        seconds = self._seconds / self._processes
        said = (
            f"After {self._documents:,} documents: {terms:.1f} terms a document, "
            f"{self._documents / max(seconds, 1e-9):,.1f} documents/s, {size:,.0f} bytes of the run a document"
        )
        rows = self._rows()
        if rows is None:
            index = self._index_bytes(1.0) / self._documents
            return f"{said}, about {index:,.0f} of an index. The size of the corpus is unknown."
        scale = rows / max(1, self._read)
        left = max(0.0, seconds * (rows - self._row) / max(1, self._read))
        return (
            f"{said}. About {rows:,} rows in all: {_duration(left)} left, a run of {_size(self._run_bytes * scale)}, "
            f"an index of {_size(self._index_bytes(scale))} or so once it is merged."
        )

    def _index_bytes(self, scale: float) -> float:
        """About how large an index of so many times these documents is, without replicas."""
        frequencies = np.round(self._frequencies * scale).astype(np.int64)
        postings = posting_bytes(frequencies, max(1, round(self._documents * scale)))
        return postings + self._field_bytes * scale * BYTES_PER_FIELD_BYTE

    def _rows(self) -> int | None:
        """About how many rows the whole corpus has."""
        known = [rows for rows in (self._cursor.expected_rows, self._limit) if rows is not None]
        return min(known, default=None)


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    if minutes < 2:
        return f"{seconds:,.0f} s"
    return f"{minutes:,.0f} min" if minutes < 120 else f"{minutes / 60:,.1f} h"


def _size(count: float) -> str:
    for unit in ("bytes", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.0f} {unit}" if unit in ("bytes", "KB") else f"{count:,.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"
