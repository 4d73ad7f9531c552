"""Highlights: the characters of a text that gave the terms of a query their weights, and the terms of a query."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

from sparse_ingest.pipeline import ModelSettings
from sparse_ingest.searching.document_terms import TermReader
from sparse_ingest.searching.pipelines import document_vocabulary
from sparse_ingest.serving.inputs import required
from sparse_ingest.serving.service import Service

MODELS = 4  # kept in memory


def highlights(service: Service, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the spans of the matched terms in a title and a text, with the weights that the document encoder computes.

    The maximum of a term may be at a special token, which has no characters: then `field` is null.
    """
    target = service.target_of(values)
    title, text = values.get("title") or "", required(values, "text")
    tokens = values.get("tokens") or list(service.weights_of(target, required(values, "q")))
    before = len(title) + 1 if title else 0
    spans = []
    encoder = service.document_encoder(target)
    for origin in encoder.origins(f"{title} {text}" if title else text, tokens):
        span: dict[str, Any] = {"token": origin.token, "field": None, "start": None, "end": None}
        if origin.start is not None and origin.end is not None:
            moved = before if origin.start >= before else 0
            field = "text" if origin.start >= before else "title"
            span |= {"field": field, "start": origin.start - moved, "end": origin.end - moved}
        spans.append(span | {"weight": origin.weight})
    return {"spans": spans}


def query_terms(service: Service, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the terms of a query as `show --text --as query` prints them: readable, expansions marked."""
    target, text = service.target_of(values), required(values, "q")
    found = _reader(target.model.pipeline.model).read(None, service.weights_of(target, text), {"text": text})
    return {"query": text, "terms": [term._asdict() for term in found.terms]}


@lru_cache(MODELS)
def _reader(model: ModelSettings) -> TermReader:
    if model.query:
        model = replace(model, document=None)
    return TermReader(document_vocabulary(model), model)
