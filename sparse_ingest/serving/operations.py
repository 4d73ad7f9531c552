"""The routes that answer with JSON: path, methods and keys of each, and the function that answers it."""

from __future__ import annotations

from typing import Any

from sparse_ingest.serving.highlights import highlights, query_terms
from sparse_ingest.serving.inputs import ASK_KEYS, MAX_TEXT_BYTES
from sparse_ingest.serving.openapi import Operation, openapi
from sparse_ingest.serving.service import Service, Values


def _openapi(service: Service, _: Values) -> dict[str, Any]:
    return openapi(service, OPERATIONS)


OPERATIONS: tuple[Operation, ...] = (
    Operation(
        "/search", ("GET", "POST"), Service.search, "Search", "Search, with the terms of each score",
        ("target", *ASK_KEYS, "terms"), ("q",),
    ),
    Operation(
        "/explain", ("GET",), Service.explain, "Explanation", "The rank of one document, and why it is not a hit",
        ("target", "id", *ASK_KEYS), ("q", "id"),
    ),
    Operation(
        "/document", ("GET",), Service.document, "Documents",
        "A document with its terms, and what each contributes to the score for a query", ("target", "id", "q"), ("id",),
    ),
    Operation(
        "/query", ("POST",), Service.body, "Body", "The body of a _search request, which any client can send",
        ("target", *ASK_KEYS), ("q",),
    ),
    Operation(
        "/encode", ("POST",), Service.encode, "Vectors", "The weights of texts, as documents or as queries",
        ("target", "texts", "as"), ("texts",), MAX_TEXT_BYTES, encodes_documents=True,
    ),
    Operation("/targets", ("GET",), Service.described, "Targets", "What is served, with engines and fields"),
    Operation(
        "/queries", ("GET",), Service.queries, "Queries", "Judged queries, with nDCG@10 in each target",
        ("target", "order", "limit"), judged=True,
    ),
    Operation(
        "/judgments", ("GET",), Service.judged, "Judgments", "The relevant documents of a query, and its nDCG@10",
        ("q",), ("q",), judged=True,
    ),
    Operation(
        "/openapi.json", ("GET",), _openapi, "Body", "This description",
    ),
    Operation(
        "/expansion", ("GET",), query_terms, "Expansion",
        "The terms of a query, and which of them it does not contain", ("target", "q"), ("q",),
    ),
    Operation(
        "/highlights", ("POST",), highlights, "Highlights",
        "The characters of a document that gave terms their weights", ("target", "q", "tokens", "title", "text"),
        ("text",), MAX_TEXT_BYTES, ("q",), encodes_documents=True,
    ),
)  # fmt: skip
