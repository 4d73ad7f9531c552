"""The verb `evaluate`: how good and how costly a search is, on a collection with judgements.

In: queries, judgements, and what is searched: a run folder (exactly, also with the weights that an index would keep)
or an index (with any engine). Out: measures by query and together, active dimensions, sparsity, FLOPS, latency; BM25
beside them. Queries stream through: encoded in batches, searched, measured in blocks.
Where judgements name documents and passages were encoded, the best passage of a document stands for it.
Queries without judgements are not asked. Judged queries that the file lacks have no part in any mean.
Not covered: collections on a hub (nano_beir.py).
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TextIO

from sparse_ingest.corpora.collections import read_qrels, read_queries
from sparse_ingest.errors import ClusterError, CorpusError, UsageError
from sparse_ingest.evaluation.measures import Measured, Qrels, compare, depth_of, measure, parse_measures
from sparse_ingest.evaluation.terms import QueryTerms, Sparsity, TermCounts, flops, sparsity
from sparse_ingest.evaluation.trec import read_trec_run, trec_lines
from sparse_ingest.records import PARENT, document_id, passage_number
from sparse_ingest.searching.query import weigh_many
from sparse_ingest.searching.search import Engine, Ranked, rank_index, rank_run, rank_words

if TYPE_CHECKING:
    from sparse_ingest.cluster.client import Client
    from sparse_ingest.pipeline import Pipeline
    from sparse_ingest.records import Query
    from sparse_ingest.runs.run import Run

__all__ = [
    "Collection",
    "Evaluation",
    "Latency",
    "Row",
    "compare",
    "depth_of",
    "evaluate_index",
    "evaluate_run",
    "measure",
    "measure_trec_run",
    "parse_measures",
    "read_collection",
]
logger = logging.getLogger(__name__)


class Collection(NamedTuple):
    """Queries and their judgements: `asked` queries of the file are judged, `unjudged` are not.

    `missing` counts the judged queries that the file lacks.
    """

    path: Path
    qrels: Qrels
    asked: int
    unjudged: int
    missing: int

    def queries(self) -> Iterator[Query]:
        """The judged queries, read again each time."""
        return (query for query in read_queries(self.path) if query.id in self.qrels)

    def judged_documents(self) -> set[str]:
        """The ids of all documents that a query of the file has a judgement for."""
        return {doc_id for query in self.queries() for doc_id in self.qrels[query.id]}


class Latency(NamedTuple):
    """Milliseconds a query took. A run folder answers all queries at once: there is a mean alone.

    `took_ms` is the median of what the server says of itself, without the way there and back.
    """

    mean_ms: float
    p50_ms: float | None = None
    p95_ms: float | None = None
    p99_ms: float | None = None
    took_ms: float | None = None


class Row(NamedTuple):
    """One way to search: the name of its engine, its measures, its latency."""

    name: str
    measured: Measured
    latency: Latency


@dataclass(frozen=True)
class Evaluation:
    """What was found out: the search itself, BM25 or None, and how many queries and documents hold each token.

    `document_terms` is None where they cannot be counted: in the clusters of a sparse_vector field, or without the
    neural-search plugin.
    """

    search: Row
    bm25: Row | None
    query_terms: TermCounts
    document_terms: TermCounts | None
    vocabulary: int

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
        """The terms that a query and a document share, on average (evaluation/terms.py)."""
        return flops(self.query_terms, self.document_terms) if self.document_terms else None


def read_collection(queries: Path, qrels: Path) -> Collection:
    """Read the judgements, and look which queries they are for; either path may be a folder of BEIR's or MTEB's layout.

    Raises:
        CorpusError: a file cannot be read, or no query has a judgement.
    """
    judgements = read_qrels(qrels)
    if not judgements:
        raise CorpusError(f"{qrels} holds no judgement. Give lines of query, document and score.")
    asked = unjudged = 0
    example = None
    for query in read_queries(queries):
        example = example or query.id
        if query.id in judgements:
            asked += 1
        else:
            unjudged += 1
    if not asked:
        found = f"{queries} has {example!r}" if example else f"{queries} holds no query"
        raise CorpusError(
            f"The judgements in {qrels} are for no query there is: they name {next(iter(judgements))!r}, and {found}. "
            "Give the queries and the judgements of one collection."
        )
    collection = Collection(queries, judgements, asked, unjudged, len(judgements) - asked)
    if unjudged:
        logger.warning("%d of %d queries have no judgement and are not asked.", unjudged, asked + unjudged)
    if collection.missing:
        logger.warning(
            "%d of %d judged queries are not in %s: the figures are those of the other %d.",
            collection.missing,
            len(judgements),
            queries,
            asked,
        )
    return collection


def evaluate_run(
    run: Run,
    collection: Collection,
    pipeline: Pipeline,
    *,
    measures: Sequence[str],
    size: int,
    stored: bool = False,
    bm25: bool = False,
    trec: TextIO | None = None,
) -> Evaluation:
    """Search a run folder exactly; `stored`: with the 9 bits that an index keeps of its weights.

    `trec` receives the lines of a TREC run file. `bm25` searches the texts that the run carries, all at once in memory.

    Raises:
        CorpusError: the run has none of the judged documents.
    """
    counted = _count_terms(run, collection.judged_documents())
    passages = _of_passages(counted.known, counted.known_parents)
    _check_judged(collection, counted.known_parents if passages else counted.known, f"The run {run.path}")
    terms = QueryTerms()
    weights = terms.passing(weigh_many(collection.queries(), pipeline))
    name = "exact, 9 bits" if stored else "exact"
    ranked = rank_run(run, weights, size=size, stored=stored, passages=passages)
    search = _measured(name, ranked, collection, measures, trec)
    baseline = None
    if bm25:
        most = counted.most_passages if passages else 0
        baseline = _measured("BM25", _rank_texts(run, list(collection.queries()), size, most), collection, measures)
    return Evaluation(search, baseline, terms.counts(), counted.terms, len(run.vocabulary()))


def evaluate_index(
    client: Client,
    index: str,
    collection: Collection,
    pipeline: Pipeline,
    engine: Engine,
    *,
    measures: Sequence[str],
    size: int,
    concurrency: int = 1,
    bm25: bool = True,
    trec: TextIO | None = None,
) -> Evaluation:
    """Ask an index with an engine, and with BM25 on the same index; `trec` receives the lines of a TREC run file.

    Raises:
        CorpusError: the index has none of the judged documents.
        UsageError: it has them as passages, and the engine is two-phase.
    """
    from sparse_ingest.cluster.frequencies import count_known, count_parents

    judged = collection.judged_documents()
    known = count_known(client, index, judged)
    parents = 0 if known else count_parents(client, index, judged)
    collapse = PARENT if _of_passages(known, parents) else None
    _check_judged(collection, known or parents, f"The index {index!r}")
    if collapse and engine.name == "two-phase":
        raise UsageError("OpenSearch cannot take the best passage of each document in two phases. Give --engine exact.")
    vocabulary = _vocabulary(pipeline)
    terms = QueryTerms()
    weights = terms.passing(weigh_many(collection.queries(), pipeline))
    ranked = rank_index(client, index, weights, engine, size=size, collapse=collapse, concurrency=concurrency)
    search = _measured(engine.name, ranked, collection, measures, trec)
    baseline = None
    if bm25:
        by_words = rank_words(
            client,
            index,
            collection.queries(),
            field=engine.field,
            size=size,
            collapse=collapse,
            concurrency=concurrency,
        )
        baseline = _measured("BM25", by_words, collection, measures)
    documents = _count_index_terms(client, index, engine.field, vocabulary) if engine.keys is None else None
    return Evaluation(search, baseline, terms.counts(), documents, len(vocabulary))


def measure_trec_run(path: Path, collection: Collection, measures: Sequence[str]) -> Measured:
    """Measure a TREC run file on the same queries; one that the file lacks found nothing.

    Raises:
        CorpusError: the file cannot be read, or holds none of the queries.
    """
    asked = [query.id for query in collection.queries()]
    found = read_trec_run(path, set(asked))
    if not found:
        raise CorpusError(
            f"{path} has none of the {len(asked)} judged queries. Give a run file of the same collection."
        )
    return measure(
        (
            Ranked(query_id, list(found.get(query_id, {})), list(found.get(query_id, {}).values()), 0.0, None)
            for query_id in asked
        ),
        collection.qrels,
        measures,
    )


def _measured(
    name: str, ranked: Iterable[Ranked], collection: Collection, measures: Sequence[str], trec: TextIO | None = None
) -> Row:
    latencies: list[tuple[float, float | None]] = []

    def passing() -> Iterator[Ranked]:
        for one in ranked:
            latencies.append((one.latency_s, one.took_ms))
            if trec is not None:
                trec.writelines(trec_lines([one]))
            yield one

    measured = measure(passing(), collection.qrels, measures)
    return Row(name, measured, _latency(latencies))


def _latency(latencies: Sequence[tuple[float, float | None]]) -> Latency:
    import numpy as np

    waited = 1000 * np.array([waited_s for waited_s, _ in latencies])
    took = [took_ms for _, took_ms in latencies if took_ms is not None]
    if not took:
        return Latency(float(waited.mean()))
    p50, p95, p99 = (float(value) for value in np.percentile(waited, [50, 95, 99]))
    return Latency(float(waited.mean()), p50, p95, p99, float(np.median(took)))


def _of_passages(known: int, parents: int) -> bool:
    """Whether the judgements are for the documents of the passages that are searched; it is told."""
    if known or not parents:
        return False
    logger.warning("The judgements name documents, of which passages are searched: the best of each stands for it.")
    return True


def _check_judged(collection: Collection, known: int, place: str) -> None:
    judged = collection.judged_documents()
    if not known:
        raise CorpusError(
            f"{place} has none of the {len(judged):,} judged documents, such as {min(judged)!r}. "
            "Give the judgements of the corpus that was encoded."
        )
    if known < len(judged):
        logger.warning(
            "%s has %d of the %d judged documents: the others can never be found.", place, known, len(judged)
        )


class _Counted(NamedTuple):
    """Terms of a run, how many of the judged documents it has, by their own id or as passages, and the most of one."""

    terms: TermCounts
    known: int
    known_parents: int
    most_passages: int


def _count_terms(run: Run, wanted: set[str]) -> _Counted:
    import numpy as np

    from sparse_ingest.runs.shards import read_shard_vectors

    vocabulary = run.vocabulary()
    holding = np.zeros(len(vocabulary), np.int64)
    count = known = 0
    parents: set[str] = set()
    most = 0
    of_passages = run.manifest.identity.get("overflow") == "passages"
    for shard in run.done_shards():
        for rows in read_shard_vectors(run.shard_path(shard)):
            holding += np.bincount(rows.token_ids, minlength=len(vocabulary))
            count += len(rows.doc_ids)
            known += sum(1 for doc_id in rows.doc_ids if doc_id in wanted)
            if of_passages:
                parents.update(wanted.intersection(map(document_id, rows.doc_ids)))
                most = max(most, *(passage_number(doc_id) + 1 for doc_id in rows.doc_ids))
    by_token = {str(vocabulary[token_id]): int(holding[token_id]) for token_id in np.flatnonzero(holding).tolist()}
    return _Counted(TermCounts(count, by_token), known, len(parents), most)


def _count_index_terms(client: Client, index: str, field: str, vocabulary: Sequence[str | None]) -> TermCounts | None:
    from sparse_ingest.cluster.frequencies import count_holding, count_searchable

    try:
        holding = count_holding(client, index, field, [token for token in vocabulary if token is not None])
    except ClusterError as error:
        # What was searched is worth more than how sparse it is.
        logger.warning("The terms of the documents are not counted. %s", error)
        return None
    return TermCounts(count_searchable(client, index), holding)


def _vocabulary(pipeline: Pipeline) -> list[str | None]:
    """The tokens of the document side."""
    from sparse_ingest.checkpoints.layouts import read_checkpoint
    from sparse_ingest.queries.token_ids import read_vocabulary

    model = pipeline.model
    name, revision = (model.document, model.revision) if model.document else (model.query, model.query_revision)
    return read_vocabulary(read_checkpoint(str(name), revision, code=model.trust_remote_code).transformer)


def _rank_texts(run: Run, queries: Sequence[Query], size: int, most_passages: int) -> Iterator[Ranked]:
    """BM25 over the texts that a run carries; of passages, which a document has so many of at most, the best ones."""
    from sparse_ingest.evaluation.bm25 import rank_texts

    began = time.perf_counter()
    found = list(rank_texts(_texts(run), queries, size * (most_passages or 1)))
    each_s = (time.perf_counter() - began) / len(queries)
    for query_id, doc_ids, scores in found:
        if most_passages:
            best: dict[str, float] = {}
            for passage, score in zip(doc_ids, scores, strict=True):
                best.setdefault(document_id(passage), score)
            doc_ids, scores = list(best)[:size], list(best.values())[:size]
        yield Ranked(query_id, doc_ids, scores, each_s, None)


def _texts(run: Run) -> Iterator[tuple[str, str]]:
    from sparse_ingest.runs.shards import read_shard

    for shard in run.done_shards():
        for part in read_shard(run.shard_path(shard)):
            for doc_id, carried in zip(part.vectors.doc_ids, part.fields, strict=True):
                fields = json.loads(carried)
                if "text" not in fields:
                    raise CorpusError(
                        f"{run.path} carries no texts, which BM25 searches. Leave --bm25 out, or encode it without "
                        "--no-text."
                    )
                yield doc_id, " ".join(str(part) for part in (fields.get("title"), fields["text"]) if part)
