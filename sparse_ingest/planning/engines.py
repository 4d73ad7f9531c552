"""Measure the engines of an index with several settings each, on the queries of a plan.

Settings take turns, a few queries at a time, so that a machine that slows down affects all of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from sparse_ingest.cluster.client import Client, ConnectionLike, path_of
from sparse_ingest.cluster.engines import ENGINES, engines_of
from sparse_ingest.cluster.hybrid_bodies import HYBRID_DEPTH
from sparse_ingest.cluster.search_bodies import Engine
from sparse_ingest.errors import ClusterError, UsageError
from sparse_ingest.pipeline import EngineName, IndexSettings, ModelSettings, Pipeline, QuerySettings
from sparse_ingest.planning.options import PlanOptions
from sparse_ingest.planning.sweep import PruningRule
from sparse_ingest.queries.weight_table import QueryWeights
from sparse_ingest.runs.run import Run
from sparse_ingest.searching.hits import Ranked
from sparse_ingest.searching.index_search import rank_index
from sparse_ingest.searching.pipelines import hybrid_settings
from sparse_ingest.searching.search import open_index

SIZE = 10
_TURN = 20  # queries of one setting before the next setting
# Values to try for each parameter of an engine.
_TRIED: dict[EngineName, dict[str, tuple[float, ...]]] = {
    "exact": {},
    "two-phase": {"prune_ratio": (0.2, 0.4, 0.6, 0.8), "expansion_rate": (5.0, 10.0, 20.0)},
    "seismic": {"top_n": (3, 5, 10, 20), "heap_factor": (1.0, 1.2, 1.5), "k": (SIZE, 5 * SIZE, 20 * SIZE)},
    "pruned": {"tokens_freq_ratio_threshold": (2.0, 5.0, 10.0), "tokens_weight_threshold": (0.2, 0.4, 0.6)},
}


class PlannedIndex(NamedTuple):
    """An index: its field and kind, the pruning of its documents, its size, and the engine of its field."""

    client: Client
    name: str
    settings: IndexSettings
    pruning: PruningRule
    bytes: int
    engine: Engine


class Setting(NamedTuple):
    """An engine with its parameters, and the pruning rule of its queries."""

    engine: Engine
    parameters: Mapping[str, Any]
    query: PruningRule


class Timed(NamedTuple):
    """The rankings of a setting, in the order of queries, with their times."""

    setting: Setting
    ranked: list[Ranked]

    def latency_ms(self, share: float) -> float:
        """Return a quantile of the latency seen by the client."""
        return float(np.quantile([one.latency_s for one in self.ranked], share)) * 1000


def settings_of(engine: Engine, query_rules: Sequence[PruningRule]) -> Iterator[Setting]:
    """Yield all settings for the field of an engine; only exact search if it is hybrid."""
    names: list[EngineName] = ["exact"] if engine.hybrid else engines_of(engine.kind, engine.product)
    for rule, name in product(query_rules, names):
        for values in product(*_TRIED[name].values()):
            parameters = dict(zip(_TRIED[name], values, strict=True))
            table: dict[str, Any] = {ENGINES[name].settings: parameters} if parameters else {}
            yield Setting(replace(engine, name=name, **table), parameters, rule)


def measure_settings(
    client: Client,
    index: str,
    settings: Sequence[Setting],
    queries: Sequence[Sequence[tuple[str, QueryWeights]]],
    texts: Sequence[str] = (),
) -> list[Timed]:
    """Search an index with each setting; `queries` has the pruned queries of each setting, `texts` their texts."""
    timed = [Timed(setting, []) for setting in settings]
    for setting, asked in zip(settings, queries, strict=True):
        # Warm-up: the first searches compile code and read from disk.
        list(rank_index(client, index, asked[:5], setting.engine, size=SIZE, texts=texts))
    for first in range(0, max(map(len, queries), default=0), _TURN):
        turn = slice(first, first + _TURN)
        for one, asked in zip(timed, queries, strict=True):
            one.ranked.extend(rank_index(client, index, asked[turn], one.setting.engine, size=SIZE, texts=texts[turn]))
    return timed


def ten_best(
    index: PlannedIndex, queries: Sequence[tuple[str, QueryWeights]], texts: Sequence[str]
) -> Iterator[set[str]]:
    """Yield the ten best documents of each query, and all with the score of the tenth."""
    for one in rank_index(index.client, index.name, queries, index.engine, size=HYBRID_DEPTH, texts=texts):
        least = one.scores[:SIZE][-1] if one.scores else 0.0
        yield {doc_id for doc_id, score in zip(one.doc_ids, one.scores, strict=True) if score >= least}


@contextlib.contextmanager
def open_planned_index(
    run: Run,
    pipeline: Pipeline,
    index: str | None,
    url: str | None,
    connection: ConnectionLike | None,
    options: PlanOptions,
) -> Iterator[PlannedIndex | None]:
    """Open the index for the block; yield None without a name.

    Raises:
        ClusterError: the index does not exist, or has other vectors than the run.
        UsageError: a hybrid plan is for a field without exact search.
    """
    if index is None:
        yield None
        return
    # The index of this run has its model, and query settings are the result of the plan.
    bare = replace(pipeline, model=ModelSettings(), query=QuerySettings())
    with open_index(index, url=url, connection=connection, pipeline=bare) as opened:
        name, stamp = opened.index.name, opened.index.stamp
        if stamp is None or stamp.run_id != run.manifest.run_id:
            of = f"run {stamp.run_id[:8]}" if stamp else "no known run"
            raise ClusterError(
                f"Index {index!r} was loaded from {of}, but the plan is for run {run.manifest.run_id[:8]} "
                f"({run.path}). Load that run into it, or name an index that was loaded from it."
            )
        hybrid = hybrid_settings(pipeline.query, options)
        if hybrid and opened.engine.name != "exact":
            raise UsageError(
                f"A hybrid plan compares with exact search, and the field of index {index!r} has kind "
                f"{opened.engine.kind}. Omit --hybrid, or load the run into a rank_features field."
            )
        client = opened.client.allowing(options.allow_partial)
        stats = client.call("GET", f"{path_of(name)}/_stats/store")
        pruning = {rule: value for rule, value in stamp.pruning.items() if value is not None}
        size = int(stats["_all"]["primaries"]["store"]["size_in_bytes"])
        engine = replace(opened.engine, hybrid=hybrid)
        yield PlannedIndex(client, name, opened.pipeline.index, pruning, size, engine)
