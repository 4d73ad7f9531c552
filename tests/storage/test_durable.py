"""A failed write reports its file, also for a full disk, where the system error does not."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import pytest

from sparse_ingest.cli import main
from sparse_ingest.errors import StorageError
from sparse_ingest.storage.durable import add_whole, naming, write_atomic


def write_to_full_disk() -> None:
    with Path("/dev/full").open("wb", buffering=0) as file:
        file.write(b"x")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has /dev/full")
def test_a_full_disk_is_reported_with_the_file_and_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    not_yet = tmp_path / "run" / "shards"

    def command(**settings: object) -> None:
        with naming(not_yet):
            write_to_full_disk()

    monkeypatch.setattr(main.cli, "main", command)
    monkeypatch.setattr(sys, "argv", ["sparse-ingest"])
    with pytest.raises(SystemExit, match="1"):
        main.main()
    shown = capsys.readouterr().err
    assert f"Error: {not_yet}: No space left on device. Free space there" in shown
    assert "start the same command again" in shown


def test_an_error_with_a_file_name_keeps_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught, naming(tmp_path):
        (tmp_path / "none").read_bytes()
    assert caught.value.filename == str(tmp_path / "none")
    with pytest.raises(ConnectionResetError) as reset, naming(tmp_path):
        raise ConnectionResetError(errno.ECONNRESET, "of a network, not of a disk")
    assert reset.value.filename is None


def test_a_file_system_without_hard_links_is_reported_with_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(source: object, target: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM), source, None, target)  # as on FAT

    monkeypatch.setattr(os, "link", refused)
    (tmp_path / "scratch").write_bytes(b"a")
    message = "file cannot be created: its file system has no hard links .*Write to a folder on another file system"
    with pytest.raises(StorageError, match=message):
        write_atomic(tmp_path / "file", b"a", exclusive=True)
    with pytest.raises(StorageError, match=message):
        add_whole(tmp_path / "scratch", tmp_path / "file", None, lambda: False)
    assert [path.name for path in tmp_path.iterdir()] == ["scratch"]
