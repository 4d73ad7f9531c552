"""The operations of the service: checked values in, JSON out. They block; web.py runs them in threads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from sparse_ingest.searching.search import SearchableIndex
from sparse_ingest.serving.inputs import RefusedError, ask_of, required
from sparse_ingest.serving.targets import Target, weights_of

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Service:
    """What is served."""

    targets: Sequence[Target]

    def warm(self) -> None:
        """Build the query models, and encode a query with each."""
        for target in self.targets:
            weights_of(target, "warm")

    def target_of(self, values: Values) -> Target:
        """Return the requested target. Raise `RefusedError` for an unknown one."""
        wanted = values.get("target") or "0"
        for place, target in enumerate(self.targets):
            if wanted in (target.name, str(place)):
                return target
        known = ", ".join(f"{place} ({target.name})" for place, target in enumerate(self.targets))
        raise RefusedError(400, f"There is no target {wanted!r}; known: {known}.")

    def search(self, values: Values) -> dict[str, Any]:
        """Return what `search --json` prints."""
        target, ask = self.target_of(values), ask_of(values)
        weights = weights_of(target, ask.text)
        hits = target.search(ask, weights)
        why = [] if hits else target.opened(ask.engine).why_empty(ask.text, ask.options)
        return {"query": weights, "hits": [hit.to_dict() for hit in hits], "why": why}

    def targets_json(self, values: Values) -> dict[str, Any]:
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
        highlights = all(find_spec(name) for name in ("torch", "transformers"))
        return {"targets": shown, "queries": None, "highlights": highlights, "version": version("sparse-ingest")}

    def document(self, values: Values) -> dict[str, Any]:
        """Return what `show --json` prints for a document."""
        target, doc_id, text = self.target_of(values), required(values, "id"), values.get("q")
        weights = weights_of(target, text) if text else None
        documents = target.opened(None).show(doc_id, query=weights)
        return {"query": text or None, "documents": [one.to_dict() for one in documents]}

    def explain(self, values: Values) -> dict[str, Any]:
        """Return what `search --doc ID --json` prints."""
        target, ask, doc_id = self.target_of(values), ask_of(values), required(values, "id")
        weights = weights_of(target, ask.text)
        found = target.opened(ask.engine).explain(weights, doc_id, ask.options)
        return {"query": weights, "document": found.to_dict()}

    def close(self) -> None:
        """Close the connections to clusters."""
        for target in self.targets:
            if isinstance(opened := target.opened(None), SearchableIndex):
                opened.close()
