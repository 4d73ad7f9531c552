"""Recall and latency of exact, two-phase and SEISMIC search on one corpus of real text.

    python benchmarks/search.py --run FOLDER [--passages 200000] [--queries 200] [--rounds 3] [--url URL] [--keep]

Docstrings of this environment (passages.py) are encoded once into FOLDER with the small checkpoint of the demo, and
loaded into indexes of one merged segment: rank_features for exact and two-phase, sparse_vector for SEISMIC, with the
server's default and with longer posting lists (--n-postings). By default the server keeps the max(0.0005 x documents,
160) heaviest documents of a token; a document in no list of a query's top_n tokens is never found, so a table shows the
maximum recall of the lists. Time to build them grows with the square of n_postings. The loader sets
approximate_threshold below the number of passages, so that clusters exist; the benchmark checks that the explanation of
a hit mentions them. Settings of an index alternate, 20 queries at a time. Recall@10 is the share of the 10 best
documents of exact search that is found. Also measured: the time to encode a query, and the time of this package's
client compared with http.client and the same bytes. Without --url a server is started, and deleted at the end. Not
covered: concurrent searches, several shards, and relevance (`sparse-ingest evaluate`).
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import numpy as np
from load import scratch, server
from passages import make_corpus

from sparse_ingest.cluster.client import Client, connect
from sparse_ingest.cluster.connection import Connection
from sparse_ingest.cluster.engines import engine_body
from sparse_ingest.cluster.indexes import find_index
from sparse_ingest.cluster.search_bodies import Engine
from sparse_ingest.cluster.seismic import parameters_of
from sparse_ingest.corpora.collections import read_queries
from sparse_ingest.errors import ClusterError
from sparse_ingest.loading.load import load
from sparse_ingest.models.query_encoders import query_encoder
from sparse_ingest.pipeline import IndexSettings, Pipeline, packaged_folder
from sparse_ingest.planning.engines import SIZE, Setting, Timed, measure_settings
from sparse_ingest.queries.weight_table import QueryWeights
from sparse_ingest.reporting import TqdmReporter
from sparse_ingest.runs.run import Run, open_run
from sparse_ingest.runs.shards import read_shard_vectors
from sparse_ingest.searching.index_search import rank_index
from sparse_ingest.searching.pipelines import pipeline_of_run, token_keys
from sparse_ingest.searching.query import keyed, many_query_weights

MODEL = "package:cognition/model"
INDEX = "sparse-ingest-bench-search"
TWO_PHASE = (
    {"prune_ratio": 0.2},
    {"prune_ratio": 0.4},
    {"prune_ratio": 0.6},
    {"prune_ratio": 0.4, "expansion_rate": 20},
)
SEISMIC = (
    {"top_n": 3, "heap_factor": 1.0}, {"top_n": 5, "heap_factor": 1.0}, {"top_n": 10, "heap_factor": 0.8},
    {"top_n": 10, "heap_factor": 1.0}, {"top_n": 10, "heap_factor": 1.2}, {"top_n": 10, "heap_factor": 1.0, "k": 100},
    {"top_n": 20, "heap_factor": 1.0}, {"top_n": 20, "heap_factor": 1.5}, {"top_n": 20, "heap_factor": 1.5, "k": 100},
)  # fmt: skip
Kind = Literal["rank_features", "sparse_vector"]
Queries = list[tuple[str, QueryWeights]]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--run", type=Path, required=True, help="folder for corpus, queries and run; reused if it exists"
    )
    parser.add_argument("--passages", type=int, default=200_000)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3, help="how often each setting runs all queries")
    parser.add_argument("--url", help="OpenSearch to use; indexes sparse-ingest-bench-search-* are created there")
    parser.add_argument("--heap", default="2g", help="heap of the server that is started without --url")
    parser.add_argument("--n-postings", type=int, default=1000, help="n_postings of a second SEISMIC index; 0: none")
    parser.add_argument("--keep", action="store_true", help="keep the indexes for a later call")
    given = parser.parse_args()
    corpus = prepare(given.run, given.passages)
    with scratch() as folder, server(given.url, folder, given.heap) as url:
        client = connect(Connection(url))
        try:
            print(f"{corpus}\nOpenSearch {'.'.join(map(str, client.version))}, {os.cpu_count()} CPUs, {MODEL}, one "
                  f"shard of one segment, {given.queries} queries, {given.rounds} rounds")  # fmt: skip
            fill(client, given.run, folder, given.n_postings)
            compare(client, given.run, given.queries, given.rounds, given.n_postings)
        finally:
            for kind, n_postings in [] if given.keep else indexes(given.n_postings):
                with suppress(ClusterError):
                    client.call("DELETE", f"/{index_of(kind, n_postings)}")


def indexes(n_postings: int) -> list[tuple[Kind, int]]:
    """Return the kind of each index and the length of its posting lists; 0: the server's default."""
    both: list[tuple[Kind, int]] = [("rank_features", 0), ("sparse_vector", 0)]
    return [*both, ("sparse_vector", n_postings)] if n_postings else both


