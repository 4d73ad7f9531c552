"""Encode text with learned-sparse models, bulk-load the vectors into OpenSearch, verify and search them.

The names below are the public API. Each is imported when it is first used, so `import sparse_ingest` imports neither
torch nor opensearchpy. Nothing prints: pass `progress=True` for a tqdm bar, and set up `logging` for warnings.
"""

from __future__ import annotations

import logging
import warnings
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparse_ingest.checkpoints.inspect import inspect_model
    from sparse_ingest.cluster.client import Connection, connect
    from sparse_ingest.cluster.index_admin import CreateOptions, create_index, drop_index, show_index
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
    from sparse_ingest.corpora.documents import FieldNames
    from sparse_ingest.corpora.files import open_corpus
    from sparse_ingest.encoding.encode import dry_run
    from sparse_ingest.encoding.options import EncodeOptions
    from sparse_ingest.errors import (
        CheckpointError,
        ClusterError,
        CorpusError,
        Interrupted,
        MissingExtraError,
        PipelineError,
        RunError,
        SparseIngestError,
        StorageError,
        UsageError,
    )
    from sparse_ingest.evaluation.evaluate import evaluate
    from sparse_ingest.evaluation.options import EvaluateOptions
    from sparse_ingest.loading.load import load, restore_settings
    from sparse_ingest.loading.options import LoadOptions, PublishOptions
    from sparse_ingest.loading.publish import publish, roll_back
    from sparse_ingest.models.encoder import SparseEncoder
    from sparse_ingest.models.query_encoders import query_encoder
    from sparse_ingest.models.sparse_vectors import SparseVectors
    from sparse_ingest.pipeline import (
        EncodeSettings,
        IndexSettings,
        ModelSettings,
        Pipeline,
        Pruning,
        QuerySettings,
        read_pipeline,
    )
    from sparse_ingest.planning.options import PlanOptions
    from sparse_ingest.planning.plan import plan
    from sparse_ingest.queries.idf import write_idf
    from sparse_ingest.records import Document, Query, SparseRows
    from sparse_ingest.reporting import Reporter
    from sparse_ingest.runs.shards import read_shard
    from sparse_ingest.searching.encoded import encode
    from sparse_ingest.searching.hits import Hit
    from sparse_ingest.searching.index_search import rank_index, search_index
    from sparse_ingest.searching.options import SearchOptions
    from sparse_ingest.searching.pipelines import engine_of, token_keys
    from sparse_ingest.searching.query import many_query_weights, query_weights
    from sparse_ingest.searching.run_search import rank_run, search_run
    from sparse_ingest.searching.search import SearchableIndex, SearchableRun, open_index, open_run
    from sparse_ingest.storage.places import place_of
    from sparse_ingest.verification.verify import verify

