"""Load a run into an index: every document once, each with an outcome, continuing where the last attempt stopped.

In: a run folder, the name of an index, a pipeline, a connection. Out: a `LoadReport`. A shard counts as loaded if its
line is in the journal for the index's UUID. Documents have ids, so loading a shard again duplicates nothing. What a
killed load leaves behind (a private alias, settings for loading, dead letters of a part of a shard) is cleaned up by
the next one.
"""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from dataclasses import replace as with_changes
from typing import Any

from sparse_ingest.cluster import indexes, installed, mappings, merging, seismic, settings_guard, settling, updates
from sparse_ingest.cluster.claim import CLEANUP_S, Claim, LostClaimError, claimed
from sparse_ingest.cluster.client import Client, ConnectionLike, ResponseError, UnreachableError, connect, connection_of
from sparse_ingest.cluster.engines import choose_engine
from sparse_ingest.cluster.journal import Journal, documents_of, loaded_shards, open_journal
from sparse_ingest.cluster.limits import check_hybrid
from sparse_ingest.cluster.pacing import Pace
from sparse_ingest.cluster.sending import Retries
from sparse_ingest.cluster.stamps import run_stamp
from sparse_ingest.errors import ClusterError, RunError, SparseIngestError, UsageError
from sparse_ingest.loading import tasks
from sparse_ingest.loading.delivery import Delivery, Operations
from sparse_ingest.loading.differences import Since
from sparse_ingest.loading.options import LoadOptions
from sparse_ingest.loading.preparation import LoadPlan, make_plan, ready_index
from sparse_ingest.pipeline import Pipeline, changed, in_words, options_from, pipeline_of
from sparse_ingest.reporting import SILENT, Reporter, reporter_of
from sparse_ingest.runs.run import Run, RunLike, open_run, refuse_incomplete


