"""The counts in a shard's record in done/: their sums, what each row adds to them, and the hash of the source rows.

`of_rows` has, for each count that a row may add to, one number per source row in order: little-endian uint32, zlib,
base64. It allows a row to be removed later, if its id is in an earlier shard. Counts that are zero in every row are
omitted, and `windows` if each row has one.
"""

from __future__ import annotations

import base64
import hashlib
import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from sparse_ingest.records import SourceRow
from sparse_ingest.runs.files import SkippedRow
from sparse_ingest.runs.shards import ShardPart

_NAMES = ("truncated", "windows", "reused", "deduplicated", "underflow")
OF_ROWS = np.dtype([(name, np.int64) for name in _NAMES])
OfRows = npt.NDArray[np.void]  # a field for each count that a row may add to
_NONE = np.empty(0, dtype=np.int64), np.empty(0, dtype=OF_ROWS)
_USUAL = {"windows": 1}  # what each row adds by default

_BLOCK_BYTES = 1 << 18  # hashed at a time, without the GIL


class RowHash:
    """The hash that a resumed run compares to detect changed rows in a finished shard.

    It is the SHA-256 of one line of canonical JSON per row, which is part of the run format: `[row,id,text,fields]`
    for a document, `[row,null]` for a bad row, because its reason may change with the release and contain a path.
    """

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._lines = bytearray()

    def add(self, row: SourceRow) -> None:
        """Add a row."""
        # The bytes of runs.manifest.canonical_json, five times as fast.
        content = (row.row, None) if row.document is None else (row.row, *row.document)
        self._lines += orjson.dumps(content, option=orjson.OPT_APPEND_NEWLINE)
        if len(self._lines) >= _BLOCK_BYTES:
            self._digest.update(self._lines)
            self._lines.clear()

    def hexdigest(self) -> str:
        """Return the hash of the rows added so far."""
        self._digest.update(self._lines)
        self._lines.clear()
        return self._digest.hexdigest()


@dataclass
class WindowCounts:
    """What a window adds to the counts of its shard, in addition to what each row adds."""

    without_token: int = 0
    skipped: list[SkippedRow] = field(default_factory=list)


@dataclass
class Counts:
    """One shard's counts, summed while its parts are encoded.

    `windows` counts the windows that documents were read in, one for a document that is not too long. `deduplicated`
    documents have the vector of an earlier document of the shard. `underflow` and `without_token` do not cover `reused`
    documents.
    """

    first_row: int
    input_rows: RowHash = field(default_factory=RowHash)
    rows: int = 0
    nnz: int = 0
    empty: int = 0
    without_token: int = 0
    skipped: list[SkippedRow] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)  # of each stage, and in total (stages.py)
    _of_rows: list[tuple[npt.NDArray[np.int64], OfRows]] = field(default_factory=lambda: [_NONE])

    def of_rows(self, rows: npt.NDArray[np.uint64], counts: OfRows) -> None:
        """Add what some source rows add to the counts; a row may be repeated."""
        self._of_rows.append((rows.astype(np.int64) - self.first_row, counts))

    def add(self, window: WindowCounts) -> None:
        """Add the counts of a window."""
        self.without_token += window.without_token
        self.skipped += window.skipped

    def part(self, part: ShardPart) -> ShardPart:
        """Count the rows of a part, and return it."""
        self.rows += len(part.rows)
        self.nnz += len(part.vectors.weights)
        self.empty += int(np.count_nonzero(np.diff(part.vectors.indptr) == 0))
        return part

    def record(self) -> dict[str, Any]:
        """Return the counts for the record in done/."""
        sums, of_rows = {}, {}
        places, counts = (np.concatenate(arrays) for arrays in zip(*self._of_rows, strict=True))
        counted = np.unique(places)
        for name in _NAMES:
            sums[name] = int(counts[name].sum())
            each = np.bincount(places, weights=counts[name]).astype("<u4")
            if (each[counted] != _USUAL.get(name, 0)).any():
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
    """Return what some source rows of a finished shard add to its counts; {} for a record of an earlier release."""
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
