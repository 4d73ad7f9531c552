"""sparse_vector fields with the SEISMIC method: their weights, and method parameters fitted to a run.

Segments with fewer documents than `approximate_threshold` search the 9 bits of scores.py; larger ones a byte,
round(min(weight, ceiling) · 255 / ceiling). Method parameters cannot be changed, so the ceiling and the threshold, that
only the merged segment reaches, are fitted before the index is created. The server fits n_postings to each segment.
"""

from __future__ import annotations

import copy
import math
from bisect import bisect_left
from typing import Any

import numpy as np
import numpy.typing as npt

from sparse_ingest.cluster.bulk_bodies import shortest_between
from sparse_ingest.cluster.client import Client
from sparse_ingest.cluster.indexes import Index
from sparse_ingest.cluster.limits import is_number
from sparse_ingest.cluster.preflight import PreflightReport
from sparse_ingest.cluster.scores import DROPPED_BITS, LEVELS, stored_bytes, weight_codes
from sparse_ingest.errors import ClusterError, PipelineError

PAYS_FROM = 1_000_000  # documents; for fewer, exact search is about as fast
EXPLAINED_SINCE = (3, 5)  # the first release that explains scores of segments with clusters
METHOD_DEFAULTS = {
    "cluster_ratio": 0.1,
    "summary_prune_ratio": 0.4,
    "approximate_threshold": 1_000_000,
    "quantization_ceiling_ingest": 3.0,
    "quantization_ceiling_search": 16.0,
}
_LARGEST_BITS = 0x7F7FFFFF  # of a finite float32


def parameters_of(entry: dict[str, Any]) -> dict[str, Any]:
    """Return the method parameters of a mapped sparse_vector field, with the defaults of the server."""
    return {**METHOD_DEFAULTS, **(entry.get("method", {}).get("parameters") or {})}


class ByteCodes:
    """Numbers below 65,536 for weights: equal if a field with this ceiling keeps the same 9 bits and the same byte.

    Both grow with the weight, so their sum is different for every pair.
    """

    def __init__(self, ceiling: float) -> None:
        self._ceiling = ceiling
        features = np.arange(0, _LARGEST_BITS, 1 << DROPPED_BITS, dtype=np.uint32)
        # The bits of the smallest float32 of each byte.
        all_bits = range(_LARGEST_BITS)
        borders = np.array([bisect_left(all_bits, byte, key=self._byte) for byte in range(1, LEVELS + 1)], np.uint32)
        # The bits of the smallest weight of each number, and the numbers.
        self._starts = np.union1d(features, borders)
        self._numbers = self.codes(self._starts.view(np.float32))

    def codes(self, weights: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.uint32]:
        """Return the number of each weight."""
        return weight_codes(weights) + stored_bytes(weights, self._ceiling)

    def decimal(self, code: int) -> str:
        """Return the shortest decimal with this number."""
        place = int(np.searchsorted(self._numbers, code))
        after = self._starts[place + 1] if place + 1 < len(self._starts) else _LARGEST_BITS + 1
        edges = np.array([self._starts[place], after - 1], dtype=np.uint32).view(np.float32)
        return shortest_between(float(edges[0]), float(edges[1]))

    def _byte(self, bits: int) -> int:
        return int(stored_bytes(np.array([bits], dtype=np.uint32).view(np.float32), self._ceiling)[0])


def fit(body: dict[str, Any], field: str, report: PreflightReport) -> tuple[dict[str, Any], str]:
    """Return the body with parameters that fit the run, where it has none, and a message about clipped weights."""
    body = copy.deepcopy(body)
    entry: dict[str, Any] = body["mappings"]
    for name in field.split(".") if field not in entry["properties"] else [field]:
        entry = entry["properties"][name]
    method = entry.setdefault("method", {"name": "seismic"})
    named = method.get("parameters") or {}
    for name in ("quantization_ceiling_ingest", "approximate_threshold"):
        value = named.get(name, 1)
        if not is_number(value) or value < 0:
            raise PipelineError(f"The index body has {name} = {value!r}; expected a number above zero.")
    method["parameters"] = {
        "approximate_threshold": fitted_threshold(report.documents, _primaries(body)),
        "quantization_ceiling_ingest": fitted_ceiling(report.codes),
        **named,
    }
    parameters = parameters_of(entry)
    ceiling, threshold = parameters["quantization_ceiling_ingest"], parameters["approximate_threshold"]
    clipped = int(report.codes[_values(len(report.codes)) > np.float32(ceiling)].sum())
    return body, (
        f"SEISMIC: weights are kept in steps of {ceiling / LEVELS:.4g} up to {ceiling:g}; {clipped} of "
        f"{report.terms} weights ({clipped / max(1, report.terms):.3%}) are above it and clipped. "
        f"Clusters are built in segments of {threshold} documents or more: merge after the load (--merge) to build "
        "them once; smaller segments are searched exactly. Neither can be changed in this index."
    )


