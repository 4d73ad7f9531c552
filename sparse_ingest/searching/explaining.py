"""Explain one document of an index for a query: its rank, its score, and why it is not among the first hits.

In: a connection, an index, query weights and a document. Out: an `Explanation`. A run is explained in run_search.py.

After the first k hits, the rank is one more than the number of hits with a higher score, which the server counts
(`min_score`); documents with the same score are in the server's order. Approximate engines rank only what they visit,
so a document that they did not find has no rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from sparse_ingest.cluster.client import Client, path_of
from sparse_ingest.cluster.indexes import count_matching
from sparse_ingest.cluster.postings import PAGE
from sparse_ingest.cluster.query_fields import refuse_unmapped
from sparse_ingest.cluster.reading import read_fields
from sparse_ingest.cluster.search_bodies import Engine, SearchBody
from sparse_ingest.queries.weight_table import QueryWeights, to_float32
from sparse_ingest.records import TermShare
from sparse_ingest.searching.hits import Explanation
from sparse_ingest.searching.index_search import Asker, without_source


def explain_in_index(
    client: Client,
    index: str,
    weights: QueryWeights,
    doc_id: str,
    *,
    size: int,
    engine: Engine,
    filter: Mapping[str, Any] | None = None,
    window: int = PAGE,
) -> Explanation:
    """Return the rank and the score of one document of an index, compared with hit number `size`; see `search_index`.

    Only the exact engine ranks documents after the first `size`. The order of equal scores after `window`, the setting
    `max_result_window` of the index, cannot be read: then the rank is the first of theirs.
    """
    refuse_unmapped(client, path_of(index), engine.mappings, filter, None)
    fields = read_fields(client, index, engine.field, [doc_id])
    if doc_id not in fields:
        return Explanation(doc_id, "not found", size)
    ids = {"ids": {"values": [doc_id]}}
    # Two-phase and pruned search find no document that has only light tokens of the query.
    asker = Asker(client, index, replace(engine, name="exact") if engine.kind == "rank_features" else engine)
    terms, score, scale = _own(asker, weights, ids)
    asker.warn_of_omitted()
    common = {share.token for share in terms}
    lacking = [token for token in weights if token not in common]
    found = Explanation(doc_id, None, size, fields=fields[doc_id], terms=terms, lacking=lacking)
    if not terms:
        return found._replace(reason="no common term")
    found = found._replace(score=score * scale)
    if filter and not count_matching(client, path_of(index), {"bool": {"filter": [ids, dict(filter)]}}):
        return found._replace(reason="filtered out")
    searching = Asker(client, index, engine)
    hits = searching.ask(weights, size=size, filter=filter, change=without_source)[0]["hits"]["hits"]
    names = [hit["_id"] for hit in hits]
    last = to_float32(hits[-1]["_score"]) if hits else None
    found = found._replace(last_score=None if last is None else last * scale)
    if engine.name == "exact":
        rank, matching, equal = _standing(partial(asker.ask, weights, filter=filter), doc_id, score, window)
        found = found._replace(rank=rank, matching=matching, equal=equal)
    if doc_id in names:
        return found._replace(rank=names.index(doc_id) + 1)
    missed = last is None or len(hits) < size or score > last
    return found._replace(reason="missed" if missed and engine.name != "exact" else "low score")


def _own(asker: Asker, weights: QueryWeights, ids: dict[str, Any]) -> tuple[list[TermShare], float, float]:
    """Return the terms of the document of this query for ids, its score by the server, and the factor for scores."""

    def only_this(body: SearchBody) -> SearchBody:
        # Around the query: the filter of a SEISMIC clause does not support ids (3.6.0).
        return body | {"query": {"bool": {"filter": [ids], "should": [body["query"]]}}, "_source": False}

    answer, scale = asker.ask(weights, size=1, explain=True, change=only_this)
    terms = [share for hit in answer["hits"]["hits"] for share in asker.shares(hit, scale)]
    scores = [to_float32(hit["_score"]) for hit in answer["hits"]["hits"]]
    # Clusters give a score to the best documents only, but explain all.
    return terms, max([*scores, 0.0]) or to_float32(sum(term.contribution for term in terms) / scale), scale


def _standing(ask: Callable[..., tuple[Any, float]], doc_id: str, score: float, window: int) -> tuple[int, int, int]:
    """Return the rank of a document with this score, the number of hits, and how many others have the same score."""
    next_score = float(np.nextafter(np.float32(score), np.float32(np.inf)))

    def count(**also: float) -> int:
        answer, _ = ask(size=0, change=lambda body: body | {"track_total_hits": True, **also})
        return int(answer["hits"]["total"]["value"])

    matching, least, higher = count(), count(min_score=score), count(min_score=next_score)
    rank = higher + 1
    if least > rank and least <= window:
        answer, _ = ask(size=least - higher, change=lambda body: body | {"from": higher, "_source": False})
        same = (hit["_id"] for hit in answer["hits"]["hits"])
        rank = next((place for place, name in enumerate(same, start=rank) if name == doc_id), rank)
    return rank, matching, least - higher - 1
