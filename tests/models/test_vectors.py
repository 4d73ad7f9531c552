"""CPU workers and GPU-style asynchronous batches give the same vectors."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest
import torch
from support.checkpoints import TEXTS, build_encoder, make_masked_lm

from sparse_ingest.models import vectors
from sparse_ingest.models.heads import compaction
from sparse_ingest.models.memory import DidNotFit
from sparse_ingest.models.threads import available
from sparse_ingest.models.vectors import NotFinite
from sparse_ingest.pipeline import Pruning

MANY = [" ".join(text.split()[: 2 + place % 7]) for place in range(6) for text in TEXTS]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory):
    return build_encoder(make_masked_lm(tmp_path_factory.mktemp("vectors") / "bert"), batch_tokens=128)


def answers(maker, results, token_ids, rules=Pruning()):  # noqa: B008
    batches = [np.array(places) for places in np.array_split(np.arange(len(token_ids)), 7)]
    return list(results(token_ids, batches, rules))


@pytest.mark.parametrize("static", [True, False])
def test_asynchronous_batches_match_workers(encoder, static: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not static:

        def missing(*_, **__):
            raise NotImplementedError

        monkeypatch.setattr(torch, "nonzero_static", missing)
    maker, token_ids = encoder.maker, [ids for ids, _ in encoder.tokenize(MANY)]
    maker._tokenless = torch.tensor([7, 9])
    expected = answers(maker, maker.on_workers, token_ids)
    found = answers(maker, maker.ahead, token_ids)
    assert sum(dropped for _, dropped in expected) > 0
    for (rows, dropped), (others, again) in zip(expected, found, strict=True):
        assert dropped == again
        for (ids, weights), (other_ids, other_weights) in zip(rows, others, strict=True):
            assert ids.tolist() == other_ids.tolist()
            np.testing.assert_allclose(weights, other_weights, rtol=1e-6)


@pytest.mark.parametrize("way", ["on_workers", "ahead"])
def test_nan_hidden_states_are_refused(encoder, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They must not be taken for a document without terms, as a maximum over NaN may look like one."""
    maker, token_ids = encoder.maker, [ids for ids, _ in encoder.tokenize(MANY)]
    hidden = maker.body.hidden

    def overflowing(*given):
        rows, packing = hidden(*given)
        rows[-1, 0] = float("-inf")
        return rows, packing

    monkeypatch.setattr(maker.body, "hidden", overflowing)
    monkeypatch.setattr(maker, "_head", lambda rows, packing: torch.zeros(len(packing.lengths), len(maker.vocabulary)))
    with pytest.raises(NotFinite, match="infinite or undefined in float32"):
        answers(maker, getattr(maker, way), token_ids)


def test_pruning_is_applied_before_the_copy_to_the_host(encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    maker, token_ids = encoder.maker, [ids for ids, _ in encoder.tokenize(MANY)]
    copied = []
    monkeypatch.setattr(compaction, "ROOM", 3)
    monkeypatch.setattr(compaction, "_copied", lambda tensor: copied.append(len(tensor)) or (tensor, None))
    for rows, _ in answers(maker, maker.ahead, token_ids, Pruning(top_k=3)):
        assert [len(ids) for ids, _ in rows] == [3] * len(rows)
    assert max(copied) <= 1 + 7 * (len(MANY) // 7 + 1)


def test_out_of_memory_in_an_asynchronous_batch_names_the_batch(encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    maker, token_ids = encoder.maker, [ids for ids, _ in encoder.tokenize(MANY)]
    begin = maker._start

    def failing(ids, rules):
        if len(seen) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        seen.append(len(ids))
        return begin(ids, rules)

    seen: list[int] = []
    monkeypatch.setattr(maker, "_start", failing)
    with pytest.raises(DidNotFit) as caught:
        answers(maker, maker.ahead, token_ids)
    assert caught.value.places[0] == sum(seen)


@pytest.fixture
def threads(encoder, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let a maker use three cores for any lone batch. Return the number of threads of each batch, as they come."""
    maker, seen = encoder.maker, []
    compute = maker.compute
    monkeypatch.setattr(maker, "_all_cores", True)
    monkeypatch.setattr(maker, "workers", 3)
    monkeypatch.setattr(maker, "compute", lambda *given: seen.append(torch.get_num_threads()) or compute(*given))
    monkeypatch.setattr(vectors, "LEAST_OF_THREAD", 1)
    torch.set_num_threads(4)
    return seen


@pytest.fixture(autouse=True)
def usual_threads():
    usual = torch.get_num_threads()
    yield
    torch.set_num_threads(usual)


def test_a_lone_batch_uses_all_cores(encoder, threads: list[int]) -> None:
    [expected] = answers_alone(encoder, MANY[:3])
    encoder.maker._all_cores = False
    [found] = answers_alone(encoder, MANY[:3])
    assert threads == [3, 1]
    for (ids, weights), (other_ids, other_weights) in zip(found, expected, strict=True):
        assert ids.tolist() == other_ids.tolist()
        np.testing.assert_allclose(weights, other_weights, rtol=1e-5, atol=1e-6)


def test_torch_has_one_thread_beside_linear_layers_in_integers(
    encoder, threads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder.maker, "_in_integers", True)
    compute, of_functions = encoder.maker.compute, []
    monkeypatch.setattr(encoder.maker, "compute", lambda *given: of_functions.append(available()) or compute(*given))
    answers_alone(encoder, MANY[:3])
    assert threads == [1] and of_functions == [3] and available() == 4
    encoder.encode(MANY)
    assert set(threads) == {1} and set(of_functions[1:]) == {1}


def answers_alone(encoder, texts):
    token_ids = [ids for ids, _ in encoder.tokenize(texts)]
    rows, _ = encoder.maker.make(token_ids, 1 << 20, lambda *_: None)
    return [rows]


def test_threads_of_a_lone_batch_are_at_most_those_of_torch_and_as_many_as_its_work_is_worth(
    encoder, threads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(2)
    answers_alone(encoder, MANY[:1])
    monkeypatch.setattr(vectors, "LEAST_OF_THREAD", 1e12)
    answers_alone(encoder, MANY[:1])
    assert threads == [2, 1]


def test_several_batches_have_one_thread_each(encoder, threads: list[int]) -> None:
    encoder.encode(MANY)
    assert len(threads) > 1 and set(threads) == {1}


def test_a_forked_process_does_not_wait_for_threads_that_it_lacks(encoder, threads: list[int]) -> None:
    """torch's product of large matrices starts the threads of OpenMP, for which a forked process would wait."""
    large = torch.ones(512, 512)
    large @ large
    answers_alone(encoder, MANY[:1])
    if (child := os.fork()) == 0:
        signal.alarm(60)
        threads.clear()
        try:
            answers_alone(encoder, MANY[:1])
            build_encoder(encoder._folder).encode(MANY[:1])
        finally:
            os._exit(threads != [1])
    assert threads == [3] and os.waitpid(child, 0)[1] == 0
