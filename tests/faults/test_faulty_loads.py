"""Loads through a connection that spoils requests, drawn from a seed: nothing lost, nothing doubled, all weights right.

Each seed draws a run, a limit for requests, and which faults come when. `load` is started again as often as it ends
with a ClusterError, as an operator does it; then everything is compared without the proxy between. A seed that fails
is run again with `pytest tests/faults -k "seed-17]"`.
"""

from __future__ import annotations

import json
import random
import time
import urllib.request
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest
from support.faulty_proxy import Fault, FaultyProxy, faulty_proxy
from support.runs import NASTY_TOKENS, WORDS, make_run

from sparse_ingest.cluster.client import Connection
from sparse_ingest.cluster.journal import Journal
from sparse_ingest.cluster.sending import Retries
from sparse_ingest.errors import ClusterError
from sparse_ingest.loading.load import LoadReport, load
from sparse_ingest.pipeline import IndexSettings, Pipeline, packaged_folder
from sparse_ingest.runs.run import Run
from sparse_ingest.verification.verify import verify

Kind = Literal["rank_features", "sparse_vector"]
DOCUMENTS = 300
STARTS = 60
TIMEOUT_S = 0.4
PATIENT = Retries(attempts=3, base_s=0.01, cap_s=0.04, timeout_s=TIMEOUT_S)
STATUSES: tuple[Fault, ...] = (429, 502, 503, 504)
# What may happen to any request.
ANYWHERE: tuple[Fault, ...] = (
    *STATUSES, "drop", "refuse", "lost answer", "reset mid-answer", "truncated", "half json", "delay", "slow",
)  # fmt: skip
# Only to bulk requests, which may arrive twice or late, since they hold the same documents each time.
BULK: tuple[Fault, ...] = (
    *ANYWHERE,
    "reset mid-body",
    "reject some",
    "reject first",
    "garbage",
    "twice",
    "echo",
    "late",
)
STORMS: tuple[Fault, ...] = (429, 503, "reject some", "drop", "lost answer")
# Chosen to hold every fault, every limit, and a start that fails between a dead letter and the end of its shard.
QUICK_SEEDS = range(22, 31)
SLOW_SEEDS = (*range(22), *range(31, 200))
CHANGE_SEEDS = range(200, 230)


@dataclass(frozen=True)
class Plan:
    """What a seed draws. `text_bytes` makes shards of several requests, which begin with 2 MiB."""

    faults: list[Fault]
    other_faults: list[Fault]
    max_bytes: int | None
    shard_rows: int
    refused: frozenset[int]
    kind: Kind
    text_bytes: int


def drawn(seed: int) -> Plan:
    """Quiet stretches, single faults and storms, until a load of this size must have met most of them."""
    chance = random.Random(seed)
    faults: list[Fault] = []
    while len(faults) < 50:
        faults += [None] * chance.randrange(4)
        if chance.random() < 0.15:
            faults += [chance.choice(STORMS)] * chance.randrange(3, 9)
        else:
            faults.append(chance.choice(BULK))
    text_bytes = chance.choice([0, 0, 30_000])
    return Plan(
        faults=faults,
        other_faults=[chance.choice(ANYWHERE) if chance.random() < 0.3 else None for _ in range(40)],
        max_bytes=chance.choice([None, 400_000] if text_bytes else [None, None, 2500, 800]),
        shard_rows=chance.choice([100, 150] if text_bytes else [7, 12, 12, 30]),
        refused=frozenset(chance.sample(range(DOCUMENTS), k=chance.choice([0, 1, 12]))),
        kind=chance.choice(["rank_features", "rank_features", "rank_features", "sparse_vector"]),
        text_bytes=text_bytes,
    )


def made_run(folder: Path, plan: Plan, seed: int, *, later: bool = False) -> Run:
    """Documents of a few terms each, some of none; the title of a refused one is no number.

    `later` leaves out every tenth document of the earlier run and has other weights in every seventh.
    """
    chance = random.Random(seed)
    tokens = [*WORDS, *NASTY_TOKENS]
    documents = {}
    for number in range(DOCUMENTS):
        terms = {token: chance.uniform(0.01, 4.0) for token in chance.sample(tokens, k=0 if number % 41 == 0 else 5)}
        if later and number % 7 == 0:
            terms = {token: weight / 2 for token, weight in terms.items()}
        if not later or number % 10:
            documents[f"d{number}"] = terms
    text = "x" * plan.text_bytes
    fields = {doc_id: {"title": "word" if int(doc_id[1:]) in plan.refused else 1, "text": text} for doc_id in documents}
    return make_run(folder, documents, shard_rows=plan.shard_rows, fields=fields)


def pipeline(folder: Path, kind: Kind) -> Pipeline:
    """The packaged body, with a title that must be a number."""
    body = json.loads((packaged_folder() / "opensearch" / f"{kind}.json").read_bytes())
    body["mappings"]["properties"] |= {"title": {"type": "integer"}, "text": {"type": "text", "index": False}}
    changed = folder / "body.json"
    changed.write_text(json.dumps(body))
    return Pipeline(index=IndexSettings(kind=kind, body=str(changed)))


