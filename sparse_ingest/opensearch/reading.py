"""Reading back what an index keeps of sparse vectors, which it hides from `_source`.

In: document ids and tokens. Out: per document the stored weight of each token, exactly. A neural_sparse query with
every weight 1.0 scores a document with the sum of its stored weights, and its explanation names each token with the
"feature value" S that was found: the nearest decimal of a float32, so parsing gives its bits back. neural_sparse is
used because a `rank_feature` query takes everything before the last dot for the field: it finds no token that holds a
dot, and says nothing. Needs the neural-search plugin.
Not covered: tokens that are in no vocabulary; there is no request that lists the tokens of a document.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote

import numpy as np
import numpy.typing as npt

from sparse_ingest.errors import ClusterError
from sparse_ingest.opensearch.client import Client, error_of

# The filter on ids counts as a clause too; some are left over for what a rewrite may add.
_SPARE_CLAUSES = 8
_SEARCHES = 50  # in one _msearch


class StoredReader:
    """Reads the weights that one field of one index keeps."""

    def __init__(self, client: Client, index: str, field: str, max_clauses: int) -> None:
        self._client = client
        self._index = index
        self._field = field
        self._group = max(1, max_clauses - _SPARE_CLAUSES)

    def weights(self, wanted: Mapping[str, Sequence[str]]) -> dict[str, dict[str, np.float32]]:
        """What the index keeps of the wanted tokens of each document; a document that is not there is left out."""
        questions = [
            (doc_id, tokens[start : start + self._group])
            for doc_id, tokens in wanted.items()
            for start in range(0, max(1, len(tokens)), self._group)
        ]
        found: dict[str, dict[str, np.float32]] = {}
        for first in range(0, len(questions), _SEARCHES):
            some = questions[first : first + _SEARCHES]
            bodies = [{**self._query([doc_id], tokens), "explain": True, "size": 1} for doc_id, tokens in some]
            for (doc_id, _), hits in zip(some, self._search(bodies), strict=True):
                for hit in hits:
                    found.setdefault(doc_id, {}).update(self._features(hit["_explanation"]))
        return found

    def sums(self, doc_ids: Sequence[str], vocabulary: Sequence[str]) -> dict[str, npt.NDArray[np.float32]]:
        """For each document the sum of what it keeps of each group of the vocabulary, as `groups` cuts it.

        A weight that nobody expects shows in the sum, unless it is below 2^-24 of it.
        """
        found: dict[str, npt.NDArray[np.float32]] = {}
        bodies = [{**self._query(doc_ids, tokens), "size": len(doc_ids)} for tokens in self.groups(vocabulary)]
        for first in range(0, len(bodies), _SEARCHES):
            for group, hits in enumerate(self._search(bodies[first : first + _SEARCHES]), start=first):
                for hit in hits:
                    sums = found.setdefault(hit["_id"], np.zeros(len(bodies), dtype=np.float32))
                    sums[group] = hit["_score"]
        return found

    def groups(self, vocabulary: Sequence[str]) -> list[Sequence[str]]:
        """The vocabulary in pieces of as many tokens as one query may have."""
        return [vocabulary[start : start + self._group] for start in range(0, len(vocabulary), self._group)]

    def _query(self, doc_ids: Sequence[str], tokens: Sequence[str]) -> dict[str, Any]:
        clauses = [{"neural_sparse": {self._field: {"query_tokens": dict.fromkeys(tokens, 1.0)}}}] if tokens else []
        # `should` beside `filter`: a document with none of the tokens is found as well, with score 0.
        return {
            "query": {"bool": {"filter": [{"ids": {"values": list(doc_ids)}}], "should": clauses}},
            "_source": False,
            "track_total_hits": False,
        }

    def _search(self, bodies: Sequence[Mapping[str, Any]]) -> Iterator[list[dict[str, Any]]]:
        lines = b"".join(b"{}\n" + json.dumps(body).encode() + b"\n" for body in bodies)
        answer = self._client.call(
            "POST",
            f"/{quote(self._index, safe='')}/_msearch",
            lines,
            params={"max_concurrent_searches": "2"},
            timeout_s=300,
        )
        for response in answer["responses"]:
            if "error" in response:
                kind, reason = error_of(response)
                raise ClusterError(
                    f"{self._client.address} cannot answer neural_sparse on {self._index!r} ({kind}: {reason}). "
                    "Reading weights back needs the neural-search plugin and a rank_features field."
                )
            if response["_shards"]["failed"]:
                raise ClusterError(
                    f"Shards of {self._index!r} did not answer; wait until the index is green or yellow."
                )
            yield response["hits"]["hits"]

    def _features(self, explanation: Mapping[str, Any]) -> Iterator[tuple[str, np.float32]]:
        """Token and stored weight of every clause that matched."""
        opening, ending = f"Linear function on the {self._field} field for the ", " feature, computed as w * S from:"
        description = str(explanation["description"])
        if description.startswith(opening) and description.endswith(ending):
            for part in explanation["details"]:
                if part["description"].startswith("S, "):
                    yield description[len(opening) : -len(ending)], np.float32(part["value"])
            return
        for part in explanation.get("details", ()):
            yield from self._features(part)
