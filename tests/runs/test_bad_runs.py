"""Runs and indexes that cannot be loaded: one message each, before any request that changes something."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support.faulty_proxy import faulty_proxy
from support.runs import make_run, without_hashes

from sparse_ingest.cluster import indexes
from sparse_ingest.cluster.client import Connection, connect
from sparse_ingest.errors import SparseIngestError
from sparse_ingest.loading.load import load
from sparse_ingest.pipeline import IndexSettings, Pipeline
from sparse_ingest.runs.run import Run

SPARSE_VECTOR = Pipeline(index=IndexSettings(kind="sparse_vector"))


def refused(run: Path, index: str, url: str, pipeline: Pipeline = Pipeline()) -> str:  # noqa: B008 - frozen
    """Return the message of a load that must not send any document."""
    with faulty_proxy(url) as proxy, pytest.raises(SparseIngestError) as caught:
        load(run, index=index, pipeline=pipeline, connection=Connection(proxy.url))
    assert proxy.bulk_sizes == []
    return str(caught.value)


def exists(url: str, index: str) -> bool:
    client = connect(Connection(url))
    try:
        return indexes.find_index(client, index) is not None
    finally:
        client.close()


def flip_a_byte(run: Run) -> None:
    path = run.shard_path(1)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def shorten(run: Run) -> None:
    path = run.shard_path(0)
    path.write_bytes(path.read_bytes()[:-100])


def copy_a_shard_of_another_run(run: Run) -> None:
    other = make_run(run.path.parent / "other", {"x": {"lamp": 1.0}, "y": {"river": 1.0}, "z": {}})
    run.shard_path(0).write_bytes(other.shard_path(0).read_bytes())


def write_a_shorter_vocabulary(run: Run) -> None:
    (run.path / "vocab.json").write_text(json.dumps(run.vocabulary()[:20]))


def write_a_shorter_vocabulary_of_an_old_run(run: Run) -> None:
    without_hashes(run)
    write_a_shorter_vocabulary(run)


def write_a_manifest_of_something_else(run: Run) -> None:
    (run.path / "manifest.json").write_text(json.dumps({"format": 1, "name": "a Docker image"}))


def write_a_manifest_of_the_future(run: Run) -> None:
    path = run.path / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 2}))


def delete_a_shard(run: Run) -> None:
    (run.path / "done" / "part-00001.json").unlink()
    run.shard_path(1).unlink()


def empty_a_record(run: Run) -> None:
    (run.path / "done" / "part-00001.json").write_text("{}")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (delete_a_shard, "has lost shards: shards is 2 in complete.json, and 1 by"),
        (empty_a_record, "has no sha256 or rows"),
        (flip_a_byte, "part-00001.parquet has SHA-256"),
        (shorten, "part-00000.parquet has SHA-256"),
        (copy_a_shard_of_another_run, "part-00000.parquet has SHA-256"),
        (write_a_shorter_vocabulary, "vocab.json cannot be read: it has SHA-256"),
        (write_a_shorter_vocabulary_of_an_old_run, "a token id outside the vocabulary, which has 20: 20"),
        (write_a_manifest_of_something_else, "manifest.json"),
        (write_a_manifest_of_the_future, "format"),
    ],
)
def test_a_damaged_run_is_refused_before_the_index_is_created(
    opensearch_url: str, index_name: str, tmp_path: Path, damage: Callable[[Run], None], message: str
) -> None:
    run = make_run(tmp_path / "run")
    damage(run)
    assert message in refused(run.path, index_name, opensearch_url)
    assert not exists(opensearch_url, index_name)


def test_everything_that_opensearch_would_refuse_is_in_one_message(
    opensearch_url: str, index_name: str, tmp_path: Path
) -> None:
    documents = {"good": {"river": 1.0}, "x" * 600: {"river": 1.0}, "carries": {"lamp": 0.5}}
    fields = {doc_id: {"text": "t"} for doc_id in documents} | {"carries": {"sparse": {"own": 1}}}
    run = make_run(tmp_path / "run", documents, fields=fields)
    sentence = refused(run.path, index_name, opensearch_url)
    assert "ids that are empty or longer than 512 bytes: 'xxx" in sentence
    assert "documents that carry a field 'sparse'" in sentence
    assert sentence.count("\n  ") == 2
    assert not exists(opensearch_url, index_name)


def test_an_index_of_another_kind_or_vocabulary_is_refused(
    opensearch_url: str, index_name: str, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run")
    load(run.path, index=index_name, pipeline=Pipeline(), connection=Connection(opensearch_url))
    assert "as rank_features; expected sparse_vector" in refused(run.path, index_name, opensearch_url, SPARSE_VECTOR)
    other = make_run(tmp_path / "other", {"a": {"new": 1.0}})
    assert "this run is of 'made-by-hand' with vocabulary" in refused(other.path, index_name, opensearch_url)


def test_an_undamaged_run_is_loaded(opensearch_url: str, index_name: str, tmp_path: Path) -> None:
    """The tests above refuse the damage, not the run itself."""
    run = make_run(tmp_path / "run")
    before = run.shard_path(1).read_bytes()
    flip_a_byte(run)
    refused(run.path, index_name, opensearch_url)
    run.shard_path(1).write_bytes(before)
    report = load(run.path, index=index_name, pipeline=Pipeline(), connection=Connection(opensearch_url))
    assert report.acknowledged == 5
