"""The index: created from the pipeline's JSON, checked when it is there, stamped with what its vectors are.

In: `[index]` settings, a `Stamp`. Out: an `Index` (concrete name, UUID, mappings). `sparse_ingest` is our key in the
mapping's `_meta`; other keys are kept. Documents are sent to a private alias: with `require_alias` a deleted index is
never made again by a bulk request with a dynamic mapping.
Not covered: index settings during a load, aliases that serve searches, `sparse_vector` fields.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import quote

from sparse_ingest.errors import ClusterError, PipelineError, UsageError
from sparse_ingest.opensearch.client import Client, ResponseError
from sparse_ingest.pipeline import IndexSettings, packaged_folder

META_KEY = "sparse_ingest"
STAMP_FORMAT = 1


@dataclass(frozen=True)
class Stamp:
    """What our key in `_meta` says about the vectors of an index.

    `created_by` is the run whose load made the index, `runs` those that were loaded since; None and empty when
    somebody else made it.
    """

    model: dict[str, Any]
    vocabulary_sha256: str
    field: str
    run_id: str
    created_by: str | None = None
    runs: tuple[str, ...] = ()
    load: Literal["loading", "done"] = "loading"
    format: int = STAMP_FORMAT

    def as_meta(self) -> dict[str, Any]:
        """The JSON under our key."""
        return {**asdict(self), "runs": list(self.runs), "load": {"state": self.load}}

    @property
    def only_run(self) -> str | None:
        """The run that all documents of the index come from, as far as our loads know."""
        return self.created_by if set(self.runs) <= {self.created_by} else None


class Index(NamedTuple):
    """A concrete index as it was when it was looked at."""

    name: str
    uuid: str
    mappings: dict[str, Any]

    @property
    def stamp(self) -> Stamp | None:
        """Our stamp, or None."""
        meta = self.mappings.get("_meta", {}).get(META_KEY)
        return _stamp_from(meta) if isinstance(meta, dict) else None


def vocabulary_hash(vocabulary: Sequence[str | None]) -> str:
    """SHA-256 of the vocabulary as one line of JSON without spaces."""
    text = json.dumps(list(vocabulary), ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def index_body(settings: IndexSettings, stamp: Stamp) -> dict[str, Any]:
    """The body that creates the index: the pipeline's JSON with its field name, source mode and our stamp.

    Raises:
        PipelineError: there is no such body, it is no JSON object, or it lacks the sparse field.
    """
    if settings.kind != "rank_features":
        raise PipelineError(f'[index] kind = "{settings.kind}" is not supported yet; use "rank_features".')
    name = settings.body or settings.kind
    packaged = packaged_folder() / "opensearch" / f"{name}.json"
    path = packaged if packaged.is_file() else Path(name)
    try:
        body = json.loads(path.read_bytes())
        mappings = body["mappings"]
        properties = mappings["properties"]
        sparse = next(name for name, entry in properties.items() if entry.get("type") == "rank_features")
    except FileNotFoundError as error:
        known = ", ".join(sorted(entry.stem for entry in packaged.parent.glob("*.json")))
        raise PipelineError(f"No index body {name!r}, neither a file nor packaged; packaged: {known}.") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        raise PipelineError(
            f"{path} is no index body: expected a JSON object whose mappings.properties has a rank_features field."
        ) from error
    if sparse != settings.field:
        if settings.field in properties:
            raise PipelineError(f"{path} maps {settings.field!r} as another type; choose another [index] field.")
        properties[settings.field] = properties.pop(sparse)
    source = mappings.setdefault("_source", {})
    excludes = [entry for entry in source.get("excludes", []) if entry not in (sparse, settings.field)]
    source["excludes"] = [*excludes, settings.field] if settings.source == "exclude" else excludes
    mappings["_meta"] = {**mappings.get("_meta", {}), META_KEY: stamp.as_meta()}
    return dict(body)


def find_index(client: Client, name: str) -> Index | None:
    """The concrete index behind a name: itself, or the write index of an alias. None when there is none.

    Raises:
        UsageError: the name stands for several indexes.
    """
    if name in ("", ".", "..") or name[0] in "-_+" or any(sign in name for sign in '*?,/\\<>| "#:'):
        raise UsageError(f"--index {name!r} is no index name; one index or alias is expected, without wildcards.")
    try:
        found = client.call("GET", f"/{quote(name, safe='')}")
    except ResponseError as error:
        if error.status == 404:
            return None
        raise
    if name not in found and len(found) > 1:
        writing = [one for one, entry in found.items() if entry["aliases"][name].get("is_write_index")]
        if len(writing) != 1:
            raise UsageError(
                f"--index {name!r} is an alias of {', '.join(sorted(found))} without a write index. "
                "Name one of them, or set is_write_index on one."
            )
        found = {writing[0]: found[writing[0]]}
    ((concrete, entry),) = found.items()
    return Index(concrete, str(entry["settings"]["index"]["uuid"]), entry.get("mappings", {}))


def create_index(client: Client, name: str, body: dict[str, Any]) -> Index:
    """Create an index that is not there."""
    client.call("PUT", f"/{quote(name, safe='')}", body)
    index = find_index(client, name)
    if index is None:
        raise ClusterError(f"Index {name!r} was created and is gone again. Check who deletes it, then load again.")
    return index


def delete_index(client: Client, index: Index) -> None:
    """Delete an index by its concrete name."""
    client.call("DELETE", f"/{quote(index.name, safe='')}")


def check_fits(index: Index, stamp: Stamp) -> None:
    """Refuse an index whose mapping or whose vectors do not fit.

    Raises:
        ClusterError: what is there and what is expected.
    """
    mapped = field_mapping(index.mappings, stamp.field)
    found = mapped.get("type", "object") if mapped else "no such field"
    if mapped is None or found != "rank_features" or not mapped.get("positive_score_impact", True):
        turned = " with positive_score_impact false" if found == "rank_features" else ""
        raise ClusterError(
            f"Index {index.name!r}: the field {stamp.field!r} is {found}{turned}; expected is rank_features with "
            "positive_score_impact true. Load into a new index, or give --field."
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
    # Where the files lie is no difference: their hash is among the other keys.
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
    entry: Any = mappings
    for name in field.split("."):
        entry = entry.get("properties", {}).get(name)
        if not isinstance(entry, dict):
            return None
    return dict(entry)


def stamp_index(client: Client, index: Index, stamp: Stamp) -> None:
    """Write our stamp into `_meta`; everybody else's keys stay (a mapping update replaces `_meta` whole)."""
    there = check_uuid(client, index)
    meta = {**there.mappings.get("_meta", {}), META_KEY: stamp.as_meta()}
    client.call("PUT", f"/{quote(index.name, safe='')}/_mapping", {"_meta": meta})


