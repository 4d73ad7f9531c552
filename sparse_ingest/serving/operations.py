"""The routes of the service: the method, path and keys of each, and the function that answers it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from sparse_ingest.serving.highlights import highlights, query_terms
from sparse_ingest.serving.inputs import ASK_KEYS, MAX_BYTES, MAX_TEXT_BYTES
from sparse_ingest.serving.service import Service, Values


class Operation(NamedTuple):
    """A route that answers with JSON.

    `example` has values that every service of the kind of target can answer, for /openapi.json. `needs` are required
    keys.
    """

    path: str
    methods: tuple[str, ...]
    answer: Callable[[Service, Values], Any]
    summary: str
    keys: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    max_bytes: int = MAX_BYTES


OPERATIONS = (
    Operation(
        "/search", ("GET", "POST"), Service.search, "Search, with the terms of each score",
        ("target", *ASK_KEYS), ("q",),
    ),
    Operation(
        "/explain", ("GET",), Service.explain, "The rank of one document, and why it is not a hit",
        ("target", "id", *ASK_KEYS), ("q", "id"),
    ),
    Operation(
        "/document", ("GET",), Service.document, "A document with its terms, and what each contributes to a query",
        ("target", "id", "q"), ("id",),
    ),
    Operation(
        "/expansion", ("GET",), query_terms, "The terms of a query, and which of them it does not contain",
        ("target", "q"), ("q",),
    ),
    Operation(
        "/highlights", ("POST",), highlights, "The characters of a document that gave terms their weights",
        ("target", "q", "tokens", "title", "text"), ("text",), max_bytes=MAX_TEXT_BYTES,
    ),
    Operation("/targets", ("GET",), Service.targets_json, "What is served: indexes, run folders, engines, fields"),
)  # fmt: skip
