"""Indexes: create, find by name or alias, and stamp with a description of the vectors.

In: an index body (mappings.py), a `Stamp`. Out: an `Index` (concrete name, UUID, mappings). Loads send to a private
alias with `require_alias`, so a bulk request never creates a deleted index again with a dynamic mapping.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from sparse_ingest.cluster.answers import Indexes
from sparse_ingest.cluster.client import Client, ResponseError, TimedOutError, path_of
from sparse_ingest.cluster.stamps import CHANGED_BY_LOADS, META_KEY, Stamp, foreign_settings, read_stamp
from sparse_ingest.errors import ClusterError, UsageError
from sparse_ingest.pipeline import in_words

_PRIVATE = "--sparse-ingest-"
MAX_NAME_BYTES = 255
_PRIMARIES_S = 15.0  # timeout for the primaries of a new index; then missing ones are reported
_CREATE_LOOKS = 20  # 2 s apart, for a new index that a busy cluster has not created by then
ADDED_BYTES = len(_PRIVATE) + 8  # of the private alias


class Index(NamedTuple):
    """A concrete index, as it was when it was read; `beside` has the other indexes of the alias that named it."""

    name: str
    uuid: str
    mappings: dict[str, Any]
    settings: dict[str, Any] = {}
    aliases: dict[str, dict[str, Any]] = {}
    beside: tuple[Index, ...] = ()

    @property
    def path(self) -> str:
        """The path of its URL."""
        return path_of(self.name)

    @property
    def stamp(self) -> Stamp | None:
        """The stamp; None if there is none, or it cannot be read."""
        return found if isinstance(found := read_stamp(self.meta), Stamp) else None

    @property
    def unreadable(self) -> str:
        """The part of a message with the reason why the stamp cannot be read; "" if it can be, or there is none."""
        why = found if isinstance(found := read_stamp(self.meta), str) else ""
        return why and f"has a _meta.{META_KEY} that cannot be read ({why})"

    @property
    def meta(self) -> Any:
        """The content of our key in `_meta`. Any client may have written it."""
        return self.mappings.get("_meta", {}).get(META_KEY)

    @property
    def serving_aliases(self) -> list[str]:
        """The aliases that searches may use: all except the private ones of loads."""
        private = self.name + _PRIVATE
        return sorted(one for one in self.aliases if not one.startswith(private) or len(one) != len(private) + 8)

    def setting(self, name: str) -> str | None:
        """Return an index setting by its dotted name without `index.`, or None if it has the default."""
        value: Any = self.settings
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return None if value is None else str(value)


def is_one_name(name: str) -> bool:
    """Return whether a name is valid for one index or alias, without wildcards."""
    if not isinstance(name, str):
        return False
    return name not in ("", ".", "..") and name[0] not in "-_+" and not any(sign in name for sign in '*?,/\\<>| "#:')


def refuse_long_name(option: str, name: str, added: int) -> None:
    """Raise `UsageError` if a name is too long with the bytes that a load adds to it."""
    if isinstance(name, str) and len(name.encode()) > MAX_NAME_BYTES - added:
        raise UsageError(
            f"{option} {name!r} has {len(name.encode())} bytes. Clusters allow {MAX_NAME_BYTES}, and a load "
            f"adds {added} to the name: give one of at most {MAX_NAME_BYTES - added} bytes."
        )


def find_index(client: Client, name: str) -> Index | None:
    """Return the index of this name, or the write index of the alias of this name. None if there is neither.

    Raises:
        UsageError: the name is invalid, a data stream, or an alias of several indexes without a write index.
        ClusterError: the cluster does not return the UUID of the index.
    """
    if not is_one_name(name):
        raise UsageError(f"--index {name!r} is not an index name. Name one index or alias, without wildcards.")
    found = client.find(path_of(name), expected=Indexes)
    if found is None:
        return None
    if name not in found and not all(name in entry["aliases"] for entry in found.values()):
        raise UsageError(
            f"--index {name!r} is a data stream, which has no ids of documents. Name an index or an alias."
        )
    beside: tuple[Index, ...] = ()
    if name not in found and len(found) > 1:
        writing = [one for one, entry in found.items() if entry["aliases"][name].get("is_write_index")]
        if len(writing) != 1:
            raise UsageError(
                f"--index {name!r} is an alias of {', '.join(sorted(found))} without a write index. "
                "Name one of them, or set is_write_index on one."
            )
        beside = tuple(
            Index(one, "", with_objects(found[one].get("mappings", {}))) for one in found if one != writing[0]
        )
        found = {writing[0]: found[writing[0]]}
    ((concrete, entry),) = found.items()
    settings = entry["settings"]["index"]
    if "uuid" not in settings:
        raise ClusterError(
            f"{client.address} does not report the UUID of index {concrete!r}, which a load needs to detect that "
            "it was replaced. Amazon OpenSearch Serverless does not; use a domain of OpenSearch Service "
            "(--aws-service es)."
        )
    content = with_objects(entry.get("mappings", {}))
    return Index(concrete, str(settings["uuid"]), content, settings, entry.get("aliases", {}), beside)


def with_objects(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Return a mapping whose fields with dotted names, as `subobjects: false` stores them, are in objects.

    There, a field may also have inner fields: `host` beside `host.name`.
    """
    if "properties" not in mapping:
        return dict(mapping)
    properties: dict[str, Any] = {}
    for name, entry in mapping["properties"].items():
        first, _, rest = name.partition(".")
        inner = with_objects({"properties": {rest: entry}} if rest else entry)
        properties[first] = _merged(properties.get(first, {}), inner)
    return {**mapping, "properties": properties}


