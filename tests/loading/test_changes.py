"""`--since` and `--delete-missing`: update an index from an older run to a newer one, on a real server."""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.changes import (
    NEW,
    NEW_TITLES,
    OLD,
    TITLES,
    existing_index,
    into,
    stamp_of,
    titled_run,
    titles_in,
    titles_of,
    verify_all,
)
from support.faulty_proxy import faulty_proxy
from support.killed_load import KilledLoad
from support.loads import StopBefore

from sparse_ingest.cli import loading
from sparse_ingest.cluster import indexes
from sparse_ingest.cluster.client import Client, Connection
from sparse_ingest.cluster.journal import open_journal
from sparse_ingest.errors import ClusterError, Interrupted, RunError, UsageError
from sparse_ingest.loading.publish import publish
from sparse_ingest.pipeline import IndexSettings, Pipeline
from sparse_ingest.runs.run import Run

pytestmark = pytest.mark.both_products(quick=False)


@pytest.fixture
def old(tmp_path: Path) -> Run:
    return titled_run(tmp_path / "old", OLD, shard_rows=6)


@pytest.fixture
def new(tmp_path: Path) -> Run:
    return titled_run(tmp_path / "new", NEW, fields=NEW_TITLES)


def test_since_sends_changed_documents_and_delete_missing_deletes_removed_ones(
    client: Client, index_name: str, old: Run, new: Run
) -> None:
    into(client, index_name, old)
    with faulty_proxy(client.address) as proxy:
        report = into(client, index_name, new, url=proxy.url, since=old.path, delete_missing=True)
    assert (report.documents, report.acknowledged, report.unchanged, report.deleted) == (20, 20, 15, 2)
    assert (report.shards, report.loaded_shards) == (4, 4)
    # About 70 bytes per document: 5 changed and 2 deleted, not all 20.
    assert sum(proxy.bulk_sizes) < 800
    assert titles_in(client, index_name) == titles_of(NEW, NEW_TITLES)
    found = verify_all(client, index_name, new)
    assert found.ok and (found.index_documents, found.expected_documents) == (20, 20)
    now = stamp_of(client, index_name)
    assert (now.run_id, now.load, now.only_run, now.runs) == (
        new.manifest.run_id,
        "done",
        new.manifest.run_id,
        (now.run_id,),
    )


def test_without_delete_missing_removed_documents_stay(client: Client, index_name: str, old: Run, new: Run) -> None:
    into(client, index_name, old)
    assert into(client, index_name, new, since=old.path).deleted == 0
    assert titles_in(client, index_name) == titles_of({**OLD, **NEW}, NEW_TITLES)
    assert verify_all(client, index_name, new).ok
    assert stamp_of(client, index_name).only_run is None
    # Repeating it with --delete-missing only deletes.
    again = into(client, index_name, new, since=old.path, delete_missing=True)
    assert (again.loaded_shards, again.deleted) == (0, 2)
    found = verify_all(client, index_name, new)
    assert found.ok and found.expected_documents == 20


def test_repeating_since_sends_and_deletes_nothing(client: Client, index_name: str, old: Run, new: Run) -> None:
    into(client, index_name, old)
    into(client, index_name, new, since=old.path, delete_missing=True)
    for options in ({"since": old.path, "delete_missing": True}, {"since": old.path}, {}):
        with faulty_proxy(client.address) as proxy:
            report = into(client, index_name, new, url=proxy.url, **options)
        assert (report.loaded_shards, report.deleted, report.acknowledged) == (0, 0, 20)
        assert proxy.bulk_sizes == []
    assert stamp_of(client, index_name).load == "done"


def test_an_index_can_change_to_another_run_and_back(client: Client, index_name: str, old: Run, new: Run) -> None:
    """Journals of earlier loads are ignored once another run was loaded."""
    into(client, index_name, old)
    forth = (new, old, NEW, NEW_TITLES)
    for run, before, documents, titles in (forth, (old, new, OLD, TITLES), forth):
        report = into(client, index_name, run, since=before.path, delete_missing=True)
        assert (report.unchanged, report.deleted) == (15, 2)
        assert titles_in(client, index_name) == titles_of(documents, titles)
        assert verify_all(client, index_name, run).ok


def test_a_run_that_is_loaded_again_after_another_one_is_sent_again(
    client: Client, index_name: str, old: Run, new: Run
) -> None:
    into(client, index_name, old)
    into(client, index_name, new)
    assert into(client, index_name, old).loaded_shards == 4
    assert verify_all(client, index_name, old).ok
    assert titles_in(client, index_name)["d19"] == "Title of d19"


