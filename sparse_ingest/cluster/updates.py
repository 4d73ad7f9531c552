"""Add a sparse field to existing documents, if the index allows that without a loss.

OpenSearch updates a document by reading and changing its `_source`, and indexing it again: an update loses fields that
`_source` excludes. So an index that excludes fields other than the sparse one is refused. The excludes of an existing
index cannot be changed (3.6.0 answers "Cannot update parameter [excludes]").
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

from sparse_ingest.cluster.bulk_bodies import WriteOperation
from sparse_ingest.cluster.client import Client
from sparse_ingest.cluster.dialects import Dialect, FieldKind
from sparse_ingest.cluster.indexes import Index, check_uuid
from sparse_ingest.cluster.mappings import field_mapping, leaves
from sparse_ingest.errors import ClusterError, listed


def with_field(index: Index | None, name: str, field: str, kind: FieldKind, dialect: Dialect) -> Index:
    """Return the index as it will be with the sparse field. Raise `ClusterError` if updates would lose fields."""
    if index is None:
        raise ClusterError(
            f"Index {name!r} does not exist; --update adds vectors to existing documents. Check --index, or omit "
            "--update to load complete documents."
        )
    source = index.mappings.get("_source", {})
    if source.get("enabled", True) is False:
        raise ClusterError(
            f"Index {index.name!r} keeps no _source, so its documents cannot be updated. Load the documents, text and "
            "vector together, into a new index."
        )
    if lost := _lost_fields(index.mappings, field, source):
        raise ClusterError(
            f"Index {index.name!r} excludes fields from _source, which an update would lose: {listed(lost, 5)}. Load "
            "the documents into a new index."
        )
    if field_mapping(index.mappings, field) is not None:
        return index
    if kind != "rank_features":
        raise ClusterError(
            f"Index {index.name!r} has no field {field!r}, and a {kind} field needs settings of a new index. Pass "
            "--kind rank_features, or load into a new index."
        )
    return index._replace(mappings=_mapped(index.mappings, field, dialect))


def add_field(client: Client, index: Index, field: str) -> bool:
    """Map the sparse field. Return False if it is mapped already."""
    if field_mapping(check_uuid(client, index).mappings, field) is not None:
        return False
    client.call("PUT", f"{index.path}/_mapping", _mapped({}, field, client.dialect))
    return True


def operation_for(index: Index, field: str, dialect: Dialect) -> WriteOperation:
    """Return the operation that adds a vector to a document of this index.

    `update` merges objects: a vector in _source would keep its old tokens beside the new ones, so it is replaced.
    """
    return dialect.replacement if keeps_vectors(index, field, dialect) else "update"


def keeps_vectors(index: Index, field: str, dialect: Dialect) -> bool:
    """Return whether a document that a client changes with `_update` keeps its vector."""
    stored_beside = dialect.stores_vectors_beside_source(index.setting("mapping.exclude_source_vectors"))
    return stored_beside or _in_source(index.mappings.get("_source", {}), field)


def notice(index: Index, field: str, dialect: Dialect) -> str:
    """Return what later updates do to the vectors of this index."""
    if _in_source(index.mappings.get("_source", {}), field):
        return (
            f"Index {index.name!r} stores the vectors twice and grows by them, because the excludes of an existing "
            "index cannot be changed. Later updates keep the vectors."
        )
    if keeps_vectors(index, field, dialect):
        return f"Index {index.name!r} keeps the vectors in term vectors, beside _source. Later updates keep them."
    return (
        f"Index {index.name!r} excludes {field!r} from _source: a document that a client changes with _update loses "
        "its vector until it is loaded again. `sparse-ingest verify` finds such documents; an index created with "
        'source = "keep" in [index] has none.'
    )


def _mapped(mappings: Mapping[str, Any], field: str, dialect: Dialect) -> dict[str, Any]:
    """Return a copy of the mappings with the sparse field added."""
    mapped = copy.deepcopy(dict(mappings))
    entry = mapped
    for name in field.split("."):
        entry = entry.setdefault("properties", {}).setdefault(name, {})
    entry |= dialect.field_entry()
    return mapped


def _lost_fields(mappings: Mapping[str, Any], field: str, source: Mapping[str, Any]) -> list[str]:
    """Return the fields with values, apart from the sparse one, that `_source` lacks."""
    values = (name for name, entry in leaves(mappings) if entry.get("type") != "alias")
    return [name for name in values if name != field and not _in_source(source, name)]


def _in_source(source: Mapping[str, Any], name: str) -> bool:
    """Return whether `_source` keeps a field. A pattern matches a field and all fields below it."""

    def named(patterns: list[str]) -> bool:
        return any(
            re.fullmatch(re.escape(pattern).replace(r"\*", ".*") + below, name + leaf)
            for pattern in patterns
            for below, leaf in (("", ""), (r"\..*", ""), ("", ".x"))
        )

    includes = source.get("includes") or []
    return (not includes or named(includes)) and not named(source.get("excludes") or [])
