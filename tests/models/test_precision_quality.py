"""Search quality of the dtypes that `--dtype auto` accepts, on queries with relevance judgments."""

from __future__ import annotations

from pathlib import Path

import ir_measures
import numpy as np
import pytest
from ir_measures import nDCG
from support.checkpoints import PACKAGED, build_encoder

from sparse_ingest.corpora.collections import read_qrels, read_queries
from sparse_ingest.corpora.documents import FieldNames
from sparse_ingest.corpora.files import open_corpus
from sparse_ingest.models.linear import has_avx2, has_vnni
from sparse_ingest.models.precision import SAMPLE, choose_dtype
from sparse_ingest.searching.exact import QueryVector, search_exact

CRANFIELD = Path(__file__).parents[3] / "shared" / "data" / "cranfield"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CRANFIELD.is_dir(), reason="the folder shared/data is not there"),
]


@pytest.fixture(scope="module")
def documents() -> list[tuple[str, str]]:
    rows = open_corpus([str(CRANFIELD)], fields=FieldNames()).rows()
    return [(row.document.id, row.document.text) for row, _ in rows if row.document]


@pytest.fixture(scope="module")
def queries() -> tuple[list[str], list[QueryVector]]:
    asked = list(read_queries(CRANFIELD))
    rows = build_encoder(PACKAGED).encode([query.text for query in asked]).vectors
    pairs = (rows.row(place) for place in range(len(asked)))
    vectors = [QueryVector(token_ids.astype(np.uint32), weights) for token_ids, weights in pairs]
    return [query.id for query in asked], vectors


def ndcg(dtype: str, documents, queries) -> float:
    encoded = build_encoder(PACKAGED, dtype=dtype, max_length=256).encode([text for _, text in documents])
    doc_ids, token_ids = [doc_id for doc_id, _ in documents], encoded.vectors.token_ids.astype(np.uint32)
    rows = encoded.vectors._replace(doc_ids=doc_ids, token_ids=token_ids)
    names, vectors = queries
    hits = search_exact([rows], vectors, 10)
    ranking = {
        name: dict(zip(one.doc_ids, one.scores.tolist(), strict=True)) for name, one in zip(names, hits, strict=True)
    }
    return ir_measures.calc_aggregate([nDCG @ 10], read_qrels(CRANFIELD), ranking)[nDCG @ 10]


@pytest.fixture(scope="module")
def expected(documents, queries) -> float:
    return ndcg("float32", documents, queries)


needs_vnni = pytest.mark.skipif(not has_vnni(), reason="this CPU has no VNNI")
needs_avx2 = pytest.mark.skipif(not has_avx2(), reason="this CPU has no AVX2")
INTEGERS = [
    *(pytest.param(dtype, marks=needs_vnni) for dtype in ("int8", "int8-bfloat16", "int8-int8")),
    pytest.param("int16", marks=needs_avx2),
]


@pytest.mark.parametrize("dtype", ["bfloat16", *INTEGERS])
def test_ndcg_is_within_0_002_of_float32(dtype: str, documents, queries, expected: float) -> None:
    assert expected > 0.45
    found = ndcg(dtype, documents, queries)
    print(f"nDCG@10 on Cranfield at 256 tokens: float32 {expected:.4f}, {dtype} {found:.4f}")
    assert abs(found - expected) < 0.002


@pytest.mark.parametrize("dtype", INTEGERS)
def test_auto_accepts_integers_on_this_corpus(dtype: str, documents, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparse_ingest.models.precision.faster_dtypes", lambda *_, **__: (dtype,))
    texts = [text for _, text in documents[:SAMPLE]]
    choice = choose_dtype(lambda dtype: build_encoder(PACKAGED, dtype=dtype, max_length=256), "cpu", texts)
    print(choice)
    # This many documents have the tokens of one sample.
    assert choice["dtype"] == dtype and choice["documents"] == 88
