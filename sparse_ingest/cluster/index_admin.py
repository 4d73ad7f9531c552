"""Create an empty index as `load` would, with pipelines on the server; show an index; drop one.

A created index accepts a load with the same settings, and documents that the server itself encodes: both write their
vectors into the same field. Only an index with the stamp of a load or the key of `create_index` in its `_meta` is
dropped.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from sparse_ingest.cluster import indexes, installed, mappings, seismic, settling, updates
from sparse_ingest.cluster.client import Client, ConnectionLike, UnreachableError, connect
from sparse_ingest.cluster.dialects import kind_of
from sparse_ingest.cluster.installed import Installed
from sparse_ingest.errors import ClusterError, PipelineError, UsageError
from sparse_ingest.pipeline import IndexSettings, Pipeline, options_from, pipeline_of
from sparse_ingest.reporting import Reporter, reporter_of


@dataclass(frozen=True)
class CreateOptions:
    """The pipelines of a new index: names of packaged ones, and the model that they run on the server.

    With `default` they apply to every search and document that names none. A field, kind or body that is None is that
    of the pipeline.
    """

    search: tuple[str, ...] = ()
    ingest: str | None = None
    model_id: str | None = None
    default: bool = False
    field: str | None = None
    kind: Literal["rank_features", "sparse_vector"] | None = None
    body: str | None = None


@dataclass(frozen=True)
class CreateReport:
    """Result of `create_index`; `--json` prints these keys. A pipeline is None if none was requested."""

    index: str
    uuid: str
    field: str
    kind: str
    search_pipeline: str | None
    ingest_pipeline: str | None
    default: bool


@dataclass(frozen=True)
class IndexReport:
    """Result of `show_index`; `--json` prints these keys.

    `field` and `kind` are None if the index has no sparse field; `model`, `run_id`, `load`, `pruning` and `query` if no
    load has stamped it, or its stamp cannot be read (`unreadable` has the reason). `fields` has the types of kept
    fields, None for one that is not mapped. `numbered_tokens` counts the tokens of the token map, None without one. The
    three pipelines are in its settings; `installed` has the pipelines that `create_index` installed.
    """

    index: str
    asked: str
    uuid: str
    aliases: list[str]
    field: str | None
    kind: str | None
    ours: bool
    model: dict[str, Any] | None
    run_id: str | None
    runs: list[str]
    load: str | None
    pruning: dict[str, Any] | None
    query: dict[str, Any] | None
    fields: dict[str, str | None]
    documents: int
    bytes: int
    segments: int
    primaries: int
    replicas: int
    search_pipeline: str | None
    ingest_pipeline: str | None
    final_pipeline: str | None
    installed: list[str]
    unreadable: str | None = None
    numbered_tokens: int | None = None


@dataclass(frozen=True)
class DropReport:
    """Result of `drop_index`: what was deleted, and why a pipeline was kept; `--json` prints these keys.

    `documents` is None if they could not be counted.
    """

    index: str
    uuid: str
    documents: int | None
    pipelines: list[str]
    kept: list[str]


def create_index(
    index: str,
    *,
    url: str | None = None,
    connection: ConnectionLike | None = None,
    pipeline: Pipeline | str | None = None,
    options: CreateOptions | None = None,
    progress: Reporter | bool = False,
    **settings: object,
) -> CreateReport:
    """Create an empty index that a load with the same pipeline accepts, and install its pipelines.

    Args:
        index: Its name.
        url: Where the cluster is; by default the SPARSE_INGEST_* variables name it.
        connection: A `Connection` or an `opensearchpy.OpenSearch`, instead of `url`.
        pipeline: A `Pipeline`, a pipeline file or the name of a packaged one; its [index] table applies.
        options: All options in one object, instead of single keywords.
        progress: A `Reporter` for notes; silent by default.
        **settings: Fields of `CreateOptions`, such as `search=("two-phase",)`.

    Raises:
        UsageError, PipelineError: options that exclude each other, or an unknown body.
        ClusterError: the index or another pipeline of its name exists, or the server refuses.
    """
    chosen, reporter = options_from(CreateOptions, options, settings, "create_index"), reporter_of(progress)
    full = pipeline_of(None, pipeline)
    given = {name: value for name in ("field", "kind", "body") if (value := getattr(chosen, name)) is not None}
    full = replace(full, index=replace(full.index, **given))
    _refuse_options(chosen)
    wanted = _pipelines(index, full, chosen)
    with connect(connection, url=url, reporter=reporter) as client:
        client.dialect.check_kind(full.index.kind)
        body = mappings.index_body(full.index, None, client.dialect)
        there = indexes.find_index(client, index)
        if there is not None:
            what = "exists already" if there.name == index else f"is an alias of {there.name!r}"
            raise ClusterError(
                f"{index!r} {what}, so it was not created. Pass another --index, or look at it first: "
                f"sparse-ingest index show --index {index}"
            )
        passages, defaults = chosen.ingest == "text-chunking", list(wanted) if chosen.default else ()
        body = installed.equipped(body, list(wanted), passages=passages, defaults=defaults)
        new = []
        try:
            for one, content in wanted.items():
                if installed.install(client, one, content, index):
                    new.append(one)
            made = indexes.create_index(client, index, body)
        except BaseException:
            for one in new:
                with contextlib.suppress(ClusterError):
                    installed.remove(client, one, index)
            raise
        for message in _notes(client, made, full.index):
            reporter.note(message)
    names = {one.kind: one.name for one in wanted}
    kept = names.get("search"), names.get("ingest")
    return CreateReport(made.name, made.uuid, full.index.field, full.index.kind, *kept, chosen.default)


def show_index(index: str, *, url: str | None = None, connection: ConnectionLike | None = None) -> IndexReport:
    """Return what an index or alias is and contains.

    Args:
        index: An index or alias.
        url: Where the cluster is; by default the SPARSE_INGEST_* variables name it.
        connection: A `Connection` or an `opensearchpy.OpenSearch`, instead of `url`.

    Raises:
        ClusterError: it does not exist.
    """
    with connect(connection, url=url) as client:
        there = indexes.need_index(client, index, "Check --index and --url.")
        stamp = there.stamp
        field = stamp.field if stamp else mappings.sparse_field(there.mappings)
        path = f"{there.path}/_stats/store,segments"
        primaries = client.call("GET", path)["_all"]["primaries"]
        return IndexReport(
            index=there.name,
            asked=index,
            uuid=there.uuid,
            aliases=there.serving_aliases,
            field=field,
            kind=kind_of(mappings.field_mapping(there.mappings, field)) if field else None,
            ours=installed.is_ours(there),
            runs=list(stamp.runs) if stamp else [],
            **{name: getattr(stamp, name, None) for name in ("model", "run_id", "load", "pruning", "query")},
            fields=(stamp.fields if stamp else None) or {},
            documents=indexes.count_documents(client, there),
            bytes=int(primaries["store"]["size_in_bytes"]),
            segments=int(primaries["segments"]["count"]),
            primaries=int(there.setting("number_of_shards") or 1),
            replicas=int(there.setting("number_of_replicas") or 0),
            search_pipeline=there.setting(installed.DEFAULT_PIPELINE_SETTINGS["search"]),
            ingest_pipeline=there.setting(installed.DEFAULT_PIPELINE_SETTINGS["ingest"]),
            final_pipeline=there.setting("final_pipeline"),
            installed=[one.name for one in installed.made_of(there) or []],
            unreadable=there.unreadable or None,
            numbered_tokens=len(stamp.tokens.ids) if stamp and stamp.tokens else None,
        )


def drop_index(
    index: str,
    *,
    url: str | None = None,
    connection: ConnectionLike | None = None,
    force: bool = False,
    sure: Callable[[str], bool] = lambda question: True,
) -> DropReport | None:
    """Delete an index, and the pipelines that `create_index` installed for it. Return None if `sure` returns False.

    Args:
        index: Its own name, not an alias.
        url: Where the cluster is; by default the SPARSE_INGEST_* variables name it.
        connection: A `Connection` or an `opensearchpy.OpenSearch`, instead of `url`.
        force: Also delete an index that sparse-ingest did not create, that an alias serves, or that is red.
        sure: Called with a question that names what will be deleted.

    Raises:
        UsageError: the name is an alias.
        ClusterError: it does not exist or is not ours, an alias serves it, or its documents cannot be counted.
    """
    with connect(connection, url=url) as client:
        there = indexes.need_index(client, index, "Check --index and --url.")
        if there.name != index:
            raise UsageError(f"{index!r} is an alias of {there.name!r}. Name the index itself.")
        if not force and not installed.is_ours(there):
            why = there.unreadable or "was neither created nor loaded by sparse-ingest"
            raise ClusterError(f"Index {index!r} {why}, so it was not deleted. To delete it anyway, pass --force.")
        if not force:
            indexes.refuse_serving(there, "pass --force")
        documents = _count(client, there, force)
        pipelines = installed.made_of(there) or []
        also = f" and its pipelines {', '.join(one.name for one in pipelines)}" if pipelines else ""
        many = "an unknown number of" if documents is None else documents
        if not sure(f"Delete index {index!r} at {client.address} with {many} documents{also}?"):
            return None
        indexes.check_uuid(client, there)
        client.call("DELETE", there.path)
        kept = {one.name: installed.remove(client, one, index) for one in pipelines}
    removed = [name for name, why in kept.items() if why is None]
    return DropReport(there.name, there.uuid, documents, removed, [why for why in kept.values() if why])


def _refuse_options(options: CreateOptions) -> None:
    needed = "neural-query-enricher" in options.search or options.ingest is not None
    if needed and not options.model_id:
        raise UsageError(
            "This pipeline runs a model on the server: pass its --model-id. GET /_plugins/_ml/models/_search lists "
            "registered models."
        )
    if options.model_id and not needed:
        raise UsageError("--model-id needs --ingest-pipeline or --search-pipeline neural-query-enricher. Pass one.")
    if options.default and not (options.search or options.ingest):
        raise UsageError("--default needs --search-pipeline or --ingest-pipeline. Pass one, or omit it.")


def _pipelines(index: str, pipeline: Pipeline, options: CreateOptions) -> dict[Installed, dict[str, Any]]:
    """Return the pipelines to install with their bodies."""
    field = pipeline.index.field
    if pipeline.index.kind == "sparse_vector" and "two-phase" in options.search:
        raise PipelineError(
            "Two-phase searches rank_features fields; this index has kind sparse_vector. Omit "
            "--search-pipeline two-phase."
        )
    wanted = {}
    if options.search:
        body = installed.search_body(options.search, field, options.model_id)
        wanted[Installed("search", f"{index}-search")] = body
    if options.ingest:
        body = installed.ingest_body(options.ingest, field, options.model_id, pipeline.encode)
        wanted[Installed("ingest", f"{index}-ingest")] = body
    return wanted


def _notes(client: Client, made: indexes.Index, settings: IndexSettings) -> Iterator[str]:
    """Yield notes on a new index."""
    if not updates.keeps_vectors(made, settings.field, client.dialect):
        yield updates.notice(made, settings.field, client.dialect)
    if unstarted := settling.unstarted_primaries(client, made):
        yield unstarted
    if settings.kind == "sparse_vector":
        parameters = seismic.parameters_of(mappings.field_mapping(made.mappings, settings.field) or {})
        yield (
            f"SEISMIC: index {made.name!r} clips weights above {parameters['quantization_ceiling_ingest']:g}, and "
            f"builds clusters in segments of {parameters['approximate_threshold']} documents or more. Neither can be "
            "changed; a load that creates its index fits both to the run."
        )
        yield from seismic.advice(None)


def _count(client: Client, there: indexes.Index, force: bool) -> int | None:
    """Return how many documents an index has, or with `force` None if its shards do not answer."""
    try:
        return indexes.count_documents(client, there)
    except UnreachableError:
        raise
    except ClusterError as error:
        if force:
            return None
        raise ClusterError(
            f"The documents of index {there.name!r} cannot be counted ({error}). To delete it anyway, pass --force."
        ) from error
