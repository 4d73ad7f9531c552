"""Read the stored weights of sparse vectors, which `_source` excludes.

A query for tokens with weights 1.0 scores a document with the sum of its stored weights, and its explanation has the
value of each key: a float32 as its nearest decimal, or the byte of a segment with clusters. `rank_feature` finds no
token that contains a dot. OpenSearch needs the neural-search plugin, and version 3.5 or newer for clusters. Not
covered: tokens that are not in the vocabulary; OpenSearch has no request that lists the tokens of a document.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from sparse_ingest.cluster.answers import Found, Responses
from sparse_ingest.cluster.client import Client, PartialAnswerError, ResponseError, path_of
from sparse_ingest.cluster.dialects import PIPELINE_IN_BODY_SINCE, kind_of
from sparse_ingest.cluster.failures import blocked_message, error_of, is_block
from sparse_ingest.cluster.indexes import Index
from sparse_ingest.cluster.mappings import field_mapping
from sparse_ingest.cluster.scores import LEVELS, stored_bytes
from sparse_ingest.cluster.seismic import EXPLAINED_SINCE, parameters_of
from sparse_ingest.errors import ClusterError
from sparse_ingest.records import TermShare, in_batches

_MOST_CLAUSES = 1 << 15  # of one query, about 0.5 MB: Elasticsearch may allow more
_SPARE_CLAUSES = 8  # for the filter on ids, and for those that a rewrite may add
_SEARCHES = 25  # in one _msearch
_MAX_BYTES = 900_000  # of one _msearch: nginx refuses more than 1 MiB by default
_RAW_SCORE = "raw dot product score (quantized): "
# The explanation of one token in a segment with clusters.
_CONTRIBUTION = re.compile(r"token '(\d+)' contribution: query_weight=(\d+) \* doc_weight=(\d+)")

# The stored value of a key: a float32 of 9 bits, or the byte of a segment with clusters.
Stored = np.float32 | np.uint8


class UnsearchableFieldError(ClusterError):
    """The cluster refuses the query for tokens: it lacks the neural-search plugin, or the field is not sparse."""


class StoredReader:
    """Reads the stored weights of one field of one index. Pass `ceiling_search` for a sparse_vector field."""

    def __init__(
        self, client: Client, index: str, field: str, max_clauses: int, *, ceiling_search: float | None = None
    ) -> None:
        self._client, self._index, self._field = client, index, field
        self._group = max(1, min(max_clauses, _MOST_CLAUSES) - _SPARE_CLAUSES)
        self._seismic = ceiling_search is not None
        # A power of two, which changes only the exponent of a sum, and large enough for a byte above zero.
        self._weight = 1.0 if ceiling_search is None or ceiling_search < 2 * LEVELS else 64.0
        self._query_byte = int(stored_bytes(np.array([self._weight]), ceiling_search or 1.0)[0])

    def weights(self, wanted: Mapping[str, Sequence[str]]) -> dict[str, dict[str, Stored]]:
        """Return the stored value of the wanted keys of each document. Documents that the index lacks are omitted."""
        queries = [(doc_id, group) for doc_id, keys in wanted.items() for group in self.groups(keys) or [keys]]
        found: dict[str, dict[str, Stored]] = {}
        options = {"explain": True, "size": 1}
        bodies = (self._query([doc_id], keys, named=len(keys)) | options for doc_id, keys in queries)
        for (doc_id, keys), hits in zip(queries, self._search(bodies), strict=True):
            for hit in hits:
                kept = found.setdefault(doc_id, {})
                raw = _of_clusters(hit["_explanation"])
                if raw is None:
                    terms = explained_terms(hit["_explanation"], self._field)
                    kept.update((term.token, np.float32(term.document_weight)) for term in terms)
                else:
                    kept.update(dict.fromkeys(keys, np.uint8(0)))  # a byte of zero is not named
                    kept.update((token, np.uint8(byte)) for token, _, byte, _ in _contributions(raw))
        return found

    def sums(
        self, doc_ids: Sequence[str], vocabulary: Sequence[str], *, of_bytes: Collection[str] = ()
    ) -> dict[str, npt.NDArray[np.float32]]:
        """Return for each document the sum of its stored values in each group of the vocabulary (see `groups`).

        A weight below 2^-24 of the sum is not visible in it. Of the documents in `of_bytes`, the bytes are summed.
        """
        found: dict[str, npt.NDArray[np.float32]] = {}
        groups = self.groups(vocabulary)
        for explain in (False, True):
            chosen = [doc_id for doc_id in doc_ids if (doc_id in of_bytes) == explain]
            options = {"size": len(chosen), "explain": explain}
            bodies = (self._query(chosen, keys, named=1) | options for keys in groups if chosen)
            for group, hits in enumerate(self._search(bodies)):
                for hit in hits:
                    sums = found.setdefault(hit["_id"], np.zeros(len(groups), dtype=np.float32))
                    sums[group] = self._sum_of_bytes(hit) if explain else hit["_score"] / self._weight
        return found

    def groups(self, vocabulary: Sequence[str]) -> list[Sequence[str]]:
        """Split the vocabulary into groups of as many keys as one query may have."""
        return [vocabulary[start : start + self._group] for start in range(0, len(vocabulary), self._group)]

    def _query(self, doc_ids: Sequence[str], keys: Sequence[str], *, named: int) -> dict[str, Any]:
        clause = self._client.dialect.tokens_clause(self._field, dict.fromkeys(keys, self._weight))
        if self._seismic:
            # An explanation names the contributions of the `top_n` heaviest tokens of the query.
            clause["neural_sparse"][self._field]["method_parameters"] = {"top_n": named, "k": 1}
        # With a filter, `should` is optional: a document with none of the keys is also found, with score 0.
        should = [clause] if keys else []
        query = {"bool": {"filter": [{"ids": {"values": list(doc_ids)}}], "should": should}}
        return {"query": query, "_source": False, "track_total_hits": False}

    def _search(self, bodies: Iterable[Mapping[str, Any]]) -> Iterator[list[dict[str, Any]]]:
        path = f"{path_of(self._index)}/_msearch"
        for response in search_many(self._client, path, bodies, self._index, at_once=_SEARCHES):
            yield response["hits"]["hits"]

    def _sum_of_bytes(self, hit: Mapping[str, Any]) -> int:
        raw = _of_clusters(hit["_explanation"])
        return 0 if raw is None else int(raw["value"]) // self._query_byte


def reader_of(client: Client, there: Index, field: str) -> tuple[StoredReader, float | None]:
    """Return the reader of a sparse field, and the weight of byte 255 in clusters; None for a rank_features field.

    Raises:
        ClusterError: the release does not explain the scores of a sparse_vector field.
    """
    entry = field_mapping(there.mappings, field) or {}
    ceiling = ceiling_search = None
    if kind_of(entry) == "sparse_vector":
        if client.version[:2] < EXPLAINED_SINCE:
            raise ClusterError(
                f"{client.address} is OpenSearch {'.'.join(map(str, client.version))}; reading weights of "
                "sparse_vector fields needs 3.5, which explains their scores. Upgrade the cluster."
            )
        parameters = parameters_of(entry)
        ceiling, ceiling_search = (float(parameters[f"quantization_ceiling_{side}"]) for side in ("ingest", "search"))
    clauses = client.dialect.max_clauses(client.find)
    return StoredReader(client, there.name, field, clauses, ceiling_search=ceiling_search), ceiling


def as_weight(stored: Stored, ceiling: float | None) -> float:
    """Return a stored value as a weight; `ceiling` is the weight of byte 255."""
    return int(stored) * ceiling / LEVELS if isinstance(stored, np.uint8) and ceiling is not None else float(stored)


def read_fields(client: Client, index: str, field: str, doc_ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the fields of those documents that an index has, by id, without the sparse field."""
    query: dict[str, Any] = {"ids": {"values": list(doc_ids)}}
    body = {"query": query, "size": len(doc_ids), "_source": {"excludes": [field]}}
    answer = client.search(path_of(index), body, expected=Found)
    return {hit["_id"]: hit.get("_source", {}) for hit in answer["hits"]["hits"]}


