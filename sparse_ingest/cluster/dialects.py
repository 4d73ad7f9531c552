"""What differs between OpenSearch and Elasticsearch: one class for each, chosen when a client connects.

Both index a vector in Lucene's FeatureField and score it alike. `kind` "rank_features" names that field on both:
OpenSearch calls its type rank_features, Elasticsearch sparse_vector, which is SEISMIC on OpenSearch.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, TypeAlias

from sparse_ingest.errors import ClusterError, UsageError

Version = tuple[int, int, int]
Product = Literal["opensearch", "elasticsearch"]
FieldKind = Literal["rank_features", "sparse_vector"]
Replacement = Literal["replace", "overwrite"]  # of a vector by an update, see bulk_bodies.py
Feature = Literal["hybrid", "model", "pipelines", "plugin"]
Find = Callable[..., Any]  # Client.find

MAX_CLAUSES = 1024  # the default of indices.query.bool.max_clause_count, and the least that Elasticsearch allows
SEISMIC_SINCE = (3, 3)
# index.version.created of Elasticsearch 8.0, and IndexVersions.NEW_SPARSE_VECTOR of 8.11.
_NO_FIELD_FROM, _FIELD_SINCE = 8_000_000, 8_500_001
PIPELINE_IN_BODY_SINCE = (2, 18)
_ELASTICSEARCH_LACKS: dict[Feature, str] = {
    "hybrid": "Elasticsearch combines searches only with the retrievers rrf and linear, which need a paid license. "
    "Omit --hybrid.",
    "model": "On Elasticsearch queries are encoded here, not on the server. Omit --model-id and --analyzer.",
    "pipelines": "Elasticsearch has no search pipelines, and its ingest pipelines cannot run these models. Omit "
    "--search-pipeline and --ingest-pipeline.",
    "plugin": "--without-plugin is for OpenSearch; Elasticsearch needs no plugin. Omit it.",
}


class OpenSearchDialect:
    """OpenSearch 2.11 or newer, the first release with neural_sparse queries."""

    product: ClassVar[Product] = "opensearch"
    name = "OpenSearch"
    oldest = (2, 11)
    newest_tried = (3, 6, 0)
    # A default search pipeline of an index, such as two-phase, would change scores and refuse to sort.
    no_pipeline: ClassVar[dict[str, str]] = {"search_pipeline": "_none"}
    replacement: ClassVar[Replacement] = "replace"
    points, point_key = "/_search/point_in_time", "pit_id"  # the path of points in time, and the key of their ids
    plugins: ClassVar[dict[str, str]] = {
        "opensearch-neural-search": "neural_sparse queries and sparse_vector fields; without it, use `query "
        "--without-plugin`",
        "opensearch-knn": "sparse_vector fields (SEISMIC)",
    }

    def __init__(self, version: Version) -> None:
        self.version = version

    def check_kind(self, kind: FieldKind) -> None:
        """Raise `ClusterError` if this release has no field of a kind."""
        if kind == "sparse_vector" and self.version[:2] < SEISMIC_SINCE:
            raise ClusterError(
                f"The cluster is OpenSearch {'.'.join(map(str, self.version))}; sparse_vector fields need 3.3 or "
                'newer. Use kind = "rank_features", or upgrade the cluster.'
            )

    @staticmethod
    def refuse(feature: Feature) -> None:
        """Raise `UsageError` for what this product lacks: nothing."""

    @staticmethod
    def field_entry() -> dict[str, Any]:
        """Return the mapping of a new field of kind rank_features."""
        return {"type": "rank_features"}

    @staticmethod
    def stores_vectors_beside_source(setting: str | None) -> bool:
        """Return whether an update keeps a vector that `_source` excludes: never."""
        return False

    @staticmethod
    def tokens_clause(field: str, weights: Mapping[str, float]) -> dict[str, Any]:
        """Return the query whose score is the sum of query weight times stored weight."""
        return {"neural_sparse": {field: {"query_tokens": dict(weights)}}}

    @staticmethod
    def complete_body(body: dict[str, Any], entry: dict[str, Any], source: str) -> None:
        """Add to the body of a new index what the `source` setting needs beside `_source.excludes`: nothing."""

    @staticmethod
    def max_clauses(find: Find) -> int:
        """Return `indices.query.bool.max_clause_count`, or its default for a role that may not read it."""
        return int(cluster_settings(find).get("indices.query.bool.max_clause_count", MAX_CLAUSES))


class ElasticsearchDialect:
    """Elasticsearch 8.16 or newer: earlier releases refuse tokens with a dot."""

    product: ClassVar[Product] = "elasticsearch"
    name = "Elasticsearch"
    oldest = (8, 16)
    no_pipeline: ClassVar[dict[str, str]] = {}
    replacement: ClassVar[Replacement] = "overwrite"
    points, point_key = "/_pit", "id"
    plugins: ClassVar[dict[str, str]] = {}

    def __init__(self, version: Version) -> None:
        self.version = version

    @staticmethod
    def check_kind(kind: FieldKind) -> None:
        """Raise `ClusterError` for a field of SEISMIC."""
        if kind == "sparse_vector":
            raise ClusterError(
                'The cluster is Elasticsearch, which has no SEISMIC: kind = "sparse_vector" means a field of '
                'OpenSearch. Use kind = "rank_features", which creates a field of the type that Elasticsearch calls '
                "sparse_vector."
            )

    @staticmethod
    def refuse(feature: Feature) -> None:
        """Raise `UsageError` for what this product lacks."""
        raise UsageError(_ELASTICSEARCH_LACKS[feature])

    def field_entry(self) -> dict[str, Any]:
        """Return the mapping of a new field of kind rank_features.

        Without `prune: false`, queries of other clients skip frequent tokens since 8.19 and 9.1.
        """
        can_prune = self.version[:2] >= (9, 1) or (8, 19) <= self.version[:2] < (9, 0)
        return {"type": "sparse_vector"} | ({"index_options": {"prune": False}} if can_prune else {})

    def stores_vectors_beside_source(self, setting: str | None) -> bool:
        """Return whether an update keeps a vector that `_source` excludes, from its term vectors.

        `setting` is index.mapping.exclude_source_vectors, None by default.
        """
        return self.version[:2] >= (9, 2) and setting != "false"

    @staticmethod
    def tokens_clause(field: str, weights: Mapping[str, float], *, prune: bool = False) -> dict[str, Any]:
        """Return the query whose score is the sum of query weight times stored weight, without a token if `prune`."""
        return {"sparse_vector": {"field": field, "query_vector": dict(weights), "prune": prune}}

    def complete_body(self, body: dict[str, Any], entry: dict[str, Any], source: str) -> None:
        """Add to the body of a new index what the `source` setting needs beside `_source.excludes`.

        Since 9.2 vectors are in term vectors instead of `_source`, from which an update restores them. With source =
        "exclude" they are in neither.
        """
        entry.update({name: value for name, value in self.field_entry().items() if name not in entry})
        if source == "exclude" and self.version[:2] >= (9, 2):
            settings = body.setdefault("settings", {})
            settings.setdefault("index.mapping.exclude_source_vectors", False)

    @staticmethod
    def max_clauses(find: Find) -> int:
        """Return how many clauses each node allows: 64 per MB of heap, divided by its search threads.

        Source: SearchUtils.calculateMaxClauseValue of Elasticsearch. `indices.query.bool.max_clause_count` has no
        effect there. A role that may not read this gets the least value.
        """
        wanted = "nodes.*.jvm.mem.heap_max_in_bytes,nodes.*.thread_pool.search.size"
        answer = find("/_nodes/jvm,thread_pool", params={"filter_path": wanted}, absent=(403, 404)) or {}
        limits = [
            (int(node["jvm"]["mem"]["heap_max_in_bytes"]) >> 20) * 64 // int(node["thread_pool"]["search"]["size"])
            for node in answer.get("nodes", {}).values()
            if "jvm" in node and "thread_pool" in node
        ]
        return max(MAX_CLAUSES, min(limits, default=MAX_CLAUSES))


def cluster_settings(find: Find) -> Mapping[str, Any]:
    """Return the settings of a cluster with their defaults, by their full names; {} if the user may not read them."""
    params = {"include_defaults": "true", "flat_settings": "true"}
    answer = find("/_cluster/settings", params=params, absent=(400, 401, 403, 404, 405)) or {}
    return ChainMap(*(answer.get(level, {}) for level in ("transient", "persistent", "defaults")))


Dialect: TypeAlias = OpenSearchDialect | ElasticsearchDialect
DIALECTS: dict[Product, type[OpenSearchDialect] | type[ElasticsearchDialect]] = {
    one.product: one for one in (OpenSearchDialect, ElasticsearchDialect)
}


def refuse_created(name: str, version: str | None) -> None:
    """Raise `ClusterError` for an existing index that cannot have the field, by its index.version.created.

    Only indexes of Elasticsearch have these versions: OpenSearch adds 2^27 to its own.
    """
    if version and version.isdecimal() and _NO_FIELD_FROM <= int(version) < _FIELD_SINCE:
        raise ClusterError(
            f"Index {name!r} was created by Elasticsearch 8.0 to 8.10 and cannot have a sparse_vector field. Load "
            "into a new index, or copy it into one with _reindex and load into that with --update."
        )


def kind_of(entry: Mapping[str, Any] | None) -> FieldKind | None:
    """Return the kind of a mapped field, or None for other fields. SEISMIC fields always name their method."""
    match entry:
        case {"type": "sparse_vector", "method": _}:
            return "sparse_vector"
        case {"type": "rank_features" | "sparse_vector"}:
            return "rank_features"
    return None
