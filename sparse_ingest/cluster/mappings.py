"""The mapping of an index: built from the pipeline's JSON, and checked if the index exists.

In: `[index]` settings, a `Stamp`. Out: the body that creates an index, or the reason why an existing one does not fit;
and the writer of documents for its field. The keys of a sparse field are tokens in rank_features, numbers of
token_map.py in sparse_vector (SEISMIC, whose parameters seismic.py fits to a run).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from sparse_ingest.cluster.bulk_bodies import BodyWriter, Spelling, WriteOperation
from sparse_ingest.cluster.dialects import Dialect, FieldKind, kind_of
from sparse_ingest.cluster.field_types import MAX_KEYWORD
from sparse_ingest.cluster.indexes import Index
from sparse_ingest.cluster.seismic import ByteCodes, body_setting, parameters_of
from sparse_ingest.cluster.stamps import META_KEY, Stamp
from sparse_ingest.cluster.token_map import MAX_KEYS, TokenMap, token_id_keys
from sparse_ingest.errors import ClusterError, PipelineError
from sparse_ingest.pipeline import FieldType, IndexSettings, packaged_folder
from sparse_ingest.records import field_path, is_within, refused_name

_RANK_FEATURES = "rank_features with positive_score_impact true"


def document_writer(
    mappings: dict[str, Any],
    field: str,
    vocabulary: Sequence[str | None],
    operation: WriteOperation = "index",
    token_map: TokenMap | None = None,
) -> BodyWriter:
    """Return the writer of documents for a field that `check_fits` accepted."""
    entry = field_mapping(mappings, field) or {}
    if kind_of(entry) != "sparse_vector":
        return BodyWriter(vocabulary, field, operation=operation)
    codes = ByteCodes(float(parameters_of(entry)["quantization_ceiling_ingest"]))
    spelling = Spelling(codes.codes, codes.decimal)
    # OpenSearch 3.6.0 refuses an empty object, or the documents with terms in the same request.
    keys = token_id_keys(vocabulary, token_map)
    return BodyWriter(keys, field, spelling=spelling, operation=operation, empty_field=False)


def keys_of(index: Index, vocabulary: Sequence[str | None]) -> list[str | None]:
    """Return the key of each token id in the sparse_vector field of an index; None for an id that no load has used.

    Raises:
        ClusterError: the stamp, which would have a token map, is missing.
    """
    if index.stamp is None and len(vocabulary) > MAX_KEYS:
        raise ClusterError(
            f"Index {index.name!r} {index.unreadable or f'has no _meta.{META_KEY}'}, where a load stores which tokens "
            f"the keys of its sparse_vector field mean. The vocabulary has {len(vocabulary):,} tokens, so they are "
            "unknown. Load the run again with --replace --from-scratch."
        )
    return token_id_keys(vocabulary, index.stamp.tokens if index.stamp else None)


def index_body(settings: IndexSettings, stamp: Stamp | None, dialect: Dialect) -> dict[str, Any]:
    """Return the body that creates the index: the pipeline's JSON with its field name, source mode and stamp.

    Raises:
        PipelineError: the field has an invalid name, or the body does not exist, is no JSON object or lacks the field.
    """
    field = settings.field
    # A pattern in `_source.excludes` would exclude other fields too.
    reason = "a dot at its end" if field.endswith(".") else "a pattern" if "*" in field else refused_name(field)
    if reason:
        raise PipelineError(f"The sparse field cannot be {field!r} ({reason}). Choose another [index] field.")
    name = settings.body or settings.kind
    packaged = packaged_folder() / dialect.product / f"{name}.json"
    path = packaged if packaged.is_file() else Path(name)
    try:
        body = json.loads(path.read_bytes())
        mappings = body["mappings"]
        properties = mappings["properties"]
        _refuse_no_objects(body)
        sparse = next(name for name, entry in properties.items() if kind_of(entry) == settings.kind)
    except FileNotFoundError as error:
        known = ", ".join(sorted(entry.stem for entry in packaged.parent.glob("*.json")))
        raise PipelineError(f"Index body {name!r} is neither a file nor packaged; packaged: {known}.") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        raise PipelineError(
            f"{path} is not an index body: expected a JSON object whose mappings.properties has a {settings.kind} "
            "field, and objects for aliases, settings, settings.index, _source, _meta, method and its parameters."
        ) from error
    if settings.kind == "sparse_vector" and str(body_setting(body, "sparse")).lower() != "true":
        raise PipelineError(f'{path} has a sparse_vector field, but no setting "index": {{"sparse": true}}. Add it.')
    if problem := _other_product(properties[sparse], dialect):
        raise PipelineError(f"{path}: the field {sparse!r} {problem}")
    if sparse != settings.field:
        if settings.field in properties:
            raise PipelineError(f"{path} maps {settings.field!r} as another type. Choose another [index] field.")
        properties[settings.field] = properties.pop(sparse)
    add_types(mappings, settings.fields, settings.field)
    source = mappings.setdefault("_source", {})
    excluded = source.get("excludes") or []
    excluded = [excluded] if isinstance(excluded, str) else excluded
    excludes = [entry for entry in excluded if entry not in (sparse, settings.field)]
    source["excludes"] = [*excludes, settings.field] if settings.source == "exclude" else excludes
    dialect.complete_body(body, properties[settings.field], settings.source)
    if stamp is not None:
        mappings["_meta"] = {**mappings.get("_meta", {}), META_KEY: stamp.as_meta()}
    return dict(body)


def add_types(mappings: dict[str, Any], types: Mapping[str, str], sparse: str) -> None:
    """Map fields by their dotted names in place, replacing their types; `sparse` is the sparse field.

    Raises:
        PipelineError: a type is unknown, a name is not allowed, or a field is inside another, as `a.b` is in `a`.
    """
    for name, kind in types.items():
        if kind not in get_args(FieldType):
            raise PipelineError(f"The type of {name!r} is {kind!r}; expected one of {', '.join(get_args(FieldType))}.")
        path, reason = field_path(name), refused_name(name)
        if reason or is_within(path, sparse) or is_within(sparse, path):
            raise PipelineError(f"{name!r} cannot be mapped as {kind}: {reason or f'{sparse!r} is the sparse field'}.")
        entry = mappings
        for part in path.split("."):
            if has_values(entry):
                raise PipelineError(f"{name!r} cannot be mapped as {kind}: a part of its name is {entry['type']}.")
            entry = entry.setdefault("properties", {}).setdefault(part, {})
        if "properties" in entry:
            raise PipelineError(f"{name!r} cannot be mapped as {kind}: it has the field {min(entry['properties'])!r}.")
        if entry.get("type") != kind:
            entry.clear()
            entry.update({"type": kind} | ({"ignore_above": MAX_KEYWORD} if kind == "keyword" else {}))


def refuse_other_product(index: Index, field: str, dialect: Dialect) -> None:
    """Raise `ClusterError` if the type of a sparse field is one that the queries of this product do not search."""
    if problem := _other_product(field_mapping(index.mappings, field) or {}, dialect):
        raise ClusterError(f"Index {index.name!r}: the field {field!r} {problem}")


def _other_product(entry: Mapping[str, Any], dialect: Dialect) -> str | None:
    wanted = dialect.field_entry()["type"]
    if kind_of(entry) != "rank_features" or entry["type"] == wanted:
        return None
    return f"has the type {entry['type']}; on {dialect.name} it must be {wanted}. Map another field."


def check_fits(index: Index, stamp: Stamp, kind: FieldKind | None = None) -> None:
    """Raise `ClusterError` if the mapping or the vectors of an index do not fit. `kind` None: either kind fits."""
    mapped = field_mapping(index.mappings, stamp.field)
    found_kind = kind_of(mapped)
    turned = found_kind == "rank_features" and not (mapped or {}).get("positive_score_impact", True)
    if turned or found_kind is None or found_kind != (kind or found_kind):
        found = f"has no field {stamp.field!r}"
        if mapped:
            inverse = " with positive_score_impact false" if turned else ""
            found = f"maps the field {stamp.field!r} as {mapped.get('type', 'object')}{inverse}"
        wanted = {
            "sparse_vector": "sparse_vector",
            "rank_features": f"{_RANK_FEATURES}, or sparse_vector on Elasticsearch",
            None: f"{_RANK_FEATURES}, or sparse_vector",
        }[kind]
        instead = "--kind" if found_kind and not turned else "--field"
        raise ClusterError(
            f"Index {index.name!r} {found}; expected {wanted}. Load into a new index, or pass {instead}."
        )
    if any(str(entry.get("disable_objects")).lower() == "true" for entry in _entries_to(index.mappings, stamp.field)):
        raise ClusterError(
            f"Index {index.name!r} has disable_objects in its mapping: OpenSearch then splits the field "
            f"{stamp.field!r} and stores no vector. Load into an index without it."
        )
    there = index.stamp
    if there is None:
        return
    # The path of the files does not count: their hash is among the other keys.
    keys = sorted((there.model.keys() | stamp.model.keys()) - {"document", "query"})
    pairs = ((key, there.model.get(key), stamp.model.get(key)) for key in keys)
    differing = next((f"; {key} is {old!r} there and {new!r} here" for key, old, new in pairs if old != new), "")
    if differing or there.vocabulary_sha256 != stamp.vocabulary_sha256:
        held, loaded = (
            f"{(one.model.get('document') or one.model)!r} with vocabulary {one.vocabulary_sha256[:12]}"
            for one in (there, stamp)
        )
        raise ClusterError(
            f"Index {index.name!r} has vectors of {held}, but this run is of {loaded}{differing}. Load into another "
            "index, or pass --replace."
        )


def leaves(mappings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the dotted name and the entry of each field with values, or without inner fields."""
    for name, entry in (mappings.get("properties") or {}).items():
        if has_values(entry) or "properties" not in entry:
            yield prefix + name, entry
        yield from leaves(entry, f"{prefix}{name}.")


