"""Index settings that make a load fast, and are restored after it.

The old values are in `_meta`, and in the journal of the load in case another client replaces `_meta`, before the first
one changes. So they are restored by whatever runs next, from any machine: the end of the load, the next load, or
`load --restore`. A setting that another client changed during the load is not touched. What a cluster refuses to change
(a managed one, a role without the right) is reported, and the load continues.
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

# No refresh: no small segments to merge again. No replicas: each document is indexed once, then files are copied.
LOADING = {"refresh_interval": "-1", "number_of_replicas": "0"}
ASYNC_TRANSLOG = {"translog.durability": "async"}
ASYNC_RISK = (
    "--async-translog: until the load is finished, the server may confirm a write up to 5 s before it is on its disk. "
    "This load loses nothing (each shard is flushed before it counts), other clients of this index can lose writes."
)


def may_tune(index: Index, run_id: str) -> bool:
    """Return whether a load changes settings by default: a load of the run created the index, no alias serves it."""
    stamp = index.stamp
    return stamp is not None and stamp.created_by == run_id and not index.serving_aliases


def tune(
    client: Client, index: Index, wanted: Mapping[str, str], reporter: Reporter, journal: Journal | None = None
) -> None:
    """Set the settings for loading, after the old values are stored in the journal and in `_meta`."""
    there = check_uuid(client, index)
    stamp = there.stamp
    if stamp is None:
        reporter.note(f"Index {index.name!r} has no stamp to keep old settings in, so none is changed.")
        return
    if there.setting("auto_expand_replicas") not in (None, "false"):
        # The cluster sets the number itself, and would undo a change immediately.
        wanted = {name: value for name, value in wanted.items() if name != "number_of_replicas"}
    # A killed load has kept the values before it, unless another client has set another one since.
    kept = _kept(there, journal, reporter)
    for name, value in wanted.items():
        if there.setting(name) != value:
            kept[name] = {"before": there.setting(name), "loading": value}
    if not kept:
        return
    _keep(client, index, kept, journal)
    refused = _put(client, index, {name: entry["loading"] for name, entry in kept.items()})
    for name, why in refused.items():
        reporter.note(f"Index {index.name!r} keeps its {name} during the load: the cluster refuses the change ({why}).")
    if refused:
        _keep(client, index, {name: entry for name, entry in kept.items() if name not in refused}, journal)


def restore(
    client: Client, index: Index, reporter: Reporter, *, finished: str | None = None, journal: Journal | None = None
) -> list[str]:
    """Restore what loads have changed, and return the names. Mark the load of run `finished` as done.

    The stamp stays at "loading" if it names another run, whose load has started since.
    """
    there = check_uuid(client, index)
    kept = _kept(there, journal, reporter)
    wanted = {}
    for name, entry in kept.items():
        now = there.setting(name)
        if now == entry["loading"]:
            wanted[name] = entry["before"]
        elif now != entry["before"]:
            reporter.note(f"Index {index.name!r}: another client set {name} to {now} during the load, which is kept.")
    refused = _put(client, index, wanted)
    if refused:
        raise ClusterError(
            f"Index {index.name!r} still has settings for loading: {', '.join(sorted(refused))}. The cluster refuses "
            f"to restore them: {next(iter(refused.values()))} Remove the cause, then run "
            f"`sparse-ingest load --index {index.name} --restore`."
        )

    def restored(stamp: Stamp) -> Stamp:
        return replace(stamp, settings={}, load="done" if stamp.run_id == finished else stamp.load)

    update_stamp(client, index, restored)
    if journal:
        journal.keep_settings({})
    return sorted(wanted)


def give_up(client: Client, index: Index, journal: Journal) -> list[str]:
    """Leave settings to a later load. Return those that its stamp lacks, which the journal keeps."""
    lost = _lost(check_uuid(client, index), journal)
    journal.keep_settings(lost)
    return sorted(lost)


def _keep(client: Client, index: Index, kept: dict[str, dict[str, str | None]], journal: Journal | None) -> None:
    if journal:
        journal.keep_settings(kept)
    update_stamp(client, index, lambda stamp: replace(stamp, settings=kept))


def _kept(there: Index, journal: Journal | None, reporter: Reporter) -> dict[str, dict[str, str | None]]:
    """Return the settings that loads have changed: from `_meta`, or from the journal if `_meta` lost them."""
    lost = _lost(there, journal) if journal else {}
    if lost:
        names = ", ".join(sorted(lost))
        reporter.note(f"Index {there.name!r}: _meta has lost the old values of {names}; the journal has them.")
    return lost | (there.stamp.settings if there.stamp else {})


def _lost(there: Index, journal: Journal) -> dict[str, dict[str, str | None]]:
    """Return what a load has changed by its journal alone."""
    known = there.stamp.settings if there.stamp else {}
    kept = journal.settings().items()
    return {name: entry for name, entry in kept if name not in known and there.setting(name) == entry["loading"]}


def _put(client: Client, index: Index, settings: Mapping[str, str | None]) -> dict[str, str]:
    """Set all, or each one that can be set. Return the reason for each refused one."""
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