def test_documents_of_the_older_run_that_were_refused_are_sent_again(
    client: Client, index_name: str, tmp_path: Path
) -> None:
    body = tmp_path / "body.json"
    properties = {"sparse": client.dialect.field_entry(), "title": {"type": "integer", "ignore_malformed": False}}
    body.write_text(json.dumps({"mappings": {"dynamic": False, "properties": properties}}))
    titles: dict[str, dict[str, object]] = {doc_id: {"title": 1} for doc_id in {**OLD, **NEW}}
    titles["d5"] = {"title": "word"}
    old, new = (titled_run(tmp_path / "old", OLD, fields=titles), titled_run(tmp_path / "new", NEW, fields=titles))
    assert into(client, index_name, old, pipeline=Pipeline(index=IndexSettings(body=str(body)))).refused == 1
    report = into(client, index_name, new, since=old.path, delete_missing=True)
    # d5 is refused and reported again; d19 is unchanged.
    assert (report.unchanged, report.acknowledged, report.refused) == (15, 19, 1)
    assert "d5" in Path(report.dead or "").read_text()
    assert verify_all(client, index_name, new).ok


def test_a_refused_new_version_leaves_the_old_version_and_marks_the_index_as_mixed(
    client: Client, index_name: str, tmp_path: Path
) -> None:
    body = tmp_path / "body.json"
    properties = {"sparse": client.dialect.field_entry(), "title": {"type": "integer"}}
    body.write_text(json.dumps({"mappings": {"dynamic": False, "properties": properties}}))
    titles: dict[str, dict[str, object]] = {doc_id: {"title": 1} for doc_id in {**OLD, **NEW}}
    old = titled_run(tmp_path / "old", OLD, fields=titles)
    new = titled_run(tmp_path / "new", NEW, fields={**titles, "d5": {"title": "word"}})
    into(client, index_name, old, pipeline=Pipeline(index=IndexSettings(body=str(body))))
    report = into(client, index_name, new, since=old.path, delete_missing=True)
    assert (report.refused, report.deleted) == (1, 2)
    assert titles_in(client, index_name)["d5"] == 1
    assert stamp_of(client, index_name).only_run is None
    assert verify_all(client, index_name, new).ok


def refusals(
    old: Run, new: Run, tmp_path: Path
) -> list[tuple[Callable[[Client, str], Any], dict[str, Any], type, str]]:
    """Return the state of the index, the options, the error and its message for each refused load."""
    other = titled_run(tmp_path / "other", {"d1": {"river": 1.0}})

    def unfinished(client: Client, index: str) -> None:
        with pytest.raises(Interrupted):
            into(client, index, old, progress=StopBefore(1))

    def without_journal(client: Client, index: str) -> None:
        into(client, index, old)
        journal = open_journal(old, client.cluster_uuid, existing_index(client, index).uuid)
        lines = (journal.dead_path.parent / "journal.jsonl").read_text().splitlines(keepends=True)
        (journal.dead_path.parent / "journal.jsonl").write_text("".join(lines[:2]))

    def of_another_client(client: Client, index: str) -> None:
        client.call("PUT", f"/{index}", {"mappings": {"properties": {"sparse": client.dialect.field_entry()}}})

    def loaded(client: Client, index: str, **settings: Any) -> None:
        into(client, index, old, **settings)

    since = {"since": old.path}
    return [
        (lambda client, index: None, since, ClusterError, "does not exist"),
        (of_another_client, since, ClusterError, "its _meta names no run"),
        (lambda client, index: into(client, index, other), since, ClusterError, "_meta names run [0-9a-f]{8}. Finish"),
        (unfinished, since, ClusterError, "whose load is not finished"),
        (without_journal, since, RunError, "is incomplete .2 of 4 shards"),
        (loaded, {"since": new.path}, UsageError, "the run to load"),
        (lambda client, index: loaded(client, index, top_k=1), since, ClusterError, "was loaded .*, this load is"),
        (loaded, {**since, "update": True}, RunError, "was loaded without --update"),
    ]  # fmt: skip


