"""On a GPU: the fast head and packing are used, and vectors match the reference. Skipped without a GPU."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
from support.checkpoints import PACKAGED
from support.forked import command

from sparse_ingest.checkpoints.layouts import read_checkpoint
from sparse_ingest.checkpoints.settings import resolve_settings
from sparse_ingest.cli.demo import passages
from sparse_ingest.cluster.scores import weight_codes
from sparse_ingest.models.bert import PackedBert
from sparse_ingest.models.documents import DocumentEncoder
from sparse_ingest.models.heads.compaction import Transfer
from sparse_ingest.models.heads.selection import build_head
from sparse_ingest.models.heads.tiles import TiledHead
from sparse_ingest.models.packing import Packing
from sparse_ingest.models.precision import KEPT_MASS, KEPT_TERMS, _kept
from sparse_ingest.pipeline import ModelSettings, Pruning

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")
DEVICE = "cuda:0"
HALF = ("float16", "bfloat16")


@functools.cache
def encoder(device: str, dtype: str, batch_tokens: int | None = None) -> DocumentEncoder:
    checkpoint = read_checkpoint(PACKAGED)
    settings = resolve_settings(ModelSettings(document=PACKAGED, max_length=256), checkpoint)
    return DocumentEncoder(checkpoint, settings, device=device, dtype=dtype, batch_tokens=batch_tokens)


@functools.cache
def texts() -> list[str]:
    return [f"{passage.title} {passage.text}" for passage in passages(topics)][:256]


def random_inputs(width: int, vocabulary: int = 30522) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(width)
    return torch.randn(vocabulary, width, generator=generator), torch.randn(vocabulary, generator=generator)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("width", [128, 256, 312, 768])
def test_the_kernel_passes_its_trial(width: int, dtype: str) -> None:
    from sparse_ingest.models.heads.triton_max import TritonHead

    head = build_head(*random_inputs(width), device=torch.device(DEVICE), dtype=getattr(torch, dtype))
    assert isinstance(head, TritonHead)


@pytest.mark.parametrize("dtype", ["float32", *HALF])
def test_bert_is_packed_and_computed_without_transformers(dtype: str) -> None:
    assert isinstance(encoder(DEVICE, dtype).maker.body, PackedBert)


@pytest.mark.parametrize("dtype", ["float32", *HALF])
def test_vectors_match_those_of_the_cpu(dtype: str) -> None:
    mass, terms = _kept(*(one.encode(texts()).vectors for one in (encoder("cpu", "float32"), encoder(DEVICE, dtype))))
    # For bfloat16 `auto` requires the same, and does not choose it for a model that fails.
    assert mass >= 0.99 and (dtype == "bfloat16" or (mass >= KEPT_MASS and terms >= KEPT_TERMS))


@pytest.mark.parametrize("dtype", HALF)
def test_the_rest_of_a_batch_changes_weights_by_one_index_step_at_most(dtype: str) -> None:
    few, many = (encoder(DEVICE, dtype, tokens).encode(texts()).vectors for tokens in (512, 16384))
    keys = [np.repeat(np.arange(len(texts())), np.diff(one.indptr)) << 32 | one.token_ids for one in (few, many)]
    _, here, there = np.intersect1d(*keys, assume_unique=True, return_indices=True)
    heavy = few.weights[here] > 0.05
    codes = [weight_codes(one.weights[place][heavy]).astype(np.int64) for one, place in ((few, here), (many, there))]
    assert heavy.sum() >= 0.999 * (few.weights > 0.05).sum()
    assert (np.abs(codes[0] - codes[1]) <= 1).mean() >= 0.999


@pytest.mark.parametrize("width", [128, 768])
@pytest.mark.parametrize("plain", [False, True])
def test_the_head_needs_less_than_a_twentieth_of_the_memory_of_logits(width: int, plain: bool) -> None:
    weight, bias = random_inputs(width)
    device, dtype, documents, tokens = torch.device(DEVICE), torch.bfloat16, 256, 128
    head = (TiledHead if plain else build_head)(weight, bias, device=device, dtype=dtype)
    packing, rows = Packing((tokens,) * documents, device), torch.randn(documents * tokens, width).to(device, dtype)

    def once() -> None:
        with torch.inference_mode():
            Transfer(head(rows, packing), Pruning(top_k=200), torch.zeros((), device=device)).arrive()

    once()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    once()
    logits = documents * tokens * len(bias) * dtype.itemsize
    assert torch.cuda.max_memory_allocated(device) - before < 0.05 * logits


def test_two_processes_on_a_gpu_write_the_same_bytes_as_one(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")  # for this test only; benchmarks/gpu.sh runs the others without it
    from support.run_contents import contents

    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"id": str(n), "text": text}) + "\n" for n, text in enumerate(texts())))
    for name, device in (("one", DEVICE), ("two", f"{DEVICE},{DEVICE}")):
        arguments = ["encode", "--model", PACKAGED, "--corpus", corpus, "--shard-rows", 20, "--device", device]
        answer = command(*arguments, "--out", tmp_path / name)
        assert answer.code == 0, answer.err
    assert contents(tmp_path / "one" / "shards") == contents(tmp_path / "two" / "shards")
