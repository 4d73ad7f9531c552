"""`plan`: find the cheapest pruning of a run, or the fastest engine of an index, within an allowed loss of quality.

Ground truth is exact search of unpruned vectors with 9-bit weights; in a hybrid plan, hybrid search of the index with
unpruned queries. Quality is nDCG@10 with judgments, otherwise the share of the ten best documents that is found.
Without an index, cost is predicted bytes and postings visited; with an index, measured latency. The prediction assumes
one segment: Lucene searches several segments and shards one by one.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from sparse_ingest.cluster.client import ConnectionLike
from sparse_ingest.cluster.engines import ENGINES
from sparse_ingest.cluster.scores import posting_bytes
from sparse_ingest.corpora.collections import read_qrels, read_queries
from sparse_ingest.errors import RunError, UsageError, counted
from sparse_ingest.evaluation.measures import Qrels, measure
from sparse_ingest.pipeline import (
    EncodeSettings,
    HybridSettings,
    Pipeline,
    Pruning,
    QuerySettings,
    changed,
    options_from,
    pipeline_of,
)
from sparse_ingest.planning import engines
from sparse_ingest.planning.options import PlanOptions
from sparse_ingest.planning.outputs import refuse_outputs, write_outputs
from sparse_ingest.planning.report import PlanReport, Point, Values, candidates, choose, frontier, loss_of, unsettled
from sparse_ingest.planning.sweep import ALL_TERMS, Sweep, as_flags, document_families, query_rules
from sparse_ingest.queries.weight_table import prune_query
from sparse_ingest.records import Query
from sparse_ingest.reporting import Reporter, reporter_of
from sparse_ingest.runs.checking import checked_shard, finished_shards, shard_vectors
from sparse_ingest.runs.run import Run, RunLike, open_run
from sparse_ingest.runs.shards import read_doc_ids
from sparse_ingest.searching.exact import QueryVector
from sparse_ingest.searching.hits import Ranked
from sparse_ingest.searching.pipelines import pipeline_of_run, refuse_hybrid
from sparse_ingest.searching.query import many_query_weights
from sparse_ingest.searching.run_search import token_ids_of

LEAST_QUERIES = 10
DEPTH = 100
MEASURE = "nDCG@10"

T = TypeVar("T")


def plan(
    run: RunLike,
    queries: Path | str | Iterable[Query],
    *,
    index: str | None = None,
    url: str | None = None,
    connection: ConnectionLike | None = None,
    pipeline: Pipeline | str | None = None,
    options: PlanOptions | None = None,
    progress: Reporter | bool = False,
    **settings: object,
) -> PlanReport:
    """Try all pruning rules on a run, and all engine settings on an index that was loaded from it.

    Args:
        run: A run folder, or what `open_run` returns.
        queries: A file of queries, the folder of a collection, or `Query` records.
        index: An index that was loaded from the run; its engines are measured, and one is chosen.
        url: Where the cluster is; by default the SPARSE_INGEST_* variables name it.
        connection: A `Connection` or an `opensearchpy.OpenSearch`, instead of `url`.
        pipeline: A pipeline whose model and settings apply; by default the run's own model.
        options: All options in one object, instead of single keywords.
        progress: True for a tqdm bar, or a `Reporter`; silent by default.
        **settings: Fields of `PlanOptions`, such as `qrels=...` or `out="plan/"`.

    Raises:
        RunError, ClusterError: the run or index does not exist, or the index was loaded from another run.
        UsageError: the queries are too few, or do not match the run.
    """
    chosen, reporter = options_from(PlanOptions, options, settings, "plan"), reporter_of(progress)
    if chosen.allow_partial and index is None:
        raise UsageError("--allow-partial applies to --index only: a plan for a run needs no server. Omit it.")
    if index is None:
        refuse_hybrid(pipeline_of(None, pipeline).query, chosen, "applies to --index only: a run has no BM25")
    if chosen.out:
        refuse_outputs(Path(chosen.out))
    qrels = read_qrels(Path(chosen.qrels), chosen.quoting) if isinstance(chosen.qrels, str | Path) else chosen.qrels
    records = read_queries(Path(queries), chosen.quoting) if isinstance(queries, str | Path) else queries
    folder = open_run(run)
    if not folder.done_shards():
        raise RunError(f"{folder.path} has no finished shard. Finish it with `sparse-ingest encode`.")
    if folder.complete() is None:
        reporter.note(f"{folder.path} is not complete: the plan is for its finished shards.")
    as_encoded = _as_encoded(pipeline_of_run(pipeline_of(None, pipeline), folder), folder)
    unpruned = replace(as_encoded, query=replace(as_encoded.query, top_k=None, max_ratio=None))
    with engines.open_planned_index(folder, as_encoded, index, url, connection, chosen) as held:
        hybrid = (held.engine.hybrid if held else None) or HybridSettings()
        table = held.settings if held else as_encoded.index
        as_encoded = replace(as_encoded, query=replace(as_encoded.query, **vars(hybrid)), index=table)
        job = _Job(folder, _sampled(records, qrels, chosen.sample), unpruned, qrels, held, chosen.loss)
        reporter.begin("documents", folder.totals()["rows"])
        job.read(reporter)
        report = job.report(as_encoded)
    return replace(report, written=write_outputs(report, Path(chosen.out))) if chosen.out else report


class _Job:
    """One plan: the queries under every rule, one pass over the run, the points."""

    def __init__(
        self,
        run: Run,
        queries: Sequence[Query],
        unpruned: Pipeline,
        qrels: Qrels | None,
        index: engines.PlannedIndex | None,
        loss: float,
    ) -> None:
        self.run, self.qrels, self.index, self.loss = run, qrels, index, loss
        self.weighted = weighted = [pair for pair in many_query_weights(queries, unpruned) if pair[1]]
        if len(weighted) < LEAST_QUERIES:
            judged = "relevance judgments and " if qrels is not None else ""
            raise UsageError(
                f"Found {counted(len(weighted), 'query', 'queries')} with {judged}a weighted token; a plan needs at "
                f"least {LEAST_QUERIES}. Give more queries."
            )
        texts = {query.id: query.text for query in queries}
        self.texts = [texts[query_id] for query_id, _ in weighted]
        number = token_ids_of(run)
        if not any(number.keys() & weights.keys() for _, weights in weighted):
            raise UsageError(
                f"No token of any query is in the vocabulary of {run.path}. Give the --model that encoded the run."
            )
        self.query_rules = query_rules(float(np.mean([len(weights) for _, weights in weighted])))
        # Many rules keep a short query unchanged: each distinct form of a query is searched once.
        self.vectors: list[QueryVector] = []
        self.forms: list[list[int]] = []
        for _, weights in weighted:
            seen: dict[tuple[str, ...], int] = {}
            forms = []
            for rule in self.query_rules:
                # Pruned before unknown tokens are omitted, as in a search.
                pruned = prune_query(weights, QuerySettings(**rule))
                kept = tuple(token for token in pruned if token in number)
                if kept not in seen:
                    seen[kept] = len(self.vectors)
                    self.vectors.append(QueryVector.of(pruned, number))
                forms.append(seen[kept])
            self.forms.append(forms)
        totals = run.totals()
        families = document_families(totals["nnz"] / max(1, totals["rows"]))
        if index and index.pruning and not any(index.pruning in family for family in families):
            families.append((index.pruning,))
        self.sweep = Sweep(families, self.vectors, len(run.vocabulary()), depth=DEPTH)

    def read(self, reporter: Reporter) -> None:
        """Read the run and compute the ground truth."""
        for shard in finished_shards(self.run):
            for vectors in shard_vectors(self.run, shard):
                self.sweep.add(vectors)
                reporter.advance(len(vectors.doc_ids))
        self.ids = _ids_at(self.run, self.sweep.all_places()) if self.qrels or self.index else {}
        self.truth: list[set[int]] = []
        self.right: list[set[int]] = []  # the ten best
        for forms in self.forms:
            places, scores = self.sweep.best(forms[0], 0)
            self.truth.append(set(places.tolist()))
            # All documents with the tenth best score are right.
            self.right.append(set(places[scores >= scores[:10][-1]].tolist()) if len(places) else set())
        self.full = self._quality(0, 0)[0]
        if not self.full.mean():
            if self.qrels and self.run.manifest.identity.get("overflow") == "passages":
                raise UsageError(
                    f"{self.run.path} has passages, and none of the found passages is in the judgments. "
                    "Plan without --qrels, by the overlap of the best passages."
                )
            raise UsageError(
                "Unpruned vectors find no relevant document among the first 10. Give queries and judgments of the "
                "corpus that was encoded."
            )

    def report(self, pipeline: Pipeline) -> PlanReport:
        """Return the report; `pipeline` gets the chosen settings."""
        points = [
            self._exact(rule, query) for query in range(len(self.query_rules)) for rule in range(len(self.sweep.rules))
        ]
        full, best = points[0], self.full
        settings = self._settings(points, self.index) if self.index else []
        if self.index and self.index.engine.hybrid:
            best = settings[0].per_query

        def cost(point: Point) -> float:
            """Latency for an index, otherwise bytes times postings visited, relative to unpruned vectors."""
            if self.index:
                return point.latency_p50_ms or 0.0
            return (point.bytes or 0) / (full.bytes or 1) * (point.visited or 0.0) / (full.visited or 1.0)

        measured = settings or points
        choice = choose(measured, best, loss=self.loss, cost=cost)
        if self.index and not any(point.engine == "exact" for point in settings):
            # The baseline for a field without exact search.
            settings = [*settings, next(point for point in points if point.documents == self.index.pruning)]
        return PlanReport(
            run=str(self.run.path),
            run_id=self.run.manifest.run_id,
            documents=self.sweep.documents,
            queries=len(self.weighted),
            quality=MEASURE if self.qrels else "overlap@10",
            full_quality=float(best.mean()),
            hybrid=changed(self.index.engine.hybrid) if self.index and self.index.engine.hybrid else None,
            allowed_loss=self.loss,
            points=points,
            frontier=[points.index(point) for point in frontier(points)],
            index=self.index.name if self.index else None,
            index_bytes=self.index.bytes if self.index else None,
            settings=settings,
            settings_frontier=[settings.index(point) for point in frontier(measured)] if settings else [],
            choice=choice,
            unsettled=unsettled(measured, best, choice, loss=self.loss, cost=cost),
            load_flags=as_flags(choice.point.documents) if choice else "",
            pipeline=_with_choice(pipeline, choice.point) if choice else pipeline,
        )

    def _settings(self, points: Sequence[Point], index: engines.PlannedIndex) -> list[Point]:
        """Return the points of the index's engines, for unpruned queries and for the chosen query pruning."""
        held, rules = self.sweep.rules.index(index.pruning), self.query_rules
        if not index.engine.hybrid:
            of_index = [point for point in points if point.documents == index.pruning]
            # Only by the choosing half: the confirming half tests the settings below.
            pruned = next(
                candidates(of_index, self.full, loss=self.loss, cost=lambda point: point.visited or 0.0), None
            )
            rules = [ALL_TERMS] + ([pruned.query] if pruned and pruned.query else [])
        settings = list(engines.settings_of(index.engine, rules))
        asked = [
            [(query_id, prune_query(weights, QuerySettings(**one.query))) for query_id, weights in self.weighted]
            for one in settings
        ]
        timed = engines.measure_settings(index.client, index.name, settings, asked, self.texts)
        if not index.engine.hybrid:
            right = [{self.ids[place] for place in places} for places in self.right]
            return [self._timed(one, held, right, self.full) for one in timed]
        # The ground truth of a hybrid plan is hybrid search with unpruned queries on the same index.
        right = list(engines.ten_best(index, asked[0], self.texts))
        full = self._timed(timed[0], held, right, self.full).per_query
        if not full.mean():
            raise UsageError("Hybrid search finds no relevant document. Give queries and judgments of the corpus.")
        return [self._timed(one, held, right, full) for one in timed]

    def _timed(self, timed: engines.Timed, held: int, right: Sequence[set[str]], full: Values) -> Point:
        """Return the point of an engine setting, measured on an index with document pruning `held`.

        `right` has the best documents of each query, `full` the quality without pruning.
        """
        overlap = np.array([_overlap(one.doc_ids, known, 10) for one, known in zip(timed.ranked, right, strict=True)])
        query = self.query_rules.index(timed.setting.query)
        engine = timed.setting.engine.name
        return self._point(
            held,
            query,
            self._values(timed.ranked, overlap),
            full,
            overlap_10=float(overlap.mean()),
            engine=engine,
            parameters=timed.setting.parameters,
            visited=self._visited(held, query) if engine == "exact" else None,
            latency_p50_ms=timed.latency_ms(0.5),
            latency_p95_ms=timed.latency_ms(0.95),
        )

    def _exact(self, rule: int, query: int) -> Point:
        values, overlap_10, overlap_100 = self._quality(rule, query)
        visited = self._visited(rule, query)
        return self._point(
            rule, query, values, self.full, overlap_10=overlap_10, overlap_100=overlap_100, visited=visited
        )

    def _point(self, rule: int, query: int, values: Values, full: Values, **measured: Any) -> Point:
        """Return a point: what was measured, and what follows from the rules. `full` is the quality without pruning."""
        frequencies, documents = self.sweep.frequencies[rule], self.sweep.documents
        postings = int(frequencies.sum())
        # Only postings differ between rules; sizes of clusters cannot be predicted.
        size = index_bytes = None
        if not self.index or self.index.engine.kind == "rank_features":
            size = round(posting_bytes(frequencies, documents))
        if self.index and size is not None:
            held = self.sweep.frequencies[self.sweep.rules.index(self.index.pruning)]
            index_bytes = self.index.bytes + size - round(posting_bytes(held, documents))
        tenths = [self.sweep.best(forms[query], rule)[1][9:11] for forms in self.forms]
        return Point(
            documents=self.sweep.rules[rule],
            query=self.query_rules[query],
            ndcg_10=float(values.mean()) if self.qrels else None,
            terms=postings / max(1, documents),
            postings=postings,
            emptied=int(self.sweep.emptied[rule]),
            bytes=size,
            index_bytes=index_bytes,
            tied=sum(len(pair) == 2 and bool(pair[0] == pair[1]) for pair in tenths),
            loss=loss_of(values, full),
            per_query=values,
            **measured,
        )

    def _quality(self, rule: int, query: int) -> tuple[Values, float, float]:
        """Return the quality of each query under two rules, and the overlap with the ground truth at 10 and 100."""
        best = [self.sweep.best(forms[query], rule) for forms in self.forms]
        found = [places.tolist() for places, _ in best]
        at_10 = np.array([_overlap(one[:10], right, 10) for one, right in zip(found, self.right, strict=True)])
        at_100 = np.array([_overlap(one, right, DEPTH) for one, right in zip(found, self.truth, strict=True)])
        ranked = (
            Ranked(query_id, [self.ids[place] for place in one[:10]], scores[:10].tolist())
            for (query_id, _), one, (_, scores) in zip(self.weighted, found, best, strict=True)
        )
        return self._values(ranked, at_10), float(at_10.mean()), float(at_100.mean())

    def _values(self, ranked: Iterable[Ranked], overlap: Values) -> Values:
        """Return the quality of each query: nDCG@10 with judgments, otherwise the overlap."""
        if not self.qrels:
            return overlap
        values = measure(ranked, self.qrels, [MEASURE]).per_query[MEASURE]
        return np.array([values[query_id] for query_id, _ in self.weighted])

    def _visited(self, rule: int, query: int) -> float:
        frequencies = self.sweep.frequencies[rule]
        return float(np.mean([frequencies[self.vectors[forms[query]].token_ids].sum() for forms in self.forms]))


