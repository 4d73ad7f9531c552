"""`open_run` and `open_index`: open a run folder or an index with its own model and settings, and search it.

`search` is for one text, `rank` for many queries. A run is searched exactly, without a server.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cached_property
from itertools import tee
from typing import TYPE_CHECKING, Any, Self

from sparse_ingest.errors import ClusterError, UsageError
from sparse_ingest.pipeline import HybridSettings, ModelSettings, Pipeline, options_from, pipeline_of, refuse_options
from sparse_ingest.queries.weight_table import QueryWeights
from sparse_ingest.reporting import SILENT, Reporter, reporter_of
from sparse_ingest.runs.run import Run, RunLike
from sparse_ingest.runs.run import open_run as open_run_folder
from sparse_ingest.searching.document_terms import DocumentTerms, TermReader, terms_in_index, terms_in_run
from sparse_ingest.searching.hits import Explanation, Hit, Ranked
from sparse_ingest.searching.options import SearchOptions
from sparse_ingest.searching.pipelines import (
    document_vocabulary,
    engine_of_index,
    hybrid_settings,
    pipeline_of_index,
    pipeline_of_run,
    refuse_hybrid,
    remembered_model,
)
from sparse_ingest.searching.query import QueryModel
from sparse_ingest.searching.run_search import explain_in_run, rank_run, search_run, why_empty_run

if TYPE_CHECKING:
    from sparse_ingest.cluster.client import Client, ConnectionLike
    from sparse_ingest.cluster.indexes import Index
    from sparse_ingest.cluster.search_bodies import Engine
    from sparse_ingest.records import Query

MAP_AGE_S = 60.0
_NO_WEIGHTS = "The query has no weights."


class SearchableRun(Run):
    """A run that can be searched with its own model, or with the one that `pipeline` names."""

    def __init__(
        self,
        run: Run,
        given: Pipeline = Pipeline(),  # noqa: B008 - frozen
        *,
        force: bool = False,
        reporter: Reporter = SILENT,
    ) -> None:
        super().__init__(run.path, run.manifest)
        self._given, self._force, self._reporter = given, force, reporter

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
            RunError: the model differs from the run's.
        """
        chosen = self._options(options_from(SearchOptions, options, settings, "search"))
        weights = self.query_weights(query) if isinstance(query, str) else query
        hits = search_run(self, weights, size=chosen.k, stored=chosen.stored, collapse=chosen.collapse)
        if not hits and self._reporter is not SILENT:
            _note(self._reporter, self.why_empty(query))
        return hits

    def why_empty(self, query: str | QueryWeights, options: SearchOptions | None = None) -> list[str]:
        """Return why a search of the run finds nothing; `options` have no influence."""
        weights = self.query_weights(query) if isinstance(query, str) else query
        if not weights:
            return [self._model.why_unweighted(query)] if isinstance(query, str) else [_NO_WEIGHTS]
        return why_empty_run(self, weights)

    def rank(
        self, queries: Iterable[Query], options: SearchOptions | None = None, **settings: object
    ) -> Iterator[Ranked]:
        """Yield the ranking of each query, in order. The run is read once per 4,096 queries."""
        chosen = self._options(options_from(SearchOptions, options, settings, "rank"))
        return rank_run(self, self._model.many(queries), size=chosen.k, stored=chosen.stored)

    def explain(
        self, query: str | QueryWeights, doc_id: str, options: SearchOptions | None = None, **settings: object
    ) -> Explanation:
        """Return the rank and the score of one document, and why it is not among the first k hits.

        Args:
            query: A text, or weights by token string.
            doc_id: The document.
            options: All options in one object, instead of single keywords.
            **settings: Fields of `SearchOptions`, such as `k=10`.

        Raises:
            UsageError: an option needs a server.
            RunError: the model differs from the run's.
        """
        chosen = _for_one(self._options(options_from(SearchOptions, options, settings, "explain")))
        weights = self.query_weights(query) if isinstance(query, str) else query
        return explain_in_run(self, weights, doc_id, size=chosen.k, stored=chosen.stored)

    def show(self, *doc_ids: str, query: str | QueryWeights | None = None) -> list[DocumentTerms]:
        """Return the terms of documents, heaviest first, with the contributions of a query if one is given.

        Args:
            *doc_ids: The documents. Only ids are read to find them, then a row group for each.
            query: A text, or weights by token string.

        Raises:
            RunError: the finished shards lack a document, or the model of the query differs from the run's.
        """
        weights = self.query_weights(query) if isinstance(query, str) else query
        model = remembered_model(self._given.model, self.manifest.model)
        return terms_in_run(self, doc_ids, TermReader(self.vocabulary(), model, weights))

    def _options(self, options: SearchOptions) -> SearchOptions:
        """Refuse options that would have no effect on a run."""
        why = "needs a server, and a run is searched exactly without one"
        refuse_options(options, ("filter", "allow_partial"), why)
        refuse_hybrid(self._given.query, options, why)
        return options


