"""/openapi.json: the description of every route, with an example that this service can answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import version
from typing import Any, NamedTuple

from sparse_ingest.errors import ClusterError
from sparse_ingest.serving.inputs import KEYS, MAX_BYTES
from sparse_ingest.serving.service import Service, Values

_NUMBER, _STRING, _OBJECT = {"type": "number"}, {"type": "string"}, {"type": "object"}
_OPTIONAL = {"type": ["number", "null"]}
_WEIGHTS = {"type": "object", "additionalProperties": _NUMBER, "description": "Weight by token, heaviest first"}


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


def _record(optional: dict[str, Any] | None = None, **fields: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "required": list(fields), "properties": {**fields, **(optional or {})}}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


SCHEMAS: dict[str, dict[str, Any]] = {
    "Error": _record(error=_record(type=_STRING, message=_STRING)),
    "Term": _record(token=_STRING, query_weight=_NUMBER, document_weight=_NUMBER, contribution=_NUMBER),
    "DocumentTerm": _record(
        token=_STRING, text=_STRING, weight=_NUMBER, expansion={"type": ["boolean", "null"]}, query_weight=_OPTIONAL,
        contribution=_OPTIONAL,
    ),
    "Hit": _record(
        {"sub_scores": {"type": "object", "additionalProperties": _NUMBER}},
        rank={"type": "integer"}, score=_NUMBER, id=_STRING, fields=_OBJECT, terms=_list(_ref("Term")), snippet=_STRING,
    ),
    "Search": _record(query=_WEIGHTS, hits=_list(_ref("Hit")), why=_list(_STRING)),
    "Explanation": _record(
        query=_WEIGHTS,
        document=_record(
            id=_STRING, reason={"type": ["string", "null"]}, k={"type": "integer"}, rank=_OPTIONAL, score=_OPTIONAL,
            last_score=_OPTIONAL, matching=_OPTIONAL, equal=_OPTIONAL, fields=_OBJECT, terms=_list(_ref("Term")),
            lacking=_list(_STRING),
        ),
    ),
    "Documents": _record(
        query={"type": ["string", "null"]},
        documents=_list(
            _record(
                id=_STRING, fields=_OBJECT, score=_OPTIONAL, count={"type": "integer"},
                terms=_list(_ref("DocumentTerm")),
            )
        ),
    ),
    "Expansion": _record(query=_STRING, terms=_list(_ref("DocumentTerm"))),
    "Highlights": _record(
        spans=_list(
            _record(
                token=_STRING, field={"enum": ["text", "title", None]}, start=_OPTIONAL, end=_OPTIONAL, weight=_NUMBER,
            )
        )
    ),
    "Body": _OBJECT,
    "Vectors": _record(vectors=_list(_WEIGHTS)),
    "Targets": _record(
        targets=_list(
            _record(
                name=_STRING, kind={"enum": ["index", "run"]}, documents={"type": "integer"}, model=_STRING,
                product={"type": ["string", "null"]}, engine=_STRING, engines=_list(_STRING),
                fields={"type": "object", "additionalProperties": _STRING},
            )
        ),
        queries=_OPTIONAL, highlights={"type": "boolean"}, version=_STRING,
    ),
    "Queries": _record(queries=_list(_record(query_id=_STRING, text=_STRING, **{"ndcg@10": _list(_OPTIONAL)}))),
    "Judgments": _record(
        query_id={"type": ["string", "null"]},
        relevant={"type": "object", "additionalProperties": {"type": "integer"}},
        targets=_list(_record(name=_STRING, **{"ndcg@10": _OPTIONAL})),
    ),
    "Health": _record(status={"const": "ok"}),
}  # fmt: skip
_STATUSES = {
    "400": "The request is wrong", "401": "The token is missing or wrong", "403": "The Host header is another one",
    "404": "There is no such path, document or judgment", "413": "The body is too long", "414": "The URL is too long",
    "500": "An internal error", "501": "An optional part is not installed", "502": "The cluster refuses the request",
    "503": "Too busy or still evaluating, or the cluster cannot be reached", "504": "The time limit has passed",
}  # fmt: skip


class Operation(NamedTuple):
    """A route that answers with JSON.

    Attributes:
        path: Its path.
        methods: GET with keys in the query string, POST with a JSON object, or both.
        answer: Returns the JSON. It may block.
        schema: The name of the schema of its answer in openapi.py.
        summary: What it answers.
        keys: The keys that a request may have, see inputs.KEYS.
        needs: Those that it must have.
        max_bytes: The largest body.
        also: Other keys that its example has.
        encodes_documents: Whether it computes with a document model, unless the key `as` is "query".
        judged: Whether it needs relevance judgments, which are evaluated before `answer` is called.
    """

    path: str
    methods: tuple[str, ...]
    answer: Callable[[Service, Values], Any]
    schema: str
    summary: str
    keys: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    max_bytes: int = MAX_BYTES
    also: tuple[str, ...] = ()
    encodes_documents: bool = False
    judged: bool = False


def openapi(service: Service, operations: Sequence[Operation]) -> dict[str, Any]:
    """Return the description in the form of OpenAPI 3.1."""
    served = [one for one in operations if service.judgments or not one.judged]
    examples = _examples(service)
    paths = {one.path: {method.lower(): _described(one, method, examples) for method in one.methods} for one in served}
    plain = (
        ("/", "The search page", "text/html", _STRING),
        ("/metrics", "Metrics for Prometheus", "text/plain", _STRING),
        ("/healthz", "Answers when the service is ready", "application/json", _ref("Health")),
    )
    for path, summary, media, schema in plain:
        answer = {"200": {"description": summary, "content": {media: {"schema": schema}}}}
        paths[path] = {"get": {"summary": summary, "responses": answer}}
        if path != "/metrics":
            paths[path]["get"]["security"] = []
    return {
        "openapi": "3.1.0",
        "info": {"title": "sparse-ingest", "version": version("sparse-ingest")},
        "security": [{}, {"token": []}],
        "paths": paths,
        "components": {"schemas": SCHEMAS, "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}},
    }


def _examples(service: Service) -> dict[str, Any]:
    """Return a value for each required key."""
    judged = next(iter(service.judgments.texts.values())) if service.judgments else None
    doc_id = None
    with suppress(ClusterError):  # the description works without a cluster
        doc_id = service.targets[0].any_id()
    return {"q": judged or "how does it work", "id": doc_id or "1", "texts": ["a text"], "text": "a text"}


def _described(operation: Operation, method: str, examples: dict[str, Any]) -> dict[str, Any]:
    answer = {"description": operation.summary, "content": {"application/json": {"schema": _ref(operation.schema)}}}
    errors = {
        status: {"description": words, "content": {"application/json": {"schema": _ref("Error")}}}
        for status, words in _STATUSES.items()
    }
    found: dict[str, Any] = {"summary": operation.summary, "responses": {"200": answer, **errors}}
    schemas = {name: {**KEYS[name].schema, "description": KEYS[name].description} for name in operation.keys}
    if method == "GET":
        found["parameters"] = [_parameter(name, schemas[name], operation.needs, examples) for name in schemas]
        return found
    body = {"type": "object", "properties": schemas, "required": list(operation.needs), "additionalProperties": False}
    example = {name: examples[name] for name in (*operation.needs, *operation.also)}
    found["requestBody"] = {"required": True, "content": {"application/json": {"schema": body, "example": example}}}
    return found


def _parameter(name: str, schema: dict[str, Any], needs: Sequence[str], examples: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"name": name, "in": "query", "required": name in needs}
    if schema.get("type") == "object":
        found["content"] = {"application/json": {"schema": schema}}
    else:
        found["schema"] = schema
    if schema.get("type") == "array":
        found |= {"style": "form", "explode": False}
    if name in needs:
        found["example"] = examples[name]
    return found
