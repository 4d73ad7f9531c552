"""Requests/s and latency of `sparse-ingest serve`, beside FastAPI with sentence-transformers and opensearch-py.

    python benchmarks/serve.py --run FOLDER [--passages 10000] [--rounds 6] [--soak 60] [--url URL]

Docstrings of this environment (passages.py) are encoded once into FOLDER with the small checkpoint of the demo, and
loaded into one index. Its queries are encoded by that masked LM, or by a weight table (inference-free). Both services
(the other is serve_peer.py), one process each, search that index: 1, 8 and 32 clients, each with one connection, send
GET /search for 10 hits, with another query each time. The contenders take turns of one second. Clients, services and
the server share the machine. The default of /search explains each score, which the peer does not: it compares with
terms=false. Then 32 clients search for `--soak` seconds, and errors and the growth of the service's memory are printed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import cycle
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import psutil
from load import scratch, server
from search import prepare

import sparse_ingest as si
from sparse_ingest.checkpoints.layouts import read_checkpoint
from sparse_ingest.corpora.collections import read_queries
from sparse_ingest.local_server.process import free_port
from sparse_ingest.reporting import TqdmReporter

MODEL = "package:cognition/model"
INDEX = "sparse-ingest-bench-serve"
CLIENTS = (1, 8, 32)
_START_S = 180.0
_SECONDS = 1.0


class Load(NamedTuple):
    """What clients measured: latencies of the answers in s, failed requests, and how long they asked."""

    latencies: list[float]
    errors: int
    seconds: float

    def row(self) -> str:
        """Return requests/s, percentiles and errors as cells of a table."""
        p = [1000 * one for one in statistics.quantiles(self.latencies, n=100)] if len(self.latencies) > 1 else [0] * 99
        return f"{len(self.latencies) / self.seconds:,.0f} | {p[49]:.1f} | {p[94]:.1f} | {p[98]:.1f} | {self.errors}"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder for corpus, queries and run; reused")
    parser.add_argument("--passages", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=6, help="turns of a second that each row has")
    parser.add_argument("--soak", type=float, default=60, help="seconds of the last measurement; 0: none")
    parser.add_argument("--url", help=f"OpenSearch to use; the index {INDEX} is created and deleted there")
    parser.add_argument("--heap", default="2g", help="heap of the server that is started without --url")
    given = parser.parse_args()
    corpus = prepare(given.run, given.passages)
    idf = given.run / "table" / "idf.json"
    if not idf.exists():
        make_table(given.run / "corpus.jsonl", idf)
    texts = [query.text for query in read_queries(given.run / "queries.jsonl")]
    with scratch() as folder, server(given.url, folder, given.heap) as url:
        si.load(given.run / "run", index=INDEX, url=url, merge=True, replace=True, progress=TqdmReporter())
        try:
            print(f"{corpus}\n{os.cpu_count()} CPUs, {MODEL}, {len(texts)} queries\n")
            print("| queries | service | clients | requests/s | p50 ms | p95 ms | p99 ms | errors |")
            print("|---|---|---|---|---|---|---|---|")
            for queries in ("inference-free", "masked LM"):
                table = idf.parent if queries == "inference-free" else None
                compare(queries, url, table, texts, given.rounds)
            if given.soak:
                for table in (idf.parent, None):
                    soak(url, table, texts, given.soak)
        finally:
            with si.connect(url=url) as client:
                client.call("DELETE", f"/{INDEX}")


def make_table(corpus: Path, out: Path) -> None:
    """Write a folder with a weight table for the vocabulary of the model."""
    transformer = read_checkpoint(MODEL).transformer
    out.parent.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (out.parent / name).write_bytes((transformer / name).read_bytes())
    si.write_idf(corpus, out, model=MODEL)


def compare(queries: str, url: str, table: Path | None, texts: Sequence[str], rounds: int) -> None:
    """Print the rows of both services for one kind of queries."""
    paths = {"`serve`": "/search?k=10&q=", "`serve`, terms=false": "/search?k=10&terms=false&q=", "FastAPI": ""}
    paths["FastAPI"] = paths["`serve`"]
    with running(ours(url, table)) as (_, port), running(peer(url, table)) as (_, other):
        for at in (port, other):  # warm
            asyncio.run(ask(at, paths["FastAPI"], texts, CLIENTS[-1], 3))
        for clients in CLIENTS:
            found = {name: Load([], 0, 0) for name in paths}
            for _ in range(rounds):
                for name, path in paths.items():
                    one = asyncio.run(ask(other if name == "FastAPI" else port, path, texts, clients, _SECONDS))
                    before = found[name]
                    found[name] = Load(
                        before.latencies + one.latencies, before.errors + one.errors, before.seconds + one.seconds
                    )
            for name, load in found.items():
                print(f"| {queries} | {name} | {clients} | {load.row()} |", flush=True)


def soak(url: str, table: Path | None, texts: Sequence[str], seconds: float) -> None:
    """Print errors and memory of the service after many requests of 32 clients."""
    with running(ours(url, table)) as (process, port):
        asyncio.run(ask(port, "/search?k=10&q=", texts, CLIENTS[-1], 10))
        before = process.memory_info().rss
        found = asyncio.run(ask(port, "/search?k=10&q=", texts, CLIENTS[-1], seconds))
        grown = (process.memory_info().rss - before) / 1e6
        kind = "inference-free" if table else "masked LM"
        print(
            f"\n{seconds:g} s, {CLIENTS[-1]} clients, {kind}: {len(found.latencies):,} requests, {found.errors} "
            f"errors; memory {before / 1e6:.0f} MB, {grown:+.1f} MB"
        )


def ours(url: str, table: Path | None) -> list[str]:
    """Return the command of this package's service, without its port."""
    program = "from sparse_ingest.cli.main import main; main()"
    sets = ["--set", f"model.document={MODEL}", "--set", f"model.query={table}", "--force"] if table else []
    return [sys.executable, "-c", program, "serve", "-q", "--index", INDEX, "--url", url, *sets]


