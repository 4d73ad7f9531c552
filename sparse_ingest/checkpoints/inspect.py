"""`inspect`: what a model is, the settings that it would run with, and warnings about its use.

No weights are loaded, and no code of a checkpoint runs. Not covered: whether the weights fit the architecture.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from sparse_ingest.checkpoints.card import (
    Card,
    Vocabulary,
    count_parameters,
    describe_vocabulary,
    has_pickle,
    ranges_without_token,
    read_card,
)
from sparse_ingest.checkpoints.checks import read_config
from sparse_ingest.checkpoints.layouts import Checkpoint, read_checkpoint, remote_code
from sparse_ingest.checkpoints.settings import resolve_query_settings, resolve_settings
from sparse_ingest.checkpoints.sides import NO_WORDS, AutoencoderSide, LexicalSide, ModelSide, WeightTableSide
from sparse_ingest.errors import CheckpointError, UsageError
from sparse_ingest.pipeline import ModelSettings, Pipeline, pipeline_named

# OpenSearch 3.3 to 3.8 store a key of `sparse_vector` in 15 bits and a sign.
SEISMIC_IDS = 32768
# Models trained for sparse vectors give 50 to 500 terms per document, ordinary masked LMs most of their vocabulary.
SPARSE_TERMS = 2000


@dataclass(frozen=True)
class Side:
    """One side of a model, with the settings that it would run with.

    Of a weight table `architecture`, `layers`, `hidden_size`, `parameters`, `positions`, `activation` and `pooling` are
    None, `attention` of all but language models. `ids_without_token` has the first and last id of each range of outputs
    without a token. `special_token_weights` is "keep", "zero", the names of those that are zero, or None for an
    autoencoder, whose `vocabulary_size` is the number of its features.
    """

    model: str
    family: str
    kind: str
    revision: str | None
    sha256: str | None
    license: str | None
    languages: list[str]
    architecture: str | None
    layers: int | None
    hidden_size: int | None
    parameters: int | None
    vocabulary_size: int | None
    ids_without_token: list[tuple[int, int]]
    tokenizer: str | None
    activation: str | None
    pooling: str | None
    attention: str | None
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
    """The result of `inspect`; `document` is None for a model that has only a query side."""

    document: Side | None
    query: Side
    warnings: list[str]


def inspect_model(model: str | Path | ModelSettings | Pipeline) -> Inspection:
    """Describe a model without loading its weights.

    Args:
        model: A hub id, a folder, package:NAME/PATH, a pipeline or its name, or settings.

    Raises:
        UsageError: no model is named.
        CheckpointError: it cannot be found, or its family is unknown.
    """
    model = pipeline_named(model).model
    if model.document is None:
        raise UsageError("No model: give MODEL or --pipeline.")
    warnings: list[str] = []
    checkpoint = read_checkpoint(model.document, model.revision)
    document = _side(checkpoint, model, warnings, "document") if checkpoint.encodes_documents else None
    queries = read_checkpoint(model.query, model.query_revision) if model.query else checkpoint
    query = _side(queries, model, warnings, "query")
    return Inspection(document, query, list(dict.fromkeys(warnings)))


def dense_warning(terms: int, documents: int) -> str | None:
    """Return a warning if documents have so many terms that the model was not trained for sparse vectors."""
    if terms <= SPARSE_TERMS * documents:
        return None
    return (
        f"The model gives {terms / documents:,.0f} terms per document (mean of {documents:,}); models trained for "
        "sparse vectors give a few hundred. Is this a SPLADE model? The index would be very large."
    )


def _side(
    checkpoint: Checkpoint, asked: ModelSettings, warnings: list[str], task: Literal["document", "query"]
) -> Side:
    """Return one side, and append to `warnings`."""
    side: ModelSide | WeightTableSide = checkpoint.document if task == "document" else checkpoint.query
    resolve = resolve_settings if task == "document" else resolve_query_settings
    is_table = isinstance(side, WeightTableSide)
    try:
        settings = resolve(replace(asked, trust_remote_code=True), checkpoint)
    except CheckpointError as error:
        # It cannot run: show what its files declare.
        warnings.append(str(error))
        settings = replace(asked, **{key: value for key, value in side.declared.items() if hasattr(asked, key)})
    config = {} if is_table else read_config(side.folder)
    size, architectures = _whole(config, "vocab_size"), config.get("architectures")
    card, vocabulary = read_card(checkpoint.folder), describe_vocabulary(side.folder, size)
    pooling: str | None = settings.pooling
    special: str | None = getattr(settings, f"{task}_special_tokens")
    if isinstance(side, AutoencoderSide):
        size, pooling, special = side.features, " and ".join(side.poolings_of_tokens), None
    elif isinstance(side, LexicalSide) and special == "keep":
        special = ", ".join(side.dropped)
    lacks: list[tuple[int, int]] = []
    if vocabulary and not is_table and side.has_words:
        lacks = ranges_without_token(vocabulary.tokens, size or 0)
    found = Side(
        model=checkpoint.name,
        family=checkpoint.family,
        kind=side.kind,
        revision=checkpoint.revision,
        sha256=None if checkpoint.revision else checkpoint.sha256,
        license=card.license,
        languages=card.languages,
        architecture=next((str(one) for one in architectures), None) if isinstance(architectures, list) else None,
        layers=_whole(config, "num_hidden_layers", "n_layers"),
        hidden_size=_whole(config, "hidden_size", "dim"),
        parameters=None if is_table else count_parameters(side.folder),
        vocabulary_size=len(vocabulary.tokens) if is_table and vocabulary else size,
        ids_without_token=lacks,
        tokenizer=vocabulary.model if vocabulary else None,
        activation=settings.activation,
        pooling=pooling,
        attention=settings.attention,
        max_length=settings.max_length,
        positions=_whole(config, "max_position_embeddings"),
        prompt=getattr(settings, f"{task}_prompt") or "",
        lower_case=bool(settings.lower_case),
        special_tokens=vocabulary.special if vocabulary else {},
        special_token_weights=special,
        missing_idf_weight=settings.missing_idf_weight if is_table else None,
        max_active_dims=checkpoint.max_active_dims,
        remote_code=None if isinstance(side, WeightTableSide) else remote_code(side.folder, side.auto_class),
    )
    warnings += _warnings(found, side, card, vocabulary, task)
    return found


def _warnings(
    side: Side, of: ModelSide | WeightTableSide, card: Card, vocabulary: Vocabulary | None, task: str
) -> Iterator[str]:
    name, size, is_model = side.model, side.vocabulary_size, isinstance(of, ModelSide)
    if not of.has_words:
        yield NO_WORDS
    if side.remote_code:
        place = f"revision {side.revision}" if side.revision else str(of.folder)
        yield f"{name} needs remote code: {side.remote_code} ({place}) would run with --trust-remote-code."
    if is_model and has_pickle(of.folder):
        yield f"{name} has its weights in a pickle, which is read without running code; parameters are not counted."
    if is_model and size and size > SEISMIC_IDS:
        yield (
            f"{name} has {size:,} token ids, and a sparse_vector index (SEISMIC) distinguishes {SEISMIC_IDS:,}: its "
            "load numbers the tokens that occur, and refuses a run with more of them."
        )
    if card.is_non_commercial:
        yield (
            f"{name} has the license {card.license}, which forbids commercial use of the model, and possibly of its "
            "vectors and of an index of them."
        )
    if vocabulary is None:
        yield f"{name} has neither tokenizer.json nor vocab.txt on its {task} side; its tokens are unknown."
        return
    if vocabulary.shared and of.has_words:
        yield (
            f"{name} gives the token {vocabulary.shared[0]!r} to several ids ({len(vocabulary.shared)} such tokens): "
            "an index keys weights by token, so `encode` refuses it. Fix tokenizer.json."
        )
    if "pad_token" not in vocabulary.special and task == "document":
        yield f"{name} has no padding token: id 0 is used, and masked; other tools cannot encode batches with it."
    if not vocabulary.is_bert_uncased and of.has_words:
        sample = next((token for token in vocabulary.tokens if token and len(token) > 2 and token[0] in "Ġ▁"), None)
        such = f" such as {sample}" if sample else ""
        yield (
            f"{name} has {vocabulary.model} tokens{such} that OpenSearch's analyzer bert-uncased does not give: do not "
            "search with query_text; send the query_tokens that `sparse-ingest query` prints."
        )


def _whole(config: dict[str, Any], *names: str) -> int | None:
    """Return the first integer under one of several names, which differ between architectures."""
    return next((config[name] for name in names if isinstance(config.get(name), int)), None)
