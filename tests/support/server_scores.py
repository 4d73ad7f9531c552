"""Scores of OpenSearch and its two-phase processor, computed with numpy.

The two-phase arithmetic is that of neural-search 3.6 (PruneUtils, NeuralSparseTwoPhaseProcessor), in float32. For equal
weights at the cutoff of top_k or alpha_mass the server keeps those its hash map returns first; here it is by token
string.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from sparse_ingest.cluster.limits import TWO_PHASE_DEFAULTS
from sparse_ingest.cluster.scores import stored_weights


def score(query_weights: npt.NDArray[np.floating[Any]], weights: npt.NDArray[np.floating[Any]]) -> np.float32:
    """Return the score of one document.

    Args:
        query_weights: weights of the tokens that query and document share, shape [tokens].
        weights: the document's weights of the same tokens, in the same order.
    """
    products = np.asarray(query_weights, dtype=np.float32) * stored_weights(weights)
    return np.float32(np.sum(products, dtype=np.float64))


def two_phase_score(first: np.float32, second: np.float32) -> np.float32:
    """Return the score of a document in the window from the scores of both phases; outside it `first` is the score."""
    return np.float32(first + second)


def two_phase_split(
    weights: Mapping[str, float], settings: Mapping[str, Any]
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the tokens of the first phase, and the tokens of the second."""
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
    """Return how many of the heaviest weights together stay within a share of the sum."""
    limit, mass = _float32(ratio * _float32(sum(weights))), 0.0
    for place, weight in enumerate(weights):
        mass = _float32(mass + weight)
        if mass > limit:
            return place
    return len(weights)


def _float32(value: float) -> float:
    return float(struct.unpack("<f", struct.pack("<f", value))[0])