def index_of(kind: Kind, n_postings: int = 0) -> str:
    """Return the name of an index."""
    return f"{INDEX}-{kind.replace('_', '-')}" + (f"-{n_postings}" if n_postings else "")


def prepare(folder: Path, passages: int) -> str:
    """Create corpus, queries and run once, and return a description of them."""
    folder.mkdir(parents=True, exist_ok=True)
    said = folder / "corpus.txt"
    if not said.exists():
        said.write_text(make_corpus(folder, passages, 1000) + "\n")
    program = "from sparse_ingest.cli.main import main; main()"
    if not (folder / "run" / "complete.json").exists():
        subprocess.run(
            [sys.executable, "-c", program, "encode", "--model", MODEL, "--corpus", str(folder / "corpus.jsonl"),
             "--out", str(folder / "run"), "--dtype", "bfloat16", "--shard-rows", "16384"],
            check=True, stdout=sys.stderr,
        )  # fmt: skip
    complete = open_run(folder / "run").complete() or {}
    return f"{said.read_text().strip()}; {complete['terms'] / complete['rows']:.1f} terms per passage"


def fill(client: Client, folder: Path, room: Path, n_postings: int) -> None:
    """Load the run into every index; existing indexes are kept."""
    for kind, kept in indexes(n_postings):
        settings = IndexSettings(kind=kind)
        if kept:
            body = json.loads((packaged_folder() / "opensearch" / "sparse_vector.json").read_text())
            body["mappings"]["properties"]["sparse"]["method"]["parameters"]["n_postings"] = kept
            (room / "body.json").write_text(json.dumps(body))
            settings = IndexSettings(kind=kind, body=str(room / "body.json"))
        load(
            folder / "run", index=index_of(kind, kept), pipeline=Pipeline(index=settings), merge=True,
            url=client.address, progress=TqdmReporter(),
        )  # fmt: skip


