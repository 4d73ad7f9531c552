"""Read a complete index at a point in time: ids, and the postings of tokens in a rank_features field. Also counts.

A query for one token with weight 1.0 scores a document with its stored weight. The place of a document is its
`_shard_doc`, which is valid while the point in time is open. Not covered: single documents (reading.py), and
sparse_vector fields, whose clusters contain only a part of each posting list.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from sparse_ingest.cluster.client import Client, ResponseError, path_of
from sparse_ingest.cluster.failures import is_block
from sparse_ingest.cluster.indexes import Index, count_matching
from sparse_ingest.cluster.reading import search_many, unsearchable
from sparse_ingest.errors import ClusterError
from sparse_ingest.records import PARENT, batched

PAGE = 10_000  # the default of index.max_result_window
_KEEP_ALIVE = "10m"
_SEARCHES = 500  # maximum in one _msearch
_IDS = 1000  # in one count
_HITS = 100_000  # of one _msearch, about 4 MB
_FILTERS = 1000  # of one aggregation
# OpenSearch checks every document for every filter: one aggregation takes 0.6 times as long as one search per token at
# 10,000 documents, 0.15 at 1,400. Elasticsearch counts each filter separately: 0.15 at both sizes.
_FEW = 10_000
# Some of the hits of a query: the number of the query, places, and weights.
Page = tuple[int, npt.NDArray[np.int64], npt.NDArray[np.float32]]


class IndexScan:
    """An index at a point in time."""

    def __init__(self, client: Client, index: str, point: str, page: int) -> None:
        self._client, self._index, self._point, self._page = client, index, point, page

    def ids(self) -> Iterator[tuple[npt.NDArray[np.int64], list[str]]]:
        """Yield places and ids of all documents, by ascending place."""
        after: int | None = None
        while True:
            body = self._body({"match_all": {}}, after) | {"_source": False}
            [hits] = self._hits([body], "_id", "sort")
            if hits:
                yield np.array([hit["sort"][0] for hit in hits], dtype=np.int64), [hit["_id"] for hit in hits]
            if len(hits) < self._page:
                return
            after = hits[-1]["sort"][0]

    def id_at(self, place: int) -> str:
        """Return the id of the document at a place."""
        body = self._body({"match_all": {}}, place - 1) | {"_source": False, "size": 1}
        [[hit]] = self._hits([body], "_id")
        return str(hit["_id"])

    def weights(self, field: str, queries: Sequence[Sequence[str]], likely: Sequence[int]) -> Iterator[Page]:
        """Yield all documents with a token of a query, and the sum of its weights, without order.

        `likely` estimates the hits of each query, to limit the size of answers.
        """
        waiting: deque[tuple[int, int | None]] = deque((number, None) for number in range(len(queries)))
        while waiting:
            batch: list[tuple[int, int | None]] = []
            hits = 0
            while waiting and len(batch) < _SEARCHES and (not batch or hits + likely[waiting[0][0]] <= _HITS):
                hits += min(self._page, likely[waiting[0][0]])
                batch.append(waiting.popleft())
            # Reading ids from disk would take ten times as long as the rest.
            extra = {"stored_fields": "_none_", "track_scores": True}
            wanted = [dict.fromkeys(queries[number], 1.0) for number, _ in batch]
            clauses = [self._client.dialect.tokens_clause(field, tokens) for tokens in wanted]
            bodies = [self._body(clause, after) | extra for clause, (_, after) in zip(clauses, batch, strict=True)]
            for (number, _), found in zip(batch, self._hits(bodies, "_score", "sort"), strict=True):
                if found:
                    places = np.array([hit["sort"][0] for hit in found], dtype=np.int64)
                    yield number, places, np.array([hit["_score"] for hit in found], dtype=np.float32)
                if len(found) == self._page:
                    waiting.appendleft((number, found[-1]["sort"][0]))

    def _hits(self, bodies: Sequence[dict[str, Any]], *parts: str) -> Iterator[list[dict[str, Any]]]:
        """Yield these parts of the hits of each search."""
        wanted = ",".join(f"responses.hits.hits.{part}" for part in parts)
        answers = search_many(self._client, "/_msearch", bodies, self._index, at_once=_SEARCHES, filter_path=wanted)
        for answer in answers:
            yield answer.get("hits", {}).get("hits", [])

    def _body(self, query: dict[str, Any], after: int | None) -> dict[str, Any]:
        body: dict[str, Any] = {
            "query": query,
            "size": self._page,
            "pit": {"id": self._point, "keep_alive": _KEEP_ALIVE},
            "sort": [{"_shard_doc": "asc"}],
            "track_total_hits": False,
        }
        return body if after is None else body | {"search_after": [after]}


@contextlib.contextmanager
def scan(client: Client, index: Index) -> Iterator[IndexScan]:
    """Open a point in time of an index for the block."""
    points, key = client.dialect.points, client.dialect.point_key
    point = str(client.call("POST", f"{index.path}{points}", params={"keep_alive": _KEEP_ALIVE})[key])
    try:
        # Many raise the window to billions: a page of that size would be an answer with the complete index.
        page = min(int(index.setting("max_result_window") or PAGE), PAGE)
        yield IndexScan(client, index.name, point, page)
    finally:
        with contextlib.suppress(ClusterError):  # it expires
            client.call("DELETE", points, {key: point}, timeout_s=10)


def count_known(client: Client, index: str, doc_ids: Iterable[str]) -> int:
    """Return how many of these documents an index has."""
    path = path_of(index)
    return sum(count_matching(client, path, {"ids": {"values": some}}) for some in batched(doc_ids, _IDS))


def count_parents(client: Client, index: str, doc_ids: Iterable[str]) -> int:
    """Return how many of these documents have passages in an index; 0 if it lacks the keyword field of parents."""
    field, path = PARENT, path_of(index)
    mapped = client.call("GET", f"{path}/_mapping/field/{field}")
    if not any(one["mappings"].get(field, {}).get("mapping", {}).get(field, {}).get("type") == "keyword"
               for one in mapped.values()):  # fmt: skip
        return 0
    known = 0
    for some in batched(doc_ids, _IDS):
        # Below 3,000 values the cardinality is close to exact.
        counted = {"parents": {"cardinality": {"field": field, "precision_threshold": 3 * _IDS}}}
        body = {"size": 0, "query": {"terms": {field: some}}, "aggs": counted}
        answer = client.search(path, body)
        known += int(answer["aggregations"]["parents"]["value"])
    return known


def document_frequencies(
    client: Client, index: str, field: str, tokens: Sequence[str], documents: int | None = None
) -> dict[str, int]:
    """Return how many documents have each token. OpenSearch needs the neural-search plugin for that.

    `documents` is the number of documents of the index: pass it to allow counting by aggregation, which is faster for
    small indexes.

    Raises:
        UnsearchableFieldError: the field cannot be searched for tokens.
    """
    clauses = [client.dialect.tokens_clause(field, {token: 1.0}) for token in tokens]
    if documents is not None and (documents <= _FEW or client.dialect.product == "elasticsearch"):
        counts: list[int] = []
        for some in batched(clauses, _FILTERS):
            body = {"size": 0, "aggs": {"tokens": {"filters": {"filters": some}}}}
            try:
                # Without terminated_early: OpenSearch 3.6.0 may set it although the counts are complete.
                answer = client.search(path_of(index), body, filter_path="_shards,timed_out,aggregations")
            except ResponseError as error:
                if error.status != 400 or is_block(error.status, error.kind):
                    raise
                raise unsearchable(client, index, error.kind, error.reason) from error
            counts += (int(bucket["doc_count"]) for bucket in answer["aggregations"]["tokens"]["buckets"])
        return dict(zip(tokens, counts, strict=True))
    path, wanted = f"{path_of(index)}/_msearch", "responses.hits.total.value"
    bodies = ({"size": 0, "track_total_hits": True, "query": clause} for clause in clauses)
    answers = search_many(client, path, bodies, index, at_once=_SEARCHES, filter_path=wanted)
    return {token: int(answer["hits"]["total"]["value"]) for token, answer in zip(tokens, answers, strict=True)}