@dataclass(frozen=True)
class LoadReport:
    """Result of a load; `--json` prints these keys.

    `shards`, `documents`, `acknowledged` and `refused` count what is loaded of the run, earlier starts included;
    `loaded_shards`, `retried` (dead letters sent again) and `deleted` count this start; `unchanged` documents were not
    sent, since the index had them. `merged`: every shard is one segment; `merged_from_bytes` and `merged_to_bytes` are
    the sizes of the index before and after the merge, without replicas; all three are None if no merge was requested.
    `dead` is the path of dead.jsonl if it has any.
    """

    index: str
    uuid: str
    run_id: str
    shards: int
    loaded_shards: int
    documents: int
    acknowledged: int
    refused: int
    retried: int
    unchanged: int
    deleted: int
    merged: bool | None
    seconds: float
    journal: str
    dead: str | None
    merged_from_bytes: int | None = None
    merged_to_bytes: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as `--json` prints them."""
        return asdict(self)


def load(
    run: RunLike,
    *,
    index: str,
    url: str | None = None,
    connection: ConnectionLike | None = None,
    pipeline: Pipeline | str | None = None,
    options: LoadOptions | None = None,
    progress: Reporter | bool = False,
    retries: Retries = Retries(),  # noqa: B008 - frozen
    **settings: object,
) -> LoadReport:
    """Load the finished shards of a run that the index's journal does not have yet.

    Args:
        run: A run folder, or what `encode` or `open_run` returns.
        index: The index to load into; created if it does not exist.
        url: Where the cluster is; by default the SPARSE_INGEST_* variables name it.
        connection: A `Connection` or an `opensearchpy.OpenSearch`, instead of `url`.
        pipeline: A `Pipeline`, a pipeline file or the name of a packaged one. [index] and [load] apply unless an option
            overrides them; the index remembers [query] for searches that name no pipeline.
        options: All options in one object, instead of single keywords.
        progress: True for a tqdm bar, or a `Reporter`; silent by default.
        retries: How failed requests are sent again.
        **settings: Fields of `LoadOptions`, such as `top_k=200` or `merge=True`.

    Returns:
        What the index has of the run, and what this start did.

    Raises:
        RunError, UsageError, ClusterError: refused before work, or stopped; finished shards are kept.
        Interrupted: the reporter requested a stop.
    """
    started = time.monotonic()
    chosen, reporter = options_from(LoadOptions, options, settings, "load"), reporter_of(progress)
    indexes.refuse_long_name("--index", index, indexes.ADDED_BYTES)
    folder = open_run(run)
    _refuse_unready(folder, chosen, reporter)
    older = _older(folder, chosen)
    if chosen.async_translog:
        reporter.warn(settings_guard.ASYNC_RISK)
    full = pipeline_of(None, pipeline)
    table, fields = full.index, {**full.index.fields, **(chosen.fields or {})}
    field = table.field if chosen.field is None else chosen.field
    table = with_changes(table, field=field, kind=chosen.kind or table.kind, fields=fields)
    rules = {name: value for name, value in full.load.rules.items() if getattr(chosen, name) is None}
    chosen = with_changes(chosen, field=table.field, kind=table.kind, fields=fields, **rules)
    stamp = run_stamp(folder, table.field, chosen.pruning, changed(full.query))
    reached = connection_of(url, connection)
    tasks.refuse_clashes(chosen, reached)
    with _connected(reached, reporter) as client:
        client.dialect.check_kind(table.kind)
        # Refuse settings that no search of the index could use.
        check_hybrid(full.query, choose_engine(full.query, table.kind, client.dialect.product))
        body = mappings.index_body(table, stamp, client.dialect)
        with _alone(client, folder, index, reporter):
            plan = make_plan(client, folder, index, stamp, body, chosen, older, full.query)
            _note_applied(full, plan, reporter)
            report = _Load(client, reached, folder, plan, older, chosen, reporter, retries).finish()
    return with_changes(report, seconds=round(time.monotonic() - started, 3))


def _refuse_unready(run: Run, options: LoadOptions, reporter: Reporter) -> None:
    refuse_incomplete(run, partial=options.partial)
    if not (options.allow_empty or run.has_documents()):
        raise RunError(
            f"{run.path} has no documents to load. Check its corpus and `sparse-ingest status {run.path}`; if an index "
            "without documents is intended, pass --allow-empty."
        )
    if note := run.unchecked_vocabulary():
        reporter.note(note)


def _note_applied(pipeline: Pipeline, plan: LoadPlan, reporter: Reporter) -> None:
    """Note which pruning of the pipeline applies, and which query settings the index remembers."""
    if changed(pipeline.load):
        reporter.note(f"The pipeline prunes documents: {in_words(plan.stamp.pruning)}.")
    before = plan.there.stamp.query if plan.there and plan.there.stamp else {}
    if before or plan.stamp.query:
        words = in_words(plan.stamp.query) or "no query settings"
        reporter.note(f"Searches of index {plan.name!r} that name no pipeline use {words}.")


@dataclass(frozen=True)
class _Load:
    """A load after its checks."""

    client: Client
    connection: ConnectionLike
    run: Run
    plan: LoadPlan
    older: Since | None
    options: LoadOptions
    reporter: Reporter
    retries: Retries

    def finish(self) -> LoadReport:
        """Send the missing shards, then restore, check and merge the index."""
        client, run, plan, options = self.client, self.run, self.plan, self.options
        complete, run_id = run.complete(), run.manifest.run_id
        load_id = secrets.token_hex(8) if plan.there and plan.there.stamp else run_id
        if not run.writable:
            self.reporter.note(f"{run.path} cannot be written: its journal and lock are in {run.loads.parent}.")
        self.reporter.begin("documents", complete["rows"] if complete else None)
        target = ready_index(client, plan, self.reporter)
        settling.wait_for_primaries(client, target, self.retries)
        journal = open_journal(run, client.cluster_uuid, target.uuid)
        journal.recount()
        dead = sorted(loaded_shards(run, journal).keys() & journal.refused().keys()) if options.retry_dead else []
        wanted = settings_guard.LOADING | (settings_guard.ASYNC_TRANSLOG if options.async_translog else {})
        if not plan.missing or not (options.tune or settings_guard.may_tune(target, run_id)):
            wanted = {}
        with (
            claimed(client, target, plan.stamp, load_id, journal, self.reporter) as claim,
            _settings(claim, wanted, finished=run_id if complete else None) as confirms_early,
        ):
            durability = settling.Durability(client, target) if confirms_early else None
            operations, pace = self._operations(target), Pace(max_rate=options.max_rate)
            delivery = Delivery(claim, operations, pace, self.retries, durability)
            earlier = sum(map(documents_of, loaded_shards(run, journal).values()))
            run_on = tasks.run_on(self.connection, delivery, options)
            delivery.load_shards(plan.missing, earlier, self.reporter, run_on)
            retried = sum(map(delivery.retry_dead, dead))
            deleted = self._delete_missing(delivery)
            report = _report(run, target, journal, len(plan.missing), retried, deleted)
            _compare_counts(claim, run, report, self.retries)
            if options.merge:
                report = self._merged(report, target, journal)
            if options.kind == "sparse_vector" and (message := seismic.warm_up(client, target)):
                self.reporter.note(message)
        return report

    def _merged(self, report: LoadReport, target: indexes.Index, journal: Journal) -> LoadReport:
        """Merge the index, and return the report with the result."""
        done = merging.merge(self.client, target, self.reporter, journal.merged())
        if done.undone:
            self.reporter.note(done.undone)
        if done.state is not None:
            journal.record_merged(done.state)
        merged = done.undone is None
        return with_changes(report, merged=merged, merged_from_bytes=done.from_bytes, merged_to_bytes=done.to_bytes)

    def _operations(self, target: indexes.Index) -> Operations:
        """Return what is sent for the shards of a run, in the format that the index needs."""
        plan = self.plan
        field, pruning = plan.stamp.field, plan.stamp.pruning
        operation = updates.operation_for(target, field, self.client.dialect) if plan.update else "index"
        vocabulary, tokens = self.run.vocabulary(), plan.stamp.tokens
        writer = mappings.document_writer(target.mappings, field, vocabulary, operation, tokens)
        changes = self.older.changes if self.older and plan.missing else None
        return Operations(self.run, writer, pruning, plan.update, changes)

    def _delete_missing(self, delivery: Delivery) -> int:
        """Delete the documents that only the older run has, and return their number."""
        older, there, claim = self.older, self.plan.there, delivery.claim
        if not (older and there and older.deletes(there)):
            return 0
        deleted = delivery.delete(older.changes.missing_ids())
        # The index may have the old version of a document whose new version it refused.
        if not claim.journal.refused():
            indexes.update_stamp(self.client, claim.index, older.deleted)
            claim.stamp = older.deleted(claim.stamp)
        return deleted


def _older(run: Run, options: LoadOptions) -> Since | None:
    """Return the load of differences for `--since`, or None. Raise `UsageError` for options that exclude each other."""
    if options.from_scratch and not options.replace:
        raise UsageError("--from-scratch needs --replace: pass both to delete the index and start over.")
    if options.replace and (options.update or options.since):
        raise UsageError("--replace deletes what --update and --since change. Pass only one of them.")
    if options.update and options.fields:
        raise UsageError("--map is for kept fields; --update sends vectors alone. Omit --map.")
    if options.delete_missing and options.update:
        raise UsageError("--delete-missing would delete the documents of other clients that --update changes. Omit it.")
    if options.since is None:
        if options.delete_missing:
            raise UsageError("--delete-missing needs --since OLD_RUN: only documents of that run may be deleted.")
        return None
    return Since(open_run(options.since), run, options.delete_missing, options.update)


def restore_settings(
    index: str,
    *,
    run: RunLike | None = None,
    url: str | None = None,
    connection: ConnectionLike | None = None,
    progress: Reporter | bool = False,
) -> list[str]:
    """Restore the index settings that a killed load left changed, and return their names. Needs no run.

    Args:
        index: The index.
        run: If another client has removed the old values from `_meta`, those in the journal of this run are used.
        url: Where the cluster is; by default the SPARSE_INGEST_* variables name it.
        connection: A `Connection` or an `opensearchpy.OpenSearch`, instead of `url`.
        progress: True for notes on stderr, or a `Reporter`; silent by default.

    Raises:
        ClusterError: the index does not exist or refuses, or the old values are unknown.
    """
    reporter = reporter_of(progress)
    with _connected(connection_of(url, connection), reporter) as client:
        there = indexes.need_index(client, index, "Check --index and --url.")
        if run is None:
            indexes.refuse_unreadable(there)
        for note in indexes.note_on_settings(there):
            reporter.note(note)
        journal = None if run is None else open_journal(open_run(run), client.cluster_uuid, there.uuid)
        restored = settings_guard.restore(client, there, reporter, journal=journal)
        if there.stamp is None and not restored and there.setting("refresh_interval") == "-1":
            raise ClusterError(
                f"Index {there.name!r} does not refresh (refresh_interval is -1), and _meta has no old settings. Name "
                f"the run, whose journal has them: sparse-ingest load RUN --index {there.name} --restore. Or set them "
                f"yourself: PUT /{there.name}/_settings."
            )
        return restored


@contextlib.contextmanager
def _connected(connection: ConnectionLike, reporter: Reporter) -> Iterator[Client]:
    """Connect to a cluster that has started."""
    with connect(connection, reporter=reporter) as client:
        if client.cluster_uuid == "_na_":
            raise ClusterError(f"{client.address} has not finished starting. Wait until it is green or yellow.")
        yield client


@contextlib.contextmanager
def _alone(client: Client, run: Run, index: str, reporter: Reporter) -> Iterator[None]:
    """Lock out other loads of this run into this index."""
    there = indexes.find_index(client, index)
    name = there.name if there else index
    key = hashlib.sha256(f"{client.cluster_uuid} {name}".encode()).hexdigest()[:16]
    with run.lock(f"load-{key}", reporter) as held:
        if not held:
            raise RunError(f"Another process is loading {run.path} into {name!r}. Wait until it has finished.")
        yield


@contextlib.contextmanager
def _settings(claim: Claim, wanted: Mapping[str, str], *, finished: str | None) -> Iterator[bool]:
    """Apply the wanted settings for the block, then restore the old ones; yield whether writes are confirmed early.

    Without any wanted, restore what an earlier load left changed. At the end mark the load of run `finished` as done.
    """
    client, index, reporter, journal = claim.client, claim.index, claim.reporter, claim.journal
    try:
        if wanted:
            settings_guard.tune(client, index, wanted, reporter, journal)
        else:
            try:
                settings_guard.restore(client, index, reporter, journal=journal)
            except ClusterError as error:  # a role without this right can still load
                reporter.note(str(error))
        yield claim.check().setting("translog.durability") == "async"
        claim.check()
    except BaseException as error:
        if wanted and not _restore_after(claim, error):
            reporter.note(
                f"Index {index.name!r} keeps its settings for loading ({', '.join(sorted(wanted))}) until the next "
                f"load, or `sparse-ingest load RUN --index {index.name} --restore`, restores the old ones."
            )
        raise
    settings_guard.restore(client, index, reporter, finished=finished, journal=journal)
    if finished:
        claim.stamp = with_changes(claim.stamp, load="done")
    claim.check()


def _restore_after(claim: Claim, stopped_by: BaseException) -> bool:
    """Restore the settings after a load has failed. Return whether it was possible."""
    if isinstance(stopped_by, UnreachableError):
        return False
    try:
        claim.client.call("GET", claim.index.path, timeout_s=CLEANUP_S)
        if isinstance(stopped_by, LostClaimError):
            return not settings_guard.give_up(claim.client, claim.index, claim.journal)
        claim.check()
        settings_guard.restore(claim.client, claim.index, SILENT, journal=claim.journal)
    except SparseIngestError as error:
        # A deleted index keeps nothing.
        return isinstance(error, ResponseError) and error.status == 404
    return True


def _report(run: Run, index: indexes.Index, journal: Journal, loaded: int, retried: int, deleted: int) -> LoadReport:
    lines = loaded_shards(run, journal)
    documents, refused = sum(map(documents_of, lines.values())), sum(journal.refused().values())
    return LoadReport(
        index=index.name,
        uuid=index.uuid,
        run_id=run.manifest.run_id,
        shards=len(lines),
        loaded_shards=loaded,
        documents=documents,
        acknowledged=documents - refused,
        refused=refused,
        retried=retried,
        unchanged=documents - sum(line["rows"] for line in lines.values()),
        deleted=deleted,
        merged=None,
        seconds=0.0,
        journal=str(journal.dead_path.parent),
        dead=str(journal.dead_path) if refused else None,
    )


def _compare_counts(claim: Claim, run: Run, report: LoadReport, retries: Retries) -> None:
    """Refresh, and raise `ClusterError` if the index has another number of documents than this run, alone in it."""
    client, index = claim.client, claim.index
    settling.patiently(lambda: indexes.refresh(client, index), retries, client.waiting)
    stamp = claim.check().stamp
    if stamp is None or stamp.only_run != run.manifest.run_id:
        return
    found = settling.patiently(lambda: indexes.count_documents(client, index), retries, client.waiting)
    if found != report.acknowledged:
        why = "Another client wrote or deleted there"
        if name := installed.final_pipeline(index):
            why = f"Its final pipeline {name!r} (index.final_pipeline) may drop or rename documents"
        if not run.complete():
            why += ", or the unfinished run has duplicate ids, which `sparse-ingest encode` fixes at its end"
        raise ClusterError(
            f"Index {index.name!r} has {found} documents, but {report.acknowledged} of this run were "
            f"acknowledged. {why}; `sparse-ingest verify` names what is missing, --replace --from-scratch starts over."
        )
