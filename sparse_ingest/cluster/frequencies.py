"""How many documents of an index hold each token, and which documents it has.

In: an index, tokens or ids. Out: counts. Each token is one search for it that brings no document, many in a request;
such a search walks over all postings of its token.
Not covered: sparse_vector fields, whose clusters answer with a part of their documents.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from urllib.parse import quote

from sparse_ingest.cluster.client import Client
from sparse_ingest.cluster.reading import search_many
from sparse_ingest.records import PARENT

_SEARCHES = 500  # in one _msearch
_IDS = 1000  # in one _count


def count_searchable(client: Client, index: str) -> int:
    """Return how many documents a search can find. Shards that do not answer are not counted."""
    return int(client.call("POST", f"/{quote(index, safe='')}/_count", {"query": {"match_all": {}}})["count"])


def count_known(client: Client, index: str, doc_ids: Iterable[str]) -> int:
    """How many of these documents an index has."""
    known, waiting = 0, iter(doc_ids)
    while some := list(islice(waiting, _IDS)):
        body = {"query": {"ids": {"values": some}}}
        known += int(client.call("POST", f"/{quote(index, safe='')}/_count", body)["count"])
    return known


def count_parents(client: Client, index: str, doc_ids: Iterable[str]) -> int:
    """How many of these documents an index has passages of, which name them in a keyword field; 0 without the field."""
    field = PARENT
    path = f"/{quote(index, safe='')}"
    mapped = client.call("GET", f"{path}/_mapping/field/{field}")
    if not any(one["mappings"].get(field, {}).get("mapping", {}).get(field, {}).get("type") == "keyword"
               for one in mapped.values()):  # fmt: skip
        return 0
    known, waiting = 0, iter(doc_ids)
    while some := list(islice(waiting, _IDS)):
        # Below 3,000 values the count of different ones is as good as exact.
        counted = {"parents": {"cardinality": {"field": field, "precision_threshold": 3 * _IDS}}}
        body = {"size": 0, "query": {"terms": {field: some}}, "aggs": counted}
        known += int(client.call("POST", f"{path}/_search", body)["aggregations"]["parents"]["value"])
    return known


def count_holding(client: Client, index: str, field: str, tokens: Sequence[str]) -> dict[str, int]:
    """For each token how many documents of a rank_features field hold it.

    Raises:
        ClusterError: the cluster lacks the neural-search plugin.
    """
    counts: dict[str, int] = {}
    path = f"/{quote(index, safe='')}/_msearch"
    for start in range(0, len(tokens), _SEARCHES):
        some = tokens[start : start + _SEARCHES]
        bodies = [
            {"size": 0, "track_total_hits": True, "query": {"neural_sparse": {field: {"query_tokens": {token: 1.0}}}}}
            for token in some
        ]
        answers = search_many(client, path, bodies, index, filter_path="responses.hits.total.value")
        counts.update(
            {token: int(answer["hits"]["total"]["value"]) for token, answer in zip(some, answers, strict=True)}
        )
    return counts
