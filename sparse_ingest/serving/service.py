"""The operations of the service: checked values in, JSON out. They block; web.py runs them in threads."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import lru_cache
from importlib.metadata import version
from importlib.util import find_spec
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from sparse_ingest.checkpoints.layouts import read_checkpoint
from sparse_ingest.errors import ClusterError, SparseIngestError
from sparse_ingest.models.encoder import SparseEncoder
from sparse_ingest.pipeline import EncodeSettings, ModelSettings, Pipeline
from sparse_ingest.queries.weight_table import QueryWeights, prune_query
from sparse_ingest.searching.document_terms import DocumentTerms
from sparse_ingest.searching.hits import Hit
from sparse_ingest.serving.inputs import RefusedError, ask_of, required
from sparse_ingest.serving.metrics import Metrics
from sparse_ingest.serving.targets import Ask, Target

if TYPE_CHECKING:
    from sparse_ingest.serving.judgments import Judgments

Values = Mapping[str, Any]
T = TypeVar("T")
_DOCUMENTS_AT_ONCE = 8
EVALUATED = "evaluated"  # the key of the evaluation that a request waited for; no request can set it


class Service:
    """What is served: targets, and judgments if there are any."""

    def __init__(self, targets: Sequence[Target], judgments: Judgments | None = None) -> None:
        self.targets, self.judgments = targets, judgments
        self.metrics = Metrics(self._batches)
        self._encoders: dict[tuple[ModelSettings, EncodeSettings], SparseEncoder] = {}
        self._lock = Lock()

    def warm(self) -> None:
        """Build the query models, and encode a query with each."""
        for target in self.targets:
            target.warm()

    def target_of(self, values: Values) -> Target:
        """Return the requested target. Raise `RefusedError` for an unknown one."""
        return self.targets[self._place_of(values)]

    def _place_of(self, values: Values) -> int:
        wanted = values.get("target") or "0"
        for place, target in enumerate(self.targets):
            if wanted in (target.name, str(place)):
                return place
        known = ", ".join(f"{place} ({target.name})" for place, target in enumerate(self.targets))
        raise RefusedError(400, f"There is no target {wanted!r}; known: {known}.")

    def weights_of(self, target: Target, text: str) -> QueryWeights:
        """Return the weights of a query. Raise `UsageError` if there is no text."""
        model = target.model
        with self.metrics.encode_seconds.time():
            return model.encode(text)

    def _weights_for(self, target: Target, ask: Ask) -> QueryWeights:
        """Return the weights that a search needs: BM25 needs none."""
        return {} if target.is_of_words(ask) and ask.text.strip() else self.weights_of(target, ask.text)

    def search(self, values: Values) -> dict[str, Any]:
        """Return what `search --json` prints."""
        target, ask = self.target_of(values), ask_of(values)
        weights, hits = self._unless_replaced(target, lambda: self._found(target, ask))
        if not ask.terms:
            hits = [hit._replace(terms=[]) for hit in hits]
        why = [] if hits else map(self.without_addresses, target.why_empty(ask))
        return {"query": weights, "hits": [hit.to_dict(words=target.has_words) for hit in hits], "why": list(why)}

    def without_addresses(self, message: str) -> str:
        """Return a message for clients of the service, without the addresses of clusters."""
        for address in filter(None, {target.address for target in self.targets}):
            message = message.replace(address, "the cluster")
        return re.sub("^the cluster", "The cluster", message)

    def _found(self, target: Target, ask: Ask) -> tuple[QueryWeights, list[Hit]]:
        weights = self._weights_for(target, ask)
        with self.metrics.search_seconds.time():
            return weights, target.search(ask, weights)

    def _unless_replaced(self, target: Target, piece: Callable[[], T]) -> T:
        """Return the result of a piece. Retry it once if the cluster refuses it because the index was replaced."""
        before = target.opened(None)
        try:
            return piece()
        except ClusterError:
            if target.opened(None, look=True) is before:
                raise
        return piece()

    def described(self, values: Values) -> dict[str, Any]:
        """Return the targets, with their engines and fields."""
        shown = [
            {
                "name": target.name,
                "kind": target.kind,
                "documents": target.documents(),
                "model": target.model.pipeline.model.document or target.model.pipeline.model.query,
                "product": target.product,
                "engine": target.engine,
                "engines": list(target.engines),
                "fields": target.fields(),
            }
            for target in self.targets
        ]
        queries = len(self.judgments.texts) if self.judgments else None
        highlights = all(map(self._encodes_documents, self.targets))
        return {"targets": shown, "queries": queries, "highlights": highlights, "version": version("sparse-ingest")}

    def _encodes_documents(self, target: Target) -> bool:
        with contextlib.suppress(SparseIngestError):
            return target.has_words and _encodes_documents(target.model.pipeline.model)
        return False

    def document(self, values: Values) -> dict[str, Any]:
        """Return what `show --json` prints for a document."""
        target, doc_id, text = self.target_of(values), required(values, "id"), values.get("q")

        def shown() -> list[DocumentTerms]:
            weights = self.weights_of(target, text) if text else None
            return target.opened(None).show(doc_id, query=weights)

        documents = self._unless_replaced(target, shown)
        return {"query": text or None, "documents": [one.to_dict() for one in documents]}

    def explain(self, values: Values) -> dict[str, Any]:
        """Return what `search --doc ID --json` prints."""
        target, ask, doc_id = self.target_of(values), ask_of(values), required(values, "id")

        def explained() -> dict[str, Any]:
            weights = self.weights_of(target, ask.text)
            return {"query": weights, "document": target.explain(ask, weights, doc_id).to_dict()}

        return self._unless_replaced(target, explained)

    def body(self, values: Values) -> dict[str, Any]:
        """Return what `query` prints: a request body for `_search`."""
        target, ask = self.target_of(values), ask_of(values)
        return target.body(ask, self._weights_for(target, ask))

    def encode(self, values: Values) -> dict[str, Any]:
        """Return the weights of texts, as documents or as queries, heaviest first."""
        target, texts = self.target_of(values), required(values, "texts")
        model = target.model
        if values["as"] == "query":
            pruned = (prune_query(weights, model.pipeline.query) for weights in model.encoder.encode(texts))
            return {"vectors": list(pruned)}
        encoder = self.document_encoder(target)
        # Queries of a masked LM are computed between these batches.
        batches = (texts[place : place + _DOCUMENTS_AT_ONCE] for place in range(0, len(texts), _DOCUMENTS_AT_ONCE))
        vectors = (pairs for batch in batches for pairs in encoder.encode_document(batch).decode())
        return {"vectors": list(map(dict, vectors))}

    def document_encoder(self, target: Target) -> SparseEncoder:
        """Return the encoder of a target's documents, which is built when it is first used.

        Texts above the model's limit are encoded in windows if those of a run were. An index does not store that.
        """
        pipeline = target.model.pipeline
        if not self._encodes_documents(target):
            raise RefusedError(
                501,
                f"{target.name} names no model that encodes documents, or torch and transformers are missing: "
                'pip install "sparse-ingest[encode]".',
            )
        overflow: Literal["windows", "truncate"] = "windows" if target.has_windows else "truncate"
        with self._lock:
            key = pipeline.model, replace(pipeline.encode, overflow=overflow)
            served = [one.known_model.pipeline.model for one in self.targets]  # an alias may have moved
            self._encoders = {known: one for known, one in self._encoders.items() if known[0] in served}
            return self._encoders.setdefault(key, SparseEncoder(Pipeline(*key)))

    def evaluation(self) -> tuple[Future[list[dict[str, float]]], Callable[[], str]]:
        """Return the evaluation of the judged queries, which may still run, and its progress."""
        judgments = self._judgments()
        return judgments.values(), judgments.progress

    def judged(self, values: Values) -> dict[str, Any]:
        """Return the relevant documents of a query, and its nDCG@10 in each target."""
        return self._judgments().of(required(values, "q"), values[EVALUATED])

    def queries(self, values: Values) -> dict[str, Any]:
        """Return judged queries with their nDCG@10 in each target."""
        judgments, place = self._judgments(), self._place_of(values)
        found = judgments.queries(values[EVALUATED], values["order"], values["limit"], place)
        return {"queries": found}

    def _judgments(self) -> Judgments:
        if self.judgments is None:
            raise RefusedError(404, "There are no relevance judgments. Start the service with --queries and --qrels.")
        return self.judgments

    def _batches(self) -> Counter[int]:
        encoders = {id(target.known_model.encoder): target.known_model.encoder for target in self.targets}
        return sum((Counter(encoder.batches) for encoder in encoders.values()), Counter[int]())

    def close(self) -> None:
        """End the requests to clusters that are still running."""
        for target in self.targets:
            target.close()


@lru_cache
def _encodes_documents(model: ModelSettings) -> bool:
    """Return whether a model can encode documents here. Raise `SparseIngestError` if it cannot be read."""
    if not (model.document and all(find_spec(name) for name in ("torch", "transformers"))):
        return False
    return read_checkpoint(model.document, model.revision, code=model.trust_remote_code).encodes_documents
