"""The mapping of an index: made from the pipeline's JSON, and checked when the index is there already.

In: `[index]` settings, a `Stamp`. Out: the body that creates an index, or the sentence that says why one that is there
does not fit; and what its field wants on the wire, keys and spelling. A sparse field is rank_features, whose keys are
the tokens, or sparse_vector with the SEISMIC method, whose keys are token ids.
Not covered: creating and finding indexes (indexes.py), method parameters that are fitted to a run (seismic.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from sparse_ingest.cluster.bulk_bodies import BodyWriter, Spelling, WriteOperation
from sparse_ingest.cluster.field_types import MAX_KEYWORD
from sparse_ingest.cluster.indexes import Index
from sparse_ingest.cluster.seismic import MAX_VOCABULARY, ByteCodes, body_setting, parameters_of
from sparse_ingest.cluster.stamps import META_KEY, Stamp
from sparse_ingest.errors import ClusterError, PipelineError
from sparse_ingest.pipeline import FieldType, IndexSettings, packaged_folder
from sparse_ingest.records import field_path, is_within, refused_name

FieldKind = Literal["rank_features", "sparse_vector"]
SEISMIC_SINCE = (3, 3)


def document_writer(
    mappings: dict[str, Any], field: str, vocabulary: Sequence[str | None], operation: WriteOperation = "index"
) -> BodyWriter:
    """What writes documents for a field that `check_fits` found fitting."""
    entry = field_mapping(mappings, field) or {}
    if entry.get("type") != "sparse_vector":
        return BodyWriter(vocabulary, field, operation=operation)
    codes = ByteCodes(float(parameters_of(entry)["quantization_ceiling_ingest"]))
    spelling = Spelling(codes.codes, codes.decimal)
    # The field takes no empty object: beside documents with terms either it or they are refused (3.6.0).
    return BodyWriter(token_id_keys(vocabulary), field, spelling=spelling, operation=operation, empty_field=False)


def token_id_keys(vocabulary: Sequence[str | None]) -> list[str | None]:
    """The key of each token id in a sparse_vector field."""
    return [None if token is None else str(token_id) for token_id, token in enumerate(vocabulary)]


def check_version(kind: FieldKind, version: tuple[int, int, int]) -> None:
    """Refuse a kind of field that the server is too old for.

    Raises:
        ClusterError: it is.
    """
    if kind == "sparse_vector" and version[:2] < SEISMIC_SINCE:
        raise ClusterError(
            f"The cluster is OpenSearch {'.'.join(map(str, version))}; sparse_vector fields need 3.3 or newer. "
            'Use kind = "rank_features", or upgrade the cluster.'
        )


def check_vocabulary(kind: FieldKind, vocabulary: Sequence[str | None]) -> None:
    """Refuse a vocabulary that a kind of field cannot keep apart.

    Raises:
        PipelineError: it has too many tokens for sparse_vector.
    """
    if kind == "sparse_vector" and len(vocabulary) > MAX_VOCABULARY:
        raise PipelineError(
            f"The vocabulary has {len(vocabulary)} tokens; a sparse_vector field tells {MAX_VOCABULARY} apart: "
            "OpenSearch 3.3 to 3.8 fails or scores wrongly from there on, later ones take two tokens for one. "
            'Use kind = "rank_features".'
        )


def index_body(settings: IndexSettings, stamp: Stamp | None) -> dict[str, Any]:
    """The body that creates the index: the pipeline's JSON with its field name, source mode and our stamp, if any.

    Raises:
        PipelineError: there is no such body, it is no JSON object, or it lacks the sparse field.
    """
    name = settings.body or settings.kind
    packaged = packaged_folder() / "opensearch" / f"{name}.json"
    path = packaged if packaged.is_file() else Path(name)
    try:
        body = json.loads(path.read_bytes())
        mappings = body["mappings"]
        properties = mappings["properties"]
        _refuse_no_objects(body)
        sparse = next(name for name, entry in properties.items() if entry.get("type") == settings.kind)
    except FileNotFoundError as error:
        known = ", ".join(sorted(entry.stem for entry in packaged.parent.glob("*.json")))
        raise PipelineError(f"No index body {name!r}, neither a file nor packaged; packaged: {known}.") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        raise PipelineError(
            f"{path} is no index body: expected a JSON object whose mappings.properties has a {settings.kind} field, "
            "and objects for aliases, settings, settings.index, _source, _meta, method and its parameters."
        ) from error
    if settings.kind == "sparse_vector" and str(body_setting(body, "sparse")).lower() != "true":
        raise PipelineError(
            f'{path} has a sparse_vector field, but not the setting "index": {{"sparse": true}}: add it.'
        )
    if sparse != settings.field:
        if settings.field in properties:
            raise PipelineError(f"{path} maps {settings.field!r} as another type; choose another [index] field.")
        properties[settings.field] = properties.pop(sparse)
    add_types(mappings, settings.fields, settings.field)
    source = mappings.setdefault("_source", {})
    excluded = source.get("excludes") or []
    excluded = [excluded] if isinstance(excluded, str) else excluded
    excludes = [entry for entry in excluded if entry not in (sparse, settings.field)]
    source["excludes"] = [*excludes, settings.field] if settings.source == "exclude" else excludes
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
            if "type" in entry and entry["type"] not in ("object", "nested"):
                raise PipelineError(f"{name!r} cannot be mapped as {kind}: a part of its name is {entry['type']}.")
            entry = entry.setdefault("properties", {}).setdefault(part, {})
        if "properties" in entry:
            raise PipelineError(f"{name!r} cannot be mapped as {kind}: it has the field {min(entry['properties'])!r}.")
        if entry.get("type") != kind:
            entry.clear()
            entry.update({"type": kind} | ({"ignore_above": MAX_KEYWORD} if kind == "keyword" else {}))


def check_fits(index: Index, stamp: Stamp, kind: FieldKind | None = None) -> None:
    """Refuse an index whose mapping or whose vectors do not fit.

    `kind` None: the field may be of either kind.

    Raises:
        ClusterError: what is there and what is expected.
    """
    mapped = field_mapping(index.mappings, stamp.field)
    found = mapped.get("type", "object") if mapped else "no such field"
    turned = found == "rank_features" and not (mapped or {}).get("positive_score_impact", True)
    if turned or found not in ((kind,) if kind else ("rank_features", "sparse_vector")):
        wanted = "sparse_vector" if kind == "sparse_vector" else "rank_features with positive_score_impact true"
        wanted += "" if kind else ", or sparse_vector"
        instead = "--kind" if found in ("rank_features", "sparse_vector") and not turned else "--field"
        raise ClusterError(
            f"Index {index.name!r}: the field {stamp.field!r} is {found}"
            f"{' with positive_score_impact false' if turned else ''}; expected is {wanted}. "
            f"Load into a new index, or give {instead}."
        )
    if any(str(entry.get("disable_objects")).lower() == "true" for entry in _entries_to(index.mappings, stamp.field)):
        raise ClusterError(
            f"Index {index.name!r} has disable_objects in its mapping: OpenSearch then takes the field {stamp.field!r} "
            "apart and stores no vector. Load into an index without it."
        )
    there = index.stamp
    if there is None:
        return
    if there.vocabulary_sha256 != stamp.vocabulary_sha256:
        raise ClusterError(
            f"Index {index.name!r} holds vectors of {_model_name(there)} with vocabulary "
            f"{there.vocabulary_sha256[:12]}; this run is of {_model_name(stamp)} with vocabulary "
            f"{stamp.vocabulary_sha256[:12]}. Load into another index, or give --replace."
        )
    # The path of the files is no difference: their hash is among the other keys.
    keys = (there.model.keys() | stamp.model.keys()) - {"document", "query"}
    differing = sorted(key for key in keys if there.model.get(key) != stamp.model.get(key))
    if differing:
        key = differing[0]
        raise ClusterError(
            f"Index {index.name!r} holds vectors of {_model_name(there)}, this run is of {_model_name(stamp)}: "
            f"{key} is {there.model.get(key)!r} there and {stamp.model.get(key)!r} here. "
            "Load into another index, or give --replace."
        )


def field_mapping(mappings: dict[str, Any], field: str) -> dict[str, Any] | None:
    """The mapping of a field by its dotted name, or None."""
    entries = list(_entries_to(mappings, field))
    return dict(entries[-1]) if len(entries) == 2 + field.count(".") else None


def sparse_field(mappings: dict[str, Any]) -> str | None:
    """The dotted name of the first sparse field of a mapping that is not inside a field of passages."""
    for name, entry in mappings.get("properties", {}).items():
        if entry.get("type") in ("rank_features", "sparse_vector"):
            return str(name)
        if entry.get("type", "object") == "object" and (inner := sparse_field(entry)):
            return f"{name}.{inner}"
    return None


def _refuse_no_objects(body: dict[str, Any]) -> None:
    """Raise TypeError or AttributeError when a part of an index body that must be a JSON object is none."""
    settings, mappings = body.get("settings", {}), body["mappings"]
    methods = [entry.get("method", {}) for entry in mappings["properties"].values()]
    parts = [body.get("aliases", {}), settings.get("index", {}), mappings.get("_source", {}), mappings.get("_meta", {})]
    parts += [method.get("parameters") or {} for method in methods]
    if not all(isinstance(part, dict) for part in parts):
        raise TypeError


def _entries_to(mappings: dict[str, Any], field: str) -> Iterator[dict[str, Any]]:
    """Yield the mappings, then the entry of each object on the path to a field, then its own, until one is absent."""
    entry: Any = mappings
    yield entry
    for name in field.split("."):
        entry = entry.get("properties", {}).get(name)
        if not isinstance(entry, dict):
            return
        yield entry


def _model_name(stamp: Stamp) -> str:
    return repr(stamp.model.get("document") or stamp.model)
