"""Documents/s into a cluster: `sparse-ingest`, the helpers of the product's client, and the server's ceiling.

    python benchmarks/load.py [--documents 100000] [--terms 120] [--rounds 2] [--shards 2] [--url URL]
    python benchmarks/load.py --settings [...]    server settings, one at a time, with index sizes
    python benchmarks/load.py --storage [...]     the two values of [index] source, with index sizes

A run of random vectors is written first (large_run.py). The contenders (loaders.py) run one after another, each in its
own process and into its own index with the same body, without replicas and refreshes; a row is the median of the
rounds. The ceiling sends the same bytes as sparse-ingest with plain loops, built before the clock starts; it and
parallel_bulk are first tried with several settings on a fifth of the documents, and the best one takes part. The
helpers are those of opensearch-py, or of elasticsearch-py if --url is an Elasticsearch; they use orjson if it is
installed. Without --url an OpenSearch is started, and deleted afterwards. Not covered: replicas, which a single node
does not allocate.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from secrets import token_hex
from typing import Any, NamedTuple

from large_run import make_large_run

from sparse_ingest.cluster.client import Client, connect
from sparse_ingest.cluster.connection import Connection
from sparse_ingest.cluster.dialects import Dialect
from sparse_ingest.errors import ClusterError
from sparse_ingest.local_server import process
from sparse_ingest.reporting import TqdmReporter

Settings = dict[str, Any]


def body_for(dialect: Dialect, shards: int, source: str = "exclude") -> Settings:
    """Return the body of every index."""
    entry = dialect.field_entry()
    body: Settings = {
        "settings": {"index": {"number_of_replicas": 0, "refresh_interval": "-1", "number_of_shards": shards}},
        "mappings": {
            "dynamic": False,
            "_source": {"excludes": ["sparse"] if source == "exclude" else []},
            "properties": {"title": {"type": "text"}, "sparse": entry},
        },
    }
    dialect.complete_body(body, entry, source)
    return body


class Measured(NamedTuple):
    """One run of one contender; `server_s` are CPU seconds of the server."""

    documents: int
    seconds: float
    cpu_s: float
    server_s: float
    peak_bytes: int
    megabytes: float = 0
    merged_megabytes: float = 0

    @property
    def rate(self) -> float:
        """Documents/s."""
        return self.documents / self.seconds


@dataclass(frozen=True)
class Bench:
    """The server and folders of the measurements."""

    client: Client
    url: str
    folder: Path
    serializer: str

    def measure(self, job: Settings, run: Path, body: Settings, *, sizes: bool = False) -> Measured:
        """Run one contender into a new index, then delete the index."""
        index = f"sparse-ingest-bench-{token_hex(4)}"
        job = {**job, "run": str(run), "url": self.url, "index": index, "serializer": self.serializer}
        job["product"] = self.client.dialect.product
        if job["loader"] == "load":
            path = self.folder / "body.json"
            path.write_text(json.dumps(body))
            job["body"] = str(path)
        else:
            self.client.call("PUT", f"/{index}", body)
            self.client.call("PUT", f"/{index}/_alias/{index}-alias")
        try:
            before = self._server_cpu_s()
            done = subprocess.run(
                [sys.executable, str(Path(__file__).with_name("loaders.py")), json.dumps(job)],
                stdout=subprocess.PIPE, text=True, check=True,
            )  # fmt: skip
            found = json.loads(done.stdout.splitlines()[-1])
            server_s = self._server_cpu_s() - before
            self.client.call("POST", f"/{index}/_refresh")
            count = self.client.call("GET", f"/{index}/_count")["count"]
            if count != found["documents"]:
                raise SystemExit(f"{job['loader']}: {found['documents']} documents sent, {count} in the index.")
            megabytes = self._sizes(index) if sizes else (0.0, 0.0)
            return Measured(
                found["documents"], found["seconds"], found["cpu_s"], server_s, found["peak_bytes"], *megabytes
            )
        finally:
            with suppress(ClusterError):
                self.client.call("DELETE", f"/{index}")

    def _server_cpu_s(self) -> float:
        nodes = self.client.call("GET", "/_nodes/stats/process")["nodes"].values()
        return float(sum(node["process"]["cpu"]["total_in_millis"] for node in nodes)) / 1000

    def _sizes(self, index: str) -> tuple[float, float]:
        found = []
        for merge in (False, True):
            if merge:
                self.client.call(
                    "POST", f"/{index}/_forcemerge", params={"max_num_segments": "1", "flush": "true"}, timeout_s=600
                )
            # The refresh releases merged segments.
            self.client.call("POST", f"/{index}/_refresh")
            self.client.call("POST", f"/{index}/_flush", params={"force": "true"})
            primaries = self.client.call("GET", f"/{index}/_stats/store")["_all"]["primaries"]
            found.append(primaries["store"]["size_in_bytes"] / 1e6)
        return found[0], found[1]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--terms", type=int, default=120)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--url", help="cluster to use; indexes sparse-ingest-bench-* are created and deleted there")
    parser.add_argument("--heap", default="2g", help="heap of the server that is started without --url")
    parser.add_argument("--settings", action="store_true", help="measure server settings instead")
    parser.add_argument("--storage", action="store_true", help="measure the two values of [index] source instead")
    given = parser.parse_args()
    serializer = "orjson" if importlib.util.find_spec("orjson") else "json"
    with scratch() as folder, server(given.url, folder, given.heap) as url:
        bench = Bench(connect(Connection(url)), url, folder, serializer)
        run, trial = folder / "run", folder / "trial"
        make_large_run(run, given.documents, given.terms)
        dialect = bench.client.dialect
        body = body_for(dialect, given.shards)
        print(
            f"{given.documents} documents of {given.terms} terms, {given.rounds} rounds, {given.shards} shards, "
            f"{dialect.name} {'.'.join(map(str, dialect.version))}, {os.cpu_count()} CPUs, {serializer}"
        )
        if given.settings:
            compare_settings(bench, run, body, given.rounds)
        elif given.storage:
            compare_storage(bench, run, given.shards, given.rounds)
        else:
            make_large_run(trial, max(5000, given.documents // 5), given.terms)
            compare_loaders(bench, run, trial, body, given.rounds)


def compare_loaders(bench: Bench, run: Path, trial: Path, body: Settings, rounds: int) -> None:
    """Print the table of contenders."""
    bench.measure({"loader": "send"}, trial, body)  # warm-up of the server's JIT compiler
    ceiling = best(
        bench, trial, body, "ceiling",
        [{"connections": count, "max_bytes": size << 20} for count, size in product((2, 3, 4), (2, 8))],
    )  # fmt: skip
    parallel = best(
        bench, trial, body, "parallel_bulk",
        [{"threads": threads, "chunk": chunk} for threads, chunk in product((1, 2, 4, 8), (500, 2000, 5000))],
    )  # fmt: skip
    jobs: dict[str, Settings] = {
        "ceiling: bytes made before": ceiling,
        "sparse-ingest, sending only": {"loader": "send"},
        "sparse-ingest load": {"loader": "load"},
        f"parallel_bulk {parallel['threads']}x{parallel['chunk']}": parallel,
        "streaming_bulk 500": {"loader": "streaming_bulk", "chunk": 500},
    }
    found = alternate({name: partial(bench.measure, job, run, body) for name, job in jobs.items()}, rounds)
    top, rival = (statistics.median(one.rate for one in found[name]) for name in (list(jobs)[0], list(jobs)[3]))
    print(f"\n{'':<30}{'docs/s':>8}{'min':>8}{'max':>8}{'of':>9}{'of best':>10}{'client CPU s':>14}"
          f"{'server CPU s':>14}{'client':>9}")  # fmt: skip
    print(f"{'':<30}{'':>24}{'ceiling':>9}{'parallel':>10}{'per 100,000':>14}{'per 100,000':>14}{'MB':>9}")
    for name, some in found.items():
        rate = statistics.median(one.rate for one in some)
        print(f"{name:<30}{rate:>8.0f}{min(one.rate for one in some):>8.0f}{max(one.rate for one in some):>8.0f}"
              f"{rate / top:>9.2f}{rate / rival:>10.2f}{per_100_000(some, 'cpu_s'):>14.2f}"
              f"{per_100_000(some, 'server_s'):>14.1f}{max(one.peak_bytes for one in some) / 1e6:>9.0f}")  # fmt: skip


def compare_storage(bench: Bench, run: Path, shards: int, rounds: int) -> None:
    """Print the rate and the sizes of an index for both values of [index] source."""
    print(f"{'source':<10} {'documents/s':>11} {'MB':>8} {'MB merged':>10}")
    for source in ("exclude", "keep"):
        body = body_for(bench.client.dialect, shards, source)
        some = [bench.measure({"loader": "send"}, run, body, sizes=True) for _ in range(rounds)]
        rate, last = statistics.median(one.rate for one in some), some[-1]
        print(f"{source:<10} {rate:>11.0f} {last.megabytes:>8.1f} {last.merged_megabytes:>10.1f}")


def compare_settings(bench: Bench, run: Path, body: Settings, rounds: int) -> None:
    """Print the table of settings; each changes the first row."""
    # The server caches sizes for 10 s.
    body = changed(body, {"settings": {"index": {"store": {"stats_refresh_interval": "0ms"}}}})

    def index(**settings: Any) -> Settings:
        return changed(body, {"settings": {"index": settings}})

    def source(**settings: Any) -> Settings:
        return changed(body, {"mappings": {"_source": settings}})

    rows: dict[str, tuple[Settings, Settings]] = {
        "vector outside _source, refresh -1": (body, {}),
        "vector in _source": (source(excludes=[]), {}),
        "no _recovery_source": (source(recovery_source_enabled=False), {}),
        "refresh every second": (index(refresh_interval="1s"), {}),
        "1 shard": (index(number_of_shards=1), {}),
        "4 shards": (index(number_of_shards=4), {}),
        "translog async": (index(translog={"durability": "async"}), {}),
        "translog flushed at 2 GB": (index(translog={"flush_threshold_size": "2gb"}), {}),
        "merges of 30 segments": (index(merge={"policy": {"segments_per_tier": 30, "max_merge_at_once": 30}}), {}),
        "codec best_compression": (index(codec="best_compression"), {}),
        "--top-k 60": (body, {"top_k": 60}),
    }
    bench.measure({"loader": "send"}, run, body)
    found = alternate(
        {
            name: partial(bench.measure, {"loader": "send", **extra}, run, one, sizes=True)
            for name, (one, extra) in rows.items()
        },
        rounds,
    )
    print(f"\n{'':<36}{'docs/s':>8}{'min':>8}{'max':>8}{'server CPU s':>14}{'MB':>9}{'MB after':>10}")
    print(f"{'':<36}{'':>24}{'per 100,000':>14}{'':>9}{'merge':>10}")
    for name, some in found.items():
        rates = [one.rate for one in some]
        print(f"{name:<36}{statistics.median(rates):>8.0f}{min(rates):>8.0f}{max(rates):>8.0f}"
              f"{per_100_000(some, 'server_s'):>14.1f}{statistics.median(one.megabytes for one in some):>9.1f}"
              f"{statistics.median(one.merged_megabytes for one in some):>10.1f}")  # fmt: skip


def alternate(work: dict[str, Callable[[], Measured]], rounds: int) -> dict[str, list[Measured]]:
    """Run each once per round, every other round in the opposite order."""
    found: dict[str, list[Measured]] = {name: [] for name in work}
    for turn in range(rounds):
        for name in list(work) if turn % 2 == 0 else reversed(list(work)):
            found[name].append(work[name]())
            print(f"round {turn + 1}: {name}: {found[name][-1].rate:.0f} docs/s", file=sys.stderr)
    return found


def best(bench: Bench, run: Path, body: Settings, loader: str, candidates: list[Settings]) -> Settings:
    """Return the fastest of several settings."""
    rates = {}
    for candidate in candidates:
        job = {"loader": loader, **candidate}
        rates[bench.measure(job, run, body).rate] = job
        print(f"{loader} {candidate}: {next(reversed(rates)):.0f} docs/s", file=sys.stderr)
    return rates[max(rates)]


def per_100_000(some: list[Measured], field: str) -> float:
    """Return the median seconds per 100,000 documents."""
    return statistics.median(float(getattr(one, field)) / one.documents * 1e5 for one in some)


def changed(body: Settings, changes: Settings) -> Settings:
    """Return the body with some values replaced, at any depth."""
    merged = dict(body)
    for name, value in changes.items():
        merged[name] = changed(body.get(name, {}), value) if isinstance(value, dict) else value
    return merged


@contextmanager
def scratch() -> Iterator[Path]:
    """Yield a folder that the server's user can enter."""
    folder = Path(tempfile.mkdtemp(prefix="sparse-ingest-bench-"))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def server(url: str | None, folder: Path, heap: str) -> Iterator[str]:
    """Yield the address of the given server, or of a new one."""
    if url:
        yield url
        return
    data = folder / "data"
    data.mkdir()
    data.chmod(0o755)
    port = process.free_port(9400)
    try:
        yield process.start(port, data=data, heap=heap, reporter=TqdmReporter()).url
    finally:
        process.stop(port)


if __name__ == "__main__":
    main()
