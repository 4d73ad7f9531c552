"""Search a run folder exactly, without a server. With `stored`, scores equal an index's, bit for bit."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np

from sparse_ingest.cluster.scores import stored_weights
from sparse_ingest.models.dot_products import Postings, query_token_mask
from sparse_ingest.queries.weight_table import QueryWeights, to_float32
from sparse_ingest.records import SparseRows, TermShare, batched, check_weights, document_id
from sparse_ingest.runs.checking import find_documents, finished_shards, read_document, shard_parts, shard_vectors
from sparse_ingest.runs.run import Run
from sparse_ingest.runs.shards import parse_fields
from sparse_ingest.searching.exact import ExactHits, QueryVector, best_places, search_exact
from sparse_ingest.searching.hits import Explanation, Hit, Ranked, first_of_each, heaviest_first
from sparse_ingest.searching.query import named, not_in_vocabulary

# Queries per pass over the run, and their hits; a hit needs at most 0.5 KB.
QUERIES_AT_ONCE = 4096
HITS_AT_ONCE = 1 << 20
logger = logging.getLogger(__name__)


def search_run(
    run: Run, weights: QueryWeights, *, size: int, stored: bool = False, collapse: str | None = None
) -> list[Hit]:
    """Search the finished shards of a run exactly.

    Args:
        run: The run.
        weights: Query weights by token.
        size: Number of hits.
        stored: Use the weights that an index would store (9 bits).
        collapse: As for `search_index`, a field of the run. The run is read again until enough values differ.
    """
    shards = _finished_shards(run)
    vector = _vector(run, weights)
    parts = partial(_vectors, run, shards, stored)
    if collapse is None:
        [found] = search_exact(parts(), [vector], size)
    else:
        [found] = _search_distinct(parts, [vector], size, partial(_values_of, run, shards, collapse))
    rows = _rows_at(run, shards, set(found.positions.tolist()), stored)
    hits = []
    for place, doc_id in enumerate(found.doc_ids):
        carried, held = rows[int(found.positions[place])]
        score = float(found.scores[place])
        hits.append(Hit(place + 1, score, doc_id, parse_fields(carried, doc_id), shares(weights, held)))
    return hits


def explain_in_run(run: Run, weights: QueryWeights, doc_id: str, *, size: int, stored: bool = False) -> Explanation:
    """Return the rank and the score of one document of a run, compared with hit number `size`; see `search_run`.

    Rows with equal scores are in the order of the run. The document is found by reading ids only, then the vectors of
    the run are read once.
    """
    shards = _finished_shards(run)
    vector = _vector(run, weights)
    place = find_documents(run, shards, [doc_id]).get(doc_id)
    if place is None:
        return Explanation(doc_id, "not found", size)
    document = read_document(run, place)
    row = _as_stored(document.vectors) if stored else document.vectors
    terms = shares(weights, _terms(row, run.vocabulary()))
    asked = query_token_mask(vector.token_ids)
    own = Postings.of(row, asked).scores(vector.token_ids, vector.weights)[1]
    common = {share.token for share in terms}
    lacking = [token for token in weights if token not in common]
    found = Explanation(doc_id, None, size, fields=parse_fields(document.fields[0], doc_id), lacking=lacking)
    if not len(own):
        return found._replace(reason="no common term")
    score, best, first, before, matching, equal = own[0], np.empty(0, np.float32), 0, 0, 0, 0
    for part in _vectors(run, shards, stored):
        rows, scores = Postings.of(part, asked).scores(vector.token_ids, vector.weights)
        same = scores == score
        before += int((scores > score).sum() + (same & (rows + first < place.position)).sum())
        matching, equal = matching + len(rows), equal + int(same.sum())
        best = np.concatenate([best, scores])
        best = best[best_places(best, size)]
        first += len(part.doc_ids)
    return found._replace(
        reason="low score" if before >= size else None, rank=before + 1, score=float(score), matching=matching,
        last_score=float(best[-1]), equal=equal - 1, terms=terms,
    )  # fmt: skip


def why_empty_run(run: Run, weights: QueryWeights) -> list[str]:
    """Return why the exact search of a run found nothing. It compares every vector, so no document has the tokens."""
    documents, vocabulary = run.totals()["rows"], token_ids_of(run)
    if not documents:
        return [f"{run.path} has no documents."]
    unknown = [token for token in weights if token not in vocabulary]
    found = [not_in_vocabulary(unknown, "of the run")] if unknown else []
    if known := [token for token in weights if token in vocabulary]:
        found.append(f"None of the {documents:,} documents of {run.path} has a token of the query: {named(known)}.")
    return found


def rank_run(
    run: Run,
    queries: Iterable[tuple[str, QueryWeights]],
    *,
    size: int,
    stored: bool = False,
    prune: Callable[[SparseRows], SparseRows] | None = None,
    passages: bool = False,
) -> Iterator[Ranked]:
    """Search the finished shards of a run exactly for many queries; yield a ranking per query, in their order.

    The run is read once per 4,096 queries, or fewer if `size` is above 256. The latency of a query is an equal share of
    the time of its block.

    Args:
        run: The run.
        queries: Ids and weights of the queries.
        size: Number of hits of each query.
        stored: Use the weights that an index would store (9 bits).
        prune: Applied to each part of the run first, like by a load.
        passages: The run has passages: return documents, each with the score of its best passage.
    """
    shards, token_ids = _finished_shards(run), token_ids_of(run)
    unknown: dict[str, None] = {}
    for block in batched(queries, max(1, min(QUERIES_AT_ONCE, HITS_AT_ONCE // max(1, size)))):
        began = time.perf_counter()
        vectors = [QueryVector.of(weights, token_ids) for _, weights in block]
        unknown.update(dict.fromkeys(token for _, weights in block for token in weights if token not in token_ids))
        parts = partial(_vectors, run, shards, stored, prune)
        if passages:
            found = _search_distinct(parts, vectors, size, lambda hits: map(document_id, hits.doc_ids))
        else:
            found = search_exact(parts(), vectors, size)
        each_s = (time.perf_counter() - began) / len(block)
        for (query_id, _), hits in zip(block, found, strict=True):
            doc_ids = list(map(document_id, hits.doc_ids)) if passages else hits.doc_ids
            yield Ranked(query_id, doc_ids, hits.scores.tolist(), each_s)
    _warn_of_unknown(list(unknown), "tokens of the queries")


def _search_distinct(
    parts: Callable[[], Iterator[SparseRows]],
    queries: Sequence[QueryVector],
    k: int,
    keys: Callable[[ExactHits], Iterable[str]],
) -> list[ExactHits]:
    """Return the best hit of each key, k per query; search for more until k keys differ."""
    best: dict[int, ExactHits] = {}
    asked, waiting = k, list(range(len(queries)))
    while waiting:
        asked *= 4
        found = search_exact(parts(), [queries[number] for number in waiting], asked)
        for number, hits in zip(waiting, found, strict=True):
            places = first_of_each(keys(hits))[:k]
            if len(places) == k or len(hits.doc_ids) < asked:
                doc_ids = [hits.doc_ids[place] for place in places]
                best[number] = ExactHits(doc_ids, hits.positions[places], hits.scores[places])
        waiting = [number for number in waiting if number not in best]
    return [best[number] for number in range(len(queries))]


def _finished_shards(run: Run) -> list[int]:
    """List the finished shards, once per search: a running encode must not shift the rows."""
    shards = finished_shards(run)
    if run.complete() is None:
        logger.warning("%s is incomplete: only its %d finished shards are searched.", run.path, len(shards))
    return shards


def _warn_of_unknown(unknown: Sequence[str], of_what: str) -> None:
    if unknown:
        logger.warning(
            "%d %s are not in the vocabulary of the run, such as %r: another model encoded them.",
            len(unknown), of_what, unknown[0],
        )  # fmt: skip


def token_ids_of(run: Run) -> dict[str, int]:
    """Return the id of each token of a run."""
    return {token: token_id for token_id, token in enumerate(run.vocabulary()) if token is not None}


def ordered_vector(weights: QueryWeights, token_ids: Mapping[str, int]) -> QueryVector:
    """Return the vector of one query, in the order of token ids, in which Lucene sums."""
    known = sorted((token for token in weights if token in token_ids), key=token_ids.__getitem__)
    return QueryVector.of({token: weights[token] for token in known}, token_ids)


def shares(weights: QueryWeights, held: Mapping[str, float]) -> list[TermShare]:
    """Return the terms that a query and a document share, heaviest first."""
    common = ((token, weight, held[token]) for token, weight in weights.items() if token in held)
    return heaviest_first(TermShare(*one, to_float32(one[1] * one[2])) for one in common)


def _vector(run: Run, weights: QueryWeights) -> QueryVector:
    check_weights(weights)  # also those of tokens that the run lacks
    token_ids = token_ids_of(run)
    unknown = sorted(weights.keys() - token_ids.keys())
    _warn_of_unknown(unknown, f"of the {len(weights)} tokens of the query")
    return ordered_vector(weights, token_ids)


def _vectors(
    run: Run, shards: Iterable[int], stored: bool, prune: Callable[[SparseRows], SparseRows] | None = None
) -> Iterator[SparseRows]:
    """Yield the vectors of some shards, with `stored` as an index stores their weights."""
    for shard in shards:
        for rows in shard_vectors(run, shard):
            if prune is not None:
                rows = prune(rows)
            yield _as_stored(rows) if stored else rows


def _as_stored(rows: SparseRows) -> SparseRows:
    return rows._replace(weights=stored_weights(rows.weights))


def _values_of(run: Run, shards: Sequence[int], field: str, hits: ExactHits) -> list[str]:
    """Return the value of a field of each hit, as JSON."""
    positions = hits.positions.tolist()
    rows = _rows_at(run, shards, set(positions), stored=False)
    return [
        json.dumps(parse_fields(rows[position][0], doc_id).get(field))
        for position, doc_id in zip(positions, hits.doc_ids, strict=True)
    ]


def _rows_at(
    run: Run, shards: Sequence[int], positions: set[int], stored: bool
) -> dict[int, tuple[str, dict[str, float]]]:
    """Return fields and terms of the rows at these positions among all rows of the shards."""
    rows: dict[int, tuple[str, dict[str, float]]] = {}
    first, vocabulary = 0, run.vocabulary()
    for shard in shards:
        after = first + run.rows_of(shard)
        if any(first <= position < after for position in positions):
            for part in shard_parts(run, shard):
                for position in positions.intersection(range(first, first + len(part.fields))):
                    one = part.vectors.take(np.array([position - first]))
                    terms = _terms(_as_stored(one) if stored else one, vocabulary)
                    rows[position] = part.fields[position - first], terms
                first += len(part.fields)
        first = after
    return rows


def _terms(one: SparseRows, vocabulary: Sequence[str | None]) -> dict[str, float]:
    """Return the weights of a single row by token."""
    return dict(zip((str(vocabulary[token_id]) for token_id in one.token_ids), one.weights.tolist(), strict=True))