# Name to the module that has it.
_MODULE_OF = {
    "CheckpointError": "errors",
    "ClusterError": "errors",
    "Connection": "cluster.client",
    "CorpusError": "errors",
    "CreateOptions": "cluster.index_admin",
    "Document": "records",
    "EncodeOptions": "encoding.options",
    "EncodeSettings": "pipeline",
    "Engine": "cluster.requests",
    "EvaluateOptions": "evaluation.options",
    "FieldNames": "corpora.documents",
    "Hit": "searching.hits",
    "IndexSettings": "pipeline",
    "Interrupted": "errors",
    "LoadOptions": "loading.options",
    "MissingExtraError": "errors",
    "ModelSettings": "pipeline",
    "Pipeline": "pipeline",
    "PipelineError": "errors",
    "PlanOptions": "planning.options",
    "Pruning": "pipeline",
    "PublishOptions": "loading.options",
    "Query": "records",
    "QuerySettings": "pipeline",
    "Reporter": "reporting",
    "RunError": "errors",
    "SearchOptions": "searching.options",
    "SearchableIndex": "searching.search",
    "SearchableRun": "searching.search",
    "SparseEncoder": "models.encoder",
    "SparseIngestError": "errors",
    "SparseRows": "records",
    "SparseVectors": "models.sparse_vectors",
    "StorageError": "errors",
    "UsageError": "errors",
    "bm25_body": "cluster.requests",
    "connect": "cluster.client",
    "create_index": "cluster.index_admin",
    "drop_index": "cluster.index_admin",
    "dry_run": "encoding.encode",
    "encode": "searching.encoded",
    "engine_body": "cluster.requests",
    "engine_of": "searching.pipelines",
    "evaluate": "evaluation.evaluate",
    "fit_weights": "cluster.limits",
    "hybrid_body": "cluster.requests",
    "inspect_model": "checkpoints.inspect",
    "load": "loading.load",
    "many_query_weights": "searching.query",
    "msearch_bytes": "cluster.requests",
    "msearch_lines": "cluster.requests",
    "neural_sparse_body": "cluster.requests",
    "open_corpus": "corpora.files",
    "open_index": "searching.search",
    "open_run": "searching.search",
    "place_of": "storage.places",
    "plan": "planning.plan",
    "publish": "loading.publish",
    "query_encoder": "models.query_encoders",
    "query_weights": "searching.query",
    "rank_feature_body": "cluster.requests",
    "rank_index": "searching.index_search",
    "rank_run": "searching.run_search",
    "read_pipeline": "pipeline",
    "read_shard": "runs.shards",
    "restore_settings": "loading.load",
    "roll_back": "loading.publish",
    "search_index": "searching.index_search",
    "search_run": "searching.run_search",
    "seismic_body": "cluster.requests",
    "server_side_body": "cluster.requests",
    "show_index": "cluster.index_admin",
    "token_keys": "searching.pipelines",
    "two_phase_body": "cluster.requests",
    "verify": "verification.verify",
    "write_idf": "queries.idf",
}
# Old name to new: kept for one release.
_RENAMED = {"weigh": "query_weights", "weigh_many": "many_query_weights"}

__all__ = [
    "CheckpointError",
    "ClusterError",
    "Connection",
    "CorpusError",
    "CreateOptions",
    "Document",
    "EncodeOptions",
    "EncodeSettings",
    "Engine",
    "EvaluateOptions",
    "FieldNames",
    "Hit",
    "IndexSettings",
    "Interrupted",
    "LoadOptions",
    "MissingExtraError",
    "ModelSettings",
    "Pipeline",
    "PipelineError",
    "PlanOptions",
    "Pruning",
    "PublishOptions",
    "Query",
    "QuerySettings",
    "Reporter",
    "RunError",
    "SearchOptions",
    "SearchableIndex",
    "SearchableRun",
    "SparseEncoder",
    "SparseIngestError",
    "SparseRows",
    "SparseVectors",
    "StorageError",
    "UsageError",
    "bm25_body",
    "connect",
    "create_index",
    "drop_index",
    "dry_run",
    "encode",
    "engine_body",
    "engine_of",
    "evaluate",
    "fit_weights",
    "hybrid_body",
    "inspect_model",
    "load",
    "many_query_weights",
    "msearch_bytes",
    "msearch_lines",
    "neural_sparse_body",
    "open_corpus",
    "open_index",
    "open_run",
    "place_of",
    "plan",
    "publish",
    "query_encoder",
    "query_weights",
    "rank_feature_body",
    "rank_index",
    "rank_run",
    "read_pipeline",
    "read_shard",
    "restore_settings",
    "roll_back",
    "search_index",
    "search_run",
    "seismic_body",
    "server_side_body",
    "show_index",
    "token_keys",
    "two_phase_body",
    "verify",
    "write_idf",
]

logging.getLogger(__name__).addHandler(logging.NullHandler())


def __getattr__(name: str) -> object:
    if name in _RENAMED:
        warnings.warn(f"sparse_ingest.{name} is now {_RENAMED[name]}.", DeprecationWarning, stacklevel=2)
        name = _RENAMED[name]
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
