# What the package exports: __init__.py imports each name from here when it is first used.
from .checkpoints.inspect import inspect_model
from .cluster.client import connect
from .cluster.connection import Connection
from .cluster.engines import engine_body
from .cluster.hybrid_bodies import bm25_body, hybrid_body
from .cluster.index_admin import CreateOptions, create_index, drop_index, show_index
from .cluster.index_list import list_indexes
from .cluster.limits import fit_weights
from .cluster.search_bodies import (
    Engine,
    msearch_bytes,
    msearch_lines,
    neural_sparse_body,
    rank_feature_body,
    seismic_body,
    server_side_body,
    two_phase_body,
)
from .corpora.documents import FieldNames
from .corpora.files import open_corpus
from .encoding.encode import dry_run
from .encoding.options import EncodeOptions
from .errors import (
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
from .evaluation.evaluate import evaluate
from .evaluation.options import EvaluateOptions
from .loading.load import load, restore_settings
from .loading.options import LoadOptions, PublishOptions
from .loading.publish import publish, roll_back
from .models.encoder import SparseEncoder
from .models.origins import Origin
from .models.query_encoders import query_encoder
from .models.sparse_vectors import SparseVectors
from .pipeline import (
    EncodeSettings,
    HybridSettings,
    IndexSettings,
    ModelSettings,
    Pipeline,
    Pruning,
    QuerySettings,
    read_pipeline,
)
from .planning.options import PlanOptions
from .planning.plan import plan
from .queries.idf import write_idf
from .records import Document, Query, SparseRows
from .reporting import Reporter
from .reports.report import report
from .runs.shards import read_shard
from .searching.document_terms import DocumentTerm, DocumentTerms
from .searching.encoded import encode
from .searching.hits import Explanation, Hit
from .searching.index_search import rank_index, search_index
from .searching.options import SearchOptions
from .searching.pipelines import engine_of, token_keys
from .searching.query import many_query_weights, query_weights
from .searching.run_search import rank_run, search_run
from .searching.search import SearchableIndex, open_index, open_run
from .searching.searchable_run import SearchableRun
from .serving.options import ServeOptions
from .serving.serve import serve
from .storage.places import place_of
from .verification.options import VerifyOptions
from .verification.verify import verify

__all__ = [
    "CheckpointError",
    "ClusterError",
    "Connection",
    "CorpusError",
    "CreateOptions",
    "Document",
    "DocumentTerm",
    "DocumentTerms",
    "EncodeOptions",
    "EncodeSettings",
    "Engine",
    "EvaluateOptions",
    "Explanation",
    "FieldNames",
    "Hit",
    "HybridSettings",
    "IndexSettings",
    "Interrupted",
    "LoadOptions",
    "MissingExtraError",
    "ModelSettings",
    "Origin",
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
    "ServeOptions",
    "SparseEncoder",
    "SparseIngestError",
    "SparseRows",
    "SparseVectors",
    "StorageError",
    "UsageError",
    "VerifyOptions",
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
    "list_indexes",
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
    "report",
    "restore_settings",
    "roll_back",
    "search_index",
    "search_run",
    "seismic_body",
    "server_side_body",
    "serve",
    "show_index",
    "token_keys",
    "two_phase_body",
    "verify",
    "write_idf",
]
