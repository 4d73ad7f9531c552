"""Load runs from an object store or the web into a real server: journals, restarts, refused documents."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from support.forked import command
from support.loads import MANY, broken_titles, ids_in, into, run_with_bad_titles
from support.runs import DOCUMENTS, make_run
from support.stores import FaultyStore, put_folder, stored, web_server

from sparse_ingest.cluster import indexes
from sparse_ingest.cluster.client import Client, Connection
from sparse_ingest.cluster.journal import Journal
from sparse_ingest.errors import StorageError
from sparse_ingest.records import Refusal
from sparse_ingest.runs.run import Run, open_run
from sparse_ingest.storage.places import RemotePath
from sparse_ingest.verification.verify import verify


def copy_to_store(run: Run, bucket: str, name: str = "run") -> Run:
    assert isinstance(run.path, Path)
    put_folder(run.path, RemotePath.at(f"{bucket}/{name}"))
    return open_run(RemotePath.at(f"{bucket}/{name}"))


def test_a_run_in_a_store_is_loaded_shown_and_verified(
    client: Client, index_name: str, bucket: str, tmp_path: Path
) -> None:
    run = copy_to_store(make_run(tmp_path / "run"), bucket)
    report = into(client, index_name, run)
    assert (report.documents, report.refused) == (5, 0)
    assert report.journal == f"{bucket}/run/load/{client.cluster_uuid}/{report.uuid}"
    assert into(client, index_name, run).loaded_shards == 0
    assert ids_in(client, index_name) == set(DOCUMENTS)
    shown = command("status", f"{bucket}/run", "--json")
    assert [load["shards"] for load in json.loads(shown.out)["loads"]] == [2], shown.err
    checked = command("verify", f"{bucket}/run", "--index", index_name, "--url", client.address, "--all")
    assert checked.code == 0, checked.err
    assert not [name for name in stored(RemotePath.at(bucket)) if "/locks/" in name]


@pytest.mark.slow
def test_dead_letters_are_stored_in_the_store_and_sent_again(
    client: Client, index_name: str, bucket: str, tmp_path: Path
) -> None:
    run = copy_to_store(run_with_bad_titles(tmp_path / "run", ("words", "small")), bucket)
    report = into(client, index_name, run, pipeline=broken_titles(tmp_path, client))
    assert report.refused == 2 and report.dead == f"{report.journal}/dead.jsonl"
    lines = RemotePath.at(report.dead).read_bytes().splitlines()
    assert sorted(json.loads(line)["id"] for line in lines) == ["small", "words"]
    again = command("load", f"{bucket}/run", "--index", index_name, "--url", client.address)
    assert again.code == 3 and f'such as "{json.loads(lines[0])["id"]}": ' in again.err, again.err
    assert into(client, index_name, run, retry_dead=True, pipeline=broken_titles(tmp_path, client)).retried == 2
    assert verify(run.path, index=index_name, connection=Connection(client.address)).refused_documents == 2


@pytest.mark.slow
def test_since_works_with_runs_in_a_store(client: Client, index_name: str, bucket: str, tmp_path: Path) -> None:
    old = copy_to_store(make_run(tmp_path / "old", MANY, shard_rows=16), bucket, "old")
    newer = {**{key: terms for key, terms in MANY.items() if key != "d7"}, "d9": {"lamp": 2.0}}
    new = copy_to_store(make_run(tmp_path / "new", newer, shard_rows=16), bucket, "new")
    into(client, index_name, old)
    answer = command("load", f"{bucket}/new", "--index", index_name, "--url", client.address,
                     "--since", f"{bucket}/old", "--delete-missing", "--json")  # fmt: skip
    assert answer.code == 0, answer.err
    report = json.loads(answer.out)
    assert (report["deleted"], report["unchanged"]) == (1, 58)
    assert ids_in(client, index_name) == set(newer)
    assert verify(new.path, index=index_name, connection=Connection(client.address)).ok


def test_a_shard_in_a_store_is_fetched_once_to_check_it_and_once_to_send_it(
    client: Client, index_name: str, faulty: FaultyStore, bucket: str, tmp_path: Path
) -> None:
    texts = {doc_id: {"text": os.urandom(20_000).hex()} for doc_id in MANY}
    local = make_run(tmp_path / "run", MANY, shard_rows=30, fields=texts)
    run = copy_to_store(local, bucket)
    faulty.sent.clear()
    into(client, index_name, run)
    for shard in local.done_shards():
        path = local.shard_path(shard)
        assert isinstance(path, Path)
        size, footer = path.stat().st_size, 64 << 10
        fetched = faulty.sent_of(f"GET .*{path.name}")
        assert 2 * size <= fetched <= 2 * size + footer, (fetched, size)
    assert list(run.scratch_path("any").parent.iterdir()) == [], "downloaded shards are removed"


def test_a_run_on_the_web_is_loaded_and_verified(
    client: Client, index_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSE_INGEST_HOME", str(tmp_path / "home"))
    make_run(tmp_path / "served" / "run")
    before = sorted((tmp_path / "served").rglob("*"))
    with web_server(tmp_path / "served") as url:
        run = open_run(RemotePath.at(f"{url}/run"))
        report = into(client, index_name, run)
        assert (report.documents, report.refused) == (5, 0)
        assert Path(report.journal).is_relative_to(tmp_path / "home")
        assert into(client, index_name, run).loaded_shards == 0
        assert verify(run.path, index=index_name, connection=Connection(client.address), sample=None).ok
    assert sorted((tmp_path / "served").rglob("*")) == before


def test_a_web_server_without_range_requests_is_refused_before_an_index_is_created(
    client: Client, index_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSE_INGEST_HOME", str(tmp_path / "home"))
    # Smaller files are read from start to end, without ranges.
    make_run(
        tmp_path / "run", MANY, shard_rows=30, fields={doc_id: {"text": os.urandom(20_000).hex()} for doc_id in MANY}
    )
    with (
        web_server(tmp_path, ranges=False) as url,
        pytest.raises(StorageError, match="its server has no range requests"),
    ):
        into(client, index_name, open_run(RemotePath.at(f"{url}/run")))
    assert indexes.find_index(client, index_name) is None


def test_store_faults_during_a_load_lose_nothing(
    client: Client, index_name: str, faulty: FaultyStore, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr("s3fs.S3FileSystem.retries", 2)
    run = copy_to_store(make_run(tmp_path / "run", MANY, shard_rows=20), bucket)
    faulty.inject("PUT .*journal", None, 503)
    with pytest.raises(StorageError, match="start again: what is finished is kept"):
        into(client, index_name, run)
    faulty.inject("none")
    report = into(client, index_name, run)
    assert (report.documents, report.loaded_shards) == (len(MANY), 2)
    assert verify(run.path, index=index_name, connection=Connection(client.address), sample=None).ok


def test_a_journal_in_a_store_matches_one_on_disk(bucket: str, tmp_path: Path) -> None:
    letters = [Refusal("é", 0, 7, 400, "no"), Refusal("b", 0, 9, 400, "no")]
    places = (RemotePath.at(f"{bucket}/load"), tmp_path / "load")
    for place in places:
        journal = Journal(place / "CLUSTER" / "INDEX")
        assert journal.finished() == {} and list(journal.dead()) == []
        journal.begin({0, 1})
        journal.record_dead(letters)
        if isinstance(place, RemotePath):
            assert stored(place) == {}, "dead letters of an unfinished shard stay local"
        journal.finish(0, {"rows": 20, "acknowledged": 18, "refused": 2})
        journal.begin({1})
        journal.finish(1, {"rows": 3, "acknowledged": 3, "refused": 0})
        again = Journal(place / "CLUSTER" / "INDEX")
        assert list(again.dead()) == letters and again.refused() == {0: 2}
        again.retried(0, letters[:1])
    here = {str(path.relative_to(places[1])): path.read_bytes() for path in places[1].rglob("*.jsonl")}
    assert stored(places[0]) == here
    for place in places:
        kept = {"number_of_replicas": {"before": "1", "loading": "0"}}
        Journal(place / "CLUSTER" / "INDEX").keep_settings(kept)
        assert Journal(place / "CLUSTER" / "INDEX").settings() == kept
        Journal(place / "CLUSTER" / "INDEX").keep_settings({})
        Journal(place / "CLUSTER" / "INDEX").clear()
        assert Journal(place / "CLUSTER" / "INDEX").finished() == {}
    assert stored(places[0]) == {}
