"""Stamps: the description of the vectors of an index and of its loads, under the key `sparse_ingest` of `_meta`.

In: the JSON under this key, which any client with rights on the index can write. Out: a `Stamp`, or the reason why the
JSON cannot be read. Keys that this release does not know are kept when a stamp is written again.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from dataclasses import field as made_of
from typing import Any, Literal, NotRequired, TypedDict

from sparse_ingest.cluster.token_map import TokenMap, read_token_map
from sparse_ingest.errors import UsageError
from sparse_ingest.pipeline import ModelSettings, Pruning, options_from
from sparse_ingest.runs.run import Run
from sparse_ingest.storage.foreign_json import checked

META_KEY = "sparse_ingest"
NO_PRUNING = {"top_k": None, "max_ratio": None}
# The index settings that loads change, and the values that they can have.
CHANGED_BY_LOADS = {
    "refresh_interval": r"-1|0|\d+ *(nanos|micros|ms|[smhd])",
    "number_of_replicas": r"\d+",
    "translog.durability": "request|async",
}
_WHEN_SET = ("query", "replaced_by", "takeover", "token_map")  # keys that are in `_meta` only if they have a value


@dataclass(frozen=True)
class Stamp:
    """A description of an index's vectors, and of the loads that wrote them.

    Attributes:
        created_by: the run whose load created the index; None if no load did.
        runs: the runs that were loaded into it.
        pruning: which terms of the runs were pruned, as the arguments of `prune`.
        settings: the index settings that a load has changed and not yet restored (settings_guard.py): for each name
            the value before, and the value during the load.
        replaced: name and UUID of the index that an alias served before this one.
        replaced_by: the alias that served this index, with name and UUID of the one that it served next. Only an index
            with this entry in its own stamp is deleted as the old one.
        since: the `run_id` of the older run if only differences to it were sent, and `delete_missing`.
        fields: the types of kept fields by dotted path, None for one that is not mapped. None if only releases that
            did not map kept fields have loaded into the index.
        query: the [query] settings for searches that name no pipeline.
        takeover: random id of the load that followed one of another run. Older journal lines do not count.
        token_map: the tokens of the keys in a sparse_vector field (token_map.py); None if keys are token ids.
    """

    model: dict[str, Any]
    vocabulary_sha256: str
    field: str
    run_id: str
    created_by: str | None = None
    runs: tuple[str, ...] = ()
    load: Literal["loading", "done"] = "loading"
    pruning: dict[str, Any] = made_of(default_factory=lambda: dict(NO_PRUNING))
    settings: dict[str, dict[str, str | None]] = made_of(default_factory=dict)
    replaced: dict[str, str] | None = None
    since: dict[str, Any] | None = None
    fields: dict[str, str | None] | None = None
    format: int = 1
    query: dict[str, Any] = made_of(default_factory=dict)
    replaced_by: dict[str, str] | None = None
    takeover: str | None = None
    token_map: dict[str, Any] | None = None

    def as_meta(self, old: object = None) -> dict[str, Any]:
        """Return the JSON object for `_meta`, with the content of `old` that this release does not know."""
        content = {**asdict(self), "runs": list(self.runs), "load": {"state": self.load}}
        content = {key: value for key, value in content.items() if value or key not in _WHEN_SET}
        given = old.items() if isinstance(old, dict) else ()
        unknown = {key: value for key, value in given if key not in Stamp.__dataclass_fields__}
        return {**unknown, **content, "settings": {**foreign_settings(old), **self.settings}}

    @property
    def tokens(self) -> TokenMap | None:
        """The token map; None if keys are token ids."""
        return read_token_map(self.token_map)

    @property
    def only_run(self) -> str | None:
        """The run that all documents of the index come from, or None. Other clients' writes are not considered."""
        return self.created_by if set(self.runs) <= {self.created_by} else None


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


def read_stamp(meta: object) -> Stamp | str | None:
    """Return the stamp in `_meta`, the reason why it cannot be read, or None if there is no stamp."""
    if meta is None:
        return None
    try:
        checked(meta, _Nested)
        content = checked(meta, dict[str, Any])
        pruning = {**NO_PRUNING, **content.get("pruning", {})}
        options_from(Pruning, None, pruning, "pruning")
        read_token_map(content.get("token_map"))
        kept = content.get("settings", {}).items()
        settings = {name: entry for name, entry in kept if is_changed_by_loads(name, entry)}
        return checked({**content, "load": content["load"]["state"], "pruning": pruning, "settings": settings}, Stamp)
    except (ValueError, UsageError) as error:
        return str(error).rstrip(".")


def is_changed_by_loads(name: str, entry: object) -> bool:
    """Return whether loads change this setting, and `entry` has possible values: before and during the load."""
    if name not in CHANGED_BY_LOADS or not isinstance(entry, dict):
        return False
    before, loading = entry.get("before", ""), entry.get("loading")
    possible = re.compile(CHANGED_BY_LOADS[name], re.IGNORECASE)
    values = (loading, loading if before is None else before)
    return all(isinstance(value, str) and possible.fullmatch(value.strip()) for value in values)


def foreign_settings(meta: object) -> dict[str, Any]:
    """Return the settings in a stamp that no load changes, or that have impossible values."""
    kept = meta.get("settings") if isinstance(meta, dict) else None
    found = kept.items() if isinstance(kept, dict) else ()
    return {name: entry for name, entry in found if not is_changed_by_loads(name, entry)}


def vocabulary_hash(vocabulary: Sequence[str | None]) -> str:
    """Return the SHA-256 of the vocabulary as one line of JSON without spaces."""
    text = json.dumps(list(vocabulary), ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def run_stamp(
    run: Run, field: str, pruning: Mapping[str, Any] = NO_PRUNING, query: Mapping[str, Any] | None = None
) -> Stamp:
    """Return the stamp of an index that a load of this run creates."""
    run_id, vocabulary_sha256 = run.manifest.run_id, vocabulary_hash(run.vocabulary())
    kept: dict[str, Any] = {"runs": (run_id,), "pruning": dict(pruning), "fields": {}, "query": dict(query or {})}
    return Stamp(run.manifest.model, vocabulary_sha256, field, run_id, run_id, **kept)


def continued_stamp(there: Stamp | None, stamp: Stamp) -> Stamp:
    """Return the stamp of a load into an index that exists, with what its old stamp must keep."""
    if there is None:
        return replace(stamp, created_by=None, runs=(stamp.run_id,))
    runs = there.runs if stamp.run_id in there.runs else (*there.runs, stamp.run_id)
    names = ("created_by", "settings", "replaced", "replaced_by", "fields", "format", "token_map")
    kept = {name: getattr(there, name) for name in names}
    if there.run_id != stamp.run_id:
        return replace(stamp, runs=runs, takeover=secrets.token_hex(8), **kept)
    return replace(stamp, runs=runs, since=there.since, takeover=there.takeover, **kept)
