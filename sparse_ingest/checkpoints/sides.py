"""The two sides of a checkpoint, documents and queries: the folder of each, and what turns texts into weights.

A `ModelSide` is a transformer with an output on top of its hidden states. Each kind of output is a class, whose
attributes are all that settings.py, inspect.py and models/ need to know about it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar


@dataclass(frozen=True)
class ModelSide:
    """A transformer in `folder`, with its tokenizer beside it.

    `auto_class` is the class of transformers that builds it, which is also its entry in `auto_map`. `activations` and
    `poolings` are the supported values of these settings.
    """

    folder: Path
    declared: dict[str, Any]

    kind: ClassVar[str]
    auto_class: ClassVar[str]
    activations: ClassVar[tuple[str | None, ...]]
    poolings: ClassVar[tuple[str | None, ...]] = ("max",)


@dataclass(frozen=True)
class MaskedLMSide(ModelSide):
    """A masked LM: the weights of tokens are the maxima of its vocabulary projection."""

    kind = "masked LM"
    auto_class = "AutoModelForMaskedLM"
    activations = ("relu", "log1p_relu")


@dataclass(frozen=True)
class WeightTableSide:
    """A weight for each token in the file `weights`, and the tokenizer in `folder`.

    `weights` is idf.json (token string to weight), query_token_weights.txt (the same as lines), or the tensor `weight`
    by token id in model.safetensors or pytorch_model.bin.
    """

    folder: Path
    weights: Path
    declared: dict[str, Any]

    kind: ClassVar[str] = "weight table"
