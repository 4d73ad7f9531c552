"""sparse-ingest: text corpora to learned-sparse vectors to OpenSearch, losing nothing, proven to the last bit.

The names below are the public ones; each is imported when it is first used, so `import sparse_ingest` brings neither
torch nor opensearchpy. The verbs are modules: `sparse_ingest.encode.encode`, `sparse_ingest.load.load`,
`sparse_ingest.verify.verify`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparse_ingest.corpora.files import FieldNames, open_corpus
    from sparse_ingest.errors import SparseIngestError
    from sparse_ingest.inspect import inspect_model
    from sparse_ingest.opensearch.client import Connection, connect
    from sparse_ingest.opensearch.requests import neural_sparse_body, rank_feature_body
    from sparse_ingest.pipeline import ModelSettings, Pipeline, read_pipeline
    from sparse_ingest.query import query_encoder
    from sparse_ingest.records import Document, Query, SparseRows
    from sparse_ingest.runs.manifest import open_run
    from sparse_ingest.runs.shards import read_shard
    from sparse_ingest.search import search_index, search_run

_ROOM_OF = {
    "Connection": "opensearch.client",
    "Document": "records",
    "FieldNames": "corpora.files",
    "ModelSettings": "pipeline",
    "Pipeline": "pipeline",
    "Query": "records",
    "SparseIngestError": "errors",
    "SparseRows": "records",
    "connect": "opensearch.client",
    "inspect_model": "inspect",
    "neural_sparse_body": "opensearch.requests",
    "open_corpus": "corpora.files",
    "open_run": "runs.manifest",
    "query_encoder": "query",
    "rank_feature_body": "opensearch.requests",
    "read_pipeline": "pipeline",
    "read_shard": "runs.shards",
    "search_index": "search",
    "search_run": "search",
}

__all__ = [
    "Connection",
    "Document",
    "FieldNames",
    "ModelSettings",
    "Pipeline",
    "Query",
    "SparseIngestError",
    "SparseRows",
    "connect",
    "inspect_model",
    "neural_sparse_body",
    "open_corpus",
    "open_run",
    "query_encoder",
    "rank_feature_body",
    "read_pipeline",
    "read_shard",
    "search_index",
    "search_run",
]


def __getattr__(name: str) -> object:
    if name not in _ROOM_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_ROOM_OF[name]}"), name)
