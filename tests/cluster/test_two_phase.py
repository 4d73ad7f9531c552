"""The two-phase processor, emulated without a server. tests/searching/test_engines.py compares it with OpenSearch."""

from __future__ import annotations

from typing import Any

import pytest
from support.server_scores import two_phase_split

from sparse_ingest.cluster.limits import TWO_PHASE_DEFAULTS, check_two_phase, leaves_nothing, two_phase_window
from sparse_ingest.cluster.search_bodies import two_phase_body
from sparse_ingest.errors import PipelineError, UsageError

WEIGHTS = {"e": 0.1, "a": 4.0, "c": 1.5, "b": 2.0, "d": 0.5}


@pytest.mark.parametrize(
    ("kind", "ratio", "first"),
    [
        ("max_ratio", 0.5, "ab"),
        ("max_ratio", 0.50001, "a"),
        ("max_ratio", 0.0, "abcde"),
        ("abs_value", 0.5, "abcd"),
        ("abs_value", 5.0, ""),
        ("top_k", 3, "abc"),
        ("top_k", 9, "abcde"),
        ("alpha_mass", 0.75, "ab"),
        ("alpha_mass", 0.49, ""),
    ],
)
def test_each_token_is_in_exactly_one_phase(kind: str, ratio: float, first: str) -> None:
    """The weights sum to 8.1. With alpha_mass, the token that crosses the share is in the second phase."""
    heavy, light = two_phase_split(WEIGHTS, {"prune_type": kind, "prune_ratio": ratio})
    assert "".join(heavy) == first
    assert {**heavy, **light} == WEIGHTS
    assert not heavy.keys() & light.keys()
    assert leaves_nothing(WEIGHTS, {"prune_type": kind, "prune_ratio": ratio}) is (not heavy)


def test_the_body_contains_the_processor_with_every_setting() -> None:
    body = two_phase_body({"a": 1.0}, field="f", size=3, settings={"prune_ratio": 0.5})
    [processor] = body["search_pipeline"]["request_processors"]
    parameters = {**TWO_PHASE_DEFAULTS, "prune_ratio": 0.5}
    assert processor == {"neural_sparse_two_phase_processor": {"enabled": True, "two_phase_parameter": parameters}}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prune_type": "best"}, r"prune_type = 'best'; expected one of max_ratio, alpha_mass, abs_value, top_k"),
        ({"prune_ratio": 1}, r"prune_ratio = 1; expected a number from 0 to below 1 with prune_type max_ratio"),
        ({"prune_type": "top_k", "prune_ratio": 2.5}, "expected an integer above zero with prune_type top_k"),
        ({"prune_type": "abs_value", "prune_ratio": -1}, "a weight of at least 0"),
        ({"prune_ratio": "0.4"}, "prune_ratio = '0.4'"),
        ({"expansion_rate": 0.5}, r"expansion_rate = 0\.5; expected a number of at least 1"),
        ({"max_window_size": 49}, "max_window_size = 49; expected an integer of at least 50"),
        ({"window": 1}, "has a key 'window'; known are expansion_rate, max_window_size, prune_ratio, prune_type"),
    ],
)
def test_a_setting_out_of_range_is_reported_with_the_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        check_two_phase(settings)


def test_a_window_above_its_limit_is_refused_with_both_fixes() -> None:
    assert two_phase_window({}, 2000) == 10_000
    check_two_phase({}, size=2000)
    with pytest.raises(UsageError, match=r"10005 documents per shard for 2001 hits.*max_window_size 10000.*= 10005"):
        check_two_phase({}, size=2001)
    check_two_phase({"max_window_size": 10_005}, size=2001)
    assert two_phase_window({"expansion_rate": 1.1}, 30) == 33
