"""Adding a sparse field to documents that exist: what an index must allow for it, and what an update would lose.

OpenSearch updates a document by reading its `_source`, changing it, and indexing that anew: a field that `_source`
leaves out is lost by an update that does not bring it. So an index whose `_source` leaves out fields other than the
sparse one is refused, and what a later update by anybody will do to the vectors is said. What `_source` leaves out
cannot be changed after an index was made (3.6.0 answers "Cannot update parameter [excludes]").
Not covered: sending (bulk_bodies.py has the operations).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from sparse_ingest.cluster.client import Client
from sparse_ingest.cluster.indexes import Index, check_uuid
from sparse_ingest.cluster.mappings import field_mapping
from sparse_ingest.errors import ClusterError

# `update` merges objects: a vector in _source would keep its old tokens beside the new ones, so it is replaced.
UpdateOperation = Literal["update", "replace"]


def with_field(index: Index | None, name: str, field: str, kind: str) -> Index:
    """The index as it will be when it has the sparse field.

    Raises:
        ClusterError: there is none, documents cannot be updated there without a loss, or the field cannot be added.
    """
    if index is None:
        raise ClusterError(
            f"There is no index {name!r}; --update adds vectors to documents that exist. Check --index, or load whole "
            "documents without --update."
        )
    source = index.mappings.get("_source", {})
    if source.get("enabled", True) is False:
        raise ClusterError(
            f"Index {index.name!r} keeps no _source, so its documents cannot be updated. Load them anew into an index "
            "of their own, text and vector together."
        )
    lost = [name for name in _leaves(index.mappings) if name != field and not _in_source(source, name)]
    if lost:
        raise ClusterError(
            f"Index {index.name!r} leaves {', '.join(lost[:5])}{' and others' if lost[5:] else ''} out of _source: an "
            "update of a document would lose that. Load the documents anew into an index of their own."
        )
    if field_mapping(index.mappings, field) is not None:
        return index
    if kind != "rank_features":
        raise ClusterError(
            f"Index {index.name!r} has no field {field!r}, and a {kind} field needs index settings that only a new "
            "index takes. Give --kind rank_features, or load into a new index."
        )
    return index._replace(mappings=_mapped(index.mappings, field))


def add_field(client: Client, index: Index, field: str) -> None:
    """Map the sparse field, unless it is mapped."""
    if field_mapping(check_uuid(client, index).mappings, field) is None:
        client.call("PUT", f"{index.path}/_mapping", _mapped({}, field))


def operation_for(index: Index, field: str) -> UpdateOperation:
    """How a document gets its vector in this index."""
    return "replace" if _in_source(index.mappings.get("_source", {}), field) else "update"


def notice(index: Index, field: str) -> str:
    """What updates mean for the vectors of this index."""
    if operation_for(index, field) == "replace":
        return (
            f"Index {index.name!r} keeps the vectors in _source and grows by them: what its _source leaves out was "
            "fixed when it was made. A later _update by anybody keeps them."
        )
    return (
        f"Index {index.name!r} leaves {field!r} out of _source: a document that a client changes with _update later "
        "loses its vector. `sparse-ingest verify` finds such documents."
    )


def _mapped(mappings: Mapping[str, Any], field: str) -> dict[str, Any]:
    """A copy of the mappings that has the sparse field, which they lack."""
    mapped = copy.deepcopy(dict(mappings))
    entry = mapped
    for name in field.split("."):
        entry = entry.setdefault("properties", {}).setdefault(name, {})
    entry["type"] = "rank_features"
    return mapped


def _leaves(mappings: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted names of the fields that have values of their own."""
    for name, entry in mappings.get("properties", {}).items():
        if "properties" in entry:
            yield from _leaves(entry, f"{prefix}{name}.")
        elif entry.get("type") != "alias":
            yield prefix + name


def _in_source(source: Mapping[str, Any], name: str) -> bool:
    """Whether `_source` keeps a field; a pattern stands for a field, or for all that is below it."""

    def named(patterns: list[str]) -> bool:
        return any(
            re.fullmatch(re.escape(pattern).replace(r"\*", ".*") + below, name + leaf)
            for pattern in patterns
            for below, leaf in (("", ""), (r"\..*", ""), ("", ".x"))
        )

    includes = source.get("includes") or []
    return (not includes or named(includes)) and not named(source.get("excludes") or [])
