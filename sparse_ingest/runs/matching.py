"""Two large sets of documents compared, each known by the hash of its id and a fingerprint of its content.

In: two `Ledger`s on disk. Out: what is in one of them only, or in both with different fingerprints. The hash space is
walked in ranges, so that only one range of both is in memory at a time. A fingerprint is a sum over the terms of a
document, so that terms may come in any order: of two contents that differ, one in 2^64 pairs looks the same.
Not covered: which weights differ (ask for the documents that are named here).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sparse_ingest.runs.ids import hash_id

RANGE_ENTRIES = 4_000_000  # of both ledgers held at a time: 24 bytes each
_CHUNK = 1 << 20
_ENTRY = np.dtype([("hash", "<u8"), ("fingerprint", "<u8"), ("place", "<i8")])
_Places = npt.NDArray[np.int64]


class Ledger:
    """Documents in a file: hash of the id, fingerprint, and the place that the caller finds the document by."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("wb")
        self.length = 0

    def add(self, ids: Iterable[str], places: _Places, fingerprints: npt.NDArray[np.uint64] | None = None) -> None:
        """Add documents; their fingerprints may be filled in later, by place."""
        entries = np.zeros(len(places), dtype=_ENTRY)
        entries["hash"] = np.fromiter(map(hash_id, ids), dtype=np.uint64, count=len(places))
        entries["place"] = places
        if fingerprints is not None:
            entries["fingerprint"] = fingerprints
        entries.tofile(self._file)
        self.length += len(entries)

    def close(self) -> None:
        """Write what was added."""
        self._file.close()

    def open(self) -> npt.NDArray[Any]:
        """All entries, in the order they were added, changeable in place."""
        if not self.length:
            return np.zeros(0, dtype=_ENTRY)
        return np.memmap(self._path, dtype=_ENTRY, mode="r+")

    def within(self, low: int, high: int) -> npt.NDArray[Any]:
        """The entries with hashes in [low, high), sorted by hash."""
        entries = self.open()
        # 2^64 is no uint64: the last value is included instead.
        last = np.uint64(high - 1)
        found = [np.zeros(0, dtype=_ENTRY)]
        for start in range(0, len(entries), _CHUNK):
            some = entries[start : start + _CHUNK]
            found.append(np.array(some[(some["hash"] >= np.uint64(low)) & (some["hash"] <= last)]))
        together = np.concatenate(found)
        return together[np.argsort(together["hash"], kind="stable")]


class Mismatch(NamedTuple):
    """Places of documents: in `expected` only, in `found` only, there once more, in both but not the same."""

    missing: _Places
    extra: _Places
    doubled: _Places
    differing: _Places  # in `expected`


def compare(expected: Ledger, found: Ledger, *, range_entries: int = RANGE_ENTRIES) -> Iterator[Mismatch]:
    """Compare two closed ledgers by ranges of hash; the ids of `expected` must differ."""
    ranges = max(1, -(-(expected.length + found.length) // range_entries))
    for step in range(ranges):
        low, high = (step << 64) // ranges, ((step + 1) << 64) // ranges
        wanted, there = expected.within(low, high), found.within(low, high)
        # The first of equal hashes answers for the document.
        first = np.ones(len(there), dtype=np.bool_)
        first[1:] = there["hash"][1:] != there["hash"][:-1]
        once = there[first]
        present = np.isin(wanted["hash"], once["hash"])
        at = np.searchsorted(once["hash"], wanted["hash"][present])
        differs = once["fingerprint"][at] != wanted["fingerprint"][present]
        known = np.isin(there["hash"], wanted["hash"])
        yield Mismatch(
            wanted["place"][~present],
            there["place"][~known],
            there["place"][known & ~first],
            wanted["place"][present][differs],
        )


def term_fingerprints(tokens: npt.NDArray[Any] | int, codes: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
    """A number for each pair of a token id and what is stored for it."""
    mixed = (np.asarray(tokens).astype(np.uint64) << np.uint64(32)) | codes.astype(np.uint64)
    # The finalizer of splitmix64: a change of one bit changes half of the others.
    mixed = (mixed + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def row_fingerprints(indptr: npt.NDArray[np.int64], terms: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The fingerprints of rows: the sums of those of their terms, modulo 2^64."""
    before = np.zeros(len(terms) + 1, dtype=np.uint64)
    np.cumsum(terms, out=before[1:])
    return before[indptr[1:]] - before[indptr[:-1]]
