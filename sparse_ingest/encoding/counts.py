"""What the record of a shard in done/ counts, what each of its rows adds to that, and the hash of its source rows.

The sums are what a run reports. Beside them `of_rows` keeps, for each count that a row may add to, the numbers of all
source rows of the shard in order: little-endian uint32, zlib, base64. So a row that leaves its shard later, because
its id is in an earlier one, leaves the sums as well. A count that no row adds to is omitted there, and `windows`
where each row has one.

Not covered: `rows`, `nnz` and `empty`, which the shard itself shows.
"""

from __future__ import annotations

import base64
import hashlib
import zlib
from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from sparse_ingest.records import SourceRow
from sparse_ingest.runs.run import SkippedRow
from sparse_ingest.runs.shards import ShardPart

_NAMES = ("truncated", "windows", "reused", "deduplicated", "underflow")
OF_ROWS = np.dtype([(name, np.int64) for name in _NAMES])
OfRows = npt.NDArray[np.void]  # a field for each count that a row may add to
_NONE = np.empty(0, dtype=np.int64), np.empty(0, dtype=OF_ROWS)
_USUAL = {"windows": 1}  # what each row adds by default

# Of lines that are hashed at one time. The worker waits up to 5 ms (the interpreter's switch interval) for its turn:
# blocks that are filled sooner, as 256 KB are, are hashed while the reader waits for them (85 instead of 99 MB/s).
_BLOCK_BYTES = 1 << 21


class RowHash:
    """The hash by which a resumed run knows that the rows of a finished shard are still the same.

    It is the SHA-256 of one line of canonical JSON a row. The spelling is part of the run format: of a row with a
    document `[row,id,text,fields]`, of a bad row `[row,null]`, because its reason is worded by a release and may hold
    the path of a file.
    """

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._lines = bytearray()
        # hashlib releases the GIL: the next rows are read while these are hashed.
        self._worker = ThreadPoolExecutor(1)
        self._hashing: Future[None] = self._worker.submit(self._digest.update, b"")

    def add(self, row: SourceRow) -> None:
        """Add a row."""
        # The bytes of runs.manifest.canonical_json, five times as fast.
        content = (row.row, None) if row.document is None else (row.row, *row.document)
        self._lines += orjson.dumps(content, option=orjson.OPT_APPEND_NEWLINE)
        if len(self._lines) >= _BLOCK_BYTES:
            self._hashing.result()  # so that no more than two blocks wait
            self._hashing = self._worker.submit(self._digest.update, self._lines)
            self._lines = bytearray()

    def close(self) -> None:
        """End the thread that hashes; no row is added after that."""
        self._worker.shutdown()

    def hexdigest(self) -> str:
        """The hash of all rows that were added so far."""
        self._hashing.result()
        self._digest.update(self._lines)
        self._lines = bytearray()
        return self._digest.hexdigest()


@dataclass
class Counts:
    """One shard's counts, summed while its parts are made.

    `windows` are those that its documents were read in, one each where none was too long; `deduplicated` documents
    have the vector of an earlier one of the shard. Of the `reused` documents `underflow` and `without_token` are not
    known; all else counts them too.
    """

    first_row: int
    input_rows: RowHash = field(default_factory=RowHash)
    rows: int = 0
    nnz: int = 0
    empty: int = 0
    without_token: int = 0
    tokens: int = 0
    skipped: list[SkippedRow] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)  # of each stage, and in total (stages.py)
    _of_rows: list[tuple[npt.NDArray[np.int64], OfRows]] = field(default_factory=lambda: [_NONE])

    def of_rows(self, rows: npt.NDArray[np.uint64], counts: OfRows) -> None:
        """What some source rows add to the counts; a row may come several times."""
        self._of_rows.append((rows.astype(np.int64) - self.first_row, counts))

    def part(self, part: ShardPart) -> ShardPart:
        """Count the rows of a part, and give it back."""
        self.rows += len(part.rows)
        self.nnz += len(part.vectors.weights)
        self.empty += int(np.count_nonzero(np.diff(part.vectors.indptr) == 0))
        return part

    def record(self) -> dict[str, Any]:
        """The counts as done/ keeps them."""
        sums, of_rows = {}, {}
        places, counts = (np.concatenate(arrays) for arrays in zip(*self._of_rows, strict=True))
        there = np.unique(places)
        for name in _NAMES:
            sums[name] = int(counts[name].sum())
            each = np.bincount(places, weights=counts[name]).astype("<u4")
            if (each[there] != _USUAL.get(name, 0)).any():
                of_rows[name] = base64.b64encode(zlib.compress(each.tobytes())).decode()
        return {
            "rows": self.rows,
            "nnz": self.nnz,
            "empty": self.empty,
            **sums,
            "without_token": self.without_token,
            "skipped": len(self.skipped),
            "input_sha256": self.input_rows.hexdigest(),
            "of_rows": of_rows,
            "seconds": {stage: round(seconds, 3) for stage, seconds in self.seconds.items()},
        }


def counts_of(done: Mapping[str, Any], rows: Collection[int]) -> dict[str, int]:
    """What some source rows of a finished shard add to its counts, as far as its record has them.

    A record of an earlier release has none: {}.
    """
    if "of_rows" not in done:
        return {}
    places = np.fromiter(rows, dtype=np.int64, count=len(rows)) - done["first_row"]
    sums = {}
    for name in _NAMES:
        if kept := done["of_rows"].get(name):
            each = np.frombuffer(zlib.decompress(base64.b64decode(kept)), dtype="<u4")
            sums[name] = int(each[places].sum())
        else:
            sums[name] = len(rows) * _USUAL.get(name, 0)
    return sums