def advice(documents: int | None) -> list[str]:
    """Return advice against SEISMIC for too few documents (None: not known yet).

    benchmarks/README.md has the figures for 200,000 documents too.
    """
    if documents is not None and documents >= PAYS_FROM:
        return []
    here = "" if documents is None else f", and the run has {documents:,}"
    return [
        f"SEISMIC is for {PAYS_FROM:,} documents or more{here}. For fewer, exact search (--kind rank_features) is "
        "usually as fast. With 20,000 documents, SEISMIC found 87% of the ten best documents, the load took 33 s "
        "instead of 4 s, and the index was 1.7 times as large."
    ]


def fitted_ceiling(codes: npt.NDArray[np.int64]) -> float:
    """Return the ceiling with the smallest squared error, of clipping and rounding, for a histogram of 9-bit codes.

    A ceiling of c clips larger weights and rounds the others to steps of c / 255, a mean error of step² / 12.
    """
    held = np.flatnonzero(codes[: weight_codes(np.array([np.inf]))[0]])
    if not len(held):
        return float(METHOD_DEFAULTS["quantization_ceiling_ingest"])
    counts, weights = codes[held].astype(np.float64), _values(len(codes))[held].astype(np.float64)

    def above(terms: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return np.cumsum(terms[::-1])[::-1] - terms

    clipping = above(counts * weights**2) - 2 * weights * above(counts * weights) + weights**2 * above(counts)
    rounding = (counts.sum() - above(counts)) * (weights / LEVELS) ** 2 / 12
    best = float(weights[np.argmin(clipping + rounding)])
    # Rounded up to three digits, for a readable mapping.
    unit = 10.0 ** (math.floor(math.log10(best)) - 2)
    return float(f"{math.ceil(best / unit) * unit:.3g}")


def fitted_threshold(documents: int, primaries: int) -> int:
    """Return a number of documents that the merged segment of every shard reaches, and few smaller segments.

    Documents are distributed to shards at random: none is smaller than the mean minus four standard deviations.
    """
    mean = documents / primaries
    spread = 4 * math.sqrt(mean) if primaries > 1 else 0.0
    return max(1, min(int(METHOD_DEFAULTS["approximate_threshold"]), math.floor(0.9 * mean - spread)))


def warm_up(client: Client, index: Index) -> str | None:
    """Load the clusters of an index into memory. Return a message if that fails."""
    try:
        client.call("POST", f"/_plugins/_neural/warmup{index.path}", timeout_s=600)
    except ClusterError as error:
        return f"Index {index.name!r} could not be warmed up ({error}). Its first searches read from disk."
    return None


def _values(length: int) -> npt.NDArray[np.float32]:
    """Return the weight of each 9-bit code."""
    return (np.arange(length, dtype=np.uint32) << np.uint32(DROPPED_BITS)).view(np.float32)


def _primaries(body: dict[str, Any]) -> int:
    count = body_setting(body, "number_of_shards", default=1)
    if not str(count).isdecimal() or int(count) < 1:
        raise PipelineError(f"The index body has number_of_shards = {count!r}; expected a number above zero.")
    return int(count)


def body_setting(body: dict[str, Any], name: str, default: Any = None) -> Any:
    """Return a setting of an index body, whose name may start with `index.` or be inside an object `index`."""
    settings = body.get("settings", {})
    places = (settings, settings.get("index", {}))
    return next((place[key] for place in places for key in (name, f"index.{name}") if key in place), default)
