"""A real server without the neural-search plugin: same exact scores, and a message for unsupported features."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.indexes import assert_same_hits, filled, random_documents, random_queries
from support.runs import make_run
from support.servers import environment, random_free_port, server_home

from sparse_ingest.cluster.client import Client, Connection, connect
from sparse_ingest.cluster.search_bodies import Engine
from sparse_ingest.errors import ClusterError
from sparse_ingest.local_server import download, process
from sparse_ingest.searching.index_search import rank_index, search_hybrid, search_index
from sparse_ingest.searching.run_search import search_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with server_home() as home, environment(SPARSE_INGEST_HOME=str(home)):
        folder, port = download.distribution_folder(), random_free_port()
        _without_plugins(folder)
        process.start(port, data=_data(home), heap="512m")
        try:
            yield connect(Connection(f"http://127.0.0.1:{port}"))
        finally:
            process.stop(port)


def _without_plugins(folder: Path) -> None:
    """Replace the link to the distribution by a copy without plugins."""
    whole = folder.resolve()
    folder.unlink()
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "plugins")
    (folder / "plugins").mkdir(mode=0o755)
    contents = folder / download.CONTENTS
    sizes = {name: size for name, size in json.loads(contents.read_text()).items() if not name.startswith("plugins/")}
    contents.write_text(json.dumps(sizes))


def _data(home: Path) -> Path:
    data = home / "chosen"
    data.mkdir(mode=0o755)
    return data


def test_scores_are_the_same_and_features_that_need_the_plugin_are_refused(client: Client, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", random_documents(100), shard_rows=200)
    with filled(client, run) as index:
        queries = [
            (str(number), {token: weight for token, weight in weights.items() if "." not in token})
            for number, weights in enumerate(random_queries(10))
        ]
        for ranked, (_, weights) in zip(rank_index(client, index, queries, Engine(), size=20), queries, strict=True):
            exact = [(hit.doc_id, hit.score) for hit in search_run(run, weights, size=20, stored=True)]
            assert_same_hits(list(zip(ranked.doc_ids, ranked.scores, strict=True)), exact, 20)
        for hit in search_index(client, index, queries[0][1], size=5, filter={"match_all": {}}):
            assert sum(term.contribution for term in hit.terms) == pytest.approx(hit.score, rel=1e-6)
        for engine in (Engine("two-phase"), Engine("seismic", kind="sparse_vector", keys={"word1": "1"})):
            with pytest.raises(ClusterError, match=f"lacks the neural-search plugin, which {engine.name} search needs"):
                search_index(client, index, {"word1": 1.0}, size=5, engine=engine)
        with pytest.raises(ClusterError, match="lacks the neural-search plugin, which a hybrid search needs"):
            search_hybrid(client, index, "word1", {"word1": 1.0}, size=5)
