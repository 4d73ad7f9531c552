"""The two-phase processor: its settings, and which tokens of a query are in which of its phases.

In the first phase the heavy tokens find documents; in the second the light ones are added to the scores of the best of
each shard, `size` times `expansion_rate` of them, the window. The arithmetic is that of neural-search 3.6 (PruneUtils,
NeuralSparseTwoPhaseProcessor), in float32.
Not covered: the score (scores.py). Of equal weights at the border of top_k or alpha_mass the server takes those that
its hash map gives first, here it is those whose token string comes first. No request depends on it: the server splits.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any

from sparse_ingest.cluster.limits import is_number, refuse_unknown
from sparse_ingest.errors import PipelineError, UsageError

# The defaults of neural_sparse_two_phase_processor; a smaller window than 50 is refused by the server.
TWO_PHASE_DEFAULTS = {"prune_type": "max_ratio", "prune_ratio": 0.4, "expansion_rate": 5.0, "max_window_size": 10000}
LEAST_WINDOW = 50
# What prune_ratio is for each prune_type of the two-phase processor, in words and as a test.
_RATIOS: dict[str, tuple[str, Callable[[float], bool]]] = {
    "max_ratio": ("a number from 0 to below 1", lambda ratio: 0 <= ratio < 1),
    "alpha_mass": ("a number from 0 to below 1", lambda ratio: 0 <= ratio < 1),
    "abs_value": ("a weight of at least 0", lambda ratio: ratio >= 0),
    "top_k": ("a whole number above zero", lambda ratio: ratio > 0 and ratio == int(ratio)),
}


def check_two_phase(settings: Mapping[str, Any], *, size: int = 10) -> dict[str, Any]:
    """The settings of the two-phase processor, complete; `size` hits must fit into its window.

    Raises:
        PipelineError: a setting is unknown or out of its range.
        UsageError: the window for `size` documents is larger than max_window_size.
    """
    refuse_unknown("two_phase", settings, TWO_PHASE_DEFAULTS)
    full = {**TWO_PHASE_DEFAULTS, **settings}
    kind, ratio = full["prune_type"], full["prune_ratio"]
    if kind not in _RATIOS:
        raise PipelineError(f"[query] two_phase.prune_type = {kind!r}; expected one of {', '.join(_RATIOS)}.")
    words, fits = _RATIOS[kind]
    if not (is_number(ratio) and fits(ratio)):
        raise PipelineError(f"[query] two_phase.prune_ratio = {ratio!r}; with prune_type {kind} it is {words}.")
    if not (is_number(full["expansion_rate"]) and full["expansion_rate"] >= 1):
        raise PipelineError(
            f"[query] two_phase.expansion_rate = {full['expansion_rate']!r}; expected a number of at least 1."
        )
    if not (type(full["max_window_size"]) is int and full["max_window_size"] >= LEAST_WINDOW):
        raise PipelineError(
            f"[query] two_phase.max_window_size = {full['max_window_size']!r}; expected a whole number of at least "
            f"{LEAST_WINDOW}."
        )
    window = two_phase_window(full, size)
    if window > full["max_window_size"]:
        raise UsageError(
            f"Two-phase search looks at {window} documents a shard for {size} hits (expansion_rate "
            f"{full['expansion_rate']:g}), more than max_window_size {full['max_window_size']}. Ask for fewer hits, or "
            f"set max_window_size = {window} in [query] two_phase."
        )
    return full


def two_phase_window(settings: Mapping[str, Any], size: int) -> int:
    """How many documents of each shard the second phase looks at; the server multiplies in float32."""
    rate = _float32(settings.get("expansion_rate", TWO_PHASE_DEFAULTS["expansion_rate"]))
    return int(_float32(_float32(size) * rate))


def two_phase_split(
    weights: Mapping[str, float], settings: Mapping[str, Any]
) -> tuple[dict[str, float], dict[str, float]]:
    """The tokens of the first phase, and those of the second."""
    full = {**TWO_PHASE_DEFAULTS, **settings}
    ordered = sorted(weights.items(), key=lambda pair: (-pair[1], pair[0]))
    ratio = _float32(full["prune_ratio"])
    if ratio == 0 or not ordered:  # the processor does nothing
        return dict(ordered), {}
    if full["prune_type"] == "top_k":
        kept = int(ratio)
    elif full["prune_type"] == "alpha_mass":
        kept = _within_mass([weight for _, weight in ordered], ratio)
    else:
        least = ratio if full["prune_type"] == "abs_value" else _float32(ratio * ordered[0][1])
        kept = sum(weight >= least for _, weight in ordered)
    return dict(ordered[:kept]), dict(ordered[kept:])


def _within_mass(weights: list[float], ratio: float) -> int:
    """How many of the heaviest weights together stay within their share of the sum."""
    limit, mass = _float32(ratio * _float32(sum(weights))), 0.0
    for place, weight in enumerate(weights):
        mass = _float32(mass + weight)
        if mass > limit:
            return place
    return len(weights)


def _float32(value: float) -> float:
    return float(struct.unpack("<f", struct.pack("<f", value))[0])
