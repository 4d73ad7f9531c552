"""Choose what turns query texts into weights: a weight table, which needs no torch, or a masked LM.

Not covered: weight tables themselves (queries/weight_table.py), documents (documents.py).
"""

from __future__ import annotations

import importlib.util

from sparse_ingest.checkpoints.layouts import read_checkpoint
from sparse_ingest.checkpoints.settings import resolve_query_settings
from sparse_ingest.checkpoints.sides import WeightTableSide
from sparse_ingest.errors import MissingExtraError, UsageError
from sparse_ingest.pipeline import ModelSettings
from sparse_ingest.queries.weight_table import QueryEncoder, WeightTable


def query_encoder(model: ModelSettings) -> QueryEncoder:
    """Build the query encoder of a model: its weight table where the checkpoint has one, otherwise its masked LM.

    Raises:
        UsageError: no model is named.
        MissingExtraError: the checkpoint needs torch, which is not installed.
    """
    name = model.query or model.document
    if not name:
        raise UsageError("No model: give --model or --pipeline.")
    revision = model.query_revision if model.query else model.revision
    checkpoint = read_checkpoint(name, revision, code=model.trust_remote_code)
    side = checkpoint.query
    if isinstance(side, WeightTableSide):
        pickled = None
        if side.weights.suffix == ".bin":
            _require_torch(f"The weight table of {name}, a pickle that only torch reads safely,")
            from sparse_ingest.models.masked_lms import read_table

            pickled = read_table(side.weights)
        settings = resolve_query_settings(model, checkpoint)
        return WeightTable.from_side(side, settings, max_active_dims=checkpoint.max_active_dims, by_id=pickled)
    _require_torch(f"The query side of {name}, a masked LM,")
    from sparse_ingest.models.queries import build_query_encoder

    return build_query_encoder(checkpoint, resolve_query_settings(model, checkpoint))


def _require_torch(purpose: str) -> None:
    # Looked for, not imported.
    if not (importlib.util.find_spec("torch") and importlib.util.find_spec("transformers")):
        raise MissingExtraError("encode", purpose)