@pytest.mark.parametrize("case", range(8))
def test_an_index_that_does_not_hold_the_older_run_is_refused_before_anything_changes(
    client: Client, index_name: str, old: Run, new: Run, tmp_path: Path, case: int
) -> None:
    prepare, asked, error, message = refusals(old, new, tmp_path)[case]
    prepare(client, index_name)
    before = indexes.find_index(client, index_name)
    with pytest.raises(error, match=message):
        into(client, index_name, new, **asked)
    assert indexes.find_index(client, index_name) == before
    assert not (new.path / "load").exists()


def test_an_unfinished_since_load_cannot_be_finished_with_other_options(
    client: Client, index_name: str, old: Run, new: Run
) -> None:
    into(client, index_name, old)
    with pytest.raises(Interrupted):
        into(client, index_name, new, since=old.path, delete_missing=True, progress=StopBefore(1))
    for options in ({}, {"since": old.path}):
        with pytest.raises(ClusterError, match="started with --since OLD_RUN --delete-missing"):
            into(client, index_name, new, **options)
    report = into(client, index_name, new, since=old.path, delete_missing=True)
    assert (report.acknowledged, report.deleted) == (20, 2)
    assert verify_all(client, index_name, new).ok


def test_an_unfinished_run_deletes_nothing(client: Client, index_name: str, old: Run, tmp_path: Path) -> None:
    into(client, index_name, old)
    half = titled_run(tmp_path / "half", {"d1": {"river": 1.0}}, complete=False)
    with pytest.raises(RunError, match="would delete documents that it does not have yet"):
        into(client, index_name, half, since=old.path, delete_missing=True, partial=True)
    assert len(titles_in(client, index_name)) == 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"delete_missing": True}, "needs --since OLD_RUN"),
        ({"replace": True, "update": True}, "--replace deletes what"),
        ({"replace": True, "since": "old"}, "--replace deletes what"),
        ({"since": "old", "delete_missing": True, "update": True}, "would delete the documents"),
    ],
)
def test_conflicting_options_are_refused(
    client: Client, index_name: str, old: Run, new: Run, options: dict[str, Any], message: str
) -> None:
    options |= {"since": old.path} if "since" in options else {}
    with pytest.raises(UsageError, match=message):
        into(client, index_name, new, **options)
    with pytest.raises(UsageError, match="--alias creates a new index"):
        publish(new.path, alias=index_name, pipeline=Pipeline(), connection=Connection(client.address), update=True)


def test_the_command_reports_sent_and_deleted_documents(
    client: Client, index_name: str, old: Run, new: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    into(client, index_name, old)
    arguments = [new.path, "--index", index_name, "--url", client.address, "--since", old.path, "--delete-missing"]
    assert loading.load.main([str(one) for one in arguments], standalone_mode=False) == 0
    shown = capsys.readouterr().out
    assert "20 of 20 documents" in shown and "15 of them are the same" in shown and "2 documents that are only" in shown


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 30))])
def test_killed_at_random_requests_the_index_becomes_the_newer_run(
    client: Client, index_name: str, tmp_path: Path, seed: int
) -> None:
    chance = random.Random(seed)
    vectors = [{doc_id: {"river": chance.uniform(1, 2)} for doc_id in map(str, range(240))} for _ in range(2)]
    same = set(chance.sample(sorted(vectors[0]), 120))
    old = titled_run(tmp_path / "old", vectors[0], shard_rows=20, fields={doc_id: {} for doc_id in vectors[0]})
    wanted = {doc_id: vectors[doc_id not in same][doc_id] for doc_id in chance.sample(sorted(vectors[0]), 200)}
    new = titled_run(tmp_path / "new", wanted, shard_rows=20, fields={doc_id: {} for doc_id in vectors[0]})
    into(client, index_name, old)
    asked = [new.path, "--index", index_name, "--since", old.path, "--delete-missing", "--url", client.address]
    codes = []
    for _ in range(2):
        # A random request and delay, so that the kill comes during shards, deletes or stamps.
        moment = f"during:{chance.randrange(2, 34)}:{chance.uniform(0, 0.004):.6f}"
        codes.append(KilledLoad(moment, tmp_path, *asked).ended()[0])
    assert set(codes) <= {0, -signal.SIGKILL} and -signal.SIGKILL in codes
    report = into(client, index_name, new, since=old.path, delete_missing=True)
    assert (report.acknowledged, report.refused, report.shards) == (200, 0, 10)
    found = verify_all(client, index_name, new)
    assert found.ok and (found.index_documents, found.expected_documents, found.checked_documents) == (200, 200, 200)
    assert stamp_of(client, index_name).load == "done"
