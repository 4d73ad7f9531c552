"""BGE-M3's lexical weights and sparse autoencoders, compared with their libraries' formulas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.checkpoints import POSITIONS
from support.families import DOCUMENTS, assert_same
from support.without_projection import bge_m3_weights, make_bge_m3

from sparse_ingest import SparseEncoder

QUERIES = ("river stone", "Searching the the Bird!", "日本 überé Ωmega", "water " * 100, "<mask> of </s> <unk> river")
SAME = (*DOCUMENTS, *QUERIES, "<s> the <mask> river </s> <pad> stone")


def rows_of(model: str | Path, side: str = "document", **options: Any) -> np.ndarray:
    encoder = SparseEncoder(str(model), device="cpu", **options)
    vectors = encoder.encode_document(SAME) if side == "document" else encoder.encode_query(SAME)
    return vectors.to_scipy().toarray()


@pytest.fixture(scope="module")
def bge_m3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bge_m3(tmp_path_factory.mktemp("m3") / "bge-m3")


@pytest.mark.parametrize("side", ["document", "query"])
def test_lexical_weights_match_the_formula_of_flag_embedding(bge_m3: Path, side: str) -> None:
    expected = bge_m3_weights(bge_m3, SAME, POSITIONS)
    assert_same(rows_of(bge_m3, side), expected)
    assert np.count_nonzero(expected) > 3 * len(SAME)
