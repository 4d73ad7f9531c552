"""Load a run into an index: every document once, each with an outcome, from where the last attempt stopped.

In: a run folder, the name of an index, a pipeline, a connection. Out: a `LoadReport`. A shard counts as loaded when
its line is in the journal for the index's UUID; documents have ids, so loading a shard again doubles nothing. What a
killed load leaves behind (an alias of its own, settings for loading, dead letters of half a shard) is put right by
the next one.
Not covered: which operations a shard becomes (operations.py), their way (delivery.py), the alias that searches use
(publish.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from dataclasses import replace as with_changes
from typing import TypedDict
from urllib.parse import quote

from sparse_ingest.cluster import indexes, mappings, seismic, settings_guard, settling, updates
from sparse_ingest.cluster.bodies import BodyWriter
from sparse_ingest.cluster.client import Client, Connection, ResponseError, UnreachableError, connect
from sparse_ingest.cluster.journal import Journal, documents_of, loaded_shards, open_journal
from sparse_ingest.cluster.pacing import Pace
from sparse_ingest.cluster.sending import BLOCKED, Retries
from sparse_ingest.errors import ClusterError, RunError, UsageError
from sparse_ingest.loading.delivery import Delivery
from sparse_ingest.loading.operations import ChangedDocuments, Operations, WholeDocuments
from sparse_ingest.loading.preparation import Plan, make_plan, ready_index
from sparse_ingest.loading.since import Since
from sparse_ingest.pipeline import Pipeline
from sparse_ingest.runs.run import Run, open_run, refuse_incomplete
from sparse_ingest.storage.places import Place

Note = Callable[[str], None]


@dataclass(frozen=True)
class LoadReport:
    """What a load did; `--json` prints these keys.

    `shards`, `documents`, `acknowledged` and `refused` count what is loaded of the run, earlier starts included;
    `loaded_shards`, `retried` (dead letters sent again) and `deleted` count this start; `unchanged` documents were not
    sent, since the index held them. `merged` says whether every shard is one
    segment now, None when nobody asked. `dead` is the path of dead.jsonl while it holds any.
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


class LoadOptions(TypedDict, total=False):
    """The options of `load`, for those that pass them on."""

    replace: bool
    from_scratch: bool
    partial: bool
    tune: bool
    async_translog: bool
    merge: bool
    retry_dead: bool
    update: bool
    since: Place | None
    delete_missing: bool
    max_rate: float | None
    top_k: int | None
    max_ratio: float | None
    alpha_mass: float | None
    progress: Callable[[int], None]
    note: Note
    stop: Callable[[], bool]
    retries: Retries


