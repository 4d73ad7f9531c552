"""`kill -9` at any instant, start again until it is done: the same bytes as in peace.

The corpus has bad rows, and ids that stand in two shards, so that shards are also rewritten at the end.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from forked import command, start
from made_checkpoints import make_masked_lm
from test_encode import contents, lasting

from sparse_ingest.runs.manifest import open_run

SHARD_ROWS = 20
ROWS = [{"_id": str(place), "text": f"the river stone {place} " * (place % 7)} for place in range(200)]


class Peace:
    """The command, and the run that it makes undisturbed."""

    def __init__(self, folder: Path) -> None:
        model = make_masked_lm(folder / "model")
        rows: list[object] = [*ROWS, ROWS[3], ROWS[77], {"_id": "last", "text": ""}, ROWS[3]]
        rows[30:30] = [{"_id": None, "text": "no id"}, {"_id": "no text"}]
        corpus = folder / "corpus.jsonl"
        corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.arguments = ["encode", "--model", model, "--corpus", corpus, "--shard-rows", SHARD_ROWS,
                          "--on-bad-document", "skip", "--dtype", "float32", "--device", "cpu"]  # fmt: skip
        self.run = folder / "run"
        assert command(*self.arguments, "--out", self.run).code == 3

    def kill(self, out: Path, log: Path, when: Callable[[float], bool]) -> bool:
        """Start the command and kill it when `when` (asked with the seconds so far) says so; whether it was alive."""
        process = start(*self.arguments, "--out", out, log=log)
        began = time.monotonic()
        while process.is_alive() and not when(time.monotonic() - began):
            time.sleep(0.0005)
        process.kill()
        process.join(60)
        return process.exitcode == -9

    def compare(self, out: Path) -> None:
        """Finish the run in `out`; every byte that lasts must be that of the undisturbed run."""
        assert command(*self.arguments, "--out", out).code == 3
        for folder in ("shards", "skipped"):
            assert contents(out / folder) == contents(self.run / folder)
        for name in ("manifest.json", "vocab.json", "complete.json"):
            assert (out / name).read_bytes() == (self.run / name).read_bytes()
        assert lasting(open_run(out)) == lasting(open_run(self.run))
        assert not [path for path in (out / "tmp").rglob("*") if path.is_file()]


@pytest.fixture(scope="module")
def peace(tmp_path_factory: pytest.TempPathFactory) -> Peace:
    return Peace(tmp_path_factory.mktemp("peace"))


@pytest.mark.parametrize("seed", [1, 2])
def test_killed_at_random_times(peace: Peace, tmp_path: Path, seed: int) -> None:
    random_times = random.Random(seed)
    out, log = tmp_path / "run", tmp_path / "log"
    killed = 0
    for _ in range(12):
        moment = random_times.uniform(0.0, 0.9)
        killed += peace.kill(out, log, lambda seconds, moment=moment: seconds > moment)
        if (out / "complete.json").exists():
            break
    assert killed, log.read_text()
    peace.compare(out)


@pytest.mark.parametrize(
    "name",
    [
        "manifest.json", "vocab.json", "locks/part-00000.lock", "tmp/part-00001.parquet", "shards/part-00001.parquet",
        "skipped/part-00001.jsonl", "done/part-00001.json", "locks/complete.lock", "tmp/ids",
        "complete.json",
    ],
)  # fmt: skip
def test_killed_as_soon_as_a_file_is_there(peace: Peace, tmp_path: Path, name: str) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    peace.kill(out, log, lambda _: (out / name).exists())
    assert (out / name).exists(), log.read_text()
    peace.compare(out)


def test_killed_while_duplicates_leave_their_shards(peace: Peace, tmp_path: Path) -> None:
    """The last shard is taken out of done/ before it is replaced: that is when to strike."""
    out, log = tmp_path / "run", tmp_path / "log"
    last = out / "done" / "part-00010.json"
    seen = False

    def gone_again(_: float) -> bool:
        nonlocal seen
        seen = seen or last.exists()
        return seen and not last.exists()

    for _ in range(3):
        peace.kill(out, log, gone_again)
        seen = False
    peace.compare(out)


def test_a_process_that_waits_goes_on_for_one_that_is_killed(peace: Peace, tmp_path: Path) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    first = start(*peace.arguments, "--out", out, log=log)
    while not (out / "shards" / "part-00001.parquet").exists():
        assert first.is_alive(), log.read_text()
        time.sleep(0.0005)
    second = start(*peace.arguments, "--out", out, log=tmp_path / "second")
    while not (out / "shards" / "part-00004.parquet").exists():
        time.sleep(0.0005)
    first.kill()
    first.join(60)
    second.join(60)
    assert second.exitcode == 3, (tmp_path / "second").read_text()
    peace.compare(out)
