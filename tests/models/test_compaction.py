"""Pruning and compaction on a device, compared with pruning.py and numpy."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from sparse_ingest.models.heads import compaction
from sparse_ingest.models.heads.compaction import Transfer
from sparse_ingest.pipeline import Pruning
from sparse_ingest.pruning import prune
from sparse_ingest.records import SparseRows

# Few distinct values, so that there are many ties.
VALUES = st.sampled_from([0.0, 0.0, 0.125, 0.1, 0.3, 1.0, 2.5])
RULES = st.builds(
    Pruning,
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
def test_a_device_keeps_the_terms_that_pruning_keeps(rows: list[list[float]], rules: Pruning) -> None:
    """The device also keeps all terms equal to the last one of top_k; pruning on the host drops them."""
    weights = np.array(rows, dtype=np.float32)
    expected = prune(csr(weights), **rules.rules)
    terms = Transfer(torch.from_numpy(weights.copy()), rules, torch.tensor(7)).arrive()
    assert terms.dropped == 7
    came = SparseRows(["a"] * len(weights), np.append(0, terms.counts.cumsum()), terms.token_ids, terms.weights)
    pruned = prune(came, **rules.rules)
    assert pruned.indptr.tolist() == expected.indptr.tolist()
    assert pruned.token_ids.tolist() == expected.token_ids.tolist()
    assert pruned.weights.tobytes() == expected.weights.astype(np.float32).tobytes()
    without_top_k = prune(csr(weights), **replace(rules, top_k=None).rules)
    for place in range(len(weights)):
        last = expected.weights[expected.indptr[place] : expected.indptr[place + 1]].min(initial=np.inf)
        others = without_top_k.weights[without_top_k.indptr[place] : without_top_k.indptr[place + 1]]
        assert terms.counts[place] == np.count_nonzero(others >= last)


@pytest.mark.parametrize("room", [1, 3, 100])
def test_terms_beyond_the_preallocated_room_are_kept(monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    monkeypatch.setattr(compaction, "ROOM", room)
    weights = torch.rand(4, 50, generator=torch.Generator().manual_seed(1)).sub_(0.2).relu_()
    weights[2] = 0
    expected = csr(weights.numpy())
    terms = Transfer(weights, Pruning(), torch.tensor(0)).arrive()
    assert terms.counts.tolist() == np.diff(expected.indptr).tolist() and terms.counts[2] == 0
    assert terms.token_ids.tolist() == expected.token_ids.tolist()
    assert terms.weights.tolist() == expected.weights.tolist()


@pytest.mark.parametrize("rules", [Pruning(), Pruning(top_k=200, max_ratio=0.1, min_weight=0.05)])
def test_the_head_needs_less_than_a_twentieth_of_the_memory_of_logits(rules: Pruning, tmp_path: Path) -> None:
    """Documents of 128 tokens in bfloat16: counts the dense rows of a fused head and their compaction."""
    documents, tokens, vocabulary = 64, 128, 30522
    weights = torch.rand(documents, vocabulary, generator=torch.Generator().manual_seed(1)).sub_(0.99).relu_()
    logits = documents * tokens * vocabulary * torch.bfloat16.itemsize
    allocated = peak_bytes(lambda: Transfer(weights, rules, torch.tensor(0)).arrive(), tmp_path / "trace.json")
    assert 0 < allocated < 0.02 * logits  # measured at all, and small compared with the rows
    assert weights.nbytes + allocated < 0.05 * logits


def peak_bytes(call: Callable[[], object], trace: Path) -> int:
    """Return the peak memory of torch's allocator during a call, above that before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    profiled.export_chrome_trace(str(trace))
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    sizes = [event["args"]["Bytes"] for event in sorted(events, key=lambda event: event["ts"])]
    return int(np.cumsum(sizes).max())
