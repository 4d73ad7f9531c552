"""`NewForMaskedLM` without its remote code, compared with a separate implementation of its formulas.

From the public modeling file of Alibaba-NLP/new-impl: post-norm layers, packed or separate query, key and value, gated
feed-forward with the gate second, rotary positions with NTK scaling at every length, optional token types, and a head
of dense, gelu, norm and decoder.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.checkpoints import HEADS, LAYERS, WIDTH, build_encoder, make_masked_lm, make_new

from sparse_ingest.checkpoints.layouts import read_checkpoint
from sparse_ingest.errors import CheckpointError
from sparse_ingest.models.body import Body
from sparse_ingest.models.tokenizer import Tokenizer
from sparse_ingest.pipeline import ModelSettings

TEXTS = (
    "the river and the stone",
    "",
    "Searching sparse vectors, weighted tokens; the Bird (of fire)!",
    "water " * 100,
)
SCALINGS = {
    "none": None,
    "ntk": {"factor": 2.0, "type": "ntk"},
    "ntk-8": {"factor": 8.0, "rope_type": "ntk"},
    "mixed": {"factor": 4.0, "type": "ntk", "mixed_b": 0.625},
}


@pytest.fixture(scope="module")
def gte(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Return a function from a number of token types to a gte checkpoint."""
    root = tmp_path_factory.mktemp("gte")
    return {types: make_masked_lm(root / str(types), "gte", type_vocab_size=types) for types in (0, 1, 2)}


