"""The verb `query`: text to query weights, and the model and settings that an index or a run is asked with.

In: a pipeline, or what an index or a run remembers of its model. Out: query weights, pruned as [query] says, and for
sparse_vector fields the keys that stand for tokens there. A weight table needs no torch.
Not covered: the request (opensearch/requests.py) and what is found (search.py).
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import TYPE_CHECKING, Any

from sparse_ingest.errors import ClusterError, MissingExtraError, PipelineError, RunError, UsageError
from sparse_ingest.pipeline import ModelSettings, Pipeline, QuerySettings
from sparse_ingest.queries.protocol import QueryEncoder, QueryWeights, to_float32

if TYPE_CHECKING:
    from sparse_ingest.opensearch.client import Client
    from sparse_ingest.runs.manifest import Run

DEFAULT_FIELD = "sparse"
logger = logging.getLogger(__name__)


def query_encoder(model: ModelSettings) -> QueryEncoder:
    """Build what turns query texts into weights: a weight table where the checkpoint has one, else a masked LM.

    Raises:
        UsageError: no model is named.
        MissingExtraError: the checkpoint needs torch, which is not installed.
    """
    name = model.query or model.document
    if not name:
        raise UsageError("No model: give --model or --pipeline.")
    from sparse_ingest.checkpoints.layouts import read_checkpoint
    from sparse_ingest.checkpoints.settings import resolve_query_settings
    from sparse_ingest.checkpoints.sides import WeightTableSide

    revision = model.query_revision if model.query else model.revision
    checkpoint = read_checkpoint(name, revision, code=model.trust_remote_code)
    side = checkpoint.query
    if isinstance(side, WeightTableSide):
        from sparse_ingest.queries.weight_table import WeightTable

        pickled = None
        if side.weights.suffix == ".bin":
            _require_torch(f"The weight table of {name}, a pickle that only torch reads safely,")
            from sparse_ingest.models.pickles import read_table

            pickled = read_table(side.weights)
        settings = resolve_query_settings(model, checkpoint)
        return WeightTable.from_side(side, settings, max_active_dims=checkpoint.max_active_dims, by_id=pickled)
    _require_torch(f"The query side of {name}, a masked LM,")
    from sparse_ingest.models.queries import build_query_encoder

    encoder: QueryEncoder = build_query_encoder(checkpoint, resolve_query_settings(model, checkpoint))
    return encoder


def weigh(text: str, pipeline: Pipeline) -> QueryWeights:
    """The weights that a query is asked with: encoded, then pruned as [query] says.

    Raises:
        PipelineError: the pipeline asks for an engine that its kind of field does not have.
    """
    engine, kind = pipeline.query.engine, pipeline.index.kind
    if engine == "two-phase" or (engine == "seismic" and kind != "sparse_vector"):
        raise PipelineError(
            f'query.engine = "{engine}": this release searches a {kind} field with engine = "exact", and a '
            'sparse_vector field with "seismic" whatever the engine says.'
        )
    weights = prune_query(query_encoder(pipeline.model).encode([text])[0], pipeline.query)
    if not weights:
        logger.warning("No token of the query has a weight, so nothing can be found.")
    return weights


def prune_query(weights: QueryWeights, settings: QuerySettings) -> QueryWeights:
    """Keep the `top_k` heaviest tokens that reach `max_ratio` of the heaviest.

    Of equal weights the first token string stays: a query has no token ids, by which documents break ties.
    """
    ordered = sorted(weights.items(), key=lambda pair: (-pair[1], pair[0]))[: settings.top_k]
    if not ordered or settings.max_ratio is None:
        return dict(ordered)
    # In float32, as pruning.py does it for documents.
    least = to_float32(to_float32(settings.max_ratio) * ordered[0][1])
    return {token: weight for token, weight in ordered if weight >= least}


def pipeline_of_run(asked: Pipeline, run: Run) -> Pipeline:
    """The pipeline to search a run with: the run's own model unless another was asked for.

    Raises:
        RunError: nobody named a model.
    """
    model = _model(asked.model, run.manifest.model)
    if model is None:
        raise RunError(f"{run.path} does not say which model made it. Give --model or --pipeline.")
    return replace(asked, model=model)


def pipeline_of_index(asked: Pipeline, client: Client, index: str) -> Pipeline:
    """The pipeline to search an index with: model and field as the load stamped them unless others were asked for.

    Raises:
        UsageError: the name stands for several indexes.
        ClusterError: there is no such index, or nobody named a model.
    """
    from sparse_ingest.opensearch.indexes import find_index
    from sparse_ingest.opensearch.mappings import Kind, field_mapping

    found = find_index(client, index)
    if found is None:
        raise ClusterError(f"No index or alias {index!r} at {client.address}. Make it with `sparse-ingest load`.")
    model = _model(asked.model, found.stamp.model if found.stamp else {})
    if model is None:
        raise ClusterError(
            f"The index {index!r} was not loaded by sparse-ingest and does not say which model made it. "
            "Give --model or --pipeline."
        )
    # The stamp is what the load did; a pipeline only has a say when it names another field than the default.
    stamped = found.stamp.field if found.stamp else DEFAULT_FIELD
    field = asked.index.field if asked.index.field != DEFAULT_FIELD else stamped
    mapped = field_mapping(found.mappings, field) or {}
    kind: Kind = "sparse_vector" if mapped.get("type") == "sparse_vector" else "rank_features"
    return replace(asked, model=model, index=replace(asked.index, field=field, kind=kind))


def token_keys(pipeline: Pipeline, client: Client | None = None, index: str = "") -> dict[str, str] | None:
    """The key of each token in a sparse_vector field, its id on the document side; None for rank_features.

    With an index, its stamp must name the same vocabulary.

    Raises:
        CheckpointError: the tokenizer of the document side cannot be read.
        ClusterError: the index was loaded with another vocabulary, in which the ids mean other tokens.
    """
    name = pipeline.model.document or pipeline.model.query
    if pipeline.index.kind != "sparse_vector" or not name:
        return None
    from sparse_ingest.checkpoints.layouts import read_checkpoint
    from sparse_ingest.queries.token_ids import read_vocabulary

    model = pipeline.model
    revision = model.revision if model.document else None
    vocabulary = read_vocabulary(read_checkpoint(name, revision, code=model.trust_remote_code).transformer)
    if client is not None:
        from sparse_ingest.opensearch.indexes import find_index, vocabulary_hash

        found = find_index(client, index)
        stamp = found.stamp if found else None
        if stamp and stamp.vocabulary_sha256 != vocabulary_hash(vocabulary):
            raise ClusterError(
                f"Index {index!r} is keyed by the token ids of another vocabulary than that of {name!r}, so a query "
                "would ask for other words. Give the --model that the index was made with."
            )
    return {token: str(token_id) for token_id, token in enumerate(vocabulary) if token is not None}


def known_keys(weights: QueryWeights, keys: Mapping[str, str]) -> QueryWeights:
    """The weights of the tokens that the document side has as well; its index can hold no others."""
    known = {token: weight for token, weight in weights.items() if token in keys}
    if len(known) < len(weights):
        lost = ", ".join(repr(token) for token in weights if token not in keys)
        logger.warning("The vocabulary of the documents lacks some tokens of the query; left out: %s.", lost)
    return known


def _require_torch(purpose: str) -> None:
    # Looked for, not imported.
    if not (importlib.util.find_spec("torch") and importlib.util.find_spec("transformers")):
        raise MissingExtraError("encode", purpose)


def _model(asked: ModelSettings, stored: Mapping[str, Any]) -> ModelSettings | None:
    """The model that was asked for, or else the stored one, with single settings that were asked for on top."""
    if asked.document:
        return asked
    # An index cannot grant trust in remote code to whoever searches it.
    known = {field.name for field in fields(ModelSettings)} - {"trust_remote_code"}
    if asked.query:  # what is stored of queries is another model's
        stored = {key: stored[key] for key in ("document", "revision") if key in stored}
    else:
        stored = {**stored, **(stored.get("query_side") or {})}
    model = ModelSettings(**{key: value for key, value in stored.items() if key in known})
    default = asdict(ModelSettings())
    model = replace(model, **{key: value for key, value in asdict(asked).items() if value != default[key]})
    return model if model.document or model.query else None
