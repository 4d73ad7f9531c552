"""What a checkpoint has for documents and for queries, with the settings of `[model]` that its files declare."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple


class MaskedLMSide(NamedTuple):
    """A masked LM in `folder`, with its tokenizer beside it."""

    folder: Path
    declared: dict[str, Any]


class WeightTableSide(NamedTuple):
    """A weight for each token in the file `weights`, and the tokenizer in `folder`; no model is needed.

    `weights` is idf.json (token string to weight), query_token_weights.txt (the same as lines), or the tensor `weight`
    by token id in model.safetensors or pytorch_model.bin.
    """

    folder: Path
    weights: Path
    declared: dict[str, Any]


class Sides(NamedTuple):
    """Both sides of a checkpoint: the folder of the documents' masked LM with what it declares, and the query side."""

    transformer: Path
    declared: dict[str, Any]
    query: MaskedLMSide | WeightTableSide
