"""Number the tokens of a load into a sparse_vector field, if its token ids do not fit into one.

In: the token ids that occur in the documents of a load, and the index. Out: the stamp with the token map, which is
written before the first document, so that a load that is killed and started again uses the same keys. If there are too
many tokens, a second pass over the documents finds the pruning that would leave few enough.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from sparse_ingest.cluster import indexes
from sparse_ingest.cluster.client import Client
from sparse_ingest.cluster.stamps import Stamp
from sparse_ingest.cluster.token_map import MAX_KEYS, TokenMap
from sparse_ingest.errors import ClusterError, RunError
from sparse_ingest.pruning import Ranking, prune
from sparse_ingest.records import SparseRows
from sparse_ingest.runs.checking import finished_shards, shard_vectors
from sparse_ingest.runs.run import Run


def with_token_map(
    client: Client,
    there: indexes.Index | None,
    stamp: Stamp,
    token_ids: npt.NDArray[np.int64],
    documents: Iterable[SparseRows],
    *,
    is_large: bool,
) -> Stamp:
    """Return the stamp of a load of these token ids, with the token map that its index needs.

    Args:
        client: A connection.
        there: The index; None if it will be created.
        stamp: The stamp of the load, with the token map of the index if it has one.
        token_ids: Each id that occurs in the documents, in ascending order.
        documents: The pruned documents of the load, read only if there are too many tokens.
        is_large: The vocabulary has more than 32,768 tokens.

    Raises:
        ClusterError: the documents of the index have other keys, or unknown ones.
        RunError: there are too many tokens.
    """
    before, largest = stamp.tokens, int(token_ids.max(initial=0))
    # An index that lost its stamp may have had a map.
    if there is not None and before is None and (largest >= MAX_KEYS or (there.stamp is None and is_large)):
        indexes.refresh(client, there)
        if indexes.count_documents(client, there):
            raise ClusterError(
                f"Index {there.name!r} has documents but no token map, which the token ids of this load need (up to "
                f"{largest:,}; SEISMIC distinguishes {MAX_KEYS:,}). Load into a new index: --alias, or --replace "
                "--from-scratch."
            )
    found = _numbered(token_ids, documents, before)
    return stamp if found is None else replace(stamp, token_map=found.as_meta())


def token_map_of(run: Run, pruning: Mapping[str, Any]) -> TokenMap | None:
    """Return the token map of a new index into which a run is loaded with this pruning; None if it needs none.

    Raises:
        RunError: the run has too many tokens.
    """

    def documents() -> Iterator[SparseRows]:
        return (prune(part, **pruning) for shard in finished_shards(run) for part in shard_vectors(run, shard))

    if len(run.vocabulary()) <= MAX_KEYS:
        return None
    occurs = np.zeros(len(run.vocabulary()), dtype=np.bool_)
    for vectors in documents():
        occurs[vectors.token_ids] = True
    return _numbered(np.flatnonzero(occurs), documents())


def _numbered(
    token_ids: npt.NDArray[np.int64], documents: Iterable[SparseRows], before: TokenMap | None = None
) -> TokenMap | None:
    """Return the map `before` with these ids, a new map if they need one, or None."""
    if before is None and token_ids.max(initial=0) < MAX_KEYS:
        return None
    found = before.extended(token_ids) if before else TokenMap(token_ids)
    if len(found.ids) <= MAX_KEYS:
        return found
    ways = _fitting_pruning(documents, token_ids) if len(token_ids) > MAX_KEYS else []
    ways = [f"prune with {' or '.join(ways)}"] if ways else []
    if before:
        ways = [" and ".join(["load into a new index (--alias, or --replace --from-scratch)", *ways])]
    advice = ", or ".join([*ways, "use --kind rank_features"])
    raise RunError(
        f"{'The index and this load have' if before else 'The documents have'} {len(found.ids):,} different tokens, "
        f"but a sparse_vector field distinguishes {MAX_KEYS:,}. {advice[0].upper()}{advice[1:]}."
    )


def _fitting_pruning(documents: Iterable[SparseRows], token_ids: npt.NDArray[np.int64]) -> list[str]:
    """Return the options that leave few enough of too many tokens, with the number that each leaves.

    Every pruning rule keeps the heaviest terms of a row, so a token stays if its best rank, or its largest weight,
    does.
    """
    tokens = int(token_ids.max()) + 1
    ranks, weights = np.full(tokens, np.iinfo(np.int64).max), np.zeros(tokens, dtype=np.float32)
    for vectors in documents:
        np.minimum.at(ranks, vectors.token_ids, Ranking(vectors).rank)
        np.maximum.at(weights, vectors.token_ids, vectors.weights.astype(np.float32, copy=False))
    top_k = int(np.sort(ranks)[MAX_KEYS])
    heaviest = float(np.sort(weights)[-MAX_KEYS - 1])
    # Above the first weight that is too many, rounded up to three digits.
    unit = 10.0 ** (math.floor(math.log10(heaviest)) - 2)
    least = f"{(math.floor(heaviest / unit) + 1) * unit:.3g}"
    options = {f"--top-k {top_k}": ranks < top_k, f"--min-weight {least}": weights >= np.float32(least)}
    return [f"{name} ({int(kept.sum()):,} tokens)" for name, kept in options.items() if kept.any()]
