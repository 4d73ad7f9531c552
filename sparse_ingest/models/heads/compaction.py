"""Prune dense rows on a device to the few terms that are kept, and copy these to the host without waiting.

In: weights `[documents, vocabulary]` after the logarithm. Out: counts, token ids and weights of the kept terms above
zero. The rules of pruning.py are applied on the device, because a dense row has 122 KB and its terms about 2 KB; ties
with the last term of top_k are left to the host. The host waits in `arrive` only, and no tensor is as large as the
weights.
"""

from __future__ import annotations

from functools import reduce
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from sparse_ingest.pipeline import Pruning

# Average terms per document that fit into the copy. A batch with more is copied again.
ROOM = 512


class Terms(NamedTuple):
    """The terms of a batch: the number per document, ascending token ids, weights, and the `dropped` of `Transfer`."""

    counts: npt.NDArray[np.int32]
    token_ids: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]
    dropped: int


def drop_light(weights: torch.Tensor, rules: Pruning) -> None:
    """Set weights below the largest limit of the rules to zero, in place; alpha_mass is not applied."""
    lowest: list[torch.Tensor] = []
    if rules.min_weight is not None:
        lowest.append(weights.new_full((1, 1), rules.min_weight))
    if rules.max_ratio is not None:
        lowest.append(weights.new_full((1, 1), rules.max_ratio) * weights.amax(1, keepdim=True))
    if rules.top_k is not None and rules.top_k < weights.shape[1]:
        lowest.append(torch.topk(weights, rules.top_k, dim=1, sorted=False).values.amin(1, keepdim=True))
    if lowest:
        weights.masked_fill_(weights < reduce(torch.maximum, lowest), 0)


class Transfer:
    """The copy of one batch's terms, and of the number `dropped`, to the host. The weights are changed in place."""

    def __init__(self, weights: torch.Tensor, rules: Pruning, dropped: torch.Tensor) -> None:
        drop_light(weights, rules)
        self._weights, self._dropped = weights, dropped.to(torch.int32).view(1)
        self._room = min(len(weights) * ROOM, weights.numel())
        self._host, self._arrived = _copied(self._compacted(self._room))

    def arrive(self) -> Terms:
        """Wait for the copy, and read it."""
        if self._arrived is not None:
            self._arrived.synchronize()
        found = self._host.numpy()
        start = 1 + len(self._weights)
        dropped, counts = int(found[0]), found[1:start].copy()
        total = int(counts.sum())
        if total > self._room:
            self._room = total
            found = self._compacted(total).cpu().numpy()
        token_ids = found[start : start + total].copy()
        weights = found[start + self._room : start + self._room + total].view(np.float32).copy()
        return Terms(counts, token_ids, weights, dropped)

    def _compacted(self, room: int) -> torch.Tensor:
        """Return `dropped`, counts, token ids and bits of weights in one int32 tensor, with room for `room` terms."""
        # Counts non-zero weights; a sum of booleans would first copy them as 8-byte integers. A float32 counts to 16
        # million.
        counts = torch.linalg.vector_norm(self._weights, ord=0, dim=1).to(torch.int32)
        places = _places(self._weights, room)
        weights = self._weights[places[:, 0], places[:, 1]]
        return torch.cat((self._dropped, counts, places[:, 1].to(torch.int32), weights.view(torch.int32)))


def _places(weights: torch.Tensor, room: int) -> torch.Tensor:
    """Return row and column of each non-zero weight, padded to `room` rows."""
    try:
        # Like nonzero, but of a known size, so the host does not wait.
        return torch.nonzero_static(weights, size=room, fill_value=0)
    except NotImplementedError:  # in this torch, or for this device
        found = torch.nonzero(weights)[:room]
        return torch.nn.functional.pad(found, (0, 0, 0, room - len(found)))


def _copied(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
    """Start to copy a tensor to the host. Return the copy, and the event after which it is complete."""
    if not tensor.is_cuda:
        return tensor, None
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
    arrived.record(torch.cuda.current_stream(tensor.device))
    return host, arrived
