"""Load behind an alias: into an index of the run's own, proven, then served in one step; and back again.

In: a run folder, the name of an alias. Out: a `PublishReport`. The index is called NAME-<first 8 of run_id>, so a
restart finds it. The alias moves only when every document was taken, all copies are there, a verification found no
difference, the alias is what it was when the load began, and searches find at least half as many documents as before.
The index that it served stays until `drop_old`; the two name each other in `_meta`.
Not covered: the load itself (load.py) and what a verification compares (verify.py).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from dataclasses import replace as with_changes
from functools import partial
from typing import Any

from sparse_ingest.cluster import aliases, indexes, installed, settling
from sparse_ingest.cluster.client import Client, ConnectionLike, connect, connection_of, path_of
from sparse_ingest.cluster.stamps import Stamp
from sparse_ingest.errors import ClusterError, RunError, UsageError
from sparse_ingest.loading.load import LoadReport, load
from sparse_ingest.loading.options import PublishOptions
from sparse_ingest.pipeline import Pipeline, in_words, options_from
from sparse_ingest.reporting import Reporter, reporter_of
from sparse_ingest.runs.run import Run, RunLike, open_run
from sparse_ingest.verification.verify import verify

_LIST = "GET /_cat/indices lists those that are there."


@dataclass(frozen=True)
class PublishReport:
    """What `publish` did; `--json` prints these keys beside those of the load.

    `serves` is the index that the alias points to now, `previous` the one it served before (None: none, or dropped),
    `moved` whether this start moved it, `verified` how many documents were compared, `dropped` what was deleted.
    """

    load: LoadReport
    alias: str
    serves: str | None
    previous: str | None
    moved: bool
    verified: int
    dropped: str | None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as `--json` prints them: those of the load first."""
        return {**self.load.to_dict(), **{name: value for name, value in asdict(self).items() if name != "load"}}


def publish(
    run: RunLike,
    *,
    alias: str,
    url: str | None = None,
    connection: ConnectionLike | None = None,
    pipeline: Pipeline | str | None = None,
    options: PublishOptions | None = None,
    progress: Reporter | bool = False,
    **settings: object,
) -> PublishReport:
    """Load a run into its own index, and let the alias serve it when every document is in and none differs.

    Args:
        run: A run folder, or what `encode` or `open_run` returns.
        alias: The alias that searches use.
        url: Address of the cluster; the SPARSE_INGEST_* variables if omitted.
        connection: A `Connection` or an `opensearchpy.OpenSearch`, instead of `url`.
        pipeline: As for `load`.
        progress: True for a tqdm bar, or a `Reporter`; silent by default.
        options: All options in one object, instead of single keywords.
        **settings: Fields of `PublishOptions`, such as `drop_old=True`.

    Raises:
        UsageError: the name is an index, or an alias of several.
        ClusterError: replicas are missing, the index differs from the run or has too few documents, or another client
            moved the alias, which stays where it is.
    """
    chosen, reporter = options_from(PublishOptions, options, settings, "publish"), reporter_of(progress)
    _refuse_options(chosen)
    indexes.refuse_long_name("--alias", alias, len("-") + 8 + indexes.ADDED_BYTES)
    folder, target_cluster = open_run(run), connection_of(url, connection)
    name = f"{alias}-{folder.manifest.run_id[:8]}"
    with connect(target_cluster, reporter=reporter) as client:
        began = aliases.served_by(client, alias)
        _refuse_strangers(client, name, alias, folder.manifest.run_id)
        if name in began and chosen.replace:
            raise UsageError(
                f"Alias {alias!r} serves {name!r}, which --replace would delete. Leave --replace out, or move the "
                "alias to another index first (--to)."
            )
    report = load(folder, index=name, pipeline=pipeline, connection=target_cluster, options=chosen, progress=reporter)
    with connect(target_cluster, reporter=reporter) as client:
        target = indexes.need_index(client, name, _LIST)
        served = aliases.served_by(client, alias)
        if served.keys() not in (began.keys(), {name}):
            raise aliases.moved_error(client, alias, began)
        before = next(iter(served), None)
        done = PublishReport(report, alias, before, None, moved=False, verified=0, dropped=None)
        if report.refused and before != name:
            reporter.note(_stays(report, alias, before))
            return done
        if before != name or served[name] == aliases.CLAIM:
            if message := settling.wait_for_copies(client, target, reporter, patience_s=chosen.replica_patience_s):
                reporter.note(message)
            verified = _verified(folder, name, alias, target_cluster, reporter)
            _refuse_other_load(client, target, folder.manifest.run_id, alias)
            if not chosen.allow_fewer:
                _refuse_fewer(client, alias, served, target, allow_empty=chosen.allow_empty)
            _move(client, alias, served, target, reporter)
            previous = before if before != name else None
            done = with_changes(done, serves=name, previous=previous, moved=True, verified=verified)
        return _with_old_dropped(client, target, done, chosen.drop_old, reporter)


