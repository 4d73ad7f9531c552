"""The packaged pipelines: one per model card, with the settings of the card, run on a local copy of its layout."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from support.cards import CARD_TWINS, TABLE, Twin, build_gte

from sparse_ingest.checkpoints.inspect import inspect_model
from sparse_ingest.checkpoints.layouts import read_checkpoint
from sparse_ingest.checkpoints.settings import resolve_pipeline
from sparse_ingest.models.documents import DocumentEncoder
from sparse_ingest.models.query_encoders import query_encoder
from sparse_ingest.pipeline import Pipeline, override, packaged_folder, read_pipeline

DOCUMENT = "The stone in the river: searching for water!"
QUERY = "river stone water the river"


class Card(NamedTuple):
    """What a model card states (None: nothing)."""

    name: str
    max_length: int | None
    activation: str
    license: str | None
    family: str
    query_name: str | None = None
    has_table: bool = False


SYMMETRIC = "symmetric SPLADE, sentence-transformers layout"
ROUTER = "Router with a separate query side"
CARDS = {
    "splade-distilbert-mrl": Card(
        "arthurbresnu/splade-distilbert-base-uncased-msmarco-mrl", 256, "relu", "Apache-2.0", SYMMETRIC
    ),
    "inference-free-distilbert-nq": Card(
        "tomaarsen/inference-free-splade-distilbert-base-nq-fresh-3e-2-lambda-corpus-1e-3-idf-lr-2e-5-lr",
        512, "relu", "Apache-2.0", ROUTER, has_table=True,
    ),
    "splade-mini": Card("rasyosef/splade-mini", 512, "relu", "MIT", SYMMETRIC),
    "opensearch-doc-v3-gte": Card(
        "opensearch-project/opensearch-neural-sparse-encoding-doc-v3-gte",
        8192, "log1p_relu", "Apache-2.0", "masked LM with idf.json, plain layout", has_table=True,
    ),
    "opensearch-doc-v3-gte-limit": Card(
        "Frinkleko/opensearch-project_opensearch-neural-sparse-encoding-doc-v3-gte-limit-samples-2",
        8192, "log1p_relu", None, ROUTER, has_table=True,
    ),
    "efficient-splade-large": Card(
        "naver/efficient-splade-VI-BT-large-doc", None, "relu", "CC-BY-NC-SA-4.0", "masked LM, plain layout",
        query_name="naver/efficient-splade-VI-BT-large-query",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Twin]:
    return {name: make(tmp_path_factory.mktemp(name)) for name, make in CARD_TWINS.items()}


def text_of(name: str) -> str:
    return (packaged_folder() / f"{name}.toml").read_text()


def uncommented(name: str, folder: Path) -> Pipeline:
    """Return a packaged pipeline with its commented settings enabled."""
    path = folder / f"{name}.toml"
    path.write_text(re.sub(r"^# ?(?=[a-z_]+ = )", "", text_of(name), flags=re.MULTILINE))
    return read_pipeline(str(path))


def test_each_card_has_a_pipeline_and_a_local_copy() -> None:
    names = {path.stem for path in packaged_folder().glob("*.toml")}
    assert names - {"demo"} == set(CARDS) == set(CARD_TWINS)


@pytest.mark.parametrize("name", CARDS)
def test_a_pipeline_has_the_settings_of_its_card(name: str, tmp_path: Path) -> None:
    card, plain, commented = CARDS[name], read_pipeline(name), uncommented(name, tmp_path)
    for pipeline in (plain, commented):
        assert (pipeline.model.document, pipeline.model.query) == (card.name, card.query_name)
        assert pipeline.model.trust_remote_code is False
    assert commented.model.activation == card.activation
    if card.max_length:
        assert commented.model.max_length == card.max_length
    else:
        assert "the card has no limit" in text_of(name)
    head = text_of(name).partition("[model]")[0]
    assert (card.license or "has no license") in head
    assert ("forbids commercial use" in head) == ("NC" in (card.license or ""))


@pytest.mark.parametrize("name", CARDS)
def test_every_commented_setting_is_valid(name: str, tmp_path: Path) -> None:
    assert re.findall(r"^# ?([a-z_]+) = ", text_of(name), flags=re.MULTILINE)
    commented, plain = uncommented(name, tmp_path), read_pipeline(name)
    assert commented != plain
    # Commented settings are those of the checkpoint.
    set_keys = {entry.name for entry in fields(plain.model) if getattr(plain.model, entry.name)}
    assert set_keys <= {"document", "query", "activation"}


@pytest.mark.parametrize("name", CARDS)
def test_a_local_copy_is_encoded_by_the_formula_of_the_card(name: str, twins: dict[str, Twin]) -> None:
    card, twin = CARDS[name], twins[name]
    pipeline = override(read_pipeline(name), twin.assignments())
    checkpoint = read_checkpoint(str(twin.document))
    assert checkpoint.family == card.family
    resolved = resolve_pipeline(pipeline, checkpoint)
    assert resolved.model.activation == card.activation
    encoder = DocumentEncoder(checkpoint, resolved.model, device="cpu", dtype="float32")
    encoded = encoder.encode([DOCUMENT]).vectors
    found = dict(zip(encoded.token_ids.tolist(), encoded.weights.tolist(), strict=True))
    expected = reference(checkpoint.transformer, DOCUMENT, card.activation)
    if resolved.model.document_special_tokens == "zero":
        expected[:5] = 0  # [PAD] to [MASK]
    assert len(found) > 5
    assert found.keys() == set(np.flatnonzero(expected > 0).tolist())
    assert max(abs(expected[token_id] - weight) for token_id, weight in found.items()) < 1e-4
    query = query_encoder(pipeline.model).encode([QUERY])[0]
    if card.has_table:
        assert query == {token: TABLE[token] for token in ("river", "stone", "the")}
    else:
        expected_query = reference(twin.query or twin.document, QUERY, card.activation)
        assert sorted(query.values(), reverse=True) == pytest.approx(
            sorted(expected_query[expected_query > 0], reverse=True), abs=1e-4
        )


@pytest.mark.parametrize("name", CARDS)
def test_a_local_copy_is_inspected(name: str, twins: dict[str, Twin]) -> None:
    card = CARDS[name]
    found = inspect_model(override(read_pipeline(name), twins[name].assignments()).model)
    assert found.document is not None
    assert (found.document.family, found.document.activation) == (card.family, card.activation)
    assert found.query.kind == ("weight table" if card.has_table else "masked LM")
    assert found.query.model == str(twins[name].query or twins[name].document)
    assert found.document.remote_code is None
    pickled = any("has its weights in a pickle" in warning for warning in found.warnings)
    assert pickled == (name == "efficient-splade-large")


def reference(folder: Path, text: str, activation: str) -> np.ndarray:
    """Return the weights by the formula of the card, computed with transformers alone."""
    import torch
    from transformers import AutoModelForMaskedLM, PreTrainedTokenizerFast

    tokens = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))(text, return_tensors="pt")
    is_gte = json.loads((folder / "config.json").read_text())["model_type"] == "new"
    model = build_gte() if is_gte else AutoModelForMaskedLM.from_pretrained(folder)
    with torch.no_grad():
        logits = model.eval()(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).logits[0]
    weights = torch.log1p(torch.relu(logits.max(dim=0).values))
    return (torch.log1p(weights) if activation == "log1p_relu" else weights).numpy()
