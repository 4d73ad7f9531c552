"""Load a run into an index: every document once, each with an outcome, from where the last attempt stopped.

In: a run folder, the name of an index, a pipeline, a connection. Out: a `LoadReport`. A shard counts as loaded when
its line is in the journal for the index's UUID; documents have ids, so loading a shard again doubles nothing.
Not covered: index settings during the load, serving aliases, dead letters sent again.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from dataclasses import replace as with_changes
from pathlib import Path

from sparse_ingest.errors import ClusterError, Interrupted, RunError, UsageError
from sparse_ingest.opensearch import indexes
from sparse_ingest.opensearch.bodies import BodyWriter, bulk_requests, refuse_clash
from sparse_ingest.opensearch.client import Client, Connection, connect
from sparse_ingest.opensearch.journal import DeadLetter, Journal, open_journal
from sparse_ingest.opensearch.sending import Retries, send
from sparse_ingest.pipeline import Pipeline
from sparse_ingest.records import Outcome
from sparse_ingest.runs.manifest import Run, open_run
from sparse_ingest.runs.shards import ShardPart, read_shard


@dataclass(frozen=True)
class LoadReport:
    """What a load did. `acknowledged` and `refused` count all shards of the run, `loaded_shards` those of this call."""

    index: str
    uuid: str
    run_id: str
    shards: int
    loaded_shards: int
    documents: int
    acknowledged: int
    refused: int
    seconds: float
    journal: str
    dead: str | None


def load(
    run_path: Path,
    *,
    index: str,
    pipeline: Pipeline,
    connection: Connection,
    replace: bool = False,
    from_scratch: bool = False,
    partial: bool = False,
    progress: Callable[[int], None] = lambda documents: None,
    stop: Callable[[], bool] = lambda: False,
    retries: Retries = Retries(),  # noqa: B008 - frozen
) -> LoadReport:
    """Load the finished shards of a run that the index's journal does not have yet.

    Args:
        replace: delete the index first, unless it is an unfinished load of this very run.
        from_scratch: with `replace`, delete that one too.
        partial: load a run that is not complete.
        progress: called with the number of documents that have an outcome, those of earlier attempts included.
        stop: asked after each shard; true ends the load there.

    Raises:
        RunError, UsageError, ClusterError: refused before work, or stopped; what was finished is kept.
        Interrupted: `stop` said so.
    """
    started = time.monotonic()
    run = open_run(run_path)
    refuse_incomplete(run, partial)
    if from_scratch and not replace:
        raise UsageError("--from-scratch belongs to --replace: give both to delete the index and begin anew.")
    stamp = run_stamp(run, pipeline.index.field)
    body = indexes.index_body(pipeline.index, stamp)
    writer = BodyWriter(run.vocabulary(), stamp.field)
    _refuse_clash_up_front(run, stamp.field)
    client = connect(connection)
    with contextlib.closing(client):
        target, stamp = _prepare_index(client, index, stamp, body, replace=replace, from_scratch=from_scratch)
        journal = open_journal(run.path, client.cluster_uuid, target.uuid)
        with run.lock(f"load-{target.uuid}") as held:
            if not held:
                raise RunError(
                    f"Another process is loading {run.path} into {target.name!r}. Wait until it has finished."
                )
            with _private_alias(client, target, run.manifest.run_id) as alias:
                shards = _ShardLoader(client, target, alias, journal, writer, retries)
                loaded = _load_shards(run, shards, progress, stop)
            report = _report(run, target, journal, loaded, started)
            _finish(client, run, target, stamp, report)
    return with_changes(report, seconds=round(time.monotonic() - started, 3))


def refuse_incomplete(run: Run, partial: bool) -> None:
    """Refuse a run without complete.json.

    Raises:
        RunError: it has none, and `partial` is false.
    """
    if run.complete() is None and not partial:
        raise RunError(
            f"{run.path} is not complete: {len(run.done_shards())} shards are finished, complete.json is missing. "
            "Finish it with the same `sparse-ingest encode` command, or load what is there with --partial."
        )


def run_stamp(run: Run, field: str) -> indexes.Stamp:
    """What an index that this run's load creates is stamped with."""
    run_id = run.manifest.run_id
    vocabulary_sha256 = indexes.vocabulary_hash(run.vocabulary())
    return indexes.Stamp(run.manifest.model, vocabulary_sha256, field, run_id, created_by=run_id, runs=(run_id,))


def loaded_shards(run: Run, journal: Journal) -> dict[int, dict[str, int]]:
    """The journal's lines of the shards that are loaded as they are now.

    When one was made anew since then, none counts: a row that it lost may have replaced another shard's document.
    """
    lines = journal.finished()
    current = {shard: (run.done(shard) or {}).get("sha256") for shard in run.done_shards()}
    if any(current.get(shard) != line["sha256"] for shard, line in lines.items()):
        return {}
    return {shard: lines[shard] for shard in current if shard in lines}


def _refuse_clash_up_front(run: Run, field: str) -> None:
    """The documents of a run carry the same fields: the first ones tell before anything is sent or created."""
    for shard in run.done_shards()[:1]:
        for part in read_shard(run.shard_path(shard)):
            for carried in part.fields:
                refuse_clash(carried, field)
            break


