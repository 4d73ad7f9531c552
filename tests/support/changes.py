"""Helpers for tests that change indexes: an older and a newer run, load, verify and inspect."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparse_ingest.cluster import indexes
from sparse_ingest.cluster.client import Client, Connection
from sparse_ingest.cluster.sending import Retries
from sparse_ingest.cluster.stamps import Stamp
from sparse_ingest.loading.load import LoadReport, load
from sparse_ingest.pipeline import Pipeline
from sparse_ingest.runs.run import Run
from sparse_ingest.verification.comparison import VerifyReport
from sparse_ingest.verification.verify import verify
from support.runs import make_run

FAST = Retries(base_s=0.01, cap_s=0.1)
OLD = {f"d{number}": {"river": 1 + number / 64, "stone": 1 / (number + 1)} for number in range(20)}
# Three changed, two removed, two new; one of the changed differs only in its fields.
CHANGED = {"d3": {"river": 9.0}, "d11": {}, "d19": OLD["d19"]}
GONE = ("d0", "d12")
ADDED = {"new é": {"lamp": 2.0}, "d100": {"stone": 1.0}}
NEW = {**{doc_id: terms for doc_id, terms in OLD.items() if doc_id not in GONE}, **CHANGED, **ADDED}
TITLES = {doc_id: {"title": f"Title of {doc_id}"} for doc_id in {**OLD, **NEW}}
NEW_TITLES = {**TITLES, "d19": {"title": "changed"}}


def titled_run(folder: Path, documents: Mapping[str, Mapping[str, float]], **settings: Any) -> Run:
    return make_run(folder, documents, **{"shard_rows": 5, "fields": TITLES, **settings})


def into(client: Client, index: str, run: Run, **settings: Any) -> LoadReport:
    pipeline = settings.pop("pipeline", Pipeline())
    url = settings.pop("url", client.address)
    return load(run.path, index=index, pipeline=pipeline, connection=Connection(url), retries=FAST, **settings)


def verify_all(client: Client, index: str, run: Run) -> VerifyReport:
    return verify(run.path, index=index, connection=Connection(client.address), sample=None)


def existing_index(client: Client, index: str) -> indexes.Index:
    found = indexes.find_index(client, index)
    assert found is not None
    return found


def stamp_of(client: Client, index: str) -> Stamp:
    found = existing_index(client, index).stamp
    assert found is not None
    return found


def titles_in(client: Client, index: str) -> dict[str, str]:
    hits = client.call("POST", f"/{index}/_search", {"size": 1000})["hits"]["hits"]
    return {hit["_id"]: hit["_source"].get("title") for hit in hits}


def titles_of(documents: Mapping[str, object], titles: Mapping[str, Mapping[str, object]]) -> dict[str, object]:
    return {doc_id: titles[doc_id]["title"] for doc_id in documents}