def load(
    run_path: Place,
    *,
    index: str,
    pipeline: Pipeline,
    connection: Connection,
    replace: bool = False,
    from_scratch: bool = False,
    partial: bool = False,
    tune: bool = False,
    async_translog: bool = False,
    merge: bool = False,
    retry_dead: bool = False,
    update: bool = False,
    since: Place | None = None,
    delete_missing: bool = False,
    max_rate: float | None = None,
    top_k: int | None = None,
    max_ratio: float | None = None,
    alpha_mass: float | None = None,
    progress: Callable[[int], None] = lambda documents: None,
    note: Note = lambda sentence: None,
    stop: Callable[[], bool] = lambda: False,
    retries: Retries = Retries(),  # noqa: B008 - frozen
) -> LoadReport:
    """Load the finished shards of a run that the index's journal does not have yet.

    Args:
        replace: delete the index first, unless it is an unfinished load of this very run.
        from_scratch: with `replace`, delete that one too.
        partial: load a run that is not complete.
        tune: change settings for the load also on an index that others made or that an alias serves.
        async_translog: let the server confirm before its disk has it; see settings_guard.py for what that risks.
        merge: merge every shard into one segment at the end.
        retry_dead: send the documents again that OpenSearch refused.
        update: add the vector to documents that exist, and leave the rest of them alone.
        since: send only what differs from this run, which the index holds.
        delete_missing: with `since`, delete the documents of that run that this one lacks.
        max_rate: documents a second at most.
        top_k, max_ratio, alpha_mass: leave terms out, by the rules of pruning.py.
        progress: called with the number of documents that have an outcome, those of earlier attempts included.
        note: called with sentences that a user should read.
        stop: asked after each shard; true ends the load there.

    Raises:
        RunError, UsageError, ClusterError: refused before work, or stopped; what was finished is kept.
        Interrupted: `stop` said so.
    """
    started = time.monotonic()
    run = open_run(run_path)
    refuse_incomplete(run, partial=partial)
    if from_scratch and not replace:
        raise UsageError("--from-scratch belongs to --replace: give both to delete the index and begin anew.")
    older = _older(run, since, replace=replace, update=update, delete_missing=delete_missing)
    # Indexes and journals of earlier releases do not know alpha_mass.
    pruning = {"top_k": top_k, "max_ratio": max_ratio} | ({} if alpha_mass is None else {"alpha_mass": alpha_mass})
    stamp = indexes.run_stamp(run, pipeline.index.field, pruning)
    body = mappings.index_body(pipeline.index, stamp)
    wanted = settings_guard.LOADING | (settings_guard.ASYNC_TRANSLOG if async_translog else {})
    if async_translog:
        note(settings_guard.ASYNC_RISK)
    kind, vocabulary, run_id = pipeline.index.kind, run.vocabulary(), run.manifest.run_id
    mappings.check_vocabulary(kind, vocabulary)
    with _connected(connection, index) as client:
        mappings.check_version(kind, client.version)
        with _alone(client, run, index):
            how = {"replace": replace, "from_scratch": from_scratch, "update": update}
            plan = make_plan(client, run, index, stamp, body, kind, since=older, **how)
            target = ready_index(client, plan, note)
            journal = open_journal(run.loads, client.cluster_uuid, target.uuid)
            journal.recount()
            dead = sorted(loaded_shards(run, journal).keys() & journal.refused().keys()) if retry_dead else []
            if not plan.missing or not (tune or settings_guard.may_tune(target, run_id)):
                wanted = {}
            with (
                _private_alias(client, target, run_id) as alias,
                _settings(client, target, wanted, note, finished=run_id if run.complete() else None) as confirms_early,
            ):
                operations = _operations(run, target, plan, older if plan.missing else None)
                durability = settling.Durability(client, target) if confirms_early else None
                pace = Pace(max_rate=max_rate)
                delivery = Delivery(client, target, alias, run, journal, operations, pace, retries, durability)
                earlier = sum(map(documents_of, loaded_shards(run, journal).values()))
                delivery.load_shards(plan.missing, earlier, progress, stop)
                retried = sum(map(delivery.retry_dead, dead))
                deleted = 0
                if older and plan.there and older.deletes(plan.there):
                    deleted = delivery.delete(older.changes.missing_ids())
                    # A document that was refused as it is now may still be there as it was.
                    if not journal.refused():
                        indexes.update_stamp(client, target, older.deleted)
                report = _report(run, target, journal, len(plan.missing), retried, deleted)
                _compare_counts(client, run, target, report, retries)
                merged = _merged(client, target, note) if merge else None
                if kind == "sparse_vector" and (sentence := seismic.warm_up(client, target)):
                    note(sentence)
    return with_changes(report, merged=merged, seconds=round(time.monotonic() - started, 3))


def _operations(run: Run, target: indexes.Index, plan: Plan, older: Since | None) -> Operations:
    """What is sent for the shards of a run, in the words of the index that is there now."""
    field, pruning = plan.stamp.field, plan.stamp.pruning
    wire = mappings.wire(target.mappings, field, run.vocabulary())
    writer = BodyWriter(
        wire.keys,
        field,
        spelling=wire.spelling,
        operation=updates.operation_for(target, field) if plan.update else "index",
        empty_field=wire.empty_field,
    )
    if older:
        return ChangedDocuments(run, writer, pruning, plan.update, changes=older.changes)
    return WholeDocuments(run, writer, pruning, plan.update)


def _older(run: Run, since: Place | None, *, replace: bool, update: bool, delete_missing: bool) -> Since | None:
    """The run whose differences are sent, if that is asked for.

    Raises:
        UsageError: options that exclude each other.
    """
    if replace and (update or since):
        raise UsageError("--replace deletes what --update and --since build on. Leave it out, or leave them out.")
    if delete_missing and since is None:
        raise UsageError(
            "--delete-missing belongs to --since OLD_RUN: that run says which documents were there before. Without it, "
            "those that others wrote would be deleted too."
        )
    if delete_missing and update:
        raise UsageError("--update is for documents that others made; --delete-missing would delete them. Give one.")
    return Since(open_run(since), run, delete_missing, update) if since else None


def restore_settings(index: str, *, connection: Connection, note: Note = lambda sentence: None) -> list[str]:
    """Put back the settings that a load has left changed; their names. Needs no run.

    Raises:
        ClusterError: there is no such index, or it refuses.
    """
    with _connected(connection, index) as client:
        there = indexes.find_index(client, index)
        if there is None:
            raise ClusterError(f"There is no index {index!r}. Check --index and --url.")
        return settings_guard.restore(client, there, note)


