"""A text's weights do not depend on the rest of its batch, for every kind of position.

BERT counts positions from 0, RoBERTa from the padding id + 1, DistilBERT has no token types, ModernBERT uses rotary
positions and local attention in most layers, gte rotary positions everywhere. All are computed packed.
"""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
from support.checkpoints import ARCHITECTURES, PACKAGED, build_encoder, make_masked_lm

from sparse_ingest.cli.demo import passages
from sparse_ingest.cluster.scores import weight_codes
from sparse_ingest.models.linear import has_avx2, has_avx512_bfloat16, has_vnni

LENGTHS = (1, 2, 3, 5, 8, 13, 21, 34, 55, 62)
WORDS = ("river", "stone", "lamp", "the", "of", "water", "bird", "cloud", "search", "index", "run")


def texts() -> list[str]:
    """Return texts of every length, all different; short lengths occur twice."""
    return [
        " ".join(WORDS[(place * place + turn) % len(WORDS)] for place in range(length))
        for turn in range(3)
        for length in LENGTHS
    ] + [""]


def rows(encoded, size: int) -> np.ndarray:
    dense = np.zeros((len(encoded.vectors.doc_ids), size), dtype=np.float32)
    for row in range(len(dense)):
        token_ids, weights = encoded.vectors.row(row)
        dense[row, token_ids] = weights
    return dense


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_text_of_a_mixed_batch_gets_the_same_weights_as_alone(architecture: str, tmp_path: Path) -> None:
    encoder = build_encoder(make_masked_lm(tmp_path, architecture))
    assert encoder.maker.body.packs
    size, given = len(encoder.vocabulary), texts()
    alone = np.concatenate([rows(encoder.encode([text]), size) for text in given])
    token_ids = [ids for ids, _ in encoder.tokenize(given)]
    assert len(np.unique(alone.round(3), axis=0)) == len({tuple(ids) for ids in token_ids}) > len(given) / 2
    for order in (range(len(given)), range(len(given) - 1, -1, -1), np.random.default_rng(1).permutation(len(given))):
        batch, _ = encoder.maker.compute([token_ids[place] for place in order], np.array(order))
        for place, (ids, weights) in zip(order, batch, strict=True):
            found = np.zeros(size, dtype=np.float32)
            found[ids] = weights
            np.testing.assert_allclose(found, alone[place], atol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int8-bfloat16", "int8-int8", "int16"])
def test_the_rest_of_a_batch_changes_weights_by_one_index_step_at_most(dtype: str) -> None:
    """The contract of half precision, on prose and trained weights: 99% of the terms above 0.05.

    Products of different numbers of rows may differ in the last bit: of 300 documents, 7 change with AMX, and 0.3% of
    all terms by more than one step.
    """
    if not {"bfloat16": has_avx512_bfloat16, "int16": has_avx2}.get(dtype, has_vnni)():
        pytest.skip("this CPU lacks the instructions, and emulates bfloat16 in half a minute")
    encoder = build_encoder(PACKAGED, dtype=dtype, max_length=256)
    prose = " ".join(passage.text for passage, _ in zip(passages(topics), range(12), strict=False))
    given = [prose[300 * place : 300 * place + 20 + 120 * place] for place in range(12)]
    size, token_ids = len(encoder.vocabulary), [ids for ids, _ in encoder.tokenize(given)]
    alone = np.concatenate([rows(encoder.encode([text]), size) for text in given])
    together = np.zeros_like(alone)
    order = np.random.default_rng(1).permutation(len(given))
    batch, _ = encoder.maker.compute([token_ids[place] for place in order], order)
    for place, (ids, weights) in zip(order, batch, strict=True):
        together[place, ids] = weights
    heavy = np.maximum(alone, together) > 0.05
    steps = np.abs(weight_codes(alone).astype(np.int64) - weight_codes(together).astype(np.int64))[heavy]
    assert heavy.sum() > 500 and (steps <= 1).mean() >= 0.99


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_word_order_changes_the_weights(architecture: str, tmp_path: Path) -> None:
    """Otherwise the test above would pass if positions were ignored."""
    encoder = build_encoder(make_masked_lm(tmp_path, architecture))
    size = len(encoder.vocabulary)
    first, second = (rows(encoder.encode([text]), size) for text in ("the river and stone", "stone the and river"))
    assert np.abs(first - second).max() > 1e-2
