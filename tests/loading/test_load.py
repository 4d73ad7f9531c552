"""`load` end to end on a real server: a new index, a repeated load, a killed load, and refused documents."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import click
import pytest
from support.deadlines import HANGING_S, until
from support.faulty_proxy import faulty_proxy
from support.loads import MANY, StopBefore, broken_titles, ids_in, into, run_with_bad_titles, stamped
from support.reporters import Recorder
from support.runs import DOCUMENTS, make_run, write_shard

from sparse_ingest.cli import loading
from sparse_ingest.cluster import indexes
from sparse_ingest.cluster.client import Client, Connection
from sparse_ingest.cluster.journal import open_journal
from sparse_ingest.cluster.pacing import Pace
from sparse_ingest.cluster.sending import Retries
from sparse_ingest.cluster.stamps import NO_PRUNING
from sparse_ingest.errors import ClusterError, Interrupted, RunError, UsageError
from sparse_ingest.loading.load import load
from sparse_ingest.loading.publish import publish
from sparse_ingest.pipeline import IndexSettings, Pipeline
from sparse_ingest.runs.files import SkippedRow
from sparse_ingest.runs.ids import find_duplicates, remove_rows
from sparse_ingest.runs.run import Run
from sparse_ingest.runs.shards import read_shard, shard_schema_of
from sparse_ingest.verification.verify import verify

# Quick on Elasticsearch are the tests of requests and answers that differ between the products.
pytestmark = pytest.mark.both_products(quick=False)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make_run(tmp_path / "run")


@pytest.mark.both_products
def test_a_missing_index_is_created_filled_and_stamped(client: Client, index_name: str, run: Run) -> None:
    seen: list[int] = []
    report = into(client, index_name, run, progress=Recorder(seen.append))
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


def test_repeating_a_load_sends_nothing(client: Client, index_name: str, run: Run) -> None:
    into(client, index_name, run)
    with faulty_proxy(client.address) as proxy:
        again = load(run.path, index=index_name, pipeline=Pipeline(), connection=Connection(proxy.url))
    assert (again.loaded_shards, again.acknowledged) == (0, 5)
    assert proxy.bulk_sizes == []


def test_ids_with_line_breaks_reach_the_index_unchanged(client: Client, index_name: str, tmp_path: Path) -> None:
    ids = {"a\nb", "\r\n", '\n{"delete":{"_id":"a"}}\n', "\u2028", "\t", "a\x1fb", "\x1b[2J", "\\n"}
    run = make_run(tmp_path / "run", {doc_id: {"river": 1.0} for doc_id in sorted(ids)})
    assert into(client, index_name, run).acknowledged == len(ids)
    assert ids_in(client, index_name) == ids
    assert verify(run, index=index_name, url=client.address, sample=None).ok


@pytest.mark.opensearch_only
def test_source_keep_leaves_the_vector_in_source(client: Client, index_name: str, run: Run) -> None:
    into(client, index_name, run, pipeline=Pipeline(index=IndexSettings(source="keep", field="v")))
    assert client.call("GET", f"/{index_name}/_doc/empty")["_source"]["v"] == {}
    assert client.call("GET", f"/{index_name}/_doc/nasty")["_source"]["v"].keys() == DOCUMENTS["nasty"].keys()


@pytest.mark.both_products
def test_an_incompatible_mapping_is_refused_before_sending(client: Client, index_name: str, run: Run) -> None:
    client.call("PUT", f"/{index_name}", {"mappings": {"properties": {"sparse": {"type": "text"}}}})
    with pytest.raises(ClusterError, match="as text; expected rank_features"):
        into(client, index_name, run)
    assert not (run.path / "load").exists()


def test_an_index_of_another_client_is_filled_and_keeps_its_meta(client: Client, index_name: str, run: Run) -> None:
    properties = {"sparse": client.dialect.field_entry()}
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
    with pytest.raises(ClusterError, match="vectors of 'made-by-hand' with .*, but this run is of 'another-model'"):
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


def test_a_kept_field_named_like_the_sparse_field_is_refused_before_an_index_is_created(
    client: Client, index_name: str, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", fields={doc_id: {"sparse": "as hair"} for doc_id in DOCUMENTS})
    with pytest.raises(RunError, match="carry a field 'sparse'"):
        into(client, index_name, run)
    assert indexes.find_index(client, index_name) is None


def test_a_stop_request_ends_the_load_after_a_shard_and_the_next_load_resumes(
    client: Client, index_name: str, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", MANY, shard_rows=20)
    with pytest.raises(Interrupted, match="continues with shard 1"):
        into(client, index_name, run, progress=StopBefore(1))
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
        into(client, index_name, run, replace=True, progress=StopBefore(1))
    third = into(client, index_name, run, replace=True)
    assert (third.loaded_shards, third.acknowledged) == (2, 60)
    with pytest.raises(Interrupted):
        into(client, index_name, run, replace=True, progress=StopBefore(1))
    fourth = into(client, index_name, run, replace=True, from_scratch=True)
    assert fourth.loaded_shards == 3
    with pytest.raises(UsageError, match="needs --replace"):
        into(client, index_name, run, from_scratch=True)


def test_an_index_that_is_deleted_during_the_load_stops_it(client: Client, index_name: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", MANY, shard_rows=20)
    properties = {"sparse": client.dialect.field_entry()}

    def delete_and_recreate(documents: int) -> None:
        if documents == 20:
            client.call("DELETE", f"/{index_name}")
            client.call("PUT", f"/{index_name}", {"mappings": {"properties": properties}})

    # Noticed either by the next request, because the alias is gone, or at the end of the shard.
    with pytest.raises(ClusterError, match="now has UUID|deleted or its alias removed"):
        into(client, index_name, run, progress=Recorder(delete_and_recreate))
    report = into(client, index_name, run)
    assert (report.loaded_shards, report.acknowledged) == (3, 60)
    assert ids_in(client, index_name) == set(MANY)


def test_no_leftovers_are_reported_for_a_deleted_index(client: Client, index_name: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", MANY, shard_rows=20)

    def delete(documents: int) -> None:
        if documents == 20:
            client.call("DELETE", f"/{index_name}")

    recorder = Recorder(delete)
    with pytest.raises(ClusterError, match="is gone|deleted or its alias removed"):
        into(client, index_name, run, progress=recorder)
    assert [note for note in recorder.notes if "--restore" in note] == []


@pytest.mark.both_products
def test_refused_documents_become_dead_letters_and_exit_code_3(
    client: Client, index_name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_with_bad_titles(tmp_path / "run", ("words", "empty"))
    report = into(client, index_name, run, pipeline=broken_titles(tmp_path, client))
    assert (report.documents, report.acknowledged, report.refused) == (5, 3, 2)
    letters = [json.loads(line) for line in Path(report.dead or "").read_text().splitlines()]
    assert [(letter["id"], letter["shard"], letter["row"], letter["status"]) for letter in letters] == [
        ("empty", 0, 1, 400),
        ("words", 1, 2, 400),
    ]
    assert "parsing_exception" in letters[0]["reason"]
    assert ids_in(client, index_name) == {*DOCUMENTS} - {"words", "empty"}
    arguments = [str(run.path), "--index", index_name, "--url", client.address]
    assert loading.load.main(arguments, standalone_mode=False) == 3
    assert "The cluster refused 2 documents" in capsys.readouterr().err
    checked = verify(run.path, index=index_name, connection=Connection(client.address))
    assert checked.ok
    assert (checked.checked_documents, checked.refused_documents, checked.expected_documents) == (3, 2, 3)


def test_reloading_a_shard_does_not_duplicate_its_dead_letters(client: Client, index_name: str, tmp_path: Path) -> None:
    run = run_with_bad_titles(tmp_path / "run", ("words", "empty"))
    report = into(client, index_name, run, pipeline=broken_titles(tmp_path, client))
    journal = Path(report.journal) / "journal.jsonl"
    journal.write_text(journal.read_text().splitlines(keepends=True)[0])
    again = into(client, index_name, run)
    assert (again.loaded_shards, again.refused, again.acknowledged) == (2, 2, 3)


@pytest.mark.both_products
def test_connection_faults_lose_and_duplicate_nothing(client: Client, index_name: str, tmp_path: Path) -> None:
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
    assert verify(run.path, index=index_name, connection=Connection(client.address), sample=None).ok


# A shell ignores SIGINT for background jobs, and a child inherits that.
LOAD = """
import signal, sys
from pathlib import Path
from sparse_ingest.loading.load import load
from sparse_ingest.loading.publish import publish
from sparse_ingest.cluster.client import Connection
from sparse_ingest.pipeline import Pipeline
signal.signal(signal.SIGINT, signal.default_int_handler)
load(Path(sys.argv[1]), index=sys.argv[2], pipeline=Pipeline(), connection=Connection(sys.argv[3]))
"""


def start_loading(run: Run, index: str, url: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", LOAD, str(run.path), index, url], stderr=subprocess.PIPE)


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_ctrl_c_stops_promptly_while_the_cluster_does_not_answer(client: Client, index_name: str, run: Run) -> None:
    with faulty_proxy(client.address, [503] * 1000) as proxy:
        process = start_loading(run, index_name, proxy.url)
        until(lambda: proxy.bulk_sizes)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=HANGING_S)
    assert process.returncode != 0


@pytest.mark.parametrize(("option", "most"), [("--index", 231), ("--alias", 222)])
def test_a_name_too_long_for_a_private_alias_is_refused_before_any_request(run: Run, option: str, most: int) -> None:
    given = option.removeprefix("--")
    nowhere = {"connection": Connection("http://127.0.0.1:1")}
    stage = load if given == "index" else publish
    for name in ("x" * (most + 1), "é" * (most // 2 + 1)):
        with pytest.raises(UsageError) as caught:
            stage(run.path, **{given: name}, **nowhere)
        assert f"{option} {name!r} has {len(name.encode())} bytes" in str(caught.value)
        assert f"at most {most} bytes" in str(caught.value)
        assert "--sparse-ingest-" not in str(caught.value)
    with pytest.raises(ClusterError, match="Nothing listens"):
        stage(run.path, **{given: "x" * most}, **nowhere)


def test_the_longest_name_is_loaded(client: Client, index_name: str, run: Run) -> None:
    name = index_name + "x" * (231 - len(index_name))
    assert into(client, name, run).acknowledged == 5


def test_the_error_of_a_failed_write_names_the_file(client: Client, index_name: str, run: Run) -> None:
    """A full disk and a file size limit give an error without a file name; the limit needs no root."""
    command = [sys.executable, "-c", "from sparse_ingest.cli.main import main; main()"]
    ended = subprocess.run(
        [*command, "load", str(run.path), "--index", index_name, "--url", client.address],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (150, 150)),
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert ended.returncode == 1
    line = ended.stderr.splitlines()[-1]
    assert line.startswith(f"Error: {run.path}/load/")
    assert "journal.jsonl: File too large." in line


def test_a_second_load_of_the_same_run_into_the_same_index_is_refused(
    client: Client, index_name: str, run: Run
) -> None:
    def second(documents: int) -> None:
        with pytest.raises(RunError, match="Another process is loading"):
            into(client, index_name, run)

    into(client, index_name, run, progress=Recorder(second))


def test_the_command_prints_a_report(
    client: Client, index_name: str, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(run.path), "--index", index_name, "--url", client.address, "--json"]
    assert loading.load.main(arguments, standalone_mode=False) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["acknowledged"] == 5
    assert loading.verify.main(arguments, standalone_mode=False) == 0
    assert json.loads(capsys.readouterr().out)["same"] is True


def test_a_shard_that_lost_a_row_after_loading_is_loaded_again(client: Client, index_name: str, tmp_path: Path) -> None:
    """A later shard loses a row as a duplicate after it was loaded: the old vector must not stay in the index."""
    documents = {"a": {"river": 1.0}, "b": {"river": 2.0}, "c": {"river": 3.0}, "d": {"river": 4.0}}
    run = make_run(tmp_path / "run", documents, shard_rows=2, complete=False)
    parts = list(read_shard(run.shard_path(1)))
    twice = [part._replace(vectors=part.vectors._replace(doc_ids=["a", "d"])) for part in parts]
    schema = shard_schema_of(run.shard_path(1))
    sha256 = write_shard(twice, scratch=run.scratch_path("part"), target=run.shard_path(1), schema=schema)
    run.mark_done(1, {**(run.done(1) or {}), "sha256": sha256})
    with pytest.raises(ClusterError, match="has 3 documents, but 4.*duplicate ids"):
        into(client, index_name, run, partial=True)
    [duplicate] = find_duplicates(run)
    remove_rows(run, 1, {duplicate.again[1]: SkippedRow(duplicate.again[1], "corpus.jsonl", 3, "duplicate id")})
    run.mark_complete({"rows": 3, "shards": 2})
    into(client, index_name, run)
    report = verify(run.path, index=index_name, connection=Connection(client.address), sample=None)
    assert report.ok, report


def test_pruning_is_recorded_and_loading_with_other_pruning_is_refused(
    client: Client, index_name: str, run: Run
) -> None:
    report = into(client, index_name, run, top_k=2, max_ratio=0.4)
    assert report.acknowledged == 5
    assert stamped(client, index_name).pruning == {"top_k": 2, "max_ratio": 0.4}
    query = {"query": client.dialect.tokens_clause("sparse", dict.fromkeys(DOCUMENTS["words"], 1.0))}
    hits = client.call("POST", f"/{index_name}/_search", query)["hits"]["hits"]
    [words] = [hit["_score"] for hit in hits if hit["_id"] == "words"]
    assert words == 1.5
    with pytest.raises(ClusterError, match="was loaded pruned by top_k 2 and max_ratio 0.4, this load is unpruned"):
        into(client, index_name, run)
    assert into(client, index_name, run, top_k=2, max_ratio=0.4).loaded_shards == 0
    assert into(client, index_name, run, replace=True, top_k=1).loaded_shards == 2


def test_a_load_into_another_field_of_a_loaded_index_is_refused(
    client: Client, index_name: str, tmp_path: Path
) -> None:
    fields = {name: client.dialect.field_entry() for name in ("a", "b")}
    client.call("PUT", f"/{index_name}", {"mappings": {"properties": fields}})
    runs = [make_run(tmp_path / "run"), make_run(tmp_path / "other", more="other")]
    into(client, index_name, runs[0], field="a")
    for run in runs:  # searches of b would not find the documents of the first
        with pytest.raises(ClusterError, match="was loaded into the field 'a', this load has 'b'"):
            into(client, index_name, run, field="b")


def test_an_unfinished_load_resumes_only_with_the_pruning_of_its_journal(
    client: Client, index_name: str, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", MANY, shard_rows=20)
    with pytest.raises(Interrupted):
        into(client, index_name, run, top_k=1, progress=StopBefore(1))
    unpruned = replace(stamped(client, index_name), pruning=NO_PRUNING)
    there = indexes.find_index(client, index_name)
    assert there is not None
    indexes.stamp_index(client, there, unpruned)
    with pytest.raises(RunError, match="Shard 0 was loaded with pruning top_k 1, this load has pruning none"):
        into(client, index_name, run)


def test_dead_letters_are_sent_again_after_the_mapping_is_fixed(
    client: Client, index_name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_with_bad_titles(tmp_path / "run", ("words", "empty"))
    pipeline = broken_titles(tmp_path, client)
    into(client, index_name, run, pipeline=pipeline)
    arguments = [str(run.path), "--index", index_name, "--url", client.address, "--retry-dead", "--json"]
    assert loading.load.main(arguments[:-1], standalone_mode=False) == 3
    first = json.loads(next(Path(run.path).glob("load/*/*/dead.jsonl")).read_text().splitlines()[0])
    told = capsys.readouterr().err
    assert f'The cluster refused 2 documents, such as "{first["id"]}": {first["reason"].rstrip(".")}. ' in told
    assert loading.load.main(arguments, standalone_mode=False) == 3
    report = json.loads(capsys.readouterr().out)
    assert (report["retried"], report["refused"], report["acknowledged"]) == (2, 2, 3)
    fixed = {"properties": {"title": {"type": "integer", "ignore_malformed": True}}}
    client.call("PUT", f"/{index_name}/_mapping", fixed)
    assert loading.load.main(arguments, standalone_mode=False) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["retried"], report["refused"], report["acknowledged"], report["dead"]) == (2, 0, 5, None)
    assert ids_in(client, index_name) == set(DOCUMENTS)
    lines = open_journal(run, client.cluster_uuid, report["uuid"]).finished().values()
    assert [(line["acknowledged"], line["refused"]) for line in lines] == [(2, 0), (2, 0), (1, 0)]
    assert verify(run.path, index=index_name, connection=Connection(client.address), sample=None).ok


@pytest.mark.both_products
@pytest.mark.usefixtures("hasty_merges")
def test_merge_leaves_one_segment_per_shard_and_reports_sizes(
    client: Client, index_name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", MANY, shard_rows=20)
    into(client, index_name, run)
    client.call("PUT", f"/{index_name}/_doc/d1", {"title": "again"}, params={"refresh": "true"})
    client.call("DELETE", f"/{index_name}/_doc/d1", params={"refresh": "true"})
    for path in run.path.glob("load/*/*/journal.jsonl"):
        path.unlink()
    arguments = [str(run.path), "--index", index_name, "--url", client.address, "--merge"]
    assert loading.load.main([*arguments, "--json"], standalone_mode=False) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["merged"], report["acknowledged"]) == (True, 60)
    assert report["merged_from_bytes"] > report["merged_to_bytes"] > 0
    shards = client.call("GET", f"/{index_name}/_segments")["indices"][index_name]["shards"]
    assert [copy["num_search_segments"] for copies in shards.values() for copy in copies] == [1]
    assert loading.load.main(arguments, standalone_mode=False) == 0
    assert "One segment per shard: " in capsys.readouterr().out


def test_the_rate_reaches_the_pace(client: Client, index_name: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float | None] = []

    class Watched(Pace):
        def __init__(self, *, max_rate: float | None) -> None:
            rates.append(max_rate)
            super().__init__(max_rate=max_rate)

    monkeypatch.setattr("sparse_ingest.loading.load.Pace", Watched)
    arguments = [str(run.path), "--index", index_name, "--url", client.address, "--max-rate", "50"]
    assert loading.load.main(arguments, standalone_mode=False) == 0
    assert rates == [50.0]


@pytest.mark.parametrize(
    "arguments", [[], ["RUN"], ["RUN", "--index", "a", "--alias", "b"], ["--index", "a"], ["--alias", "a", "--restore"],
                  ["RUN", "--index", "a", "--to", "b"], ["RUN", "--index", "a", "--drop-old"],
                  ["--alias", "a", "--to", "b", "--drop-old"]],
)  # fmt: skip
def test_a_command_line_without_one_target_is_refused(arguments: list[str]) -> None:
    with pytest.raises(click.UsageError):
        loading.load.main(arguments, standalone_mode=False)


@pytest.mark.both_products
def test_a_note_warns_that_updates_lose_vectors_outside_source(client: Client, index_name: str, run: Run) -> None:
    excluded, kept = Recorder(), Recorder()
    into(client, index_name, run, progress=excluded)
    assert [note for note in excluded.notes if "_update loses its vector" in note] == excluded.notes[:1]
    keep = Pipeline(index=IndexSettings(source="keep"))
    into(client, f"{index_name}-kept", run, pipeline=keep, progress=kept)
    assert kept.notes == []
