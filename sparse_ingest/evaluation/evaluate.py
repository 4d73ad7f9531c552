"""`evaluate`: measure search quality, sparsity and latency of a run folder or an index, with BM25 for comparison.

Queries are encoded, searched and measured in batches. If qrels are for documents and the run has passages, a document
has the score of its best passage.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sparse_ingest.cluster.engines import ENGINES
from sparse_ingest.errors import ClusterError, CorpusError, UsageError
from sparse_ingest.evaluation.bm25 import rank_texts
from sparse_ingest.evaluation.collection import Collection, collection_of, has_judged_passages
from sparse_ingest.evaluation.measures import DEFAULT_MEASURES, Comparison, Measured, compare, depth_of, measure
from sparse_ingest.evaluation.options import EvaluateOptions
from sparse_ingest.evaluation.terms import Sparsity, TermCounts, flops, sparsity
from sparse_ingest.evaluation.trec import read_per_query, read_trec_run, trec_lines, written
from sparse_ingest.pipeline import HybridSettings, changed, options_from
from sparse_ingest.records import PARENT, Query, document_id, passage_number
from sparse_ingest.reporting import Reporter, reporter_of
from sparse_ingest.runs.checking import finished_shards, shard_parts, shard_vectors
from sparse_ingest.runs.run import Run, RunLike
from sparse_ingest.runs.shards import parse_fields
from sparse_ingest.searching.hits import Ranked, first_of_each
from sparse_ingest.searching.pipelines import refuse_hybrid
from sparse_ingest.searching.run_search import rank_run
from sparse_ingest.searching.search import SearchableIndex, SearchableRun, open_run

if TYPE_CHECKING:
    from sparse_ingest.cluster.client import Client

logger = logging.getLogger(__name__)


class Latency(NamedTuple):
    """Latency of queries in ms. A run folder searches all queries together: only the mean is known.

    `took_ms` is the median of the times reported by the server.
    """

    mean_ms: float
    p50_ms: float | None = None
    p95_ms: float | None = None
    p99_ms: float | None = None
    took_ms: float | None = None


class EngineResult(NamedTuple):
    """The results of one engine."""

    name: str
    measured: Measured
    latency: Latency


@dataclass(frozen=True)
class Evaluation:
    """Results of the search and of BM25 (or None), and how many queries and documents have each token.

    `document_terms` is None if they are not counted: with `cost=False`, in a sparse_vector field, or without the
    neural-search plugin.
    `hybrid` has the settings of a hybrid search.
    """

    search: EngineResult
    bm25: EngineResult | None
    query_terms: TermCounts
    document_terms: TermCounts | None
    vocabulary: int
    comparisons: list[Comparison] = field(default_factory=list)
    hybrid: HybridSettings | None = None

    @property
    def queries(self) -> Sparsity:
        """Active dimensions and sparsity of the queries."""
        return sparsity(self.query_terms, self.vocabulary)

    @property
    def documents(self) -> Sparsity | None:
        """Active dimensions and sparsity of the documents."""
        return sparsity(self.document_terms, self.vocabulary) if self.document_terms else None

    @property
    def flops(self) -> float | None:
        """Mean number of terms that a query and a document share (evaluation/terms.py)."""
        return flops(self.query_terms, self.document_terms) if self.document_terms else None

    @property
    def measures(self) -> dict[str, float]:
        """The mean of each measure, such as {"nDCG@10": 0.41}."""
        return dict(self.search.measured.mean)

    def to_dict(self, *, per_query: bool = False) -> dict[str, Any]:
        """Return what `--json` prints, with `per_query` also the values of each query."""
        found = {
            **_row_as_dict(self.search, per_query),
            "queries": asdict(self.queries),
            "documents": asdict(self.documents) if self.documents else None,
            "flops": self.flops,
            "bm25": _row_as_dict(self.bm25, per_query) if self.bm25 else None,
            "hybrid": changed(self.hybrid) if self.hybrid else None,
        }
        if self.comparisons:
            found["comparison"] = [one._asdict() for one in self.comparisons]
            for one in found["comparison"]:
                changes = one.pop("changes")
                one |= {"changes": [change._asdict() for change in changes]} if per_query else {}
        return found


def _row_as_dict(row: EngineResult, per_query: bool) -> dict[str, Any]:
    values = {**row.measured.mean, "engine": row.name, "latency": row.latency._asdict()}
    return values | {"per_query": row.measured.per_query} if per_query else values


def evaluate(
    target: SearchableIndex | RunLike,
    *,
    queries: Path | str | None = None,
    qrels: Path | str | None = None,
    options: EvaluateOptions | None = None,
    progress: Reporter | bool = False,
    **settings: object,
) -> Evaluation:
    """Measure search quality on an index or a run, with relevance judgments.

    Args:
        target: What `open_index` or `open_run` returns, or a run folder.
        queries: A file of queries, or the folder of a BEIR or MTEB collection.
        qrels: A file of qrels, or the folder; by default from `queries`.
        options: All options in one object, instead of single keywords.
        progress: True for a tqdm bar, or a `Reporter`; silent by default.
        **settings: Fields of `EvaluateOptions`, such as `measures=["Success@1"]` or `k=1000`.

    Returns:
        The measures (means in `.measures`), sparsity and latency.

    Raises:
        CorpusError: a file cannot be read, or the target has none of the judged documents.
        UsageError: options cannot be combined.
    """
    chosen, reporter = options_from(EvaluateOptions, options, settings, "evaluate"), reporter_of(progress)
    # Before the search, which may take long.
    collection = collection_of(queries, qrels, chosen.quoting)
    names = list(dict.fromkeys([*DEFAULT_MEASURES, *chosen.measures]))
    own = chosen.ignore_identical_ids
    other = read_compared(Path(chosen.compare), collection, names, own) if chosen.compare else None
    # One more if the document with the query's id is omitted.
    needed = depth_of(names)
    size = (chosen.k or needed) + own
    if chosen.k is not None and chosen.k < needed:
        logger.warning(
            "k = %d is below the cutoff %d of a measure: hits after %d are missing.", chosen.k, needed, chosen.k
        )
    reporter.begin("queries", collection.judged)
    with written(chosen.trec_run, (query.id for query in collection.queries())) as trec:
        found = _Measuring(collection, names, size, reporter, trec, own)
        if isinstance(target, SearchableIndex):
            evaluation = _evaluate_index(target, found, chosen)
        else:
            run = target if isinstance(target, SearchableRun) else open_run(target)
            evaluation = _evaluate_run(run, found, chosen)
    if other:
        texts = {query.id: query.text for query in collection.queries()}
        here = evaluation.search.measured.per_query
        first = {name: {query: here[name][query] for query in values} for name, values in other.items()}
        evaluation.comparisons.extend(compare(first, other, texts))
    return evaluation


class _Measuring(NamedTuple):
    """Measures the rankings of an engine."""

    collection: Collection
    measures: Sequence[str]
    size: int
    reporter: Reporter
    trec: IO[bytes] | None
    ignore_identical_ids: bool

    def row(self, name: str, ranked: Iterable[Ranked], *, first: bool = True) -> EngineResult:
        """Measure the rankings of one engine; only the `first` one's are written and reported."""
        latencies: list[tuple[float, float | None]] = []
        found_themselves: list[str] = []

        def passing() -> Iterator[Ranked]:
            for one in ranked:
                latencies.append((one.latency_s, one.took_ms))
                if self.ignore_identical_ids:
                    one = one.without(one.query_id, self.size - 1)
                elif one.query_id in one.doc_ids:
                    found_themselves.append(one.query_id)
                if first and self.trec is not None:
                    self.trec.write(trec_lines(one).encode())
                if first:
                    self.reporter.advance(1)
                yield one

        measured = measure(passing(), self.collection.qrels, self.measures)
        if first and found_themselves:
            logger.warning(
                "%d of %d queries found the document with their own id, such as %r. If queries are documents of the "
                "corpus (ArguAna, Quora), omit these hits as BEIR does: pass --ignore-identical-ids.",
                len(found_themselves), len(latencies), found_themselves[0],
            )  # fmt: skip
        return EngineResult(name, measured, _latency(latencies))


