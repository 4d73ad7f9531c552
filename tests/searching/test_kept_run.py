"""A run in memory gives the hits of the run on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.indexes import random_documents, random_queries
from support.runs import make_run

from sparse_ingest.searching.kept_run import KeptRun
from sparse_ingest.searching.run_search import search_run


@pytest.mark.parametrize("weights", ["float16", "float32"])
def test_a_run_in_memory_gives_the_same_hits(tmp_path: Path, weights: str) -> None:
    run = make_run(tmp_path / "run", random_documents(300), shard_rows=64, weights=weights)
    kept = KeptRun.read(run)
    assert kept is not None
    for query in [*random_queries(10), {}, {"not in the vocabulary": 1.0}]:
        for size in (1, 10, 400):
            assert kept.search(query, size) == search_run(run, query, size=size)


def test_a_run_above_the_limit_is_not_read(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", random_documents(60))
    assert KeptRun.read(run, most_bytes=2000) is None
    assert KeptRun.read(run, most_bytes=1 << 20) is not None


def test_an_empty_run_has_no_hits(tmp_path: Path) -> None:
    kept = KeptRun.read(make_run(tmp_path / "run", {}))
    assert kept is not None
    assert kept.search({"river": 1.0}, 10) == []
