"""Indexes: create, find by name or alias, and stamp with a description of the vectors.

In: an index body (mappings.py), a `Stamp`. Out: an `Index` (concrete name, UUID, mappings). The stamp is stored under
the key `sparse_ingest` of the mapping's `_meta`; other keys are kept. Loads send to a private alias with
`require_alias`, so a bulk request never creates a deleted index again with a dynamic mapping.

An alias that searches use moves to another index in one request: between the removal and the addition there is no
instant, and its filter and routing move along. A removal says `must_exist`: without it, OpenSearch passes over an alias
that another client has just moved.

Not covered: what a mapping must contain (mappings.py), index settings during a load (settings_guard.py), when an alias
moves (loading/publish.py).
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from dataclasses import field as made_of
from typing import Any, Literal, NamedTuple

from sparse_ingest.cluster.client import Client, ResponseError, TimedOutError, path_of
from sparse_ingest.errors import ClusterError, UsageError
from sparse_ingest.pipeline import in_words
from sparse_ingest.runs.run import Run

META_KEY = "sparse_ingest"
STAMP_FORMAT = 1
_PRIVATE = "--sparse-ingest-"
MAX_NAME_BYTES = 255
_PRIMARIES_S = 15.0  # timeout for the primaries of a new index; then missing ones are reported
_CREATE_LOOKS = 20  # 2 s apart, for a new index that a busy cluster has not created by then
ADDED_BYTES = len(_PRIVATE) + 8  # of the private alias
NO_PRUNING = {"top_k": None, "max_ratio": None}


@dataclass(frozen=True)
class Stamp:
    """The content of our key in `_meta`: what the vectors of an index are.

    Attributes:
        created_by: the run whose load created the index; None if no load did.
        runs: the runs that were loaded into it.
        pruning: which terms of the runs were pruned, as the arguments of `prune`.
        settings: the index settings that a load has changed and not yet restored (settings_guard.py): for each name
            the value before, and the value during the load.
        replaced: name and UUID of the index that an alias served before this one.
        since: the `run_id` of the older run if only differences to it were sent, and `delete_missing`.
        fields: the types of kept fields by dotted path, None for one that is not mapped. None if only releases that
            did not map kept fields have loaded into the index.
        query: the settings of [query] for searches that name no pipeline; in `_meta` only if there are any.
        takeover: random id of the load of `run_id` that followed one of another run; in `_meta` only if there is one.
            Journal lines with another id are from before the other run, and do not count.
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
    format: int = STAMP_FORMAT
    query: dict[str, Any] = made_of(default_factory=dict)
    takeover: str | None = None

    def as_meta(self) -> dict[str, Any]:
        """Return the JSON object for `_meta`."""
        content = {**asdict(self), "runs": list(self.runs), "load": {"state": self.load}}
        return {key: value for key, value in content.items() if value or key not in ("query", "takeover")}

    @property
    def only_run(self) -> str | None:
        """The run that all documents of the index come from, or None. Other clients' writes are not considered."""
        return self.created_by if set(self.runs) <= {self.created_by} else None


class Index(NamedTuple):
    """A concrete index, as it was when it was read."""

    name: str
    uuid: str
    mappings: dict[str, Any]
    settings: dict[str, Any] = {}
    aliases: dict[str, dict[str, Any]] = {}

    @property
    def path(self) -> str:
        """Where requests about it go."""
        return path_of(self.name)

    @property
    def stamp(self) -> Stamp | None:
        """The stamp; None if there is none, or it cannot be read."""
        meta = self.mappings.get("_meta", {}).get(META_KEY)
        return _stamp_from(meta) if isinstance(meta, dict) else None

    @property
    def serving_aliases(self) -> list[str]:
        """The aliases that searches may use: all except the private ones of loads."""
        return sorted(alias for alias in self.aliases if not alias.startswith(self.name + _PRIVATE))

    def setting(self, name: str) -> str | None:
        """Return an index setting by its dotted name without `index.`, or None if it has the default."""
        value: Any = self.settings
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return None if value is None else str(value)


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


def is_one_name(name: str) -> bool:
    """Return whether a name is valid for one index or alias, without wildcards."""
    return name not in ("", ".", "..") and name[0] not in "-_+" and not any(sign in name for sign in '*?,/\\<>| "#:')


def refuse_long_name(option: str, name: str, added: int) -> None:
    """Refuse a name that is too long with the bytes that a load adds to it.

    Raises:
        UsageError: the name is too long.
    """
    if len(name.encode()) > MAX_NAME_BYTES - added:
        raise UsageError(
            f"{option} {name!r} has {len(name.encode())} bytes. OpenSearch allows {MAX_NAME_BYTES}, and a load "
            f"adds {added} to the name: give one of at most {MAX_NAME_BYTES - added} bytes."
        )