def _evaluate_run(run: SearchableRun, found: _Measuring, options: EvaluateOptions) -> Evaluation:
    """Evaluate exact search of a run folder, and BM25 on its texts."""
    for option in ("concurrency", "allow_partial"):
        if getattr(options, option):
            raise UsageError(f"--{option.replace('_', '-')} is for --index: a run folder is searched locally. Omit it.")
    refuse_hybrid(run.pipeline.query, options, "is for --index: a run folder is searched without a server")
    if run.pipeline.query.engine not in (None, "exact"):
        raise UsageError(f"The engine {run.pipeline.query.engine} needs --index: a run folder is searched exactly.")
    collection = found.collection
    judged = collection.judged_documents()
    documents, known, parents, most = _count_terms(run, judged)
    passages = has_judged_passages(judged, known, parents, f"The run {run.path}")
    terms = TermCounts()
    weights = terms.passing(run.model.many(collection.queries()))
    ranked = rank_run(run, weights, size=found.size, stored=options.stored, passages=passages)
    search = found.row("exact, 9 bits" if options.stored else "exact", ranked)
    baseline = None
    if options.bm25:
        by_words = _rank_texts(run, list(collection.queries()), found.size, most if passages else 0)
        baseline = found.row("BM25", by_words, first=False)
    return Evaluation(search, baseline, terms, documents if options.cost else None, len(run.vocabulary()))


