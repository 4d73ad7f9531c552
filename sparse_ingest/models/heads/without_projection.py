"""The heads of models without a vocabulary projection: BGE-M3's lexical weights, and sparse autoencoders.

In: packed hidden states. Out: weights `[documents, columns]` in float32, which no logarithm follows. Both compute in
float32 for every dtype of the hidden states, because they cost little: a column, or one embedding for each document.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear, normalize

from sparse_ingest.models.packing import Packing, to_device

EPSILON = 1e-5  # of the layer norm in sentence-transformers' SparseAutoEncoder
Step = Callable[[Tensor], Tensor]
# The embedding of documents by their tokens `[documents, tokens, hidden]`.
POOLINGS: dict[str, Step] = {
    "cls": lambda rows: rows[:, 0],
    "max": lambda rows: rows.amax(1),
    "mean": lambda rows: rows.mean(1),
    "mean_sqrt_len_tokens": lambda rows: rows.sum(1) / rows.shape[1] ** 0.5,
    "weightedmean": lambda rows: _weighted_mean(rows),
    "lasttoken": lambda rows: rows[:, -1],
}


class LexicalHead:
    """The weight of each distinct token of a text: relu of one linear output, the maximum over its places.

    FlagEmbedding's formula for BGE-M3 (arXiv 2402.03216, section 3.3), `weight` is `[1, hidden]`. `columns` is the
    number of token ids.
    """

    name = "torch"

    def __init__(self, weight: Tensor, bias: Tensor, columns: int) -> None:
        self._weight, self._bias, self._columns = weight, bias, columns

    def __call__(self, rows: Tensor, packing: Packing) -> Tensor:
        """Return the weights."""
        weights = linear(rows.to(torch.float32), self._weight, self._bias).relu_().squeeze(1)
        documents = np.arange(len(packing.lengths), dtype=np.int64) * self._columns
        places = np.repeat(documents, packing.lengths) + np.concatenate(packing.token_ids)
        found = rows.new_zeros(len(packing.lengths) * self._columns, dtype=torch.float32)
        found.scatter_reduce_(0, to_device(places, packing.device), weights, "amax")
        return found.view(-1, self._columns)

    def of_tokens(self, rows: Tensor, token_ids: Tensor, columns: Tensor) -> Tensor:
        """Return the weights that the tokens of one document give to columns, `[tokens, columns]`; others are -inf."""
        weights = linear(rows.to(torch.float32), self._weight, self._bias)
        return torch.where(token_ids.unsqueeze(1) == columns, weights, -torch.inf)


class AutoencoderHead:
    """The `k` largest features of a pooled embedding, at least zero, as in sentence-transformers' SparseAutoEncoder.

    The formula is in arXiv 2503.01776, section 3. `steps` are between the pooling and the encoder, whose `weight` is
    `[features, embedding]`, with the biases before and after it.
    """

    name = "torch"

    def __init__(
        self, poolings: Sequence[str], steps: Sequence[Step], biases: tuple[Tensor, Tensor], weight: Tensor, k: int
    ) -> None:
        self._poolings, self._steps, self._weight, self._k = poolings, steps, weight, k
        self._before, self._after = biases

    def __call__(self, rows: Tensor, packing: Packing) -> Tensor:
        """Return the weights of the features."""
        embedding = torch.cat(
            [self._pooled(rows[run.rows].view(run.documents, run.length, -1)) for run in packing.runs]
        )
        for step in self._steps:
            embedding = step(embedding)
        found = linear(embedding - self._before, self._weight, self._after)
        largest = found.topk(self._k, dim=1)
        return torch.zeros_like(found).scatter_(1, largest.indices, largest.values).relu_()

    def _pooled(self, rows: Tensor) -> Tensor:
        rows = rows.to(torch.float32)
        return torch.cat([POOLINGS[name](rows) for name in self._poolings], dim=1)


def dense(weight: Tensor, bias: Tensor | None, activation: str) -> Step:
    """Return the step of a linear layer with an activation of torch.nn."""
    activate: Step = getattr(torch.nn, activation)()
    return lambda embedding: activate(linear(embedding, weight, bias))


def unit_length(embedding: Tensor) -> Tensor:
    """Return embeddings of length 1."""
    return normalize(embedding, dim=1)


def standardized(embedding: Tensor) -> Tensor:
    """Return embeddings with mean 0 and deviation 1, without learned factors."""
    centered = embedding - embedding.mean(1, keepdim=True)
    return centered / (centered.std(1, keepdim=True) + EPSILON)


def _weighted_mean(rows: Tensor) -> Tensor:
    weights = torch.arange(1, rows.shape[1] + 1, device=rows.device, dtype=rows.dtype).view(1, -1, 1)
    return (rows * weights).sum(1) / weights.sum()