class SearchableIndex:
    """An index with the model, field and settings of its `_meta`. Thread-safe."""

    def __init__(
        self, client: Client, name: str, index: Index, pipeline: Pipeline, reporter: Reporter = SILENT
    ) -> None:
        self.client, self.name, self.index, self.pipeline = client, name, index, pipeline
        self._engine = engine_of_index(pipeline, index, client.dialect.product)
        self._read_at, self._reporter = time.monotonic(), reporter
        self._model = QueryModel(pipeline)

    @property
    def engine(self) -> Engine:
        """The engine of the index. Its token map is read again every MAP_AGE_S, because later loads append tokens."""
        if self._engine.mapped and time.monotonic() - self._read_at >= MAP_AGE_S:
            from sparse_ingest.cluster.indexes import find_index

            there, self._read_at = find_index(self.client, self._engine.mapped), time.monotonic()
            if there and there.stamp and self.index.stamp and there.stamp.token_map != self.index.stamp.token_map:
                self.index = there
                self._engine = engine_of_index(self.pipeline, there, self.client.dialect.product)
        return self._engine

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
            **settings: Fields of `SearchOptions`, such as `k=10`, `hybrid=True` or `filter={"term": {"lang": "en"}}`.

        Raises:
            UsageError: options or weights do not fit, or the index does not map a field of `filter` or `collapse`.
            ClusterError: the server cannot answer.
        """
        from sparse_ingest.searching.index_search import search_hybrid, search_index

        chosen = _for_index(options_from(SearchOptions, options, settings, "search"))
        weights = self.query_weights(query) if isinstance(query, str) else query
        engine, client = self.engine_for(chosen), self.client.allowing(chosen.allow_partial)
        how: Any = {"size": chosen.k, "engine": engine, "filter": chosen.filter, "collapse": chosen.collapse}
        if not engine.hybrid:
            hits = search_index(client, self.name, weights, **how)
        elif isinstance(query, str):
            hits = search_hybrid(client, self.name, query, weights, **how)
        else:
            raise UsageError("A hybrid search needs the text of the query, for BM25. Pass it, or hybrid=False.")
        if not hits and self._reporter is not SILENT:
            _note(self._reporter, self.why_empty(query, chosen))
        return hits

    def engine_for(self, options: HybridSettings) -> Engine:
        """Return the engine of a search: hybrid if the options say so, or otherwise [query].

        Raises:
            UsageError: settings of a hybrid search have no effect, or cannot be combined.
        """
        return replace(self.engine, hybrid=hybrid_settings(self.pipeline.query, options))

    def why_empty(self, query: str | QueryWeights, options: SearchOptions | None = None) -> list[str]:
        """Return why a search of the index finds nothing, as far as the server and the vocabulary show it."""
        from sparse_ingest.searching.empty import why_empty_index

        chosen = options or SearchOptions()
        engine, text = self.engine_for(chosen), query if isinstance(query, str) else ""
        weights = self.query_weights(query) if isinstance(query, str) else query
        unweighted = [] if weights else [self._model.why_unweighted(text) if text else _NO_WEIGHTS]
        if unweighted and not engine.hybrid:
            return unweighted
        try:
            return unweighted + why_empty_index(self.client, self.name, weights, engine, text, chosen.filter)
        except ClusterError as error:  # such as a timeout, which --allow-partial accepts in a search
            return [*unweighted, f"The cause is unknown: {error}"]

    def rank(
        self, queries: Iterable[Query], options: SearchOptions | None = None, **settings: object
    ) -> Iterator[Ranked]:
        """Yield the ranking of each query, in order, without documents and explanations."""
        from sparse_ingest.searching.index_search import rank_index

        chosen = _for_index(options_from(SearchOptions, options, settings, "rank"))
        engine, client = self.engine_for(chosen), self.client.allowing(chosen.allow_partial)
        how: dict[str, Any] = {"size": chosen.k, "filter": chosen.filter, "collapse": chosen.collapse}
        queries, same = tee(queries)
        texts, weights = (query.text for query in same), self._model.many(queries)
        return rank_index(client, self.name, weights, engine, concurrency=chosen.concurrency, texts=texts, **how)

    def explain(
        self, query: str | QueryWeights, doc_id: str, options: SearchOptions | None = None, **settings: object
    ) -> Explanation:
        """Return the rank and the score of one document, and why it is not among the first k hits.

        Args:
            query: A text, or weights by token string.
            doc_id: The document.
            options: All options in one object, instead of single keywords.
            **settings: Fields of `SearchOptions`, such as `k=10` or `filter={"term": {"lang": "en"}}`.

        Raises:
            UsageError: options or weights do not fit, or the index does not map a field of `filter`.
            ClusterError: the server cannot answer.
        """
        from sparse_ingest.cluster.postings import PAGE
        from sparse_ingest.searching.explaining import explain_in_index

        chosen = _for_one(_for_index(options_from(SearchOptions, options, settings, "explain")))
        weights = self.query_weights(query) if isinstance(query, str) else query
        client, window = self.client.allowing(chosen.allow_partial), self.index.setting("max_result_window")
        how: dict[str, Any] = {"size": chosen.k, "engine": self.engine, "filter": chosen.filter}
        return explain_in_index(client, self.name, weights, doc_id, window=int(window or PAGE), **how)

    def show(self, *doc_ids: str, query: str | QueryWeights | None = None) -> list[DocumentTerms]:
        """Return the terms of documents with the weights that the index stores, and the contributions of a query.

        Args:
            *doc_ids: The documents. The complete vocabulary is requested for each, in about 30 searches.
            query: A text, or weights by token string.

        Raises:
            ClusterError: the index lacks a document, or the server cannot return weights.
        """
        weights = self.query_weights(query) if isinstance(query, str) else query
        vocabulary = self.vocabulary()
        reader = TermReader(vocabulary, self.pipeline.model, weights)
        return terms_in_index(self.client, self.index, self.engine, doc_ids, vocabulary, reader)

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
    progress: Reporter | bool = False,
) -> SearchableRun:
    """Open a run folder, for reading and for searching it.

    Args:
        path: The run folder, or an address such as s3://bucket/prefix.
        model: The model of the queries; by default the model of the run.
        pipeline: A pipeline whose [query] settings apply; may replace `model`.
        force: Search with another model than the run's.
        progress: True, or a `Reporter`, for a note on why a search finds nothing.

    Raises:
        RunError: the run does not exist, is damaged, or has a newer format than this release.
    """
    return SearchableRun(
        open_run_folder(path), pipeline_of(model, pipeline), force=force, reporter=reporter_of(progress)
    )


def open_index(
    name: str,
    *,
    url: str | None = None,
    connection: ConnectionLike | None = None,
    model: str | ModelSettings | None = None,
    pipeline: Pipeline | str | None = None,
    force: bool = False,
    progress: Reporter | bool = False,
) -> SearchableIndex:
    """Open an index or alias for searching it; model, field and query settings come from its `_meta`.

    Args:
        name: An index, or an alias of one.
        url: Where the cluster is; by default the SPARSE_INGEST_* variables name it.
        connection: A `Connection` or an `opensearchpy.OpenSearch`, instead of `url`.
        model: The model of the queries, where `_meta` names none.
        pipeline: A pipeline whose [query] and [index] settings apply, instead of `_meta`; may replace `model`.
        force: Allow a model that differs from the one in `_meta`.
        progress: True, or a `Reporter`, for a note on why a search finds nothing, which takes a few more requests.

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
        pipeline = pipeline_of_index(given, index, name, force=force)
        opened = SearchableIndex(client, name, index, pipeline, reporter_of(progress))
        stack.pop_all()
        return opened


def _note(reporter: Reporter, messages: Iterable[str]) -> None:
    for message in messages:
        reporter.note(message)


def _for_one(options: SearchOptions) -> SearchOptions:
    """Refuse options that would have no effect on the explanation of one document."""
    refuse_options(options, ("collapse", "hybrid"), "cannot be combined with the explanation of one document")
    return options


def _for_index(options: SearchOptions) -> SearchOptions:
    """Refuse options that would have no effect on an index."""
    refuse_options(options, ("stored",), "is for a run: an index always uses the weights that it stores")
    return options
