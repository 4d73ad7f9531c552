"""More rows of numbers than fit into memory, merged by their first number: what every join over a run is made of.

In: pieces in any order, each sorted as it comes. Out: all rows by ranges of the first number, one range in memory at
a time. The rows lie in a file without a name, so that a killed process leaves nothing. First numbers are hashes:
the ranges are equal parts of the 64 bits.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TypeVar

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.uint64]
_Kind = TypeVar("_Kind", bound=np.generic)


class SortedPieces:
    """Rows of `width` numbers on disk, gathered by `add`, given back by `ranges`, `range_rows` at a time or so."""

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
        """The rows of each range, unsorted: of equal first numbers the row that was added first comes first."""
        for step in range(self._ranges):
            pieces = [self._read(cut[step], cut[step + 1]) for cut in self._cuts]
            yield np.concatenate(pieces) if pieces else np.empty((0, self._width), np.uint64)

    def close(self) -> None:
        """Give the disk space back."""
        self._file.close()

    def _read(self, start: int, end: int) -> Numbers:
        self._file.seek(start * 8 * self._width)
        content = self._file.read((end - start) * 8 * self._width)
        return np.frombuffer(content, dtype=np.uint64).reshape(-1, self._width)


def mapped(file: IO[bytes], kind: type[_Kind]) -> npt.NDArray[_Kind]:
    """What was written to a file, as an array of `kind` that lies on disk; the mapping outlives the file's name."""
    with file:
        file.flush()
        # An empty file cannot be mapped.
        return np.memmap(file, dtype=kind, mode="r+") if file.tell() else np.empty(0, kind)
