"""Kill `encode` into an object store at random times; the final bytes match an undisturbed run."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from support.checkpoints import make_masked_lm
from support.deadlines import HANGING_S
from support.forked import Answer, command, start
from support.run_contents import contents, lasting, write
from support.stores import FaultyStore, stored

from sparse_ingest.runs import leases
from sparse_ingest.runs.run import open_run
from sparse_ingest.storage.places import RemotePath
from sparse_ingest.storage.scratch import ScratchFolder

KEPT = ("manifest.json", "vocab.json", "starts.json", "complete.json", "shards/", "skipped/")
ROWS = [{"_id": str(place), "text": f"the river stone {place} " * (place % 7)} for place in range(200)]


class Reference:
    """The command, and the run it writes to a local folder without faults."""

    def __init__(self, folder: Path, rows: Sequence[dict[str, str]]) -> None:
        model = make_masked_lm(folder / "model")
        corpus = write(folder / "corpus.jsonl", [*rows, rows[3], {"_id": None, "text": "no id"}, rows[-7]])
        self.arguments = ["encode", "--model", model, "--corpus", corpus, "--shard-rows", 20, "--dtype", "float32",
                          "--device", "cpu", "--on-bad-document", "skip"]  # fmt: skip
        self.run = folder / "run"
        assert command(*self.arguments, "--out", self.run).code == 3

    def compare(self, out: RemotePath) -> None:
        """Finish the run, and compare every lasting byte with the undisturbed run."""
        answer = command(*self.arguments, "--out", out)
        assert answer.code == 3, answer.err
        files = stored(out)
        assert {name: content for name, content in files.items() if name.startswith(KEPT)} == {
            name: content for name, content in contents(self.run).items() if name.startswith(KEPT)
        }
        assert lasting(open_run(out)) == lasting(open_run(self.run))
        # The lock of the last step remains if its holder was killed right after it.
        assert not [name for name in files if name.startswith("locks/part")]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(tmp_path_factory.mktemp("reference"), ROWS)


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """A run of four shards."""
    return Reference(tmp_path_factory.mktemp("short"), ROWS[:60])


def check(files: dict[str, bytes]) -> None:
    """Check that each file is complete, and that done/ matches shards/."""
    for name, content in files.items():
        record = json.loads(content) if name.endswith(".json") else {}
        if name.startswith("done/"):
            shard = files[f"shards/{Path(name).stem}.parquet"]
            assert record["sha256"] == hashlib.sha256(shard).hexdigest(), name


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_killed_at_random_times(reference: Reference, bucket: str, tmp_path: Path, seed: int) -> None:
    out, log = RemotePath.at(f"{bucket}/run"), tmp_path / "log"
    random_times, killed = random.Random(seed), 0
    for attempt in range(20):
        process = start(*reference.arguments, "--out", out, log=log)
        wanted = len(list((out / "done").iterdir())) + random_times.randrange(4)
        while process.is_alive() and len(list((out / "done").iterdir())) < wanted:
            time.sleep(0.001)
        time.sleep(random_times.uniform(0, 0.3))
        process.kill()
        process.join(HANGING_S)
        killed += process.exitcode == -9
        check(stored(out))
        if killed == 3:
            break
        if process.exitcode != -9:  # it was complete before: begin again
            out = RemotePath.at(f"{bucket}/run-{attempt}")
    assert killed == 3, log.read_text()
    reference.compare(out)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_occasional_store_faults_lose_nothing(
    reference: Reference, faulty: FaultyStore, bucket: str, seed: int
) -> None:
    out, choice = RemotePath.at(f"{bucket}/run"), random.Random(seed)
    faults = [*[None] * 20, 503, 500, "drop", "cut", "lost answer"]
    faulty.inject("(GET|PUT|HEAD|DELETE) ", *(choice.choice(faults) for _ in range(200)))
    reference.compare(out)
    assert len(faulty.done) > 20


def test_an_encode_stopped_by_store_faults_can_be_resumed(
    short: Reference, faulty: FaultyStore, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr("s3fs.S3FileSystem.retries", 2)
    out = RemotePath.at(f"{bucket}/run")
    faulty.inject("PUT .*shards/part-00002", always=503)
    answer = command(*short.arguments, "--out", out)
    assert answer.code == 1
    assert "part-00002.parquet cannot be written: " in answer.err
    assert "start again: what is finished is kept" in answer.err
    check(stored(out))
    faulty.inject("nothing")
    # As if the process had been killed before it released its lock.
    dead = subprocess.Popen(["true"])
    dead.wait()
    (out / "locks" / "complete.lock").write_whole(json.dumps({"host": leases._here(), "process": dead.pid}).encode())
    short.compare(out)


def test_a_late_upload_after_another_process_acquired_the_lock_changes_nothing(
    short: Reference, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a laptop sleeps during an upload. The two processes have different last bits."""
    out, upload = RemotePath.at(f"{bucket}/run"), RemotePath.upload
    taken_over: list[Answer] = []

    def late(place: RemotePath, source: Path, *, exclusive: bool = False) -> None:
        if place.name == "part-00001.parquet" and not taken_over:
            taken_over.append(Answer(0, "", ""))
            (out / "locks" / "complete.lock").unlink()
            taken_over.append(command(*short.arguments, "--out", out))
            source.write_bytes(source.read_bytes() + b"other bytes")
        upload(place, source, exclusive=exclusive)

    monkeypatch.setattr(RemotePath, "upload", late)
    answer = command(*short.arguments, "--out", out)
    assert taken_over[1].code == 3, taken_over[1].err
    assert answer.code == 1 and "has acquired the lock of complete" in answer.err
    check(stored(out))
    short.compare(out)


def test_local_files_of_a_killed_process_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    held = ScratchFolder()
    abandoned = tmp_path / held.path.name[:-3]
    abandoned.mkdir()
    (abandoned / "part-00000.parquet").write_bytes(b"half")
    other = ScratchFolder()
    assert sorted(tmp_path.iterdir()) == sorted([held.path, other.path])
    paths = held.path, other.path
    del held, other
    assert not any(path.exists() for path in paths)
