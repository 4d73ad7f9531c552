"""`open_run` and `open_index`: open a run folder or an index with its own model and settings, and search it.

`search` is for one text, `rank` for many queries. A run is searched exactly, without a server.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

from sparse_ingest.errors import UsageError
from sparse_ingest.pipeline import ModelSettings, Pipeline, options_from, pipeline_of
from sparse_ingest.queries.weight_table import QueryWeights
from sparse_ingest.runs.run import Run, RunLike
from sparse_ingest.runs.run import open_run as open_run_folder
from sparse_ingest.searching.hits import Hit, Ranked
from sparse_ingest.searching.options import SearchOptions
from sparse_ingest.searching.pipelines import document_vocabulary, engine_of_index, pipeline_of_index, pipeline_of_run
from sparse_ingest.searching.query import QueryModel
from sparse_ingest.searching.run_search import rank_run, search_run

if TYPE_CHECKING:
    from sparse_ingest.cluster.client import Client, ConnectionLike
    from sparse_ingest.cluster.indexes import Index
    from sparse_ingest.records import Query


class SearchableRun(Run):
    """A run that can be searched with its own model, or with the one that `pipeline` names."""

    def __init__(self, run: Run, given: Pipeline = Pipeline(), *, force: bool = False) -> None:  # noqa: B008 - frozen
        super().__init__(run.path, run.manifest)
        self._given, self._force = given, force

    @cached_property
    def pipeline(self) -> Pipeline:
        """The pipeline of the run, changed by the given one."""
        return pipeline_of_run(self._given, self, force=self._force)

    @cached_property
    def _model(self) -> QueryModel:
        return QueryModel(self.pipeline)

    def query_weights(self, text: str) -> QueryWeights:
        """Return the weights of a query by token string, heaviest first."""
        return self._model.weights(text)

    def search(self, query: str | QueryWeights, options: SearchOptions | None = None, **settings: object) -> list[Hit]:
        """Search the finished shards exactly.

        Args:
            query: A text, or weights by token string.
            options: All options in one object, instead of single keywords.
            **settings: Fields of `SearchOptions`, such as `k=10`.

        Raises:
            UsageError: an option needs a server.
            RunError: the model is not that of the run.
        """
        chosen = _for_run(options_from(SearchOptions, options, settings, "search"))
        weights = self.query_weights(query) if isinstance(query, str) else query
        return search_run(self, weights, size=chosen.k, stored=chosen.stored, collapse=chosen.collapse)

    def rank(
        self, queries: Iterable[Query], options: SearchOptions | None = None, **settings: object
    ) -> Iterator[Ranked]:
        """Yield the ranking of each query, in order. The run is read once per 4,096 queries."""
        chosen = _for_run(options_from(SearchOptions, options, settings, "rank"))
        return rank_run(self, self._model.many(queries), size=chosen.k, stored=chosen.stored)


class SearchableIndex:
    """An index with the model, field and settings of its `_meta`. Thread-safe."""

    def __init__(self, client: Client, name: str, index: Index, pipeline: Pipeline) -> None:
        self.client, self.name, self.index, self.pipeline = client, name, index, pipeline
        self.engine = engine_of_index(pipeline, index, client.dialect.product)
        self._model = QueryModel(pipeline)

    def query_weights(self, text: str) -> QueryWeights:
        """Return the weights of a query by token string, heaviest first."""
        return self._model.weights(text)

    def vocabulary(self) -> list[str | None]:
        """Return the token string of each id of the document side."""
        return document_vocabulary(self.pipeline.model)

    def search(self, query: str | QueryWeights, options: SearchOptions | None = None, **settings: object) -> list[Hit]:
        """Search the index, and explain the score of each hit.

        Args:
            query: A text, or weights by token string.
            options: All options in one object, instead of single keywords.
            **settings: Fields of `SearchOptions`, such as `k=10` or `filter={"term": {"lang": "en"}}`.

        Raises:
            UsageError: options or weights do not fit, or the index does not map a field of `filter` or `collapse`.
            ClusterError: the server cannot answer.
        """
        from sparse_ingest.searching.index_search import search_hybrid, search_index

        chosen = _for_index(options_from(SearchOptions, options, settings, "search"))
        weights = self.query_weights(query) if isinstance(query, str) else query
        asked: dict[str, Any] = {"size": chosen.k, "engine": self.engine, "filter": chosen.filter}
        client = self.client.allowing(chosen.allow_partial)
        if not chosen.hybrid:
            return search_index(client, self.name, weights, collapse=chosen.collapse, **asked)
        if not isinstance(query, str) or chosen.collapse:
            raise UsageError("A hybrid search needs the text of the query, for BM25, and cannot collapse.")
        return search_hybrid(client, self.name, query, weights, **asked)

    def rank(
        self, queries: Iterable[Query], options: SearchOptions | None = None, **settings: object
    ) -> Iterator[Ranked]:
        """Yield the ranking of each query, in order, without documents and explanations."""
        from sparse_ingest.searching.index_search import rank_index

        chosen = _for_index(options_from(SearchOptions, options, settings, "rank"))
        if chosen.hybrid:
            raise UsageError("hybrid is for one text. Omit it.")
        asked: dict[str, Any] = {"size": chosen.k, "filter": chosen.filter, "collapse": chosen.collapse}
        client, weights = self.client.allowing(chosen.allow_partial), self._model.many(queries)
        return rank_index(client, self.name, weights, self.engine, concurrency=chosen.concurrency, **asked)

    def close(self) -> None:
        """Close the connection."""
        self.client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.client.__exit__(kind, error, trace)


def open_run(
    path: RunLike,
    *,
    model: str | ModelSettings | None = None,
    pipeline: Pipeline | str | None = None,
    force: bool = False,
) -> SearchableRun:
    """Open a run folder, for reading and for searching it.

    Args:
        path: The run folder, or an address such as s3://bucket/prefix.
        model: The model of the queries; by default the one that made the run.
        pipeline: A pipeline whose [query] settings apply; may replace `model`.
        force: Search with another model than the run's.

    Raises:
        RunError: the run does not exist, is damaged, or has a newer format than this release.
    """
    return SearchableRun(open_run_folder(path), pipeline_of(model, pipeline), force=force)


def open_index(
    name: str,
    *,
    url: str | None = None,
    connection: ConnectionLike | None = None,
    model: str | ModelSettings | None = None,
    pipeline: Pipeline | str | None = None,
    force: bool = False,
) -> SearchableIndex:
    """Open an index or alias for searching it; model, field and query settings come from its `_meta`.

    Args:
        name: An index, or an alias of one.
        url: Where the cluster is; by default the SPARSE_INGEST_* variables name it.
        connection: A `Connection` or an `opensearchpy.OpenSearch`, instead of `url`.
        model: The model of the queries, where `_meta` names none.
        pipeline: A pipeline whose [query] and [index] settings apply, instead of those of `_meta`; may replace `model`.
        force: Search with another model than that of `_meta`.

    Raises:
        UsageError: the name is an alias of several indexes, or both `url` and `connection` are given.
        ClusterError: the cluster cannot be reached, the index or sparse field does not exist, or no model is named.
        PipelineError: the field cannot be searched with the engine of [query].
    """
    from sparse_ingest.cluster.client import connect
    from sparse_ingest.cluster.indexes import need_index

    given, client = pipeline_of(model, pipeline), connect(connection, url=url)
    with contextlib.ExitStack() as stack:
        stack.enter_context(client)
        index = need_index(client, name, "Create it with `sparse-ingest load`.")
        opened = SearchableIndex(client, name, index, pipeline_of_index(given, index, name, force=force))
        stack.pop_all()
        return opened


def _for_run(options: SearchOptions) -> SearchOptions:
    """Refuse options that would have no effect on a run."""
    for name in ("filter", "hybrid", "allow_partial"):
        if getattr(options, name):
            raise UsageError(f"{name} needs a server, and a run is searched exactly without one. Omit it.")
    return options


def _for_index(options: SearchOptions) -> SearchOptions:
    """Refuse options that would have no effect on an index."""
    if options.stored:
        raise UsageError("stored is for a run: an index always uses the weights that it stores. Omit it.")
    return options
