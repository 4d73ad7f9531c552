"""`evaluate` gives the relevance figures of sentence-transformers with trec_eval, to four decimals.

The collections are in shared/data next to the checkout. Without that folder the tests are skipped.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.checkpoints import PACKAGED
from support.forked import command
from support.large_vocabularies import exact_seismic, write_shifted_model

from sparse_ingest.cluster.client import Connection
from sparse_ingest.evaluation.measures import DEFAULT_MEASURES
from sparse_ingest.loading.load import load
from sparse_ingest.pipeline import Pipeline
from sparse_ingest.verification.verify import verify

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


@pytest.mark.slow
def test_a_seismic_index_of_a_large_vocabulary_has_the_figures_of_the_same_model(
    small_run, tmp_path, opensearch_url, index_name
):
    """The model has the same tokens with larger ids, so its index has a token map. No segment has clusters."""
    run = encode_collection("limit-small", tmp_path / "run", write_shifted_model(tmp_path / "model"))
    connection = Connection(url=opensearch_url)
    load(run, index=index_name, pipeline=exact_seismic(tmp_path), connection=connection)
    assert verify(run, index=index_name, connection=connection, sample=None).ok
    queries, on = SHARED / "limit-small", ("--index", index_name, "--url", opensearch_url, "--no-bm25", "--per-query")
    found, same = evaluate_json(queries, *on), evaluate_json(queries, "--run", run, "--stored", "--per-query")
    expected = evaluate_json(queries, "--run", small_run, "--stored")
    assert found["engine"] == "seismic"
    assert found["per_query"] == same["per_query"]
    assert [round(found[name], 4) for name in MEASURES] == [round(expected[name], 4) for name in MEASURES]


def evaluate_json(queries: Path, *options: object) -> dict:
    answer = command("evaluate", "--queries", queries, *options, "--json")
    assert answer.code == 0, answer.err
    return json.loads(answer.out)


def check_figures(found: dict, figures: tuple[float, ...], query_terms: float, document_terms: float) -> None:
    assert tuple(round(found[name], 4) for name in MEASURES) == figures
    assert round(found["queries"]["active_dimensions"], 1) == query_terms
    assert round(found["documents"]["active_dimensions"], 1) == document_terms


def encode_collection(name: str, out: Path, model: Path | str = PACKAGED) -> Path:
    answer = command(
        "encode", "--model", model, "--corpus", SHARED / name, "--out", out,
        "--device", "cpu", "--dtype", "float32", "--weights", "float32",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    return out
