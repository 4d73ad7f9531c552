"""Refuse a filter or a collapse by a field that the index does not map: OpenSearch would find nothing.

Unknown clauses and patterns of names are not checked.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from sparse_ingest.cluster.indexes import with_objects
from sparse_ingest.cluster.mappings import has_values, leaves
from sparse_ingest.cluster.stamps import META_KEY
from sparse_ingest.errors import UsageError, listed
from sparse_ingest.records import METADATA, is_within

if TYPE_CHECKING:
    from sparse_ingest.cluster.client import Client

# Clauses whose keys are fields, apart from _NO_FIELDS.
_BY_FIELD = frozenset(
    "term terms range prefix wildcard regexp fuzzy match match_phrase match_phrase_prefix match_bool_prefix terms_set "
    "intervals span_term neural_sparse knn".split()
)
_NO_FIELDS = ("boost", "_name", "value_type")
# Clauses with a key that names a field; exists and nested may name an object.
_BY_NAME = {
    "exists": "field", "nested": "path", "distance_feature": "field", "rank_feature": "field",
    "sparse_vector": "field", "knn": "field",  # of Elasticsearch; a knn of OpenSearch is in _BY_FIELD
}  # fmt: skip
_WITH_FIELDS = ("multi_match", "query_string", "simple_query_string", "combined_fields", "more_like_this")
# Clauses with queries, and their keys that are queries.
_COMPOUND = frozenset(
    "bool dis_max constant_score nested boosting function_score script_score hybrid has_child has_parent".split()
)
_QUERIES = ("must", "should", "filter", "must_not", "query", "queries", "positive", "negative")
_BOUNDS = ("gt", "gte", "lt", "lte")
# Types with fields that the mapping does not list.
_WITH_OWN_NAMES = ("flat_object", "flattened", "rank_features", "sparse_vector", "join", "search_as_you_type")
_ALWAYS = METADATA | {"_doc_count", "_primary_term", "_size", "_tier", "_type"}
_SHOWN = 30  # fields that a message lists
logger = logging.getLogger(__name__)


class _Use(NamedTuple):
    """A field that a search names, and the path of the nested clause around it.

    `any_kind`: it may be an object; `between`: the search has a numeric range of it.
    """

    name: str
    place: str = "the filter"
    any_kind: bool = False
    between: bool = False
    nested: str = ""


def refuse_unmapped(
    client: Client, path: str, known: Mapping[str, Any] | None, filter: Mapping[str, Any] | None, collapse: str | None
) -> None:
    """Raise `UsageError` if a search of the index at the URL path names a field that the index does not map.

    `known` is the mapping, if it was read. If it lacks a field, it is read again: the field may have been added.
    """
    uses = [*_fields_of(filter), *([_Use(collapse, "collapse")] if collapse else [])]
    mappings = [known or {}]
    missing = [one for one in uses if not _maps(mappings[0], one)]
    if missing or any(_nested_around(mappings[0], one) for one in uses):
        # A role that may only search cannot read the mapping (403). The search reports a missing index (404).
        found = client.find(f"{path}/_mapping", absent=(403, 404)) or {}
        mappings = [with_objects(entry.get("mappings", {})) for entry in found.values()]
        missing = [one for one in uses if mappings and not any(_maps(mapping, one) for mapping in mappings)]
    if not missing:
        _refuse_unreached(mappings or [known or {}], uses)
        _warn_of_keywords(mappings[0] if mappings else {}, uses)
        return
    name, place = missing[0][:2]
    stamps = [mapping.get("_meta", {}).get(META_KEY, {}).get("fields") or {} for mapping in mappings]
    advice = "Correct the name, or encode with it in --keep and load that run."
    if any(kind is None and is_within(name, field) for stamp in stamps for field, kind in stamp.items()):
        advice = "Documents have it, but no type fits all their values; `load` printed the reason."
    kinds = ((field, entry.get("type", "object")) for mapping in mappings for field, entry in leaves(mapping))
    there = sorted({f"{field} ({kind})" for field, kind in kinds if kind not in ("rank_features", "sparse_vector")})
    raise UsageError(
        f"Index {path[1:]!r} does not map the field {name!r} of {place}, so no document would match it. Mapped "
        f"fields: {listed(there, _SHOWN)}. {advice}"
    )


def _fields_of(query: Any, nested: str = "") -> Iterator[_Use]:
    """Yield the fields that the clauses of a query name, without patterns."""
    for clause, content in query.items() if isinstance(query, Mapping) else ():
        if not isinstance(content, Mapping):
            continue
        names: list[Any] = []
        if clause in _BY_NAME and isinstance(name := content.get(_BY_NAME[clause]), str):
            names = [name]
        elif clause in _BY_FIELD:
            names = [name for name in content if name not in _NO_FIELDS]
        elif clause in _WITH_FIELDS and isinstance(content.get("fields"), list):
            names = [str(name).partition("^")[0] for name in content["fields"]]
        for name in names:
            if isinstance(name, str) and "*" not in name:
                bounds = content.get(name) if clause == "range" else None
                between = isinstance(bounds, Mapping) and any(type(bounds.get(key)) in (int, float) for key in _BOUNDS)
                # A clause with several fields may find nothing in one of them.
                around = name if clause == "nested" or clause in _WITH_FIELDS else nested
                yield _Use(name, any_kind=clause in ("exists", "nested"), between=between, nested=around)
        # The filter of a knn: of Elasticsearch beside the field, of OpenSearch within it.
        parts = [content, *content.values()] if clause == "knn" else [content] if clause in _COMPOUND else []
        within = str(content.get("path")) if clause == "nested" else nested
        for inner in (one.get(key) for one in parts if isinstance(one, Mapping) for key in _QUERIES):
            for each in inner if isinstance(inner, list) else [inner]:
                yield from _fields_of(each, within)


def _maps(mapping: Mapping[str, Any], use: _Use) -> bool:
    """Return whether a mapping has a field, a multi-field or, with `any_kind`, an object."""
    computed = (name for key in ("derived", "runtime") for name in mapping.get(key) or ())
    if use.name in _ALWAYS or any(is_within(use.name, name) for name in computed):
        return True
    entry = _entry(mapping, use.name)
    return entry is not None and (use.any_kind or has_values(entry) or "properties" not in entry)


def _entry(mapping: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    """Return the entry of a field, or of the field around it if that maps no inner fields."""
    entry: Any = mapping
    for part in name.split("."):
        if entry.get("type") in _WITH_OWN_NAMES:
            break
        entry = (entry.get("properties") or {}).get(part) or (entry.get("fields") or {}).get(part)
        if entry is None:
            return None
    return dict(entry)


def _refuse_unreached(mappings: Sequence[Mapping[str, Any]], uses: Sequence[_Use]) -> None:
    """Raise `UsageError` for a nested object, or a field of it, outside a nested clause: no document has it there."""
    for use in uses:
        around = [_nested_around(mapping, use) for mapping in mappings]
        if all(around):
            advice = f'only a nested clause finds it. Write {{"nested": {{"path": "{around[0]}", "query": ...}}}}.'
            if use.place == "collapse":
                advice = "hits cannot be collapsed by it. Name a field outside of nested objects."
            raise UsageError(
                f"The field {use.name!r} of {use.place} is in the nested object {around[0]!r}, so {advice}"
            )


def _nested_around(mapping: Mapping[str, Any], use: _Use) -> str | None:
    """Return the path of the innermost nested object around a field that only a clause for this object finds."""
    entry, path, around = mapping, "", None
    for part in use.name.split("."):
        entry, path = (entry.get("properties") or {}).get(part) or {}, f"{path}.{part}".lstrip(".")
        if entry.get("type") == "nested":
            copied = "true" in (str(entry.get(f"include_in_{where}")).lower() for where in ("parent", "root"))
            around = None if copied or is_within(use.nested, path) else path
    return around


def _warn_of_keywords(mapping: Mapping[str, Any], uses: Sequence[_Use]) -> None:
    for name in dict.fromkeys(one.name for one in uses if one.between):
        if (_entry(mapping, name) or {}).get("type") == "keyword":
            logger.warning(
                "%s is mapped as keyword: the range compares its values as text, where 100 comes before 30. Load with "
                "--map %s=double into a new index to compare numbers.", name, name,
            )  # fmt: skip