def _evaluate_index(index: SearchableIndex, found: _Measuring, options: EvaluateOptions) -> Evaluation:
    """Evaluate an index with its engine, and with BM25.

    Raise `UsageError` if the index has passages of the judged documents, and the engine cannot collapse them.
    """
    from sparse_ingest.cluster.postings import count_known, count_parents
    from sparse_ingest.searching.index_search import rank_index, rank_words

    if options.stored:
        raise UsageError("--stored is for --run: an index always uses the weights that it stores. Omit it.")
    client, name = index.client.allowing(options.allow_partial), index.name
    engine, collection = index.engine_for(options), found.collection
    judged = collection.judged_documents()
    known = count_known(client, name, judged)
    parents = 0 if known else count_parents(client, name, judged)
    collapse = PARENT if has_judged_passages(judged, known, parents, f"The index {name!r}") else None
    if collapse and not ENGINES[engine.name].collapses:
        raise UsageError("Two-phase search cannot collapse passages of a document. Pass --engine exact.")
    vocabulary = index.vocabulary()
    terms = TermCounts()
    weights = terms.passing(index.model.many(collection.queries()))
    how: dict[str, Any] = {"size": found.size, "collapse": collapse, "concurrency": options.concurrency or 1}
    texts = (query.text for query in collection.queries()) if engine.hybrid else None
    label = f"hybrid, {engine.name}" if engine.hybrid else engine.name
    search = found.row(label, rank_index(client, name, weights, engine, texts=texts, **how))
    baseline = None
    if options.bm25 is not False:
        by_words = rank_words(client, name, collection.queries(), field=engine.field, **how)
        baseline = found.row("BM25", by_words, first=False)
    counts = options.cost and engine.keys is None
    documents = _count_index_terms(client, name, engine.field, vocabulary) if counts else None
    return Evaluation(search, baseline, terms, documents, len(vocabulary), hybrid=engine.hybrid)


def read_compared(
    path: Path, collection: Collection, measures: Sequence[str], ignore_identical_ids: bool = False
) -> dict[str, dict[str, float]]:
    """Return the values by measure and query of a TREC run file, or of the JSON of another evaluation.

    Queries that are not in a run file have no hits there; of an evaluation only common queries are compared. Raise
    `CorpusError` if the file cannot be read, or has none of the queries.
    """
    asked = [query.id for query in collection.queries()]
    values = read_per_query(path)
    if values is None:
        found = read_trec_run(path, set(asked))
        if not found:
            raise CorpusError(
                f"{path} has none of the {len(asked)} judged queries. Give a run file of the same collection."
            )
        rankings = ((query_id, found.get(query_id, {})) for query_id in asked)
        ranked = (Ranked(query_id, list(scores), list(scores.values())) for query_id, scores in rankings)
        if ignore_identical_ids:
            ranked = (one.without(one.query_id) for one in ranked)
        return measure(ranked, collection.qrels, measures).per_query
    if lacking := [name for name in measures if name not in values]:
        raise CorpusError(
            f"{path} has no values of {', '.join(lacking)}. Create it with the same --measure, --per-query and --json."
        )
    both = [query_id for query_id in asked if all(query_id in values[name] for name in measures)]
    if not both:
        raise CorpusError(
            f"{path} has none of the {len(asked)} judged queries. Give an evaluation of the same queries."
        )
    if len(both) < len(asked):
        logger.warning("%s has values of %d of the %d queries: only these are compared.", path, len(both), len(asked))
    return {name: {query_id: values[name][query_id] for query_id in both} for name in measures}


