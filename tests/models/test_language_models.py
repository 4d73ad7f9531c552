"""Sparse encoders made of causal language models, compared with the formula in plain transformers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner
from support.checkpoints import make_masked_lm, write_idf
from support.families import DOCUMENTS, QUERIES, as_rows, assert_same, dense, encoder_of
from support.language_models import make_language_model, make_splade_code

from sparse_ingest.checkpoints.layouts import read_checkpoint
from sparse_ingest.checkpoints.settings import document_identity, resolve_settings
from sparse_ingest.cli.main import cli
from sparse_ingest.errors import CheckpointError
from sparse_ingest.models.query_encoders import query_encoder
from sparse_ingest.pipeline import ModelSettings

# Name -> architecture, tied embeddings, and whether the packed attention computes it.
TWINS = {
    "qwen3": ("Qwen3", True, True),
    "qwen3-untied": ("Qwen3", False, True),
    "llama": ("Llama", True, True),
    "llama-untied": ("Llama", False, True),
    "granite": ("Granite", True, True),
    "gemma3-windows": ("Gemma3", True, False),
}
# Texts of different lengths, all with at least one token.
TEXTS = [text for text in DOCUMENTS if text]


def expected_weights(folder: Path, texts: list[str], *, attention: str = "bidirectional") -> np.ndarray:
    """Encode each text alone with a mask that is written out: zeros, and -inf for pairs that do not see each other."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    windows = {"full_attention": None, "sliding_attention": getattr(model.config, "sliding_window", None)}
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"]
    rows = []
    for text in texts:
        ids = tokenizer([text], truncation=True, return_tensors="pt")["input_ids"]
        places = torch.arange(ids.shape[1])
        ahead = places.unsqueeze(0) - places.unsqueeze(1)  # how far each token is after the one that looks
        masks = {}
        for kind in set(kinds):
            seen = ahead <= 0 if attention == "causal" else torch.ones_like(ahead, dtype=torch.bool)
            if windows[kind] is not None:
                seen = seen & (ahead.abs() <= windows[kind])
            masks[kind] = torch.zeros(ahead.shape).masked_fill(~seen, float("-inf"))[None, None]
        mask: Any = masks if len(masks) > 1 else next(iter(masks.values()))
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0]
        rows.append(torch.log1p(torch.relu(logits)).amax(0).numpy())
    return np.stack(rows)


@pytest.fixture(scope="module", params=TWINS)
def twin(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bool]:
    """The folder of each language model in turn, and whether it is packed."""
    kind, tied, packs = TWINS[request.param]
    return make_language_model(tmp_path_factory.mktemp("lms") / request.param, kind, tied=tied), packs


def test_document_weights_match_the_formula(twin: tuple[Path, bool]) -> None:
    folder, packs = twin
    encoder, expected = encoder_of(str(folder)), expected_weights(folder, TEXTS)
    assert encoder.maker.body.packs == packs
    assert_same(dense(encoder.encode(TEXTS), expected.shape[1]), expected)
    alone = np.concatenate([dense(encoder.encode([text]), expected.shape[1]) for text in TEXTS])
    assert_same(alone, expected)
    assert np.count_nonzero(expected) > 10 * len(TEXTS)


@pytest.mark.parametrize(
    "twin",
    [one if one == "gemma3-windows" else pytest.param(one, marks=pytest.mark.slow) for one in TWINS],
    indirect=True,
)
def test_query_weights_match_the_formula(twin: tuple[Path, bool]) -> None:
    folder, _ = twin
    queries = [query for query in QUERIES if query]
    expected = expected_weights(folder, queries)
    ids = {token: place for place, token in enumerate(encoder_of(str(folder)).vocabulary)}
    found = query_encoder(ModelSettings(document=str(folder))).encode(queries)
    assert_same(as_rows(found, ids, expected.shape[1]), expected)


