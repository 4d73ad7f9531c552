"""Queries to sparse vectors with a masked LM: the query side of checkpoints that are no weight table.

Not covered: inference-free queries, which need no torch (queries/weight_table.py).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace

from sparse_ingest.checkpoints.layouts import Checkpoint
from sparse_ingest.models.documents import DocumentEncoder
from sparse_ingest.models.memory import until_it_fits
from sparse_ingest.models.sparse_vectors import SparseVectors
from sparse_ingest.pipeline import ModelSettings
from sparse_ingest.queries.weight_table import QueryWeights


class MaskedLMQueryEncoder:
    """A checkpoint's query side as token strings and weights, heaviest first; equal weights by token id.

    Threads may call it at the same time; their texts are computed one call after another.
    """

    def __init__(self, encoder: DocumentEncoder, *, max_active_dims: int | None = None) -> None:
        self._encoder = encoder
        self._max_active_dims = max_active_dims
        self._lock = threading.Lock()

    @property
    def vocabulary(self) -> list[str | None]:
        """The token string of each id, None where an id has no token."""
        return self._encoder.vocabulary

    def encode(self, texts: Sequence[str]) -> list[QueryWeights]:
        """The weights of each query; a query without any weight is an empty dict."""
        with self._lock:  # a call may lower the encoder's budget, and change its tokenizer to the faster one
            encoded = until_it_fits(lambda: self._encoder.encode(texts))
        vectors = SparseVectors(encoded.indptr, encoded.token_ids, encoded.weights, self.vocabulary)
        return [dict(pairs) for pairs in vectors.decode(self._max_active_dims)]


def build_query_encoder(
    checkpoint: Checkpoint, settings: ModelSettings, *, device: str = "cpu", batch_tokens: int | None = None
) -> MaskedLMQueryEncoder:
    """Build the masked LM that encodes a checkpoint's queries.

    `settings` must be those of its query side, resolved (checkpoints/settings.py).
    """
    query_side = replace(checkpoint, transformer=checkpoint.query.folder)
    encoder = DocumentEncoder(
        query_side, as_documents(settings), device=device, dtype="float32", batch_tokens=batch_tokens
    )
    return MaskedLMQueryEncoder(encoder, max_active_dims=checkpoint.max_active_dims)


def as_documents(settings: ModelSettings) -> ModelSettings:
    """Return the settings of documents that are encoded as these settings say of queries."""
    prompt, special_tokens = settings.query_prompt, settings.query_special_tokens
    return replace(settings, document_prompt=prompt, document_special_tokens=special_tokens)
