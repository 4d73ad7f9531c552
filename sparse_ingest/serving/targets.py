"""What is served: an index with one of its engines, or a run folder.

In: checked values of a request. Out: the JSON of the commands `search`, `show` and `query`. Everything here blocks, and
is called from several threads.
"""

from __future__ import annotations

import time
from dataclasses import replace
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple

from sparse_ingest.errors import UsageError
from sparse_ingest.pipeline import QuerySettings
from sparse_ingest.queries.weight_table import QueryWeights, prune_query
from sparse_ingest.searching.bodies import body_of
from sparse_ingest.searching.hits import Hit
from sparse_ingest.searching.options import SearchOptions
from sparse_ingest.searching.pipelines import engine_of, hybrid_settings, refuse_hybrid
from sparse_ingest.searching.search import SearchableIndex, SearchableRun

if TYPE_CHECKING:
    from sparse_ingest.searching.query import QueryModel

BM25 = "bm25"
_CHECK_S = 1.0  # between looks at the UUID of an index


class Ask(NamedTuple):
    """A query: its text, the engine (None: that of the target), and the options of the search."""

    text: str
    engine: str | None
    options: SearchOptions


class RunTarget:
    """A run folder, searched exactly."""

    kind = "run"
    product = None
    engine = "exact"
    engines = ("exact",)

    def __init__(self, run: SearchableRun) -> None:
        self.run, self.name = run, str(run.path)

    @property
    def model(self) -> QueryModel:
        """The model of the queries."""
        return self.run.model

    def documents(self) -> int:
        """Return the number of documents."""
        return int(self.run.totals()["rows"])

    def fields(self) -> dict[str, str]:
        """Return no field: a run cannot be filtered."""
        return {}

    def opened(self, engine: str | None) -> SearchableRun:
        """Return the run. Raise `UsageError` for another engine than the exact one."""
        if engine not in (None, "exact"):
            raise UsageError(f"A run folder has no engine {engine!r}: it is searched exactly. Omit engine.")
        return self.run

    def search(self, ask: Ask, weights: QueryWeights) -> list[Hit]:
        """Return the hits of a query with these weights."""
        return self.opened(ask.engine).search(weights, ask.options)

    def body(self, ask: Ask, weights: QueryWeights) -> dict[str, Any]:
        """Return the request body that searches an index of this run."""
        self.opened(ask.engine)
        pipeline = self.run.pipeline
        engine = replace(engine_of(pipeline), hybrid=hybrid_settings(pipeline.query, ask.options))
        return body_of(ask.text, weights, engine, ask.options, {})[0]


class LiveIndex:
    """An index or alias that may change while it is served.

    It is read again at most once a second. If another index has the name, or the mapping has changed, it is opened
    again, with its own model and settings.
    """

    def __init__(self, index: SearchableIndex) -> None:
        self._index = index
        self._with_engines: dict[str, SearchableIndex] = {}
        self._lock, self._checked_at = Lock(), time.monotonic()

    def current(self, engine: str | None = None) -> SearchableIndex:
        """Return the index as it is now, with this engine; None and BM25: with its own.

        Raises:
            UsageError: the index has no such engine.
            ClusterError: the cluster does not answer, or has no such index.
        """
        with self._lock:
            if time.monotonic() - self._checked_at > _CHECK_S:
                self._look_again()
            index = self._index
            if engine in (None, BM25, index.engine.name):
                return index
            if engine not in index.engines:
                known = ", ".join((*index.engines, BM25))
                raise UsageError(f"Index {index.name!r} has no engine {engine!r}; it has {known}.")
            if engine not in self._with_engines:
                self._with_engines[engine] = index.with_engine(engine)
            return self._with_engines[engine]

    def _look_again(self) -> None:
        index = self._index.current()
        if index is not self._index:
            self._index, self._with_engines = index, {}
        self._checked_at = time.monotonic()


