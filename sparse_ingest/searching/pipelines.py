"""Choose the model, field and engine to search an index or a run with, from given and stored settings."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from sparse_ingest.checkpoints.layouts import read_checkpoint
from sparse_ingest.checkpoints.sides import AutoencoderSide
from sparse_ingest.cluster.engines import choose_engine
from sparse_ingest.cluster.limits import check_hybrid
from sparse_ingest.cluster.search_bodies import Engine
from sparse_ingest.errors import CheckpointError, ClusterError, RunError, UsageError
from sparse_ingest.pipeline import HybridSettings, ModelSettings, Pipeline, QuerySettings, changed, query_settings
from sparse_ingest.queries.weight_table import vocabulary_of

if TYPE_CHECKING:
    from sparse_ingest.cluster.client import Client
    from sparse_ingest.cluster.dialects import FieldKind, Product
    from sparse_ingest.cluster.indexes import Index
    from sparse_ingest.runs.run import Run

DEFAULT_FIELD = "sparse"


class QuerySide(NamedTuple):
    """The stored checkpoint of queries."""

    name: str
    revision: str | None
    sha256: str | None

    def __str__(self) -> str:
        if self.revision:
            return f"{self.name} at revision {self.revision[:12]}"
        return f"{self.name} (sha256 {self.sha256[:12]})" if self.sha256 else self.name


def pipeline_of_run(given: Pipeline, run: Run, *, force: bool = False) -> Pipeline:
    """Return the pipeline to search a run with: the run's own model unless another was given.

    Raises:
        RunError: no model is named, or, without `force`, it is not the run's.
    """
    model = remembered_model(given.model, run.manifest.model)
    if model is None:
        raise RunError(f"{run.path} does not name its model. Pass --model or --pipeline.")
    difference = None if force else other_model(given.model, run.manifest.model, run.vocabulary)
    if difference:
        raise RunError(f"{run.path} was encoded with another model: {difference}")
    return replace(given, model=model)


def pipeline_of_index(given: Pipeline, index: Index, name: str, *, force: bool = False) -> Pipeline:
    """Return the pipeline to search an index with: `_meta` has its model, field and query settings, unless given.

    Raises:
        ClusterError: the sparse field is missing, no model is named, or it differs from `_meta` without `force`.
    """
    stamp = index.stamp
    model = remembered_model(given.model, stamp.model if stamp else {})
    if model is None:
        raise ClusterError(
            f"The index {name!r} {index.unreadable or 'was not loaded by sparse-ingest'} and does not name its model. "
            "Pass --model or --pipeline."
        )
    difference = None if force or not stamp else other_model(given.model, stamp.model, stamp.vocabulary_sha256)
    if difference:
        raise ClusterError(f"Index {name!r} was loaded with another model: {difference}")
    # The stamp has the field of the load; a pipeline overrides it only with a field that is not the default.
    stamped = stamp.field if stamp else DEFAULT_FIELD
    field = given.index.field if given.index.field != DEFAULT_FIELD else stamped
    kind = _kind_of_field(index.mappings, field, name, stamped)
    remembered = stamp.query if stamp else {}
    query = query_settings(given.query, remembered, f"Index {name!r}: _meta.sparse_ingest.query")
    return replace(given, model=model, index=replace(given.index, field=field, kind=kind), query=query)


def engine_of(
    pipeline: Pipeline,
    client: Client | None = None,
    index: str | None = None,
    *,
    product: Product = "opensearch",
    run: Run | None = None,
) -> Engine:
    """Return the engine that [query] and [index] name.

    Args:
        pipeline: The pipeline with these tables.
        client: A connection to the cluster of `index`.
        index: An index or alias. Its vocabulary must be that of the pipeline's model.
        product: The product of the cluster, without a connection to it.
        run: A run, without a connection: keys are those of a new index into which it is loaded, pruned by [load].

    Raises:
        PipelineError: the engine cannot search this kind of field, or one of its settings is unknown.
        UsageError: the vocabulary needs a token map, and neither `index` nor `run` is given.
        ClusterError: the index was loaded with another vocabulary.
    """
    found = None
    if client and index and pipeline.index.kind == "sparse_vector":
        from sparse_ingest.cluster.indexes import find_index

        found = find_index(client, index)
    return engine_of_index(pipeline, found, client.dialect.product if client else product, run)


def engine_of_index(pipeline: Pipeline, index: Index | None, product: Product, run: Run | None = None) -> Engine:
    """Return the engine like `engine_of`, for an index that is already read, or without one."""
    settings, field, kind = pipeline.query, pipeline.index.field, pipeline.index.kind
    name = choose_engine(settings, kind, product)
    ceiling = None
    if index and kind == "sparse_vector":
        from sparse_ingest.cluster.mappings import field_mapping
        from sparse_ingest.cluster.seismic import parameters_of

        if mapped := field_mapping(index.mappings, field):
            ceiling = float(parameters_of(mapped)["quantization_ceiling_search"])
    keys, there = token_keys(pipeline, index, run), index.mappings if index else None
    tables: dict[str, Any] = {table: getattr(settings, table) for table in ("two_phase", "seismic", "pruned")}
    if keys is not None and index and index.stamp and index.stamp.token_map:
        tables["mapped"] = index.name
    return Engine(name, field, kind, keys, ceiling=ceiling, product=product, mappings=there, **tables)


def hybrid_settings(query: QuerySettings, given: HybridSettings) -> HybridSettings | None:
    """Return the settings of a hybrid search: [query], overridden by `given`; None if it is not hybrid.

    Raises:
        UsageError: settings have no effect, or cannot be combined.
    """
    names = HybridSettings.__dataclass_fields__
    own = {name: value for name in names if (value := getattr(given, name)) is not None}
    if given.hybrid is False and len(own) > 1:
        raise UsageError(f"{sorted(own)[1]} has no effect with hybrid = false (--no-hybrid). Omit one of them.")
    found = HybridSettings(**{name: own.get(name, getattr(query, name)) for name in names})
    check_hybrid(found)
    return found if found.hybrid else None


def refuse_hybrid(query: QuerySettings, given: HybridSettings, why: str) -> None:
    """Raise `UsageError` if a search that cannot be hybrid has settings of a hybrid one."""
    if any(getattr(given, name) for name in HybridSettings.__dataclass_fields__) or hybrid_settings(query, given):
        raise UsageError(f"hybrid {why}. Omit it, or pass --no-hybrid (hybrid=False).")


def _kind_of_field(mappings: dict[str, Any], field: str, index: str, stamped: str) -> FieldKind:
    """Return the kind of a sparse field, or raise `ClusterError` for other fields."""
    from sparse_ingest.cluster.dialects import kind_of
    from sparse_ingest.cluster.mappings import field_mapping, sparse_field

    mapped = field_mapping(mappings, field)
    if kind := kind_of(mapped):
        return kind
    found = f"the field {field!r} as {mapped.get('type', 'object')}" if mapped else f"no field {field!r}"
    there = stamped if field != stamped and field_mapping(mappings, stamped) else sparse_field(mappings)
    advice = f"Its sparse field is {there!r}: pass --set index.field={there}" if there else "Load a run into it"
    raise ClusterError(f"Index {index!r} has {found}; expected a rank_features or sparse_vector field. {advice}.")


def token_keys(pipeline: Pipeline, index: Index | None = None, run: Run | None = None) -> dict[str, str | None] | None:
    """Return the key of each token in a sparse_vector field, None for one without; None for rank_features.

    Args:
        pipeline: The pipeline that names the field's kind and the model.
        index: An index that must have been loaded with the same vocabulary.
        run: A run, if there is no index; see `engine_of`.

    Raises:
        CheckpointError: the tokenizer of the document side cannot be read.
        ClusterError: the index was loaded with another vocabulary, in which the ids mean other tokens.
        UsageError: the vocabulary needs a token map, and neither `index` nor `run` is given.
    """
    name = pipeline.model.document or pipeline.model.query
    if pipeline.index.kind != "sparse_vector" or not name:
        return None
    from sparse_ingest.cluster.mappings import keys_of
    from sparse_ingest.cluster.stamps import vocabulary_hash
    from sparse_ingest.cluster.token_map import MAX_KEYS, token_id_keys

    vocabulary = document_vocabulary(pipeline.model)
    if index:
        if index.stamp and index.stamp.vocabulary_sha256 != vocabulary_hash(vocabulary):
            raise ClusterError(
                f"Index {index.name!r} has token ids of another vocabulary than {name!r}, so a query would "
                "match other words. Pass the --model of the index."
            )
        keys = keys_of(index, vocabulary)
    elif run is not None:
        from sparse_ingest.loading.live_tokens import token_map_of

        if run.vocabulary() != vocabulary:
            raise RunError(f"{run.path} has another vocabulary than {name!r}. Pass the --model of the run.")
        keys = token_id_keys(vocabulary, token_map_of(run, pipeline.load.rules))
    elif len(vocabulary) > MAX_KEYS:
        raise UsageError(
            f"{name!r} has {len(vocabulary):,} tokens, and a sparse_vector field distinguishes {MAX_KEYS:,}, so a load "
            "numbers those of its run. Pass --index NAME, which has these numbers, or --run RUN."
        )
    else:
        keys = token_id_keys(vocabulary)
    return {token: key for token, key in zip(vocabulary, keys, strict=True) if token is not None}


def document_vocabulary(model: ModelSettings) -> list[str | None]:
    """Return the token string of each id of the document side.

    Raises:
        CheckpointError: its tokenizer cannot be read.
    """
    name, revision = (model.document, model.revision) if model.document else (model.query, model.query_revision)
    return vocabulary_of(read_checkpoint(str(name), revision, code=model.trust_remote_code).document)


def remembered_model(given: ModelSettings, stored: Mapping[str, Any]) -> ModelSettings | None:
    """Return the given model, otherwise the stored one with the given settings on top."""
    if given.document:
        return given
    # An index must not grant trust in remote code.
    known = {field.name for field in fields(ModelSettings)} - {"trust_remote_code"}
    if given.query:  # stored settings of queries are another model's
        stored = {key: stored[key] for key in ("document", "revision") if key in stored}
    else:
        stored = {**stored, **(stored.get("query_side") or {})}
    model = ModelSettings(**{key: value for key, value in stored.items() if key in known})
    model = replace(model, **changed(given))
    return model if model.document or model.query else None


def has_words(stored: Mapping[str, Any]) -> bool:
    """Return whether the terms of the model in a stamp or a manifest are tokens; earlier releases had no others."""
    return stored.get("kind") != AutoencoderSide.kind


def remembered_side(stored: Mapping[str, Any]) -> QuerySide | None:
    """Return the query side in a stamp or a manifest; None if it names no model."""
    if stored.get("query"):
        of_queries = stored.get("query_side") or {}
        return QuerySide(str(stored["query"]), stored.get("query_revision"), of_queries.get("sha256"))
    if stored.get("document"):
        return QuerySide(str(stored["document"]), stored.get("revision"), stored.get("sha256"))
    return None


def other_model(
    given: ModelSettings, stored: Mapping[str, Any], vocabulary: str | Callable[[], Sequence[str | None]]
) -> str | None:
    """Return how the given model differs from the stored one; None if they are equal or one is not named.

    `vocabulary` is the documents' vocabulary, or its hash.
    """
    name, there = given.query or given.document, remembered_side(stored)
    if not name or there is None:
        return None
    revision = given.query_revision if given.query else given.revision
    checkpoint = read_checkpoint(name, revision, code=given.trust_remote_code)
    if checkpoint.revision and (checkpoint.name, checkpoint.revision) == (there.name, there.revision):
        return None
    # The same files may be in a local folder and on the hub.
    if there.sha256 in (checkpoint.sha256, None) and (there.sha256 or checkpoint.name == there.name):
        return None
    from sparse_ingest.cluster.stamps import vocabulary_hash

    here = QuerySide(checkpoint.name, checkpoint.revision, checkpoint.sha256)
    of_documents = vocabulary if isinstance(vocabulary, str) else vocabulary_hash(vocabulary())
    rest = "its vocabulary differs, so its tokens mean other words"
    with contextlib.suppress(CheckpointError):
        if vocabulary_hash(vocabulary_of(checkpoint.query)) == of_documents:
            rest = "its files differ"
    return f"stored is {there}, given is {here}; {rest}. Omit --model (and [model]), or pass --force."
