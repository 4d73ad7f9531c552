"""Settings of a model: the pipeline over the checkpoint's files over the library's defaults."""

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


def resolved(folder: Path, **asked):
    return resolve_settings(ModelSettings(**asked), read_checkpoint(str(folder)))


def test_defaults_are_those_of_the_library(tmp_path: Path) -> None:
    settings = resolved(make(tmp_path, PLAIN))
    assert (settings.activation, settings.pooling, settings.document_prompt, settings.lower_case) == (
        "relu", "max", "", False,
    )  # fmt: skip
    assert (settings.document_special_tokens, settings.query_special_tokens) == ("keep", "keep")
    assert settings.max_length == 48


def test_files_go_over_defaults_and_the_pipeline_over_files(tmp_path: Path) -> None:
    folder = make(tmp_path, SYMMETRIC)
    declared = resolved(folder)
    assert (declared.activation, declared.max_length, declared.document_prompt) == ("log1p_relu", 40, "d: ")
    asked = resolved(folder, activation="relu", max_length=12, document_prompt="", lower_case=False)
    assert (asked.activation, asked.max_length, asked.document_prompt, asked.lower_case) == ("relu", 12, "", False)
    assert asked.query_prompt == "q: "


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
def test_where_a_text_is_cut_when_nobody_says(tmp_path: Path, config, tokenizer, expected) -> None:
    folder = make(tmp_path, {**PLAIN, "config.json": {**CONFIG, **config}, "tokenizer_config.json": tokenizer})
    assert resolved(folder).max_length == expected


def test_more_tokens_than_positions_are_refused(tmp_path: Path) -> None:
    folder = make(tmp_path, PLAIN)
    # The tokenizer's 48 is a habit, the 64 positions are a wall.
    assert resolved(folder, max_length=64).max_length == 64
    with pytest.raises(PipelineError, match="max_length = 65, but .* has positions for 64 tokens"):
        resolved(folder, max_length=65)


def test_a_declared_length_beyond_the_positions_is_cut_to_them(tmp_path: Path) -> None:
    """Cards of RoBERTa declare 514; its library fails on the first text that long."""
    folder = make(tmp_path, {**SYMMETRIC, "sentence_bert_config.json": {"max_seq_length": 66}})
    assert resolved(folder).max_length == 64


@pytest.mark.parametrize("pooling", [{"activation_function": "gelu"}, {"pooling_strategy": "sum"}])
def test_what_is_not_computed_here_is_refused(tmp_path: Path, pooling: dict) -> None:
    folder = make(tmp_path, {**SYMMETRIC, "1_SpladePooling/config.json": pooling})
    with pytest.raises(CheckpointError, match=next(iter(pooling.values()))):
        resolved(folder)


