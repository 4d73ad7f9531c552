"""`encode --dry-run`: read and check a complete corpus without writing anything.

In: a corpus, and the tokenizer if a model is named. Out: the number of rows, documents, bad rows, duplicate ids and
equal texts, the size of the text, and a sample of documents with its tokens, for trial.py. Ids and texts are compared
over the complete corpus by 128-bit hashes on disk (24 bytes per row), so memory does not grow with the corpus.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sparse_ingest.corpora.sources import START, Cursor, repeated_id
from sparse_ingest.records import Document
from sparse_ingest.reporting import Reporter
from sparse_ingest.runs.shards import text_hash
from sparse_ingest.runs.sorted_pieces import Numbers, SortedPieces

if TYPE_CHECKING:
    from sparse_ingest.encoding.trial import Prediction
    from sparse_ingest.models.tokenizer import Tokenizer

EXAMPLES = 10  # bad rows, and duplicates, that are reported
SAMPLE_DOCUMENTS = 1000  # documents whose tokens are counted
_SAMPLE_CHARACTERS = 1 << 16  # of each of them; the rest is extrapolated
_RANGES, _RANGE_ROWS = 64, 1 << 20  # parts of the hash space, compared one after another
_PIECE_ROWS = 65536


@dataclass
class CorpusSurvey:
    """The result of a dry run.

    `duplicates` counts documents with the id of an earlier one, `equal_texts` those with the text of an earlier one,
    and `equal_in_shard` those whose earlier one is in the same shard, which `--dedup-text encode-once` copies.
    `examples` has the first bad rows and duplicates, `tokens` the document lengths of a sample and what the model reads
    of them, `prediction` the size and time of a run (trial.py).
    """

    rows: int = 0
    documents: int = 0
    bad: int = 0
    duplicates: int = 0
    empty: int = 0
    text_bytes: int = 0
    shards: int = 0
    equal_texts: int = 0
    equal_in_shard: int = 0
    tokens: dict[str, float] | None = None
    prediction: Prediction | None = None
    examples: list[str] = field(default_factory=list)


def survey(
    cursor: Cursor, tokenizer: Tokenizer | None, *, shard_rows: int, overflow: str, reporter: Reporter
) -> tuple[CorpusSurvey, list[Document]]:
    """Read the complete corpus once; duplicate ids are looked up in a second pass.

    Return what was found, and a sample of its documents if there is a tokenizer.
    """
    reporter.begin("rows")
    found, sample = CorpusSurvey(), _Sample(random.Random(0))  # the same sample on every start
    ids, texts = _Hashes(), _Hashes()
    for row in cursor.rows():
        found.rows += 1
        if row.document is None:
            found.bad += 1
            if found.bad <= EXAMPLES:
                found.examples.append(f"{row.place}: {row.reason}")
        else:
            text = row.document.text
            found.documents += 1
            found.empty += not text
            found.text_bytes += len(text.encode())
            ids.add(hashlib.blake2b(row.document.id.encode(), digest_size=16).digest(), row.row)
            texts.add(text_hash(text), row.row)
            if tokenizer:
                sample.add(row.document)
        if found.rows % _PIECE_ROWS == 0:
            if rows := cursor.expected_rows:
                reporter.expect(rows)
            reporter.advance(_PIECE_ROWS)
    found.shards = -(-found.rows // shard_rows)
    lowest: list[tuple[int, int]] = []
    for again, _, first in ids.repeated():
        found.duplicates += len(again)
        pairs = [(int(again[place]), int(first[place])) for place in np.argsort(again)[:EXAMPLES].tolist()]
        lowest = heapq.nsmallest(EXAMPLES, [*lowest, *pairs])
    found.examples += _named(cursor, lowest)
    for again, before, _ in texts.repeated():
        found.equal_texts += len(again)
        found.equal_in_shard += int((again // shard_rows == before // shard_rows).sum())
    if tokenizer and found.documents:
        found.tokens = sample.tokens(tokenizer, overflow)
    return found, sample.documents()


class _Hashes:
    """A 128-bit hash of each row, on disk."""

    def __init__(self) -> None:
        self._pieces = SortedPieces(Path(tempfile.gettempdir()), 3, rows=_RANGES * _RANGE_ROWS, range_rows=_RANGE_ROWS)
        self._digests = bytearray()
        self._rows: list[int] = []

    def add(self, digest: bytes, row: int) -> None:
        """Add 16 bytes for a row; rows must ascend."""
        self._digests += digest
        self._rows.append(row)
        if len(self._rows) == _PIECE_ROWS:
            self._flush()

    def repeated(self) -> Iterator[tuple[Numbers, Numbers, Numbers]]:
        """Yield arrays of the rows whose hash earlier rows have, of the last such earlier row, and of the first."""
        self._flush()
        for table in self._pieces.ranges():
            table = table[np.lexsort((table[:, 2], table[:, 1], table[:, 0]))]
            same = (table[1:, :2] == table[:-1, :2]).all(axis=1)
            starts = np.where(same, 0, np.arange(1, len(table)))
            first = np.maximum.accumulate(starts)[same] if len(starts) else starts
            yield table[1:, 2][same], table[:-1, 2][same], table[first, 2]

    def _flush(self) -> None:
        halves = np.frombuffer(bytes(self._digests), dtype=">u8").reshape(-1, 2).astype(np.uint64)
        self._pieces.add(np.column_stack((halves, np.array(self._rows, dtype=np.uint64))))
        self._digests, self._rows = bytearray(), []


class _Sample:
    """A uniform random sample of the documents (reservoir sampling)."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._seen = 0
        self._documents: list[tuple[Document, int]] = []  # shortened, and the length of the text

    def add(self, document: Document) -> None:
        self._seen += 1
        place = self._seen - 1 if self._seen <= SAMPLE_DOCUMENTS else self._chance.randrange(self._seen)
        if place < SAMPLE_DOCUMENTS:
            length = len(document.text)
            if len(document.fields) > 2 * _SAMPLE_CHARACTERS:
                fields = json.dumps({"text": document.text[:_SAMPLE_CHARACTERS]}, ensure_ascii=False)
                document = document._replace(fields=fields)
            kept = document._replace(text=document.text[:_SAMPLE_CHARACTERS])
            self._documents[place : place + 1] = [(kept, length)]

    def documents(self) -> list[Document]:
        """Return the documents in random order."""
        return self._chance.sample([document for document, _ in self._documents], len(self._documents))

    def tokens(self, tokenizer: Tokenizer, overflow: str) -> dict[str, float]:
        """Return statistics of the tokens per document.

        `longer` is the share of documents longer than one window, `read` the mean number of tokens that the model reads
        with this `overflow`.
        """
        cuts = tokenizer.cut([document.text for document, _ in self._documents])
        shares = np.array([length / max(1, len(document.text)) for document, length in self._documents])
        lengths = shares * [len(cut.layout.before) + len(cut.token_ids) + len(cut.layout.after) for cut in cuts]
        truncate = overflow == "truncate"
        read = [len(cut.window(0)) for cut in cuts] if truncate else shares * [cut.tokens for cut in cuts]
        median, most = np.quantile(lengths, [0.5, 0.95])
        return {
            "documents": len(lengths),
            "mean": round(float(lengths.mean()), 1),
            "median": round(float(median), 1),
            "p95": round(float(most), 1),
            "longest": round(float(lengths.max()), 1),
            "read": round(float(np.mean(read)), 1),
            "longer": round(float(np.mean([cut.windows > 1 for cut in cuts])), 4),
        }


def _named(cursor: Cursor, pairs: list[tuple[int, int]]) -> list[str]:
    """Return a message for each pair of rows with the same id, the later row first."""
    if not cursor.rereadable:
        return [f"row {again + 1}: duplicate id (first seen at row {first + 1})" for again, first in pairs]
    wanted = {row for pair in pairs for row in pair}
    found: dict[int, tuple[str, str]] = {}  # place and id
    cursor.jump(START)
    for row in cursor.rows() if wanted else ():
        if row.row in wanted and row.document:
            found[row.row] = row.place, row.document.id
            if len(found) == len(wanted):
                break
    return [
        f"{found[again][0]}: {repeated_id(found[again][1], found[first][0])}"
        for again, first in pairs
        if first in found and again in found
    ]
