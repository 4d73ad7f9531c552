"""Read-only runs: their journal and lock are stored in SPARSE_INGEST_HOME."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.forked import command
from support.loads import MANY, StopBefore, broken_titles, into, run_with_bad_titles, settings_of
from support.reporters import Recorder
from support.runs import make_run

from sparse_ingest.cluster.client import Client, Connection
from sparse_ingest.errors import Interrupted, RunError
from sparse_ingest.runs.run import Run, open_run
from sparse_ingest.verification.verify import verify


@pytest.fixture
def read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Run], Run]]:
    """Return a function that creates a run this process cannot write."""
    monkeypatch.setenv("SPARSE_INGEST_HOME", str(tmp_path / "home"))
    with contextlib.ExitStack() as stack:

        def seal(run: Run) -> Run:
            assert isinstance(run.path, Path)
            if os.getuid():
                run.path.chmod(0o555)
                stack.callback(run.path.chmod, 0o755)
                return open_run(run.path)
            # Permissions do not apply to root, so mount the folder read-only.
            sealed = tmp_path / "sealed"
            sealed.mkdir()
            for options in (["--bind", run.path], ["-o", "remount,ro,bind"]):
                if subprocess.run(["mount", *options, sealed], check=False, capture_output=True).returncode:
                    pytest.skip("mounts are not allowed here")
                if "--bind" in options:
                    stack.callback(subprocess.run, ["umount", sealed], check=True)
            return open_run(sealed)

        yield seal


def test_a_load_of_a_read_only_run_resumes_from_the_state_folder(
    client: Client, index_name: str, tmp_path: Path, read_only: Callable[[Run], Run]
) -> None:
    run = read_only(make_run(tmp_path / "run", MANY, shard_rows=16))
    assert isinstance(run.path, Path)
    before = sorted(run.path.rglob("*"))
    with pytest.raises(Interrupted):
        into(client, index_name, run, progress=StopBefore(2))
    notes = Recorder()
    report = into(client, index_name, run, progress=notes)
    assert (report.shards, report.loaded_shards, report.acknowledged) == (4, 2, 60)
    kept = tmp_path / "home" / "runs" / run.manifest.run_id
    assert Path(report.journal).is_relative_to(kept / "load")
    assert f"{run.path} cannot be written: its journal and lock are in {kept}." in notes.notes
    assert verify(run.path, index=index_name, connection=Connection(client.address)).ok
    shown = json.loads(command("status", run.path, "--json").out)
    assert [(load["index_uuid"], load["shards"]) for load in shown["loads"]] == [(report.uuid, 4)]
    assert sorted(run.path.rglob("*")) == before


def test_a_journal_inside_the_run_is_continued_if_the_run_becomes_read_only(
    client: Client, index_name: str, tmp_path: Path, read_only: Callable[[Run], Run]
) -> None:
    writable = run_with_bad_titles(tmp_path / "run", ("words", "small"))
    first = into(client, index_name, writable, pipeline=broken_titles(tmp_path, client))
    assert first.refused
    run = read_only(writable)
    report = verify(run.path, index=index_name, connection=Connection(client.address))
    assert report.ok
    assert report.refused_documents == first.refused
    again = into(client, index_name, run, pipeline=broken_titles(tmp_path, client))
    assert (again.loaded_shards, again.shards, again.refused) == (0, first.shards, first.refused)
    assert again.dead is not None
    assert Path(again.dead).is_relative_to(tmp_path / "home")


def test_settings_of_a_read_only_run_are_restored_from_the_state_folder(
    client: Client, index_name: str, tmp_path: Path, read_only: Callable[[Run], Run]
) -> None:
    run = read_only(make_run(tmp_path / "run", MANY, shard_rows=16))

    def replace_meta(documents: int) -> None:
        if documents > 16 and settings_of(client, index_name)[0] == "-1":
            client.call("PUT", f"/{index_name}/_mapping", {"_meta": {}})
            (kept,) = (tmp_path / "home" / "runs").rglob("settings.json")
            assert json.loads(kept.read_bytes())["number_of_replicas"] == {"before": "1", "loading": "0"}

    assert into(client, index_name, run, progress=Recorder(replace_meta)).acknowledged == 60
    assert settings_of(client, index_name) == (None, "1", None)
    assert not list((tmp_path / "home").rglob("settings.json"))


def test_no_writable_folder_for_the_lock_gives_one_message(
    client: Client, index_name: str, tmp_path: Path, read_only: Callable[[Run], Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = read_only(make_run(tmp_path / "run"))
    monkeypatch.setenv("SPARSE_INGEST_HOME", "/proc/nowhere")
    with pytest.raises(RunError, match=r"^/proc/nowhere/.*cannot be created: .*set it to a writable folder"):
        into(client, index_name, run)


def test_a_run_whose_name_is_not_utf8_is_loaded_and_verified(client: Client, index_name: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / os.fsdecode(b"r\xff"), MANY, shard_rows=16)
    assert into(client, index_name, run).acknowledged == 60
    assert verify(run.path, index=index_name, connection=Connection(client.address), sample=None).ok
