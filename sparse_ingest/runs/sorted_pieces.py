"""More rows of numbers than fit into memory, merged by their first number: what every join over a run is made of.

In: pieces in any order, each sorted as it comes. Out: all rows by ranges of the first number, one range in memory at
a time. The rows are in a file without a name, so that a killed process leaves nothing. First numbers are hashes:
the ranges are equal parts of the 64 bits.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.uint64]


class SortedPieces:
    """Rows of `width` numbers on disk: written by `add`, read once by `ranges`, about `range_rows` at a time."""

    def __init__(self, scratch: Path, width: int, *, rows: int, range_rows: int) -> None:
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
        self._file.write(rows.tobytes())

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
