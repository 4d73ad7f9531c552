"""What 10^6 to 10^9 documents cost, and a rehearsal of a run that several killed processes share.

    python benchmarks/scale.py table [--gpu-price 4.0] [--vcpu-price 0.05] [--storage-price 23.0] [--cluster-vcpus 96]
    python benchmarks/scale.py rehearse [--documents 1000000] [--speed 4000] [--workers 2] [--kills 6] [--url URL]

`table` prints the table of docs/scale.md; each number is marked m (measured), a (assumed) or p (published).

`rehearse` writes a corpus and encodes it in parts, one process each; kill -9 hits them at random times and each starts
again. All is real but the model: a stub returns fixed vectors at a given speed (0: BERT-tiny instead). Before, it
encodes the first shards, and predicts from them how long the run takes; prints both times, and whether the first shards
have the same bytes. With --url it loads those shards into a cluster.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from large_run import random_vocabulary

import sparse_ingest as si
from sparse_ingest.corpora.documents import FieldNames
from sparse_ingest.corpora.files import open_corpus
from sparse_ingest.encoding.job import Job
from sparse_ingest.encoding.options import EncodeOptions
from sparse_ingest.encoding.planner import part_of
from sparse_ingest.executors.local import Worker
from sparse_ingest.models.documents import Encoded
from sparse_ingest.models.tokenizer import FirstWindow
from sparse_ingest.pipeline import pipeline_of
from sparse_ingest.records import SparseRows
from sparse_ingest.reporting import SilentReporter

SHARD_ROWS, WINDOW_ROWS = 65_536, 8_192
SAMPLE_SHARDS = 2  # that are encoded before the prediction
COUNTS = 10**6, 10**7, 10**8, 10**9

# Measured on two cores (benchmarks/README.md): documents/s of --dtype auto for 122, 127 and 106 tokens.
CPU_RATES = {"tiny": 891.9 / 2, "mini": 368.7 / 2, "distilbert": 62.6 / 2}
# Assumed until measured: the aims for an H200, end to end, in documents/s.
GPU_RATES = {"tiny": 80_000, "mini": 60_000, "distilbert": 18_000}
TERMS, TEXT_BYTES = 170, 700  # assumed, of a document of 128 tokens
# Measured, in bytes a document.
RUN_BYTES = 3.57 * TERMS + 18 + 0.285 * TEXT_BYTES
INDEX_BYTES = 3.75 * TERMS + 0.93 * TEXT_BYTES  # merged, without replicas
# Of the servers, a document: measured with 120 terms, and 24.0 and 40.2 s for 100,000 of 60 and 120 terms (README.md).
LOAD_VCPU_HOURS = 97e-9 * (1 + (TERMS - 120) * (40.2 - 24.0) / 60 / 40.2)
LOAD_SHARE = 0.6  # assumed, of the servers' vCPUs that a load may use


@dataclass(frozen=True)
class Prices:
    """US dollars an hour of a GPU and of a vCPU, and a TB and month of storage; and the vCPUs of the cluster."""

    gpu: float = 4.0
    vcpu: float = 0.05
    storage: float = 23.0
    cluster_vcpus: int = 96


def table(prices: Prices) -> Iterator[str]:
    """Yield the lines of both tables. A product of numbers is assumed if one of them is."""
    yield "| documents | model | H200 hours | vCPU hours | cost on GPUs | cost on CPUs |"
    yield "|---|---|---|---|---|---|"
    for documents in COUNTS:
        for model, rate in GPU_RATES.items():
            gpus, cpus = documents / rate / 3600, documents / CPU_RATES[model] / 3600
            costs = f"${_short(gpus * prices.gpu)} (a) | ${_short(cpus * prices.vcpu)} (a)"
            yield f"| {documents:,} | {model} | {_short(gpus)} (a) | {_short(cpus)} (m) | {costs} |"
    yield ""
    yield "| documents | shards | run | storage of the run | index, merged | time of load | cost of load |"
    yield "|---|---|---|---|---|---|---|"
    for documents in COUNTS:
        run, index = documents * RUN_BYTES / 1e9, documents * INDEX_BYTES / 1e9
        vcpu_hours = documents * LOAD_VCPU_HOURS / LOAD_SHARE
        sizes = f"{_short(run)} GB (m) | ${_short(run / 1e3 * prices.storage)} a month (a) | {_short(index)} GB (m)"
        load = f"{_short(vcpu_hours / prices.cluster_vcpus)} h (a) | ${_short(vcpu_hours * prices.vcpu)} (a)"
        yield f"| {documents:,} | {-(-documents // SHARD_ROWS):,} (m) | {sizes} | {load} |"


def _short(number: float) -> str:
    """Return a number with two digits, or none after the point."""
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


class StubEncoder:
    """Takes the place of a `DocumentEncoder`: fixed vectors, at a number of documents/s."""

    device, batch_tokens, rules = SimpleNamespace(type="cpu"), 16_384, None
    maker = SimpleNamespace(head_name="stub", workers=1)

    def __init__(self, speed: float) -> None:
        self._speed, self.vocabulary = speed, random_vocabulary()
        rng = np.random.default_rng(0)
        steps = rng.integers(1, len(self.vocabulary) // TERMS, size=(WINDOW_ROWS, TERMS))
        self._tokens = np.cumsum(steps, axis=1).astype(np.int32)
        self._weights = np.exp(rng.normal(-1.2, 0.9, size=(WINDOW_ROWS, TERMS))).clip(0.001, 3.5).astype(np.float32)
        self._window = FirstWindow(range(128), False)  # type: ignore[arg-type]

    def missing_packages(self) -> list[str]:
        """Return none."""
        return []

    def tokenize(self, texts: Sequence[str]) -> list[FirstWindow]:
        """Return 128 tokens for each text."""
        return [self._window] * len(texts)

    def encode_tokens(self, windows: Sequence[FirstWindow], progress: Callable[[int, int], None]) -> Encoded:
        """Return the fixed vectors after the time that a model of this speed takes."""
        count = len(windows)
        time.sleep(count / self._speed)
        progress(count, 128 * count)
        indptr = np.arange(count + 1, dtype=np.int64) * TERMS
        vectors = SparseRows([""] * count, indptr, self._tokens[:count].ravel(), self._weights[:count].ravel())
        return Encoded(vectors, 128 * count, 0, np.zeros(count, dtype=np.int64), np.ones(count, dtype=np.int64))


def work(corpus: str, out: Path, speed: float, shard_rows: int, step: str, limit: int | None) -> None:
    """Run one step of a shared run, as encode.py does: plan, finish or a part. Print its seconds."""
    dtype = SimpleNamespace(manifest=SimpleNamespace(identity={"dtype": "float32"}))
    like: Any = SimpleNamespace(maker=SimpleNamespace(encoder=StubEncoder(speed)), run=dtype) if speed else None
    options, model = EncodeOptions(shard_rows=shard_rows, limit=limit), pipeline_of("package:cognition/model", None)
    source = open_corpus([corpus], fields=FieldNames())
    job = Job(Worker("cpu"), source, out, model, options, SilentReporter(), like)
    if "/" in step:
        job.maker  # noqa: B018 - the model is built before the clock starts
    began = time.perf_counter()
    if step == "finish":
        with job.alone():
            job.refuse_missing()
            job.make_all()
            job.finish()
    else:
        starts = job.starts
        job.make(range(0) if step == "plan" else part_of(step, starts))
    print(time.perf_counter() - began)


class Times(NamedTuple):
    """Seconds of processes that started at the same time, and those of the slowest one's step without its start."""

    total: float
    step: float


