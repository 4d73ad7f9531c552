"""More rows of numbers than fit into memory, joined by their first number: what every join over a run is made of.

In: pieces in any order, each sorted as it comes. Out: all rows by ranges of the first number, one range in memory at
a time. The rows are in a file without a name, so that a killed process leaves nothing. First numbers are hashes:
the ranges are equal parts of the 64 bits.

`match` compares two sets of documents in such rows, of three or four columns: one or two numbers for the hash of the
id, the content, and the place in the set, with `SECOND` added in the second set. Not covered: in what two contents
differ.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.uint64]
SECOND = np.uint64(1 << 63)  # in the last column: the row is of the second set
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
        """Keep some rows: an array of `width` columns."""
        rows = rows[np.argsort(rows[:, 0], kind="stable")]
        inside = np.searchsorted(np.ascontiguousarray(rows[:, 0]), self._borders).tolist()
        first = self._file.seek(0, 2) // (8 * self._width)
        self._cuts.append([first, *(first + place for place in inside), first + len(rows)])
        try:
            self._file.write(rows.tobytes())
            self._file.flush()
        except OSError as error:  # which names no file
            raise OSError(error.errno, error.strerror, str(self._scratch)) from error

    def ranges(self) -> Iterator[Numbers]:
        """Yield the rows of each range, unsorted: of equal first numbers the row that was added first comes first.

        The disk space is freed at the end.
        """
        for step in range(self._ranges):
            pieces = [self._read(cut[step], cut[step + 1]) for cut in self._cuts]
            yield np.concatenate(pieces) if pieces else np.empty((0, self._width), np.uint64)
        self._file.close()

    def _read(self, start: int, end: int) -> Numbers:
        self._file.seek(start * 8 * self._width)
        content = self._file.read((end - start) * 8 * self._width)
        return np.frombuffer(content, dtype=np.uint64).reshape(-1, self._width)


def mapped(file: IO[bytes], kind: npt.DTypeLike) -> npt.NDArray[Any]:
    """Map the numbers that were written to a file. The mapping outlives the file's name."""
    file.flush()
    # An empty file cannot be mapped.
    return np.memmap(file, dtype=kind, mode="r") if file.tell() else np.empty(0, kind)


class Match(NamedTuple):
    """The rows of one range by id: their places, and flags over them.

    Of the first set are those that are `missing` in the second one; of the second set those that are `extra`, those
    that `repeat` an id of both sets, and those whose content is `changed` or the `same`. The row of the first set that
    the last two were compared with is right before them.
    """

    places: npt.NDArray[np.int64]
    missing: _Flags
    extra: _Flags
    repeat: _Flags
    changed: _Flags
    same: _Flags


def match(rows: Numbers) -> Match:
    """Match all rows of one range. Ids of the first set differ; one that does not is compared by its last place."""
    rows = rows[np.lexsort((rows[:, -1], *rows[:, -3::-1].T))]
    ids, content, second = rows[:, :-2], rows[:, -2], rows[:, -1] >= SECOND
    begins = np.ones(len(rows), dtype=np.bool_)
    begins[1:] = (ids[1:] != ids[:-1]).any(axis=1)
    document = np.cumsum(begins) - 1
    in_first, in_second = ((np.bincount(document, weights=those) > 0)[document] for those in (~second, second))
    follows = second & ~begins
    follows[1:] &= ~second[:-1]
    same = follows.copy()
    same[1:] &= content[1:] == content[:-1]
    places = (rows[:, -1] & ~SECOND).astype(np.int64)
    return Match(places, ~second & ~in_second, second & ~in_first, second & in_first & ~follows, follows & ~same, same)
