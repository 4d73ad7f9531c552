"""Helpers for tests of `load`: runs, load calls, and inspection of the index."""

from __future__ import annotations

import json
from pathlib import Path

from sparse_ingest.cluster import indexes
from sparse_ingest.cluster.client import Client, Connection
from sparse_ingest.cluster.stamps import Stamp
from sparse_ingest.loading.load import LoadReport, load
from sparse_ingest.pipeline import IndexSettings, Pipeline
from sparse_ingest.runs.run import Run
from support.reporters import Recorder
from support.runs import DOCUMENTS, make_run

MANY = {f"d{number}": {"river": 0.5 + number / 64, "stone": 1 / (number + 1)} for number in range(60)}
SETTINGS = ("refresh_interval", "number_of_replicas", "translog.durability")


class StopBefore(Recorder):
    """Requests a stop before the shard of this number; a load checks once before each shard."""

    def __init__(self, shard: int) -> None:
        super().__init__()
        self._shards_left = shard

    def stop_requested(self) -> bool:
        self._shards_left -= 1
        return self._shards_left < 0


def into(client: Client, index: str, run: Run, **settings) -> LoadReport:
    pipeline = settings.pop("pipeline", Pipeline())
    return load(run.path, index=index, pipeline=pipeline, connection=Connection(client.address), **settings)


def stamped(client: Client, index: str) -> Stamp:
    found = indexes.find_index(client, index)
    assert found is not None
    assert found.stamp is not None
    return found.stamp


def ids_in(client: Client, index: str) -> set[str]:
    answer = client.call("POST", f"/{index}/_search", {"size": 1000, "_source": False, "track_total_hits": True})
    hits = answer["hits"]["hits"]
    assert answer["hits"]["total"]["value"] == len(hits)
    return {hit["_id"] for hit in hits}


def settings_of(client: Client, index: str) -> tuple[str | None, ...]:
    there = indexes.find_index(client, index)
    assert there is not None
    return tuple(there.setting(name) for name in SETTINGS)


def broken_titles(tmp_path: Path, client: Client) -> Pipeline:
    """Write a body that maps the title to a number, so that a document with a word as title is refused."""
    path = tmp_path / "body.json"
    properties = {"sparse": client.dialect.field_entry(), "title": {"type": "integer"}}
    path.write_text(json.dumps({"mappings": {"dynamic": False, "properties": properties}}))
    return Pipeline(index=IndexSettings(body=str(path)))


def run_with_bad_titles(folder: Path, bad: tuple[str, ...]) -> Run:
    titles = {doc_id: {"title": "word" if doc_id in bad else 1} for doc_id in DOCUMENTS}
    return make_run(folder, fields=titles, shard_rows=2)


def name_of(alias: str, run: Run) -> str:
    """Return the name of the index that `load --alias` creates for a run."""
    return f"{alias}-{run.manifest.run_id[:8]}"