def frequencies(config: dict) -> torch.Tensor:
    """Return the rotary frequency of each pair of numbers."""
    size = WIDTH // HEADS
    theta, scaling = config["rope_theta"], config["rope_scaling"]
    plain = theta ** -(torch.arange(0, size, 2).double() / size)
    if not scaling:
        return plain
    factor, mixed = scaling["factor"], scaling.get("mixed_b")
    if mixed is None:
        return (theta * factor) ** -(torch.arange(0, size, 2).double() / size) / factor ** (2 / size)
    growth = np.log(factor) / (size / 2) ** mixed
    return plain / torch.exp(growth * torch.arange(1, size // 2 + 1).double() ** mixed)


def rotated(states: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotate heads x positions x numbers, pairing the first half of the numbers with the second."""
    first, second = states.chunk(2, dim=-1)
    return torch.cat(
        (first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()), dim=-1
    )


def logits(folder: Path, token_ids: list[int]) -> torch.Tensor:
    """Return the logits of one text in float64."""
    weights = {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}
    config = json.loads((folder / "config.json").read_text())

    def linear(name: str, states: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(states, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def norm(name: str, states: torch.Tensor) -> torch.Tensor:
        centered = states - states.mean(-1, keepdim=True)
        scale = (centered.square().mean(-1, keepdim=True) + config["layer_norm_eps"]).rsqrt()
        return centered * scale * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def gelu(states: torch.Tensor) -> torch.Tensor:
        return states * 0.5 * (1 + torch.erf(states / 2**0.5))

    states = weights["new.embeddings.word_embeddings.weight"][token_ids]
    if config["type_vocab_size"]:
        states = states + weights["new.embeddings.token_type_embeddings.weight"][0]
    states = norm("new.embeddings.LayerNorm", states)
    angles = torch.outer(torch.arange(len(token_ids)).double(), frequencies(config))
    for layer in range(LAYERS):
        at = f"new.encoder.layer.{layer}"
        if config["pack_qkv"]:
            projected = linear(f"{at}.attention.qkv_proj", states).chunk(3, dim=-1)
        else:
            projected = tuple(linear(f"{at}.attention.{letter}_proj", states) for letter in "qkv")
        query, key, value = (part.view(len(token_ids), HEADS, -1).transpose(0, 1) for part in projected)
        query, key = rotated(query, angles), rotated(key, angles)
        scores = query @ key.transpose(1, 2) / (WIDTH / HEADS) ** 0.5
        mixed = (scores.softmax(-1) @ value).transpose(0, 1).reshape(len(token_ids), WIDTH)
        states = norm(f"{at}.attn_ln", states + linear(f"{at}.attention.o_proj", mixed))
        up, gate = linear(f"{at}.mlp.up_gate_proj", states).chunk(2, dim=-1)
        states = norm(f"{at}.mlp_ln", states + linear(f"{at}.mlp.down_proj", gelu(gate) * up))
    states = norm("lm_head.norm", gelu(linear("lm_head.dense", states)))
    decoder = weights.get("lm_head.decoder.weight", weights["new.embeddings.word_embeddings.weight"])
    return states @ decoder.T + weights["lm_head.decoder.bias"]


def assert_follows(folder: Path, texts: tuple[str, ...]) -> None:
    encoder = build_encoder(folder)
    limit = json.loads((folder / "config.json").read_text())["max_position_embeddings"]
    tokenizer = Tokenizer(folder, ModelSettings(max_length=limit))
    encoded = encoder.encode(texts)
    for row, text in enumerate(texts):
        token_ids = tokenizer([text])[0].token_ids.tolist()
        expected = logits(folder, token_ids).amax(0).relu().log1p().numpy()
        found, (ids, weights) = np.zeros(len(expected)), encoded.vectors.row(row)
        found[ids] = weights
        np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("types", [0, 1, 2])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_logits_match_the_formulas(gte: dict[int, Path], tmp_path: Path, scaling: str, types: int) -> None:
    assert_follows(make_new(tmp_path / "new", gte[types], rope_scaling=SCALINGS[scaling]), TEXTS)


def test_separate_projections_match_the_formulas(gte: dict[int, Path], tmp_path: Path) -> None:
    assert_follows(make_new(tmp_path / "new", gte[0], packed=False, rope_scaling=SCALINGS["ntk"]), TEXTS)


def test_scaling_changes_the_weights(gte: dict[int, Path], tmp_path: Path) -> None:
    """Otherwise the tests above would pass without any scaling."""
    weights = [
        build_encoder(make_new(tmp_path / name, gte[0], rope_scaling=scaling)).encode(TEXTS).vectors.weights[:20]
        for name, scaling in SCALINGS.items()
    ]
    for place, one in enumerate(weights):
        assert not any(np.allclose(one, other, atol=1e-3) for other in weights[place + 1 :])


@pytest.mark.slow
def test_a_text_of_8192_tokens_matches_the_formulas(gte: dict[int, Path], tmp_path: Path) -> None:
    folder = make_new(tmp_path / "new", gte[0], rope_scaling=SCALINGS["ntk"], max_position_embeddings=8192)
    words = ("river", "stone", "lamp", "the", "of", "water", "bird", "cloud", "search", "index", "run")
    text = " ".join(words[place * place % len(words)] for place in range(9000))
    assert build_encoder(folder).encode([text]).tokens == 8192
    assert_follows(folder, (text, "the river"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act = 'relu'"),
        ({"layer_norm_type": "rms_norm"}, "layer_norm_type = 'rms_norm'"),
        ({"position_embedding_type": "absolute"}, "position_embedding_type = 'absolute'"),
        ({"logn_attention_scale": True}, "logn_attention_scale = True"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling of type 'linear'"),
        ({"num_hidden_layers": 3}, "lacks"),
    ],
)
def test_options_that_gte_lacks_are_refused(gte: dict[int, Path], tmp_path: Path, changed: dict, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        build_encoder(make_new(tmp_path / "new", gte[0], **changed))


def test_building_prints_no_warnings(
    gte: dict[int, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """transformers would warn that it does not know `new`, and ask for remote code."""
    folder = make_new(tmp_path / "new", gte[0], rope_scaling=SCALINGS["ntk"])
    capfd.readouterr()
    with caplog.at_level(logging.WARNING):
        build_encoder(folder)
    assert capfd.readouterr().err == "" and not caplog.records


def test_rotary_frequencies_stay_exact_in_half_precision(gte: dict[int, Path], tmp_path: Path) -> None:
    """Rounding them to bfloat16 would shift far positions."""
    folder = make_new(tmp_path / "new", gte[0], rope_scaling=SCALINGS["ntk"])
    body: Any = Body(read_checkpoint(str(folder)), device=torch.device("cpu"), dtype=torch.bfloat16)
    rotary = body._model.gte.rotary_emb
    config = json.loads((folder / "config.json").read_text())
    assert rotary.inv_freq.dtype == torch.float32
    torch.testing.assert_close(rotary.inv_freq.double(), frequencies(config), rtol=1e-6, atol=0)


def test_a_checkpoint_without_remote_code_is_built_the_same(gte: dict[int, Path], tmp_path: Path) -> None:
    """`auto_map` changes nothing."""
    folder = make_new(tmp_path / "new", gte[0])
    bare = Path(shutil.copytree(folder, tmp_path / "bare"))
    config = json.loads((bare / "config.json").read_text())
    del config["auto_map"]
    (bare / "config.json").write_text(json.dumps(config))
    assert np.array_equal(
        build_encoder(bare).encode(TEXTS).vectors.weights, build_encoder(folder).encode(TEXTS).vectors.weights
    )