class IndexTarget:
    """An index or alias with an engine; None: its own."""

    kind = "index"

    def __init__(self, live: LiveIndex, name: str, engine: str | None = None) -> None:
        self.live, self.name, self._engine = live, name, engine

    @property
    def model(self) -> QueryModel:
        """The model of the queries."""
        return self.live.current().model

    @property
    def product(self) -> str:
        """The product of the cluster."""
        return self.live.current().client.dialect.product

    @property
    def engine(self) -> str:
        """The engine of requests that name none."""
        return self._engine or self.live.current().engine.name

    @property
    def engines(self) -> tuple[str, ...]:
        """The engines that requests may name."""
        return (*self.live.current().engines, BM25)

    def documents(self) -> int:
        """Return the number of documents."""
        from sparse_ingest.cluster.client import path_of
        from sparse_ingest.cluster.indexes import count_matching

        index = self.live.current()
        return count_matching(index.client, path_of(index.name))

    def fields(self) -> dict[str, str]:
        """Return the types of the fields that a filter may name."""
        from sparse_ingest.cluster.dialects import kind_of
        from sparse_ingest.cluster.mappings import leaves

        mapped = leaves(self.live.current().index.mappings)
        return {name: str(entry.get("type", "object")) for name, entry in mapped if not kind_of(entry)}

    def opened(self, engine: str | None) -> SearchableIndex:
        """Return the index with this engine, by default that of the target; see `LiveIndex.current`."""
        return self.live.current(engine or self._engine)

    def search(self, ask: Ask, weights: QueryWeights) -> list[Hit]:
        """Return the hits of a query with these weights."""
        from sparse_ingest.searching.index_search import search_words

        index, chosen = self.opened(ask.engine), ask.options
        if (ask.engine or self._engine) != BM25:
            return index.search_weighted(ask.text, weights, chosen)
        client, how = index.client.allowing(chosen.allow_partial), _of_words(index, chosen)
        return search_words(client, index.name, ask.text, known=index.index.mappings, **how)

    def body(self, ask: Ask, weights: QueryWeights) -> dict[str, Any]:
        """Return the request body that searches the index."""
        from sparse_ingest.cluster.hybrid_bodies import bm25_body

        index = self.opened(ask.engine)
        if (ask.engine or self._engine) == BM25:
            return bm25_body(ask.text, **_of_words(index, ask.options))
        return body_of(ask.text, weights, index.engine_for(ask.options), ask.options, {})[0]


def _of_words(index: SearchableIndex, options: SearchOptions) -> dict[str, Any]:
    """Return the arguments of a BM25 search. Raise `UsageError` for options of a hybrid one."""
    refuse_hybrid(QuerySettings(), options, "has no effect with the engine bm25")
    return {"field": index.engine.field, "size": options.k, "filter": options.filter, "collapse": options.collapse}


Target = RunTarget | IndexTarget


def weights_of(target: Target, text: str) -> QueryWeights:
    """Return the weights of a query. Raise `UsageError` if there is no text."""
    if not text.strip():
        raise UsageError("The query is empty. Give some words.")
    model = target.model
    return prune_query(model.encoder.encode_one(text), model.pipeline.query)


def targets_of(
    first: SearchableIndex | SearchableRun, other: SearchableIndex | SearchableRun | str | None
) -> list[Target]:
    """Return the served targets: the first one, and that of a comparison, which may be an engine of the first.

    Raises:
        UsageError: the first target has no such engine.
    """
    targets = [_target_of(first)]
    if isinstance(other, str):
        if not isinstance(targets[0], IndexTarget):
            raise UsageError(f"{other!r} is an engine of an index, but a run is served. Compare it with another run.")
        targets[0].opened(other)
        targets.append(IndexTarget(targets[0].live, other, other))
    elif other is not None:
        targets.append(_target_of(other))
    if len({target.name for target in targets}) < len(targets):
        raise UsageError(f"{targets[0].name!r} is compared with itself. Name another one, or an engine.")
    return targets


def _target_of(opened: SearchableIndex | SearchableRun) -> Target:
    return RunTarget(opened) if isinstance(opened, SearchableRun) else IndexTarget(LiveIndex(opened), opened.name)
