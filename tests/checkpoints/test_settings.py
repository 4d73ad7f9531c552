"""Model settings: the pipeline overrides the checkpoint's files, which override the library's defaults."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
from test_layouts import CONFIG, PLAIN, SYMMETRIC, make
from test_routers import ROUTER

from sparse_ingest.checkpoints.layouts import read_checkpoint
from sparse_ingest.checkpoints.settings import (
    DOCUMENT_SETTINGS,
    RECORDED_OF_QUERIES,
    document_identity,
    model_record,
    resolve_query_settings,
    resolve_settings,
)
from sparse_ingest.errors import CheckpointError, PipelineError
from sparse_ingest.pipeline import ModelSettings


def resolve(folder: Path, **settings):
    return resolve_settings(ModelSettings(**settings), read_checkpoint(str(folder)))


def test_defaults_are_those_of_sentence_transformers(tmp_path: Path) -> None:
    settings = resolve(make(tmp_path, PLAIN))
    assert (settings.activation, settings.pooling, settings.document_prompt, settings.lower_case) == (
        "relu", "max", "", False,
    )  # fmt: skip
    assert (settings.document_special_tokens, settings.query_special_tokens) == ("keep", "keep")
    assert settings.max_length == 48


def test_files_override_defaults_and_the_pipeline_overrides_files(tmp_path: Path) -> None:
    folder = make(tmp_path, SYMMETRIC)
    declared = resolve(folder)
    assert (declared.activation, declared.max_length, declared.document_prompt) == ("log1p_relu", 40, "d: ")
    overridden = resolve(folder, activation="relu", max_length=12, document_prompt="", lower_case=False)
    assert (overridden.activation, overridden.max_length, overridden.document_prompt, overridden.lower_case) == (
        "relu",
        12,
        "",
        False,
    )
    assert overridden.query_prompt == "q: "


@pytest.mark.parametrize(
    ("config", "tokenizer", "expected"),
    [
        ({}, {}, 64),
        ({}, {"model_max_length": 1000000000000000019884624838656}, 64),
        ({}, {"model_max_length": 48}, 48),
        ({}, {"model_max_length": 480}, 64),
        ({"max_position_embeddings": -1}, {}, None),
        ({"max_position_embeddings": None}, {"model_max_length": 48}, 48),
        ({"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}, {}, 512),
        ({"model_type": "mpnet", "max_position_embeddings": 514, "pad_token_id": 1}, {"model_max_length": 384}, 384),
        ({"model_type": "distilbert", "max_position_embeddings": 512, "pad_token_id": 0}, {}, 512),
    ],
)  # fmt: skip
def test_the_default_max_length(tmp_path: Path, config, tokenizer, expected) -> None:
    folder = make(tmp_path, {**PLAIN, "config.json": {**CONFIG, **config}, "tokenizer_config.json": tokenizer})
    assert resolve(folder).max_length == expected


def test_more_tokens_than_positions_are_refused(tmp_path: Path) -> None:
    folder = make(tmp_path, PLAIN)
    # The tokenizer's 48 may be exceeded, the 64 positions may not.
    assert resolve(folder, max_length=64).max_length == 64
    with pytest.raises(PipelineError, match="max_length = 65, but .* has positions for 64 tokens"):
        resolve(folder, max_length=65)


def test_a_declared_length_above_the_positions_is_limited_to_them(tmp_path: Path) -> None:
    """RoBERTa checkpoints declare 514, and transformers fails on the first text of that length."""
    folder = make(tmp_path, {**SYMMETRIC, "sentence_bert_config.json": {"max_seq_length": 66}})
    assert resolve(folder).max_length == 64


@pytest.mark.parametrize("pooling", [{"activation_function": "gelu"}, {"pooling_strategy": "sum"}])
def test_an_unsupported_activation_or_pooling_is_refused(tmp_path: Path, pooling: dict) -> None:
    folder = make(tmp_path, {**SYMMETRIC, "1_SpladePooling/config.json": pooling})
    with pytest.raises(CheckpointError, match=next(iter(pooling.values()))):
        resolve(folder)


def test_the_identity_has_every_document_setting_and_no_path(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(str(make(tmp_path, SYMMETRIC)))
    identity = document_identity(checkpoint, resolve_settings(ModelSettings(query_prompt="other"), checkpoint))
    assert identity.keys() == {"sha256", *DOCUMENT_SETTINGS} - {"attention"}  # of a language model only
    assert identity["sha256"] == checkpoint.sha256
    assert not any(str(tmp_path) in str(value) for value in identity.values())


def test_the_record_resolves_to_the_same_settings(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(str(make(tmp_path, SYMMETRIC)))
    settings = resolve_settings(ModelSettings(document="relative"), checkpoint)
    record = model_record(checkpoint, settings, ModelSettings(document="relative"))
    assert record["document"] == str(tmp_path) and record["family"] == checkpoint.family
    again = {name: record.get(name) for name in asdict(settings)}
    assert resolve_settings(ModelSettings(**again), read_checkpoint(record["document"])) == ModelSettings(**again)
    packaged = read_checkpoint("package:cognition/model")
    assert model_record(packaged, ModelSettings(), ModelSettings())["document"] == "package:cognition/model"


# The query side


def resolve_query(folder: Path, **settings):
    return resolve_query_settings(ModelSettings(**settings), read_checkpoint(str(folder)))


def test_special_tokens_are_kept_in_a_router_and_zero_with_idf_json(tmp_path: Path) -> None:
    for files, mode, missing in ((ROUTER, "keep", 0.0), ({**PLAIN, "idf.json": {"a": 1.0}}, "zero", 1.0)):
        folder = make(tmp_path / mode, files)
        for settings in (resolve_query(folder), resolve(folder, activation="relu")):
            assert (settings.query_special_tokens, settings.missing_idf_weight) == (mode, missing)
        assert resolve(folder, activation="relu").document_special_tokens == mode
        overridden = resolve_query(folder, query_special_tokens="keep", missing_idf_weight=0.5, query_prompt="p")
        assert (overridden.query_special_tokens, overridden.missing_idf_weight, overridden.query_prompt) == (
            "keep",
            0.5,
            "p",
        )


def test_an_activation_that_no_file_states_must_be_given(tmp_path: Path) -> None:
    """OpenSearch models with idf.json use log1p once or twice. Queries need only the table."""
    folder = make(tmp_path, {**PLAIN, "idf.json": {"a": 1.0}})
    with pytest.raises(CheckpointError, match='no file states the activation.*"relu" or "log1p_relu"') as refused:
        resolve(folder)
    assert str(folder) in str(refused.value)
    assert resolve_query(folder).activation is None
    assert resolve(folder, activation="log1p_relu").activation == "log1p_relu"


def test_the_max_length_of_a_table_is_that_of_its_tokenizer(tmp_path: Path) -> None:
    folder = make(tmp_path, ROUTER)
    assert (resolve_query(folder).max_length, resolve_query(folder, max_length=30).max_length) == (12, 12)
    assert resolve(folder).max_length == 44
    assert resolve_query(make(tmp_path / "b", {**PLAIN, "idf.json": {"a": 1.0}})).max_length is None


def test_queries_with_a_table_need_no_document_weights(tmp_path: Path) -> None:
    folder = make(tmp_path, {name: content for name, content in ROUTER.items() if "document" not in name})
    assert resolve_query(folder).query_special_tokens == "keep"
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        resolve(folder)


def test_a_query_checkpoint_uses_its_own_files_and_the_given_settings(tmp_path: Path) -> None:
    folder = make(tmp_path, SYMMETRIC)
    declared_settings = resolve_query(folder)
    assert (
        declared_settings.activation,
        declared_settings.max_length,
        declared_settings.lower_case,
        declared_settings.query_prompt,
    ) == ("log1p_relu", 40, True, "q: ")
    overridden = resolve_query(folder, activation="relu", max_length=12, lower_case=False)
    assert (overridden.activation, overridden.max_length, overridden.lower_case) == ("relu", 12, False)


# Refused checkpoints


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config.json": CONFIG}, "has no weights as safetensors or pytorch_model.bin"),
        ({"config.json": CONFIG, "training_args.bin": b""}, "found the pickle training_args.bin, which is never read"),
        ({name: content for name, content in SYMMETRIC.items() if name != "config.json"}, "has no config.json"),
        ({"idf.json": {"a": 1.0}, "tokenizer.json": {}}, "weight table for queries and no model for documents"),
        ({**PLAIN, "config.json": {**CONFIG, "model_type": "mine", "auto_map": {"AutoModelForMaskedLM": "m.M"}}},
         "has remote code: class M of m.py"),
    ],
)  # fmt: skip
def test_unsupported_document_sides_are_refused_before_the_model_is_built(tmp_path: Path, files, message) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        resolve(make(tmp_path, files))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json", "model-00001-of-2.safetensors"])
def test_each_weight_format_is_accepted(tmp_path: Path, name: str) -> None:
    content = {"weight_map": {"bias": "config.json"}} if name.endswith("index.json") else {}
    assert resolve(make(tmp_path, {"config.json": CONFIG, name: content})).activation == "relu"


# The model record


def record_of(folder: Path, **settings):
    given = ModelSettings(document=str(folder), **settings)
    checkpoint = read_checkpoint(str(folder))
    return model_record(checkpoint, resolve_settings(given, checkpoint), given)


def test_the_record_has_the_query_side_if_it_differs(tmp_path: Path) -> None:
    assert record_of(make(tmp_path / "router", ROUTER))["query_side"] == {
        "kind": "weight table", "max_length": 12, "lower_case": False, "query_prompt": "q: ",
        "query_special_tokens": "keep", "missing_idf_weight": 0.0,
    }  # fmt: skip
    lengths = {**SYMMETRIC, "sentence_bert_config.json": {"query_length": 8, "do_lower_case": True}}
    assert record_of(make(tmp_path / "one", lengths))["query_side"] == {
        "kind": "masked LM", "activation": "log1p_relu", "pooling": "max", "max_length": 8, "lower_case": True,
        "query_prompt": "q: ", "query_special_tokens": "keep",
    }  # fmt: skip
    assert "query_side" not in record_of(make(tmp_path / "same", SYMMETRIC), max_length=20)


def test_the_record_of_two_models_has_both_sides(tmp_path: Path) -> None:
    document, query = make(tmp_path / "doc", PLAIN), make(tmp_path / "query", SYMMETRIC)
    record = record_of(document, query=str(query))
    assert (record["document"], record["query"]) == (str(document), str(query))
    assert (record["activation"], record["max_length"]) == ("relu", 48)
    side = record["query_side"]
    assert (side["activation"], side["max_length"], side["query_prompt"]) == ("log1p_relu", 40, "q: ")
    assert side["sha256"] == read_checkpoint(str(query)).sha256
    # `search` resolves the record to the same settings.
    again = {key: value for key, value in {**record, **side}.items() if key in asdict(ModelSettings())}
    expected = resolve_query_settings(ModelSettings(query=str(query)), read_checkpoint(str(query)))
    found = resolve_query_settings(ModelSettings(**again), read_checkpoint(str(query)))
    assert all(getattr(found, key) == getattr(expected, key) for key in RECORDED_OF_QUERIES)


def test_a_missing_query_checkpoint_is_reported_before_encoding(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no/where"):
        record_of(make(tmp_path, PLAIN), query=str(tmp_path / "no/where"))


def test_trust_in_remote_code_is_never_recorded(tmp_path: Path) -> None:
    record = record_of(make(tmp_path, ROUTER), trust_remote_code=True)
    assert record["trust_remote_code"] is False and "trust_remote_code" not in record["query_side"]
