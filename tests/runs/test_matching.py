"""Matching two sets of documents on disk."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from sparse_ingest.runs.ids import hash_id
from sparse_ingest.runs.sorted_pieces import SECOND, SortedPieces, match


def add(pieces: SortedPieces, documents: list[tuple[str, int]], mark: int) -> None:
    """Add documents with their fingerprints; the place is the position in the list."""
    for start in range(0, len(documents), 7):
        some = enumerate(documents[start : start + 7], start=start)
        pieces.add(np.array([(hash_id(doc_id), content, place | mark) for place, (doc_id, content) in some], np.uint64))


def difference(
    tmp_path: Path, expected: list[tuple[str, int]], found: list[tuple[str, int]], range_entries: int = 10**6
) -> tuple[set[str], list[str], set[str]]:
    """Return the missing ids, the extra or repeated ones, and the differing ones. Adds the second set first."""
    missing, extra, differing = set(), [], set()
    pieces = SortedPieces(tmp_path, 3, rows=len(expected) + len(found), range_rows=range_entries)
    add(pieces, found, int(SECOND))
    add(pieces, expected, 0)
    for rows in pieces.ranges():
        matched = match(rows)
        missing |= {expected[place][0] for place in matched.places[matched.missing].tolist()}
        extra += [found[place][0] for place in matched.places[matched.extra | matched.repeat].tolist()]
        differing |= {found[place][0] for place in matched.places[matched.changed].tolist()}
        before = matched.places[np.flatnonzero(matched.changed) - 1].tolist()
        assert {expected[place][0] for place in before} <= differing
    return missing, sorted(extra), differing


@pytest.mark.parametrize("range_entries", [10**6, 11])
def test_missing_extra_and_differing_documents_are_found_in_any_order(tmp_path: Path, range_entries: int) -> None:
    rng = random.Random(0)
    documents = [(f"doc {number}", number * 2**50) for number in range(200)]
    found = [(doc_id, fingerprint + (doc_id == "doc 40")) for doc_id, fingerprint in documents if doc_id != "doc 3"]
    found += [("stranger", 1), ("doc 7", 7 * 2**50)]
    rng.shuffle(found)
    assert difference(tmp_path, documents, found, range_entries) == ({"doc 3"}, ["doc 7", "stranger"], {"doc 40"})


def test_equal_and_empty_sets_have_no_difference(tmp_path: Path) -> None:
    documents = [(f"doc {number}", 5) for number in range(50)]
    assert difference(tmp_path, documents, documents[::-1]) == (set(), [], set())
    assert difference(tmp_path, [], []) == (set(), [], set())


def test_one_set_may_be_empty(tmp_path: Path) -> None:
    documents = [("a", 1), ("b", 2)]
    assert difference(tmp_path, documents, []) == ({"a", "b"}, [], set())
    assert difference(tmp_path, [], documents) == (set(), ["a", "b"], set())
