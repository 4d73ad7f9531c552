"""Compare an index with the run that was loaded into it: the ids of all documents, and their weights bit for bit.

Ids are read from a snapshot of the index. For a sampled document, each weight must equal the stored form of the pruned
weight in the run. Extra tokens are found by the sum of weights over the vocabulary, unless they are below 2^-24 of it,
byte zero in a sparse_vector field, or outside the vocabulary. All documents of a rank_features field are read token by
token instead, which finds every extra weight, with 20 bytes of memory and 48 of disk per document.
Other fields of the documents are not compared.
"""

from __future__ import annotations

import contextlib
import time

import numpy as np

from sparse_ingest.cluster import indexes, mappings, stamps
from sparse_ingest.cluster.client import (
    Client,
    ConnectionLike,
    ResponseError,
    connect,
    connection_of,
    for_other_processes,
)
from sparse_ingest.cluster.journal import loaded_shards, open_journal
from sparse_ingest.cluster.postings import IndexScan, scan
from sparse_ingest.pipeline import options_from
from sparse_ingest.reporting import Reporter, reporter_of
from sparse_ingest.runs.run import Run, RunLike, open_run, refuse_incomplete
from sparse_ingest.storage.scratch import ScratchFolder
from sparse_ingest.verification import tasks
from sparse_ingest.verification.comparison import BothSides, VerifyReport, check_sample, checker_of, compare_all
from sparse_ingest.verification.loaded import Loaded
from sparse_ingest.verification.options import VerifyOptions

__all__ = ["VerifyReport", "verify"]

# Explaining a document costs as much as reading this many tokens.
_TOKENS_A_DOCUMENT = 15


def verify(
    run: RunLike,
    *,
    index: str,
    url: str | None = None,
    connection: ConnectionLike | None = None,
    options: VerifyOptions | None = None,
    progress: Reporter | bool = False,
    **settings: object,
) -> VerifyReport:
    """Compare an index with the run that was loaded into it: counts, ids, and weights bit for bit.

    Args:
        run: A run folder, or what `encode` or `open_run` returns.
        index: The index to compare with.
        url: Where the cluster is; by default the SPARSE_INGEST_* variables name it.
        connection: A `Connection` or an `opensearchpy.OpenSearch`, instead of `url`.
        options: All options in one object, instead of single keywords.
        progress: True for a tqdm bar, or a `Reporter`; silent by default.
        **settings: Fields of `VerifyOptions`, such as `sample=1000`, or `sample=None` to compare all weights.

    Returns:
        What was compared and what differs; `.ok` if nothing does.

    Raises:
        RunError, ClusterError, UsageError: the two cannot be compared.
    """
    started, reporter = time.monotonic(), reporter_of(progress)
    chosen = options_from(VerifyOptions, options, settings, "verify")
    chosen.refuse_without_ray()
    reached, sample = connection_of(url, connection), chosen.sample
    if chosen.executor == "ray":
        for_other_processes(reached)
    run = open_run(run)
    run.refuse_mixed()
    if note := run.unchecked_vocabulary():
        reporter.note(note)
    with connect(reached, reporter=reporter) as client, contextlib.closing(ScratchFolder()) as scratch:
        there = indexes.need_index(client, index, f"Load the run first: sparse-ingest load RUN --index {index}.")
        indexes.refuse_unreadable(there)
        field = chosen.field or (there.stamp.field if there.stamp else "sparse")
        mappings.check_fits(there, stamps.run_stamp(run, field))
        mappings.refuse_other_product(there, field, client.dialect)
        indexes.count_documents(client, there)  # a refresh would wait a minute for a shard without a node
        indexes.refresh(client, there)
        loaded, report = _begin(client, there, run)
        checker = checker_of(client, there, field, run, report)
        total = sum(loaded.rows)
        everything = sample is None or sample >= total
        reporter.begin("documents", total if sample is None else min(sample, total))
        with contextlib.ExitStack() as stack:
            run_on = stack.enter_context(tasks.run_on(chosen, reporter))
            snapshot = _open(stack, client, there, report)
            by_token = everything and checker.ceiling is None and _TOKENS_A_DOCUMENT * total >= len(run.vocabulary())
            if snapshot is not None:
                sides = BothSides(snapshot, loaded, report, scratch.path)
                tasks.add_run(sides, run_on, weights=by_token)
                if by_token:
                    compare_all(sides, field, checker, reporter)
                else:
                    sides.note_mismatches()
            if snapshot is None or not by_token:
                if everything and run_on:
                    target = tasks.Target(for_other_processes(reached), there.name, field)
                    tasks.check_all(loaded, target, run_on, report, ids_too=snapshot is None)
                else:
                    places = np.arange(total) if everything else np.linspace(0, total - 1, sample or 1).astype(np.int64)
                    check_sample(loaded, np.unique(places), checker, reporter, ids_too=snapshot is None)
    report.seconds = round(time.monotonic() - started, 3)
    return report


def _begin(client: Client, there: indexes.Index, run: Run) -> tuple[Loaded, VerifyReport]:
    """Return the documents that were loaded into the index, and the report with their counts."""
    stamp = there.stamp
    journal = open_journal(run, client.cluster_uuid, there.uuid)
    lines = loaded_shards(run, journal)
    if not lines:
        refuse_incomplete(run)
    shards = [shard for shard in run.done_shards() if shard in lines or not lines]
    refused = frozenset(letter.doc_id for letter in journal.dead())
    rows = list(map(run.rows_of, shards))
    alone = stamp is not None and stamp.only_run == run.manifest.run_id
    documents = indexes.count_documents(client, there)
    expected = sum(rows) - len(refused) if alone else None
    unloaded = len(run.done_shards()) - len(shards)
    report = VerifyReport(there.name, documents, expected, len(refused), unloaded_shards=unloaded)
    return Loaded(run, shards, rows, dict(stamp.pruning) if stamp else {}, refused), report


def _open(stack: contextlib.ExitStack, client: Client, there: indexes.Index, report: VerifyReport) -> IndexScan | None:
    """Open a snapshot of the index; note it and return None if the cluster does not support that."""
    try:
        return stack.enter_context(scan(client, there))
    except ResponseError as error:
        if error.may_pass or error.status >= 500:  # shards do not answer
            raise
        report.notes.append(f"The ids of the index could not be compared ({error})")
        return None
