"""CPU workers and GPU-style asynchronous batches give the same vectors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.checkpoints import TEXTS, build_encoder, make_masked_lm

from sparse_ingest.models.heads import compaction
from sparse_ingest.models.memory import DidNotFit
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
