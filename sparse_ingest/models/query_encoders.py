"""Choose what turns query texts into weights: a weight table, which needs neither torch nor numpy, or a masked LM.

Weight tables themselves are in queries/weight_table.py, masked LMs in queries.py.
"""

from __future__ import annotations

import importlib.util

from sparse_ingest.checkpoints.layouts import Checkpoint, WeightTableSide, read_checkpoint
from sparse_ingest.checkpoints.settings import resolve_query_settings
from sparse_ingest.errors import MissingExtraError, UsageError
from sparse_ingest.pipeline import ModelSettings
from sparse_ingest.queries.weight_table import QueryEncoder, WeightTable


def query_encoder(model: ModelSettings) -> QueryEncoder:
    """Build the query encoder of a model: its weight table where the checkpoint has one, otherwise its masked LM.

    Raises:
        UsageError: no model is named.
        MissingExtraError: the checkpoint needs torch, which is not installed.
    """
    checkpoint = query_checkpoint(model)
    if isinstance(checkpoint.query, WeightTableSide):
        return build_weight_table(checkpoint, resolve_query_settings(model, checkpoint))
    require_torch(f"The query side of {checkpoint.name}, a masked LM,")
    from sparse_ingest.models.queries import build_query_encoder

    return build_query_encoder(checkpoint, resolve_query_settings(model, checkpoint))


def query_checkpoint(model: ModelSettings) -> Checkpoint:
    """Read the checkpoint that a model's queries are encoded with."""
    name = model.query or model.document
    if not name:
        raise UsageError("No model: give --model or --pipeline.")
    revision = model.query_revision if model.query else model.revision
    return read_checkpoint(name, revision, code=model.trust_remote_code)


def build_weight_table(checkpoint: Checkpoint, settings: ModelSettings) -> WeightTable:
    """Build the weight table that is a checkpoint's query side.

    Raises:
        MissingExtraError: it is a pickle, and torch is not installed.
    """
    side = checkpoint.query
    assert isinstance(side, WeightTableSide)
    pickled = None
    if side.weights.suffix == ".bin":
        require_torch(f"The weight table of {checkpoint.name}, a pickle that only torch reads safely,")
        from sparse_ingest.models.masked_lms import read_table

        pickled = read_table(side.weights)
    return WeightTable(side, settings, max_active_dims=checkpoint.max_active_dims, by_id=pickled)


def require_torch(purpose: str) -> None:
    """Raise MissingExtraError where torch or transformers is not installed; neither is imported."""
    if not (importlib.util.find_spec("torch") and importlib.util.find_spec("transformers")):
        raise MissingExtraError("encode", purpose)