def peer(url: str, table: Path | None) -> list[str]:
    """Return the command of the other service, without its port."""
    model = str(read_checkpoint(MODEL).transformer)
    script = [sys.executable, str(Path(__file__).with_name("serve_peer.py"))]
    return [
        *script,
        "--url",
        url,
        "--index",
        INDEX,
        "--model",
        model,
        *(["--idf", f"{table}/idf.json"] if table else []),
    ]


@contextmanager
def running(command: list[str]) -> Iterator[tuple[psutil.Process, int]]:
    """Yield the process and the port of a service that answers; end it after the block."""
    port = free_port(20_000)
    process = subprocess.Popen([*command, "--port", str(port)])
    try:
        end = time.monotonic() + _START_S
        while time.monotonic() < end and process.poll() is None:
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz") as answer:
                json.load(answer)
                break
            time.sleep(0.1)
        yield psutil.Process(process.pid), port
    finally:
        process.terminate()
        process.wait()


async def ask(port: int, path: str, texts: Sequence[str], clients: int, seconds: float) -> Load:
    """Send requests from some clients, each over one connection, until the time is over."""
    turn = cycle(texts)
    found = Load([], 0, seconds)
    errors = 0
    end = time.perf_counter() + seconds

    async def client() -> None:
        nonlocal errors
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while (began := time.perf_counter()) < end:
            writer.write(f"GET {path}{quote(next(turn))} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0])
            body = await reader.readexactly(length)
            if head.startswith(b"http/1.1 200") and b'"hits":[{' in body:
                found.latencies.append(time.perf_counter() - began)
            else:
                errors += 1
        writer.close()

    await asyncio.gather(*(client() for _ in range(clients)))
    return found._replace(errors=errors)


if __name__ == "__main__":
    main()
