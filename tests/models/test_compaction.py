"""Pruning and compaction as a device does them, against pruning.py and numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_ingest.models.heads import compaction
from sparse_ingest.models.heads.compaction import Rules, Transfer, kept_terms
from sparse_ingest.pruning import prune
from sparse_ingest.records import SparseRows

# Few values, so that there are many ties.
VALUES = st.sampled_from([0.0, 0.0, 0.125, 0.1, 0.3, 1.0, 2.5])
RULES = st.builds(
    Rules,
    top_k=st.none() | st.integers(1, 14),
    max_ratio=st.none() | st.sampled_from([0.05, 0.3, 0.4, 1.0]),
    min_weight=st.none() | st.sampled_from([0.1, 0.125, 0.3]),
)


def csr(weights: np.ndarray) -> SparseRows:
    documents, columns = np.nonzero(weights)
    indptr = np.searchsorted(documents, np.arange(len(weights) + 1))
    return SparseRows(["a"] * len(weights), indptr, columns.astype(np.uint32), weights[documents, columns])


@settings(max_examples=150)
@given(st.lists(st.lists(VALUES, min_size=12, max_size=12), min_size=1, max_size=5), RULES)
def test_a_device_keeps_the_terms_that_pruning_keeps(rows: list[list[float]], rules: Rules) -> None:
    weights = np.array(rows, dtype=np.float32)
    expected = prune(csr(weights), **rules._asdict())
    terms = Transfer(torch.from_numpy(weights), rules, torch.tensor(7)).arrive()
    assert terms.dropped == 7
    assert terms.counts.tolist() == np.diff(expected.indptr).tolist()
    assert terms.token_ids.tolist() == expected.token_ids.tolist()
    assert terms.weights.tobytes() == expected.weights.astype(np.float32).tobytes()
    # What follows on the host changes nothing any more.
    kept = kept_terms(torch.from_numpy(weights), rules).numpy()
    assert prune(csr(weights * kept), **rules._asdict()).token_ids.tolist() == expected.token_ids.tolist()


@pytest.mark.parametrize("room", [1, 3, 100])
def test_terms_for_which_there_was_no_room_come_too(monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    monkeypatch.setattr(compaction, "ROOM", room)
    weights = torch.rand(4, 50, generator=torch.Generator().manual_seed(1)).sub_(0.2).relu_()
    weights[2] = 0
    expected = csr(weights.numpy())
    terms = Transfer(weights, Rules(), torch.tensor(0)).arrive()
    assert terms.counts.tolist() == np.diff(expected.indptr).tolist() and terms.counts[2] == 0
    assert terms.token_ids.tolist() == expected.token_ids.tolist()
    assert terms.weights.tolist() == expected.weights.tolist()
