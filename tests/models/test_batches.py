"""Properties of the batch plan."""

from __future__ import annotations

import heapq
import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sparse_ingest.models.vectors import LEAST_TOKENS, SHARES, plan_batches, usual_batch_tokens

lengths_of = st.lists(st.integers(0, 600), max_size=200).map(lambda lengths: np.array(lengths, dtype=np.int64))


@given(lengths_of, st.integers(1, 4096), st.integers(1, 70), st.booleans())
def test_batches_hold_each_document_once_within_the_budget(
    lengths, batch_tokens: int, batch_documents: int, for_cores: bool
) -> None:
    batches = plan_batches(lengths, batch_tokens, batch_documents, for_cores=for_cores)
    assert sorted(index for batch in batches for index in batch.tolist()) == list(range(len(lengths)))
    for batch in batches:
        assert 1 <= len(batch) <= batch_documents
        assert len(batch) == 1 or len(batch) * lengths[batch].max() <= batch_tokens
    flat = [int(lengths[index]) for batch in batches for index in batch]
    assert flat == sorted(flat, reverse=True)


@given(lengths_of, st.integers(1, 4096), st.booleans())
def test_the_plan_depends_only_on_lengths_and_budget(lengths, batch_tokens: int, for_cores: bool) -> None:
    before = lengths.copy()
    first, again, short = (
        [batch.tolist() for batch in plan_batches(given_as, batch_tokens, 64, for_cores=for_cores)]
        for given_as in (lengths, lengths, lengths.astype(np.int32))
    )
    assert first == again == short
    assert np.array_equal(lengths, before)


def test_equal_lengths_keep_corpus_order() -> None:
    batches = plan_batches(np.array([3, 5, 3, 5, 3]), 10, 64, for_cores=False)
    assert [batch.tolist() for batch in batches] == [[1, 3], [0, 2, 4]]
    # Enough documents for an unstable sort to reorder them.
    flat = np.concatenate(plan_batches(np.array([3, 5] * 500), 100, 64, for_cores=True))
    assert flat.tolist() == [*range(1, 1000, 2), *range(0, 1000, 2)]


@given(lengths_of, st.sampled_from([2, 4, SHARES]))
def test_no_core_waits_long_for_the_last_batch(lengths, cores: int) -> None:
    batches = [int(lengths[batch].sum()) for batch in plan_batches(lengths, 2048, 64, for_cores=True)]
    busy = [0] * cores
    for tokens in batches:
        heapq.heapreplace(busy, busy[0] + tokens)
    left = sum(batches)
    for tokens, batch in zip(batches, plan_batches(lengths, 2048, 64, for_cores=True), strict=True):
        assert len(batch) == 1 or tokens <= max(left // SHARES, LEAST_TOKENS)
        left -= tokens
    assert max(busy) - min(busy) <= max([LEAST_TOKENS, sum(batches) // SHARES, *lengths.tolist()])


@given(st.lists(st.integers(1, 64), min_size=40, max_size=300).map(np.array))
def test_batches_for_cores_are_not_too_small(lengths) -> None:
    batches = plan_batches(lengths, 2048, 1000, for_cores=True)
    least = min(LEAST_TOKENS, 8 * math.isqrt(int(lengths.sum())))
    for batch in batches[:-1]:
        assert (len(batch) + 1) * lengths[batch].max() > least


def test_small_inputs_are_split_for_the_cores_of_a_cpu_and_not_for_a_gpu() -> None:
    def sizes(documents: int, length: int, *, for_cores: bool) -> list[int]:
        return [len(batch) for batch in plan_batches(np.full(documents, length), 2048, 64, for_cores=for_cores)]

    assert sizes(8, 93, for_cores=True) == [2, 2, 2, 2] and sizes(2, 93, for_cores=True) == [1, 1]
    assert sizes(64, 127, for_cores=True)[:2] == [6, 6] and sizes(1, 93, for_cores=True) == [1]
    assert sizes(8, 93, for_cores=False) == [8]
    # Most batches of a large input are as large as without it.
    assert sum(size == 16 for size in sizes(8192, 128, for_cores=True)) >= 500


def test_batches_for_cores_have_few_sizes() -> None:
    sizes = {len(batch) for batch in plan_batches(np.full(8192, 16), 2048, 1000, for_cores=True)}
    assert sizes == {128, 96, 64, 48, 32, 24, 16}


def test_gpu_batches_of_a_narrow_model_hold_more_tokens() -> None:
    narrow, wide = (usual_batch_tokens("cuda", width) for width in (256, 768))
    assert narrow == 131072 and wide == 43690
    assert usual_batch_tokens("cpu", 256) == usual_batch_tokens("cpu", 768) == 2048
