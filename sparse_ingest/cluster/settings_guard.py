"""Index settings that make a load fast, and the promise that the old ones come back.

In: an index, the settings wanted while loading. The old values are in `_meta`, and in the journal of the load in case
another client replaces `_meta`, before the first one changes. So they are put back by whatever runs next: the end of
the load, the next load, or `load --restore`, from any machine. A setting that another client changed during the load
is left as it is. What a cluster refuses (a managed one, a role without the right) is reported, and the load goes on.
Not covered: which settings pay (benchmarks/load.py), cluster settings.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from sparse_ingest.cluster.client import Client, ResponseError
from sparse_ingest.cluster.indexes import Index, Stamp, check_uuid, update_stamp
from sparse_ingest.cluster.journal import Journal
from sparse_ingest.errors import ClusterError
from sparse_ingest.reporting import Reporter

# No refresh: no small segments that must be merged again. No replicas: each document is indexed once, copies are made
# of finished files.
LOADING = {"refresh_interval": "-1", "number_of_replicas": "0"}
ASYNC_TRANSLOG = {"translog.durability": "async"}
# Patterns of the values that may be put back. Others in `_meta` or in the journal are not from a load.
RESTORABLE = {
    "refresh_interval": r"(?i)-1|\d{1,9}(nanos|micros|ms|s|m|h|d)",
    "number_of_replicas": r"\d{1,4}",
    "translog.durability": r"(?i)request|async",
}
ASYNC_RISK = (
    "--async-translog: until the load is finished, the server may confirm a write up to 5 s before it is on its disk. "
    "This load loses nothing (each shard is flushed before it counts), others who write into this index can."
)


def may_tune(index: Index, run_id: str) -> bool:
    """Whether a load may change settings unasked: the run's own load made the index, and no alias serves it."""
    stamp = index.stamp
    return stamp is not None and stamp.created_by == run_id and not index.serving_aliases


def is_loading(index: Index) -> bool:
    """Whether an index has the settings for loading, whoever set them."""
    return all(index.setting(name) == value for name, value in LOADING.items())


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
    there = check_uuid(client, index)
    known = there.stamp.settings if there.stamp else {}
    kept = {name: entry for name, entry in journal.settings().items() if there.setting(name) == entry.get("loading")}
    unknown = {name: entry for name, entry in kept.items() if name not in known}
    journal.keep_settings(unknown)
    return sorted(unknown)


def confirms_early(index: Index) -> bool:
    """Whether the index confirms writes before they are on its disk."""
    return index.setting("translog.durability") == "async"


def _keep(client: Client, index: Index, kept: Mapping[str, Mapping[str, str | None]], journal: Journal | None) -> None:
    if journal:
        journal.keep_settings(kept)
    update_stamp(client, index, lambda stamp: replace(stamp, settings={name: dict(kept[name]) for name in kept}))


def _kept(there: Index, journal: Journal | None, reporter: Reporter) -> dict[str, dict[str, str | None]]:
    """What loads have changed, by `_meta` and by the journal where `_meta` has lost it."""
    known = there.stamp.settings if there.stamp else {}
    copied = {name: entry for name, entry in (journal.settings() if journal else {}).items() if name not in known}
    kept = {**copied, **known}
    for name, entry in list(kept.items()):
        before, loading = entry.get("before"), entry.get("loading")
        if not (_fits(name, loading) and (before is None or _fits(name, before))):
            del kept[name]
            reporter.warn(
                f"Index {there.name!r}: {name} stays as it is. Its old value was to be {before!r}, which no load keeps."
            )
    lost = sorted(name for name in copied.keys() & kept.keys() if there.setting(name) == kept[name]["loading"])
    if lost:
        reporter.note(
            f"Index {there.name!r}: the old values of {', '.join(lost)} are gone from _meta; the journal has them."
        )
    return kept


def _fits(name: str, value: object) -> bool:
    return name in RESTORABLE and isinstance(value, str) and bool(re.fullmatch(RESTORABLE[name], value))


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
