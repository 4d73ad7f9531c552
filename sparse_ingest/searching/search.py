"""`open_run` and `open_index`: open a run folder or an index with its own model and settings, and search it.

`search` is for one text, `rank` for many queries. A run is searched exactly, without a server.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import tee
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from sparse_ingest.errors import ClusterError, UsageError
from sparse_ingest.pipeline import (
    EngineName,
    HybridSettings,
    ModelSettings,
    Pipeline,
    options_from,
    pipeline_of,
    refuse_options,
)
from sparse_ingest.queries.weight_table import QueryWeights
from sparse_ingest.reporting import SILENT, Reporter, reporter_of
from sparse_ingest.runs.run import RunLike
from sparse_ingest.runs.run import open_run as open_run_folder
from sparse_ingest.searching.document_terms import DocumentTerms, TermReader, terms_in_index
from sparse_ingest.searching.hits import Explanation, Hit, Ranked
from sparse_ingest.searching.options import SearchOptions, for_one_document
from sparse_ingest.searching.pipelines import (
    document_vocabulary,
    engine_of_index,
    has_words,
    hybrid_settings,
    pipeline_of_index,
)
from sparse_ingest.searching.query import QueryModel, weights_of
from sparse_ingest.searching.searchable_run import NO_WEIGHTS
from sparse_ingest.searching.searchable_run import SearchableRun as SearchableRun

if TYPE_CHECKING:
    from sparse_ingest.cluster.client import Client, ConnectionLike
    from sparse_ingest.cluster.indexes import Index
    from sparse_ingest.cluster.search_bodies import Engine
    from sparse_ingest.records import Query
    from sparse_ingest.searching.batches import BatchedEncoder

MAP_AGE_S = 60.0


class _Given(NamedTuple):
    """The arguments of `open_index`, and whether a service looks for changes of the index."""

    pipeline: Pipeline
    force: bool = False
    reporter: Reporter = SILENT
    served: bool = False


class SearchableIndex:
    """An index with the model, field and settings of its `_meta`. Thread-safe.

    Attributes:
        has_words: Whether terms are tokens; False for an autoencoder, whose terms are the numbers of features.
    """

    def __init__(
        self,
        client: Client,
        name: str,
        index: Index,
        pipeline: Pipeline,
        given: _Given | None = None,
        encoder: BatchedEncoder | None = None,
    ) -> None:
        self.client, self.name, self.index, self.pipeline = client, name, index, pipeline
        self._engine = engine_of_index(pipeline, index, client.dialect.product)
        self._read_at, self.model = time.monotonic(), QueryModel(pipeline, encoder)
        self._given = given or _Given(pipeline)
        stamp = index.stamp
        self.has_words = has_words(stamp.model if stamp else {})

    @property
    def engine(self) -> Engine:
        """The engine of the index. Its token map is read again every MAP_AGE_S, because later loads append tokens."""
        if self._engine.mapped and not self._given.served and time.monotonic() - self._read_at >= MAP_AGE_S:
            from sparse_ingest.cluster.indexes import find_index

            there, self._read_at = find_index(self.client, self._engine.mapped), time.monotonic()
            if there and there.stamp and self.index.stamp and there.stamp.token_map != self.index.stamp.token_map:
                self.index = there
                self._engine = engine_of_index(self.pipeline, there, self.client.dialect.product)
        return self._engine

    def query_weights(self, text: str) -> QueryWeights:
        """Return the weights of a query by token string, heaviest first."""
        return self.model.weights(text)

    def vocabulary(self) -> list[str | None]:
        """Return the token string of each id of the document side."""
        return document_vocabulary(self.pipeline.model)

    def search(
        self, query: str | Mapping[str, float], options: SearchOptions | None = None, **settings: object
    ) -> list[Hit]:
        """Search the index, and explain the score of each hit.

        Args:
            query: A text, or weights by token string.
            options: All options in one object, instead of single keywords.
            **settings: Fields of `SearchOptions`, such as `k=10`, `hybrid=True` or `filter={"term": {"lang": "en"}}`.

        Raises:
            UsageError: options or weights do not fit, or the index does not map a field of `filter` or `collapse`.
            ClusterError: the server cannot answer.
        """
        chosen = _for_index(options_from(SearchOptions, options, settings, "search"))
        text = query if isinstance(query, str) else None
        hits = self.search_weighted(text, weights_of(query, self.query_weights), chosen)
        if not hits and self._given.reporter is not SILENT:
            for message in self.why_empty(query, chosen):
                self._given.reporter.note(message)
        return hits

    def search_weighted(
        self, text: str | None, weights: QueryWeights, options: SearchOptions, *, explain: bool = True
    ) -> list[Hit]:
        """Search for a text whose weights are known; see `search`. Only a hybrid search needs the text.

        Without `explain`, hits have no terms, and the server does less work.
        """
        from sparse_ingest.searching.index_search import search_hybrid, search_index

        options = _for_index(options)
        engine, client = self.engine_for(options), self.client.allowing(options.allow_partial)
        how: Any = {"size": options.k, "engine": engine, "filter": options.filter, "collapse": options.collapse}
        if not engine.hybrid:
            return search_index(client, self.name, weights, explain=explain, **how)
        if text is None:
            raise UsageError("A hybrid search needs the text of the query, for BM25. Pass it, or hybrid=False.")
        return search_hybrid(client, self.name, text, weights, **how)

    @property
    def engines(self) -> list[EngineName]:
        """The engines that can search this field in this cluster."""
        from sparse_ingest.cluster.engines import engines_of

        return engines_of(self.engine.kind, self.client.dialect.product)

    def with_engine(self, name: EngineName) -> SearchableIndex:
        """Return this index with another engine, and the same encoder of queries. Raise `PipelineError`."""
        pipeline = replace(self.pipeline, query=replace(self.pipeline.query, engine=name))
        return SearchableIndex(self.client, self.name, self.index, pipeline, self._given, self.model.encoder)

    def served(self, time_limit_s: float) -> SearchableIndex:
        """Return this index for a service, whose requests end after `time_limit_s`.

        Only `current` looks for changes, also of the token map.
        """
        limited = copy.copy(self)
        limited.client, limited._given = self.client.within(time_limit_s), self._given._replace(served=True)
        return limited

    def current(self) -> SearchableIndex:
        """Return this object, or a new one if another index has the name now, or the mapping has changed.

        Raises:
            ClusterError: the cluster does not answer or has no such index, or its model is not the given one.
        """
        index = _need_index(self.client, self.name, self._given.force)
        if (index.uuid, index.mappings) == (self.index.uuid, self.index.mappings):
            return self
        pipeline = pipeline_of_index(self._given.pipeline, index, self.name, force=self._given.force)
        same = pipeline.model == self.pipeline.model and _model_of(index) == _model_of(self.index)
        encoder = self.model.encoder if same else None
        return SearchableIndex(self.client, self.name, index, pipeline, self._given, encoder)

    def engine_for(self, options: HybridSettings) -> Engine:
        """Return the engine of a search: hybrid if the options say so, or otherwise [query].

        Raises:
            UsageError: settings of a hybrid search have no effect, or cannot be combined.
        """
        return replace(self.engine, hybrid=hybrid_settings(self.pipeline.query, options))

    def why_empty(self, query: str | Mapping[str, float], options: SearchOptions | None = None) -> list[str]:
        """Return why a search of the index finds nothing, as far as the server and the vocabulary show it."""
        from sparse_ingest.searching.empty import why_empty_index

        chosen = options or SearchOptions()
        engine, text = self.engine_for(chosen), query if isinstance(query, str) else ""
        weights = weights_of(query, self.query_weights)
        unweighted = [] if weights else [self.model.why_unweighted(text) if text else NO_WEIGHTS]
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
        texts, weights = (query.text for query in same), self.model.many(queries)
        return rank_index(client, self.name, weights, engine, concurrency=chosen.concurrency, texts=texts, **how)

    def explain(
        self, query: str | Mapping[str, float], doc_id: str, options: SearchOptions | None = None, **settings: object
    ) -> Explanation:
        """Return the rank and the score of one document, and why it is not among the first k hits.

        Arguments and errors are as for `search`, with the id of the document.
        """
        from sparse_ingest.cluster.postings import PAGE
        from sparse_ingest.searching.explaining import explain_in_index

        chosen = for_one_document(_for_index(options_from(SearchOptions, options, settings, "explain")), doc_id)
        weights = weights_of(query, self.query_weights)
        client, window = self.client.allowing(chosen.allow_partial), self.index.setting("max_result_window")
        how: dict[str, Any] = {"size": chosen.k, "engine": self.engine, "filter": chosen.filter}
        return explain_in_index(client, self.name, weights, doc_id, window=int(window or PAGE), **how)

    def show(self, *doc_ids: str, query: str | Mapping[str, float] | None = None) -> list[DocumentTerms]:
        """Return the terms of documents with the weights that the index stores, and the contributions of a query.

        Args:
            *doc_ids: The documents. The complete vocabulary is requested for each, in about 30 searches.
            query: A text, or weights by token string.

        Raises:
            ClusterError: the index lacks a document, or the server cannot return weights.
        """
        weights = None if query is None else weights_of(query, self.query_weights)
        vocabulary = self.vocabulary()
        reader = TermReader(vocabulary, self.pipeline.model, weights)
        return terms_in_index(self.client, self.index, self.engine, doc_ids, vocabulary, reader)

    def __repr__(self) -> str:
        return f"<SearchableIndex {self.name!r} at {self.client.address}>"

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
    model: str | Path | ModelSettings | None = None,
    pipeline: Pipeline | str | Path | None = None,
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
    model: str | Path | ModelSettings | None = None,
    pipeline: Pipeline | str | Path | None = None,
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

    given, client = pipeline_of(model, pipeline), connect(connection, url=url)
    with contextlib.ExitStack() as stack:
        stack.enter_context(client)
        index = _need_index(client, name, force)
        pipeline = pipeline_of_index(given, index, name, force=force)
        opened = SearchableIndex(client, name, index, pipeline, _Given(given, force, reporter_of(progress)))
        stack.pop_all()
        return opened


def _need_index(client: Client, name: str, force: bool) -> Index:
    from sparse_ingest.cluster.indexes import need_index, refuse_other_vectors

    index = need_index(client, name, "Create it with `sparse-ingest load`.")
    if not force:
        refuse_other_vectors(index, name)
    return index


def _model_of(index: Index) -> object:
    return index.stamp.model if index.stamp else None


def _for_index(options: SearchOptions) -> SearchOptions:
    """Refuse options that would have no effect on an index."""
    refuse_options(options, ("stored",), "is for a run: an index always uses the weights that it stores")
    return options
