"""Properties of the batch plan."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sparse_ingest.models.vectors import plan_batches, usual_batch_tokens

lengths_of = st.lists(st.integers(0, 600), max_size=200).map(lambda lengths: np.array(lengths, dtype=np.int64))


@given(lengths_of, st.integers(1, 4096), st.integers(1, 70))
def test_batches_hold_each_document_once_within_the_budget(lengths, batch_tokens: int, batch_documents: int) -> None:
    batches = plan_batches(lengths, batch_tokens, batch_documents)
    assert sorted(index for batch in batches for index in batch.tolist()) == list(range(len(lengths)))
    for batch in batches:
        assert 1 <= len(batch) <= batch_documents
        assert len(batch) == 1 or len(batch) * lengths[batch].max() <= batch_tokens
    flat = [int(lengths[index]) for batch in batches for index in batch]
    assert flat == sorted(flat, reverse=True)


@given(lengths_of, st.integers(1, 4096))
def test_the_plan_depends_only_on_lengths_and_budget(lengths, batch_tokens: int) -> None:
    before = lengths.copy()
    first, again = (plan_batches(lengths, batch_tokens, 64) for _ in range(2))
    assert [batch.tolist() for batch in first] == [batch.tolist() for batch in again]
    assert [batch.tolist() for batch in plan_batches(lengths.astype(np.int32), batch_tokens, 64)] == [
        batch.tolist() for batch in first
    ]
    assert np.array_equal(lengths, before)


def test_equal_lengths_keep_corpus_order() -> None:
    assert [batch.tolist() for batch in plan_batches(np.array([3, 5, 3, 5, 3]), 10, 64)] == [[1, 3], [0, 2, 4]]
    # Enough documents for an unstable sort to reorder them.
    flat = np.concatenate(plan_batches(np.array([3, 5] * 500), 100, 64))
    assert flat.tolist() == [*range(1, 1000, 2), *range(0, 1000, 2)]


def test_gpu_batches_of_a_narrow_model_hold_more_tokens() -> None:
    narrow, wide = (usual_batch_tokens("cuda", width) for width in (256, 768))
    assert narrow == 131072 and wide == 43690
    assert usual_batch_tokens("cpu", 256) == usual_batch_tokens("cpu", 768) == 2048
