"""Load a run into an index of its own, verify it, then let an alias serve it; or move the alias back.

In: a run folder, the name of an alias. Out: a `PublishReport`. The index is called NAME-<first 8 of run_id>, so a
restart finds it. The alias moves only if every document was accepted, all replicas are complete, a verification found
no difference, the alias is what it was when the load started, and searches find at least half as many documents as
before. The index that it served is kept until `drop_old`; the two name each other in `_meta`.
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
from sparse_ingest.loading.options import PublishOptions, WithheldOptions
from sparse_ingest.pipeline import Pipeline, in_words, options_from
from sparse_ingest.reporting import Reporter, reporter_of
from sparse_ingest.runs.run import Run, RunLike, open_run
from sparse_ingest.verification.verify import verify

_LIST = "GET /_cat/indices lists the existing ones."


@dataclass(frozen=True)
class PublishReport:
    """Result of `publish`; `--json` prints these keys after the keys of a load.

    `serves` is the index that the alias points to, `previous` the one it served before (None: none, or dropped),
    `moved` whether this start moved it, `verified` how many documents were compared, `dropped` the deleted index.
    """

    load: LoadReport
    alias: str
    serves: str | None
    previous: str | None
    moved: bool
    verified: int
    dropped: str | None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as `--json` prints them, the load's first."""
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
    """Load a run into its own index, and let the alias serve it if every document is accepted and none differs.

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
    _refuse_options(alias, chosen)
    folder, target_cluster = open_run(run), connection_of(url, connection)
    name = f"{alias}-{folder.manifest.run_id[:8]}"
    with connect(target_cluster, reporter=reporter) as client:
        began = aliases.served_by(client, alias)
        _refuse_foreign_index(client, name, alias, folder.manifest.run_id)
        if name in began and chosen.replace:
            raise UsageError(
                f"Alias {alias!r} serves {name!r}, which --replace would delete. Omit --replace, or move the alias."
            )
    loading = WithheldOptions(**vars(chosen), withheld=alias)
    report = load(folder, index=name, pipeline=pipeline, connection=target_cluster, options=loading, progress=reporter)
    with connect(target_cluster, reporter=reporter) as client:
        target = indexes.need_index(client, name, _LIST)
        served = aliases.served_by(client, alias)
        if served.keys() not in (began.keys(), {name}):
            raise aliases.moved_error(client, alias, began)
        before = next(iter(served), None)
        done = PublishReport(report, alias, before, None, moved=False, verified=0, dropped=None)
        if report.refused and before != name:
            reporter.note(
                f"Alias {alias!r} still serves {before or 'nothing'}: the cluster refused {report.refused} documents "
                f"({report.dead}). Fix the cause and pass --retry-dead, or serve the index without them: "
                f"sparse-ingest load --alias {alias} --to {name}"
            )
            return done
        if before != name or served[name] == aliases.CLAIM:
            verified = _checked(client, folder, target, alias, served, target_cluster, chosen, reporter)
            _move(client, alias, served, target, reporter)
            previous = before if before != name else None
            done = with_changes(done, serves=name, previous=previous, moved=True, verified=verified)
        return _with_old_dropped(client, target, done, chosen.drop_old, reporter)


def _refuse_options(alias: str, options: PublishOptions) -> None:
    if options.partial:
        raise UsageError("--alias serves complete runs: finish the run, or pass --index instead of --alias.")
    if options.update or options.since or options.delete_missing:
        raise UsageError("--alias creates a new index, which has nothing to change. Pass --index instead.")
    indexes.refuse_long_name("--alias", alias, len("-") + 8 + indexes.ADDED_BYTES)


def roll_back(
    alias: str,
    to: str,
    *,
    allow_fewer: bool = False,
    url: str | None = None,
    connection: ConnectionLike | None = None,
    progress: Reporter | bool = False,
) -> str | None:
    """Point an alias to another index, in one request, and return the index that it pointed to. Needs no run.

    An alias of several indexes is removed from the others if `to` is one of them.

    Args:
        alias: The alias.
        to: The index.
        allow_fewer: Allow an index with fewer than half of the documents that the alias serves now.
        url: Where the cluster is; by default the SPARSE_INGEST_* variables name it.
        connection: A `Connection` or an `opensearchpy.OpenSearch`, instead of `url`.
        progress: True for notes on stderr, or a `Reporter`; silent by default.

    Raises:
        UsageError: the name is an index, or an alias of several others.
        ClusterError: `to` does not exist or is closed, its load is not finished, or it has too few documents.
    """
    reporter = reporter_of(progress)
    with connect(connection, url=url) as client:
        served = aliases.served_by(client, alias, to)
        target = indexes.need_index(client, to, _LIST)
        if target.name != to:
            raise UsageError(f"--to {to!r} is an alias of {target.name!r}. Name the index itself.")
        if target.setting("verified_before_close") == "true":
            raise ClusterError(
                f"Index {to!r} is closed, so its searches would fail. Open it: POST {target.path}/_open."
            )
        if target.stamp is not None and (target.stamp.load != "done" or target.stamp.settings):
            raise ClusterError(
                f"The load of index {to!r} is not finished. Finish it with the same command, or name another index."
            )
        if target.unreadable:
            reporter.note(f"Index {to!r} {target.unreadable}, so it is unknown whether its load is finished.")
        if served.keys() == {to} and served[to] != aliases.CLAIM:
            reporter.note(f"Alias {alias!r} already serves {to!r}.")
        else:
            if not allow_fewer:
                _refuse_fewer(client, alias, served, target)
            _move(client, alias, served, target, reporter)
        return ", ".join(served) or None


def _refuse_foreign_index(client: Client, name: str, alias: str, run_id: str) -> None:
    """Refuse an index with the name of this run's index that no load of this run created."""
    there = indexes.find_index(client, name)
    if there is None:
        return
    if there.name != name:
        raise UsageError(
            f"This run would be loaded into index {name!r}, but that is an alias of {there.name!r}. Remove that alias."
        )
    if there.stamp is None or there.stamp.created_by != run_id:
        maker = f"run {there.stamp.created_by}" if there.stamp and there.stamp.created_by else "another client"
        found = there.unreadable or f"was created by {maker}, not by run {run_id}"
        raise ClusterError(f"Index {name!r} exists and {found}. Delete it, or choose an alias other than {alias!r}.")