def search_many(
    client: Client, path: str, bodies: Iterable[Mapping[str, Any]], index: str, *, at_once: int, filter_path: str = ""
) -> Iterator[Any]:
    """Send searches, at most `at_once` of them in one `_msearch`, and yield their responses in order."""
    params = {"max_concurrent_searches": "2"}
    if filter_path:
        params["filter_path"] = f"responses.error,responses.status,responses._shards,responses.t*,{filter_path}"
    bypass = client.dialect.no_pipeline if client.version >= PIPELINE_IN_BODY_SINCE else {}
    header = b'{"allow_partial_search_results":true}\n' if client.allow_partial else b"{}\n"
    lines = (header + json.dumps({**body, **bypass}).encode() + b"\n" for body in bodies)
    for some in in_batches(lines, at_once, _MAX_BYTES):
        answer = client.call("POST", path, b"".join(some), params=params, timeout_s=300, expected=Responses)
        for response in answer["responses"]:
            if "error" in response:
                kind, reason = error_of(response)
                status = int(response.get("status", 400))
                if is_block(status, kind):
                    message = blocked_message(client.address, path_of(index), reason)
                    raise ResponseError(message, status=status, kind=kind, reason=reason)
                if status >= 429:
                    raise PartialAnswerError(
                        f"{client.address} could not search {index!r} ({kind}: {reason}). Wait until the index is "
                        "green or yellow and not overloaded, then start the same command again."
                    )
                raise unsearchable(client, index, kind, reason)
            yield response