def _stays(report: LoadReport, alias: str, before: str | None) -> str:
    return (
        f"Alias {alias!r} stays at {before or 'nothing'}: OpenSearch refused {report.refused} documents "
        f"({report.dead}). Fix the cause and pass --retry-dead, or serve the index without them: "
        f"sparse-ingest load --alias {alias} --to {report.index}"
    )


def _refuse_other_load(client: Client, target: indexes.Index, run_id: str, alias: str) -> None:
    stamp = indexes.check_uuid(client, target).stamp
    if stamp is None or (stamp.run_id, stamp.load) != (run_id, "done"):
        raise ClusterError(
            f"Index {target.name!r} has lost its stamp (_meta.sparse_ingest), or another load has begun, so alias "
            f"{alias!r} stays where it is. Stop what changes _meta, then load with --replace --from-scratch."
        )


def _refuse_options(options: PublishOptions) -> None:
    if options.partial:
        raise UsageError("--alias serves whole runs: finish the run, or load what is there with --index and --partial.")
    if options.update or options.since or options.delete_missing:
        raise UsageError("--alias makes a new index, in which there is nothing to change. Give --index instead.")


def roll_back(
    alias: str,
    to: str,
    *,
    allow_fewer: bool = False,
    url: str | None = None,
    connection: ConnectionLike | None = None,
    progress: Reporter | bool = False,
) -> str | None:
    """Point an alias at another index, in one request, and return the index that it pointed at. Needs no run.

    Args:
        alias: The alias.
        to: The index.
        allow_fewer: Allow an index with fewer than half of the documents that the alias serves now.
        url: Where the cluster is; by default the SPARSE_INGEST_* variables name it.
        connection: A `Connection` or an `opensearchpy.OpenSearch`, instead of `url`.
        progress: True for notes on stderr, or a `Reporter`; silent by default.

    An alias that points to several indexes is taken off the others if `to` is one of them.

    Raises:
        UsageError: the name is an index, or an alias of several others.
        ClusterError: there is no index `to`, its load is not finished, or it has too few documents.
    """
    reporter = reporter_of(progress)
    with connect(connection, url=url) as client:
        served = aliases.served_by(client, alias, to)
        target = indexes.need_index(client, to, _LIST)
        if target.name != to:
            raise UsageError(f"--to {to!r} is an alias of {target.name!r}. Name the index itself.")
        if target.stamp is not None and (target.stamp.load != "done" or target.stamp.settings):
            raise ClusterError(
                f"Index {to!r} holds an unfinished load. Finish it with the same `sparse-ingest load`, or name another."
            )
        if target.unreadable:
            reporter.note(f"Index {to!r} {target.unreadable}, so whether its load is finished is not known.")
        if served.keys() == {to} and served[to] != aliases.CLAIM:
            reporter.note(f"Alias {alias!r} serves {to!r} already.")
        else:
            if not allow_fewer:
                _refuse_fewer(client, alias, served, target)
            _move(client, alias, served, target, reporter)
        return ", ".join(served) or None


def _refuse_strangers(client: Client, name: str, alias: str, run_id: str) -> None:
    """Refuse an index under the name of this run's index that this run's load did not make."""
    there = indexes.find_index(client, name)
    if there is None:
        return
    if there.name != name:
        raise UsageError(f"{name!r}, the index that this run is loaded into, is an alias of {there.name!r}. Remove it.")
    if there.stamp is None or there.stamp.created_by != run_id:
        maker = f"run {there.stamp.created_by}" if there.stamp and there.stamp.created_by else "another client"
        found = there.unreadable or f"was created by {maker}, not by run {run_id}"
        raise ClusterError(f"Index {name!r} exists and {found}. Delete it, or choose another name than {alias!r}.")


