"""Fingerprints of documents."""

from __future__ import annotations

import numpy as np

from sparse_ingest.verification.loaded import row_fingerprints, term_fingerprints


def test_a_fingerprint_ignores_the_order_of_terms_and_changes_with_every_bit() -> None:
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
