"""Memory of `encode` and of a dry run does not grow with the corpus."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.checkpoints import WORDS, make_masked_lm

# Prints the exit code and the peak memory of the process in KB.
PROGRAM = """
import json, resource, sys
from sparse_ingest.cli.main import cli
code = cli.main(sys.argv[1:], standalone_mode=False)
print(json.dumps([code, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]))
"""


def corpus_of(path: Path, rows: int, filler: int = 0) -> Path:
    """Write documents of 20 words and some filler. Every tenth has the text of the one before."""
    with path.open("w") as file:
        for row in range(rows):
            number = row - (row % 10 == 9)
            text = " ".join(WORDS[number * step % len(WORDS)] for step in range(1, 20))
            file.write(json.dumps({"_id": f"document-{row}", "text": f"{number} {text}" + " lamp" * filler}) + "\n")
    return path


def peak_mb(*arguments: object) -> float:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, arguments)], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    code, peak_kb = json.loads(done.stdout.splitlines()[-1])
    assert code == 0, done.stderr
    return peak_kb / 1024


@pytest.mark.slow
def test_memory_of_encode_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    model = make_masked_lm(tmp_path / "tiny")
    peaks = []
    for rows in (10_000, 50_000):
        # 160 MB more text: a leak would exceed 90 MB, caches add about 45 MB.
        corpus = corpus_of(tmp_path / f"{rows}.jsonl", rows, filler=800)
        peaks.append(peak_mb(
            "encode", "--model", model, "--corpus", corpus, "--out", tmp_path / f"run-{rows}", "--shard-rows", 8192,
            "--device", "cpu", "--dtype", "float32", "--dedup-text", "encode-once",
        ))  # fmt: skip
    assert peaks[1] < peaks[0] + 90, peaks


@pytest.mark.slow
def test_memory_of_a_dry_run_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    peaks = []
    for rows in (100_000, 1_500_000):
        peaks.append(peak_mb("encode", "--dry-run", "--corpus", corpus_of(tmp_path / f"{rows}.jsonl", rows)))
    assert peaks[1] < peaks[0] + 40, peaks