def _verified(run: Run, name: str, alias: str, connection: ConnectionLike, reporter: Reporter) -> int:
    """Compare a sample of the index with the run; the number of documents compared."""
    checked = verify(run, index=name, connection=connection, progress=reporter)
    if not checked.same:
        raise RunError(
            f"Index {name!r} differs from {run.path}, so alias {alias!r} stays where it is. See what differs with "
            f"`sparse-ingest verify {run.path} --index {name}`, and load anew with --replace --from-scratch."
        )
    return checked.checked_documents


def _move(client: Client, alias: str, served: aliases.Served, target: indexes.Index, reporter: Reporter) -> None:
    """Move the alias. First note in both indexes that one replaces the other, so that it can be dropped later.

    Default pipelines do not move along, as they may not fit the new field: what searches and documents lose is told.
    """
    for old in filter(None, (indexes.find_index(client, name) for name in served if name != target.name)):
        replaced = {"index": old.name, "uuid": old.uuid}
        replaced_by = {"alias": alias, "index": target.name, "uuid": target.uuid}
        indexes.update_stamp(client, target, partial(with_changes, replaced=replaced))
        indexes.update_stamp(client, old, partial(with_changes, replaced_by=replaced_by))
        if lost := installed.left_behind(old, target):
            reporter.note(
                f"Index {old.name!r} has default pipelines that {target.name!r} lacks. If they are wanted: "
                f"PUT /{target.name}/_settings {json.dumps(lost)}"
            )
        before, now = (_settings_in_words(one.stamp) for one in (old, target))
        if before != now:
            reporter.note(
                f"Index {old.name!r} has {before}, {target.name!r} has {now}. If that is not intended, load again with "
                "the other's --pipeline and with --replace --from-scratch."
            )
    aliases.move_alias(client, alias, served, target)


def _refuse_fewer(
    client: Client, alias: str, served: aliases.Served, target: indexes.Index, *, allow_empty: bool = False
) -> None:
    """Refuse an index in which searches find fewer than half of the documents that they find now, or none at all."""
    query, counts = next(iter(served.values()), {}).get("filter"), {}
    try:
        for name in {target.name, *served}:
            index = indexes.need_index(client, name, _LIST)
            indexes.refresh(client, index)
            counts[name] = indexes.count_matching(client, index.path, query or {"match_all": {}})
    except ClusterError as error:
        raise ClusterError(f"{error} To move alias {alias!r} without counting documents, add --allow-fewer.") from error
    found = counts.pop(target.name)
    if 2 * found < max(counts.values(), default=0) or not (found or allow_empty):
        now = " and ".join(f"{name!r}, which it serves, has {count:,}" for name, count in counts.items())
        raise ClusterError(
            f"Alias {alias!r} stays where it is: index {target.name!r} has {found:,} documents that its searches would "
            f"find; {now or 'it serves nothing yet'}. If that is intended, add --allow-fewer."
        )


def _settings_in_words(stamp: Stamp | None) -> str:
    pruning, query = (stamp.pruning, stamp.query) if stamp else ({}, {})
    return f"pruning {in_words(pruning) or 'none'} and query settings {in_words(query) or 'none'}"


def _with_old_dropped(
    client: Client, target: indexes.Index, report: PublishReport, drop_old: bool, reporter: Reporter
) -> PublishReport:
    """The report, after the index that the alias served before was deleted if that is wished."""
    stamp = indexes.check_uuid(client, target).stamp
    replaced = (stamp.replaced if stamp else None) or {}
    name, uuid = replaced.get("index", ""), replaced.get("uuid")
    # Any client can write `replaced`: it must be the name of one index, and that index must say the same.
    is_index = indexes.is_one_name(name) and name in (client.find(path_of(name)) or {})
    old = indexes.find_index(client, name) if is_index else None
    if old is None or old.uuid != uuid or name == target.name:
        return report
    own, replaced_by = old.stamp, {"alias": report.alias, "index": target.name, "uuid": target.uuid}
    is_ours = own is not None and own.created_by and own.replaced_by == replaced_by
    if drop_old and old.serving_aliases:
        reporter.note(f"Index {name!r} was not dropped: it serves {', '.join(old.serving_aliases)}.")
    elif drop_old and (not is_ours or name.startswith(".") or old.setting("hidden") == "true"):
        reporter.note(
            f"Index {name!r} was not dropped: it is hidden, or its own _meta does not say that a load created it and "
            f"that {report.alias!r} served it before {target.name!r}. If it is not needed: sparse-ingest index drop "
            f"--index {name}"
        )
    elif drop_old:
        client.call("DELETE", old.path)
        return with_changes(report, previous=None, dropped=name)
    return with_changes(report, previous=name)