class Team:
    """The processes of a run."""

    def __init__(self, corpus: Path, out: Path, options: argparse.Namespace, limit: int | None = None) -> None:
        self._arguments = ["work", str(corpus), str(out), str(options.speed), str(options.shard_rows)]
        self._limit = [] if limit is None else ["--limit", str(limit)]

    def _start(self, step: str) -> subprocess.Popen[str]:
        program = [sys.executable, __file__, *self._arguments, step, *self._limit]
        return subprocess.Popen(program, stdout=subprocess.PIPE, text=True)

    def run(self, *steps: str, kill_at: Sequence[float] = ()) -> Times:
        """Run steps at the same time. Kill them in turn at these seconds, and start each again immediately."""
        began, running, waiting = time.perf_counter(), dict(enumerate(map(self._start, steps))), list(kill_at)
        seconds = []
        while running:
            time.sleep(0.05)
            for number, process in list(running.items()):
                if (code := process.poll()) is not None:
                    printed, _ = process.communicate()
                    del running[number]
                    if code:
                        raise SystemExit(f"{steps[number]} ended with exit code {code}.")
                    seconds.append(float(printed))
            if waiting and running and time.perf_counter() - began >= waiting[0]:
                waiting.pop(0)
                number = sorted(running)[len(waiting) % len(running)]
                running[number].kill()
                running[number].communicate()
                running[number] = self._start(steps[number])
        return Times(time.perf_counter() - began, max(seconds))