def compare(client: Client, folder: Path, count: int, rounds: int, n_postings: int) -> None:
    """Print the three tables."""
    run = open_run(folder / "run")
    pipeline = pipeline_of_run(Pipeline(), run)
    queries = list(read_queries(folder / "queries.jsonl"))[:count]
    asked = [pair for pair in many_query_weights(queries, pipeline) if pair[1]]
    keyed_pipeline = Pipeline(model=pipeline.model, index=IndexSettings(kind="sparse_vector"))
    keys = token_keys(keyed_pipeline, find_index(client, index_of("sparse_vector")))
    engine = Engine("seismic", "sparse", "sparse_vector", keys, {}, {})
    for kind, kept in indexes(n_postings)[1:]:
        check_clusters(client, index_of(kind, kept), engine, asked)
    print(f"{np.mean([len(weights) for _, weights in asked]):.1f} tokens per query")
    exact = Setting(Engine(), {}, {})
    features = [exact, *(Setting(Engine("two-phase", two_phase=one), one, {}) for one in TWO_PHASE)]
    of_index = {index_of("rank_features"): features}
    for kind, kept in indexes(n_postings)[1:]:
        shown = {"n_postings": kept} if kept else {}
        of_index[index_of(kind, kept)] = [Setting(replace(engine, seismic=one), shown | one, {}) for one in SEISMIC]
    timed: list[Timed] = []
    for turn in range(rounds):
        for index, settings in of_index.items():
            timed += measure_settings(client, index, settings, [asked] * len(settings))
        print(f"round {turn + 1} done", file=sys.stderr)
    print_engines(timed, [setting for settings in of_index.values() for setting in settings])
    print_bounds(run, asked, n_postings)
    print_building(pipeline, [query.text for query in queries])
    print_overhead(client, asked, rounds)


def check_clusters(client: Client, name: str, engine: Engine, asked: Queries) -> None:
    """Exit if search of the sparse_vector field does not use its clusters."""
    index = find_index(client, name)
    assert index is not None
    threshold = parameters_of(index.mappings["properties"]["sparse"])["approximate_threshold"]
    body = engine_body(keyed(asked[0][1], engine.keys, {}), engine, size=1, explain=True)
    answer = client.call("POST", f"/{index.name}/_search", body)
    if "sparse_ann" not in json.dumps(answer["hits"]["hits"][0]["_explanation"]):
        raise SystemExit(
            f"No clusters answered (approximate_threshold {threshold}): the table would be of exact search."
        )
    print(f"{name}: approximate_threshold {threshold}, clusters answer")


def print_engines(timed: Sequence[Timed], settings: Sequence[Setting]) -> None:
    """Print recall and latency of each setting over all rounds."""
    truth = {one.query_id: set(one.doc_ids) for one in timed[0].ranked}
    of_exact = statistics.median(one.latency_s for run in timed if run.setting == settings[0] for one in run.ranked)
    print(f"\n{'':<52}{'recall':>8}{'client ms':>18}{'server ms':>18}{'exact':>8}")
    print(f"{'':<52}{'@10':>8}{'p50':>9}{'p95':>9}{'p50':>9}{'p95':>9}{'p50 /':>8}")
    for setting in settings:
        ranked = [one for run in timed if run.setting == setting for one in run.ranked]
        recall = np.mean([
            len(truth[one.query_id].intersection(one.doc_ids)) / max(1, len(truth[one.query_id])) for one in ranked
        ])  # fmt: skip
        client_ms = np.quantile([one.latency_s * 1000 for one in ranked], [0.5, 0.95])
        server_ms = np.quantile([one.took_ms or 0.0 for one in ranked], [0.5, 0.95])
        words = ", ".join(f"{name} {value:g}" for name, value in setting.parameters.items())
        print(f"{f'{setting.engine.name} {words}':<52}{recall:>8.3f}{client_ms[0]:>9.2f}{client_ms[1]:>9.2f}"
              f"{server_ms[0]:>9.0f}{server_ms[1]:>9.0f}{of_exact * 1000 / client_ms[0]:>8.2f}")  # fmt: skip


