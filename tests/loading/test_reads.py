"""Count how often a load opens the shards of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support.loads import MANY, StopBefore, into
from support.opened_files import counted_opens
from support.runs import make_run

from sparse_ingest.cluster.client import Client
from sparse_ingest.errors import Interrupted
from sparse_ingest.pipeline import IndexSettings, Pipeline
from sparse_ingest.runs.run import Run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make_run(tmp_path / "run", MANY, shard_rows=20)


def opens_of(run: Run, load: Callable[[], object]) -> list[int]:
    """Return how often `load` opens each shard, in order."""
    paths = [path for shard in run.done_shards() if isinstance(path := run.shard_path(shard), Path)]
    with counted_opens(paths) as opens:
        load()
    return [opens[path] for path in paths]


@pytest.mark.parametrize("kind", ["rank_features", "sparse_vector"])
def test_a_shard_is_opened_once_to_check_it_and_once_to_send_it(
    client: Client, index_name: str, run: Run, kind: str
) -> None:
    pipeline = Pipeline(index=IndexSettings(kind=kind))
    assert opens_of(run, lambda: into(client, index_name, run, pipeline=pipeline)) == [2, 2, 2]


def test_a_resumed_load_opens_only_the_missing_shards(client: Client, index_name: str, run: Run) -> None:
    def stopped() -> None:
        with pytest.raises(Interrupted):
            into(client, index_name, run, progress=StopBefore(1))

    assert opens_of(run, stopped) == [2, 1, 1], "each shard is checked once; only the first is sent"
    assert opens_of(run, lambda: into(client, index_name, run)) == [0, 2, 2]
    assert opens_of(run, lambda: into(client, index_name, run)) == [0, 0, 0]
