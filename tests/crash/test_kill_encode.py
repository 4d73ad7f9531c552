"""Kill `encode` at any instant and start it again: the run has the same bytes as an undisturbed one.

The corpus has bad rows, and duplicate ids in different shards, so that shards are also rewritten at the end. A shard
has several windows, of which the finished ones are used again (encoding/spool.py).
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import make_masked_lm
from support.deadlines import HANGING_S, until
from support.forked import command, set_window_rows, start
from support.run_contents import contents, lasting

from sparse_ingest.encoding import shard_maker
from sparse_ingest.runs.run import open_run
from sparse_ingest.runs.shards import read_doc_ids

SHARD_ROWS, WINDOW_ROWS = 20, 6
SMALL_WINDOWS = partial(set_window_rows, WINDOW_ROWS)
ROWS = [{"_id": str(place), "text": f"the river stone {place} " * (place % 7)} for place in range(200)]


@pytest.fixture(scope="module", autouse=True)
def _small_windows() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_maker, "PART_ROWS", WINDOW_ROWS)
        yield


class Undisturbed:
    """A command and its undisturbed run. `reuse` copies vectors from a run of every third text."""

    def __init__(self, folder: Path, *options: object, reuse: bool = False) -> None:
        model = make_masked_lm(folder / "model")
        rows: list[object] = [*ROWS, ROWS[3], ROWS[77], {"_id": "last", "text": ""}, ROWS[3]]
        rows[30:30] = [{"_id": None, "text": "no id"}, {"_id": "no text"}]
        corpus = folder / "corpus.jsonl"
        corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.arguments = ["encode", "--model", model, "--corpus", corpus, "--shard-rows", SHARD_ROWS,
                          "--on-bad-document", "skip", "--dtype", "float32", "--device", "cpu", *options]  # fmt: skip
        if reuse:
            (folder / "old.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[::3]))
            old = [folder / "old.jsonl" if argument == corpus else argument for argument in self.arguments]
            assert command(*old, "--out", folder / "old").code == 0
            self.arguments += ["--reuse", folder / "old"]
        self.run = folder / "run"
        assert command(*self.arguments, "--out", self.run).code == 3

    def kill(self, out: Path, log: Path, when: Callable[[float], bool]) -> bool:
        """Start the command, and kill it when `when` is true for the elapsed seconds. Return whether it was alive."""
        process = start(*self.arguments, "--out", out, log=log, prepare=SMALL_WINDOWS)
        began = time.monotonic()
        while process.is_alive() and not when(time.monotonic() - began):
            time.sleep(0.0005)
        process.kill()
        process.join(HANGING_S)
        self.check_names(out)
        return process.exitcode == -9

    def kill_unfinished(self, out: Path, log: Path, draw: Callable[[], Callable[[float], bool]]) -> None:
        """Kill the command at a drawn moment. A run that was complete before is deleted and begun again."""
        for _ in range(20):
            if self.kill(out, log, draw()):
                return
            shutil.rmtree(out)
        raise AssertionError(log.read_text())

    def check_names(self, out: Path) -> None:
        """Check that files under their final names are complete, and that the hashes in done/ match shards/."""
        for path in (*out.glob("[!.]*.json"), *out.glob("done/part-*")):
            json.loads(path.read_bytes())
        for path in out.glob("skipped/part-*.jsonl"):
            assert all(json.loads(line)["reason"] for line in path.read_text().splitlines())
        for path in out.glob("shards/*"):
            assert path.suffix == ".parquet" and list(read_doc_ids(path))
        for path in out.glob("done/part-*"):
            shard = out / "shards" / f"{path.stem}.parquet"
            assert json.loads(path.read_text())["sha256"] == hashlib.sha256(shard.read_bytes()).hexdigest()

    def compare(self, out: Path) -> None:
        """Finish the run in `out`, and compare every lasting byte with the undisturbed run."""
        assert command(*self.arguments, "--out", out).code == 3
        for folder in ("shards", "skipped"):
            assert contents(out / folder) == contents(self.run / folder)
        for name in ("manifest.json", "vocab.json", "complete.json"):
            assert (out / name).read_bytes() == (self.run / name).read_bytes()
        assert lasting(open_run(out)) == lasting(open_run(self.run))
        assert not [path for path in (out / "tmp").rglob("*") if path.is_file()]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return Undisturbed(tmp_path_factory.mktemp("undisturbed"))


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 10))])
def test_killed_at_random_times(undisturbed: Undisturbed, tmp_path: Path, seed: int) -> None:
    random_times = random.Random(seed)
    out, log = tmp_path / "run", tmp_path / "log"
    for _ in range(3):
        undisturbed.kill_unfinished(
            out, log, lambda: after_shards(out, random_times.randrange(3), random_times.uniform(0, 0.05))
        )
    undisturbed.compare(out)


LONG = ("--max-length", 16, "--set")
OTHERS: dict[str, dict[str, Any]] = {
    "windows": {"options": [*LONG, "encode.overflow=windows"]},
    "passages": {"options": [*LONG, "encode.overflow=passages"]},
    "reuse": {"options": [], "reuse": True},
}


# 10 s each.
@pytest.mark.parametrize(
    "name", ["windows", *(pytest.param(one, marks=pytest.mark.slow) for one in OTHERS if one != "windows")]
)
def test_killed_with_long_documents_and_with_vectors_of_an_old_run(name: str, tmp_path: Path) -> None:
    other = OTHERS[name]
    undisturbed = Undisturbed(tmp_path, *other["options"], reuse=other.get("reuse", False))
    random_times = random.Random(name)
    out, log = tmp_path / "killed", tmp_path / "log"
    undisturbed.kill_unfinished(
        out, log, lambda: after_shards(out, random_times.randrange(1, 3), random_times.uniform(0, 0.05))
    )
    undisturbed.compare(out)
    both = tmp_path / "both"
    assert command(*undisturbed.arguments, "--out", both, "--plan-only").code == 0
    workers = [
        start(
            *undisturbed.arguments,
            "--out",
            both,
            "--part",
            f"{part}/2",
            log=tmp_path / f"log-{part}",
            prepare=SMALL_WINDOWS,
        )
        for part in (1, 2)
    ]
    for worker in workers:
        worker.join(HANGING_S)
    assert [worker.exitcode for worker in workers] == [0, 0]
    undisturbed.compare(both)


def exists(folder: Path, name: str, _: float) -> bool:
    return any(folder.glob(name))


def after_shards(out: Path, shards: int, delay_s: float) -> Callable[[float], bool]:
    """Return a condition that is true `delay_s` after `shards` more shards are done.

    A shard takes 0.03 s, the start of the process 0.7 s.
    """
    wanted, began = len(list(out.glob("done/part-*"))) + shards, None

    def now(seconds: float) -> bool:
        nonlocal began
        # Without a shard to wait for, wait for the first file of this process.
        there = len(list(out.glob("done/part-*"))) >= wanted and (shards > 0 or any(out.glob("tmp/part-*")))
        if began is None and there:
            began = seconds
        return began is not None and seconds - began >= delay_s

    return now


# The quick ones are of each stage: the plan, a shard's windows, its file before its record, the end.
@pytest.mark.parametrize(
    "name",
    [
        "starts.json", "tmp/part-00001/*.window", "shards/part-00001.parquet", "complete.json",
        *(pytest.param(name, marks=pytest.mark.slow) for name in (
            "manifest.json", "vocab.json", "tmp/part-00001.*", "tmp/part-00001/.new-*", "skipped/part-00001.jsonl",
            "done/part-00001.json", "locks/complete.lock",
        )),
    ],
)  # fmt: skip
def test_killed_as_soon_as_a_file_exists(undisturbed: Undisturbed, tmp_path: Path, name: str) -> None:
    for attempt in range(20):
        out, log = tmp_path / f"run-{attempt}", tmp_path / f"log-{attempt}"
        undisturbed.kill(out, log, partial(exists, out, name))
        if any(out.glob(name)):  # a temporary file may be gone before this process sees it
            break
    assert any(out.glob(name)), log.read_text()
    undisturbed.compare(out)


def test_killed_while_duplicates_are_removed_from_shards(undisturbed: Undisturbed, tmp_path: Path) -> None:
    """The record of the last shard is deleted before the shard is replaced; the kill comes between the two."""
    out, log = tmp_path / "run", tmp_path / "log"
    last = out / "done" / "part-00010.json"
    seen = False

    def is_deleted(_: float) -> bool:
        nonlocal seen
        seen = seen or last.exists()
        return seen and not last.exists()

    for _ in range(2):
        undisturbed.kill(out, log, is_deleted)
        seen = False
    undisturbed.compare(out)


def test_a_killed_part_is_made_again_by_another_process(undisturbed: Undisturbed, tmp_path: Path) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    assert command(*undisturbed.arguments, "--out", out, "--plan-only").code == 0
    first = start(*undisturbed.arguments, "--out", out, "--part", "1/2", log=log, prepare=SMALL_WINDOWS)
    until((out / "shards" / "part-00001.parquet").exists, log.read_text)
    second = start(
        *undisturbed.arguments, "--out", out, "--part", "2/2", log=tmp_path / "second", prepare=SMALL_WINDOWS
    )
    first.kill()
    first.join(HANGING_S)
    again = start(*undisturbed.arguments, "--out", out, "--part", "1/2", log=tmp_path / "again", prepare=SMALL_WINDOWS)
    for process in (second, again):
        process.join(HANGING_S)
        assert process.exitcode == 0, (tmp_path / "second").read_text() + (tmp_path / "again").read_text()
    assert command(*undisturbed.arguments, "--out", out, "--finish").code == 3
    undisturbed.compare(out)