def unsearchable(client: Client, index: str, kind: str, reason: str) -> UnsearchableFieldError:
    """Return the error of a refused query for tokens."""
    return UnsearchableFieldError(
        f"{client.address} cannot search the sparse field of {index!r} ({kind}: {reason}). Reading weights needs a "
        "sparse field, and on OpenSearch the neural-search plugin."
    )


def explained_terms(explanation: Mapping[str, Any], field: str) -> Iterator[TermShare]:
    """Yield the terms in the `_explanation` of a hit, for any body with sparse clauses; others are skipped.

    The node of a token reads "Linear function on the F field for the T feature, computed as w * S from:" and has two
    details: w, the weight in the query, and S, the stored weight. The node of clusters names only the `top_n` heaviest
    tokens of the query.
    """
    description = str(explanation["description"])
    # A token may contain any character, even the words of the description.
    before, after = f"Linear function on the {field} field for the ", " feature, computed as w * S from:"
    if description.startswith(before) and description.endswith(after):
        weight, stored = (float(detail["value"]) for detail in explanation["details"])
        token = description[len(before) : -len(after)]
        yield TermShare(token, weight, stored, float(explanation["value"]))
    elif description.startswith("sparse_ann score for doc "):
        yield from _clustered_terms(explanation["details"])
    else:
        for detail in explanation["details"]:
            yield from explained_terms(detail, field)


def _clustered_terms(details: Sequence[Mapping[str, Any]]) -> Iterator[TermShare]:
    """Yield the terms of a document in clusters, whose weights are bytes relative to two ceilings."""
    [raw] = (part for part in details if part["description"].startswith("raw dot product"))
    [scaling] = (part for part in details if part["description"].startswith("quantization rescaling"))
    boost, ceiling_ingest, ceiling_search, levels = (float(part["value"]) for part in scaling["details"])
    for token, query_byte, byte, product in _contributions(raw):
        requested, stored = query_byte * boost * ceiling_search / levels, byte * ceiling_ingest / levels
        yield TermShare(token, requested, stored, product * float(scaling["value"]))


def _contributions(raw: Mapping[str, Any]) -> Iterator[tuple[str, int, int, float]]:
    """Yield each token that a segment with clusters explains: its byte in the query, in the document, the product."""
    for part in raw["details"]:
        if named := _CONTRIBUTION.fullmatch(part["description"]):
            yield named[1], int(named[2]), int(named[3]), float(part["value"])


def _of_clusters(explanation: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the part of an explanation that a segment with clusters gives, or None."""
    if str(explanation["description"]).startswith(_RAW_SCORE):
        return explanation
    return next((found for part in explanation.get("details", ()) if (found := _of_clusters(part)) is not None), None)
