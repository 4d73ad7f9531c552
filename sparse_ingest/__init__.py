"""sparse-ingest: text corpora to learned-sparse vectors to OpenSearch, losing nothing, proven to the last bit.

The names below are the public ones; each is imported when it is first used, so `import sparse_ingest` brings neither
torch nor opensearchpy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparse_ingest.checkpoints.inspect import inspect_model
    from sparse_ingest.cluster.client import Connection, connect
    from sparse_ingest.cluster.limits import fit_weights
    from sparse_ingest.cluster.requests import (
        Engine,
        bm25_body,
        engine_body,
        hybrid_body,
        msearch_bytes,
        msearch_lines,
        neural_sparse_body,
        rank_feature_body,
        seismic_body,
        server_side_body,
        two_phase_body,
    )
    from sparse_ingest.corpora.files import FieldNames, open_corpus
    from sparse_ingest.errors import SparseIngestError
    from sparse_ingest.pipeline import ModelSettings, Pipeline, read_pipeline
    from sparse_ingest.records import Document, Query, SparseRows
    from sparse_ingest.runs.run import open_run
    from sparse_ingest.runs.shards import read_shard
    from sparse_ingest.searching.query import query_encoder, token_keys, weigh, weigh_many
    from sparse_ingest.searching.search import engine_of, rank_index, rank_run, search_index, search_run
    from sparse_ingest.storage.places import place_of

_ROOM_OF = {
    "Connection": "cluster.client",
    "Document": "records",
    "Engine": "cluster.requests",
    "FieldNames": "corpora.files",
    "ModelSettings": "pipeline",
    "Pipeline": "pipeline",
    "Query": "records",
    "SparseIngestError": "errors",
    "SparseRows": "records",
    "bm25_body": "cluster.requests",
    "connect": "cluster.client",
    "engine_body": "cluster.requests",
    "engine_of": "searching.search",
    "fit_weights": "cluster.limits",
    "hybrid_body": "cluster.requests",
    "inspect_model": "checkpoints.inspect",
    "msearch_bytes": "cluster.requests",
    "msearch_lines": "cluster.requests",
    "neural_sparse_body": "cluster.requests",
    "open_corpus": "corpora.files",
    "open_run": "runs.run",
    "place_of": "storage.places",
    "query_encoder": "searching.query",
    "rank_feature_body": "cluster.requests",
    "rank_index": "searching.search",
    "rank_run": "searching.search",
    "read_pipeline": "pipeline",
    "read_shard": "runs.shards",
    "search_index": "searching.search",
    "search_run": "searching.search",
    "seismic_body": "cluster.requests",
    "server_side_body": "cluster.requests",
    "token_keys": "searching.query",
    "two_phase_body": "cluster.requests",
    "weigh": "searching.query",
    "weigh_many": "searching.query",
}

__all__ = [
    "Connection",
    "Document",
    "Engine",
    "FieldNames",
    "ModelSettings",
    "Pipeline",
    "Query",
    "SparseIngestError",
    "SparseRows",
    "bm25_body",
    "connect",
    "engine_body",
    "engine_of",
    "fit_weights",
    "hybrid_body",
    "inspect_model",
    "msearch_bytes",
    "msearch_lines",
    "neural_sparse_body",
    "open_corpus",
    "open_run",
    "place_of",
    "query_encoder",
    "rank_feature_body",
    "rank_index",
    "rank_run",
    "read_pipeline",
    "read_shard",
    "search_index",
    "search_run",
    "seismic_body",
    "server_side_body",
    "token_keys",
    "two_phase_body",
    "weigh",
    "weigh_many",
]


def __getattr__(name: str) -> object:
    if name not in _ROOM_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_ROOM_OF[name]}"), name)
