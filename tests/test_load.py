"""`load` end to end, against the real server: from nothing, again, after a kill, and with documents it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import click
import pytest
from faulty_proxy import faulty_proxy
from made_runs import DOCUMENTS, make_run

from sparse_ingest.cli import loading
from sparse_ingest.errors import ClusterError, Interrupted, RunError, UsageError
from sparse_ingest.load import LoadReport, load
from sparse_ingest.opensearch import indexes, settings_guard
from sparse_ingest.opensearch.client import Client, Connection, connect
from sparse_ingest.opensearch.journal import open_journal
from sparse_ingest.opensearch.pacing import Pace
from sparse_ingest.opensearch.sending import Retries
from sparse_ingest.pipeline import IndexSettings, Pipeline
from sparse_ingest.runs.ids import find_duplicates, remove_rows
from sparse_ingest.runs.manifest import Run, SkippedRow
from sparse_ingest.runs.shards import read_shard, shard_schema_of, write_shard
from sparse_ingest.verify import verify

MANY = {f"d{number}": {"river": 0.5 + number / 64, "stone": 1 / (number + 1)} for number in range(60)}


@pytest.fixture
def client(opensearch_url: str) -> Iterator[Client]:
    with closing(connect(Connection(opensearch_url))) as client:
        yield client


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make_run(tmp_path / "run")


def into(client: Client, index: str, run: Run, **settings) -> LoadReport:
    pipeline = settings.pop("pipeline", Pipeline())
    return load(run.path, index=index, pipeline=pipeline, connection=Connection(client.address), **settings)


def stamped(client: Client, index: str) -> indexes.Stamp:
    found = indexes.find_index(client, index)
    assert found is not None
    assert found.stamp is not None
    return found.stamp


def ids_in(client: Client, index: str) -> set[str]:
    answer = client.call("POST", f"/{index}/_search", {"size": 1000, "_source": False, "track_total_hits": True})
    hits = answer["hits"]["hits"]
    assert answer["hits"]["total"]["value"] == len(hits)
    return {hit["_id"] for hit in hits}


def broken_titles(tmp_path: Path) -> Pipeline:
    """A body whose title is a number, so that a document with a word as title is refused."""
    path = tmp_path / "body.json"
    properties = {"sparse": {"type": "rank_features"}, "title": {"type": "integer"}}
    path.write_text(json.dumps({"mappings": {"dynamic": False, "properties": properties}}))
    return Pipeline(index=IndexSettings(body=str(path)))


def run_with_bad_titles(folder: Path, bad: tuple[str, ...]) -> Run:
    titles = {doc_id: {"title": "word" if doc_id in bad else 1} for doc_id in DOCUMENTS}
    return make_run(folder, fields=titles, shard_rows=2)


def test_a_missing_index_is_made_filled_and_stamped(client: Client, index_name: str, run: Run) -> None:
    seen: list[int] = []
    report = into(client, index_name, run, progress=seen.append)
    assert (report.documents, report.acknowledged, report.refused) == (5, 5, 0)
    assert (report.shards, report.loaded_shards, report.dead) == (2, 2, None)
    assert seen[0] == 0
    assert seen[-1] == 5
    assert ids_in(client, index_name) == set(DOCUMENTS)
    stamp = stamped(client, index_name)
    assert (stamp.load, stamp.run_id, stamp.model) == ("done", run.manifest.run_id, run.manifest.model)
    entry = client.call("GET", f"/{index_name}")[index_name]
    assert entry["aliases"] == {}
    hit = client.call("GET", f"/{index_name}/_doc/words")
    assert hit["_source"] == {"title": "Title of words", "text": "Text of words."}


def test_the_same_load_again_sends_nothing(client: Client, index_name: str, run: Run) -> None:
    into(client, index_name, run)
    with faulty_proxy(client.address) as proxy:
        again = load(run.path, index=index_name, pipeline=Pipeline(), connection=Connection(proxy.url))
    assert (again.loaded_shards, again.acknowledged) == (0, 5)
    assert proxy.bulk_sizes == []


def test_source_keep_leaves_the_vector_in_source(client: Client, index_name: str, run: Run) -> None:
    into(client, index_name, run, pipeline=Pipeline(index=IndexSettings(source="keep", field="v")))
    assert client.call("GET", f"/{index_name}/_doc/empty")["_source"]["v"] == {}
    assert client.call("GET", f"/{index_name}/_doc/nasty")["_source"]["v"].keys() == DOCUMENTS["nasty"].keys()


def test_a_mapping_that_does_not_fit_is_refused_before_anything_is_sent(
    client: Client, index_name: str, run: Run
) -> None:
    client.call("PUT", f"/{index_name}", {"mappings": {"properties": {"sparse": {"type": "text"}}}})
    with pytest.raises(ClusterError, match="is text; expected is rank_features"):
        into(client, index_name, run)
    assert not (run.path / "load").exists()


def test_an_index_of_somebody_else_is_filled_and_keeps_its_meta(client: Client, index_name: str, run: Run) -> None:
    properties = {"sparse": {"type": "rank_features"}}
    client.call("PUT", f"/{index_name}", {"mappings": {"_meta": {"owner": "me"}, "properties": properties}})
    client.call("PUT", f"/{index_name}/_doc/theirs", {"title": "x"})
    into(client, index_name, run)
    assert ids_in(client, index_name) == {*DOCUMENTS, "theirs"}
    assert client.call("GET", f"/{index_name}")[index_name]["mappings"]["_meta"]["owner"] == "me"
    assert stamped(client, index_name).only_run is None


def test_a_run_of_another_model_is_refused_and_a_second_run_of_the_same_is_not(
    client: Client, index_name: str, run: Run, tmp_path: Path
) -> None:
    into(client, index_name, run)
    other = make_run(tmp_path / "other", model="another-model")
    with pytest.raises(ClusterError, match="vectors of 'made-by-hand', this run is of 'another-model'"):
        into(client, index_name, other)
    more = make_run(tmp_path / "more", {"new": {"river": 1.0}})
    assert into(client, index_name, more).acknowledged == 1
    assert ids_in(client, index_name) == {*DOCUMENTS, "new"}
    assert stamped(client, index_name).only_run is None


def test_load_through_an_alias_reaches_its_index(client: Client, index_name: str, run: Run) -> None:
    into(client, index_name, run)
    alias = f"{index_name}-alias"
    client.call("POST", "/_aliases", {"actions": [{"add": {"index": index_name, "alias": alias}}]})
    report = into(client, alias, run)
    assert (report.index, report.loaded_shards) == (index_name, 0)
    with pytest.raises(UsageError, match="is an alias of"):
        into(client, alias, run, replace=True)


def test_an_unfinished_run_needs_partial_and_stays_unfinished(client: Client, index_name: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", complete=False)
    with pytest.raises(RunError, match="is not complete: 2 shards are finished.*--partial"):
        into(client, index_name, run)
    assert indexes.find_index(client, index_name) is None
    assert into(client, index_name, run, partial=True).acknowledged == 5
    assert stamped(client, index_name).load == "loading"


def test_a_carried_field_named_like_the_sparse_field_is_refused_before_an_index_is_made(
    client: Client, index_name: str, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", fields={doc_id: {"sparse": "as hair"} for doc_id in DOCUMENTS})
    with pytest.raises(RunError, match="carry a field 'sparse'"):
        into(client, index_name, run)
    assert indexes.find_index(client, index_name) is None


def test_stop_ends_after_a_shard_and_the_next_load_goes_on(client: Client, index_name: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", MANY, shard_rows=20)
    answers = iter([False, True])
    with pytest.raises(Interrupted, match="continues with shard 1"):
        into(client, index_name, run, stop=lambda: next(answers))
    assert stamped(client, index_name).load == "loading"
    report = into(client, index_name, run)
    assert (report.loaded_shards, report.acknowledged) == (2, 60)
    assert stamped(client, index_name).load == "done"


def test_replace_deletes_a_finished_index_and_resumes_an_unfinished_load_of_this_run(
    client: Client, index_name: str, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", MANY, shard_rows=20)
    first = into(client, index_name, run)
    second = into(client, index_name, run, replace=True)
    assert second.uuid != first.uuid
    assert second.loaded_shards == 3
    with pytest.raises(Interrupted):
        answers = iter([False, True])
        into(client, index_name, run, replace=True, stop=lambda: next(answers))
    third = into(client, index_name, run, replace=True)
    assert (third.loaded_shards, third.acknowledged) == (2, 60)
    with pytest.raises(Interrupted):
        answers = iter([False, True])
        into(client, index_name, run, replace=True, stop=lambda: next(answers))
    fourth = into(client, index_name, run, replace=True, from_scratch=True)
    assert fourth.loaded_shards == 3
    with pytest.raises(UsageError, match="belongs to --replace"):
        into(client, index_name, run, from_scratch=True)


def test_an_index_that_is_deleted_during_the_load_stops_it(client: Client, index_name: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", MANY, shard_rows=20)
    properties = {"sparse": {"type": "rank_features"}}

    def delete_and_make_again(documents: int) -> None:
        if documents == 20:
            client.call("DELETE", f"/{index_name}")
            client.call("PUT", f"/{index_name}", {"mappings": {"properties": properties}})

    with pytest.raises(ClusterError, match="now has UUID"):
        into(client, index_name, run, progress=delete_and_make_again)
    report = into(client, index_name, run)
    assert (report.loaded_shards, report.acknowledged) == (3, 60)
    assert ids_in(client, index_name) == set(MANY)


def test_refused_documents_become_dead_letters_and_exit_code_3(
    client: Client, index_name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_with_bad_titles(tmp_path / "run", ("words", "empty"))
    report = into(client, index_name, run, pipeline=broken_titles(tmp_path))
    assert (report.documents, report.acknowledged, report.refused) == (5, 3, 2)
    letters = [json.loads(line) for line in Path(report.dead or "").read_text().splitlines()]
    assert [(letter["id"], letter["shard"], letter["row"], letter["status"]) for letter in letters] == [
        ("empty", 0, 1, 400),
        ("words", 1, 2, 400),
    ]
    assert "mapper_parsing_exception" in letters[0]["reason"]
    assert ids_in(client, index_name) == {*DOCUMENTS} - {"words", "empty"}
    arguments = [str(run.path), "--index", index_name, "--url", client.address]
    assert loading.load.main(arguments, standalone_mode=False) == 3
    assert "OpenSearch refused 2 documents" in capsys.readouterr().err
    checked = verify(run.path, index=index_name, connection=Connection(client.address))
    assert checked.same
    assert (checked.checked_documents, checked.refused_documents, checked.expected_documents) == (3, 2, 3)


def test_a_shard_that_is_loaded_again_does_not_double_its_dead_letters(
    client: Client, index_name: str, tmp_path: Path
) -> None:
    run = run_with_bad_titles(tmp_path / "run", ("words", "empty"))
    report = into(client, index_name, run, pipeline=broken_titles(tmp_path))
    journal = Path(report.journal) / "journal.jsonl"
    journal.write_text(journal.read_text().splitlines(keepends=True)[0])
    again = into(client, index_name, run)
    assert (again.loaded_shards, again.refused, again.acknowledged) == (2, 2, 3)


def test_faults_on_the_way_lose_and_double_nothing(client: Client, index_name: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", MANY, shard_rows=10)
    faults = [429, None, "lost answer", "drop", "reject first", 503, "garbage", "reject first"]
    with faulty_proxy(client.address, faults) as proxy:
        report = load(
            run.path,
            index=index_name,
            pipeline=Pipeline(),
            connection=Connection(proxy.url),
            retries=Retries(base_s=0.01, cap_s=0.05),
        )
    assert (report.acknowledged, report.refused) == (60, 0)
    assert ids_in(client, index_name) == set(MANY)
    assert verify(run.path, index=index_name, connection=Connection(client.address), sample=None).same


LOAD = """
import sys
from pathlib import Path
from sparse_ingest.load import load
from sparse_ingest.opensearch.client import Connection
from sparse_ingest.pipeline import Pipeline
load(Path(sys.argv[1]), index=sys.argv[2], pipeline=Pipeline(), connection=Connection(sys.argv[3]))
"""


def start_loading(run: Run, index: str, url: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", LOAD, str(run.path), index, url], stderr=subprocess.PIPE)


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_ctrl_c_stops_promptly_while_the_cluster_does_not_answer(client: Client, index_name: str, run: Run) -> None:
    with faulty_proxy(client.address, [503] * 1000) as proxy:
        process = start_loading(run, index_name, proxy.url)
        deadline = time.monotonic() + 30
        while not proxy.bulk_sizes and time.monotonic() < deadline:
            time.sleep(0.01)
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)
        assert time.monotonic() - started < 2
    assert process.returncode != 0


def test_two_loads_of_one_run_into_one_index_do_not_meet(client: Client, index_name: str, run: Run) -> None:
    def second(documents: int) -> None:
        with pytest.raises(RunError, match="Another process is loading"):
            into(client, index_name, run)

    into(client, index_name, run, progress=second)


def test_the_command_prints_a_report(
    client: Client, index_name: str, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(run.path), "--index", index_name, "--url", client.address, "--json"]
    assert loading.load.main(arguments, standalone_mode=False) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["acknowledged"] == 5
    assert loading.verify.main(arguments, standalone_mode=False) == 0
    assert json.loads(capsys.readouterr().out)["same"] is True


def test_a_shard_that_lost_a_row_to_another_is_not_trusted(client: Client, index_name: str, tmp_path: Path) -> None:
    """Loaded in part, then a duplicate id left the later shard: its vector must not stay in the index."""
    documents = {"a": {"river": 1.0}, "b": {"river": 2.0}, "c": {"river": 3.0}, "d": {"river": 4.0}}
    run = make_run(tmp_path / "run", documents, shard_rows=2, complete=False)
    parts = list(read_shard(run.shard_path(1)))
    twice = [part._replace(vectors=part.vectors._replace(doc_ids=["a", "d"])) for part in parts]
    schema = shard_schema_of(run.shard_path(1))
    sha256 = write_shard(twice, scratch=run.scratch_path("part"), target=run.shard_path(1), schema=schema)
    run.mark_done(1, {**(run.done(1) or {}), "sha256": sha256})
    with pytest.raises(ClusterError, match="holds 3 documents, but 4"):
        into(client, index_name, run, partial=True)
    [duplicate] = find_duplicates(run)
    remove_rows(run, 1, {duplicate.again[1]: SkippedRow(duplicate.again[1], "corpus.jsonl", 3, "duplicate id")})
    run.mark_complete({"rows": 3, "shards": 2})
    into(client, index_name, run)
    report = verify(run.path, index=index_name, connection=Connection(client.address), sample=None)
    assert report.same, report


SETTINGS = ("refresh_interval", "number_of_replicas", "translog.durability")


def settings_of(client: Client, index: str) -> tuple[str | None, ...]:
    there = indexes.find_index(client, index)
    assert there is not None
    return tuple(there.setting(name) for name in SETTINGS)


def test_settings_for_loading_last_as_long_as_the_load(client: Client, index_name: str, run: Run) -> None:
    seen: set[tuple[str | None, ...]] = set()
    into(client, index_name, run, progress=lambda _: seen.add(settings_of(client, index_name)))
    assert seen == {("-1", "0", None)}
    assert settings_of(client, index_name) == (None, "1", None)
    assert stamped(client, index_name).settings == {}


def test_a_load_that_was_stopped_puts_the_settings_back(client: Client, index_name: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", MANY, shard_rows=20)
    answers = iter([False, True])
    with pytest.raises(Interrupted):
        into(client, index_name, run, stop=lambda: next(answers))
    assert settings_of(client, index_name) == (None, "1", None)


def test_settings_that_a_killed_load_left_are_put_back_by_one_that_sends_nothing_and_by_restore(
    client: Client, index_name: str, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    into(client, index_name, run)
    there = indexes.find_index(client, index_name)
    assert there is not None
    for arguments in ([str(run.path), "--index", index_name], ["--index", index_name, "--restore"]):
        settings_guard.tune(client, there, settings_guard.LOADING, print)
        assert settings_of(client, index_name) == ("-1", "0", None)
        assert loading.load.main([*arguments, "--url", client.address], standalone_mode=False) == 0
        assert settings_of(client, index_name) == (None, "1", None)
    assert "put back number_of_replicas, refresh_interval" in capsys.readouterr().out


def test_an_index_of_somebody_else_keeps_its_settings_unless_tune_is_asked(
    client: Client, index_name: str, run: Run
) -> None:
    mappings = {"properties": {"sparse": {"type": "rank_features"}}}
    client.call("PUT", f"/{index_name}", {"settings": {"refresh_interval": "9s"}, "mappings": mappings})
    seen: set[tuple[str | None, ...]] = set()
    into(client, index_name, run, progress=lambda _: seen.add(settings_of(client, index_name)))
    assert seen == {("9s", "1", None)}
    seen.clear()
    more = make_run(run.path.with_name("more"), {"new": {"river": 1.0}})
    into(client, index_name, more, tune=True, progress=lambda _: seen.add(settings_of(client, index_name)))
    assert seen == {("-1", "0", None)}
    assert settings_of(client, index_name) == ("9s", "1", None)


def test_async_translog_is_said_and_ends_with_the_load(client: Client, index_name: str, run: Run) -> None:
    said: list[str] = []
    seen: set[tuple[str | None, ...]] = set()
    report = into(
        client,
        index_name,
        run,
        async_translog=True,
        note=said.append,
        progress=lambda _: seen.add(settings_of(client, index_name)),
    )
    assert seen == {("-1", "0", "async")}
    assert settings_of(client, index_name) == (None, "1", None)
    assert report.acknowledged == 5
    assert said[0].startswith("--async-translog: ")


def test_a_primary_that_restarts_while_writes_are_confirmed_early_stops_the_load_before_the_shard_counts(
    client: Client, index_name: str, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", MANY, shard_rows=60)

    def restart(documents: int) -> None:
        if not documents:
            client.call("POST", f"/{index_name}/_close")
            client.call("POST", f"/{index_name}/_open", params={"wait_for_active_shards": "1"})

    with pytest.raises(ClusterError, match="was restarted or moved while the index confirmed writes early"):
        into(client, index_name, run, async_translog=True, progress=restart)
    report = into(client, index_name, run)
    assert (report.loaded_shards, report.acknowledged) == (1, 60)


def test_pruned_vectors_are_loaded_noted_and_other_pruning_is_refused(
    client: Client, index_name: str, run: Run
) -> None:
    report = into(client, index_name, run, top_k=2, max_ratio=0.4)
    assert report.acknowledged == 5
    assert stamped(client, index_name).pruning == {"top_k": 2, "max_ratio": 0.4}
    query = {"query": {"neural_sparse": {"sparse": {"query_tokens": dict.fromkeys(DOCUMENTS["words"], 1.0)}}}}
    hits = client.call("POST", f"/{index_name}/_search", query)["hits"]["hits"]
    [words] = [hit["_score"] for hit in hits if hit["_id"] == "words"]
    assert words == 1.5
    with pytest.raises(ClusterError, match="was loaded pruned by top_k 2 and max_ratio 0.4; .* vectors unpruned"):
        into(client, index_name, run)
    assert into(client, index_name, run, top_k=2, max_ratio=0.4).loaded_shards == 0
    assert into(client, index_name, run, replace=True, top_k=1).loaded_shards == 2


def test_an_unfinished_load_goes_on_only_by_the_rules_of_its_journal(
    client: Client, index_name: str, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", MANY, shard_rows=20)
    answers = iter([False, True])
    with pytest.raises(Interrupted):
        into(client, index_name, run, top_k=1, stop=lambda: next(answers))
    unpruned = replace(stamped(client, index_name), pruning=indexes.NO_PRUNING)
    there = indexes.find_index(client, index_name)
    assert there is not None
    indexes.stamp_index(client, there, unpruned)
    with pytest.raises(RunError, match="Shard 0 was loaded by the rules .*'top_k': 1.*, this load asks for"):
        into(client, index_name, run)


def test_dead_letters_are_sent_again_when_the_mapping_is_mended(
    client: Client, index_name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_with_bad_titles(tmp_path / "run", ("words", "empty"))
    pipeline = broken_titles(tmp_path)
    into(client, index_name, run, pipeline=pipeline)
    arguments = [str(run.path), "--index", index_name, "--url", client.address, "--retry-dead", "--json"]
    assert loading.load.main(arguments, standalone_mode=False) == 3
    report = json.loads(capsys.readouterr().out)
    assert (report["retried"], report["refused"], report["acknowledged"]) == (2, 2, 3)
    mended = {"properties": {"title": {"type": "integer", "ignore_malformed": True}}}
    client.call("PUT", f"/{index_name}/_mapping", mended)
    assert loading.load.main(arguments, standalone_mode=False) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["retried"], report["refused"], report["acknowledged"], report["dead"]) == (2, 0, 5, None)
    assert ids_in(client, index_name) == set(DOCUMENTS)
    lines = open_journal(run.path, client.cluster_uuid, report["uuid"]).finished().values()
    assert [(line["acknowledged"], line["refused"]) for line in lines] == [(2, 0), (2, 0), (1, 0)]
    assert verify(run.path, index=index_name, connection=Connection(client.address), sample=None).same


def test_merge_leaves_one_segment_a_shard(client: Client, index_name: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", MANY, shard_rows=20)
    into(client, index_name, run)
    client.call("PUT", f"/{index_name}/_doc/d1", {"title": "again"}, params={"refresh": "true"})
    client.call("DELETE", f"/{index_name}/_doc/d1", params={"refresh": "true"})
    for path in run.path.glob("load/*/*/journal.jsonl"):
        path.unlink()
    report = into(client, index_name, run, merge=True)
    assert (report.merged, report.acknowledged) == (True, 60)
    shards = client.call("GET", f"/{index_name}/_segments")["indices"][index_name]["shards"]
    assert [copy["num_search_segments"] for copies in shards.values() for copy in copies] == [1]


@pytest.mark.parametrize("block", ["read_only", "read_only_allow_delete", "write"])
def test_a_block_stops_the_load_with_a_sentence_and_what_was_done_is_kept(
    client: Client, index_name: str, tmp_path: Path, block: str
) -> None:
    run = make_run(tmp_path / "run", MANY, shard_rows=20)

    def set_block(value: bool) -> None:
        client.call("PUT", f"/{index_name}/_settings", {"index": {f"blocks.{block}": value}})

    answers = iter([False, True])
    with pytest.raises(Interrupted):
        into(client, index_name, run, stop=lambda: next(answers))
    set_block(True)
    with pytest.raises(ClusterError, match=r"takes no .*(block|full disk)"):
        into(client, index_name, run)
    set_block(False)
    report = into(client, index_name, run)
    assert (report.loaded_shards, report.acknowledged) == (2, 60)
    assert settings_of(client, index_name) == (None, "1", None)


def test_a_disk_that_fills_up_during_the_load_stops_it_and_it_goes_on_later(
    client: Client, index_name: str, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", MANY, shard_rows=20)
    said: list[str] = []

    def fill(documents: int) -> None:
        if documents == 0:
            client.call("PUT", f"/{index_name}/_settings", {"index": {"blocks.read_only_allow_delete": True}})

    with pytest.raises(ClusterError, match=r"OpenSearch takes no documents: .*Remove the cause \(a full disk"):
        into(client, index_name, run, progress=fill, note=said.append)
    assert any("keeps its settings for loading" in sentence for sentence in said)
    client.call("PUT", f"/{index_name}/_settings", {"index": {"blocks.read_only_allow_delete": None}})
    assert into(client, index_name, run).acknowledged == 60
    assert settings_of(client, index_name) == (None, "1", None)


def test_an_index_that_is_closed_during_the_load_makes_no_dead_letters(
    client: Client, index_name: str, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", MANY, shard_rows=60)

    def close(documents: int) -> None:
        client.call("POST", f"/{index_name}/_close")

    with pytest.raises(ClusterError):
        into(client, index_name, run, progress=close, retries=Retries(attempts=2, base_s=0.01))
    client.call("POST", f"/{index_name}/_open", params={"wait_for_active_shards": "1"})
    report = into(client, index_name, run)
    assert (report.refused, report.acknowledged) == (0, 60)


def test_the_rate_reaches_the_pace(client: Client, index_name: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float | None] = []

    class Watched(Pace):
        def __init__(self, *, max_rate: float | None) -> None:
            rates.append(max_rate)
            super().__init__(max_rate=max_rate)

    monkeypatch.setattr("sparse_ingest.load.Pace", Watched)
    arguments = [str(run.path), "--index", index_name, "--url", client.address, "--max-rate", "50"]
    assert loading.load.main(arguments, standalone_mode=False) == 0
    assert rates == [50.0]


@pytest.mark.parametrize(
    "arguments", [[], ["RUN"], ["RUN", "--index", "a", "--alias", "b"], ["--index", "a"], ["--alias", "a", "--restore"],
                  ["RUN", "--index", "a", "--to", "b"], ["RUN", "--index", "a", "--drop-old"]],
)  # fmt: skip
def test_a_command_line_without_one_target_is_refused(arguments: list[str]) -> None:
    with pytest.raises(click.UsageError):
        loading.load.main(arguments, standalone_mode=False)


def test_a_note_says_what_an_update_does_to_a_vector_outside_source(client: Client, index_name: str, run: Run) -> None:
    said: list[str] = []
    into(client, index_name, run, note=said.append)
    assert [sentence for sentence in said if "_update loses its vector" in sentence] == said[:1]
    said.clear()
    keep = Pipeline(index=IndexSettings(source="keep"))
    into(client, f"{index_name}-kept", run, pipeline=keep, note=said.append)
    assert said == []
