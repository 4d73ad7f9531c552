"""Queries of several threads that wait for a masked LM are encoded together, and each thread gets its own."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.checkpoints import make_masked_lm
from support.tables import write_table

from sparse_ingest.errors import CheckpointError
from sparse_ingest.models.query_encoders import query_encoder
from sparse_ingest.pipeline import ModelSettings
from sparse_ingest.searching.batches import KEPT, QUERIES_AT_ONCE, BatchedEncoder

TEXTS = ["the river", "a stone", "cloud and lamp", "sparse vector search", "water", "fire tree house", "bird", ""]


def close(first: dict[str, float], second: dict[str, float]) -> bool:
    """Whether two vectors are equal apart from the rounding of sums, which depends on the batch."""
    return first.keys() == second.keys() and all(second[token] == pytest.approx(first[token], 1e-4) for token in first)


def test_threads_share_batches_of_a_masked_lm(tmp_path: Path) -> None:
    model = ModelSettings(document=str(make_masked_lm(tmp_path)))
    expected = dict(zip(TEXTS, query_encoder(model).encode(TEXTS), strict=True))
    encoder = BatchedEncoder(model)
    asked = [" " * times + text for times in range(50) for text in TEXTS]  # distinct texts of the same tokens
    with ThreadPoolExecutor(40) as threads:
        found = list(threads.map(encoder.encode_one, asked))
    assert all(close(expected[text.strip()], weights) for text, weights in zip(asked, found, strict=True))
    sizes = encoder.batches
    assert sum(size * count for size, count in sizes.items()) == len(asked)
    assert 1 < max(sizes) <= QUERIES_AT_ONCE


def test_a_masked_lm_encodes_a_repeated_text_once(tmp_path: Path) -> None:
    encoder = BatchedEncoder(ModelSettings(document=str(make_masked_lm(tmp_path))))
    with ThreadPoolExecutor(8) as threads:
        first, *others = threads.map(encoder.encode_one, ["the river"] * 100)
    assert encoder.batches == {1: 1}
    first.clear()
    assert others[-1] == encoder.encode_one("the river") != {}
    for number in range(KEPT):
        encoder.encode_one(f"river {number}")
    assert encoder.encode_one("the river") == others[-1]
    assert encoder.batches == {1: KEPT + 2}


def test_an_error_reaches_every_thread_that_asked(tmp_path: Path) -> None:
    encoder = BatchedEncoder(ModelSettings(document=str(tmp_path / "missing")))
    with ThreadPoolExecutor(8) as threads:
        asked = [threads.submit(encoder.encode_one, "text") for _ in range(8)]
    assert all(isinstance(one.exception(), CheckpointError) for one in asked)


def test_a_weight_table_encodes_each_query_alone(tmp_path: Path) -> None:
    encoder = BatchedEncoder(ModelSettings(document=str(write_table(tmp_path))))
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(encoder.encode_one, ["catch", "an"] * 20))
    assert found == [{"catch": 2.5}, {"an": pytest.approx(0.1)}] * 20
    assert encoder.batches == {1: 40}