def _prepare_index(
    client: Client, name: str, stamp: indexes.Stamp, body: dict[str, object], *, replace: bool, from_scratch: bool
) -> tuple[indexes.Index, indexes.Stamp]:
    """The index to load into, created, replaced or checked, and the stamp that it has now."""
    there = indexes.find_index(client, name)
    if there is not None and replace:
        if there.name != name:
            raise UsageError(
                f"--replace deletes an index, but {name!r} is an alias of {there.name!r}. Name the index itself."
            )
        begun = there.stamp
        unfinished = begun is not None and begun.run_id == stamp.run_id and begun.load == "loading"
        if from_scratch or not unfinished:
            indexes.delete_index(client, there)
            there = None
    if there is None:
        return indexes.create_index(client, name, body), stamp
    indexes.check_fits(there, stamp)
    stamp = indexes.continued_stamp(there.stamp, stamp)
    if there.stamp != stamp:
        indexes.stamp_index(client, there, stamp)
    return there, stamp


@contextlib.contextmanager
def _private_alias(client: Client, index: indexes.Index, run_id: str) -> Iterator[str]:
    alias = indexes.add_private_alias(client, index, run_id)
    try:
        yield alias
    finally:
        # An alias that stays behind does no harm, and a failing load must not fail twice or wait long.
        with contextlib.suppress(ClusterError):
            indexes.remove_alias(client, index, alias, timeout_s=5)


@dataclass(frozen=True)
class _ShardLoader:
    """Where and how the shards of one load are sent."""

    client: Client
    index: indexes.Index
    alias: str
    journal: Journal
    writer: BodyWriter
    retries: Retries

    def outcomes(self, parts: Iterable[ShardPart]) -> Iterator[Outcome]:
        """Send the documents of a shard; one outcome each."""
        requests = bulk_requests(
            document
            for part in parts
            for document in zip(
                part.rows.tolist(), part.vectors.doc_ids, self.writer.operations(part.vectors, part.fields), strict=True
            )
        )
        yield from send(self.client, requests, target=self.alias, retries=self.retries)


def _load_shards(run: Run, loader: _ShardLoader, progress: Callable[[int], None], stop: Callable[[], bool]) -> int:
    """Load what the journal does not have; the number of shards loaded."""
    earlier = loaded_shards(run, loader.journal)
    documents = sum(line["rows"] for line in earlier.values())
    progress(documents)
    missing = [shard for shard in run.done_shards() if shard not in earlier]
    for count, shard in enumerate(missing):
        if stop():
            raise Interrupted(f"Stopped after {count} shards; the same command continues with shard {shard}.")
        documents = _load_shard(run, loader, shard, documents, progress)
    return len(missing)


def _load_shard(run: Run, loader: _ShardLoader, shard: int, documents: int, progress: Callable[[int], None]) -> int:
    """Load one shard and write its journal line; the number of documents that have an outcome now."""
    started, before = time.monotonic(), documents
    record = run.done(shard) or {}
    dead: list[DeadLetter] = []
    loader.journal.begin(shard)
    for outcome in loader.outcomes(read_shard(run.shard_path(shard))):
        if outcome.reason is not None:
            dead.append(DeadLetter(outcome.doc_id, shard, outcome.row, outcome.status, outcome.reason))
        documents += 1
        if documents % 256 == 0:
            progress(documents)
    progress(documents)
    rows = documents - before
    if rows != record.get("rows"):
        raise RunError(
            f"{run.shard_path(shard)} holds {rows} documents, its file in done/ says {record.get('rows')}. "
            "The run is damaged: delete that file and encode again."
        )
    indexes.check_uuid(loader.client, loader.index)
    line = {"rows": rows, "acknowledged": rows - len(dead), "refused": len(dead), "sha256": record.get("sha256")}
    loader.journal.finish(shard, {**line, "seconds": round(time.monotonic() - started, 3)}, dead)
    return documents


def _report(run: Run, index: indexes.Index, journal: Journal, loaded: int, started: float) -> LoadReport:
    lines = loaded_shards(run, journal)
    refused = sum(1 for _ in journal.dead())
    return LoadReport(
        index=index.name,
        uuid=index.uuid,
        run_id=run.manifest.run_id,
        shards=len(lines),
        loaded_shards=loaded,
        documents=sum(line["rows"] for line in lines.values()),
        acknowledged=sum(line["acknowledged"] for line in lines.values()),
        refused=refused,
        seconds=time.monotonic() - started,
        journal=str(journal.dead_path.parent),
        dead=str(journal.dead_path) if refused else None,
    )


def _finish(client: Client, run: Run, index: indexes.Index, stamp: indexes.Stamp, report: LoadReport) -> None:
    """Refresh, compare counts, and mark the load as done, unless shards of the run are still to come."""
    indexes.refresh(client, index)
    if stamp.only_run == run.manifest.run_id:
        found = indexes.count_documents(client, index)
        if found != report.acknowledged:
            raise ClusterError(
                f"Index {index.name!r} holds {found} documents, but {report.acknowledged} of this run were "
                "acknowledged. Somebody else wrote or deleted there; `sparse-ingest verify` names what is missing, "
                "--replace --from-scratch loads anew."
            )
    if run.complete() is not None:
        indexes.stamp_index(client, index, with_changes(stamp, load="done"))
