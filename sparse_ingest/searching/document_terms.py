"""Show the terms of documents: stored in a run or an index, or of a text that is encoded now.

Out: `DocumentTerms`, which mark tokens that the text does not contain (expansion), and have the contributions to a
query's score. A token is also given as readable text: `##ing`, `Ġthe` and `▁de` become `…ing`, `the` and `de`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from sparse_ingest.checkpoints.layouts import read_checkpoint
from sparse_ingest.errors import CheckpointError, DocumentNotFoundError, StorageError
from sparse_ingest.pipeline import ModelSettings, Pipeline
from sparse_ingest.queries.weight_table import QueryWeights, plain_tokenizer, to_float32
from sparse_ingest.records import passage_id
from sparse_ingest.searching.options import check_ids

if TYPE_CHECKING:
    from sparse_ingest.cluster.client import Client
    from sparse_ingest.cluster.indexes import Index
    from sparse_ingest.cluster.search_bodies import Engine
    from sparse_ingest.runs.run import Run

_MARKERS = ("##", "Ġ", "▁")  # WordPiece: a token continues a word; byte-level BPE and SentencePiece: it begins one
# Byte-level BPE writes the bytes 0 to 32, 127 to 160 and 173 as the characters from U+0100 on.
_MOVED = [*range(33), *range(127, 161), 173]
_BYTES = {chr(byte): byte for byte in range(256) if byte not in _MOVED}
_BYTES |= {chr(256 + place): byte for place, byte in enumerate(_MOVED)}
logger = logging.getLogger(__name__)


class DocumentTerm(NamedTuple):
    """A token of a document and its weight.

    Attributes:
        token: The token of the vocabulary.
        text: The token as readable text; "…" before it if it continues a word.
        weight: Its weight in the document.
        expansion: Whether the document's text lacks it; None if the text or the tokenizer is unknown.
        query_weight: Its weight in the query; None if the query lacks it.
        contribution: The product of both weights, its part of the score.
    """

    token: str
    text: str
    weight: float
    expansion: bool | None = None
    query_weight: float | None = None
    contribution: float | None = None


class DocumentTerms(NamedTuple):
    """The terms of one document, heaviest first, and its stored fields; `id` is None for a text.

    `score` is the score for the query; None without a query.
    """

    id: str | None
    fields: dict[str, Any]
    terms: list[DocumentTerm]
    score: float | None = None

    def heaviest(self, most: int | None) -> list[DocumentTerm]:
        """Return the `most` heaviest terms, and all that the query shares."""
        return [
            term for place, term in enumerate(self.terms)
            if most is None or place < most or term.contribution is not None
        ]  # fmt: skip

    def to_dict(self, top_k: int | None = None) -> dict[str, Any]:
        """Return the document as `show --json` prints it, with its `top_k` heaviest terms."""
        terms = [term._asdict() for term in self.heaviest(top_k)]
        return {**self._asdict(), "count": len(self.terms), "terms": terms}


class TermReader:
    """Turns weights by token into `DocumentTerms`, for one vocabulary, model and query.

    The tokenizer of the model is read when the first text needs it. If it cannot be read, expansion is unknown, and a
    warning is logged.
    """

    def __init__(
        self, vocabulary: Iterable[str | None], model: ModelSettings | None, query: QueryWeights | None = None
    ) -> None:
        self._readable, self._model, self._query = readable_by(vocabulary), model, query
        self._tokens: Callable[[str], set[str] | None] | None = None

    def read(self, doc_id: str | None, weights: Mapping[str, float], fields: dict[str, Any]) -> DocumentTerms:
        """Return the terms of a document; its text is in `fields`."""
        own = self._own_tokens(fields)
        terms, score = [], 0.0
        for token, weight in sorted(weights.items(), key=lambda pair: -pair[1]):
            asked = (self._query or {}).get(token)
            contribution = None if asked is None else to_float32(asked * weight)
            # As in Lucene: products in float32, their sum in double.
            score += contribution or 0.0
            expansion = None if own is None else token not in own
            terms.append(DocumentTerm(token, self._readable(token), weight, expansion, asked, contribution))
        return DocumentTerms(doc_id, fields, terms, None if self._query is None else to_float32(score))

    def _own_tokens(self, fields: Mapping[str, Any]) -> set[str] | None:
        if "text" not in fields or self._model is None:
            return None
        if self._tokens is None:
            try:
                self._tokens = _tokenizer_of(self._model)
            except (CheckpointError, StorageError) as error:
                logger.warning("Expansion terms are not marked: %s", error)
                self._model = None
                return None
        return self._tokens(" ".join(str(part) for part in (fields.get("title"), fields["text"]) if part))


def _tokenizer_of(model: ModelSettings) -> Callable[[str], set[str] | None]:
    """Return a function from text to its tokens on the document side, without special tokens, never truncated.

    It returns None for a model whose terms are not tokens.
    """
    name, revision = (model.document, model.revision) if model.document else (model.query, model.query_revision)
    checkpoint = read_checkpoint(str(name), revision, code=model.trust_remote_code)
    if not checkpoint.document.has_words:
        return lambda _: None
    declared = checkpoint.declared.get("lower_case") if model.lower_case is None else model.lower_case
    tokenizer = plain_tokenizer(checkpoint.transformer, lower_case=bool(declared))
    return lambda text: set(tokenizer.encode(text, add_special_tokens=False).tokens)


def terms_in_run(run: Run, doc_ids: Sequence[str], reader: TermReader) -> list[DocumentTerms]:
    """Return the terms of documents of a run. Only ids are read to find them, then a row group for each.

    Raise `DocumentNotFoundError` if the finished shards lack a document.
    """
    from sparse_ingest.runs.checking import find_documents, finished_shards, read_document
    from sparse_ingest.runs.shards import parse_fields

    check_ids(doc_ids)
    shards, vocabulary = finished_shards(run), run.vocabulary()
    found = find_documents(run, shards, doc_ids)
    if missing := [doc_id for doc_id in doc_ids if doc_id not in found]:
        passages = find_documents(run, shards, [passage_id(doc_id, 0) for doc_id in missing])
        raise _missing(f"The run {run.path}", missing, passages)
    documents = []
    for doc_id in doc_ids:
        part = read_document(run, found[doc_id])
        token_ids, weights = part.vectors.row(0)
        terms = {str(vocabulary[token_id]): float(weight) for token_id, weight in zip(token_ids, weights, strict=True)}
        documents.append(reader.read(doc_id, terms, parse_fields(part.fields[0], doc_id)))
    return documents


def terms_in_index(
    client: Client,
    there: Index,
    engine: Engine,
    doc_ids: Sequence[str],
    vocabulary: Sequence[str | None],
    reader: TermReader,
) -> list[DocumentTerms]:
    """Return the terms of documents of an index, with the weights that it stores.

    No request lists the tokens of a document: the complete vocabulary is requested, in about 30 searches. Raise
    `DocumentNotFoundError` if the index lacks a document, `ClusterError` if the server cannot return weights.
    """
    from sparse_ingest.cluster.reading import as_weight, read_fields, reader_of

    check_ids(doc_ids)
    passages = [passage_id(doc_id, 0) for doc_id in doc_ids]
    fields = read_fields(client, there.name, engine.field, [*doc_ids, *passages])
    if missing := [doc_id for doc_id in doc_ids if doc_id not in fields]:
        raise _missing(f"The index {there.name!r}", missing, fields)
    weights, ceiling = reader_of(client, there, engine.field)
    keys = {token: token for token in vocabulary if token is not None} if engine.keys is None else engine.keys
    tokens = {key: token for token, key in keys.items() if key is not None}
    stored = weights.weights({doc_id: list(tokens) for doc_id in doc_ids})
    documents = []
    for doc_id in doc_ids:
        held = stored.get(doc_id, {})
        values = {token: as_weight(held[key], ceiling) for key, token in tokens.items() if key in held}
        documents.append(reader.read(doc_id, {token: one for token, one in values.items() if one}, fields[doc_id]))
    return documents


def terms_of_text(
    text: str, pipeline: Pipeline, *, as_query: bool = False, query: QueryWeights | None = None
) -> DocumentTerms:
    """Encode a text with the model of a pipeline, as a document or as a query, and return its terms.

    Raises:
        UsageError: the pipeline names no model, or there is no text.
        CheckpointError: the model cannot be found or built.
    """
    from sparse_ingest.models.encoder import SparseEncoder
    from sparse_ingest.searching.pipelines import document_vocabulary
    from sparse_ingest.searching.query import query_weights

    weights = query_weights(text, pipeline) if as_query else SparseEncoder(pipeline).encode_document(text)
    model = pipeline.model
    if as_query and model.query:
        model = replace(model, document=None)
    reader = TermReader(document_vocabulary(model), model, query)
    return reader.read(None, weights, {"text": text})


def _missing(where: str, missing: Sequence[str], passages: Mapping[str, object]) -> DocumentNotFoundError:
    """Return the error for documents that do not exist; `passages` are first passages that exist."""
    named = ", ".join(map(repr, missing[:5]))
    advice = "Check the ids: they are compared exactly."
    if first := next((passage_id(doc_id, 0) for doc_id in missing if passage_id(doc_id, 0) in passages), None):
        advice = f"It has passages: name one, such as {first!r}."
    return DocumentNotFoundError(f"{where} has no document {named}. {advice}")


def readable_by(vocabulary: Iterable[str | None]) -> Callable[[str], str]:
    """Return a function from a token of this vocabulary to its readable text.

    The marker of most tokens gives the kind of vocabulary. Special tokens such as [CLS] and </s> stay. A vocabulary of
    numbers is that of an autoencoder.
    """
    vocabulary = list(vocabulary)
    if vocabulary == list(map(str, range(len(vocabulary)))):
        return lambda token: f"feature {token}"
    tokens = [token for token in vocabulary if token is not None]
    counts = {marker: sum(token.startswith(marker) for token in tokens) for marker in _MARKERS}
    marker = max(counts, key=counts.__getitem__)
    if not counts[marker]:
        return lambda token: token

    def readable(token: str) -> str:
        if re.fullmatch(r"<.+>|\[.+\]", token):
            return token
        rest = token.removeprefix(marker)
        if not rest:
            return token
        continues = token.startswith(marker) == (marker == "##")
        if marker == "Ġ" and all(sign in _BYTES for sign in rest):
            rest = bytes(map(_BYTES.__getitem__, rest)).decode(errors="backslashreplace")
        return f"…{rest}" if continues else rest

    return readable
