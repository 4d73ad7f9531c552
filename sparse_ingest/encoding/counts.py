"""What the record of a shard in done/ counts, and what each of its rows adds to that.

The sums are what a run reports. Beside them `of_rows` keeps, for each count that a row may add to, the numbers of all
source rows of the shard in order: little-endian uint32, zlib, base64. So a row that leaves its shard later, because
its id is in an earlier one, leaves the sums as well. A count that no row adds to is left out there, and `windows`
where each row has one.

Not covered: `rows`, `nnz` and `empty`, which the shard itself shows.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from sparse_ingest.encoding.row_hash import RowHash
from sparse_ingest.runs.run import SkippedRow
from sparse_ingest.runs.shards import ShardPart

Numbers = npt.NDArray[np.int64]
OF_ROWS = ("truncated", "windows", "reused", "deduplicated", "underflow")
_USUAL = {"windows": 1}  # what each row adds where nothing is said


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
    _of_rows: dict[str, list[tuple[Numbers, Numbers]]] = field(default_factory=lambda: {name: [] for name in OF_ROWS})

    def of_rows(self, name: str, rows: npt.NDArray[np.uint64], counts: Numbers) -> None:
        """What some source rows add to the count `name`; a row may come several times."""
        self._of_rows[name].append((rows.astype(np.int64) - self.first_row, counts))

    def part(self, part: ShardPart) -> ShardPart:
        """Count the rows of a part, and give it back."""
        self.rows += len(part.rows)
        self.nnz += len(part.vectors.weights)
        self.empty += int(np.count_nonzero(np.diff(part.vectors.indptr) == 0))
        return part

    def record(self) -> dict[str, Any]:
        """The counts as done/ keeps them."""
        sums, of_rows = {}, {}
        for name, pieces in self._of_rows.items():
            places, counts = (np.concatenate(arrays) for arrays in zip(_NONE, *pieces, strict=True))
            sums[name] = int(counts.sum())
            each = np.bincount(places, weights=counts).astype("<u4")
            there = np.unique(places)
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


_NONE: Sequence[Numbers] = (np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))


def counts_of(done: Mapping[str, Any], rows: Collection[int]) -> dict[str, int]:
    """What some source rows of a finished shard add to its counts, as far as its record tells.

    A record of an earlier release tells of no row: {}.
    """
    if "of_rows" not in done:
        return {}
    places = np.fromiter(rows, dtype=np.int64, count=len(rows)) - done["first_row"]
    sums = {}
    for name in OF_ROWS:
        if kept := done["of_rows"].get(name):
            each = np.frombuffer(zlib.decompress(base64.b64decode(kept)), dtype="<u4")
            sums[name] = int(each[places].sum())
        else:
            sums[name] = len(rows) * _USUAL.get(name, 0)
    return sums
