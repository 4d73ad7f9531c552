"""Scratch folders of killed processes are deleted; files that other users put in their place are not touched."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from sparse_ingest.errors import LocalServerError
from sparse_ingest.local_server.folders import hand_over, server_account
from sparse_ingest.storage.scratch import ScratchFolder

CREATE = """
import time
from sparse_ingest.storage.scratch import ScratchFolder
folder = ScratchFolder()
(folder.path / "table").write_bytes(b"x" * 1000)
print(folder.path, flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def test_the_scratch_folder_of_a_killed_process_is_deleted_by_the_next_process() -> None:
    process = subprocess.Popen([sys.executable, "-c", CREATE], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    left = Path(process.stdout.readline().strip())
    assert left.stat().st_mode & 0o777 == 0o700
    ScratchFolder().close()
    assert (left / "table").exists()  # its process is alive
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    ScratchFolder().close()
    assert not left.exists()


def test_files_of_other_users_are_neither_opened_nor_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "file").write_text("precious")
    prefix = f"sparse-ingest-scratch-{os.getuid()}-"
    os.mkfifo(tmp_path / f"{prefix}pipe")
    (tmp_path / f"{prefix}link").symlink_to(victim)
    (tmp_path / f"{prefix}nothing").symlink_to(tmp_path / "missing")
    (tmp_path / f"{prefix}file").write_text("precious")
    if os.getuid() == 0:
        other = tmp_path / f"{prefix}other"
        other.mkdir()
        os.chown(other, 65534, 65534)
    before = sorted(tmp_path.iterdir())
    with_folder = ScratchFolder()
    assert with_folder.path.parent == tmp_path and with_folder.path.stat().st_mode & 0o777 == 0o700
    with_folder.close()
    assert sorted(tmp_path.iterdir()) == before and (victim / "file").read_text() == "precious"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_hard_link_in_a_data_folder_keeps_its_owner(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "data" / "nodes").mkdir(parents=True)
    os.link(victim, tmp_path / "data" / "nodes" / "link")
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents:
        if parent.name.startswith(("pytest-", "popen-")):
            parent.chmod(parent.stat().st_mode | 0o011)
    with pytest.raises(LocalServerError, match="nodes/link is a hard link"):
        hand_over(tmp_path / "data", server_account())
    assert victim.stat().st_uid == 0
    (tmp_path / "data" / "nodes" / "link").unlink()
    hand_over(tmp_path / "data", server_account())
    account = server_account()
    assert account and (tmp_path / "data" / "nodes").stat().st_uid == account.pw_uid
