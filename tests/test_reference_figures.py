"""Our encoders and exact search give the relevance figures of sentence-transformers with trec_eval, to four decimals.

The collections and the figures lie in shared/data, beside the checkout; without them the tests are skipped by name.
"""

from __future__ import annotations

from pathlib import Path

import ir_measures
import numpy as np
import pytest
from forked import command
from ir_measures import AP, RR, R, nDCG

from sparse_ingest.corpora.collections import read_qrels, read_queries
from sparse_ingest.pipeline import Pipeline
from sparse_ingest.query import pipeline_of_run, query_encoder
from sparse_ingest.retrieval.exact import QueryVector, search_exact
from sparse_ingest.runs.manifest import Run, open_run
from sparse_ingest.runs.shards import read_shard

SHARED = Path(__file__).parents[2] / "shared" / "data"
MEASURES = (nDCG @ 10, RR, R @ 100, AP @ 100)


@pytest.mark.parametrize(
    ("name", "figures", "query_terms", "document_terms"),
    [
        pytest.param("limit-small", (0.9300, 0.9247, 1.0000, 0.9023), 18.9, 308.0),
        pytest.param("cranfield", (0.4873, 0.7473, 0.7443, 0.3838), 58.1, 242.2, marks=pytest.mark.slow),
    ],
)
@pytest.mark.skipif(not SHARED.is_dir(), reason="the folder shared/data is not there")
def test_the_reference_figures_come_out_to_four_decimals(name, figures, query_terms, document_terms, tmp_path):
    run = encoded(SHARED / name, tmp_path / "run")
    queries = list(read_queries(SHARED / name))
    weights = query_encoder(pipeline_of_run(Pipeline(), run).model).encode([query.text for query in queries])
    number = {token: token_id for token_id, token in enumerate(run.vocabulary()) if token is not None}
    vectors = [
        QueryVector(
            np.array([number[token] for token in one], np.uint32), np.fromiter(one.values(), np.float32, len(one))
        )
        for one in weights
    ]
    parts = (part.vectors for shard in run.done_shards() for part in read_shard(run.shard_path(shard)))
    hits = search_exact(parts, vectors, 100)
    ranking = {
        query.id: dict(zip(found.doc_ids, found.scores.tolist(), strict=True))
        for query, found in zip(queries, hits, strict=True)
    }
    found = ir_measures.calc_aggregate(MEASURES, read_qrels(SHARED / name), ranking)
    assert [round(found[measure], 4) for measure in MEASURES] == list(figures)
    assert round(np.mean([len(one) for one in weights]), 1) == query_terms
    complete = run.complete() or {}
    assert round(complete["terms"] / complete["rows"], 1) == document_terms


def encoded(folder: Path, out: Path) -> Run:
    answer = command(
        "encode", "--model", "package:cognition/model", "--corpus", folder, "--out", out,
        "--device", "cpu", "--dtype", "float32", "--weights", "float32",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    return open_run(out)
