"""Exact search over a run folder: sparse-ingest, two methods with scipy, and SEISMIC's library, in one run.

    python benchmarks/exact.py [RUN] [--documents 100000] [--queries 1000] [-k 100] [--rounds 3]

Without RUN one with random vectors is written (large_run.py). A query is the 20 to 60 heaviest terms of a document of
the run, drawn with a fixed seed. All contenders get the same parts of 8,192 rows in memory, except SEISMIC's library,
which has an index, built before the clock starts, and is approximate: its row shows the share of the exact results it
found. scipy adds in float32, so its scores differ from the server's; its rows show how many results differ. Each figure
is the median of the rounds, one after another; compare CPU seconds if other processes use the machine. Not covered:
reading the run, which has its own row.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from large_run import make_large_run
from scipy import sparse

from sparse_ingest.records import SparseRows
from sparse_ingest.runs.run import Run, open_run
from sparse_ingest.runs.shards import read_shard_vectors
from sparse_ingest.searching.exact import QueryVector, search_exact

BLOCK = 128  # queries per dense product
Answers = list[npt.NDArray[np.int64]]  # for each query the rows found, best first


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?")
    parser.add_argument("--documents", type=int, default=100_000, help="documents of the random run, or maximum of RUN")
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("-k", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = open_run(given.run) if given.run else make_large_run(Path(folder) / "run", given.documents, 120)
        began = time.perf_counter()
        parts = read_parts(run, given.documents)
        read_s = time.perf_counter() - began
        vocabulary = len(run.vocabulary())
    queries = random_queries(parts, given.queries)
    describe(parts, queries, vocabulary)
    contenders: dict[str, Callable[[], Answers]] = {
        "sparse-ingest": partial(ours, parts, queries, given.k),
        "scipy, CSR @ dense": partial(scipy_dense, parts, queries, given.k, vocabulary),
        "scipy, CSR @ CSC": partial(scipy_sparse, parts, queries, given.k, vocabulary),
    }
    if index := seismic_index(parts):
        contenders["pyseismic-lsr (approximate)"] = partial(ask_seismic, index, queries, given.k)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in contenders}
    found: dict[str, Answers] = {}
    for _ in range(given.rounds):
        for name, search in contenders.items():
            began, cpu_began = time.perf_counter(), time.process_time()
            found[name] = search()
            seconds[name].append(time.perf_counter() - began)
            cpu_seconds[name].append(time.process_time() - cpu_began)
    print(
        "| contender | s | CPU s | CPU of sparse-ingest's | found of the exact answer | answers with other documents |"
    )
    print("|---|---|---|---|---|---|")
    base = statistics.median(cpu_seconds["sparse-ingest"])
    for name, times in seconds.items():
        cpu = statistics.median(cpu_seconds[name])
        recall, other = agreement(found["sparse-ingest"], found[name])
        print(f"| {name} | {statistics.median(times):.2f} | {cpu:.2f} | {cpu / base:.2f} | {recall:.4f} | {other} |")
    print(f"| (reading the run) | {read_s:.2f} | | | | |")
    print(f"\nPeak memory of all: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:,.0f} MB")


def read_parts(run: Run, documents: int) -> list[SparseRows]:
    """Return the vectors of the first documents of a run."""
    parts: list[SparseRows] = []
    for shard in run.done_shards():
        for rows in read_shard_vectors(run.shard_path(shard)):
            missing = documents - sum(len(part.doc_ids) for part in parts)
            if missing > 0:
                parts.append(rows.take(np.arange(min(missing, len(rows.doc_ids)))))
    return parts


def random_queries(parts: Sequence[SparseRows], count: int) -> list[QueryVector]:
    """Return the 20 to 60 heaviest terms of documents drawn with a fixed seed."""
    random = np.random.default_rng(7)
    queries: list[QueryVector] = []
    while len(queries) < count:
        part = parts[int(random.integers(len(parts)))]
        token_ids, weights = part.row(int(random.integers(len(part.doc_ids))))
        heaviest = np.argsort(-weights, kind="stable")[: random.integers(20, 61)]
        if len(heaviest):
            queries.append(QueryVector(token_ids[heaviest].astype(np.uint32), weights[heaviest].astype(np.float32)))
    return queries


def describe(parts: Sequence[SparseRows], queries: Sequence[QueryVector], vocabulary: int) -> None:
    """Print the corpus, and how many terms a query and a document share."""
    documents, terms = sum(len(part.doc_ids) for part in parts), sum(len(part.token_ids) for part in parts)
    holding = np.zeros(vocabulary, np.int64)
    for part in parts:
        holding += np.bincount(part.token_ids, minlength=vocabulary)
    shared = np.mean([holding[query.token_ids].sum() / documents for query in queries])
    asked = np.mean([len(query.token_ids) for query in queries])
    print(
        f"{documents:,} documents of {terms / documents:.0f} terms, {len(queries):,} queries of {asked:.1f}; "
        f"a query and a document share {shared:.2f} terms.\n"
    )


def ours(parts: Sequence[SparseRows], queries: Sequence[QueryVector], k: int) -> Answers:
    """Search as `evaluate --run` does."""
    return [hits.positions for hits in search_exact(parts, queries, k)]


def scipy_dense(parts: Sequence[SparseRows], queries: Sequence[QueryVector], k: int, vocabulary: int) -> Answers:
    """Multiply sparse documents with blocks of dense queries."""
    found = []
    for start in range(0, len(queries), BLOCK):
        block = queries[start : start + BLOCK]
        dense = np.zeros((vocabulary, len(block)), np.float32)
        for place, query in enumerate(block):
            dense[query.token_ids, place] = query.weights
        best = _Best(len(block), k)
        for part in parts:
            best.add((_matrix(part, vocabulary) @ dense).T)
        found += best.answers()
    return found


def scipy_sparse(parts: Sequence[SparseRows], queries: Sequence[QueryVector], k: int, vocabulary: int) -> Answers:
    """Multiply sparse queries with sparse documents."""
    indptr = np.cumsum([0, *(len(query.token_ids) for query in queries)])
    columns = np.concatenate([query.token_ids for query in queries]).astype(np.int32)
    weights = np.concatenate([query.weights for query in queries])
    asked = sparse.csr_matrix((weights, columns, indptr), shape=(len(queries), vocabulary))
    best = _Best(len(queries), k)
    for part in parts:
        best.add((asked @ _matrix(part, vocabulary).T.tocsr()).toarray())
    return best.answers()


class _Best:
    """The k best rows of each query over all parts."""

    def __init__(self, queries: int, k: int) -> None:
        self._k, self._first = k, 0
        self._scores, self._rows = np.empty((queries, 0), np.float32), np.empty((queries, 0), np.int64)

    def add(self, scores: npt.NDArray[np.float32]) -> None:
        """Add the scores of a part, one row per query."""
        k = min(self._k, scores.shape[1])
        places = np.argpartition(-scores, k - 1, axis=1)[:, :k]
        both = np.concatenate([self._scores, np.take_along_axis(scores, places, 1)], axis=1)
        rows = np.concatenate([self._rows, places + self._first], axis=1)
        order = np.argsort(-both, axis=1, kind="stable")[:, : self._k]
        self._scores, self._rows = np.take_along_axis(both, order, 1), np.take_along_axis(rows, order, 1)
        self._first += scores.shape[1]

    def answers(self) -> Answers:
        """Return the rows that share a token with their query."""
        return [rows[scores > 0] for rows, scores in zip(self._rows, self._scores, strict=True)]


def _matrix(part: SparseRows, vocabulary: int) -> Any:
    content = (part.weights.astype(np.float32), part.token_ids.astype(np.int32), part.indptr)
    return sparse.csr_matrix(content, shape=(len(part.doc_ids), vocabulary))


def seismic_index(parts: Sequence[SparseRows]) -> Any:
    """Build a SEISMIC index with its library's defaults, or return None if it is not installed."""
    try:
        from seismic import SeismicDataset, SeismicIndex, get_seismic_string
    except ImportError:
        return None
    documents, row = SeismicDataset(), 0
    for part in parts:
        for place in range(len(part.doc_ids)):
            token_ids, weights = part.row(place)
            tokens = token_ids.astype(str).astype(get_seismic_string())
            documents.add_document(str(row), tokens, weights.astype(np.float32))
            row += 1
    return SeismicIndex.build_from_dataset(documents)


def ask_seismic(index: Any, queries: Sequence[QueryVector], k: int) -> Answers:
    """Run the batch search of SEISMIC's library on both cores."""
    from seismic import get_seismic_string

    form = get_seismic_string()
    found = index.batch_search(
        np.array([str(place) for place in range(len(queries))], dtype=form),
        [query.token_ids.astype(str).astype(form) for query in queries],
        [query.weights for query in queries],
        k=k,
        query_cut=20,
        heap_factor=0.8,
    )
    answers: Answers = [np.empty(0, np.int64) for _ in queries]
    for hits in found:
        if hits:
            answers[int(hits[0][0])] = np.array([int(hit[2]) for hit in hits])
    return answers


def agreement(exact: Answers, other: Answers) -> tuple[float, int]:
    """Return the share of the exact results that was found, and how many results have other documents."""
    shares = [
        len(np.intersect1d(one, two)) / len(one) if len(one) else 1.0 for one, two in zip(exact, other, strict=True)
    ]
    return float(np.mean(shares)), sum(share < 1 for share in shares)


if __name__ == "__main__":
    main()
