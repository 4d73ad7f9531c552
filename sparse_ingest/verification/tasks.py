"""Compare the shards of a run with an index in other processes, such as tasks of Ray.

In: shards. Out: what `BothSides` compares with the ids and postings of the index, which the process that started the
verification reads alone; or a report for each group of shards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple, TypeAlias

import numpy as np

from sparse_ingest.cluster import indexes
from sparse_ingest.cluster.client import connect
from sparse_ingest.cluster.connection import Connection
from sparse_ingest.executors.local import Worker
from sparse_ingest.executors.tasks import tasks_of_ray
from sparse_ingest.reporting import Reporter
from sparse_ingest.runs.run import open_run
from sparse_ingest.verification.comparison import BothSides, VerifyReport, check_sample, checker_of
from sparse_ingest.verification.loaded import Loaded, RunPart
from sparse_ingest.verification.options import VerifyOptions

TASK_ROWS = 200_000  # compared in one task: 28 bytes each come back
RunOn: TypeAlias = Callable[..., None]  # as `tasks_of_ray` yields it


class Target(NamedTuple):
    """The field of an index that is compared."""

    connection: Connection
    name: str
    field: str


@contextmanager
def run_on(options: VerifyOptions, reporter: Reporter) -> Iterator[RunOn | None]:
    """Yield the function that works in tasks of Ray in the block, or None if this process works alone."""
    if options.executor != "ray":
        yield None
        return
    kept = "what was compared is not kept. Run the same command again."
    with tasks_of_ray(replace(options, worker_gpus=0), does="compares", kept=kept, reporter=reporter) as found:
        yield found


def add_run(sides: BothSides, run_on: RunOn | None, *, weights: bool) -> None:
    """Add all documents of the run to those of the index, without `weights` only their ids."""
    loaded = sides.loaded
    if run_on:
        run_on(build_reader, (_portable(loaded), weights), lambda: _groups(loaded), done=sides.add)
    else:
        for part in loaded.parts(range(len(loaded.shards)), weights=weights):
            sides.add(part)


def check_all(loaded: Loaded, target: Target, run_on: RunOn, report: VerifyReport, *, ids_too: bool) -> None:
    """Compare the weights of all documents, as `check_sample` does."""
    found: list[tuple[int, VerifyReport]] = []
    run_on(build_checker, (_portable(loaded), target, ids_too), lambda: _groups(loaded), done=found.append)
    for _, later in sorted(found, key=lambda one: one[0]):
        report.include(later)


def build_reader(worker: Worker, loaded: Loaded, weights: bool, reporter: Reporter) -> Callable[[range], RunPart]:
    """Return the function that reads consecutive shards as one part."""

    def read(shards: range) -> RunPart:
        parts = list(loaded.parts(shards, weights=weights))
        return RunPart(
            start=parts[0].start if parts else 0,
            documents=np.concatenate([np.empty((0, 3), np.uint64), *(part.documents for part in parts)]),
            frequencies=sum((part.frequencies for part in parts), np.zeros(1, np.int64)),
            terms=np.concatenate([np.empty(0, np.int32), *(part.terms for part in parts)]),
        )

    return read


def build_checker(
    worker: Worker, loaded: Loaded, target: Target, ids_too: bool, reporter: Reporter
) -> Callable[[range], tuple[int, VerifyReport]]:
    """Connect to the cluster, and return the function that compares the weights of consecutive shards."""
    client = connect(target.connection, reporter=reporter)
    there = indexes.need_index(client, target.name, "Load the run again.")

    def check(shards: range) -> tuple[int, VerifyReport]:
        report = VerifyReport(target.name, 0, None, 0)
        checker = checker_of(client, there, target.field, loaded.run, report)
        check_sample(loaded, loaded.places(shards), checker, reporter, ids_too=ids_too)
        return shards.start, report

    return check


def _portable(loaded: Loaded) -> Loaded:
    return loaded._replace(run=open_run(loaded.run.path))  # without locks and scratch folders


def _groups(loaded: Loaded) -> list[range]:
    return loaded.run.groups(len(loaded.shards), TASK_ROWS)
