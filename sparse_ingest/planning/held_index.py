"""The index that a plan is for: that it holds the run, how it was pruned, its size, how it is searched.

In: a run, a pipeline, the name of an index. Out: a `HeldIndex`. Not covered: measuring it (engines.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from sparse_ingest.errors import ClusterError
from sparse_ingest.pipeline import ModelSettings, Pipeline, QuerySettings
from sparse_ingest.planning.rules import PruningRule
from sparse_ingest.runs.run import Run

if TYPE_CHECKING:
    from opensearchpy import OpenSearch

    from sparse_ingest.cluster.client import Client, Connection
    from sparse_ingest.cluster.requests import Engine
    from sparse_ingest.searching.search import SearchableIndex


class HeldIndex(NamedTuple):
    """An index with what its documents were pruned by, its bytes, and the engine of its field."""

    client: Client
    name: str
    pruning: PruningRule
    bytes: int
    engine: Engine


@contextlib.contextmanager
def held_index(
    run: Run, pipeline: Pipeline, index: str | None, connection: Connection | OpenSearch | None
) -> Iterator[HeldIndex | None]:
    """Open the index for the block; None when none is named.

    Raises:
        ClusterError: there is none of that name, or it holds other vectors than the run's.
    """
    if index is None or connection is None:
        yield None
        return
    from sparse_ingest.searching.search import open_index

    # The run's model is the index's when the run is; settings of engines are what is to be found out.
    bare = replace(pipeline, model=ModelSettings(), query=QuerySettings())
    with open_index(index, connection=connection, pipeline=bare) as opened:
        yield _look_at(opened, run)


def _look_at(opened: SearchableIndex, run: Run) -> HeldIndex:
    found, stamp = opened.index, opened.index.stamp
    if stamp is None or stamp.run_id != run.manifest.run_id:
        of = f"run {stamp.run_id[:8]}" if stamp else "no run that it names"
        raise ClusterError(
            f"Index {opened.name!r} holds {of}, but the plan is for run {run.manifest.run_id[:8]} ({run.path}). Load "
            "that run into it, or name an index that holds it."
        )
    stats = opened.client.call("GET", f"{found.path}/_stats/store")
    pruning = {rule: value for rule, value in stamp.pruning.items() if value is not None}
    size = int(stats["_all"]["primaries"]["store"]["size_in_bytes"])
    return HeldIndex(opened.client, found.name, pruning, size, opened.engine)
