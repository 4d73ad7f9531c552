"""`SparseEncoder`: texts to sparse vectors in memory.

In: a model, and texts. Out: `SparseVectors` (sparse_vectors.py), or a dictionary from token to weight. A weight table
needs no torch; a masked LM is built when it is first used. A corpus is encoded into a run by encoding/encode.py.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, get_args, overload

import numpy as np
import numpy.typing as npt

from sparse_ingest.checkpoints.layouts import Checkpoint, read_checkpoint
from sparse_ingest.checkpoints.settings import refuse_lone_stride, resolve_pipeline, resolve_query_settings
from sparse_ingest.checkpoints.sides import ModelSide, WeightTableSide
from sparse_ingest.errors import CheckpointError, UsageError
from sparse_ingest.models.origins import Origin
from sparse_ingest.models.query_encoders import (
    MaskedLMQueryEncoder,
    as_documents,
    build_query_encoder,
    build_weight_table,
    query_checkpoint,
    require_torch,
)
from sparse_ingest.models.sparse_vectors import SparseVectors, Vectors, as_vectors, positive_integer, similarity
from sparse_ingest.models.text_windows import (
    WINDOW_CHARACTERS,
    DocumentSide,
    checked_texts,
    refuse_if_stopped,
    reporting,
)
from sparse_ingest.pipeline import Dtype, ModelSettings, Pipeline, pipeline_named
from sparse_ingest.queries.weight_table import QueryWeights, WeightTable, prune_query, vocabulary_of
from sparse_ingest.records import in_batches
from sparse_ingest.reporting import Reporter

if TYPE_CHECKING:
    import torch

QUERIES_AT_ONCE = 256  # texts between two reports of progress


class SparseEncoder:
    """A learned-sparse model: texts to sparse vectors in memory.

    The model is read, and downloaded if it is on the hub, at the first call of `encode_document` or `encode_query`.
    Queries of an inference-free model need neither torch nor transformers. Threads may share an encoder: weight
    tables are looked up at the same time, a masked LM computes one call after another. A pickled encoder has only its
    settings: each process builds a model of its own. Start processes with "spawn": one that is forked while another
    thread encodes may wait forever. Weights on outputs without a token, for example in a padded vocabulary, are
    omitted from documents; a warning is logged the first time.

    `encode_document` applies `[model]` and `[encode]` of a pipeline as `encode` does, except that weights stay float32:
    `[encode] weights` is for runs. `encode_query` applies `[query] top_k` and `max_ratio`, as `query` does.

    Args:
        model: a hub id, a folder, `package:NAME/PATH`, the path of a pipeline file (`.toml`), the name of a packaged
            pipeline, a `ModelSettings` or a `Pipeline`. A folder of that name is preferred over a packaged pipeline.
        device: where masked LMs compute: "auto" (the first GPU that torch sees, otherwise the CPU), "cpu", "cuda" or
            "cuda:N", or a torch.device.
        dtype: number type of the document model: "float32", "bfloat16", "float16", "int8", "int8-bfloat16",
            "int8-int8" or "int16". "auto" is the pipeline's, or float32 if it has none: unlike `encode`, this tries no
            faster types. Queries are always computed in float32.
        trust_remote_code: whether to run Python code in the model's repository.
        revision: branch, tag or commit of a model on the hub.
        max_length: tokens after which a text is truncated, including special tokens; None: as the model declares. A
            weight table truncates queries at the limit of its own tokenizer.
        batch_tokens: padded tokens of one batch of a masked LM; None: by device.

    Raises:
        UsageError: an option has an invalid value, or the pipeline has `overflow = "passages"`.
        PipelineError: the pipeline file cannot be read.
    """

    def __init__(
        self,
        model: str | Path | ModelSettings | Pipeline,
        *,
        device: str | torch.device = "auto",
        dtype: Dtype = "auto",
        trust_remote_code: bool = False,
        revision: str | None = None,
        max_length: int | None = None,
        batch_tokens: int | None = None,
    ) -> None:
        pipeline = pipeline_named(model)
        given, encode = pipeline.model, pipeline.encode
        if not (given.document or given.query):
            raise UsageError("The pipeline names no model. Set [model] document.")
        if revision and not given.document:
            raise UsageError("revision is for the document model, but none is set. Set [model] query_revision instead.")
        settings = replace(
            given,
            trust_remote_code=trust_remote_code or given.trust_remote_code,
            revision=revision or given.revision,
            max_length=positive_integer("max_length", max_length) or given.max_length,
        )
        if dtype not in get_args(Dtype):
            raise UsageError(f"dtype is {dtype!r}; expected one of {', '.join(get_args(Dtype))}.")
        if dtype == "auto":
            dtype = "float32" if encode.dtype == "auto" else encode.dtype
        if encode.overflow == "passages":
            raise UsageError(
                'overflow = "passages" creates several vectors per text, but encode_document returns one. Use '
                'encode(), or overflow = "windows".'
            )
        refuse_lone_stride(encode)
        batch_tokens = positive_integer("batch_tokens", batch_tokens) or encode.batch_tokens
        encode = replace(encode, dtype=dtype, batch_tokens=batch_tokens)
        self._pipeline = replace(pipeline, model=settings, encode=encode)
        self._device = str(device)
        self._building = threading.RLock()  # locked while a side is built
        self._documents: DocumentSide | None = None
        self._queries: _QueryEncoding | None = None

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle the settings: another process builds the model again."""
        return partial(type(self), device=self._device), (self._pipeline,)

    def __repr__(self) -> str:
        model = self._pipeline.model
        query = f", query={model.query!r}" if model.query else ""
        return f"<SparseEncoder: {model.document!r}{query}, device={self._device!r}, {self._pipeline.encode.dtype}>"

    @overload
    def encode_document(  # type: ignore[overload-overlap]  # a string is a sequence of strings
        self, texts: str, *, max_active_dims: int | None = None, progress: bool | Reporter = False
    ) -> QueryWeights: ...

    @overload
    def encode_document(
        self, texts: Iterable[str], *, max_active_dims: int | None = None, progress: bool | Reporter = False
    ) -> SparseVectors: ...

    def encode_document(
        self, texts: str | Iterable[str], *, max_active_dims: int | None = None, progress: bool | Reporter = False
    ) -> QueryWeights | SparseVectors:
        """Encode documents.

        Args:
            texts: one text, or any number of them: a sequence, an iterator, or a column of pandas, polars or Arrow. An
                empty text is a document too.
            max_active_dims: how many of its heaviest tokens a vector keeps; None: the number that the pipeline or the
                model declares, otherwise all.
            progress: True for a progress bar, or a `Reporter`.

        Returns:
            For one text a dictionary from token to weight, heaviest first; otherwise `SparseVectors` in the order of
            the texts, with the vocabulary of the document model.

        Raises:
            UsageError: a text is not a string, or max_active_dims is not an integer above zero.
            CheckpointError: the model cannot be found or built.
            MissingExtraError: torch or transformers is not installed.
            Interrupted: the reporter requested a stop.
        """
        chosen, limit = checked_texts(texts), positive_integer("max_active_dims", max_active_dims)
        side = self._document_side()
        with reporting(progress) as reporter:
            vectors = side.encode(chosen, limit, reporter)
        return vectors[0] if isinstance(texts, str) else vectors

    @overload
    def encode_query(  # type: ignore[overload-overlap]
        self, texts: str, *, max_active_dims: int | None = None, progress: bool | Reporter = False
    ) -> QueryWeights: ...

    @overload
    def encode_query(
        self, texts: Iterable[str], *, max_active_dims: int | None = None, progress: bool | Reporter = False
    ) -> SparseVectors: ...

    def encode_query(
        self, texts: str | Iterable[str], *, max_active_dims: int | None = None, progress: bool | Reporter = False
    ) -> QueryWeights | SparseVectors:
        """Encode queries.

        Args:
            texts: as for `encode_document`. A text without a weighted token gives an empty vector.
            max_active_dims: how many of its heaviest tokens a query keeps; None: the number that the pipeline or the
                model declares, otherwise all.
            progress: True for a progress bar, or a `Reporter`.

        Returns:
            For one text a dictionary from token to weight, heaviest first; otherwise `SparseVectors` in the order of
            the texts. They have the vocabulary of the documents, and so the same width, unless the queries have their
            own model (`ModelSettings.query`) or tokens that the documents lack.

        Raises:
            UsageError: as encode_document.
            CheckpointError: the model cannot be found or built.
            MissingExtraError: the query side is a masked LM, and torch or transformers is not installed.
            Interrupted: the reporter requested a stop.
        """
        chosen, limit = checked_texts(texts), positive_integer("max_active_dims", max_active_dims)
        side = self._query_side()
        rules = self._pipeline.query if limit is None else replace(self._pipeline.query, top_k=None)
        found: list[QueryWeights] = []
        with reporting(progress) as reporter:
            reporter.begin("queries", len(chosen))
            for some in in_batches(chosen, QUERIES_AT_ONCE, WINDOW_CHARACTERS):
                refuse_if_stopped(reporter)
                for weights in side.encoder.encode(some):
                    kept = dict(list(weights.items())[: limit or side.max_active_dims])
                    found.append(prune_query(kept, rules) if rules.top_k or rules.max_ratio else kept)
                reporter.advance(len(some))
        return found[0] if isinstance(texts, str) else SparseVectors.from_dicts(found, side.vocabulary)

    def origins(self, text: str, tokens: Sequence[str]) -> list[Origin]:
        """Return which token of a text gives each term of its document vector the weight that it has.

        Args:
            text: a document. Without `overflow = "windows"` the rest of a longer one is not read.
            tokens: terms, such as those of a query. Those without a weight in the vector are omitted.

        Returns:
            One `Origin` per remaining term, with its weight and the characters of the token, in the order of `tokens`.

        Raises:
            UsageError: as encode_document.
            CheckpointError: the model cannot be found or built.
            MissingExtraError: torch or transformers is not installed.
        """
        return self._document_side().origins(checked_texts(text)[0], tokens)

    def similarity(self, queries: Vectors, documents: Vectors) -> npt.NDArray[np.float32]:
        """Return the dot product of each query with each document, float32 `[queries, documents]`.

        Both are SparseVectors, a dictionary from token to weight, or a list of such dictionaries. Weights are matched
        by token string if the vocabularies differ. Sums have the arithmetic of Lucene.
        """
        return similarity(queries, documents)

    @overload
    def decode(self, vectors: Mapping[str, float], top_k: int | None = None) -> list[tuple[str, float]]: ...

    @overload
    def decode(
        self, vectors: SparseVectors | Sequence[Mapping[str, float]], top_k: int | None = None
    ) -> list[list[tuple[str, float]]]: ...

    def decode(
        self, vectors: Vectors, top_k: int | None = None
    ) -> list[tuple[str, float]] | list[list[tuple[str, float]]]:
        """Return tokens and weights, heaviest first.

        Args:
            vectors: SparseVectors, a dictionary from token to weight, or a list of such dictionaries.
            top_k: how many of a vector; None for all.

        Returns:
            For a dictionary one list of (token, weight); otherwise a list of such lists, one per row.

        Raises:
            UsageError: `vectors` is not sparse vectors, or top_k is not an integer above zero.
        """
        decoded = as_vectors(vectors).decode(top_k)
        return decoded[0] if isinstance(vectors, Mapping) else decoded

    def _document_side(self) -> DocumentSide:
        if self._documents is None:
            with self._building:
                self._documents = self._documents or self._build_documents()
        return self._documents

    def _query_side(self) -> _QueryEncoding:
        if self._queries is None:
            with self._building:
                self._queries = self._queries or self._build_queries()
        return self._queries

    def _build_documents(self) -> DocumentSide:
        require_torch("Encoding documents")
        from sparse_ingest.models.documents import build_document_encoder

        checkpoint = self._checkpoint
        resolved = resolve_pipeline(self._pipeline, checkpoint)
        encoder = build_document_encoder(
            checkpoint, resolved, device=self._device, dtype=resolved.encode.dtype, all_cores=True
        )
        return DocumentSide(encoder, resolved)

    def _build_queries(self) -> _QueryEncoding:
        model = self._pipeline.model
        checkpoint = query_checkpoint(model) if model.query else self._checkpoint
        # The checkpoint's limit is applied in encode_query, where a call may replace it.
        unlimited = replace(checkpoint, max_active_dims=None)
        settings = resolve_query_settings(model, checkpoint)
        build = build_weight_table if isinstance(checkpoint.query, WeightTableSide) else self._build_masked_lm
        encoder = build(unlimited, settings)
        return _QueryEncoding(encoder, checkpoint.max_active_dims, None if model.query else checkpoint.document)

    def _build_masked_lm(self, checkpoint: Checkpoint, settings: ModelSettings) -> MaskedLMQueryEncoder:
        """Build the masked LM of the queries, with the weights of the document model if it is the same model."""
        require_torch(f"The query side of {checkpoint.name}, {checkpoint.query.described},")
        encode, wanted = self._pipeline.encode, as_documents(settings)
        is_own_model = not self._pipeline.model.query and checkpoint.query.folder == checkpoint.transformer
        if is_own_model and encode.dtype == "float32" and (documents := self._document_side()).computes_as(wanted):
            return MaskedLMQueryEncoder(documents.encoder.on_same_weights(wanted))
        return build_query_encoder(checkpoint, settings, device=self._device, batch_tokens=encode.batch_tokens)

    @cached_property
    def _checkpoint(self) -> Checkpoint:
        """The checkpoint of the documents. Read it only while you hold `_building`."""
        model = self._pipeline.model
        if not model.document:
            raise UsageError(f"{model.query!r} is a model for queries only. Set [model] document too.")
        return read_checkpoint(model.document, model.revision, code=model.trust_remote_code)


@dataclass
class _QueryEncoding:
    """A query encoder, and the vocabulary of its vectors.

    `documents` is the document side that shares its vocabulary, None for a separate vocabulary.
    """

    encoder: WeightTable | MaskedLMQueryEncoder
    max_active_dims: int | None
    documents: ModelSide | None

    @cached_property
    def vocabulary(self) -> list[str | None]:
        """The vocabulary of the documents, or the queries' own if that lacks one of their tokens."""
        own = self.encoder.vocabulary
        if self.documents is None:
            return own
        try:
            of_documents = vocabulary_of(self.documents)
        except CheckpointError:  # a tokenizer without tokenizer.json
            return own
        weighted = set(self.encoder.table()) if isinstance(self.encoder, WeightTable) else {*own} - {None}
        return of_documents if weighted.issubset(of_documents) else own
