"""From dense rows on a device to the few terms that are kept: pruned there, and copied to the host without waiting.

In: weights `[documents, vocabulary]` after the logarithm. Out: counts, token ids and weights of the kept terms. Which
terms those are is said by `pruning.py`, ties included; here the same is computed where the weights lie, because a dense
row has 122 KB and its terms some 2. Nothing here makes the host wait before `arrive`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

# Terms a document for which room is made in the copy. Where a batch has more, it is copied again with more room.
ROOM = 512


class Rules(NamedTuple):
    """The settings of `prune`."""

    top_k: int | None = None
    max_ratio: float | None = None
    min_weight: float | None = None


class Terms(NamedTuple):
    """The terms of a batch: how many each document has, their token ids ascending, and their weights.

    `dropped` is a number that came with them.
    """

    counts: npt.NDArray[np.int32]
    token_ids: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]
    dropped: int


def kept_terms(weights: torch.Tensor, rules: Rules) -> torch.Tensor:
    """Which weights stay: those above zero that every rule keeps."""
    kept = weights > 0
    if rules.min_weight is not None:
        kept &= weights >= _float32(rules.min_weight, weights.device)
    if rules.max_ratio is not None:
        kept &= weights >= _float32(rules.max_ratio, weights.device) * weights.amax(1, keepdim=True)
    if rules.top_k is not None and rules.top_k < weights.shape[1]:
        last = torch.topk(weights, rules.top_k, dim=1).values[:, -1:]
        heavier, equal = weights > last, weights == last
        room = rules.top_k - heavier.sum(1, keepdim=True)
        # Of equal weights the lower token ids stay.
        kept &= heavier | (equal & (equal.cumsum(1) <= room))
    return kept


class Transfer:
    """The terms of one batch on their way to the host, with one number more, which lies on the device as well."""

    def __init__(self, weights: torch.Tensor, rules: Rules, dropped: torch.Tensor) -> None:
        self._weights, self._dropped = weights, dropped.to(torch.int32).view(1)
        self._kept = kept_terms(weights, rules)
        self._documents = len(weights)
        self._room = min(self._documents * ROOM, weights.numel())
        self._host, self._arrived = _copied(self._compacted(self._room))

    def arrive(self) -> Terms:
        """Wait for the copy, and read it."""
        if self._arrived is not None:
            self._arrived.synchronize()
        found = self._host.numpy()
        start = 1 + self._documents
        dropped, counts = int(found[0]), found[1:start].copy()
        total = int(counts.sum())
        if total > self._room:
            self._room = total
            found = self._compacted(total).cpu().numpy()
        token_ids = found[start : start + total].copy()
        weights = found[start + self._room : start + self._room + total].view(np.float32).copy()
        return Terms(counts, token_ids, weights, dropped)

    def _compacted(self, room: int) -> torch.Tensor:
        """Number, counts, token ids and the bits of weights in one int32 tensor, with room for so many terms."""
        counts = self._kept.sum(1, dtype=torch.int32)
        places = _places(self._kept, room)
        weights = self._weights[places[:, 0], places[:, 1]]
        return torch.cat((self._dropped, counts, places[:, 1].to(torch.int32), weights.view(torch.int32)))


def _places(kept: torch.Tensor, room: int) -> torch.Tensor:
    """Row and column of each term that is kept, filled up to so many rows."""
    try:
        # As nonzero, but of a size known before: the host need not wait to learn it.
        return torch.nonzero_static(kept, size=room, fill_value=0)
    except NotImplementedError:  # a torch, or a device, that has it not
        found = torch.nonzero(kept)[:room]
        return torch.nn.functional.pad(found, (0, 0, 0, room - len(found)))


def _copied(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
    """The tensor on the host, and the event after which it is there."""
    if not tensor.is_cuda:
        return tensor, None
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
    arrived.record(torch.cuda.current_stream(tensor.device))
    return host, arrived


def _float32(value: float, device: torch.device) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float32, device=device)