def loaded_at_last(proxy: FaultyProxy, run: Run, index: str, settings: Pipeline, **options: Any) -> LoadReport:
    """Start `load` again until it ends well, as a user does who reads what it says."""
    said: Counter[str] = Counter()
    connection = Connection(proxy.url)
    for start in range(STARTS):
        # A machine with much else to do may need longer than the faults are meant to last.
        retries = replace(PATIENT, timeout_s=TIMEOUT_S * (1 + start / 5))
        try:
            return load(run.path, index=index, pipeline=settings, connection=connection, retries=retries, **options)
        except ClusterError as error:
            said[str(error)] += 1
            time.sleep(0.1 if "refused" in str(error) else 0)
    raise AssertionError(f"{STARTS} starts were not enough: {said}")


def ids_in(url: str, index: str) -> list[str]:
    query = json.dumps({"size": 10 * DOCUMENTS, "_source": False}).encode()
    request = urllib.request.Request(f"{url}/{index}/_search", query, {"Content-Type": "application/json"})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as answer:
        return [hit["_id"] for hit in json.load(answer)["hits"]["hits"]]


def check_seed(seed: int, url: str, index: str, folder: Path) -> None:
    plan = drawn(seed)
    run = made_run(folder / "run", plan, seed)
    with faulty_proxy(url, plan.faults, max_bytes=plan.max_bytes) as proxy:
        proxy.other_faults, proxy.patience_s = list(plan.other_faults), TIMEOUT_S
        proxy.random.seed(seed)
        report = loaded_at_last(proxy, run, index, pipeline(folder, plan.kind))
    happened = sum(count for fault, count in proxy.done.items() if fault is not None)
    assert happened, proxy.done

    refused = sorted(f"d{number}" for number in plan.refused)
    taken = sorted(f"d{number}" for number in range(DOCUMENTS) if number not in plan.refused)
    assert (report.documents, report.acknowledged, report.refused) == (DOCUMENTS, len(taken), len(refused))
    journal = Journal(Path(report.journal))
    assert sorted(letter.doc_id for letter in journal.dead()) == refused
    assert sorted(journal.finished()) == list(run.done_shards())
    checked = verify(run.path, index=index, connection=Connection(url), sample=None)
    assert checked.ok, checked
    assert checked.checked_documents == len(taken)
    assert sorted(ids_in(url, index)) == taken


def check_differences(seed: int, url: str, index: str, folder: Path) -> None:
    """An index that holds one run gets what differs in a later one, over a faulty connection."""
    plan = replace(drawn(seed), refused=frozenset())
    old, new = (made_run(folder / name, plan, seed, later=name == "new") for name in ("old", "new"))
    settings = pipeline(folder, plan.kind)
    load(old.path, index=index, pipeline=settings, connection=Connection(url))
    with faulty_proxy(url, plan.faults, max_bytes=plan.max_bytes) as proxy:
        proxy.other_faults, proxy.patience_s = list(plan.other_faults), TIMEOUT_S
        proxy.random.seed(seed)
        loaded_at_last(proxy, new, index, settings, since=old.path, delete_missing=True)
    checked = verify(new.path, index=index, connection=Connection(url), sample=None)
    assert checked.ok, checked
    assert sorted(ids_in(url, index)) == sorted(f"d{number}" for number in range(DOCUMENTS) if number % 10)


@pytest.mark.parametrize("seed", QUICK_SEEDS, ids="seed-{}".format)
def test_a_load_over_a_faulty_connection_is_complete(
    seed: int, opensearch_url: str, index_name: str, tmp_path: Path
) -> None:
    check_seed(seed, opensearch_url, index_name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", SLOW_SEEDS, ids="seed-{}".format)
def test_hundreds_of_loads_over_faulty_connections_are_complete(
    seed: int, opensearch_url: str, index_name: str, tmp_path: Path
) -> None:
    check_seed(seed, opensearch_url, index_name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", CHANGE_SEEDS, ids="seed-{}".format)
def test_differences_over_a_faulty_connection_are_complete(
    seed: int, opensearch_url: str, index_name: str, tmp_path: Path
) -> None:
    check_differences(seed, opensearch_url, index_name, tmp_path)


def test_the_quick_seeds_hold_every_fault() -> None:
    plans = [drawn(seed) for seed in QUICK_SEEDS]
    # What a load surely comes to: it sends at least one bulk request a shard, and more others.
    assert {fault for plan in plans for fault in plan.faults[: DOCUMENTS // plan.shard_rows] if fault} == set(BULK)
    assert {fault for plan in plans for fault in plan.other_faults[:20] if fault} == set(ANYWHERE)
    assert {plan.max_bytes for plan in plans} == {None, 2500, 800, 400_000}
    assert {plan.kind for plan in plans} == {"rank_features", "sparse_vector"}