def _latency(latencies: Sequence[tuple[float, float | None]]) -> Latency:
    waited = 1000 * np.array([waited_s for waited_s, _ in latencies])
    took = [took_ms for _, took_ms in latencies if took_ms is not None]
    if not took:
        return Latency(float(waited.mean()))
    p50, p95, p99 = (float(value) for value in np.percentile(waited, [50, 95, 99]))
    return Latency(float(waited.mean()), p50, p95, p99, float(np.median(took)))


def _count_terms(run: Run, wanted: set[str]) -> tuple[TermCounts, int, int, int]:
    """Return the terms, the wanted documents by id and as passages, and the largest number of passages."""
    vocabulary = run.vocabulary()
    counts = np.zeros(len(vocabulary), np.int64)
    count = known = 0
    parents: set[str] = set()
    most = 0
    of_passages = run.manifest.identity.get("overflow") == "passages"
    for shard in finished_shards(run):
        for rows in shard_vectors(run, shard):
            counts += np.bincount(rows.token_ids, minlength=len(vocabulary))
            count += len(rows.doc_ids)
            known += sum(1 for doc_id in rows.doc_ids if doc_id in wanted)
            if of_passages:
                parents.update(wanted.intersection(map(document_id, rows.doc_ids)))
                most = max(most, *(passage_number(doc_id) + 1 for doc_id in rows.doc_ids))
    by_token = {str(vocabulary[token_id]): int(counts[token_id]) for token_id in np.flatnonzero(counts).tolist()}
    return (TermCounts(count, Counter(by_token)), known, len(parents), most)


def _count_index_terms(client: Client, index: str, field: str, vocabulary: Sequence[str | None]) -> TermCounts | None:
    from sparse_ingest.cluster.client import PartialAnswerError, path_of
    from sparse_ingest.cluster.indexes import count_matching
    from sparse_ingest.cluster.postings import document_frequencies

    try:
        count = count_matching(client, path_of(index))
        tokens = [token for token in vocabulary if token is not None]
        frequencies = document_frequencies(client, index, field, tokens, count)
    except ClusterError as error:
        if isinstance(error, PartialAnswerError):
            raise
        # Quality without sparsity is better than no result.
        logger.warning("The terms of the documents are not counted. %s", error)
        return None
    return TermCounts(count, Counter(frequencies))


def _rank_texts(run: Run, queries: Sequence[Query], size: int, most_passages: int) -> Iterator[Ranked]:
    """Rank the texts of a run with BM25; with `most_passages` per document, by its best passage."""
    began = time.perf_counter()
    found = list(rank_texts(_texts(run), queries, size * (most_passages or 1)))
    each_s = (time.perf_counter() - began) / len(queries)
    for query_id, doc_ids, scores in found:
        if most_passages:
            places = first_of_each(map(document_id, doc_ids))[:size]
            doc_ids, scores = [document_id(doc_ids[place]) for place in places], [scores[place] for place in places]
        yield Ranked(query_id, doc_ids, scores, each_s)


def _texts(run: Run) -> Iterator[tuple[str, str]]:
    for shard in finished_shards(run):
        for part in shard_parts(run, shard):
            for doc_id, carried in zip(part.vectors.doc_ids, part.fields, strict=True):
                fields = parse_fields(carried, doc_id)
                if "text" not in fields:
                    raise CorpusError(f"{run.path} has no texts for BM25. Omit --bm25, or encode it without --no-text.")
                yield doc_id, " ".join(str(part) for part in (fields.get("title"), fields["text"]) if part)
