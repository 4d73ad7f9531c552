"""A whole index read at one instant: all its ids, and token by token the weights of a rank_features field.

In: an index, tokens. Out: ids, and for each token the places and stored weights of all documents that have it. A query
for one token with weight 1.0 scores a document with the stored weight itself, so nothing need be explained, and what
nobody expects is found as well. A place is what `_shard_doc` says: it grows in the order that documents come in, and
stays what it is as long as the point in time is open.
Not covered: single documents (reading.py); sparse_vector fields, whose clusters hold only a part of each posting list.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
import numpy.typing as npt

from sparse_ingest.cluster.client import Client
from sparse_ingest.cluster.indexes import Index
from sparse_ingest.cluster.reading import search_many
from sparse_ingest.errors import ClusterError

PAGE = 10_000  # the default of index.max_result_window
_KEEP_ALIVE = "10m"
_SEARCHES = 500  # in one _msearch, when the tokens are rare
_HIT = "responses.hits.hits"
_HITS = 100_000  # that one _msearch may bring, about 4 MB


class Page(NamedTuple):
    """Some of the documents that answer a question: which question, their places, and the weights."""

    question: int
    places: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float32]


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
            [answer] = search_many(
                self._client, "/_msearch", [body], self._index, filter_path=f"{_HIT}._id,{_HIT}.sort"
            )
            hits = answer.get("hits", {}).get("hits", [])
            if hits:
                yield np.array([hit["sort"][0] for hit in hits], dtype=np.int64), [hit["_id"] for hit in hits]
            if len(hits) < self._page:
                return
            after = hits[-1]["sort"][0]

    def id_at(self, place: int) -> str:
        """The id of the document at a place."""
        body = self._body({"match_all": {}}, place - 1) | {"_source": False, "size": 1}
        [answer] = search_many(self._client, "/_msearch", [body], self._index, filter_path=f"{_HIT}._id")
        return str(answer["hits"]["hits"][0]["_id"])

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
            answers = search_many(
                self._client, "/_msearch", bodies, self._index, filter_path=f"{_HIT}._score,{_HIT}.sort"
            )
            for (number, _), answer in zip(batch, answers, strict=True):
                found = answer.get("hits", {}).get("hits", [])
                if found:
                    places = np.array([hit["sort"][0] for hit in found], dtype=np.int64)
                    yield Page(number, places, np.array([hit["_score"] for hit in found], dtype=np.float32))
                if len(found) == self._page:
                    waiting.appendleft((number, found[-1]["sort"][0]))

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
    path = f"/{quote(index.name, safe='')}/_search/point_in_time"
    point = str(client.call("POST", path, params={"keep_alive": _KEEP_ALIVE})["pit_id"])
    try:
        yield IndexScan(client, index.name, point, int(index.setting("max_result_window") or PAGE))
    finally:
        # It ends by itself.
        with contextlib.suppress(ClusterError):
            client.call("DELETE", "/_search/point_in_time", {"pit_id": [point]}, timeout_s=10)


def _question(field: str, tokens: Sequence[str]) -> dict[str, Any]:
    return {"neural_sparse": {field: {"query_tokens": dict.fromkeys(tokens, 1.0)}}}
