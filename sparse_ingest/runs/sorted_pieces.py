"""Joins over a run: rows of numbers on disk, read back by ranges of their first number.

In: pieces in any order. Out: all rows, one range in memory at a time. The first number is a hash, so the ranges are
equal parts of 64 bits. The rows are in an unnamed file, so that a killed process leaves nothing. `match` compares two
sets of documents in such rows: the hash of the id in one or two columns, the hash of the content, and the place in the
set, with `SECOND` added for the second set.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sparse_ingest.storage.durable import naming

Numbers = npt.NDArray[np.uint64]
SECOND = np.uint64(1 << 63)  # in the last column: the row belongs to the second set
_Flags = npt.NDArray[np.bool_]


class SortedPieces:
    """Rows of `width` numbers on disk: written by `add`, read once by `ranges`, about `range_rows` at a time."""

    def __init__(self, scratch: Path, width: int, *, rows: int, range_rows: int) -> None:
        self._scratch = scratch
        self._file = tempfile.TemporaryFile(dir=scratch)  # noqa: SIM115 - lives as long as this object
        self._width = width
        self._ranges = max(1, -(-rows // range_rows))
        self._borders = np.array([(step << 64) // self._ranges for step in range(1, self._ranges)], dtype=np.uint64)
        self._cuts: list[list[int]] = []

    def add(self, rows: Numbers) -> None:
        """Add rows: an array of `width` columns."""
        rows = rows[np.argsort(rows[:, 0], kind="stable")]
        inside = np.searchsorted(np.ascontiguousarray(rows[:, 0]), self._borders).tolist()
        first = self._file.seek(0, 2) // (8 * self._width)
        self._cuts.append([first, *(first + place for place in inside), first + len(rows)])
        with naming(self._scratch):
            self._file.write(rows.tobytes())
            self._file.flush()

    def ranges(self) -> Iterator[Numbers]:
        """Yield the rows of each range, those with equal first numbers in the order of `add`; then free the disk."""
        for step in range(self._ranges):
            pieces = [self._read(cut[step], cut[step + 1]) for cut in self._cuts]
            yield np.concatenate(pieces) if pieces else np.empty((0, self._width), np.uint64)
        self._file.close()

    def _read(self, start: int, end: int) -> Numbers:
        self._file.seek(start * 8 * self._width)
        content = self._file.read((end - start) * 8 * self._width)
        return np.frombuffer(content, dtype=np.uint64).reshape(-1, self._width)


def mapped(file: IO[bytes], kind: npt.DTypeLike) -> npt.NDArray[Any]:
    """Map the numbers that were written to a file. The mapping stays valid when the file is closed."""
    file.flush()
    # An empty file cannot be mapped.
    return np.memmap(file, dtype=kind, mode="r") if file.tell() else np.empty(0, kind)


class Match(NamedTuple):
    """The rows of one range by id: their places, and flags over them.

    Rows of the first set can be `missing` in the second. Rows of the second set are `extra`, `repeat` an id of both
    sets, or have `changed`: the row before is the one of the first set they were compared with.
    """

    places: npt.NDArray[np.int64]
    missing: _Flags
    extra: _Flags
    repeat: _Flags
    changed: _Flags


def match(rows: Numbers) -> Match:
    """Match all rows of one range. If an id is repeated in the first set, its last row is compared."""
    rows = rows[np.lexsort((rows[:, -1], *rows[:, -3::-1].T))]
    ids, content, second = rows[:, :-2], rows[:, -2], rows[:, -1] >= SECOND
    starts = np.ones(len(rows), dtype=np.bool_)
    starts[1:] = (ids[1:] != ids[:-1]).any(axis=1)
    document = np.cumsum(starts) - 1
    in_first, in_second = ((np.bincount(document, weights=those) > 0)[document] for those in (~second, second))
    follows = second & ~starts
    follows[1:] &= ~second[:-1]
    changed = follows.copy()
    changed[1:] &= content[1:] != content[:-1]
    places = (rows[:, -1] & ~SECOND).astype(np.int64)
    return Match(places, ~second & ~in_second, second & ~in_first, second & in_first & ~follows, changed)
