"""A whole index read at one instant: all its ids, and token by token the weights of a rank_features field. And counts.

In: an index, tokens or ids. Out: ids, and for each token the places and stored weights of all documents that have it;
or only how many have it: a search that brings no document, but walks over all postings of the token. A query
for one token with weight 1.0 scores a document with the stored weight itself, so nothing need be explained, and what
no run expects is found as well. A place is what `_shard_doc` says: it grows in the order that documents come in, and
stays what it is as long as the point in time is open.
Not covered: single documents (reading.py); sparse_vector fields, whose clusters hold only a part of each posting list.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from sparse_ingest.cluster.client import Client, path_of
from sparse_ingest.cluster.indexes import Index, count_matching
from sparse_ingest.cluster.reading import search_many
from sparse_ingest.errors import ClusterError
from sparse_ingest.records import PARENT, batched

PAGE = 10_000  # the default of index.max_result_window
_KEEP_ALIVE = "10m"
_SEARCHES = 500  # in one _msearch, when the tokens are rare
_IDS = 1000  # in one count
_HITS = 100_000  # that one _msearch may bring, about 4 MB
# Some of the documents that answer a question: the number of the question, their places, and the weights.
Page = tuple[int, npt.NDArray[np.int64], npt.NDArray[np.float32]]


class IndexScan:
    """One index at one instant."""

    def __init__(self, client: Client, index: str, point: str, page: int) -> None:
        self._client = client
        self._index = index
        self._point = point
        self._page = page

    def ids(self) -> Iterator[tuple[npt.NDArray[np.int64], list[str]]]:
        """Places and ids of all documents, by ascending place."""
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
        """The id of the document at a place."""
        body = self._body({"match_all": {}}, place - 1) | {"_source": False, "size": 1}
        [[hit]] = self._hits([body], "_id")
        return str(hit["_id"])

    def weights(self, field: str, questions: Sequence[Sequence[str]], likely: Sequence[int]) -> Iterator[Page]:
        """All documents that have a token of a question, with the sum of the weights of those; without order.

        `likely` says about how many documents will answer each question, so that answers stay of one size.
        """
        waiting: deque[tuple[int, int | None]] = deque((number, None) for number in range(len(questions)))
        while waiting:
            batch: list[tuple[int, int | None]] = []
            hits = 0
            while waiting and len(batch) < _SEARCHES and (not batch or hits + likely[waiting[0][0]] <= _HITS):
                hits += min(self._page, likely[waiting[0][0]])
                batch.append(waiting.popleft())
            # Reading ids from disk would cost ten times what all the rest does.
            extra = {"stored_fields": "_none_", "track_scores": True}
            bodies = [self._body(_question(field, questions[number]), after) | extra for number, after in batch]
            for (number, _), found in zip(batch, self._hits(bodies, "_score", "sort"), strict=True):
                if found:
                    places = np.array([hit["sort"][0] for hit in found], dtype=np.int64)
                    yield number, places, np.array([hit["_score"] for hit in found], dtype=np.float32)
                if len(found) == self._page:
                    waiting.appendleft((number, found[-1]["sort"][0]))

    def _hits(self, bodies: Sequence[dict[str, Any]], *parts: str) -> Iterator[list[dict[str, Any]]]:
        """These parts of the hits of each search."""
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
    """Hold an index as it is now for the block."""
    path = f"{index.path}/_search/point_in_time"
    point = str(client.call("POST", path, params={"keep_alive": _KEEP_ALIVE})["pit_id"])
    try:
        yield IndexScan(client, index.name, point, int(index.setting("max_result_window") or PAGE))
    finally:
        # It ends by itself.
        with contextlib.suppress(ClusterError):
            client.call("DELETE", "/_search/point_in_time", {"pit_id": [point]}, timeout_s=10)


def _question(field: str, tokens: Sequence[str]) -> dict[str, Any]:
    return {"neural_sparse": {field: {"query_tokens": dict.fromkeys(tokens, 1.0)}}}


def count_searchable(client: Client, index: str) -> int:
    """Return how many documents a search can find."""
    return count_matching(client, path_of(index), {"match_all": {}})


def count_known(client: Client, index: str, doc_ids: Iterable[str]) -> int:
    """How many of these documents an index has."""
    path = path_of(index)
    return sum(count_matching(client, path, {"ids": {"values": some}}) for some in batched(doc_ids, _IDS))


def count_parents(client: Client, index: str, doc_ids: Iterable[str]) -> int:
    """How many of these documents an index has passages of, which name them in a keyword field; 0 without the field."""
    field, path = PARENT, path_of(index)
    mapped = client.call("GET", f"{path}/_mapping/field/{field}")
    if not any(one["mappings"].get(field, {}).get("mapping", {}).get(field, {}).get("type") == "keyword"
               for one in mapped.values()):  # fmt: skip
        return 0
    known = 0
    for some in batched(doc_ids, _IDS):
        # Below 3,000 values the count of different ones is as good as exact.
        counted = {"parents": {"cardinality": {"field": field, "precision_threshold": 3 * _IDS}}}
        body = {"size": 0, "query": {"terms": {field: some}}, "aggs": counted}
        answer = client.call("POST", f"{path}/_search", body, params={"search_pipeline": "_none"})
        known += int(answer["aggregations"]["parents"]["value"])
    return known


def count_holding(client: Client, index: str, field: str, tokens: Sequence[str]) -> dict[str, int]:
    """For each token how many documents of a rank_features field hold it.

    Raises:
        ClusterError: the cluster lacks the neural-search plugin.
    """
    path, wanted = f"{path_of(index)}/_msearch", "responses.hits.total.value"
    bodies = ({"size": 0, "track_total_hits": True, "query": _question(field, [token])} for token in tokens)
    answers = search_many(client, path, bodies, index, at_once=_SEARCHES, filter_path=wanted)
    return {token: int(answer["hits"]["total"]["value"]) for token, answer in zip(tokens, answers, strict=True)}
