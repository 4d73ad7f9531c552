"""BERT, RoBERTa, DistilBERT and gte computed without transformers: the same hidden states, and what is left to it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import PACKAGED, TEXTS, build_encoder, make_masked_lm, make_new
from support.families import changed

from sparse_ingest.checkpoints.layouts import read_checkpoint
from sparse_ingest.errors import CheckpointError
from sparse_ingest.models.bert import PackedBert, packed_bert
from sparse_ingest.models.body import Body

CPU = torch.device("cpu")
ARCHITECTURES = ("bert", "roberta", "distilbert", "gte")
# Largest difference relative to the largest number; twice that for gte, which transformers computes in bfloat16 with an
# error of 0.09.
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 5e-2}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {kind: make_masked_lm(root / kind, kind) for kind in ARCHITECTURES}


@pytest.fixture
def own(models: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of BERT that the test may change."""
    return Path(shutil.copytree(models["bert"], tmp_path / "own"))


def body_of(model: Path | str, dtype: torch.dtype = torch.float32) -> PackedBert | None:
    return packed_bert(read_checkpoint(str(model)), device=CPU, dtype=dtype)


def states(body: Any, vocabulary: int, lengths: tuple[int, ...] = (60, 33, 33, 2, 1)) -> torch.Tensor:
    """Return the hidden states of documents of several lengths."""
    documents = [np.resize(np.arange(5, vocabulary, dtype=np.int32), length) for length in lengths]
    with torch.inference_mode():
        found: torch.Tensor = body.hidden(documents, 0)[0]
    return found


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("kind", [*ARCHITECTURES, PACKAGED])
def test_hidden_states_and_projection_are_those_of_transformers(
    kind: str, dtype: torch.dtype, models: dict[str, Path]
) -> None:
    model = models.get(kind, kind)
    found = body_of(model, dtype)
    expected = Body(read_checkpoint(str(model)), device=CPU, dtype=dtype)
    assert found is not None and all(map(torch.equal, found.projection or (), expected.projection or ()))
    assert (found.ids, found.outputs, found.width) == (expected.ids, expected.outputs, expected.width)
    ours, theirs = (states(body, expected.ids).float() for body in (found, expected))
    close = CLOSE[dtype] * (2 if kind == "gte" and dtype == torch.bfloat16 else 1)
    assert (ours - theirs).abs().amax() <= close * theirs.abs().amax()


NTK = {"factor": 2.0, "type": "ntk"}


def of_transformers(folder: Path, model: Path) -> Path:
    """Copy a gte model, with the names that its weights have in transformers."""
    from transformers import GteForMaskedLM

    weights = GteForMaskedLM.from_pretrained(model).state_dict()
    del weights["lm_head.decoder.weight"]
    shutil.copytree(model, folder)
    save_file(weights, folder / "model.safetensors")
    return folder


def of_both(folder: Path, model: Path) -> Path:
    """Copy a gte model, with the names of its weights in Alibaba's layout and the config of transformers."""
    make_new(folder, model)
    shutil.copy(model / "config.json", folder)
    return folder


@pytest.mark.parametrize(
    "layout",
    [
        make_new, partial(make_new, packed=False), partial(make_new, rope_scaling=NTK),
        partial(make_new, rope_scaling={**NTK, "mixed_b": 0.6}), of_transformers, of_both,
    ],
    ids=["new", "separate", "ntk", "mixed", "transformers", "both"],
)  # fmt: skip
@pytest.mark.parametrize("types", [0, 2])
def test_gte_is_read_in_every_layout(types: int, layout: Callable[..., Path], tmp_path: Path) -> None:
    model = layout(tmp_path / "layout", make_masked_lm(tmp_path / "model", "gte", type_vocab_size=types))
    found, expected = body_of(model), Body(read_checkpoint(str(model)), device=CPU, dtype=torch.float32)
    assert found is not None and all(map(torch.equal, found.projection or (), expected.projection or ()))
    ours, theirs = (states(body, expected.ids) for body in (found, expected))
    assert (ours - theirs).abs().amax() <= CLOSE[torch.float32] * theirs.abs().amax()


def test_far_positions_of_gte_are_exact_in_half_precision(models: dict[str, Path], tmp_path: Path) -> None:
    """With frequencies in bfloat16 the mean difference would be 0.45."""
    model = make_new(tmp_path / "new", models["gte"], rope_scaling=NTK)
    expected = states(Body(read_checkpoint(str(model)), device=CPU, dtype=torch.float32), 100, (4100, 60, 1))
    for dtype, close in ((torch.float32, 1e-5), (torch.bfloat16, 5e-2)):
        found = states(body_of(model, dtype), 100, (4100, 60, 1)).float()
        assert (found - expected).abs().mean() <= close * expected.abs().mean()


