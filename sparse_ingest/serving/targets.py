"""What is served: an index with one of its engines, or a run folder.

In: checked values of a request. Out: the JSON of the commands `search`, `show` and `query`. Everything here blocks, and
is called from several threads.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple

from sparse_ingest.errors import ClusterError, SparseIngestError, UsageError
from sparse_ingest.pipeline import QuerySettings
from sparse_ingest.queries.weight_table import QueryWeights
from sparse_ingest.runs.shards import read_doc_ids
from sparse_ingest.searching.bodies import body_of
from sparse_ingest.searching.hits import Explanation, Hit
from sparse_ingest.searching.kept_run import MOST_BYTES, KeptRun
from sparse_ingest.searching.options import SearchOptions
from sparse_ingest.searching.pipelines import engine_of, hybrid_settings, refuse_hybrid
from sparse_ingest.searching.search import SearchableIndex, SearchableRun

if TYPE_CHECKING:
    from sparse_ingest.searching.query import QueryModel

logger = logging.getLogger(__name__)
BM25 = "bm25"
WARM = "warm"
_LOOK_S = 1.0  # between looks at the UUID and the mapping of an index


class Ask(NamedTuple):
    """A query: its text, the engine (None: that of the target), the options, and whether hits need their terms."""

    text: str
    engine: str | None
    options: SearchOptions
    terms: bool = True


class RunTarget:
    """A run folder, searched exactly."""

    kind = "run"
    product = None
    address = ""
    engine = "exact"
    engines = ("exact",)

    def __init__(self, run: SearchableRun) -> None:
        self.run, self.name = run, str(run.path)
        self._kept: KeptRun | None = None

    @property
    def model(self) -> QueryModel:
        """The model of the queries."""
        return self.run.model

    known_model = model

    @property
    def has_words(self) -> bool:
        """Whether terms are tokens."""
        return self.run.has_words

    @property
    def has_windows(self) -> bool:
        """Whether long documents were encoded in windows."""
        return self.run.manifest.identity.get("overflow") == "windows"

    def warm(self) -> None:
        """Build the query model, and read the run into memory if it fits."""
        self.run.checked(SearchOptions())  # settings of the pipeline that have no effect on a run
        self.model.encoder.encode_one(WARM)
        if self.run.complete() is None:
            logger.warning("%s is incomplete: the shards that are finished now are searched.", self.run.path)
        self._kept = KeptRun.read(self.run)
        if self._kept is None:
            logger.warning(
                "%s needs more than %d MB of memory, so its shards are read for every search. Load it into an "
                "index for many searches.", self.run.path, MOST_BYTES >> 20,
            )  # fmt: skip

    def close(self) -> None:
        """Do nothing: a run has no connection."""

    def documents(self) -> int:
        """Return the number of documents."""
        return int(self.run.totals()["rows"])

    def any_id(self) -> str | None:
        """Return the id of a document; None if there is none."""
        shards = self.run.done_shards()
        return next(read_doc_ids(self.run.shard_path(shards[0])), (0, None))[1] if shards else None

    def fields(self) -> dict[str, str]:
        """Return no field: a run cannot be filtered."""
        return {}

    def opened(self, engine: str | None, *, look: bool = False) -> SearchableRun:
        """Return the run. Raise `UsageError` for another engine than the exact one."""
        if engine not in (None, "exact"):
            raise UsageError(f"A run folder has no engine {engine!r}: it is searched exactly. Omit engine.")
        return self.run

    def search(self, ask: Ask, weights: QueryWeights) -> list[Hit]:
        """Return the hits of a query with these weights."""
        run, chosen = self.opened(ask.engine), self.run.checked(ask.options)
        if self._kept is None or chosen.stored or chosen.collapse:
            return run.search(weights, chosen)
        return self._kept.search(weights, chosen.k)

    def is_of_words(self, ask: Ask) -> bool:
        """Return False: a run has no BM25."""
        return False

    def why_empty(self, ask: Ask) -> list[str]:
        """Return why a search finds nothing."""
        return self.run.why_empty(ask.text, ask.options)

    def explain(self, ask: Ask, weights: QueryWeights, doc_id: str) -> Explanation:
        """Return the rank of one document, and why it is not a hit."""
        return self.opened(ask.engine).explain(weights, doc_id, ask.options)

    def body(self, ask: Ask, weights: QueryWeights) -> dict[str, Any]:
        """Return the request body that searches an index of this run."""
        self.opened(ask.engine)
        pipeline = self.run.pipeline
        engine = replace(engine_of(pipeline), hybrid=hybrid_settings(pipeline.query, ask.options))
        return body_of(ask.text, weights, engine, ask.options, {})[0]


class LiveIndex:
    """An index or alias that may change while it is served.

    It is read again at most once a second. If another index has the name, or the mapping has changed, it is reloaded
    with its own model and settings.
    """

    def __init__(self, index: SearchableIndex) -> None:
        self._opened: dict[str | None, SearchableIndex] = {None: index}  # by engine; None: its own
        self._looking, self._looked_at = Lock(), time.monotonic()
        self._refused: SparseIngestError | None = None  # why the index could not be used at the last lookup

    @property
    def last(self) -> SearchableIndex:
        """The index as it was at the last look."""
        return self._opened[None]

    def current(self, engine: str | None = None, *, look: bool = False) -> SearchableIndex:
        """Return the index as it is now, with this engine; None and BM25: with its own. `look`: look now.

        Raises:
            UsageError: the index has no such engine.
            ClusterError: the cluster does not answer, or has no such index.
        """
        # One thread looks; the others need not wait for a cluster that may be down.
        due = look or time.monotonic() - self._looked_at > _LOOK_S
        if due and self._looking.acquire(blocking=look):
            try:
                self._look()
            finally:
                self._looking.release()
        if refused := self._refused:
            raise refused.with_traceback(None)  # otherwise each request adds its frames
        opened = self._opened
        index = opened[None]
        if engine in (None, BM25, index.engine.name):
            return index
        if engine not in index.engines:
            known = ", ".join((*index.engines, BM25))
            raise UsageError(f"Index {index.name!r} has no engine {engine!r}; it has {known}.")
        if engine not in opened:
            opened[engine] = index.with_engine(engine)
        return opened[engine]

    def _look(self) -> None:
        from sparse_ingest.cluster.client import ResponseError, UnreachableError

        self._looked_at = time.monotonic()
        try:
            if (index := self.last.current()) is not self.last:
                self._opened = {None: index}
            self._refused = None
        except (ResponseError, UnreachableError) as error:  # the cluster may answer the next request
            if self._refused:
                self._refused = error
            raise
        except UsageError as error:  # such as an alias of several indexes: not the client's fault
            self._refused = ClusterError(str(error))
        except SparseIngestError as error:
            self._refused = error


class IndexTarget:
    """An index or alias with an engine; None: its own."""

    kind = "index"
    has_windows = False

    def __init__(self, live: LiveIndex, name: str, engine: str | None = None) -> None:
        self.live, self.name, self._engine = live, name, engine

    @property
    def model(self) -> QueryModel:
        """The model of the queries."""
        return self.live.current().model

    @property
    def has_words(self) -> bool:
        """Whether terms are tokens."""
        return self.live.last.has_words

    @property
    def known_model(self) -> QueryModel:
        """The model of the queries at the last request, for metrics: no request is sent."""
        return self.live.last.model

    def warm(self) -> None:
        """Build the query model."""
        self.model.encoder.encode_one(WARM)

    def close(self) -> None:
        """End the requests that are still running."""
        self.live.last.client.waiting.end()

    @property
    def address(self) -> str:
        """The address of the cluster, which clients of the service need not know."""
        return self.live.last.client.address

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

    def any_id(self) -> str | None:
        """Return the id of a document; None if there is none."""
        from sparse_ingest.cluster.answers import Found
        from sparse_ingest.cluster.client import path_of

        index = self.live.current()
        answer = index.client.search(path_of(index.name), {"size": 1, "_source": False}, expected=Found)
        return next((str(hit["_id"]) for hit in answer["hits"]["hits"]), None)

    def fields(self) -> dict[str, str]:
        """Return the types of the fields that a filter may name."""
        from sparse_ingest.cluster.dialects import kind_of
        from sparse_ingest.cluster.mappings import leaves

        mapped = leaves(self.live.current().index.mappings)
        return {name: str(entry.get("type", "object")) for name, entry in mapped if not kind_of(entry)}

    def opened(self, engine: str | None, *, look: bool = False) -> SearchableIndex:
        """Return the index with this engine, by default that of the target; see `LiveIndex.current`."""
        return self.live.current(engine or self._engine, look=look)

    def search(self, ask: Ask, weights: QueryWeights) -> list[Hit]:
        """Return the hits of a query with these weights."""
        from sparse_ingest.searching.index_search import search_words

        index, chosen = self.opened(ask.engine), ask.options
        if not self.is_of_words(ask):
            return index.search_weighted(ask.text, weights, chosen, explain=ask.terms)
        client, how = index.client.allowing(chosen.allow_partial), _of_words(index, chosen)
        return search_words(client, index.name, ask.text, known=index.index.mappings, **how)

    def why_empty(self, ask: Ask) -> list[str]:
        """Return why a search finds nothing, as far as the server and the vocabulary show it."""
        if not self.is_of_words(ask):
            return self.opened(ask.engine).why_empty(ask.text, ask.options)
        filtered = " of the documents that the filter matches" if ask.options.filter else ""
        return [f"BM25 finds no word of the query in titles and texts{filtered}."]

    def explain(self, ask: Ask, weights: QueryWeights, doc_id: str) -> Explanation:
        """Return the rank of one document, and why it is not a hit. Raise `UsageError` for BM25."""
        if self.is_of_words(ask):
            raise UsageError("BM25 has no terms to explain a rank with. Pass another target or engine.")
        return self.opened(ask.engine).explain(weights, doc_id, ask.options)

    def is_of_words(self, ask: Ask) -> bool:
        """Whether a search is BM25 on title and text."""
        return (ask.engine or self._engine) == BM25

    def body(self, ask: Ask, weights: QueryWeights) -> dict[str, Any]:
        """Return the request body that searches the index."""
        from sparse_ingest.cluster.hybrid_bodies import bm25_body

        index = self.opened(ask.engine)
        if self.is_of_words(ask):
            return bm25_body(ask.text, **_of_words(index, ask.options))
        return body_of(ask.text, weights, index.engine_for(ask.options), ask.options, {})[0]


def _of_words(index: SearchableIndex, options: SearchOptions) -> dict[str, Any]:
    """Return the arguments of a BM25 search. Raise `UsageError` for options of a hybrid one."""
    refuse_hybrid(QuerySettings(), options, "has no effect with the engine bm25")
    return {"field": index.engine.field, "size": options.k, "filter": options.filter, "collapse": options.collapse}


Target = RunTarget | IndexTarget


def targets_of(
    first: SearchableIndex | SearchableRun, other: SearchableIndex | SearchableRun | str | None, time_limit_s: float
) -> list[Target]:
    """Return the served targets: the first one, and that of a comparison, which may be an engine of the first.

    Requests to a cluster end after `time_limit_s`. Targets with the same model share its encoder.

    Raises:
        UsageError: the first target has no such engine.
    """
    targets = [_target_of(first, time_limit_s)]
    if isinstance(other, str):
        if not isinstance(targets[0], IndexTarget):
            raise UsageError(f"{other!r} is an engine of an index, but a run is served. Compare it with another run.")
        targets[0].opened(other)
        targets.append(IndexTarget(targets[0].live, other, other))
    elif other is not None:
        targets.append(_target_of(other, time_limit_s))
    first_model, last_model = targets[0].known_model, targets[-1].known_model
    if first_model.pipeline.model == last_model.pipeline.model:
        last_model.encoder = first_model.encoder
    if len({target.name for target in targets}) < len(targets):
        raise UsageError(f"{targets[0].name!r} is compared with itself. Name another one, or an engine.")
    return targets


def _target_of(opened: SearchableIndex | SearchableRun, time_limit_s: float) -> Target:
    if isinstance(opened, SearchableRun):
        return RunTarget(opened)
    return IndexTarget(LiveIndex(opened.served(time_limit_s)), opened.name)
