"""The index that a plan is for, and its engines, each with several settings, measured on the queries of the plan.

In: a run, the name of an index that holds it, queries. Out: for each setting the documents that each query finds and
how long it took. Settings take turns on some queries at a time, so that a machine that slows down meets all of them.
Not covered: what the documents are worth (plan.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sparse_ingest.cluster.client import Client, path_of
from sparse_ingest.cluster.search_bodies import ENGINES, Engine
from sparse_ingest.errors import ClusterError
from sparse_ingest.pipeline import EngineName, IndexSettings, ModelSettings, Pipeline, QuerySettings
from sparse_ingest.planning.rules import PruningRule
from sparse_ingest.queries.weight_table import QueryWeights
from sparse_ingest.runs.run import Run
from sparse_ingest.searching.hits import Ranked
from sparse_ingest.searching.index_search import rank_index
from sparse_ingest.searching.search import open_index

if TYPE_CHECKING:
    from sparse_ingest.cluster.client import Client, ConnectionLike

SIZE = 10
_AT_ONCE = 20  # queries of one setting before it is the next one's turn
# The values that are tried of each parameter of an engine.
_TRIED: dict[EngineName, dict[str, tuple[float, ...]]] = {
    "exact": {},
    "two-phase": {"prune_ratio": (0.2, 0.4, 0.6, 0.8), "expansion_rate": (5.0, 10.0, 20.0)},
    "seismic": {"top_n": (3, 5, 10, 20), "heap_factor": (1.0, 1.2, 1.5), "k": (SIZE, 5 * SIZE, 20 * SIZE)},
}


class HeldIndex(NamedTuple):
    """An index with its field and kind, what its documents were pruned by, its bytes, and the engine of its field."""

    client: Client
    name: str
    settings: IndexSettings
    pruning: PruningRule
    bytes: int
    engine: Engine


class Setting(NamedTuple):
    """An engine with its parameters, and the rule that its queries are pruned by."""

    engine: Engine
    parameters: Mapping[str, Any]
    query: PruningRule


class Timed(NamedTuple):
    """What a setting found for each query, in order, and its times."""

    setting: Setting
    ranked: list[Ranked]

    def latency_ms(self, share: float) -> float:
        """The time that this share of the queries took at most, seen from here."""
        return float(np.quantile([one.latency_s for one in self.ranked], share)) * 1000


def settings_of(engine: Engine, query_rules: Sequence[PruningRule]) -> Iterator[Setting]:
    """What there is to try on the field of an engine."""
    names: list[EngineName] = [name for name, rules in ENGINES.items() if rules.kind == engine.kind]
    for rule, name in product(query_rules, names):
        for values in product(*_TRIED[name].values()):
            parameters = dict(zip(_TRIED[name], values, strict=True))
            table: dict[str, Any] = {ENGINES[name].settings: parameters} if parameters else {}
            yield Setting(replace(engine, name=name, **table), parameters, rule)


def measure(
    client: Client, index: str, settings: Sequence[Setting], queries: Sequence[Sequence[tuple[str, QueryWeights]]]
) -> list[Timed]:
    """Ask an index all queries with each setting; `queries` are those of each setting, pruned by its rule."""
    timed = [Timed(setting, []) for setting in settings]
    for setting, asked in zip(settings, queries, strict=True):
        # The first search of a sort compiles code and reads from disk.
        list(rank_index(client, index, asked[:5], setting.engine, size=SIZE))
    for first in range(0, max(map(len, queries), default=0), _AT_ONCE):
        for one, asked in zip(timed, queries, strict=True):
            some = asked[first : first + _AT_ONCE]
            one.ranked.extend(rank_index(client, index, some, one.setting.engine, size=SIZE))
    return timed


@contextlib.contextmanager
def held_index(
    run: Run, pipeline: Pipeline, index: str | None, url: str | None, connection: ConnectionLike | None, partial: bool
) -> Iterator[HeldIndex | None]:
    """Open the index for the block, also for `partial` answers; None when none is named.

    Raises:
        ClusterError: there is none of that name, or it holds other vectors than the run's.
    """
    if index is None:
        yield None
        return
    # The run's model is the index's when the run is; settings of engines are what is to be found out.
    bare = replace(pipeline, model=ModelSettings(), query=QuerySettings())
    with open_index(index, url=url, connection=connection, pipeline=bare) as opened:
        name, stamp = opened.index.name, opened.index.stamp
        if stamp is None or stamp.run_id != run.manifest.run_id:
            of = f"run {stamp.run_id[:8]}" if stamp else "no run that it names"
            raise ClusterError(
                f"Index {index!r} holds {of}, but the plan is for run {run.manifest.run_id[:8]} ({run.path}). Load "
                "that run into it, or name an index that holds it."
            )
        client = opened.client.allowing(partial)
        stats = client.call("GET", f"{path_of(name)}/_stats/store")
        pruning = {rule: value for rule, value in stamp.pruning.items() if value is not None}
        size = int(stats["_all"]["primaries"]["store"]["size_in_bytes"])
        yield HeldIndex(client, name, opened.pipeline.index, pruning, size, opened.engine)
