"""A run in an object store whose shards tasks of Ray make, while workers are killed and the command is stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from support.checkpoints import make_masked_lm
from support.run_contents import contents, lasting, write
from support.stores import stored

from sparse_ingest.encoding.encode import encode
from sparse_ingest.runs.run import open_run
from sparse_ingest.storage.places import RemotePath

pytest.importorskip("ray", reason="the extra ray is not installed")
KEPT = ("manifest.json", "vocab.json", "complete.json", "shards/")
MAIN = "import sys; from sparse_ingest.cli.main import main; sys.exit(main())"


@pytest.mark.slow
def test_the_bytes_are_those_of_one_process_also_after_a_kill_and_a_stop(tmp_path: Path, bucket: str) -> None:
    model = make_masked_lm(tmp_path / "model")
    corpus = write(tmp_path / "corpus.jsonl", [{"_id": str(row), "text": f"river {row} " * 9} for row in range(2000)])
    alone = encode(corpus, tmp_path / "run", model=str(model), shard_rows=20, dtype="float32", device="cpu")
    run = RemotePath.at(f"{bucket}/run")
    command = [sys.executable, "-c", MAIN, "encode", "--model", model, "--corpus", corpus, "--shard-rows", "20",
               "--dtype", "float32", "--out", str(run), "--executor", "ray", "--workers", "2"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    first = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    wait_for_shards(run, 10, first)
    workers = [one for one in psutil.Process(first.pid).children(recursive=True) if "make_group" in one.name()]
    workers[0].kill()
    wait_for_shards(run, 20, first)
    first.send_signal(signal.SIGTERM)
    notes = first.communicate(timeout=60)[1]
    assert first.returncode == 130, notes
    assert "A worker died. Another worker makes its shards." in notes
    assert 20 <= len(open_run(run).done_shards()) < 100
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
    assert {name: content for name, content in stored(run).items() if name.startswith(KEPT)} == {
        name: content for name, content in contents(alone.path).items() if name.startswith(KEPT)
    }
    assert lasting(open_run(run)) == lasting(alone)


def wait_for_shards(run: RemotePath, count: int, process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 90
    while sum(1 for name in stored(run) if name.startswith("done/")) < count:
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.2)