def test_splade_code_matches_sentence_transformers_and_its_code_never_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sentence_transformers import SparseEncoder

    folder = make_splade_code(tmp_path / "splade-code")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setitem(os.environ, "RAN", str(tmp_path / "ran"))
    checkpoint = read_checkpoint(str(folder))
    assert checkpoint.family == "symmetric SPLADE, sentence-transformers layout"
    assert checkpoint.document.kind == "language model"
    encoder = encoder_of(str(folder))
    documents = dense(encoder.encode(TEXTS), len(encoder.vocabulary))
    queries = query_encoder(ModelSettings(document=str(folder), trust_remote_code=True)).encode(TEXTS)
    assert not (tmp_path / "ran").exists()
    library = SparseEncoder(str(folder), device="cpu", trust_remote_code=True, model_kwargs={"dtype": torch.float32})
    assert (tmp_path / "ran").exists()
    assert_same(documents, library.encode_document(TEXTS, convert_to_sparse_tensor=False).numpy())
    ids = {token: place for place, token in enumerate(encoder.vocabulary)}
    expected = library.encode_query(TEXTS, convert_to_sparse_tensor=False).numpy()
    assert_same(as_rows(queries, ids, expected.shape[1]), expected)


def test_causal_attention_is_a_setting(tmp_path: Path) -> None:
    folder = make_language_model(tmp_path / "lm")
    expected = expected_weights(folder, TEXTS, attention="causal")
    found = dense(encoder_of(str(folder), attention="causal").encode(TEXTS), expected.shape[1])
    assert_same(found, expected)
    assert np.abs(found - expected_weights(folder, TEXTS)).max() > 0.1


@pytest.mark.parametrize(
    ("stated", "attention"),
    [
        ({"is_causal": False}, "bidirectional"),
        ({"is_causal": True}, "causal"),
        ({"use_bidirectional_attention": True}, "bidirectional"),
        ({"bidirectional": True}, "bidirectional"),
        ({"architectures": ["LlamaBiForMNTP"], "is_causal": False}, "bidirectional"),
    ],
)
def test_attention_is_read_from_the_config(tmp_path: Path, stated: dict[str, Any], attention: str) -> None:
    checkpoint = read_checkpoint(str(make_language_model(tmp_path / "lm", "Llama", **stated)))
    assert checkpoint.family == "language model, plain layout"
    assert resolve_settings(ModelSettings(), checkpoint).attention == attention


def test_attention_that_no_file_states_is_asked_for(tmp_path: Path) -> None:
    folder = make_language_model(tmp_path / "lm", "Llama", use_cache=True)
    with pytest.raises(CheckpointError, match=r'attention = "bidirectional" or "causal"') as caught:
        encoder_of(str(folder))
    assert "is_causal, use_bidirectional_attention and bidirectional in config.json" in str(caught.value)
    found = encoder_of(str(folder), attention="bidirectional").encode(TEXTS)
    stated = make_language_model(tmp_path / "stated", "Llama")
    assert np.array_equal(found.vectors.weights, encoder_of(str(stated)).encode(TEXTS).vectors.weights)