def test_an_untied_projection_is_read(own: Path) -> None:
    weights = load_file(own / "model.safetensors")
    words = weights["bert.embeddings.word_embeddings.weight"]
    untied = {"cls.predictions.decoder.weight": words.flip(0).contiguous()}
    untied["cls.predictions.decoder.bias"] = weights["cls.predictions.bias"].clone()
    save_file(weights | untied, own / "model.safetensors")
    changed(own, "config.json", {"tie_word_embeddings": False})
    found = body_of(own)
    expected = Body(read_checkpoint(str(own)), device=CPU, dtype=torch.float32)
    assert found is not None and found.projection is not None and expected.projection is not None
    assert torch.equal(found.projection.weight, expected.projection.weight)
    assert torch.equal(found.projection.weight, words.flip(0))


def without(name: str) -> Callable[[Path], object]:
    def change(model: Path) -> None:
        weights = load_file(model / "model.safetensors")
        del weights[name]
        save_file(weights, model / "model.safetensors")

    return change


def cut(name: str) -> Callable[[Path], object]:
    def change(model: Path) -> None:
        weights = load_file(model / "model.safetensors")
        save_file(weights | {name: weights[name][:1].clone()}, model / "model.safetensors")

    return change


def also(name: str, other: str) -> Callable[[Path], object]:
    def change(model: Path) -> None:
        weights = load_file(model / "model.safetensors")
        save_file(weights | {name: weights[other].clone()}, model / "model.safetensors")

    return change


def unequal(model: Path) -> None:
    """Give queries 16 rows and keys 48, as many as the model has in both."""
    file = model / "model.safetensors"
    weights = load_file(file)
    at = "new.encoder.layer.0.attention"
    for part in ("weight", "bias"):
        query, key, value = weights.pop(f"{at}.qkv_proj.{part}").chunk(3)
        moved = torch.cat([query, key])
        weights |= {f"{at}.q_proj.{part}": moved[:16].clone(), f"{at}.k_proj.{part}": moved[16:].clone()}
        weights[f"{at}.v_proj.{part}"] = value.clone()
    save_file(weights, file)


def narrow_head(model: Path) -> None:
    file = model / "model.safetensors"
    weights = load_file(file)
    save_file({name: one[:16].clone() if name.startswith(("lm_head.dense", "lm_head.norm")) else one
               for name, one in weights.items()}, file)  # fmt: skip


def longer_file(model: Path) -> None:
    with (model / "model.safetensors").open("ab") as stream:
        stream.write(b"end")


