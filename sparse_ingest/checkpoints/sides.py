"""The two sides of a checkpoint, documents and queries: the folder of each, and what turns texts into weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple


class MaskedLMSide(NamedTuple):
    """A masked LM in `folder`, with its tokenizer beside it."""

    folder: Path
    declared: dict[str, Any]


class WeightTableSide(NamedTuple):
    """A weight for each token in the file `weights`, and the tokenizer in `folder`.

    `weights` is idf.json (token string to weight), query_token_weights.txt (the same as lines), or the tensor `weight`
    by token id in model.safetensors or pytorch_model.bin.
    """

    folder: Path
    weights: Path
    declared: dict[str, Any]
