"""Reading back what an index keeps of sparse vectors, which it hides from `_source`.

In: document ids and keys (tokens, or token ids on a sparse_vector field). Out: per document what is stored for each
key, exactly. A neural_sparse query with every weight 1.0 scores a document with the sum of its stored weights, and its
explanation names each key with the "feature value" S that was found: the nearest decimal of a float32, so parsing gives
its bits back. neural_sparse is used because a `rank_feature` query takes everything before the last dot for the field:
it finds no token that holds a dot, and says nothing. Segments with clusters explain the bytes instead; those come as
uint8, features as float32. Needs the neural-search plugin; clusters are explained from 3.5 on.
Not covered: tokens that are in no vocabulary; there is no request that lists the tokens of a document.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote

import numpy as np
import numpy.typing as npt

from sparse_ingest.cluster.client import Client, error_of
from sparse_ingest.cluster.explanations import CONTRIBUTION
from sparse_ingest.cluster.scores import LEVELS, stored_bytes
from sparse_ingest.errors import ClusterError

# The filter on ids counts as a clause too; some are left over for what a rewrite may add.
_SPARE_CLAUSES = 8
_SEARCHES = 50  # in one _msearch
PIPELINE_IN_BODY_SINCE = (2, 18)
_RAW_SCORE = "raw dot product score (quantized): "

# What is stored for a key: a float32 of 9 bits, or the byte of a segment with clusters.
Stored = np.float32 | np.uint8


class StoredReader:
    """Reads what one field of one index keeps; a sparse_vector field has a `ceiling_search`."""

    def __init__(
        self, client: Client, index: str, field: str, max_clauses: int, *, ceiling_search: float | None = None
    ) -> None:
        self._client = client
        self._index = index
        self._field = field
        self._group = max(1, max_clauses - _SPARE_CLAUSES)
        self._seismic = ceiling_search is not None
        # A power of two, so that it changes no bit of a sum, and large enough for a byte above zero.
        self._weight = 1.0 if ceiling_search is None or ceiling_search < 2 * LEVELS else 64.0
        self._query_byte = int(stored_bytes(np.array([self._weight]), ceiling_search or 1.0)[0])

    def weights(self, wanted: Mapping[str, Sequence[str]]) -> dict[str, dict[str, Stored]]:
        """What the index keeps of the wanted keys of each document; a document that is not there is left out."""
        questions = [
            (doc_id, keys[start : start + self._group])
            for doc_id, keys in wanted.items()
            for start in range(0, max(1, len(keys)), self._group)
        ]
        found: dict[str, dict[str, Stored]] = {}
        for first in range(0, len(questions), _SEARCHES):
            some = questions[first : first + _SEARCHES]
            bodies = [
                {**self._query([doc_id], keys, named=len(keys)), "explain": True, "size": 1} for doc_id, keys in some
            ]
            for (doc_id, keys), hits in zip(some, self._search(bodies), strict=True):
                for hit in hits:
                    kept = found.setdefault(doc_id, {})
                    if _of_clusters(hit["_explanation"]) is not None:
                        # A byte of zero is not named.
                        kept.update(dict.fromkeys(keys, np.uint8(0)))
                    kept.update(self._features(hit["_explanation"]))
        return found

    def sums(
        self, doc_ids: Sequence[str], vocabulary: Sequence[str], *, of_bytes: Collection[str] = ()
    ) -> dict[str, npt.NDArray[np.float32]]:
        """For each document the sum of what it keeps of each group of the vocabulary, as `groups` cuts it.

        `of_bytes` are those documents whose bytes are summed. A weight that nobody expects shows in the sum, unless
        it is below 2^-24 of it.
        """
        found: dict[str, npt.NDArray[np.float32]] = {}
        groups = self.groups(vocabulary)
        for explain in (False, True):
            chosen = [doc_id for doc_id in doc_ids if (doc_id in of_bytes) == explain]
            bodies = [
                {**self._query(chosen, keys, named=1), "size": len(chosen), "explain": explain}
                for keys in groups
                if chosen
            ]
            for first in range(0, len(bodies), _SEARCHES):
                for group, hits in enumerate(self._search(bodies[first : first + _SEARCHES]), start=first):
                    for hit in hits:
                        sums = found.setdefault(hit["_id"], np.zeros(len(groups), dtype=np.float32))
                        sums[group] = self._sum_of_bytes(hit) if explain else hit["_score"] / self._weight
        return found

    def groups(self, vocabulary: Sequence[str]) -> list[Sequence[str]]:
        """The vocabulary in pieces of as many keys as one query may have."""
        return [vocabulary[start : start + self._group] for start in range(0, len(vocabulary), self._group)]

    def _query(self, doc_ids: Sequence[str], keys: Sequence[str], *, named: int) -> dict[str, Any]:
        asked: dict[str, Any] = {"query_tokens": dict.fromkeys(keys, self._weight)}
        if self._seismic:
            # An explanation names the contributions of the `top_n` heaviest tokens of the query.
            asked["method_parameters"] = {"top_n": named, "k": 1}
        # `should` beside `filter`: a document with none of the keys is found as well, with score 0.
        return {
            "query": {
                "bool": {
                    "filter": [{"ids": {"values": list(doc_ids)}}],
                    "should": [{"neural_sparse": {self._field: asked}}] if keys else [],
                }
            },
            "_source": False,
            "track_total_hits": False,
        }

    def _search(self, bodies: Sequence[Mapping[str, Any]]) -> Iterator[list[dict[str, Any]]]:
        for response in search_many(self._client, f"/{quote(self._index, safe='')}/_msearch", bodies, self._index):
            yield response["hits"]["hits"]

    def _sum_of_bytes(self, hit: Mapping[str, Any]) -> int:
        raw = _of_clusters(hit["_explanation"])
        return 0 if raw is None else int(raw["value"]) // self._query_byte

    def _features(self, explanation: Mapping[str, Any]) -> Iterator[tuple[str, Stored]]:
        """Key and stored value of every clause that matched."""
        opening, ending = f"Linear function on the {self._field} field for the ", " feature, computed as w * S from:"
        description = str(explanation["description"])
        if description.startswith(opening) and description.endswith(ending):
            for part in explanation["details"]:
                if part["description"].startswith("S, "):
                    yield description[len(opening) : -len(ending)], np.float32(part["value"])
        elif self._seismic and (named := CONTRIBUTION.fullmatch(description)):
            yield named[1], np.uint8(int(named[3]))
        else:
            for part in explanation.get("details", ()):
                yield from self._features(part)


def search_many(
    client: Client, path: str, bodies: Sequence[Mapping[str, Any]], index: str, *, filter_path: str | None = None
) -> Iterator[Any]:
    """The answer to each search, asked in one request.

    Raises:
        ClusterError: one was not answered whole.
    """
    params = {"max_concurrent_searches": "2"}
    if filter_path is not None:
        params["filter_path"] = f"responses.error,responses._shards.failed,{filter_path}"
    # An index's default search pipeline, such as two-phase, would change scores and refuse to sort. In one _msearch
    # only a body can name a pipeline, and only from 2.18 on.
    past = {"search_pipeline": "_none"} if client.version >= PIPELINE_IN_BODY_SINCE else {}
    lines = b"".join(b"{}\n" + json.dumps({**body, **past}).encode() + b"\n" for body in bodies)
    answer = client.call("POST", path, lines, params=params, timeout_s=300)
    for response in answer["responses"]:
        if "error" in response:
            kind, reason = error_of(response)
            raise ClusterError(
                f"{client.address} cannot answer neural_sparse on {index!r} ({kind}: {reason}). "
                "Reading weights back needs the neural-search plugin and a sparse field."
            )
        if response["_shards"]["failed"]:
            raise ClusterError(f"Shards of {index!r} did not answer; wait until the index is green or yellow.")
        yield response


def _of_clusters(explanation: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The part of an explanation that a segment with clusters gives, or None."""
    if str(explanation["description"]).startswith(_RAW_SCORE):
        return explanation
    return next((found for part in explanation.get("details", ()) if (found := _of_clusters(part)) is not None), None)