def _merged(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Return an entry with the keys and the inner fields of both."""
    there, more = one.get("properties", {}), other.get("properties", {})
    inner = there | {name: _merged(there.get(name, {}), entry) for name, entry in more.items()}
    return one | other | ({"properties": inner} if inner else {})


def need_index(client: Client, name: str, advice: str) -> Index:
    """Return the index of this name or alias, or raise a `ClusterError` that ends with `advice`."""
    if (index := find_index(client, name)) is None:
        raise ClusterError(f"There is no index or alias {name!r} at {client.address}. {advice}")
    return index


def refuse_other_vectors(index: Index, alias: str) -> None:
    """Raise `ClusterError` if an alias also searches an index with other vectors: their scores are not comparable."""
    for other in index.beside:
        if other.stamp and index.stamp and _vectors(other.stamp) != _vectors(index.stamp):
            raise ClusterError(
                f"Alias {alias!r} searches {index.name!r} and {other.name!r}, which have vectors of different models "
                "or settings, in different fields, or with other token numbers. Name one of them, or serve one: "
                f"sparse-ingest load --alias {alias} --to INDEX"
            )


def _vectors(stamp: Stamp) -> tuple[Any, ...]:
    # Weights of the same files with another truncation are comparable.
    ignored = ("document", "query", "revision", "query_revision", "query_side", "max_length", "trust_remote_code")
    model = {key: value for key, value in stamp.model.items() if key not in ignored}
    return stamp.field, stamp.vocabulary_sha256, stamp.token_map, model


def create_index(client: Client, name: str, body: dict[str, Any]) -> Index:
    """Create an index that does not exist. Its primaries may not be started yet when this returns."""
    try:
        client.call("PUT", path_of(name), body, timeout_s=_PRIMARIES_S)
    except ResponseError as error:
        named = re.fullmatch("resource_already_exists_exception|invalid_.*_name_exception", error.kind)
        full = error.kind == "validation_exception" and "maximum" in error.reason and "shards" in error.reason
        if error.status != 400 or named or full:  # not for the body or a template
            raise
        message = (
            f"{str(error).rstrip('.;')}. Check the index body, and the index templates that match the name: POST "
            f"/_index_template/_simulate_index{path_of(name)} shows what they add."
        )
        raise ResponseError(message, status=error.status, kind=error.kind, reason=error.reason) from error
    except TimedOutError:
        # OpenSearch creates the index, but answers when the primaries have started, or after 30 s.
        for _ in range(_CREATE_LOOKS):
            if find_index(client, name):
                break
            client.waiting.pause(2.0, f"index {name!r} is being created")
        else:
            raise
    return need_index(
        client, name, "It was created, then deleted by another client. Stop that client, then load again."
    )


def stamp_index(client: Client, index: Index, stamp: Stamp) -> None:
    """Write the stamp into `_meta`, but keep the other keys, and the settings that another load has stored since."""
    there = check_uuid(client, index)
    _write_stamp(client, there, replace(stamp, settings=(there.stamp or stamp).settings))


def update_stamp(client: Client, index: Index, change: Callable[[Stamp], Stamp]) -> None:
    """Apply a change to the current stamp. An index without a stamp is left unchanged."""
    there = check_uuid(client, index)
    stamp = there.stamp
    if stamp is not None and change(stamp) != stamp:
        _write_stamp(client, there, change(stamp))


def _write_stamp(client: Client, there: Index, stamp: Stamp) -> None:
    content = stamp.as_meta(there.meta)  # a mapping update replaces all of `_meta`
    client.call("PUT", f"{there.path}/_mapping", {"_meta": {**there.mappings.get("_meta", {}), META_KEY: content}})


def refuse_other_field(index: Index, stamp: Stamp) -> None:
    """Raise `ClusterError` if an index was loaded into another field: searches of the new one would not find it."""
    if index.stamp is not None and index.stamp.field != stamp.field:
        raise ClusterError(
            f"Index {index.name!r} was loaded into the field {index.stamp.field!r}, this load has {stamp.field!r}. "
            f"Pass --field {index.stamp.field}, or load into another index."
        )


def refuse_other_pruning(index: Index, stamp: Stamp) -> None:
    """Raise `ClusterError` if an index was loaded with other pruning: an index has one rule for all its vectors."""
    there = index.stamp
    if there is not None and there.pruning != stamp.pruning:
        raise ClusterError(
            f"Index {index.name!r} was loaded {_pruning_words(there.pruning)}, this load is "
            f"{_pruning_words(stamp.pruning)}. Pass the same --pipeline, --top-k, --max-ratio, --min-weight "
            "and --alpha-mass, load into another index, or delete this one with --replace --from-scratch."
        )


def refuse_unreadable(index: Index | None) -> None:
    """Raise `ClusterError` if the stamp cannot be read, so that the content of the index is unknown."""
    if index and index.unreadable:
        raise ClusterError(
            f"Index {index.name!r} {index.unreadable}, so its content is unknown. Correct it (PUT "
            f"{index.path}/_mapping), name another index, or load again with --replace --from-scratch."
        )


def refuse_required_routing(index: Index) -> None:
    """Raise `ClusterError` if the mapping requires routing: it would refuse every document of a run."""
    if str(index.mappings.get("_routing", {}).get("required")).lower() == "true":
        raise ClusterError(
            f"Index {index.name!r} requires a routing value for each document (_routing.required in its mapping or in "
            "an index template), and a run has none. Load into an index without it."
        )


def refuse_serving(index: Index, instead: str) -> None:
    """Raise `ClusterError` if searches use an index through an alias. The message ends with `instead`."""
    if index.serving_aliases:
        raise ClusterError(
            f"Index {index.name!r} serves {', '.join(map(repr, index.serving_aliases))}, whose searches would find "
            f"nothing. Move the alias first (sparse-ingest load --alias NAME --to INDEX), or {instead}."
        )


def note_on_settings(index: Index | None) -> list[str]:
    """Return a note on the settings in the stamp that are ignored, if any."""
    if not (index and (foreign := foreign_settings(index.meta))):
        return []
    mine = ", ".join(CHANGED_BY_LOADS)
    return [f"Index {index.name!r}: settings of _meta.{META_KEY} ignored: {in_words(foreign)}. Loads set only {mine}."]


def notes_on_routing(index: Index, aliases: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return a note on each of these aliases whose searches reach a part of the shards only."""
    if index.setting("number_of_shards") == "1":
        return []
    return [
        f"Alias {alias!r} has search_routing {routing!r}, so searches by it miss documents in other shards of index "
        f"{index.name!r}: a load gives documents no routing. Remove the routing, or search the index by its own name."
        for alias, properties in aliases.items()
        if (routing := properties.get("search_routing"))
    ]


def check_uuid(client: Client, index: Index) -> Index:
    """Read the index again. Raise `ClusterError` if it was deleted, or deleted and created again, since then."""
    there = find_index(client, index.name)
    if there is None or there.uuid != index.uuid:
        what = f"now has UUID {there.uuid}" if there else "is gone"
        raise ClusterError(
            f"Index {index.name!r} {what}; the load began with UUID {index.uuid}. Another client deleted it. "
            "Start the load again: it sends all documents to the new index."
        )
    return there


def pointed_to(client: Client, alias: str) -> dict[str, dict[str, Any]]:
    """Return the indexes that an alias points to, with its properties there."""
    return with_alias(client.find(path_of(alias), expected=Indexes) or {}, alias)


def with_alias(found: Indexes, alias: str) -> dict[str, dict[str, Any]]:
    """Return the found indexes that an alias points to, with its properties in each."""
    return {name: entry["aliases"][alias] for name, entry in found.items() if alias in entry["aliases"]}


def add_private_alias(client: Client, index: Index, run_id: str) -> str:
    """Point the private alias of a run to this index alone, and return its name."""
    alias = private_alias(index.name, run_id)
    if (found := pointed_to(client, alias)) != {index.name: {}}:
        # An index that was restored from a snapshot under another name has the alias too.
        others = [name for name in found if name != index.name]
        remove = [{"remove": {"index": name, "alias": alias, "must_exist": True}} for name in others]
        client.call("POST", "/_aliases", {"actions": [*remove, {"add": {"index": index.name, "alias": alias}}]})
        if others:
            client.waiting.say(alias, f"Alias {alias!r} is private to loads. It was removed from {', '.join(others)}.")
    return alias


def private_alias(index: str, run_id: str) -> str:
    """Return the name of the alias that the documents of a run are sent to."""
    return f"{index}{_PRIVATE}{run_id[:8]}"


def refresh(client: Client, index: Index) -> None:
    """Make all acknowledged writes searchable."""
    client.call("POST", f"{index.path}/_refresh", timeout_s=600)


def count_documents(client: Client, index: Index) -> int:
    """Return how many documents a search can find."""
    return count_matching(client, index.path)


def count_matching(client: Client, path: str, query: Mapping[str, Any] | None = None) -> int:
    """Return how many documents of an index or alias match a query, or raise if a shard does not answer in time."""
    body = {"size": 0, "track_total_hits": True, "query": query or {"match_all": {}}}
    answer = client.search(path, body)
    return int(answer["hits"]["total"]["value"])


def _pruning_words(pruning: dict[str, Any]) -> str:
    rules = in_words(pruning, " and ")
    return f"pruned by {rules}" if rules else "unpruned"
