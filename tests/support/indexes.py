"""Indexes filled document by document without the loader, and random queries.

A module creates such an index once for all tests that only query it.
"""

from __future__ import annotations

import json
import secrets
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from sparse_ingest.cluster.client import Client
from sparse_ingest.queries.weight_table import QueryWeights, as_query_weights
from sparse_ingest.runs.run import Run
from sparse_ingest.runs.shards import read_shard
from support.runs import NASTY_TOKENS

WORDS = [f"word{number}" for number in range(150)] + list(NASTY_TOKENS)


def random_documents(count: int) -> dict[str, dict[str, float]]:
    random = np.random.default_rng(11)
    return {
        f"doc-{number}": {
            # Some weights are multiples of 0.5, for ties; the rest is distributed as those of a model.
            WORDS[place]: float(random.choice([0.5, 1.0])) if number % 9 == 0 else float(random.gamma(2.0, 0.4) + 1e-4)
            for place in random.choice(len(WORDS), random.integers(0, 40), replace=False)
        }
        for number in range(count)
    }


def random_queries(count: int) -> list[QueryWeights]:
    random = np.random.default_rng(12)
    return [
        as_query_weights(
            (WORDS[place], float(random.gamma(2.0, 1.0)))
            for place in random.choice(len(WORDS), random.integers(1, 25), replace=False)
        )
        for _ in range(count)
    ]


def fill(client: Client, index: str, run: Run, meta: dict[str, Any] | None = None, shards: int = 2) -> None:
    """Index the documents of a run with exact weights, without the loader."""
    body = {
        "settings": {"number_of_shards": shards, "number_of_replicas": 0},
        "mappings": {
            "dynamic": False,
            "properties": {
                "sparse": client.dialect.field_entry(),
                "title": {"type": "text"},
                "text": {"type": "text"},
                "tag": {"type": "keyword"},
            },
        }
        | ({"_meta": meta} if meta else {}),
    }
    client.call("PUT", f"/{index}", body)
    vocabulary = run.vocabulary()
    lines: list[str] = []
    for shard in run.done_shards():
        for part in read_shard(run.shard_path(shard)):
            for number, doc_id in enumerate(part.vectors.doc_ids):
                token_ids, weights = part.vectors.row(number)
                vector = {vocabulary[token]: float(weight) for token, weight in zip(token_ids, weights, strict=True)}
                lines += [json.dumps({"index": {"_id": doc_id}})]
                lines += [json.dumps({**json.loads(part.fields[number]), "sparse": vector})]
    answer = client.call("POST", f"/{index}/_bulk", ("\n".join(lines) + "\n").encode(), params={"refresh": "true"})
    assert not answer["errors"]


@contextmanager
def filled(client: Client, run: Run, shards: int = 1) -> Iterator[str]:
    """Yield the name of an index with the documents of a run; delete it afterwards."""
    name = f"sparse-ingest-test-{secrets.token_hex(6)}"
    fill(client, name, run, shards=shards)
    try:
        yield name
    finally:
        client.call("DELETE", f"/{name}")


def bits(score: float) -> bytes:
    return np.float32(score).tobytes()


def by_score(hits: list[tuple[str, float]]) -> dict[bytes, set[str]]:
    groups = defaultdict(set)
    for doc_id, score in hits:
        groups[bits(score)].add(doc_id)
    return dict(groups)


def assert_same_hits(first: list[tuple[str, float]], second: list[tuple[str, float]], size: int) -> None:
    """Assert equal scores in equal order, bit for bit. Ties may differ in order, and in documents at the cutoff."""
    assert [bits(score) for _, score in first] == [bits(score) for _, score in second]
    one, other = by_score(first), by_score(second)
    if len(first) == size:
        del one[bits(first[-1][1])], other[bits(second[-1][1])]
    assert one == other