@dataclass(frozen=True)
class Costs:
    """Measured on the first shards, in seconds: starting a process, a row made, a row checked, a row finished."""

    start: float
    made: float
    checked: float
    finished: float

    def predicted(self, rows: int, shard_rows: int, workers: int, kills: int) -> float:
        """Return the time of the parts and of the finish, with kills that are spread over the workers.

        A kill costs the start of a process, half a window that is made again, and half a shard whose rows are read
        again.
        """
        shards, window_rows = -(-rows // shard_rows), min(WINDOW_ROWS, shard_rows)
        of_a_part = min(rows, -(-shards // workers) * shard_rows)
        killed = self.start + window_rows / 2 * self.made + shard_rows / 2 * self.checked
        parts = self.start + of_a_part * self.made + -(-kills // workers) * killed
        return parts + self.start + rows * self.finished


def measured(team: Team, parts: Sequence[str], rows: int) -> Costs:
    """Encode the first shards and return what it costs."""
    team.run("plan")
    made, checked, finished = team.run(*parts), team.run(*parts), team.run("finish")
    start = sorted(times.total - times.step for times in (made, checked, finished))[1]
    of_a_part = rows / len(parts)
    return Costs(start, made.step / of_a_part, checked.step / of_a_part, finished.step / rows)


def rehearse(options: argparse.Namespace, folder: Path) -> None:
    """Predict the time of a run, then run it and compare."""
    corpus, workers, rows = folder / "corpus.jsonl", options.workers, options.documents
    parts = [f"{number}/{workers}" for number in range(1, workers + 1)]
    write_corpus(corpus, rows)
    sample = min(rows, SAMPLE_SHARDS * options.shard_rows)
    costs = measured(Team(corpus, folder / "sample", options, sample), parts, sample)
    print("the first shards, seconds:", ", ".join(f"{name} {cost:.3g} (m)" for name, cost in vars(costs).items()))
    predicted = costs.predicted(rows, options.shard_rows, workers, options.kills)
    rng = random.Random(options.seed)
    kill_at = sorted(rng.uniform(costs.start, 0.8 * predicted) for _ in range(options.kills))
    team = Team(corpus, folder / "run", options)
    print(f"planned {corpus.stat().st_size / 1e6:,.0f} MB in {team.run('plan').step:.1f} s (m)", flush=True)
    real = team.run(*parts, kill_at=kill_at).total + team.run("finish").total
    print(
        f"{rows:,} documents, {workers} workers, {options.kills} kills: predicted {predicted:.0f} s, real {real:.0f} s "
        f"(m), difference {predicted / real - 1:+.0%}"
    )
    made, first = folder / "run" / "shards", list((folder / "sample" / "shards").iterdir())
    same = all((made / path.name).read_bytes() == path.read_bytes() for path in first)
    size = sum(path.stat().st_size for path in made.iterdir())
    print(f"{size / rows:.0f} bytes a document (m); the first shards have the bytes of undisturbed ones: {same}")
    if options.url:
        load_sample(folder / "sample", options.url, sample)


def load_sample(run: Path, url: str, documents: int) -> None:
    """Load the first shards, and delete the index."""
    name, began = f"scale-{int(time.time())}", time.perf_counter()
    connection = si.Connection(url=url)
    si.load(run, index=name, connection=connection)
    print(f"loaded {documents:,} documents with {documents / (time.perf_counter() - began):,.0f} documents/s (m)")
    si.drop_index(name, connection=connection)


def write_corpus(path: Path, documents: int) -> None:
    """Write rows with a text of 700 bytes."""
    words = random_vocabulary()
    rng = random.Random(0)
    texts = [" ".join(rng.choices(words, k=120))[:TEXT_BYTES].ljust(TEXT_BYTES, ".") for _ in range(1000)]
    with path.open("w") as file:
        for row in range(documents):
            file.write(json.dumps({"_id": str(row), "text": texts[row % 1000]}) + "\n")


def main() -> None:
    """Run one command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("table")
    for name, default in vars(Prices()).items():
        flag = name.replace("_", "-") if name == "cluster_vcpus" else f"{name}-price"
        one.add_argument(f"--{flag}", dest=name, type=type(default), default=default)
    one = commands.add_parser("rehearse")
    numbers = {"documents": 1_000_000, "speed": 4_000.0, "shard-rows": SHARD_ROWS, "workers": 2, "kills": 6, "seed": 1}
    for name, number in numbers.items():
        one.add_argument(f"--{name}", type=type(number), default=number)
    one.add_argument("--url")
    one = commands.add_parser("work")
    for name, kind in {"corpus": str, "out": Path, "speed": float, "shard_rows": int, "step": str}.items():
        one.add_argument(name, type=kind)
    one.add_argument("--limit", type=int)
    options = parser.parse_args()
    given = {name: value for name, value in vars(options).items() if name != "command"}
    if options.command == "work":
        work(**given)
    elif options.command == "table":
        print("\n".join(table(Prices(**given))))
    else:
        with tempfile.TemporaryDirectory() as folder:
            rehearse(options, Path(folder))


if __name__ == "__main__":
    main()
