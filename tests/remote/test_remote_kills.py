"""`kill -9` at any instant while a run is made in a store, started again until it is done: the bytes made in peace."""

from __future__ import annotations

import hashlib
import json
import random
import tempfile
import time
from pathlib import Path

import pytest
from forked import command, start
from made_checkpoints import make_masked_lm
from stores import FaultyStore, stored
from test_encode import contents, lasting, write

from sparse_ingest.places import RemotePath
from sparse_ingest.runs.manifest import open_run
from sparse_ingest.runs.scratch import ScratchFolder

KEPT = ("manifest.json", "vocab.json", "complete.json", "shards/", "skipped/")
ROWS = [{"_id": str(place), "text": f"the river stone {place} " * (place % 7)} for place in range(200)]


class Peace:
    """The command, and the run that it makes undisturbed in a folder."""

    def __init__(self, folder: Path) -> None:
        model = make_masked_lm(folder / "model")
        corpus = write(folder / "corpus.jsonl", [*ROWS, ROWS[3], {"_id": None, "text": "no id"}, ROWS[77]])
        self.arguments = ["encode", "--model", model, "--corpus", corpus, "--shard-rows", 20, "--dtype", "float32",
                          "--device", "cpu", "--on-bad-document", "skip"]  # fmt: skip
        self.run = folder / "run"
        assert command(*self.arguments, "--out", self.run).code == 3

    def compare(self, out: RemotePath) -> None:
        """Finish the run; every byte that lasts must be that of the undisturbed one."""
        answer = command(*self.arguments, "--out", out)
        assert answer.code == 3, answer.err
        files = stored(out)
        assert {name: content for name, content in files.items() if name.startswith(KEPT)} == {
            name: content for name, content in contents(self.run).items() if name.startswith(KEPT)
        }
        assert lasting(open_run(out)) == lasting(open_run(self.run))
        assert not [name for name in files if name.startswith("locks/")]


@pytest.fixture(scope="module")
def peace(tmp_path_factory: pytest.TempPathFactory) -> Peace:
    return Peace(tmp_path_factory.mktemp("peace"))


def check(files: dict[str, bytes]) -> None:
    """Whatever was killed: a file is complete, and done/ speaks the truth about shards/."""
    for name, content in files.items():
        record = json.loads(content) if name.endswith(".json") else {}
        if name.startswith("done/"):
            shard = files[f"shards/{Path(name).stem}.parquet"]
            assert record["sha256"] == hashlib.sha256(shard).hexdigest(), name


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_killed_at_random_times(peace: Peace, bucket: str, tmp_path: Path, seed: int) -> None:
    out, log = RemotePath.at(f"{bucket}/run"), tmp_path / "log"
    random_times, killed = random.Random(seed), 0
    for _ in range(4):
        process = start(*peace.arguments, "--out", out, log=log)
        wanted = len(list((out / "done").iterdir())) + random_times.randrange(4)
        while process.is_alive() and len(list((out / "done").iterdir())) < wanted:
            time.sleep(0.001)
        time.sleep(random_times.uniform(0, 0.3))
        process.kill()
        process.join(60)
        killed += process.exitcode == -9
        check(stored(out))
    assert killed > 1, log.read_text()
    peace.compare(out)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_store_that_fails_now_and_then_loses_nothing(
    peace: Peace, spoiled: FaultyStore, bucket: str, seed: int
) -> None:
    out, choice = RemotePath.at(f"{bucket}/run"), random.Random(seed)
    faults = [*[None] * 20, 503, 500, "drop", "cut", "lost answer"]
    spoiled.spoil("(GET|PUT|HEAD|DELETE) ", *(choice.choice(faults) for _ in range(200)))
    peace.compare(out)
    assert len(spoiled.done) > 20


def test_an_encode_that_a_store_stops_goes_on_afterwards(
    peace: Peace, spoiled: FaultyStore, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    out = RemotePath.at(f"{bucket}/run")
    spoiled.spoil("PUT .*shards/part-00003", always=503)
    answer = command(*peace.arguments, "--out", out)
    assert answer.code == 1
    assert "part-00003.parquet cannot be written: " in answer.err
    assert "start again: what is finished is kept" in answer.err
    check(stored(out))
    spoiled.spoil("nothing")
    peace.compare(out)


def test_what_a_killed_process_made_on_this_machine_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    held = ScratchFolder()
    abandoned = tmp_path / held.path.name.replace("-run-", "-run-", 1)[:-3]
    abandoned.mkdir()
    (abandoned / "lock").touch()
    (abandoned / "part-00000.parquet").write_bytes(b"half")
    other = ScratchFolder()
    assert sorted(tmp_path.iterdir()) == sorted([held.path, other.path])
    paths = held.path, other.path
    del held, other
    assert not any(path.exists() for path in paths)