def has_values(entry: Mapping[str, Any]) -> bool:
    """Return whether a field has values of its own. With `subobjects: false` it may also have inner fields."""
    return entry.get("type", "object") not in ("object", "nested")


def field_mapping(mappings: dict[str, Any], field: str) -> dict[str, Any] | None:
    """Return the mapping of a field by its dotted name, or None."""
    entries = list(_entries_to(mappings, field))
    return dict(entries[-1]) if len(entries) == 2 + field.count(".") else None


def sparse_field(mappings: dict[str, Any]) -> str | None:
    """Return the dotted name of the first sparse field outside nested fields (passages), or None."""
    for name, entry in mappings.get("properties", {}).items():
        if kind_of(entry):
            return str(name)
        if entry.get("type") != "nested" and (inner := sparse_field(entry)):
            return f"{name}.{inner}"
    return None


def _refuse_no_objects(body: dict[str, Any]) -> None:
    """Raise TypeError or AttributeError if a part of an index body is not a JSON object."""
    settings, mappings = body.get("settings", {}), body["mappings"]
    methods = [entry.get("method", {}) for entry in mappings["properties"].values()]
    parts = [body.get("aliases", {}), settings.get("index", {}), mappings.get("_source", {}), mappings.get("_meta", {})]
    parts += [method.get("parameters") or {} for method in methods]
    if not all(isinstance(part, dict) for part in parts):
        raise TypeError


def _entries_to(mappings: dict[str, Any], field: str) -> Iterator[dict[str, Any]]:
    """Yield the mappings, then the entry of each object on the path to a field and its own, until one is absent."""
    entry: Any = mappings
    yield entry
    for name in field.split("."):
        entry = entry.get("properties", {}).get(name)
        if not isinstance(entry, dict):
            return
        yield entry
