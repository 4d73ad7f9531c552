"""Two ledgers compared on disk."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from sparse_ingest.runs.matching import Ledger, compare, row_fingerprints, term_fingerprints

Content = dict[str, int]


def ledger(path: Path, documents: list[tuple[str, int]]) -> Ledger:
    """Documents with a fingerprint each; the place is where it stands in the list."""
    made = Ledger(path)
    for start in range(0, len(documents), 7):
        some = documents[start : start + 7]
        fingerprints = np.array([fingerprint for _, fingerprint in some], dtype=np.uint64)
        made.add([doc_id for doc_id, _ in some], np.arange(start, start + len(some)), fingerprints)
    made.close()
    return made


def difference(
    tmp_path: Path, expected: list[tuple[str, int]], found: list[tuple[str, int]], range_entries: int = 10**6
) -> tuple[set[str], list[str], set[str]]:
    """Ids that are missing, extra or there once more, differing."""
    missing, extra, differing = set(), [], set()
    ledgers = ledger(tmp_path / "expected", expected), ledger(tmp_path / "found", found)
    for mismatch in compare(*ledgers, range_entries=range_entries):
        missing |= {expected[place][0] for place in mismatch.missing.tolist()}
        extra += [found[place][0] for place in [*mismatch.extra.tolist(), *mismatch.doubled.tolist()]]
        differing |= {expected[place][0] for place in mismatch.differing.tolist()}
    return missing, sorted(extra), differing


@pytest.mark.parametrize("range_entries", [10**6, 11])
def test_what_one_side_lacks_and_what_differs_is_found_in_any_order(tmp_path: Path, range_entries: int) -> None:
    rng = random.Random(0)
    documents = [(f"doc {number}", number * 2**50) for number in range(200)]
    found = [(doc_id, fingerprint + (doc_id == "doc 40")) for doc_id, fingerprint in documents if doc_id != "doc 3"]
    found += [("stranger", 1), ("doc 7", 7 * 2**50)]
    rng.shuffle(found)
    assert difference(tmp_path, documents, found, range_entries) == ({"doc 3"}, ["doc 7", "stranger"], {"doc 40"})


def test_two_equal_sides_and_two_empty_ones_have_no_difference(tmp_path: Path) -> None:
    documents = [(f"doc {number}", 5) for number in range(50)]
    assert difference(tmp_path, documents, documents[::-1]) == (set(), [], set())
    assert difference(tmp_path, [], []) == (set(), [], set())


def test_one_side_may_be_empty(tmp_path: Path) -> None:
    documents = [("a", 1), ("b", 2)]
    assert difference(tmp_path, documents, []) == ({"a", "b"}, [], set())
    assert difference(tmp_path, [], documents) == (set(), ["a", "b"], set())


def test_a_fingerprint_is_a_sum_in_any_order_and_changes_with_every_bit() -> None:
    tokens, codes = np.array([1, 5, 9]), np.array([7, 8, 9], dtype=np.uint32)
    terms = term_fingerprints(tokens, codes)
    indptr = np.array([0, 2, 2, 3])
    rows = row_fingerprints(indptr, terms)
    assert rows.tolist() == [(int(terms[0]) + int(terms[1])) % 2**64, 0, int(terms[2])]
    assert row_fingerprints(np.array([0, 2]), terms[[1, 0]])[0] == rows[0]
    swapped = term_fingerprints(np.array([5, 1]), codes[:2])
    assert row_fingerprints(np.array([0, 2]), swapped)[0] != rows[0]
    several = term_fingerprints(np.repeat(np.arange(300), 300), np.tile(np.arange(300), 300).astype(np.uint32))
    assert len(np.unique(several)) == 90_000
