"""The contenders of benchmarks/load.py, each run once in its own process.

    python benchmarks/loaders.py '{"loader": "parallel_bulk", "run": RUN, "url": URL, "index": NAME, ...}'

Prints one JSON object: documents, seconds, CPU seconds (all threads, user and system), and peak memory of this process.
The index exists with the alias NAME-alias, except for "load", which creates it. All read the same run folder; imports,
the connection and the vocabulary do not count, except for "load".
"""

from __future__ import annotations

import http.client
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

from opensearchpy import OpenSearch
from opensearchpy import helpers as opensearch_helpers
from opensearchpy.serializer import JSONSerializer

from sparse_ingest.cluster.bulk_bodies import BodyWriter, BulkRequest
from sparse_ingest.cluster.client import connect
from sparse_ingest.cluster.connection import Connection
from sparse_ingest.cluster.pacing import Pace
from sparse_ingest.cluster.sending import send
from sparse_ingest.loading.load import load
from sparse_ingest.pipeline import IndexSettings, Pipeline
from sparse_ingest.pruning import prune
from sparse_ingest.runs.run import Run, open_run
from sparse_ingest.runs.shards import read_shard

FIELD = "sparse"
Job = dict[str, Any]
Work = Callable[[], int]  # loads, and returns the number of documents


def main() -> None:
    """Run the job of the first argument."""
    job: Job = json.loads(sys.argv[1])
    work = LOADERS[job["loader"]](job)
    before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    documents = work()
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(json.dumps({"documents": documents, "seconds": seconds, "cpu_s": cpu, "peak_bytes": peak_bytes()}))


def peak_bytes() -> int:
    """Return the peak memory of this process."""
    status = Path("/proc/self/status")
    if status.exists():
        # getrusage would include the memory of the parent process.
        return int(next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM"))) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def complete_load(job: Job) -> Work:
    """Run `sparse-ingest load`: check the run, create the index, send, refresh, count."""
    pipeline = Pipeline(index=IndexSettings(field=FIELD, body=job["body"]))
    connection = Connection(job["url"])
    return lambda: load(Path(job["run"]), index=job["index"], pipeline=pipeline, connection=connection).documents


def only_sending(job: Job) -> Work:
    """Send the bulk bodies of this package with its sender, nothing else."""
    run = open_run(Path(job["run"]))
    client = connect(Connection(job["url"]))
    writer = BodyWriter(run.vocabulary(), FIELD)
    pace = Pace(max_in_flight=job.get("connections", 8))

    def work() -> int:
        requests = _requests(run, writer, pace.max_bytes, job.get("top_k"))
        with closing(client):
            return sum(one.acknowledged for one in send(client, requests, target=f"{job['index']}-alias", pace=pace))

    return work


def rendered_before(job: Job) -> Work:
    """Send the same bytes, built before the clock starts, with one plain loop per connection."""
    run = open_run(Path(job["run"]))
    ready: SimpleQueue[BulkRequest] = SimpleQueue()
    for request in _requests(run, BodyWriter(run.vocabulary(), FIELD), job["max_bytes"], None):
        ready.put(request)
    address = urlsplit(job["url"])
    path = f"/{job['index']}/_bulk?filter_path=errors"
    taken: list[int] = []

    def post() -> None:
        connection = http.client.HTTPConnection(address.hostname or "", address.port)
        while True:
            try:
                request = ready.get_nowait()
            except Empty:
                return
            connection.request("POST", path, request.body, {"Content-Type": "application/json"})
            if json.loads(connection.getresponse().read()) == {"errors": False}:
                taken.append(len(request.doc_ids))

    def work() -> int:
        threads = [Thread(target=post) for _ in range(job["connections"])]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sum(taken)

    return work


def streaming(job: Job) -> Work:
    """Load with streaming_bulk of opensearch-py or elasticsearch-py."""
    (client, helpers), run = _their_client(job, 1), open_run(Path(job["run"]))
    vocabulary = run.vocabulary()

    def work() -> int:
        actions = _actions(run, vocabulary, job["index"])
        return sum(ok for ok, _ in helpers.streaming_bulk(client, actions, chunk_size=job["chunk"]))

    return work


def parallel(job: Job) -> Work:
    """Load with parallel_bulk of opensearch-py or elasticsearch-py."""
    (client, helpers), run = _their_client(job, job["threads"]), open_run(Path(job["run"]))
    vocabulary = run.vocabulary()

    def work() -> int:
        actions = _actions(run, vocabulary, job["index"])
        results = helpers.parallel_bulk(client, actions, thread_count=job["threads"], chunk_size=job["chunk"])
        return sum(ok for ok, _ in results)

    return work


def _requests(
    run: Run, writer: BodyWriter, max_bytes: int | Callable[[], int], top_k: int | None
) -> Iterator[BulkRequest]:
    for shard in run.done_shards():
        parts = read_shard(run.shard_path(shard))
        chosen = (part._replace(vectors=prune(part.vectors, top_k=top_k)) for part in parts) if top_k else parts
        yield from writer.requests(chosen, shard=shard, max_bytes=max_bytes)


def _their_client(job: Job, threads: int) -> tuple[Any, Any]:
    """Return the client of the product and its bulk helpers."""
    if job["product"] == "elasticsearch":
        import elasticsearch  # type: ignore[import-not-found, unused-ignore]
        from elasticsearch import helpers  # type: ignore[import-not-found, unused-ignore]

        options: Job = {"connections_per_node": max(threads, 8), "request_timeout": 120}
        if job["serializer"] == "orjson":
            options["serializers"] = {"application/json": elasticsearch.OrjsonSerializer()}
        return elasticsearch.Elasticsearch(job["url"], **options), helpers
    address = urlsplit(job["url"])
    client = OpenSearch(
        hosts=[{"host": address.hostname, "port": address.port}],
        serializer=_Orjson() if job["serializer"] == "orjson" else JSONSerializer(),
        pool_maxsize=max(threads, 8),
        timeout=120,
    )
    return client, opensearch_helpers


class _Orjson(JSONSerializer):
    """A serializer for the helpers, which need the dump as text."""

    def dumps(self, data: Any) -> Any:
        import orjson

        return data if isinstance(data, str | bytes) else orjson.dumps(data).decode()


def _actions(run: Run, vocabulary: list[str | None], index: str) -> Iterator[dict[str, Any]]:
    """Yield one dict per document for the helpers, with as little Python work as possible."""
    token_of = vocabulary.__getitem__
    for shard in run.done_shards():
        for part in read_shard(run.shard_path(shard)):
            tokens = list(map(token_of, part.vectors.token_ids.tolist()))
            weights = part.vectors.weights.tolist()
            borders = part.vectors.indptr.tolist()
            for place, doc_id in enumerate(part.vectors.doc_ids):
                terms = slice(borders[place], borders[place + 1])
                vector = dict(zip(tokens[terms], weights[terms], strict=True))
                source = {**json.loads(part.fields[place]), FIELD: vector}
                yield {"_index": index, "_id": doc_id, "_source": source}


LOADERS: dict[str, Callable[[Job], Work]] = {
    "load": complete_load,
    "send": only_sending,
    "ceiling": rendered_before,
    "streaming_bulk": streaming,
    "parallel_bulk": parallel,
}

if __name__ == "__main__":
    main()
