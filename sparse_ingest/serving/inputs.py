"""The input of a request: the keys of its address or of its JSON body, checked, with one message for each mistake."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

from sparse_ingest.errors import SparseIngestError, first_line, shown
from sparse_ingest.pipeline import options_from
from sparse_ingest.searching.options import SearchOptions
from sparse_ingest.serving.targets import Ask
from sparse_ingest.storage.foreign_json import parse_json

MAX_BYTES = 16 << 10  # of an address, and of a body with a query
MAX_TEXT_BYTES = 256 << 10  # of a body with a document
MAX_K = 1000
_MAX_KEYS = 64


class RefusedError(SparseIngestError):
    """A request that is refused with this HTTP status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Key(NamedTuple):
    """A key of a request: its JSON schema, and what it means."""

    schema: dict[str, Any]
    description: str


_TEXT = {"type": "string", "minLength": 1}
KEYS: dict[str, Key] = {
    "q": Key(_TEXT, "The query"),
    "id": Key(_TEXT, "The id of a document"),
    "target": Key({"type": "string"}, "Which target to search: its number or name in /targets, by default the first"),
    "k": Key({"type": "integer", "minimum": 1, "maximum": MAX_K, "default": 10}, "Number of documents to find"),
    "filter": Key({"type": "object"}, "A query of the cluster that hits must match (an index)"),
    "engine": Key({"type": "string"}, "One of the target's engines in /targets"),
    "collapse": Key(_TEXT, "Return only the best document for each value of this field"),
    "hybrid": Key({"type": "boolean"}, "Combine with BM25 on title and text (an index)"),
    "hybrid_weights": Key(
        {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2},
        "Weights of BM25 and of learned-sparse search",
    ),
    "hybrid_normalization": Key({"type": "string"}, "How to normalize both scores"),
    "hybrid_combination": Key({"type": "string"}, "How to combine both scores"),
    "allow_partial": Key({"type": "boolean"}, "Accept partial results of failed shards (an index)"),
    "stored": Key({"type": "boolean"}, "Search with weights of 9 bits, as an index stores them (a run)"),
    "terms": Key(
        {"type": "boolean", "default": True}, "Whether hits have the terms of their scores; false is faster (an index)"
    ),
    "text": Key(_TEXT, "The text of a document"),
    "title": Key({"type": "string"}, "The title of the document, which was encoded before the text"),
    "tokens": Key({"type": "array", "items": {"type": "string"}}, "The terms to find, by default those of the query"),
    "texts": Key({"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 64}, "Texts to encode"),
    "as": Key({"enum": ["document", "query"], "default": "document"}, "Encode as documents or as queries"),
    "order": Key({"enum": ["worst", "file"], "default": "file"}, "Lowest nDCG@10 first, or as in the file"),
    "limit": Key({"type": "integer", "minimum": 1, "maximum": 1000, "default": 50}, "Number of queries"),
}
OPTION_KEYS = tuple(name for name in KEYS if name in {entry.name for entry in fields(SearchOptions)})
ASK_KEYS = ("q", "engine", *OPTION_KEYS)
_WORDS: dict[str, tuple[str, Callable[[object], bool]]] = {
    "string": ("a string", lambda value: isinstance(value, str)),
    "integer": ("an integer", lambda value: type(value) is int),
    "number": ("a number", lambda value: type(value) in (int, float)),
    "boolean": ("true or false", lambda value: isinstance(value, bool)),
    "object": ("an object", lambda value: isinstance(value, dict)),
    "array": ("a list", lambda value: isinstance(value, list)),
}


def from_address(query: bytes, keys: tuple[str, ...]) -> dict[str, Any]:
    """Return the values in the query string of an address.

    Numbers, booleans and lists are written as 10, true and 0.3,0.7, objects as JSON.

    Raises:
        RefusedError: a key is unknown or repeated, or has a value of another type.
    """
    try:
        pairs = parse_qsl(query.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=_MAX_KEYS)
    except ValueError as error:
        raise RefusedError(400, f"The URL cannot be read: {first_line(error)}. Encode it in UTF-8.") from None
    given = dict(pairs)
    if len(given) < len(pairs):
        names = [name for name, _ in pairs]
        raise RefusedError(400, f"The key {shown(max(names, key=names.count))} is repeated. Give it once.")
    _refuse_unknown(given, keys)
    return checked({name: _parsed(name, text) for name, text in given.items()}, keys)


def from_body(content: bytes, keys: tuple[str, ...]) -> dict[str, Any]:
    """Return the values of a JSON body. Raise `RefusedError` like `from_address`, or if it is not a JSON object."""
    try:
        given = parse_json(content)
    except ValueError as error:
        raise RefusedError(400, f"The body is not JSON: {first_line(error)}.") from None
    if not isinstance(given, dict):
        raise RefusedError(400, f"The body is {shown(given)}; expected a JSON object.")
    _refuse_unknown(given, keys)
    return checked({name: value for name, value in given.items() if value is not None}, keys)


def checked(given: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    """Return the values, with defaults for absent ones. Raise `RefusedError` for a value that its schema excludes."""
    defaults = {name: KEYS[name].schema["default"] for name in keys if "default" in KEYS[name].schema}
    for name, value in given.items():
        schema = KEYS[name].schema
        if "enum" in schema and value not in schema["enum"]:
            raise RefusedError(400, f"{name} is {shown(value)}; expected {' or '.join(schema['enum'])}.")
        words, fits = _WORDS[schema["type"]] if "type" in schema else ("", lambda _: True)
        if not fits(value):
            raise RefusedError(400, f"{name} is {shown(value)}; expected {words}.")
        low, high = schema.get("minimum"), schema.get("maximum")
        if low is not None and not low <= value <= high:
            raise RefusedError(400, f"{name} is {value}; expected a number from {low} to {high:,}.")
        if isinstance(value, list):
            _check_list(name, value, schema)
        _refuse_surrogates(name, value)
    return {**defaults, **given}


def required(values: Mapping[str, Any], name: str) -> Any:
    """Return the value of a key that must be given."""
    if values.get(name) in (None, ""):
        raise RefusedError(400, f"{name} is missing. Give {KEYS[name].description.lower()}.")
    return values[name]


def ask_of(values: Mapping[str, Any]) -> Ask:
    """Return the query of checked values. Raise `UsageError` for options that are invalid."""
    given = {name: values[name] for name in OPTION_KEYS if name in values}
    options = options_from(SearchOptions, None, given, "search")
    return Ask(required(values, "q"), values.get("engine") or None, options, values.get("terms", True))


def _refuse_unknown(given: Mapping[str, Any], keys: tuple[str, ...]) -> None:
    if unknown := [name for name in given if name not in keys]:
        known = ", ".join(keys) or "none"
        raise RefusedError(400, f"Unknown key {shown(unknown[0])}; known here: {known}.")


def _parsed(name: str, text: str) -> object:
    """Return the value of a text in an address; a text that does not fit stays a text, which is refused later."""
    kind = KEYS[name].schema.get("type")
    try:
        if kind == "integer":
            return int(text) if text.isascii() else text
        if kind == "array":
            return [float(part) for part in text.split(",")]
        return parse_json(text) if kind in ("object", "boolean") else text
    except ValueError:
        return text


def _check_list(name: str, values: list[Any], schema: Mapping[str, Any]) -> None:
    low, high = schema.get("minItems", 0), schema.get("maxItems", len(values))
    if not low <= len(values) <= high:
        count = f"{low} to {high}" if low < high else str(low)
        raise RefusedError(400, f"{name} has {len(values)} values; expected {count}.")
    words, fits = _WORDS[schema["items"]["type"]]
    for value in values:
        if not fits(value):
            raise RefusedError(400, f"{name} has {shown(value)}; expected {words}.")


def _refuse_surrogates(name: str, value: object) -> None:
    for text in value if isinstance(value, list) else [value]:
        if isinstance(text, str) and any("\ud800" <= sign <= "\udfff" for sign in text):
            raise RefusedError(400, f"{name} has a lone surrogate, which is no character. Remove it.")
