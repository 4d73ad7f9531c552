"""The verb `inspect`: what a model is, which settings it would run with, and what of it will matter later.

In: the settings of `[model]`. Out: an `Inspection` of its document side and its query side. No weight is loaded, torch
is not needed, and no code of a checkpoint runs. Not covered: whether the weights fit the architecture, which encoding
finds out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from sparse_ingest.checkpoints.card import Vocabulary, count_parameters, has_pickle, read_card, read_vocabulary
from sparse_ingest.checkpoints.layouts import TABLE_ALONE, Checkpoint, read_checkpoint, remote_code
from sparse_ingest.checkpoints.modules import read_json
from sparse_ingest.checkpoints.settings import resolve_query_settings, resolve_settings
from sparse_ingest.checkpoints.sides import WeightTableSide
from sparse_ingest.errors import CheckpointError, UsageError
from sparse_ingest.pipeline import ModelSettings

# OpenSearch 3.3 to 3.8 keep a token id of `sparse_vector` in 15 bits and a sign.
SEISMIC_IDS = 32768


@dataclass(frozen=True)
class Side:
    """One side of a model, with the settings that it would run with.

    Of a weight table `parameters` counts nothing and `architecture`, `layers`, `hidden_size`, `positions`, `activation`
    and `pooling` are None. `special_tokens` says what each is for; `special_token_weights` whether they count.
    """

    model: str
    family: str
    kind: Literal["masked LM", "weight table"]
    revision: str | None
    sha256: str | None
    license: str | None
    languages: list[str]
    architecture: str | None
    layers: int | None
    hidden_size: int | None
    parameters: int | None
    vocabulary_size: int | None
    tokenizer: str | None
    activation: str | None
    pooling: str | None
    max_length: int | None
    positions: int | None
    prompt: str
    lower_case: bool
    special_tokens: dict[str, str]
    special_token_weights: str | None
    missing_idf_weight: float | None
    max_active_dims: int | None
    remote_code: str | None


@dataclass(frozen=True)
class Inspection:
    """What `inspect` shows; `document` is None for a model that has a query side only."""

    document: Side | None
    query: Side
    warnings: list[str]


def inspect_model(model: ModelSettings | str) -> Inspection:
    """Return what a model is, without loading its weights.

    Args:
        model: Settings, or the name of a model: a hub id, a folder, or package:NAME/PATH.

    Raises:
        UsageError: no model is named.
        CheckpointError: it cannot be found, or its family is unknown.
    """
    model = ModelSettings(document=model) if isinstance(model, str) else model
    if model.document is None:
        raise UsageError("No model: give MODEL or --pipeline.")
    warnings: list[str] = []
    checkpoint = read_checkpoint(model.document, model.revision)
    document = None if checkpoint.family == TABLE_ALONE else _document_side(checkpoint, model, warnings)
    queries = read_checkpoint(model.query, model.query_revision) if model.query else checkpoint
    query = _query_side(queries, model, warnings)
    # Once for what both sides share.
    return Inspection(document, query, list(dict.fromkeys(warnings)))


def _document_side(checkpoint: Checkpoint, asked: ModelSettings, warnings: list[str]) -> Side:
    try:
        settings = resolve_settings(replace(asked, trust_remote_code=True), checkpoint)
    except CheckpointError as error:
        warnings.append(str(error))
        declared = {key: value for key, value in checkpoint.declared.items() if hasattr(asked, key)}
        settings = replace(asked, **declared)
    return _masked_lm(checkpoint, checkpoint.transformer, settings, warnings, task="document")


def _query_side(checkpoint: Checkpoint, asked: ModelSettings, warnings: list[str]) -> Side:
    side = checkpoint.query
    try:
        settings = resolve_query_settings(replace(asked, trust_remote_code=True), checkpoint)
    except CheckpointError as error:
        warnings.append(str(error))
        settings = replace(asked, **{key: value for key, value in side.declared.items() if hasattr(asked, key)})
    if not isinstance(side, WeightTableSide):
        return _masked_lm(checkpoint, side.folder, settings, warnings, task="query")
    vocabulary = read_vocabulary(side.folder)
    return Side(
        **_told_by_the_folder(checkpoint, warnings),
        **_told_by_the_tokenizer(checkpoint.name, vocabulary, warnings, task="query"),
        kind="weight table",
        architecture=None,
        layers=None,
        hidden_size=None,
        parameters=None,
        vocabulary_size=len(vocabulary.tokens) if vocabulary else None,
        activation=None,
        pooling=None,
        max_length=settings.max_length,
        positions=None,
        prompt=settings.query_prompt or "",
        lower_case=bool(settings.lower_case),
        special_token_weights=settings.query_special_tokens,
        missing_idf_weight=settings.missing_idf_weight,
        remote_code=None,
    )


def _masked_lm(
    checkpoint: Checkpoint, folder: Path, settings: ModelSettings, warnings: list[str], *, task: str
) -> Side:
    config = read_json(folder / "config.json")
    size = _whole(config, "vocab_size")
    vocabulary = read_vocabulary(folder, size)
    if code := remote_code(folder):
        place = f"revision {checkpoint.revision}" if checkpoint.revision else str(folder)
        warnings.append(
            f"{checkpoint.name} brings remote code: {code} ({place}) would run with --trust-remote-code, and it does "
            "not load without."
        )
    if has_pickle(folder):
        warnings.append(
            f"{checkpoint.name} keeps its weights in a pickle; it is read through torch's weights_only loading, which "
            "runs no code, and its parameters are not counted here."
        )
    if size and size > SEISMIC_IDS:
        warnings.append(
            f"{checkpoint.name} has {size:,} token ids. A sparse_vector index (SEISMIC) takes ids below "
            f"{SEISMIC_IDS:,} only: OpenSearch 3.3 to 3.8 crash or mis-score the others, 3.9 folds them. "
            'Load with kind = "rank_features".'
        )
    architectures = config.get("architectures") or [None]
    return Side(
        **_told_by_the_folder(checkpoint, warnings),
        **_told_by_the_tokenizer(checkpoint.name, vocabulary, warnings, task=task),
        kind="masked LM",
        architecture=architectures[0],
        layers=_whole(config, "num_hidden_layers", "n_layers"),
        hidden_size=_whole(config, "hidden_size", "dim"),
        parameters=count_parameters(folder),
        vocabulary_size=size,
        activation=settings.activation,
        pooling=settings.pooling,
        max_length=settings.max_length,
        positions=_whole(config, "max_position_embeddings"),
        prompt=(settings.query_prompt if task == "query" else settings.document_prompt) or "",
        lower_case=bool(settings.lower_case),
        special_token_weights=settings.query_special_tokens if task == "query" else settings.document_special_tokens,
        missing_idf_weight=None,
        remote_code=code,
    )


def _told_by_the_folder(checkpoint: Checkpoint, warnings: list[str]) -> dict[str, Any]:
    card = read_card(checkpoint.folder)
    if card.is_non_commercial:
        warnings.append(
            f"{checkpoint.name} has the licence {card.license}, which forbids commercial use: of the model, and as its "
            "owners may see it of the vectors and of an index made with it."
        )
    return {
        "model": checkpoint.name,
        "family": checkpoint.family,
        "revision": checkpoint.revision,
        "sha256": None if checkpoint.revision else checkpoint.sha256,
        "license": card.license,
        "languages": card.languages,
        "max_active_dims": checkpoint.max_active_dims,
    }


def _told_by_the_tokenizer(
    name: str, vocabulary: Vocabulary | None, warnings: list[str], *, task: str
) -> dict[str, Any]:
    if vocabulary is None:
        warnings.append(f"{name} has neither tokenizer.json nor vocab.txt on its {task} side; nothing is known of it.")
        return {"tokenizer": None, "special_tokens": {}}
    if vocabulary.shared:
        warnings.append(
            f"{name} gives the token {vocabulary.shared[0]!r} to several ids ({len(vocabulary.shared)} such tokens): "
            "an index keys weights by token, so `encode` refuses it. Mend tokenizer.json."
        )
    if "pad_token" not in vocabulary.special and task == "document":
        warnings.append(
            f"{name} names no padding token: here id 0 stands in, behind the attention mask; other tools cannot "
            "encode batches with it."
        )
    if vocabulary.model != "WordPiece":
        sample = next((token for token in vocabulary.tokens if token and len(token) > 2 and token[0] in "Ġ▁"), None)
        such = f" such as {sample}" if sample else ""
        warnings.append(
            f"{name} has {vocabulary.model} tokens{such}, which OpenSearch's own analyzers do not make: never search "
            "its index with query_text; send the query_tokens that `sparse-ingest query` prints."
        )
    elif not vocabulary.is_bert_uncased:
        warnings.append(
            f"{name} has another vocabulary than bert-base-uncased, whose tokens OpenSearch's analyzer bert-uncased "
            "makes of query_text: send the query_tokens that `sparse-ingest query` prints."
        )
    return {"tokenizer": vocabulary.model, "special_tokens": vocabulary.special}


def _whole(config: dict[str, Any], *names: str) -> int | None:
    """The first of several names that holds a whole number: architectures name their sizes differently."""
    return next((config[name] for name in names if isinstance(config.get(name), int)), None)