def print_bounds(run: Run, asked: Queries, n_postings: int) -> None:
    """Print the maximum recall: the share of the 10 best documents in the posting lists of a query's top_n tokens."""
    number = {token: token_id for token_id, token in enumerate(run.vocabulary()) if token is not None}
    wanted = np.zeros(len(run.vocabulary()), np.bool_)
    wanted[[number[token] for _, weights in asked for token in weights if token in number]] = True
    parts, documents = [], 0
    for shard in run.done_shards():
        for part in read_shard_vectors(run.shard_path(shard)):
            held = wanted[part.token_ids]
            rows = np.repeat(np.arange(documents, documents + len(part.doc_ids)), np.diff(part.indptr))
            parts.append((part.token_ids[held], rows[held], part.weights[held].astype(np.float32)))
            documents += len(part.doc_ids)
    token_ids, rows, postings = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    order = np.lexsort((-postings, token_ids))  # each list sorted from its heaviest document
    token_ids, rows, postings = token_ids[order], rows[order], postings[order]
    lengths = [max(160, documents // 2000), *([n_postings] if n_postings else [])]
    shares: dict[tuple[int, int], list[float]] = {}
    for _, weights in asked:
        known = [(np.searchsorted(token_ids, [number[token], number[token] + 1]), weight)
                 for token, weight in weights.items() if token in number]  # fmt: skip
        scores = np.zeros(documents)
        for (start, end), weight in known:
            scores[rows[start:end]] += postings[start:end] * weight
        best = np.argsort(-scores, kind="stable")[:10]
        for length, top_n in product(lengths, (3, 5, 10, 20)):
            lists = [rows[start : min(end, start + length)] for (start, end), _ in known[:top_n]]
            shares.setdefault((length, top_n), []).append(float(np.isin(best, np.concatenate(lists)).mean()))
    print()
    for (length, top_n), values in shares.items():
        print(f"lists of {length} documents, top_n {top_n}: recall of {np.mean(values):.3f} at most")


def print_building(pipeline: Pipeline, texts: Sequence[str]) -> None:
    """Print milliseconds from a text to its weights, alone and in batches, and from weights to request bytes."""
    began = time.perf_counter()
    encoder = query_encoder(pipeline.model)
    first = time.perf_counter() - began
    encoder.encode(texts[:5])
    alone = []
    for text in texts:
        began = time.perf_counter()
        [weights] = encoder.encode([text])
        alone.append(time.perf_counter() - began)
    began = time.perf_counter()
    for start in range(0, len(texts), 32):
        encoder.encode(texts[start : start + 32])
    batched = (time.perf_counter() - began) / len(texts)
    began = time.perf_counter()
    for _ in range(1000):
        json.dumps(engine_body(weights, Engine(), size=SIZE)).encode()
    rendered = (time.perf_counter() - began) / 1000
    print(f"\nquery building: model read in {first:.2f} s; a text alone p50 {np.quantile(alone, 0.5) * 1000:.2f} ms, "
          f"p95 {np.quantile(alone, 0.95) * 1000:.2f} ms; in batches of 32 {batched * 1000:.2f} ms a text; weights to "
          f"the bytes of a request {rendered * 1000:.3f} ms")  # fmt: skip


def print_overhead(client: Client, asked: Queries, rounds: int) -> None:
    """Print the time of the same request with this package's client and with http.client, alternating."""
    index, place = index_of("rank_features"), urlsplit(client.address)
    bodies = [
        json.dumps({**engine_body(weights, Engine(), size=SIZE), "_source": False}).encode() for _, weights in asked
    ]
    raw = http.client.HTTPConnection(place.hostname or "", place.port)
    ours: list[float] = []
    theirs: list[float] = []
    for _ in range(rounds):
        for query, body in zip(asked, bodies, strict=True):
            began = time.perf_counter()
            list(rank_index(client, index, [query], Engine(), size=SIZE))
            ours.append(time.perf_counter() - began)
            began = time.perf_counter()
            raw.request("POST", f"/{index}/_search?search_pipeline=_none", body, {"content-type": "application/json"})
            json.loads(raw.getresponse().read())
            theirs.append(time.perf_counter() - began)
    raw.close()
    ours_ms, theirs_ms = np.array(ours) * 1000, np.array(theirs) * 1000
    print(f"our client over http.client, the same requests alternating: p50 {np.median(ours_ms):.2f} ms and "
          f"{np.median(theirs_ms):.2f} ms, median difference {np.median(ours_ms - theirs_ms):.2f} ms")  # fmt: skip


if __name__ == "__main__":
    main()