def _as_encoded(pipeline: Pipeline, run: Run) -> Pipeline:
    """Return the pipeline with the encode settings of the run."""
    settings = [name for name in EncodeSettings.__dataclass_fields__ if name not in ("dtype", "batch_tokens")]
    known = {name: run.manifest.identity[name] for name in settings if name in run.manifest.identity}
    return replace(pipeline, encode=replace(pipeline.encode, **known), query=QuerySettings(**vars(pipeline.query)))


def _with_choice(pipeline: Pipeline, point: Point) -> Pipeline:
    """Return the pipeline with the settings of a point."""
    query: dict[str, Any] = vars(pipeline.query) | {"top_k": None, "max_ratio": None, **point.query, "engine": None}
    if table := ENGINES[point.engine].settings:
        query |= {"engine": point.engine, table: {**query[table], **point.parameters}}
    return replace(pipeline, load=Pruning(**point.documents), query=QuerySettings(**query))


def _sampled(queries: Iterable[Query], qrels: Qrels | None, sample: int) -> list[Query]:
    """Return a deterministic sample: the queries with the smallest hashes of ids."""
    judged = (query for query in queries if qrels is None or query.id in qrels)
    return heapq.nsmallest(sample, judged, key=lambda query: hashlib.sha256(query.id.encode()).digest())


def _ids_at(run: Run, places: npt.NDArray[np.uint32]) -> dict[int, str]:
    """Return the ids of the documents at these positions among all rows of the run."""
    wanted = set(places.tolist())
    doc_ids = (doc_id for shard in run.done_shards() for _, doc_id in read_doc_ids(checked_shard(run, shard)))
    return {place: doc_id for place, doc_id in enumerate(doc_ids) if place in wanted}


def _overlap(found: Iterable[T], right: set[T], k: int) -> float:
    """Return the share of the k best documents that is found; 1 for a query without any."""
    return len(right.intersection(found)) / min(k, len(right)) if right else 1.0
