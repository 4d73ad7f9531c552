"""The emulation of stored weights and scores, without a server. test_rank_features.py compares it with OpenSearch."""

from __future__ import annotations

import numpy as np

from sparse_ingest.cluster.scores import LOWEST_WEIGHT, stored_bytes, stored_weights, weight_codes


def test_stored_weights_have_nine_bits_and_do_not_change_when_stored_again() -> None:
    weights = np.array([1.0, 1.00390625, 1.005, 2.7182818, 0.1], dtype=np.float32)
    stored = stored_weights(weights)
    assert stored.tolist() == [1.0, 1.00390625, 1.00390625, 2.7109375, 0.0998535156250]
    np.testing.assert_array_equal(stored_weights(stored), stored)


def test_the_loss_is_below_two_to_the_minus_eight() -> None:
    weights = np.random.default_rng(0).gamma(1.0, 1.0, 10_000).astype(np.float32) + np.float32(1e-6)
    loss = (weights - stored_weights(weights)) / weights
    assert loss.min() >= 0
    assert loss.max() < 2**-8


def test_truncated_float16_weights_are_stored_like_their_float32() -> None:
    weights = np.random.default_rng(1).uniform(0.01, 8, 10_000).astype(np.float32)
    from sparse_ingest.runs.shards import drop_bits

    np.testing.assert_array_equal(stored_weights(drop_bits(weights)), stored_weights(weights))


def test_strided_views_and_doubles_are_accepted() -> None:
    weights = np.linspace(0.1, 3, 20)
    np.testing.assert_array_equal(stored_weights(weights[::2]), stored_weights(weights.astype(np.float32))[::2])


def test_the_lowest_weight_is_the_first_normal_float32() -> None:
    assert weight_codes(np.array([LOWEST_WEIGHT]))[0] == 256


def test_a_byte_is_rounded_to_the_nearest_step_and_clipped_at_the_ceiling() -> None:
    weights = np.array([0.001, 1 / 255, 1.49 / 255, 1.51 / 255, 0.5, 1.0, 7.0], dtype=np.float32)
    assert stored_bytes(weights, 1.0).tolist() == [0, 1, 1, 2, 128, 255, 255]
    assert stored_bytes(weights.astype(np.float16), 2.0)[-3:].tolist() == [64, 128, 255]