def named_twice(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    other = weights["bert.embeddings.LayerNorm.weight"] * 2
    save_file(weights | {"bert.embeddings.LayerNorm.gamma": other}, model / "model.safetensors")


def infinite(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    weights["bert.encoder.layer.1.output.dense.weight"][3, 3] = torch.inf
    save_file(weights, model / "model.safetensors")


def option(**values: object) -> Callable[[Path], object]:
    return lambda model: changed(model, "config.json", values)


@pytest.mark.parametrize(
    "change",
    [
        option(hidden_act="relu"), option(position_embedding_type="relative_key"), option(is_decoder=True),
        option(vocab_size=50), option(max_position_embeddings=20), option(model_type="electra"),
        option(num_hidden_layers=3), option(num_attention_heads=None), infinite, option(is_causal=True),
        option(type_vocab_size=5), named_twice, option(num_attention_heads=3), longer_file,
        cut("bert.embeddings.LayerNorm.bias"), cut("bert.encoder.layer.0.output.dense.bias"),
        cut("bert.encoder.layer.1.attention.self.key.weight"),
        without("bert.encoder.layer.0.attention.output.LayerNorm.bias"), without("cls.predictions.bias"),
    ],
)  # fmt: skip
def test_what_is_not_plain_or_damaged_is_left_to_transformers(change: Callable[[Path], object], own: Path) -> None:
    assert body_of(own) is not None
    change(own)
    assert body_of(own) is None


@pytest.mark.parametrize(
    "change",
    [
        option(hidden_act="relu"), option(position_embedding_type="absolute"), option(logn_attention_scale=True),
        option(layer_norm_type="rms_norm"), option(rope_scaling={"type": "linear", "factor": 2.0}),
        option(type_vocab_size=5), option(num_hidden_layers=3), option(intermediate_size=32),
        cut("new.encoder.layer.1.attention.qkv_proj.weight"), cut("new.encoder.layer.1.mlp.up_gate_proj.weight"),
        without("new.encoder.layer.0.mlp.up_gate_proj.weight"), option(model_type="gte"),
        also("new.encoder.layer.0.attention.q_proj.bias", "new.encoder.layer.0.attention.o_proj.bias"),
        also("gte.embeddings.LayerNorm.bias", "new.embeddings.LayerNorm.bias"), unequal, narrow_head,
        option(hidden_act=None), option(rope_theta="5"), option(tie_word_embeddings="x"),
    ],
)  # fmt: skip
def test_other_gte_models_are_left_to_transformers(
    change: Callable[[Path], object], models: dict[str, Path], tmp_path: Path
) -> None:
    model = make_new(tmp_path / "new", models["gte"])
    assert body_of(model) is not None
    change(model)
    assert body_of(model) is None


@pytest.mark.parametrize(
    "rope", [{"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}, {"rope_type": "default"}, None], ids=str
)
def test_other_rotary_positions_are_left_to_transformers(rope: object, models: dict[str, Path], tmp_path: Path) -> None:
    model = Path(shutil.copytree(models["gte"], tmp_path / "own"))
    assert body_of(changed(model, "config.json", {"rope_parameters": rope})) is None


def test_distilbert_with_sizes_under_two_names_is_left_to_transformers(models: dict[str, Path], tmp_path: Path) -> None:
    model = Path(shutil.copytree(models["distilbert"], tmp_path / "own"))
    assert body_of(changed(model, "config.json", {"num_attention_heads": 4})) is not None
    assert body_of(changed(model, "config.json", {"num_attention_heads": 2})) is None


TOKENIZER_CHANGES: list[dict[str, object]] = [
    {"do_lower_case": False}, {"strip_accents": False}, {"tokenize_chinese_chars": False}, {"cls_token": "[MASK]"},
    {"additional_special_tokens": ["fire"]}, {"pad_token": "water"}, {"split_special_tokens": True},
    {"added_tokens_decoder": {"116": {"content": "überé", "special": False}}},
]  # fmt: skip


def write_usual_tokenizer(model: Path, settings: dict[str, object]) -> None:
    """Write BERT's usual tokenizer, which is read without transformers, and some settings."""
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["model"]["max_input_chars_per_word"] = 100
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    changed(model, "tokenizer_config.json", {"tokenizer_class": "BertTokenizer", **settings})


def assert_tokens_of_transformers(model: Path) -> None:
    from transformers import AutoTokenizer

    texts = [*TEXTS, "Überé BIRD 日本 fire [MASK] x"]
    theirs = AutoTokenizer.from_pretrained(model)
    expected = [theirs(text, truncation=True, max_length=60)["input_ids"] for text in texts]
    found = build_encoder(model, max_length=60).tokenize(texts)
    assert [window.token_ids.tolist() for window in found] == expected


@pytest.mark.parametrize("settings", [{}, *TOKENIZER_CHANGES], ids=str)
def test_tokens_are_those_of_transformers(settings: dict[str, object], own: Path) -> None:
    write_usual_tokenizer(own, settings)
    assert_tokens_of_transformers(own)


def test_tokens_in_another_file_are_left_to_transformers(own: Path) -> None:
    write_usual_tokenizer(own, {})
    (own / "added_tokens.json").write_text('{"bird": 116}')
    assert_tokens_of_transformers(own)


def test_a_tokenizer_with_other_ids_around_a_text_is_left_to_transformers(own: Path) -> None:
    write_usual_tokenizer(own, {})
    ids = {"type": "BertProcessing", "cls": ["[CLS]", 8], "sep": ["[SEP]", 9]}
    changed(own, "tokenizer.json", {"post_processor": ids})
    assert_tokens_of_transformers(own)


def test_a_special_token_that_is_no_text_is_reported(own: Path) -> None:
    write_usual_tokenizer(own, {"cls_token": ["[CLS]"]})
    with pytest.raises(CheckpointError, match="cls_token"):
        build_encoder(own)


def test_encoding_imports_no_transformers_and_nothing_that_only_training_needs(tmp_path: Path) -> None:
    program = (
        "import json, sys\n"
        "import sparse_ingest\n"
        f"encoder = sparse_ingest.SparseEncoder({PACKAGED!r})\n"
        "assert encoder.encode_document('a river') and encoder.encode_query('a river')\n"
        "print(json.dumps([name for name in ('transformers', 'torch._dynamo', 'torch.distributed.tensor', 'scipy') "
        "if name in sys.modules]))"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(answer.stdout) == []
