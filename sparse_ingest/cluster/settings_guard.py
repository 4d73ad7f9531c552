"""Index settings that make a load fast, and the promise that the old ones come back.

In: an index, the settings wanted while loading. The old values are in `_meta`, and in the journal of the load in case
another client replaces `_meta`, before the first one changes. So they are put back by whatever runs next: the end of
the load, the next load, or `load --restore`, from any machine. A setting that another client changed during the load
is left as it is. What a cluster refuses (a managed one, a role without the right) is reported, and the load goes on.
Not covered: which settings pay (benchmarks/load.py), cluster settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from sparse_ingest.cluster.client import Client, ResponseError
from sparse_ingest.cluster.indexes import Index, check_uuid, update_stamp
from sparse_ingest.cluster.journal import Journal
from sparse_ingest.cluster.stamps import Stamp
from sparse_ingest.errors import ClusterError
from sparse_ingest.reporting import Reporter

# No refresh: no small segments that must be merged again. No replicas: each document is indexed once, copies are made
# of finished files.
LOADING = {"refresh_interval": "-1", "number_of_replicas": "0"}
ASYNC_TRANSLOG = {"translog.durability": "async"}
ASYNC_RISK = (
    "--async-translog: until the load is finished, the server may confirm a write up to 5 s before it is on its disk. "
    "This load loses nothing (each shard is flushed before it counts), others who write into this index can."
)


def may_tune(index: Index, run_id: str) -> bool:
    """Whether a load may change settings unasked: the run's own load made the index, and no alias serves it."""
    stamp = index.stamp
    return stamp is not None and stamp.created_by == run_id and not index.serving_aliases


def tune(
    client: Client, index: Index, wanted: Mapping[str, str], reporter: Reporter, journal: Journal | None = None
) -> None:
    """Give the index the settings for loading; what they were is in the journal and in `_meta` first."""
    there = check_uuid(client, index)
    stamp = there.stamp
    if stamp is None:
        reporter.note(f"Index {index.name!r} has no stamp to keep its settings in; they stay as they are.")
        return
    if there.setting("auto_expand_replicas") not in (None, "false"):
        # The cluster itself decides how many there are, and would undo ours immediately.
        wanted = {name: value for name, value in wanted.items() if name != "number_of_replicas"}
    # What a killed load has kept is what was there before it, unless another client has set another value since.
    kept = _kept(there, journal, reporter)
    for name, value in wanted.items():
        if there.setting(name) != value:
            kept[name] = {"before": there.setting(name), "loading": value}
    if not kept:
        return
    _keep(client, index, kept, journal)
    refused = _put(client, index, {name: entry["loading"] for name, entry in kept.items()})
    for name, why in refused.items():
        reporter.note(f"Index {index.name!r} keeps its {name} during the load, the cluster refuses to change it: {why}")
    if refused:
        _keep(client, index, {name: entry for name, entry in kept.items() if name not in refused}, journal)


def restore(
    client: Client, index: Index, reporter: Reporter, *, finished: str | None = None, journal: Journal | None = None
) -> list[str]:
    """Put back what loads have changed; the names put back. In the same step note that the load of a run is finished.

    The stamp stays at "loading" when it names another run: one whose load has begun since.
    """
    there = check_uuid(client, index)
    kept = _kept(there, journal, reporter)
    wanted = {}
    for name, entry in kept.items():
        now = there.setting(name)
        if now == entry["loading"]:
            wanted[name] = entry["before"]
        elif now != entry["before"]:
            reporter.note(f"Index {index.name!r}: another client set {name} to {now} during the load; it stays.")
    refused = _put(client, index, wanted)
    if refused:
        raise ClusterError(
            f"Index {index.name!r} still has settings for loading: {', '.join(sorted(refused))}. The cluster refuses "
            f"to put them back: {next(iter(refused.values()))} Remove the cause, then run "
            f"`sparse-ingest load --index {index.name} --restore`."
        )

    def put_back(stamp: Stamp) -> Stamp:
        return replace(stamp, settings={}, load="done" if stamp.run_id == finished else stamp.load)

    update_stamp(client, index, put_back)
    if journal:
        journal.keep_settings({})
    return sorted(wanted)


def give_up(client: Client, index: Index, journal: Journal) -> list[str]:
    """Leave settings to the load that has begun since. Return those that its stamp lacks; the journal keeps them."""
    lost = _lost(check_uuid(client, index), journal)
    journal.keep_settings(lost)
    return sorted(lost)


def confirms_early(index: Index) -> bool:
    """Whether the index confirms writes before they are on its disk."""
    return index.setting("translog.durability") == "async"


def _keep(client: Client, index: Index, kept: dict[str, dict[str, str | None]], journal: Journal | None) -> None:
    if journal:
        journal.keep_settings(kept)
    update_stamp(client, index, lambda stamp: replace(stamp, settings=kept))


def _kept(there: Index, journal: Journal | None, reporter: Reporter) -> dict[str, dict[str, str | None]]:
    """What loads have changed, by `_meta`, and by the journal where `_meta` has lost it."""
    lost = _lost(there, journal) if journal else {}
    if lost:
        names = ", ".join(sorted(lost))
        reporter.note(f"Index {there.name!r}: old values of {names} are gone from _meta; the journal has them.")
    return lost | (there.stamp.settings if there.stamp else {})


def _lost(there: Index, journal: Journal) -> dict[str, dict[str, str | None]]:
    """What a load has changed by its journal alone."""
    known = there.stamp.settings if there.stamp else {}
    kept = journal.settings().items()
    return {name: entry for name, entry in kept if name not in known and there.setting(name) == entry["loading"]}


def _put(client: Client, index: Index, settings: Mapping[str, str | None]) -> dict[str, str]:
    """Set all, else each one that can be set; the refused ones and why."""
    if not settings:
        return {}
    try:
        client.call("PUT", f"{index.path}/_settings", {"index": dict(settings)})
        return {}
    except ResponseError as error:
        if not 400 <= error.status < 500 or error.status in (401, 404, 429):
            raise
        if len(settings) == 1:
            return {name: error.reason for name in settings}
    refused: dict[str, str] = {}
    for name, value in settings.items():
        refused |= _put(client, index, {name: value})
    return refused
