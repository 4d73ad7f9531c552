"""The values in the stamp of an index, checked: any client with rights on the index can write `_meta`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal, NotRequired, TypedDict

from sparse_ingest.errors import UsageError
from sparse_ingest.pipeline import ModelSettings, Pruning, options_from
from sparse_ingest.storage.foreign_json import checked

NO_PRUNING = {"top_k": None, "max_ratio": None}
# The index settings that loads change, and the values that they can have.
CHANGED_BY_LOADS = {
    "refresh_interval": r"-1|0|\d+ *(nanos|micros|ms|[smhd])",
    "number_of_replicas": r"\d+",
    "translog.durability": "request|async",
}


class _State(TypedDict):
    state: Literal["loading", "done"]


@dataclass(frozen=True)
class _Model(ModelSettings):
    query_side: ModelSettings | None = None


class _Nested(TypedDict):
    load: _State
    model: _Model
    pruning: NotRequired[dict[str, Any]]
    settings: NotRequired[dict[str, Any]]


def stamp_parts(meta: object) -> dict[str, Any]:
    """Return what indexes.Stamp has as fields, whose types the caller checks, without settings that no load changes.

    Raises:
        ValueError: a nested value has a wrong type, or pruning a rule that is unknown.
    """
    checked(meta, _Nested)
    content = checked(meta, dict[str, Any])
    pruning = {**NO_PRUNING, **content.get("pruning", {})}
    try:
        options_from(Pruning, None, pruning, "pruning")
    except UsageError as error:
        raise ValueError(str(error)) from None
    kept = content.get("settings", {}).items()
    settings = {name: entry for name, entry in kept if is_changed_by_loads(name, entry)}
    return {**content, "load": content["load"]["state"], "pruning": pruning, "settings": settings}


def is_changed_by_loads(name: str, entry: object) -> bool:
    """Return whether loads change this setting, and `entry` has possible values: before and during the load."""
    if name not in CHANGED_BY_LOADS or not isinstance(entry, dict):
        return False
    before, loading = entry.get("before", ""), entry.get("loading")
    possible = re.compile(CHANGED_BY_LOADS[name], re.IGNORECASE)
    values = (loading, loading if before is None else before)
    return all(isinstance(value, str) and possible.fullmatch(value.strip()) for value in values)