def _checked(
    client: Client,
    run: Run,
    target: indexes.Index,
    alias: str,
    served: aliases.Served,
    connection: ConnectionLike,
    options: PublishOptions,
    reporter: Reporter,
) -> int:
    """Refuse an index that differs from the run or has too few documents. Return how many documents were compared."""
    if message := settling.wait_for_copies(client, target, reporter, patience_s=options.replica_patience_s):
        reporter.note(message)
    report = verify(run, index=target.name, connection=connection, progress=reporter)
    if not report.same:
        raise RunError(
            f"Index {target.name!r} differs from {run.path}, so alias {alias!r} was not moved. See what differs with "
            f"`sparse-ingest verify {run.path} --index {target.name}`, then load again with --replace --from-scratch."
        )
    stamp = indexes.check_uuid(client, target).stamp
    if stamp is None or (stamp.run_id, stamp.load) != (run.manifest.run_id, "done"):
        raise ClusterError(
            f"Index {target.name!r} has lost its stamp (_meta.sparse_ingest), or another load has started, so alias "
            f"{alias!r} was not moved. Stop the client that changes _meta, then load with --replace --from-scratch."
        )
    if not options.allow_fewer:
        _refuse_fewer(client, alias, served, target, allow_empty=options.allow_empty)
    return report.checked_documents


def _move(client: Client, alias: str, served: aliases.Served, target: indexes.Index, reporter: Reporter) -> None:
    """Move the alias. First record in both indexes that one replaces the other, so that it can be dropped later.

    Default pipelines may not fit the new field, so they are not copied; the missing ones are reported.
    """
    for old in filter(None, (indexes.find_index(client, name) for name in served if name != target.name)):
        replaced = {"index": old.name, "uuid": old.uuid}
        replaced_by = {"alias": alias, "index": target.name, "uuid": target.uuid}
        indexes.update_stamp(client, target, partial(with_changes, replaced=replaced))
        indexes.update_stamp(client, old, partial(with_changes, replaced_by=replaced_by))
        if lost := installed.lost_default_pipelines(old, target):
            reporter.note(
                f"Index {old.name!r} has default pipelines that {target.name!r} lacks. To add them: "
                f"PUT /{target.name}/_settings {json.dumps(lost)}"
            )
        before, now = (_settings_in_words(one.stamp) for one in (old, target))
        if before != now:
            reporter.note(
                f"Index {old.name!r} has {before}, {target.name!r} has {now}. If that is not intended, load again with "
                "the --pipeline of the other and --replace --from-scratch."
            )
    for note in indexes.notes_on_routing(target, {alias: aliases.kept_properties(served, target)}):
        reporter.note(note)
    aliases.move_alias(client, alias, served, target)


def _refuse_fewer(
    client: Client, alias: str, served: aliases.Served, target: indexes.Index, *, allow_empty: bool = False
) -> None:
    """Raise `ClusterError` if searches would find fewer than half of the documents that they find now, or none."""
    query, counts = next(iter(served.values()), {}).get("filter"), {}
    try:
        for name in {target.name, *served}:
            index = indexes.need_index(client, name, _LIST)
            indexes.refresh(client, index)
            counts[name] = indexes.count_matching(client, index.path, query)
    except ClusterError as error:
        raise ClusterError(f"{error} To move alias {alias!r} without counting documents, add --allow-fewer.") from error
    found = counts.pop(target.name)
    if 2 * found < max(counts.values(), default=0) or not (found or allow_empty):
        now = " and ".join(f"{name!r}, which it serves, has {count:,}" for name, count in counts.items())
        raise ClusterError(
            f"Alias {alias!r} was not moved: index {target.name!r} has {found:,} documents that its searches would "
            f"find; {now or 'it serves nothing yet'}. If that is intended, add --allow-fewer."
        )


def _settings_in_words(stamp: Stamp | None) -> str:
    pruning, query = (stamp.pruning, stamp.query) if stamp else ({}, {})
    return f"pruning {in_words(pruning) or 'none'} and query settings {in_words(query) or 'none'}"


def _with_old_dropped(
    client: Client, target: indexes.Index, report: PublishReport, drop_old: bool, reporter: Reporter
) -> PublishReport:
    """Delete the index that the alias served before if `drop_old`, and return the completed report."""
    stamp = indexes.check_uuid(client, target).stamp
    replaced = (stamp.replaced if stamp else None) or {}
    name, uuid = replaced.get("index", ""), replaced.get("uuid")
    # Any client can write `replaced`: it must name one index, whose own stamp names this one.
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
            f"Index {name!r} was not dropped: it is hidden, or its own _meta does not name a load that created it and "
            f"alias {report.alias!r} that moved to {target.name!r}. If it is not needed: sparse-ingest index drop "
            f"--index {name}"
        )
    elif drop_old:
        client.call("DELETE", old.path)
        return with_changes(report, previous=None, dropped=name)
    return with_changes(report, previous=name)
