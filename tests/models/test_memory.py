"""Running out of memory: the batch budget is halved and stays so; a text that fits no budget is named."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.checkpoints import build_encoder, make_masked_lm
from support.forked import PRELOADED
from support.reporters import Recorder

from sparse_ingest.models import text_windows, vectors
from sparse_ingest.models.memory import BudgetLowered, DocumentTooLarge, is_out_of_memory, until_it_fits
from sparse_ingest.models.query_encoders import MaskedLMQueryEncoder
from sparse_ingest.models.text_windows import DocumentSide
from sparse_ingest.pipeline import Pipeline

TEXTS = ["river stone", "lamp " * 20, "the water of the river " * 4, "stone", "bird " * 30]


class SmallMemory:
    """A head that raises torch's out-of-memory error above a number of rows."""

    def __init__(self, head, rows: int, error: BaseException) -> None:
        self.head, self.rows, self.error = head, rows, error

    def __call__(self, rows: torch.Tensor, packing) -> torch.Tensor:
        if len(rows) > self.rows:
            raise self.error
        return self.head(rows, packing)


def torch_memory_error(size: int) -> RuntimeError:
    """Return the error of torch's CPU allocator for a size that no machine has."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(size, dtype=torch.float64)
    return caught.value


ERRORS = {
    "gpu": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "cpu": torch_memory_error(1 << 55),
    "python": MemoryError(),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_masked_lm(tmp_path_factory.mktemp("memory") / "bert")


def small(model: Path, rows: int, error: BaseException = ERRORS["python"], batch_tokens: int = 96):
    encoder = build_encoder(model, batch_tokens=batch_tokens)
    encoder.maker._head = SmallMemory(encoder.maker._head, rows, error)
    return encoder


@pytest.mark.parametrize("name", ERRORS)
def test_out_of_memory_errors_are_recognized(name: str) -> None:
    assert is_out_of_memory(ERRORS[name])


def test_other_errors_are_not_taken_for_out_of_memory(model: Path) -> None:
    assert is_out_of_memory(RuntimeError("could not create a primitive"))
    assert not is_out_of_memory(RuntimeError("could not create a primitive descriptor for the inner product"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        small(model, 1, RuntimeError("mat1 and mat2 shapes cannot be multiplied")).encode(TEXTS)


@pytest.mark.parametrize("name", ERRORS)
def test_the_budget_is_halved_until_batches_fit_and_stays_so(model: Path, name: str) -> None:
    encoder = small(model, 40, ERRORS[name])
    lowered = []
    while True:
        try:
            found = encoder.encode(TEXTS)
            break
        except BudgetLowered as error:
            lowered.append(error.batch_tokens)
            assert "no memory for a batch" in str(error)
    assert lowered and lowered == sorted(lowered, reverse=True) and encoder.batch_tokens == lowered[-1] <= 48
    # Same result as with that budget from the start.
    expected = build_encoder(model, batch_tokens=lowered[-1]).encode(TEXTS)
    assert found.vectors.token_ids.tobytes() == expected.vectors.token_ids.tobytes()
    assert found.vectors.weights.tobytes() == expected.vectors.weights.tobytes()
    encoder.encode(TEXTS)


@pytest.mark.parametrize("way", ["encode", "encode_windows", "encode_passages"])
def test_a_text_that_fits_no_budget_is_reported(model: Path, way: str) -> None:
    encoder = small(model, 20)

    def once() -> None:
        given = TEXTS[:4] if way == "encode" else encoder.cut(TEXTS[:4])
        list(getattr(encoder, way)(given))

    with pytest.raises(DocumentTooLarge) as caught:
        until_it_fits(once)
    lengths = [len(ids) for ids, _ in encoder.tokenize(TEXTS[:4])]
    assert caught.value.text == int(np.argmax(lengths)) and caught.value.tokens == max(lengths)
    assert f"its {caught.value.tokens} tokens do not fit into the memory of cpu" in str(caught.value)


def test_a_window_that_fits_no_budget_is_reported_with_its_text(model: Path) -> None:
    encoder = build_encoder(model, max_length=10, window_stride=4)
    maker, compute, calls = encoder.maker, encoder.maker.compute, []
    maker.workers = 1

    def failing(token_ids, places):
        calls.append(len(token_ids))
        if any(np.array_equal(ids, unlucky) for ids in token_ids):
            with maker._fitting(places, token_ids):
                raise MemoryError
        return compute(token_ids, places)

    unlucky = encoder.cut(["stone", "bird " * 5 + "lamp " * 12])[1].window(2)
    maker.compute = failing
    with pytest.raises(DocumentTooLarge) as caught:
        until_it_fits(lambda: encoder.encode_windows(encoder.cut(["stone", "bird " * 5 + "lamp " * 12, "river"])))
    assert caught.value.text == 1 and calls


def test_queries_are_encoded_with_the_smaller_budget(model: Path) -> None:
    expected = MaskedLMQueryEncoder(build_encoder(model)).encode(TEXTS)
    found = MaskedLMQueryEncoder(small(model, 40)).encode(TEXTS)
    assert [list(one) for one in found] == [list(one) for one in expected]


def test_in_memory_encoding_uses_the_smaller_budget_and_counts_each_text_once(model: Path) -> None:
    side, heard = DocumentSide(small(model, 40), Pipeline()), Recorder()
    found = side.encode(TEXTS, None, heard)
    expected = build_encoder(model, batch_tokens=side.encoder.batch_tokens).encode(TEXTS)
    assert found.weights.tobytes() == expected.vectors.weights.tobytes() and side.encoder.batch_tokens < 96
    assert heard.done == len(TEXTS) and "no memory for a batch" in heard.notes[0]


def test_an_in_memory_text_that_fits_no_budget_is_reported_with_its_position(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_windows, "WINDOW_TEXTS", 100)
    texts = ["stone"] * 100 + ["river", "lamp " * 40]
    with pytest.raises(DocumentTooLarge, match="Text 101: its 42 tokens do not fit"):
        DocumentSide(small(model, 40), Pipeline()).encode(texts, None, Recorder())


@pytest.mark.slow
def test_encoding_survives_a_memory_limit_of_the_system(model: Path) -> None:
    """A real limit on the address space of a child process, not a test head."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    answers = context.Queue()
    child = context.Process(target=_encode_within_a_limit, args=(model, answers))
    child.start()
    lowered, found = answers.get(timeout=120)
    child.join()
    assert child.exitcode == 0 and lowered >= 1
    assert found == [len(build_encoder(model).encode(MANY[:1]).vectors.token_ids)] * len(MANY)


MANY = ["river stone lamp the of water bird cloud"] * 20_000


def _encode_within_a_limit(model: Path, answers: Any) -> None:
    import resource

    vectors.BATCH_DOCUMENTS["cpu"] = len(MANY)
    encoder = build_encoder(model, batch_tokens=1 << 22)
    encoder.encode(MANY[:10])
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (32 << 20), resource.RLIM_INFINITY))
    lowered = 0
    while True:
        try:
            found = encoder.encode(MANY)
            break
        except BudgetLowered:
            lowered += 1
    answers.put((lowered, np.diff(found.vectors.indptr).tolist()))