@contextlib.contextmanager
def _connected(connection: Connection, index: str) -> Iterator[Client]:
    """A client of a cluster that has started; a block on the index is told from a missing right."""
    with contextlib.closing(connect(connection)) as client:
        if client.cluster_uuid == "_na_":
            raise ClusterError(f"{client.address} has not finished starting. Wait until it is green or yellow.")
        try:
            yield client
        except ResponseError as error:
            if error.kind != BLOCKED:
                raise
            raise ClusterError(
                f"Index {index!r} takes no changes: {error.reason} Remove the block (a full disk, or one that somebody "
                "set), then start the same command again: it goes on where this one stopped."
            ) from error


@contextlib.contextmanager
def _alone(client: Client, run: Run, index: str) -> Iterator[None]:
    """Keep out other loads of this run into this index."""
    there = indexes.find_index(client, index)
    name = there.name if there else index
    key = hashlib.sha256(f"{client.cluster_uuid} {name}".encode()).hexdigest()[:16]
    with run.lock(f"load-{key}") as held:
        if not held:
            raise RunError(f"Another process is loading {run.path} into {name!r}. Wait until it has finished.")
        yield


@contextlib.contextmanager
def _private_alias(client: Client, index: indexes.Index, run_id: str) -> Iterator[str]:
    alias = indexes.add_private_alias(client, index, run_id)
    try:
        yield alias
    finally:
        # An alias that stays behind does no harm, and a failing load must not fail twice or wait long.
        with contextlib.suppress(ClusterError):
            indexes.remove_alias(client, index, alias, timeout_s=5)


@contextlib.contextmanager
def _settings(
    client: Client, index: indexes.Index, wanted: Mapping[str, str], note: Note, *, finished: str | None
) -> Iterator[bool]:
    """The index with settings for loading, and afterwards with its own; yields whether it confirms writes early.

    Without any wanted, what an earlier load left changed is put back first. At the end the stamp says
    that the load of the run `finished` is.
    """
    try:
        if wanted:
            settings_guard.tune(client, index, wanted, note)
        else:
            _put_back_earlier(client, index, note)
        yield settings_guard.confirms_early(indexes.check_uuid(client, index))
    except BaseException as error:
        if wanted and not _put_back(client, index, error):
            note(
                f"Index {index.name!r} keeps its settings for loading ({', '.join(sorted(wanted))}) until the next "
                f"load puts them back, or `sparse-ingest load --index {index.name} --restore` does."
            )
        raise
    settings_guard.restore(client, index, note, finished=finished)


def _put_back_earlier(client: Client, index: indexes.Index, note: Note) -> None:
    """Put back what an earlier load has left; a role that may not do it can load all the same."""
    try:
        settings_guard.restore(client, index, note)
    except ClusterError as error:
        note(str(error))


def _put_back(client: Client, index: indexes.Index, stopped_by: BaseException) -> bool:
    """Put the settings back when a load has failed; whether it was possible."""
    if isinstance(stopped_by, UnreachableError):
        return False
    try:
        # A cluster that hangs must not hold up Ctrl-C.
        client.call("GET", f"/{quote(index.name, safe='')}", timeout_s=5)
        settings_guard.restore(client, index, lambda sentence: None)
    except ResponseError as error:
        # An index that is gone keeps nothing.
        return error.status == 404
    except ClusterError:
        return False
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


def _compare_counts(client: Client, run: Run, index: indexes.Index, report: LoadReport, retries: Retries) -> None:
    """Refresh, and stop when the index holds more or less than this run's documents, and nobody else's are there."""
    settling.patiently(lambda: indexes.refresh(client, index), retries)
    stamp = indexes.check_uuid(client, index).stamp
    if stamp is None or stamp.only_run != run.manifest.run_id:
        return
    found = settling.patiently(lambda: indexes.count_documents(client, index), retries)
    if found != report.acknowledged:
        why = "Somebody else wrote or deleted there"
        if not run.complete():
            why += ", or ids stand twice in the run, which `sparse-ingest encode` mends when it finishes it"
        raise ClusterError(
            f"Index {index.name!r} holds {found} documents, but {report.acknowledged} of this run were "
            f"acknowledged. {why}; `sparse-ingest verify` names what is missing, --replace --from-scratch loads anew."
        )


def _merged(client: Client, index: indexes.Index, note: Note) -> bool:
    undone = settling.merge(client, index, note)
    if undone:
        note(undone)
    return undone is None
