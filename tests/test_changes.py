"""What changes in an index that is there: `--since`, `--delete-missing` and `--update`, against the real server."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from faulty_proxy import faulty_proxy
from made_runs import make_run

from sparse_ingest.cli import loading
from sparse_ingest.errors import ClusterError, Interrupted, RunError, UsageError
from sparse_ingest.load import LoadReport, load
from sparse_ingest.loading.publish import publish
from sparse_ingest.opensearch import indexes
from sparse_ingest.opensearch.client import Client, Connection, connect
from sparse_ingest.opensearch.journal import open_journal
from sparse_ingest.opensearch.sending import Retries
from sparse_ingest.pipeline import IndexSettings, Pipeline
from sparse_ingest.runs.manifest import Run
from sparse_ingest.verify import VerifyReport, verify

KILLED_LOAD = Path(__file__).parent / "crash" / "killed_load.py"
FAST = Retries(base_s=0.01, cap_s=0.1)
OLD = {f"d{number}": {"river": 1 + number / 64, "stone": 1 / (number + 1)} for number in range(20)}
# Three changed, two gone, two new; one of the changed has other fields alone.
CHANGED = {"d3": {"river": 9.0}, "d11": {}, "d19": OLD["d19"]}
GONE = ("d0", "d12")
ADDED = {"new é": {"lamp": 2.0}, "d100": {"stone": 1.0}}
NEW = {**{doc_id: terms for doc_id, terms in OLD.items() if doc_id not in GONE}, **CHANGED, **ADDED}
TITLES = {doc_id: {"title": f"Title of {doc_id}"} for doc_id in {**OLD, **NEW}}
NEW_TITLES = {**TITLES, "d19": {"title": "changed"}}


@pytest.fixture
def client(opensearch_url: str) -> Iterator[Client]:
    with closing(connect(Connection(opensearch_url))) as client:
        yield client


@pytest.fixture
def old(tmp_path: Path) -> Run:
    return made(tmp_path / "old", OLD, shard_rows=6)


@pytest.fixture
def new(tmp_path: Path) -> Run:
    return made(tmp_path / "new", NEW, fields=NEW_TITLES)


def made(folder: Path, documents: Mapping[str, Mapping[str, float]], **settings: Any) -> Run:
    return make_run(folder, documents, **{"shard_rows": 5, "fields": TITLES, **settings})


def into(client: Client, index: str, run: Run, **settings: Any) -> LoadReport:
    pipeline = settings.pop("pipeline", Pipeline())
    url = settings.pop("url", client.address)
    return load(run.path, index=index, pipeline=pipeline, connection=Connection(url), retries=FAST, **settings)


def checked(client: Client, index: str, run: Run) -> VerifyReport:
    return verify(run.path, index=index, connection=Connection(client.address), sample=None)


def there(client: Client, index: str) -> indexes.Index:
    found = indexes.find_index(client, index)
    assert found is not None
    return found


def stamp(client: Client, index: str) -> indexes.Stamp:
    found = there(client, index).stamp
    assert found is not None
    return found


def titles_in(client: Client, index: str) -> dict[str, str]:
    hits = client.call("POST", f"/{index}/_search", {"size": 1000})["hits"]["hits"]
    return {hit["_id"]: hit["_source"].get("title") for hit in hits}


def titles_of(documents: Mapping[str, object], titles: Mapping[str, Mapping[str, object]]) -> dict[str, object]:
    return {doc_id: titles[doc_id]["title"] for doc_id in documents}


def test_since_sends_only_what_differs_and_delete_missing_deletes_the_rest(
    client: Client, index_name: str, old: Run, new: Run
) -> None:
    into(client, index_name, old)
    with faulty_proxy(client.address) as proxy:
        report = into(client, index_name, new, url=proxy.url, since=old.path, delete_missing=True)
    assert (report.documents, report.acknowledged, report.unchanged, report.deleted) == (20, 20, 15, 2)
    assert (report.shards, report.loaded_shards) == (4, 4)
    # Documents of about 70 bytes: five that differ and two to delete, not twenty.
    assert sum(proxy.bulk_sizes) < 800
    assert titles_in(client, index_name) == titles_of(NEW, NEW_TITLES)
    found = checked(client, index_name, new)
    assert found.same and (found.index_documents, found.expected_documents) == (20, 20)
    now = stamp(client, index_name)
    assert (now.run_id, now.load, now.only_run, now.runs) == (
        new.manifest.run_id,
        "done",
        new.manifest.run_id,
        (now.run_id,),
    )


def test_without_delete_missing_the_documents_that_are_gone_stay(
    client: Client, index_name: str, old: Run, new: Run
) -> None:
    into(client, index_name, old)
    assert into(client, index_name, new, since=old.path).deleted == 0
    assert titles_in(client, index_name) == titles_of({**OLD, **NEW}, NEW_TITLES)
    assert checked(client, index_name, new).same
    assert stamp(client, index_name).only_run is None
    # The same command with --delete-missing does what is left.
    again = into(client, index_name, new, since=old.path, delete_missing=True)
    assert (again.loaded_shards, again.deleted) == (0, 2)
    found = checked(client, index_name, new)
    assert found.same and found.expected_documents == 20


def test_the_same_since_again_sends_and_deletes_nothing(client: Client, index_name: str, old: Run, new: Run) -> None:
    into(client, index_name, old)
    into(client, index_name, new, since=old.path, delete_missing=True)
    for options in ({"since": old.path, "delete_missing": True}, {"since": old.path}, {}):
        with faulty_proxy(client.address) as proxy:
            report = into(client, index_name, new, url=proxy.url, **options)
        assert (report.loaded_shards, report.deleted, report.acknowledged) == (0, 0, 20)
        assert proxy.bulk_sizes == []
    assert stamp(client, index_name).load == "done"


def test_forth_and_back_and_forth_again(client: Client, index_name: str, old: Run, new: Run) -> None:
    """The journals of earlier loads do not count once another run was loaded."""
    into(client, index_name, old)
    forth = (new, old, NEW, NEW_TITLES)
    for run, before, documents, titles in (forth, (old, new, OLD, TITLES), forth):
        report = into(client, index_name, run, since=before.path, delete_missing=True)
        assert (report.unchanged, report.deleted) == (15, 2)
        assert titles_in(client, index_name) == titles_of(documents, titles)
        assert checked(client, index_name, run).same


def test_a_run_that_is_loaded_again_after_another_one_is_sent_again(
    client: Client, index_name: str, old: Run, new: Run
) -> None:
    into(client, index_name, old)
    into(client, index_name, new)
    assert into(client, index_name, old).loaded_shards == 4
    assert checked(client, index_name, old).same
    assert titles_in(client, index_name)["d19"] == "Title of d19"


def test_documents_that_were_refused_of_the_older_run_are_sent_again(
    client: Client, index_name: str, tmp_path: Path
) -> None:
    body = tmp_path / "body.json"
    properties = {"sparse": {"type": "rank_features"}, "title": {"type": "integer", "ignore_malformed": False}}
    body.write_text(json.dumps({"mappings": {"dynamic": False, "properties": properties}}))
    titles: dict[str, dict[str, object]] = {doc_id: {"title": 1} for doc_id in {**OLD, **NEW}} | {
        "d5": {"title": "word"}
    }
    old, new = made(tmp_path / "old", OLD, fields=titles), made(tmp_path / "new", NEW, fields=titles)
    assert into(client, index_name, old, pipeline=Pipeline(index=IndexSettings(body=str(body)))).refused == 1
    report = into(client, index_name, new, since=old.path, delete_missing=True)
    # d5 is refused again and named again; d19 is the same here.
    assert (report.unchanged, report.acknowledged, report.refused) == (15, 19, 1)
    assert "d5" in Path(report.dead or "").read_text()
    assert checked(client, index_name, new).same


def test_a_document_that_is_refused_as_it_is_now_leaves_the_older_one_and_the_index_of_two_runs(
    client: Client, index_name: str, tmp_path: Path
) -> None:
    body = tmp_path / "body.json"
    properties = {"sparse": {"type": "rank_features"}, "title": {"type": "integer"}}
    body.write_text(json.dumps({"mappings": {"dynamic": False, "properties": properties}}))
    titles: dict[str, dict[str, object]] = {doc_id: {"title": 1} for doc_id in {**OLD, **NEW}}
    old = made(tmp_path / "old", OLD, fields=titles)
    new = made(tmp_path / "new", NEW, fields={**titles, "d5": {"title": "word"}})
    into(client, index_name, old, pipeline=Pipeline(index=IndexSettings(body=str(body))))
    report = into(client, index_name, new, since=old.path, delete_missing=True)
    assert (report.refused, report.deleted) == (1, 2)
    assert titles_in(client, index_name)["d5"] == 1
    assert stamp(client, index_name).only_run is None
    assert checked(client, index_name, new).same


def refusals(
    old: Run, new: Run, tmp_path: Path
) -> list[tuple[Callable[[Client, str], Any], dict[str, Any], type, str]]:
    """What is in the index, what is asked, and the sentence."""
    other = made(tmp_path / "other", {"d1": {"river": 1.0}})

    def unfinished(client: Client, index: str) -> None:
        with pytest.raises(Interrupted):
            into(client, index, old, stop=iter([False, True]).__next__)

    def without_journal(client: Client, index: str) -> None:
        into(client, index, old)
        journal = open_journal(old.path, client.cluster_uuid, there(client, index).uuid)
        lines = (journal.dead_path.parent / "journal.jsonl").read_text().splitlines(keepends=True)
        (journal.dead_path.parent / "journal.jsonl").write_text("".join(lines[:2]))

    def of_somebody(client: Client, index: str) -> None:
        client.call("PUT", f"/{index}", {"mappings": {"properties": {"sparse": {"type": "rank_features"}}}})

    def held(client: Client, index: str, **settings: Any) -> None:
        into(client, index, old, **settings)

    since = {"since": old.path}
    return [
        (lambda client, index: None, since, ClusterError, "There is no index"),
        (of_somebody, since, ClusterError, "its _meta names no run"),
        (lambda client, index: into(client, index, other), since, ClusterError, "_meta names run [0-9a-f]{8}. Finish"),
        (unfinished, since, ClusterError, "whose load is not finished"),
        (without_journal, since, RunError, "no whole journal .* .2 of 4 shards"),
        (held, {"since": new.path}, UsageError, "the run that is to be loaded"),
        (lambda client, index: held(client, index, top_k=1), since, ClusterError, "was loaded .*; this load asks"),
        (held, {**since, "update": True}, RunError, "was loaded without --update"),
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


def test_an_unfinished_load_of_differences_is_not_ended_as_another_one(
    client: Client, index_name: str, old: Run, new: Run
) -> None:
    into(client, index_name, old)
    with pytest.raises(Interrupted):
        into(client, index_name, new, since=old.path, delete_missing=True, stop=iter([False, True]).__next__)
    for options in ({}, {"since": old.path}):
        with pytest.raises(ClusterError, match="begun with --since OLD_RUN --delete-missing"):
            into(client, index_name, new, **options)
    report = into(client, index_name, new, since=old.path, delete_missing=True)
    assert (report.acknowledged, report.deleted) == (20, 2)
    assert checked(client, index_name, new).same


def test_an_unfinished_run_deletes_nothing(client: Client, index_name: str, old: Run, tmp_path: Path) -> None:
    into(client, index_name, old)
    half = made(tmp_path / "half", {"d1": {"river": 1.0}}, complete=False)
    with pytest.raises(RunError, match="would delete documents that it still lacks"):
        into(client, index_name, half, since=old.path, delete_missing=True, partial=True)
    assert len(titles_in(client, index_name)) == 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"delete_missing": True}, "belongs to --since OLD_RUN"),
        ({"replace": True, "update": True}, "--replace deletes what"),
        ({"replace": True, "since": "old"}, "--replace deletes what"),
        ({"since": "old", "delete_missing": True, "update": True}, "would delete them"),
    ],
)
def test_options_that_exclude_each_other(
    client: Client, index_name: str, old: Run, new: Run, options: dict[str, Any], message: str
) -> None:
    options |= {"since": old.path} if "since" in options else {}
    with pytest.raises(UsageError, match=message):
        into(client, index_name, new, **options)
    with pytest.raises(UsageError, match="--alias makes a new index"):
        publish(new.path, alias=index_name, pipeline=Pipeline(), connection=Connection(client.address), update=True)


def test_the_command_does_it_and_says_so(
    client: Client, index_name: str, old: Run, new: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    into(client, index_name, old)
    arguments = [new.path, "--index", index_name, "--url", client.address, "--since", old.path, "--delete-missing"]
    assert loading.load.main([str(one) for one in arguments], standalone_mode=False) == 0
    shown = capsys.readouterr().out
    assert "20 of 20 documents" in shown and "15 of them did not differ" in shown and "2 documents that only" in shown


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 30))])
def test_killed_at_random_requests_the_index_becomes_the_newer_run(
    client: Client, index_name: str, tmp_path: Path, seed: int
) -> None:
    chance = random.Random(seed)
    vectors = [{doc_id: {"river": chance.uniform(1, 2)} for doc_id in map(str, range(240))} for _ in range(2)]
    same = set(chance.sample(sorted(vectors[0]), 120))
    old = made(tmp_path / "old", vectors[0], shard_rows=20, fields={doc_id: {} for doc_id in vectors[0]})
    wanted = {doc_id: vectors[doc_id not in same][doc_id] for doc_id in chance.sample(sorted(vectors[0]), 200)}
    new = made(tmp_path / "new", wanted, shard_rows=20, fields={doc_id: {} for doc_id in vectors[0]})
    into(client, index_name, old)
    asked = [new.path, "--index", index_name, "--since", old.path, "--delete-missing", "--url", client.address]
    codes = []
    for _ in range(3):
        # Of any number of requests, and a moment after it: in the middle of the shards, of the deletes, of the stamps.
        moment = f"during:{chance.randrange(2, 34)}:{chance.uniform(0, 0.004):.6f}"
        command = [sys.executable, KILLED_LOAD, moment, "load", *asked]
        codes.append(subprocess.run([str(one) for one in command], capture_output=True, timeout=120).returncode)
    assert set(codes) <= {0, -signal.SIGKILL} and -signal.SIGKILL in codes
    report = into(client, index_name, new, since=old.path, delete_missing=True)
    assert (report.acknowledged, report.refused, report.shards) == (200, 0, 10)
    found = checked(client, index_name, new)
    assert found.same and (found.index_documents, found.expected_documents, found.checked_documents) == (200, 200, 200)
    assert stamp(client, index_name).load == "done"


def theirs(client: Client, index: str, **mappings: Any) -> None:
    """An index that somebody else made, with the documents of OLD and no vectors."""
    mappings.setdefault("properties", {"title": {"type": "text"}})
    client.call("PUT", f"/{index}", {"mappings": mappings})
    lines = [line for doc_id in OLD for line in ({"index": {"_id": doc_id}}, {"title": f"Their {doc_id}"})]
    body = "".join(json.dumps(line) + "\n" for line in lines).encode()
    assert not client.call("POST", f"/{index}/_bulk", body, params={"refresh": "true"})["errors"]


def source_of(client: Client, index: str, doc_id: str) -> dict[str, Any]:
    return dict(client.call("GET", f"/{index}/_doc/{doc_id}")["_source"])


def test_update_adds_the_vectors_to_documents_that_exist_and_nothing_else(
    client: Client, index_name: str, new: Run
) -> None:
    theirs(client, index_name)
    notes: list[str] = []
    report = into(client, index_name, new, update=True, note=notes.append)
    assert (report.documents, report.acknowledged, report.refused) == (20, 18, 2)
    letters = [json.loads(line) for line in Path(report.dead or "").read_text().splitlines()]
    assert {letter["id"]: letter["status"] for letter in letters} == dict.fromkeys(ADDED, 404)
    assert all("document_missing_exception" in letter["reason"] for letter in letters)
    client.call("POST", f"/{index_name}/_refresh")
    assert titles_in(client, index_name) == {doc_id: f"Their {doc_id}" for doc_id in OLD}
    found = checked(client, index_name, new)
    assert found.same and found.refused_documents == 2 and found.expected_documents is None
    assert "keeps the vectors in _source" in " ".join(notes)
    assert source_of(client, index_name, "d3")["sparse"] == {"river": 9.0}


@pytest.mark.parametrize("excludes", [[], ["sparse"], ["spar*"]])
def test_a_second_update_replaces_every_token_of_the_first(
    client: Client, index_name: str, tmp_path: Path, excludes: list[str]
) -> None:
    """A partial document is merged into _source by OpenSearch: a vector that stands there would keep its old tokens."""
    theirs(client, index_name, _source={"excludes": excludes})
    first = made(tmp_path / "first", {doc_id: {"river": 1.0, "cloud": 2.0} for doc_id in OLD})
    second = made(tmp_path / "second", {doc_id: {"stone": 1.0} if doc_id != "d1" else {} for doc_id in OLD})
    into(client, index_name, first, update=True)
    report = into(client, index_name, second, update=True)
    assert (report.acknowledged, report.refused) == (20, 0)
    assert checked(client, index_name, second).same
    assert titles_in(client, index_name)["d7"] == "Their d7"
    assert source_of(client, index_name, "d7").get("sparse") == (None if excludes else {"stone": 1.0})


def test_an_update_of_somebody_else_loses_a_vector_outside_source_and_keeps_one_inside(
    client: Client, index_name: str, tmp_path: Path
) -> None:
    run = made(tmp_path / "run", OLD)
    for name, excludes, differing in (("inside", [], 0), ("outside", ["sparse"], 2)):
        index = f"{index_name}-{name}"
        theirs(client, index, _source={"excludes": excludes})
        notes: list[str] = []
        into(client, index, run, update=True, note=notes.append)
        assert ("loses its vector" in " ".join(notes)) == bool(excludes)
        client.call("POST", f"/{index}/_update/d4", {"doc": {"title": "changed"}})
        assert checked(client, index, run).differing == differing


@pytest.mark.parametrize(
    ("mappings", "message"),
    [
        ({"_source": {"enabled": False}}, "keeps no _source"),
        ({"_source": {"excludes": ["embed*"]}}, "leaves embedding out of _source"),
        ({"_source": {"excludes": ["*embedding"]}}, "leaves embedding, more.embedding out of _source"),
        ({"_source": {"excludes": ["more"]}}, "leaves more.embedding out of _source"),
        ({"_source": {"includes": ["title", "embedding", "sparse"]}}, "leaves more.embedding out of _source"),
    ],
)
def test_update_is_refused_where_it_would_lose_a_field(
    client: Client, index_name: str, new: Run, mappings: dict[str, Any], message: str
) -> None:
    vector = {"type": "rank_features"}
    mappings = {**mappings, "properties": {"title": {"type": "text"}, "embedding": vector,
                                           "more": {"properties": {"embedding": vector}}}}  # fmt: skip
    client.call("PUT", f"/{index_name}", {"mappings": mappings})
    before = there(client, index_name)
    with pytest.raises(ClusterError, match=message):
        into(client, index_name, new, update=True)
    assert there(client, index_name) == before


def test_update_needs_an_index(client: Client, index_name: str, new: Run) -> None:
    with pytest.raises(ClusterError, match="There is no index .*; --update adds vectors to documents that exist"):
        into(client, index_name, new, update=True)
    assert indexes.find_index(client, index_name) is None


def test_update_into_a_nested_name_and_since_on_top(client: Client, index_name: str, old: Run, new: Run) -> None:
    theirs(client, index_name, _source={"excludes": ["vectors"]})
    pipeline = Pipeline(index=IndexSettings(field="vectors.sparse"))
    into(client, index_name, old, update=True, pipeline=pipeline)
    report = into(client, index_name, new, update=True, since=old.path, pipeline=pipeline)
    assert (report.unchanged, report.acknowledged, report.refused) == (15, 18, 2)
    assert checked(client, index_name, new).same
    with pytest.raises(RunError, match="loaded with --update"):
        into(client, index_name, old, since=new.path, pipeline=pipeline)


def test_update_into_a_sparse_vector_field_also_takes_vectors_away(
    client: Client, index_name: str, tmp_path: Path
) -> None:
    """An empty sparse_vector is no value, and a partial document without one would change nothing."""
    sparse = {"type": "sparse_vector", "method": {"name": "seismic"}}
    mappings = {"_source": {"excludes": ["sparse"]}, "properties": {"title": {"type": "text"}, "sparse": sparse}}
    client.call("PUT", f"/{index_name}", {"settings": {"index.sparse": True}, "mappings": mappings})
    pipeline = Pipeline(index=IndexSettings(kind="sparse_vector"))
    whole, fewer = (
        made(tmp_path / name, {"d1": {"river": 1.0}, "d2": second})
        for name, second in (("a", {"stone": 1.0}), ("b", {}))
    )
    into(client, index_name, whole, pipeline=pipeline)
    into(client, index_name, fewer, pipeline=pipeline, update=True)
    assert checked(client, index_name, fewer).same
    assert titles_in(client, index_name) == {"d1": "Title of d1", "d2": "Title of d2"}
    assert checked(client, index_name, whole).differing == 1


def test_a_sparse_vector_field_cannot_be_added_later(client: Client, index_name: str, new: Run) -> None:
    theirs(client, index_name)
    with pytest.raises(ClusterError, match="a sparse_vector field needs index settings that only a new index takes"):
        into(client, index_name, new, update=True, pipeline=Pipeline(index=IndexSettings(kind="sparse_vector")))
