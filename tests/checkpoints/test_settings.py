"""Settings of a model: the pipeline over the checkpoint's files over the library's defaults."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
from test_layouts import CONFIG, PLAIN, SYMMETRIC, make

from sparse_ingest.checkpoints.layouts import read_checkpoint
from sparse_ingest.checkpoints.settings import DOCUMENT_SETTINGS, document_identity, model_record, resolve_settings
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
    record = model_record(checkpoint, settings)
    assert record["document"] == str(tmp_path) and record["family"] == checkpoint.family
    again = {name: record.get(name) for name in asdict(settings)}
    assert resolve_settings(ModelSettings(**again), read_checkpoint(record["document"])) == ModelSettings(**again)
    packaged = read_checkpoint("package:cognition/model")
    assert model_record(packaged, ModelSettings())["document"] == "package:cognition/model"
