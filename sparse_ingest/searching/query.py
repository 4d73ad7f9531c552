"""The verb `query`: text to query weights, and the model and settings that an index or a run is asked with.

In: a pipeline, or what an index or a run remembers of its model. Out: query weights, pruned as [query] says, and for
sparse_vector fields the keys that stand for tokens there. A weight table needs no torch.
Not covered: the request (cluster/requests.py), what is found (search.py), whether a model is that of an index
(searching/stamps.py).
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, fields, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

from sparse_ingest.errors import ClusterError, RunError, UsageError
from sparse_ingest.models.encoder import query_encoder
from sparse_ingest.pipeline import ModelSettings, Pipeline
from sparse_ingest.queries.weight_table import QueryWeights, prune_query
from sparse_ingest.searching.stamps import other_model

if TYPE_CHECKING:
    from sparse_ingest.cluster.client import Client
    from sparse_ingest.cluster.indexes import Index
    from sparse_ingest.cluster.mappings import Kind
    from sparse_ingest.records import Query
    from sparse_ingest.runs.manifest import Run

DEFAULT_FIELD = "sparse"
QUERIES_AT_ONCE = 32  # texts that a model reads together
NAMED_TOKENS = 20  # of those that are left out of queries
logger = logging.getLogger(__name__)


def weigh(text: str, pipeline: Pipeline) -> QueryWeights:
    """The weights that a query is asked with: encoded, then pruned as [query] says.

    Raises:
        UsageError: there is no text.
    """
    if not text.strip():
        raise UsageError("The query is empty. Ask for some words.")
    weights = prune_query(query_encoder(pipeline.model).encode([text])[0], pipeline.query)
    if not weights:
        logger.warning(
            "No token of the query has a weight, so nothing can be found: the model knows none of its words."
        )
    return weights


def weigh_many(
    queries: Iterable[Query], pipeline: Pipeline, *, batch: int = QUERIES_AT_ONCE
) -> Iterator[tuple[str, QueryWeights]]:
    """The ids and weights of many queries, in their order; the model is built once and reads `batch` texts at a time.

    Queries without any weighted token are told at the end: they are asked, and find nothing.
    """
    encoder = query_encoder(pipeline.model)
    empty: list[str] = []
    asked, stream = 0, iter(queries)
    while some := list(islice(stream, batch)):
        asked += len(some)
        for query, weights in zip(some, encoder.encode([query.text for query in some]), strict=True):
            if not weights:
                empty.append(query.id)
            yield query.id, prune_query(weights, pipeline.query)
    if empty:
        logger.warning(
            "%d of %d queries have no token with a weight, such as %r: they find nothing.", len(empty), asked, empty[0]
        )


def pipeline_of_run(asked: Pipeline, run: Run, *, force: bool = False) -> Pipeline:
    """The pipeline to search a run with: the run's own model unless another was asked for.

    Raises:
        RunError: nobody named a model, or, without `force`, another than the run's.
    """
    model = _model(asked.model, run.manifest.model)
    if model is None:
        raise RunError(f"{run.path} does not say which model made it. Give --model or --pipeline.")
    difference = None if force else other_model(asked.model, run.manifest.model, run.vocabulary)
    if difference:
        raise RunError(f"{run.path} was made with another model than the one asked for: {difference}")
    return replace(asked, model=model)


def pipeline_of_index(asked: Pipeline, client: Client, index: str, *, force: bool = False) -> Pipeline:
    """The pipeline to search an index with: model and field as the load stamped them unless others were asked for.

    Raises:
        UsageError: the name stands for several indexes.
        ClusterError: there is no such index or no such sparse field, or nobody named a model, or, without `force`,
            another than the stamp's.
    """
    from sparse_ingest.cluster.indexes import find_index

    found = find_index(client, index)
    if found is None:
        raise ClusterError(f"No index or alias {index!r} at {client.address}. Make it with `sparse-ingest load`.")
    stamp = found.stamp
    model = _model(asked.model, stamp.model if stamp else {})
    if model is None:
        raise ClusterError(
            f"The index {index!r} was not loaded by sparse-ingest and does not say which model made it. "
            "Give --model or --pipeline."
        )
    difference = None if force or not stamp else other_model(asked.model, stamp.model, stamp.vocabulary_sha256)
    if difference:
        raise ClusterError(f"Index {index!r} was loaded with another model than the one asked for: {difference}")
    # The stamp is what the load did; a pipeline only has a say when it names another field than the default.
    stamped = stamp.field if stamp else DEFAULT_FIELD
    field = asked.index.field if asked.index.field != DEFAULT_FIELD else stamped
    kind = _kind_of_field(found.mappings, field, index, stamped)
    return replace(asked, model=model, index=replace(asked.index, field=field, kind=kind))


def _kind_of_field(mappings: dict[str, Any], field: str, index: str, stamped: str) -> Kind:
    """Of which kind a field is.

    Raises:
        ClusterError: it is none that a learned-sparse search can ask.
    """
    from sparse_ingest.cluster.mappings import field_mapping, sparse_field

    mapped = field_mapping(mappings, field)
    kind = (mapped or {}).get("type")
    if kind in ("rank_features", "sparse_vector"):
        return cast("Kind", kind)
    found = f"the field {field!r} as {kind or 'object'}" if mapped else f"no field {field!r}"
    there = stamped if field != stamped and field_mapping(mappings, stamped) else sparse_field(mappings)
    way_out = f"it has {there!r}: give --set index.field={there}" if there else "it has none: load a run into it"
    raise ClusterError(
        f"Index {index!r} has {found}; a learned-sparse search needs a rank_features or sparse_vector field, and "
        f"{way_out}."
    )


def token_keys(pipeline: Pipeline, index: Index | None = None) -> dict[str, str] | None:
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
    from sparse_ingest.queries.weight_table import read_vocabulary

    model = pipeline.model
    revision = model.revision if model.document else None
    vocabulary = read_vocabulary(read_checkpoint(name, revision, code=model.trust_remote_code).transformer)
    if index and index.stamp:
        from sparse_ingest.cluster.indexes import vocabulary_hash

        if index.stamp.vocabulary_sha256 != vocabulary_hash(vocabulary):
            raise ClusterError(
                f"Index {index.name!r} is keyed by the token ids of another vocabulary than that of {name!r}, so a "
                "query would ask for other words. Give the --model that the index was made with."
            )
    return {token: str(token_id) for token_id, token in enumerate(vocabulary) if token is not None}


def keyed(weights: QueryWeights, keys: Mapping[str, str], lost: dict[str, None]) -> QueryWeights:
    """The weights by the keys of a sparse_vector field; tokens that the documents' vocabulary lacks go into `lost`."""
    lost.update(dict.fromkeys(token for token in weights if token not in keys))
    return {keys[token]: weight for token, weight in weights.items() if token in keys}


def tell_of_lost(lost: Collection[str], why: str = "The vocabulary of the documents lacks some tokens") -> None:
    """Say once, of however many queries, which tokens were left out of them."""
    if lost:
        named = ", ".join(map(repr, islice(lost, NAMED_TOKENS)))
        rest = f" and {len(lost) - NAMED_TOKENS} more" if len(lost) > NAMED_TOKENS else ""
        logger.warning("%s; left out of the query: %s%s.", why, named, rest)


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