def continued_stamp(there: Stamp | None, stamp: Stamp) -> Stamp:
    """The stamp of an index that was there before this load."""
    if there is None:
        return replace(stamp, created_by=None, runs=(stamp.run_id,))
    runs = there.runs if stamp.run_id in there.runs else (*there.runs, stamp.run_id)
    return replace(stamp, created_by=there.created_by, runs=runs)


def check_uuid(client: Client, index: Index) -> Index:
    """The index as it is now; stops when it was deleted, or deleted and made again, since it was looked at.

    Raises:
        ClusterError: it was.
    """
    there = find_index(client, index.name)
    if there is None or there.uuid != index.uuid:
        raise ClusterError(changed_message(index, there.uuid if there else None))
    return there


def changed_message(index: Index, found: str | None) -> str:
    """The sentence for an index that is not the one that the load began with."""
    what = f"now has UUID {found}" if found else "is gone"
    return (
        f"Index {index.name!r} {what}; the load began with UUID {index.uuid}. Somebody deleted it. "
        "Start the load again: it begins anew for the new index."
    )


def add_private_alias(client: Client, index: Index, run_id: str) -> str:
    """Make the alias that this run's documents are sent to; one that is there from a killed load is used again."""
    alias = f"{index.name}--sparse-ingest-{run_id[:8]}"
    client.call("POST", "/_aliases", {"actions": [{"add": {"index": index.name, "alias": alias}}]})
    return alias


def remove_alias(client: Client, index: Index, alias: str, *, timeout_s: float = 60) -> None:
    """Remove an alias from an index."""
    actions = {"actions": [{"remove": {"index": index.name, "alias": alias}}]}
    client.call("POST", "/_aliases", actions, timeout_s=timeout_s)


def refresh(client: Client, index: Index) -> None:
    """Make everything that was acknowledged searchable."""
    client.call("POST", f"/{quote(index.name, safe='')}/_refresh", timeout_s=600)


def count_documents(client: Client, index: Index) -> int:
    """How many documents a search can see."""
    return int(client.call("GET", f"/{quote(index.name, safe='')}/_count")["count"])


def max_clauses(client: Client) -> int:
    """How many clauses one query may have: `indices.query.bool.max_clause_count`, 1024 unless the cluster says so."""
    name = "indices.query.bool.max_clause_count"
    answer = client.call("GET", "/_cluster/settings", params={"include_defaults": "true", "flat_settings": "true"})
    for level in ("transient", "persistent", "defaults"):
        if name in answer.get(level, {}):
            return int(answer[level][name])
    return 1024


def _stamp_from(meta: dict[str, Any]) -> Stamp | None:
    try:
        return Stamp(
            model=dict(meta["model"]),
            vocabulary_sha256=str(meta["vocabulary_sha256"]),
            field=str(meta["field"]),
            run_id=str(meta["run_id"]),
            created_by=meta.get("created_by"),
            runs=tuple(meta.get("runs", ())),
            load=meta["load"]["state"],
            format=int(meta["format"]),
        )
    except (KeyError, TypeError, ValueError):
        return None


def _model_name(stamp: Stamp) -> str:
    return repr(stamp.model.get("document") or stamp.model)
