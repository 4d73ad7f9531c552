"""Query encoders: a weight table (queries/weight_table.py), which needs neither torch nor numpy, or a masked LM."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from sparse_ingest.checkpoints.layouts import Checkpoint, read_checkpoint
from sparse_ingest.checkpoints.settings import resolve_query_settings
from sparse_ingest.checkpoints.sides import ModelSide, WeightTableSide
from sparse_ingest.errors import MissingExtraError, UsageError
from sparse_ingest.models.memory import until_it_fits
from sparse_ingest.pipeline import ModelSettings, Pipeline, pipeline_named
from sparse_ingest.queries.weight_table import QueryWeights, WeightTable

if TYPE_CHECKING:
    from sparse_ingest.models.documents import DocumentEncoder


def query_encoder(model: str | Path | ModelSettings | Pipeline) -> QueryEncoder:
    """Build the query encoder of a model: its weight table where the checkpoint has one, otherwise its masked LM.

    Raises:
        UsageError: no model is named.
        MissingExtraError: the checkpoint needs torch, which is not installed.
    """
    model = pipeline_named(model).model
    checkpoint = query_checkpoint(model)
    if isinstance(checkpoint.query, WeightTableSide):
        return build_weight_table(checkpoint, resolve_query_settings(model, checkpoint))
    require_torch(f"The query side of {checkpoint.name}, {checkpoint.query.described},")
    return build_query_encoder(checkpoint, resolve_query_settings(model, checkpoint))


def query_checkpoint(model: ModelSettings) -> Checkpoint:
    """Read the checkpoint that a model's queries are encoded with."""
    name = model.query or model.document
    if not name:
        raise UsageError("No model: give --model or --pipeline.")
    revision = model.query_revision if model.query else model.revision
    return read_checkpoint(name, revision, code=model.trust_remote_code)


def build_weight_table(checkpoint: Checkpoint, settings: ModelSettings) -> WeightTable:
    """Build the weight table that is a checkpoint's query side.

    Raise `MissingExtraError` if it is a pickle, and torch is not installed.
    """
    side = checkpoint.query
    assert isinstance(side, WeightTableSide)
    pickled = None
    if side.weights.suffix == ".bin":
        require_torch(f"The weight table of {checkpoint.name}, a pickle that only torch reads safely,")
        from sparse_ingest.models.masked_lms import read_table

        pickled = read_table(side.weights)
    return WeightTable(side, settings, max_active_dims=checkpoint.max_active_dims, by_id=pickled)


class MaskedLMQueryEncoder:
    """A checkpoint's query side as token strings and weights, heaviest first; equal weights by token id.

    `vocabulary` has the token string of each id. Threads may share it; their calls are computed one after another.
    """

    def __init__(self, encoder: DocumentEncoder, *, max_active_dims: int | None = None) -> None:
        self.vocabulary = encoder.vocabulary
        self._encoder = encoder
        self._max_active_dims = max_active_dims
        self._lock = threading.Lock()

    def encode(self, texts: Sequence[str]) -> list[QueryWeights]:
        """Return the weights of each query; a query without weights is an empty dict."""
        from sparse_ingest.models.sparse_vectors import SparseVectors

        with self._lock:  # a call may lower the encoder's budget, and replace its tokenizer by the faster one
            encoded = until_it_fits(lambda: self._encoder.encode(texts))
        vectors = SparseVectors.from_rows(encoded.vectors, self.vocabulary)
        return [dict(pairs) for pairs in vectors.decode(self._max_active_dims)]


QueryEncoder: TypeAlias = WeightTable | MaskedLMQueryEncoder


def build_query_encoder(
    checkpoint: Checkpoint, settings: ModelSettings, *, device: str = "cpu", batch_tokens: int | None = None
) -> MaskedLMQueryEncoder:
    """Build the masked LM that encodes a checkpoint's queries, with the resolved settings of its query side."""
    from sparse_ingest.models.documents import DocumentEncoder, choose_device

    assert isinstance(checkpoint.query, ModelSide)
    query_side = replace(checkpoint, document=checkpoint.query)
    device = choose_device(device)
    encoder = DocumentEncoder(
        query_side, as_documents(settings), device=device, dtype="float32", batch_tokens=batch_tokens, all_cores=True
    )
    return MaskedLMQueryEncoder(encoder, max_active_dims=checkpoint.max_active_dims)


def as_documents(settings: ModelSettings) -> ModelSettings:
    """Return settings that encode documents the way these settings encode queries."""
    prompt, special_tokens = settings.query_prompt, settings.query_special_tokens
    return replace(settings, document_prompt=prompt, document_special_tokens=special_tokens)


def require_torch(purpose: str) -> None:
    """Raise MissingExtraError where torch or transformers is not installed; neither is imported."""
    if not (importlib.util.find_spec("torch") and importlib.util.find_spec("transformers")):
        raise MissingExtraError("encode", purpose)