def find_index(client: Client, name: str) -> Index | None:
    """Return the index of this name, or the write index of the alias of this name. None if there is neither.

    Raises:
        UsageError: the name is invalid, a data stream, or an alias of several indexes without a write index.
        ClusterError: the cluster does not return the UUID of the index.
    """
    if not is_one_name(name):
        raise UsageError(f"--index {name!r} is no index name; one index or alias is expected, without wildcards.")
    found = client.find(path_of(name))
    if found is None:
        return None
    if name not in found and not all(name in entry["aliases"] for entry in found.values()):
        raise UsageError(
            f"--index {name!r} is a data stream, whose documents have no ids of their own. Name an index or an alias."
        )
    if name not in found and len(found) > 1:
        writing = [one for one, entry in found.items() if entry["aliases"][name].get("is_write_index")]
        if len(writing) != 1:
            raise UsageError(
                f"--index {name!r} is an alias of {', '.join(sorted(found))} without a write index. "
                "Name one of them, or set is_write_index on one."
            )
        found = {writing[0]: found[writing[0]]}
    ((concrete, entry),) = found.items()
    settings = entry["settings"]["index"]
    if "uuid" not in settings:
        raise ClusterError(
            f"{client.address} does not tell the UUID of index {concrete!r}, by which a load detects that "
            "it was replaced. Amazon OpenSearch Serverless may be such a place; use a domain of OpenSearch Service "
            "(--aws-service es)."
        )
    return Index(concrete, str(settings["uuid"]), entry.get("mappings", {}), settings, entry.get("aliases", {}))


def need_index(client: Client, name: str, advice: str) -> Index:
    """Return the index of this name or alias.

    Raises:
        ClusterError: there is none; the message ends with `advice`.
    """
    index = find_index(client, name)
    if index is None:
        raise ClusterError(f"There is no index or alias {name!r} at {client.address}. {advice}")
    return index


def create_index(client: Client, name: str, body: dict[str, Any]) -> Index:
    """Create an index that does not exist. Its primaries may not be started yet when this returns."""
    try:
        client.call("PUT", path_of(name), body, timeout_s=_PRIMARIES_S)
    except TimedOutError:
        # OpenSearch creates the index, but answers only when the primaries are started, or after 30 s.
        for _ in range(_CREATE_LOOKS):
            if find_index(client, name):
                break
            client.waiting.pause(2.0, f"index {name!r} is being created")
        else:
            raise
    return need_index(client, name, "It was created and is gone again. Check who deletes it, then load again.")


def stamp_index(client: Client, index: Index, stamp: Stamp) -> None:
    """Write the stamp into `_meta` and keep the other keys. (A mapping update replaces all of `_meta`.)"""
    _write_stamp(client, check_uuid(client, index), stamp)


def update_stamp(client: Client, index: Index, change: Callable[[Stamp], Stamp]) -> None:
    """Apply a change to the current stamp. An index without a stamp is left unchanged."""
    there = check_uuid(client, index)
    stamp = there.stamp
    if stamp is not None and change(stamp) != stamp:
        _write_stamp(client, there, change(stamp))


def _write_stamp(client: Client, there: Index, stamp: Stamp) -> None:
    meta = {**there.mappings.get("_meta", {}), META_KEY: stamp.as_meta()}
    client.call("PUT", f"{there.path}/_mapping", {"_meta": meta})


def continued_stamp(there: Stamp | None, stamp: Stamp) -> Stamp:
    """Return the stamp of a load into an index that exists, with what must be kept of its old stamp."""
    if there is None:
        return replace(stamp, created_by=None, runs=(stamp.run_id,))
    runs = there.runs if stamp.run_id in there.runs else (*there.runs, stamp.run_id)
    names = ("created_by", "settings", "replaced", "fields")
    kept = {name: getattr(there, name) for name in names}
    if there.run_id != stamp.run_id:
        return replace(stamp, runs=runs, takeover=secrets.token_hex(8), **kept)
    return replace(stamp, runs=runs, since=there.since, takeover=there.takeover, **kept)


def refuse_other_pruning(index: Index, stamp: Stamp) -> None:
    """Refuse an index that was loaded with other pruning: an index has one rule for all its vectors.

    Raises:
        ClusterError: names both rules.
    """
    there = index.stamp
    if there is not None and there.pruning != stamp.pruning:
        raise ClusterError(
            f"Index {index.name!r} was loaded {_pruning_words(there.pruning)}; this load asks for vectors "
            f"{_pruning_words(stamp.pruning)}. Give the same --pipeline, --top-k, --max-ratio, --min-weight and "
            "--alpha-mass, load into another index, or delete what is there with --replace --from-scratch."
        )


def check_uuid(client: Client, index: Index) -> Index:
    """Read the index again.

    Raises:
        ClusterError: it was deleted, or deleted and created again, since `index` was read.
    """
    there = find_index(client, index.name)
    if there is None or there.uuid != index.uuid:
        what = f"now has UUID {there.uuid}" if there else "is gone"
        raise ClusterError(
            f"Index {index.name!r} {what}; the load began with UUID {index.uuid}. Another client deleted it. "
            "Start the load again: it begins anew for the new index."
        )
    return there