def test_identity_has_what_changes_a_document_and_no_path(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(str(make(tmp_path, SYMMETRIC)))
    identity = document_identity(checkpoint, resolve_settings(ModelSettings(query_prompt="other"), checkpoint))
    assert identity.keys() == {"sha256", *DOCUMENT_SETTINGS}
    assert identity["sha256"] == checkpoint.sha256
    assert not any(str(tmp_path) in str(value) for value in identity.values())


def test_the_record_is_enough_to_build_the_model_again(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(str(make(tmp_path, SYMMETRIC)))
    settings = resolve_settings(ModelSettings(document="relative"), checkpoint)
    record = model_record(checkpoint, settings, ModelSettings(document="relative"))
    assert record["document"] == str(tmp_path) and record["family"] == checkpoint.family
    again = {name: record.get(name) for name in asdict(settings)}
    assert resolve_settings(ModelSettings(**again), read_checkpoint(record["document"])) == ModelSettings(**again)
    packaged = read_checkpoint("package:cognition/model")
    assert model_record(packaged, ModelSettings(), ModelSettings())["document"] == "package:cognition/model"


# The query side


def of_queries(folder: Path, **asked):
    return resolve_query_settings(ModelSettings(**asked), read_checkpoint(str(folder)))


def test_a_table_of_the_library_keeps_special_tokens_and_one_of_opensearch_does_not(tmp_path: Path) -> None:
    for files, special, missing in ((ROUTER, "keep", 0.0), ({**PLAIN, "idf.json": {"a": 1.0}}, "zero", 1.0)):
        folder = make(tmp_path / special, files)
        for settings in (of_queries(folder), resolved(folder, activation="relu")):
            assert (settings.query_special_tokens, settings.missing_idf_weight) == (special, missing)
        assert resolved(folder, activation="relu").document_special_tokens == special
        asked = of_queries(folder, query_special_tokens="keep", missing_idf_weight=0.5, query_prompt="p")
        assert (asked.query_special_tokens, asked.missing_idf_weight, asked.query_prompt) == ("keep", 0.5, "p")


def test_an_activation_that_no_file_states_is_asked_for(tmp_path: Path) -> None:
    """OpenSearch's models with idf.json have one logarithm or two; queries of the table need to know of neither."""
    folder = make(tmp_path, {**PLAIN, "idf.json": {"a": 1.0}})
    with pytest.raises(CheckpointError, match='no file states the activation.*"relu" or "log1p_relu"') as refused:
        resolved(folder)
    assert str(folder) in str(refused.value)
    assert of_queries(folder).activation is None
    assert resolved(folder, activation="log1p_relu").activation == "log1p_relu"


def test_a_table_is_cut_where_its_own_tokenizer_says(tmp_path: Path) -> None:
    folder = make(tmp_path, ROUTER)
    assert (of_queries(folder).max_length, of_queries(folder, max_length=30).max_length) == (12, 12)
    assert resolved(folder).max_length == 44
    assert of_queries(make(tmp_path / "b", {**PLAIN, "idf.json": {"a": 1.0}})).max_length is None


def test_queries_of_a_table_need_no_weights_of_the_documents(tmp_path: Path) -> None:
    folder = make(tmp_path, {name: content for name, content in ROUTER.items() if "document" not in name})
    assert of_queries(folder).query_special_tokens == "keep"
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        resolved(folder)


def test_a_query_checkpoint_follows_its_own_files_and_what_is_asked(tmp_path: Path) -> None:
    folder = make(tmp_path, SYMMETRIC)
    own = of_queries(folder)
    assert (own.activation, own.max_length, own.lower_case, own.query_prompt) == ("log1p_relu", 40, True, "q: ")
    asked = of_queries(folder, activation="relu", max_length=12, lower_case=False)
    assert (asked.activation, asked.max_length, asked.lower_case) == ("relu", 12, False)


# What is refused


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"config.json": CONFIG}, "has no weights as safetensors or pytorch_model.bin"),
        ({"config.json": CONFIG, "training_args.bin": b""}, "found the pickle training_args.bin, which is never read"),
        ({name: content for name, content in SYMMETRIC.items() if name != "config.json"}, "has no config.json"),
        ({"idf.json": {"a": 1.0}, "tokenizer.json": {}}, "weight table for queries and no model for documents"),
        ({**PLAIN, "config.json": {**CONFIG, "model_type": "mine", "auto_map": {"AutoModelForMaskedLM": "m.M"}}},
         "has remote code: class M of m.py"),
    ],
)  # fmt: skip
def test_documents_that_cannot_be_encoded_are_refused_before_a_model_is_built(tmp_path: Path, files, said) -> None:
    with pytest.raises(CheckpointError, match=said) as caught:
        resolved(make(tmp_path, files))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json", "model-00001-of-2.safetensors"])
def test_each_form_of_weights_is_enough(tmp_path: Path, name: str) -> None:
    content = {"weight_map": {"bias": "config.json"}} if name.endswith("index.json") else {}
    assert resolved(make(tmp_path, {"config.json": CONFIG, name: content})).activation == "relu"


# The record


def record_of(folder: Path, **asked):
    given = ModelSettings(document=str(folder), **asked)
    checkpoint = read_checkpoint(str(folder))
    return model_record(checkpoint, resolve_settings(given, checkpoint), given)


def test_the_record_says_what_queries_are_made_with(tmp_path: Path) -> None:
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


def test_the_record_of_a_pair_keeps_both_sides_apart(tmp_path: Path) -> None:
    document, query = make(tmp_path / "doc", PLAIN), make(tmp_path / "query", SYMMETRIC)
    record = record_of(document, query=str(query))
    assert (record["document"], record["query"]) == (str(document), str(query))
    assert (record["activation"], record["max_length"]) == ("relu", 48)
    side = record["query_side"]
    assert (side["activation"], side["max_length"], side["query_prompt"]) == ("log1p_relu", 40, "q: ")
    assert side["sha256"] == read_checkpoint(str(query)).sha256
    # What `search` makes of it.
    again = {key: value for key, value in {**record, **side}.items() if key in asdict(ModelSettings())}
    expected = resolve_query_settings(ModelSettings(query=str(query)), read_checkpoint(str(query)))
    found = resolve_query_settings(ModelSettings(**again), read_checkpoint(str(query)))
    assert all(getattr(found, key) == getattr(expected, key) for key in RECORDED_OF_QUERIES)


def test_a_query_checkpoint_that_is_not_there_is_told_before_encoding(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no/where"):
        record_of(make(tmp_path, PLAIN), query=str(tmp_path / "no/where"))


def test_trust_in_remote_code_is_never_recorded(tmp_path: Path) -> None:
    record = record_of(make(tmp_path, ROUTER), trust_remote_code=True)
    assert record["trust_remote_code"] is False and "trust_remote_code" not in record["query_side"]
