"""Index settings that a load changes and restores, and states in which an index refuses writes: blocks, closed."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.loads import MANY, StopBefore, into, settings_of, stamped
from support.reporters import Recorder
from support.runs import make_run

from sparse_ingest.cli import loading
from sparse_ingest.cluster import indexes, settings_guard
from sparse_ingest.cluster.client import Client
from sparse_ingest.cluster.sending import Retries
from sparse_ingest.errors import ClusterError, Interrupted
from sparse_ingest.reporting import SILENT
from sparse_ingest.runs.run import Run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make_run(tmp_path / "run")


def test_loading_settings_are_restored_after_the_load(client: Client, index_name: str, run: Run) -> None:
    seen: set[tuple[str | None, ...]] = set()
    into(client, index_name, run, progress=Recorder(lambda _: seen.add(settings_of(client, index_name))))
    assert seen == {("-1", "0", None)}
    assert settings_of(client, index_name) == (None, "1", None)
    assert stamped(client, index_name).settings == {}


def test_a_stopped_load_restores_the_settings(client: Client, index_name: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", MANY, shard_rows=20)
    with pytest.raises(Interrupted):
        into(client, index_name, run, progress=StopBefore(1))
    assert settings_of(client, index_name) == (None, "1", None)


def test_settings_left_by_a_killed_load_are_restored_by_the_next_load_and_by_restore(
    client: Client, index_name: str, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    into(client, index_name, run)
    there = indexes.find_index(client, index_name)
    assert there is not None
    for arguments in ([str(run.path), "--index", index_name], ["--index", index_name, "--restore"]):
        settings_guard.tune(client, there, settings_guard.LOADING, SILENT)
        assert settings_of(client, index_name) == ("-1", "0", None)
        assert loading.load.main([*arguments, "--url", client.address], standalone_mode=False) == 0
        assert settings_of(client, index_name) == (None, "1", None)
    assert "restored number_of_replicas, refresh_interval" in capsys.readouterr().out


def test_an_index_of_another_client_keeps_its_settings_without_tune(client: Client, index_name: str, run: Run) -> None:
    mappings = {"properties": {"sparse": {"type": "rank_features"}}}
    client.call("PUT", f"/{index_name}", {"settings": {"refresh_interval": "9s"}, "mappings": mappings})
    seen: set[tuple[str | None, ...]] = set()
    into(client, index_name, run, progress=Recorder(lambda _: seen.add(settings_of(client, index_name))))
    assert seen == {("9s", "1", None)}
    seen.clear()
    more = make_run(run.path.with_name("more"), {"new": {"river": 1.0}})
    into(client, index_name, more, tune=True, progress=Recorder(lambda _: seen.add(settings_of(client, index_name))))
    assert seen == {("-1", "0", None)}
    assert settings_of(client, index_name) == ("9s", "1", None)


def test_async_translog_is_reported_and_ends_with_the_load(client: Client, index_name: str, run: Run) -> None:
    seen: set[tuple[str | None, ...]] = set()
    recorder = Recorder(lambda _: seen.add(settings_of(client, index_name)))
    report = into(client, index_name, run, async_translog=True, progress=recorder)
    assert seen == {("-1", "0", "async")}
    assert settings_of(client, index_name) == (None, "1", None)
    assert report.acknowledged == 5
    assert recorder.notes[0].startswith("--async-translog: ")


def test_a_primary_restart_with_async_translog_stops_the_load_before_the_shard_is_journaled(
    client: Client, index_name: str, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", MANY, shard_rows=60)

    def restart(documents: int) -> None:
        if not documents:
            client.call("POST", f"/{index_name}/_close")
            client.call("POST", f"/{index_name}/_open", params={"wait_for_active_shards": "1"})

    with pytest.raises(ClusterError, match="was restarted or moved while translog.durability was async"):
        into(client, index_name, run, async_translog=True, progress=Recorder(restart))
    report = into(client, index_name, run)
    assert (report.loaded_shards, report.acknowledged) == (1, 60)


@pytest.mark.parametrize(
    "block", ["read_only_allow_delete", "write", pytest.param("read_only", marks=pytest.mark.slow)]
)
def test_a_block_stops_the_load_with_one_message_and_finished_shards_are_kept(
    client: Client, index_name: str, tmp_path: Path, block: str
) -> None:
    run = make_run(tmp_path / "run", MANY, shard_rows=20)

    def set_block(value: bool) -> None:
        client.call("PUT", f"/{index_name}/_settings", {"index": {f"blocks.{block}": value}})

    with pytest.raises(Interrupted):
        into(client, index_name, run, progress=StopBefore(1))
    set_block(True)
    with pytest.raises(ClusterError, match=r"accepts no .*(block|full disk)"):
        into(client, index_name, run)
    set_block(False)
    report = into(client, index_name, run)
    assert (report.loaded_shards, report.acknowledged) == (2, 60)
    assert settings_of(client, index_name) == (None, "1", None)


def test_a_disk_that_fills_up_stops_the_load_and_it_can_be_resumed(
    client: Client, index_name: str, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", MANY, shard_rows=20)

    def fill(documents: int) -> None:
        if documents == 0:
            client.call("PUT", f"/{index_name}/_settings", {"index": {"blocks.read_only_allow_delete": True}})

    recorder = Recorder(fill)
    with pytest.raises(ClusterError, match=r"The cluster accepts no documents: .*Remove the cause \(a full disk"):
        into(client, index_name, run, progress=recorder)
    assert any("keeps its settings for loading" in note for note in recorder.notes)
    client.call("PUT", f"/{index_name}/_settings", {"index": {"blocks.read_only_allow_delete": None}})
    assert into(client, index_name, run).acknowledged == 60
    assert settings_of(client, index_name) == (None, "1", None)


def test_closing_the_index_during_a_load_writes_no_dead_letters(
    client: Client, index_name: str, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", MANY, shard_rows=60)

    def close(documents: int) -> None:
        client.call("POST", f"/{index_name}/_close")

    with pytest.raises(ClusterError):
        into(client, index_name, run, progress=Recorder(close), retries=Retries(attempts=2, base_s=0.01))
    client.call("POST", f"/{index_name}/_open", params={"wait_for_active_shards": "1"})
    report = into(client, index_name, run)
    assert (report.refused, report.acknowledged) == (0, 60)