def add_private_alias(client: Client, index: Index, run_id: str) -> str:
    """Create the alias that the documents of this run are sent to, unless a killed load left it. Return its name."""
    alias = private_alias(index.name, run_id)
    if alias not in index.aliases:
        client.call("POST", "/_aliases", {"actions": [{"add": {"index": index.name, "alias": alias}}]})
    return alias


def private_alias(index: str, run_id: str) -> str:
    """Return the name of the alias that the documents of a run are sent to."""
    return f"{index}{_PRIVATE}{run_id[:8]}"


class Served(NamedTuple):
    """What an alias points to: a concrete index, or None when there is no such alias; and its properties."""

    alias: str
    concrete: str | None
    properties: dict[str, Any]


def served_by(client: Client, alias: str) -> Served:
    """The index that an alias serves.

    Raises:
        UsageError: an index has this name, or the alias points to several.
    """
    if not is_one_name(alias):
        raise UsageError(f"--alias {alias!r} is no name for an alias; one name is expected, without wildcards.")
    found = client.find(path_of(alias))
    if found is None:
        return Served(alias, None, {})
    if alias not in found and not all(alias in entry["aliases"] for entry in found.values()):
        raise UsageError(f"{alias!r} is a data stream, so it cannot be an alias too. Give --alias another name.")
    if alias in found:
        raise UsageError(
            f"{alias!r} is an index, so it cannot be an alias too. Give --alias another name, or load into the index "
            f"with --index {alias}."
        )
    if len(found) > 1:
        raise UsageError(
            f"Alias {alias!r} stands for {len(found)} indexes ({', '.join(sorted(found))}); one that --alias may move "
            "stands for one. Take it off the others, or give another name."
        )
    ((index, entry),) = found.items()
    return Served(alias, index, entry["aliases"][alias])


def move_alias(client: Client, served: Served, target: Index) -> None:
    """Let the alias serve `target` and nothing else.

    Raises:
        ClusterError: another client has moved or removed it since it was read.
    """
    actions: list[dict[str, Any]] = []
    if served.concrete is not None:
        actions.append({"remove": {"index": served.concrete, "alias": served.alias, "must_exist": True}})
    actions.append({"add": {"index": target.name, "alias": served.alias, **served.properties}})
    try:
        client.call("POST", "/_aliases", {"actions": actions})
    except ResponseError as error:
        if error.status != 404:
            raise
        raise ClusterError(
            f"Alias {served.alias!r} no longer serves {served.concrete!r}: another client moved it during the load. It "
            f"was left as it is; look at it with GET /_alias/{served.alias}, then start the same command again."
        ) from error


def refresh(client: Client, index: Index) -> None:
    """Make all acknowledged writes searchable."""
    client.call("POST", f"{index.path}/_refresh", timeout_s=600)


def count_documents(client: Client, index: Index) -> int:
    """Return how many documents a search can find.

    Raises:
        ClusterError: a shard did not answer, so the count would be too low.
    """
    answer = client.call("GET", f"{index.path}/_count")
    if answer["_shards"]["successful"] < answer["_shards"]["total"]:
        raise ClusterError(
            f"Only {answer['_shards']['successful']} of {answer['_shards']['total']} shards of index {index.name!r} "
            "answer. Wait until the index is green or yellow, then start the same command again."
        )
    return int(answer["count"])


def max_clauses(client: Client) -> int:
    """Return how many clauses one query may have: `indices.query.bool.max_clause_count`.

    A role without cluster rights may not read it; this returns OpenSearch's default then, 1024.
    """
    name = "indices.query.bool.max_clause_count"
    params = {"include_defaults": "true", "flat_settings": "true"}
    answer = client.find("/_cluster/settings", params=params, absent=(403, 404)) or {}
    levels = (answer.get(level, {}) for level in ("transient", "persistent", "defaults"))
    return next((int(level[name]) for level in levels if name in level), 1024)


def _stamp_from(meta: dict[str, Any]) -> Stamp | None:
    try:
        known = {each.name: meta[each.name] for each in fields(Stamp) if each.name in meta}
        known |= {"model": dict(meta["model"]), "runs": tuple(meta.get("runs", ())), "load": meta["load"]["state"]}
        known |= {"pruning": {**NO_PRUNING, **meta.get("pruning", {})}, "format": int(meta["format"])}
        return Stamp(**known)
    except (KeyError, TypeError, ValueError):
        return None


def _pruning_words(pruning: dict[str, Any]) -> str:
    """Return `unpruned`, or such as `pruned by top_k 100`."""
    rules = in_words(pruning, " and ")
    return f"pruned by {rules}" if rules else "unpruned"