def test_a_table_beside_a_language_model_is_its_query_side(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(str(write_idf(make_language_model(tmp_path / "lm"))))
    assert (checkpoint.document.kind, checkpoint.query.kind) == ("language model", "weight table")
    settings = resolve_settings(ModelSettings(activation="relu"), checkpoint)
    assert (settings.attention, settings.document_special_tokens) == ("bidirectional", "zero")


def test_attention_is_part_of_the_identity_of_language_models_only(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(str(make_language_model(tmp_path / "lm")))
    both, causal = (
        document_identity(checkpoint, resolve_settings(ModelSettings(attention=attention), checkpoint))
        for attention in (None, "causal")
    )
    assert both == {**causal, "attention": "bidirectional"} and causal["attention"] == "causal"
    masked = read_checkpoint(str(make_masked_lm(tmp_path / "masked")))
    assert "attention" not in document_identity(masked, resolve_settings(ModelSettings(), masked))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_checkpoint_in_half_precision_is_computed_in_float32(tmp_path: Path, dtype: str) -> None:
    folder = make_language_model(tmp_path / "lm", dtype=dtype)
    expected = expected_weights(folder, TEXTS)
    assert_same(dense(encoder_of(str(folder)).encode(TEXTS), expected.shape[1]), expected)
    near = dense(encoder_of(str(folder), dtype="bfloat16").encode(TEXTS), expected.shape[1])
    assert 0 < np.abs(near - expected).max() < 0.2


def test_an_empty_text_has_no_tokens_and_no_terms(tmp_path: Path) -> None:
    encoder = encoder_of(str(make_language_model(tmp_path / "lm")))
    assert encoder.encode([""]).tokens == 0 and not len(encoder.encode([""]).vectors.weights)


def test_a_language_model_is_encoded_and_searched(tmp_path: Path) -> None:
    folder = make_language_model(tmp_path / "lm", use_cache=True)
    corpus, run = tmp_path / "corpus.jsonl", tmp_path / "run"
    corpus.write_text("".join(json.dumps({"id": str(n), "text": text}) + "\n" for n, text in enumerate(TEXTS)))
    arguments = ["encode", "--model", str(folder), "--corpus", str(corpus), "--out", str(run)]
    refused = CliRunner().invoke(cli, arguments)
    assert isinstance(refused.exception, CheckpointError) and not run.exists()
    encoded = CliRunner().invoke(cli, [*arguments, "--set", "model.attention=bidirectional"], catch_exceptions=False)
    assert encoded.exit_code == 0, encoded.output
    found = CliRunner().invoke(
        cli, ["search", "--run", str(run), "--json", "-k", "20", "river stone"], catch_exceptions=False
    )
    [query], documents = expected_weights(folder, ["river stone"]), expected_weights(folder, TEXTS)
    scores = {hit["id"]: hit["score"] for hit in json.loads(found.stdout)["hits"]}
    assert scores == {str(n): pytest.approx(score, rel=1e-2) for n, score in enumerate(documents @ query)}


def test_inspect_shows_the_attention_and_the_license(tmp_path: Path) -> None:
    folder = make_splade_code(tmp_path / "splade-code")
    shown = CliRunner().invoke(cli, ["inspect", str(folder)], catch_exceptions=False).output
    assert "language model, Qwen3ForCausalLM, 2 layers of 32" in shown and "attention   bidirectional" in shown
    assert "cc-by-nc-sa-4.0" in shown and "forbids commercial use" in shown
    found = json.loads(CliRunner().invoke(cli, ["inspect", str(folder), "--json"]).stdout)["document"]
    assert (found["kind"], found["attention"]) == ("language model", "bidirectional")


@pytest.mark.parametrize("cap", [30.0, 300.0])
def test_a_soft_cap_after_the_projection_is_refused_even_if_logits_are_small(tmp_path: Path, cap: float) -> None:
    with pytest.raises(CheckpointError, match="does not end in a linear vocabulary projection, or computes something"):
        encoder_of(str(make_language_model(tmp_path / "lm", "Gemma2", is_causal=False, final_logit_softcapping=cap)))


def test_layers_without_attention_are_refused(tmp_path: Path) -> None:
    """Recurrent layers read a text in one direction."""
    folder = make_language_model(tmp_path / "lm")
    config = transformers.MambaConfig(vocab_size=264, hidden_size=32, num_hidden_layers=2, state_size=4)
    transformers.MambaForCausalLM(config).save_pretrained(folder)
    with pytest.raises(CheckpointError, match="cannot be computed with bidirectional attention"):
        encoder_of(str(folder), attention="bidirectional")


def test_code_of_a_language_model_is_refused_even_if_it_is_trusted(tmp_path: Path) -> None:
    """The first release of SPLADE-Code: its config has no architecture."""
    folder = make_language_model(tmp_path / "lm")
    (folder / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["Splade"], "model_type": "splade", "bidirectional": True,
                "model_name_or_path": "Qwen/Qwen3-0.6B",
                "auto_map": {"AutoConfig": "splade.SpladeConfig", "AutoModelForCausalLM": "splade.Splade"},
            }
        )
    )  # fmt: skip
    with pytest.raises(CheckpointError, match="remote code: class Splade of splade.py.* architecture 'splade'"):
        encoder_of(str(folder), trust_remote_code=True)


def test_an_adapter_is_refused_also_in_a_subfolder(tmp_path: Path) -> None:
    """SPLADE-Code 8B has its adapter in the folder lora and no other weights."""
    folder = make_splade_code(tmp_path / "splade-code")
    (folder / "model.safetensors").unlink()
    (folder / "lora").mkdir()
    (folder / "lora" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(CheckpointError, match="lora.adapter_config.json describes an adapter.* Merge it"):
        encoder_of(str(folder))
