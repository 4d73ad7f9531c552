"""Another client changes `_meta` or starts another load during a load: runs are not mixed, settings are restored."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from support.deadlines import HANGING_S
from support.forked import command, start
from support.killed_load import KilledLoad
from support.loads import MANY, StopBefore, into, settings_of, stamped
from support.reporters import Recorder
from support.runs import make_run
from support.secure_proxy import Request, secure_proxy

from sparse_ingest.cluster import indexes
from sparse_ingest.cluster.client import Client, Connection
from sparse_ingest.errors import ClusterError, Interrupted
from sparse_ingest.loading.load import load
from sparse_ingest.loading.publish import publish
from sparse_ingest.pipeline import Pipeline
from sparse_ingest.runs.run import Run
from sparse_ingest.verification.verify import verify

OTHER = {doc_id: {token: weight + 0.5 for token, weight in terms.items()} for doc_id, terms in MANY.items()}
OLD = (None, "1", None)  # the settings of an index that a load creates
THEIRS = {"owner": "search team"}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make_run(tmp_path / "run", MANY, shard_rows=10)


def replace_meta(client: Client, index: str, meta: object = THEIRS) -> None:
    client.call("PUT", f"/{index}/_mapping", {"_meta": meta})


def meta_of(client: Client, index: str) -> dict[str, Any]:
    there = indexes.find_index(client, index)
    assert there is not None
    return dict(there.mappings["_meta"])


def same(client: Client, index: str, run: Run) -> bool:
    return verify(run.path, index=index, connection=Connection(client.address), sample=None).same


# The request at which `_meta` is replaced, and how many equal requests precede it.
MOMENTS = {
    "before the settings": ("PUT", "/_settings", 0),
    "between two shards": ("POST", "/_bulk", 3),
    "when all is sent": ("POST", "/_refresh", 0),
    "during the merge": ("POST", "/_forcemerge", 0),
    "before the settings are put back": ("PUT", "/_settings", 1),
    "before the load is done": ("PUT", "/_mapping", 1),
}


@pytest.mark.usefixtures("hasty_merges")
@pytest.mark.parametrize(
    "meta", [THEIRS, *(pytest.param(one, marks=pytest.mark.slow) for one in ({}, {"sparse_ingest": "theirs"}))], ids=str
)
@pytest.mark.parametrize("moment", MOMENTS)
def test_replaced_meta_is_written_again_and_settings_are_restored(
    client: Client, index_name: str, run: Run, moment: str, meta: dict
) -> None:
    (method, end, count), asked, recorder = MOMENTS[moment], [], Recorder()

    def replace(request: Request) -> None:
        if request.method == method and request.path.partition("?")[0].endswith(end):
            asked.append(request)
            if len(asked) == count + 1:
                replace_meta(client, index_name, meta)

    with secure_proxy(client.address, check=replace) as proxy:
        how = {"pipeline": Pipeline(), "connection": Connection(proxy.url)}
        assert load(run, index=index_name, merge=True, progress=recorder, **how).acknowledged == 60
    assert len(asked) > count
    assert settings_of(client, index_name) == OLD
    stamp = stamped(client, index_name)
    assert (stamp.load, stamp.settings, stamp.created_by) == ("done", {}, run.manifest.run_id)
    # The last request writes all of `_meta`, so the replacement cannot be seen.
    if moment != "before the load is done":
        assert {**meta_of(client, index_name), "sparse_ingest": 0} == {**meta, "sparse_ingest": 0}
        assert any("lost its stamp" in note for note in recorder.notes)
    assert not list(run.path.glob("load/*/*/settings.json"))
    assert into(client, index_name, run).loaded_shards == 0


def test_meta_that_is_removed_repeatedly_fails_the_load_and_settings_are_restored(
    client: Client, index_name: str, run: Run
) -> None:
    def replace(request: Request) -> None:
        if "/_bulk" in request.path or (request.method == "GET" and request.path == f"/{index_name}"):
            if indexes.find_index(client, index_name):
                replace_meta(client, index_name)

    with secure_proxy(client.address, check=replace) as proxy:
        answer = command("load", run.path, "--index", index_name, "--url", proxy.url)
    assert answer.code == 1
    assert "another client keeps removing it. Stop that client" in answer.err
    into(client, index_name, run)
    assert settings_of(client, index_name) == OLD


@pytest.mark.parametrize("way", ["load", "restore"])
@pytest.mark.parametrize(
    "moment", ["after:4", *(pytest.param(one, marks=pytest.mark.slow) for one in ("after:3", "after:5"))]
)
def test_after_a_kill_settings_lost_from_meta_are_restored_from_the_journal(
    client: Client, index_name: str, run: Run, tmp_path: Path, moment: str, way: str
) -> None:
    arguments = [run.path, "--index", index_name, "--url", client.address]
    assert KilledLoad(moment, tmp_path, *arguments).ended()[0] == -signal.SIGKILL
    replace_meta(client, index_name)
    assert settings_of(client, index_name)[:2] == ("-1", "0")
    without = command("load", "--index", index_name, "--restore", "--url", client.address)
    assert without.code == 1 and f"sparse-ingest load RUN --index {index_name} --restore" in without.err
    answer = command("load", *arguments, *(["--restore"] if way == "restore" else []))
    assert answer.code == 0
    assert "_meta has lost the old values of number_of_replicas, refresh_interval" in answer.err
    assert settings_of(client, index_name) == OLD
    assert not list(run.path.glob("load/*/*/settings.json"))
    assert way == "restore" or same(client, index_name, run)


@pytest.mark.parametrize(
    "kept",
    [
        {"number_of_replicas": {"before": "many", "loading": "0"}},
        {"refresh_interval": {"before": "1s", "loading": "0"}, "number_of_shards": {"before": "1", "loading": "0"}},
        {"final_pipeline": {"before": "theirs", "loading": "-1"}, "blocks.write": {"before": "true", "loading": "0"}},
    ],
)
def test_a_journal_restores_only_settings_that_a_load_changes(
    client: Client, index_name: str, run: Run, kept: dict
) -> None:
    into(client, index_name, run)
    client.call("PUT", f"/{index_name}/_settings", {"index": {"number_of_replicas": 0}})
    before = indexes.find_index(client, index_name)
    (journal,) = run.path.glob("load/*/*/journal.jsonl")
    journal.with_name("settings.json").write_text(json.dumps(kept))
    answer = command("load", run.path, "--index", index_name, "--restore", "--url", client.address)
    assert answer.code == 1 and "settings.json does not contain index settings (loads do not change {" in answer.err
    assert indexes.find_index(client, index_name) == before


def test_a_damaged_copy_of_the_settings_is_reported(client: Client, index_name: str, run: Run) -> None:
    into(client, index_name, run)
    (journal,) = run.path.glob("load/*/*/journal.jsonl")
    for damaged in ("", "[]", '{"refresh_interval": 1}', "[" * 100_000):
        journal.with_name("settings.json").write_text(damaged)
        answer = command("load", run.path, "--index", index_name, "--url", client.address)
        assert answer.code == 1 and "settings.json does not contain index settings (" in answer.err


@pytest.mark.parametrize("moment", [pytest.param("_refresh", marks=pytest.mark.slow), "_search"])
def test_an_alias_does_not_move_to_an_index_that_lost_its_stamp(
    client: Client, index_name: str, run: Run, moment: str
) -> None:
    alias = f"{index_name}-served"
    name = f"{alias}-{run.manifest.run_id[:8]}"

    def replace(request: Request) -> None:
        if moment in request.path and (there := indexes.find_index(client, name)) and there.stamp:
            if there.stamp.load == "done":
                replace_meta(client, name)

    with secure_proxy(client.address, check=replace) as proxy:
        with pytest.raises(ClusterError, match="lost its stamp .*was not moved"):
            publish(run, alias=alias, pipeline=Pipeline(), connection=Connection(proxy.url))
    assert indexes.find_index(client, alias) is None
    assert settings_of(client, name) == OLD


@contextmanager
def paused(client: Client, index: str, run: Run, *options: str) -> Iterator[Callable[[], str]]:
    """Start a load in its own process, pause it before the third answer, and yield a function that resumes it."""
    bulks, is_paused = [], Event()

    def pause(request: Request, answer: bytes) -> bytes:
        if "/_bulk" in request.path:
            bulks.append(request)
            if len(bulks) == 3:
                os.kill(process.pid, signal.SIGSTOP)
                is_paused.set()
        return answer

    log = Path(f"{run.path}.log")
    with secure_proxy(client.address, change=pause) as proxy:
        arguments = ["load", run.path, "--index", index, "--max-rate", "40", "--url", proxy.url, *options]
        process = start(*arguments, log=log)
        try:
            assert is_paused.wait(HANGING_S)

            def resume() -> str:
                os.kill(process.pid, signal.SIGCONT)
                process.join(HANGING_S)
                printed = log.read_text()
                assert process.exitcode == 1, printed
                assert "Traceback" not in printed
                return printed

            yield resume
        finally:
            process.kill()
            process.join()


@pytest.mark.parametrize(
    "first",
    [
        pytest.param(True, marks=pytest.mark.slow, id="into a new index"),
        pytest.param(False, id="into an index of another run"),
    ],
)
def test_a_paused_load_sends_nothing_after_another_run_was_loaded(
    client: Client, index_name: str, tmp_path: Path, run: Run, first: bool
) -> None:
    other = make_run(tmp_path / "other", OTHER, shard_rows=10)
    if not first:
        into(client, index_name, other)
    with paused(client, index_name, run) as resume:
        into(client, index_name, other)
        assert same(client, index_name, other)
        printed = resume()
    assert f"A load of run {other.manifest.run_id[:8]} into index '{index_name}' has started after this one" in printed
    assert same(client, index_name, other)
    assert settings_of(client, index_name) == OLD
    assert stamped(client, index_name).load == "done"
    assert not list(run.path.glob("load/*/*/settings.json"))
    for again in (other, run, other):
        report = into(client, index_name, again)
        assert report.loaded_shards == (0 if again is other and report.loaded_shards == 0 else 6)
        assert same(client, index_name, again)


def test_a_paused_load_stops_when_a_copy_of_its_run_is_loaded(
    client: Client, index_name: str, tmp_path: Path, run: Run
) -> None:
    with paused(client, index_name, run) as resume:
        copy = Run(Path(shutil.copytree(run.path, tmp_path / "copy")), run.manifest)
        assert into(client, index_name, copy).loaded_shards >= 3
        assert "another load of the same run has started" in resume()
    assert same(client, index_name, copy)
    assert into(client, index_name, run).acknowledged == 60
    assert same(client, index_name, run)


def test_shards_replaced_by_another_run_are_sent_again(
    client: Client, index_name: str, tmp_path: Path, run: Run
) -> None:
    """Load the run, then another run, then the first shards of a copy of the run."""
    copy = Run(Path(shutil.copytree(run.path, tmp_path / "copy")), run.manifest)
    into(client, index_name, run)
    into(client, index_name, make_run(tmp_path / "other", OTHER, shard_rows=10))
    with paused(client, index_name, copy):
        pass
    assert stamped(client, index_name).run_id == run.manifest.run_id
    assert into(client, index_name, run).loaded_shards == 6
    assert same(client, index_name, run)


@pytest.mark.parametrize("first", ["other", *(pytest.param(one, marks=pytest.mark.slow) for one in ("run", None))])
def test_a_load_stops_if_another_run_is_loaded_while_it_is_planned(
    client: Client, index_name: str, tmp_path: Path, run: Run, first: str | None
) -> None:
    other, asked = make_run(tmp_path / "other", OTHER, shard_rows=10), []
    body = {"mappings": {"properties": {"sparse": {"type": "rank_features"}}}}
    if first == "run":
        with pytest.raises(Interrupted):
            into(client, index_name, run, progress=StopBefore(3))
    elif first == "other":
        into(client, index_name, make_run(tmp_path / "third", {"d1": {"river": 1.0}}))
    else:
        client.call("PUT", f"/{index_name}", body)

    def load_other(request: Request) -> None:
        if "/_nodes" in request.path and not asked:
            asked.append(request)
            into(client, index_name, other)

    with secure_proxy(client.address, check=load_other) as proxy:
        with pytest.raises(ClusterError, match=f"A load of run {other.manifest.run_id[:8]} into index"):
            load(run, index=index_name, pipeline=Pipeline(), connection=Connection(proxy.url))
    assert same(client, index_name, other)
    assert into(client, index_name, run).loaded_shards == 6
    assert same(client, index_name, run)


@pytest.mark.parametrize("way", ["since", pytest.param("update", marks=pytest.mark.slow)])
def test_a_paused_since_or_update_load_sends_nothing_after_another_load(
    client: Client, index_name: str, tmp_path: Path, run: Run, way: str
) -> None:
    into(client, index_name, run)
    other = make_run(tmp_path / "other", OTHER, shard_rows=10)
    options = ["--since", str(run.path)] if way == "since" else ["--update"]
    with paused(client, index_name, other, *options) as resume:
        assert into(client, index_name, run).loaded_shards == 6
        assert f"A load of run {run.manifest.run_id[:8]}" in resume()
    assert same(client, index_name, run)
    into(client, index_name, other, **({"since": run.path} if way == "since" else {"update": True}))
    assert same(client, index_name, other)


def test_settings_known_only_to_the_journal_of_a_paused_load_can_be_restored(
    client: Client, index_name: str, tmp_path: Path, run: Run
) -> None:
    """`_meta` is lost while a load is paused, so the next load does not know the old settings."""
    other = make_run(tmp_path / "other", OTHER, shard_rows=10)
    with paused(client, index_name, run) as resume:
        replace_meta(client, index_name)
        into(client, index_name, other)
        assert "keeps its settings for loading" in resume()
    assert settings_of(client, index_name)[:2] == ("-1", "0")
    answer = command("load", run.path, "--index", index_name, "--restore", "--url", client.address)
    assert answer.code == 0
    assert settings_of(client, index_name) == OLD
    assert same(client, index_name, other)
