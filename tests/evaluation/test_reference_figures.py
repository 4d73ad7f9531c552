"""`evaluate` gives the relevance figures of sentence-transformers with trec_eval, to four decimals.

The collections are in shared/data next to the checkout. Without that folder the tests are skipped.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.forked import command

from sparse_ingest.cluster.client import Connection
from sparse_ingest.evaluation.measures import DEFAULT_MEASURES
from sparse_ingest.loading.load import load
from sparse_ingest.pipeline import Pipeline

SHARED = Path(__file__).parents[3] / "shared" / "data"
MEASURES = ("nDCG@10", "RR", "R@100", "AP@100")
pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason="shared/data does not exist")


@pytest.fixture(scope="module")
def small_run(tmp_path_factory) -> Path:
    return encode_collection("limit-small", tmp_path_factory.mktemp("limit-small") / "run")


def test_limit_small_has_the_reference_figures(small_run):
    found = evaluate_json(SHARED / "limit-small", "--run", small_run, "--bm25")
    check_figures(found, (0.9300, 0.9247, 1.0000, 0.9023), 18.9, 308.0)
    assert round(found["bm25"]["nDCG@10"], 4) == 0.9920


@pytest.mark.slow
def test_cranfield_has_the_reference_figures(tmp_path):
    found = evaluate_json(SHARED / "cranfield", "--run", encode_collection("cranfield", tmp_path / "run"), "--bm25")
    check_figures(found, (0.4873, 0.7473, 0.7443, 0.3838), 58.1, 242.2)
    assert [round(found["bm25"][name], 4) for name in MEASURES[:3]] == [0.4937, 0.7742, 0.7387]


@pytest.mark.slow
@pytest.mark.parametrize("count", [pytest.param(50, id="some"), pytest.param(1000, id="all")])
def test_an_index_has_the_figures_of_its_run_with_nine_bits_per_query(
    count, small_run, tmp_path, opensearch_url, index_name
):
    load(small_run, index=index_name, pipeline=Pipeline(), connection=Connection(url=opensearch_url))
    lines = (SHARED / "limit-small" / "queries.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "queries.jsonl").write_text("\n".join(lines[:count]), encoding="utf-8")
    options = ("--qrels", SHARED / "limit-small", "--per-query", "--no-bm25")
    stored = evaluate_json(tmp_path / "queries.jsonl", *options, "--run", small_run, "--stored")
    found = evaluate_json(tmp_path / "queries.jsonl", *options, "--index", index_name, "--url", opensearch_url)
    for key in (*DEFAULT_MEASURES, "per_query", "queries", "documents", "flops"):
        assert found[key] == stored[key], key
    if count == len(lines):
        # With 9-bit weights nDCG@10 is 0.9302 and AP@100 0.9025.
        assert [found[name] for name in MEASURES] == pytest.approx((0.9300, 0.9247, 1.0000, 0.9023), abs=0.0005)


def evaluate_json(queries: Path, *options: object) -> dict:
    answer = command("evaluate", "--queries", queries, *options, "--json")
    assert answer.code == 0, answer.err
    return json.loads(answer.out)


def check_figures(found: dict, figures: tuple[float, ...], query_terms: float, document_terms: float) -> None:
    assert tuple(round(found[name], 4) for name in MEASURES) == figures
    assert round(found["queries"]["active_dimensions"], 1) == query_terms
    assert round(found["documents"]["active_dimensions"], 1) == document_terms


def encode_collection(name: str, out: Path) -> Path:
    answer = command(
        "encode", "--model", "package:cognition/model", "--corpus", SHARED / name, "--out", out,
        "--device", "cpu", "--dtype", "float32", "--weights", "float32",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    return out
