"""Send shards of a load in other processes, such as tasks of Ray.

In: what all of them need, which can be pickled, and shards. Out: what the index answered. Journal, lock, alias and
settings of the index are not touched here: the process that started the load writes them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sparse_ingest.cluster import installed
from sparse_ingest.cluster.client import ConnectionLike, connect, for_other_processes
from sparse_ingest.cluster.connection import Connection
from sparse_ingest.cluster.pacing import Pace
from sparse_ingest.cluster.sending import Retries, send
from sparse_ingest.errors import UsageError
from sparse_ingest.executors.local import Worker
from sparse_ingest.executors.tasks import tasks_of_ray
from sparse_ingest.loading.delivery import Delivery, Operations, Sent
from sparse_ingest.loading.options import LoadOptions
from sparse_ingest.records import Refusal
from sparse_ingest.reporting import Reporter
from sparse_ingest.runs.run import open_run


@dataclass(frozen=True)
class Sending:
    """What a process needs to send shards. `max_rate` is of all processes together, in documents/s."""

    connection: Connection
    operations: Operations
    alias: str
    final_pipeline: str | None
    max_rate: float | None
    retries: Retries


def refuse_clashes(options: LoadOptions, connection: ConnectionLike) -> None:
    """Raise `UsageError` for options that need Ray, or that its tasks cannot have."""
    options.refuse_without_ray()
    if options.executor == "ray" and options.since:
        raise UsageError("--since compares two runs in one process. Omit --executor ray.")
    if options.executor == "ray":
        for_other_processes(connection)


def run_on(connection: ConnectionLike, delivery: Delivery, options: LoadOptions) -> Callable[..., None] | None:
    """Return the function that sends groups of shards in tasks of Ray, or None if this process sends them."""
    if options.executor != "ray":
        return None
    claim, operations = delivery.claim, delivery.operations
    sending = Sending(
        for_other_processes(connection),
        replace(operations, run=open_run(operations.run.path)),  # without locks and scratch folders
        claim.alias,
        final_pipeline=installed.final_pipeline(claim.index),
        max_rate=options.max_rate,
        retries=delivery.retries,
    )
    kept = f"the index {claim.index.name!r} keeps the finished shards. Run the same command again to continue."

    def send_in_tasks(
        groups: Callable[[], Sequence[range]], *, done: Callable[[Any], None], reporter: Reporter
    ) -> None:
        with tasks_of_ray(replace(options, worker_gpus=0), does="sends", kept=kept, reporter=reporter) as run_on:
            run_on(build_sender, (sending,), groups, done=done)

    return send_in_tasks


def build_sender(worker: Worker, sending: Sending, reporter: Reporter) -> Callable[[range], list[Sent]]:
    """Connect to the cluster, and return the function that sends shards with the pace of this process."""
    client = connect(sending.connection, reporter=reporter)
    run = open_run(sending.operations.run.path)  # an error if this machine does not see it
    operations = replace(sending.operations, run=run)
    pace = Pace(max_rate=sending.max_rate and sending.max_rate / worker.processes)

    def send_shards(shards: range) -> list[Sent]:
        return [send_shard(shard) for shard in shards]

    def send_shard(shard: int) -> Sent:
        began, rows = time.monotonic(), 0
        refused: list[Refusal] = []
        requests = operations.requests(shard, max_bytes=pace.max_bytes)
        how: dict[str, Any] = {"pace": pace, "retries": sending.retries, "final_pipeline": sending.final_pipeline}
        for outcome in send(client, requests, target=sending.alias, **how):
            rows += outcome.documents
            refused += outcome.refused
            reporter.advance(outcome.documents)
        return Sent(shard, rows, refused, time.monotonic() - began)

    return send_shards
