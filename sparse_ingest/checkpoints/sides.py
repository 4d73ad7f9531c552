"""The two sides of a checkpoint, documents and queries: the folder of each, and what turns texts into weights.

A `ModelSide` is a transformer with an output on top of its hidden states. Each kind of output is a class, whose
attributes are all that settings.py, inspect.py and models/ need to know about it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

NO_WORDS = (
    "The terms of this model are numbered features of an autoencoder, not words. A feature that two texts share adds "
    "to their score; the checkpoint does not describe what a feature means."
)


class CheckpointSide:
    """One side of a checkpoint. `has_words`: a weight belongs to a token, not to a feature.

    Each has a `folder` with its tokenizer, and in `declared` the settings that its files declare.
    """

    kind: ClassVar[str]
    has_words: ClassVar[bool] = True

    @property
    def described(self) -> str:
        """The kind with its article."""
        return f"a{'n' if self.kind.startswith('a') else ''} {self.kind}"


@dataclass(frozen=True)
class ModelSide(CheckpointSide):
    """A transformer in `folder`.

    `auto_class` is the class of transformers that builds it, which is also its entry in `auto_map`. `activations`,
    `poolings`, `attentions` and `special_tokens` are the supported values of these settings. `has_projection`: weights
    are maxima of a vocabulary projection.
    """

    folder: Path
    declared: dict[str, Any]

    has_projection: ClassVar[bool] = False
    auto_class: ClassVar[str]
    activations: ClassVar[tuple[str | None, ...]]
    poolings: ClassVar[tuple[str | None, ...]] = ("max",)
    attentions: ClassVar[tuple[str | None, ...]] = (None, "bidirectional")
    special_tokens: ClassVar[tuple[str, ...]] = ("keep", "zero")


@dataclass(frozen=True)
class MaskedLMSide(ModelSide):
    """A masked LM: the weights of tokens are the maxima of its vocabulary projection."""

    kind = "masked LM"
    has_projection = True
    auto_class = "AutoModelForMaskedLM"
    activations = ("relu", "log1p_relu")


@dataclass(frozen=True)
class LanguageModelSide(MaskedLMSide):
    """A causal language model, such as Qwen3 or Llama: it has a vocabulary projection too, but its own attention."""

    kind = "language model"
    auto_class = "AutoModelForCausalLM"
    attentions = ("bidirectional", "causal")


@dataclass(frozen=True)
class LexicalSide(ModelSide):
    """A model with one linear output in the file `weights`, as BGE-M3: the weight of each distinct token of the text.

    `weights` is sparse_linear.pt, a pickle of tensors, or sparse_linear.safetensors. The special tokens in `dropped`
    have no weight, whatever the settings.
    """

    weights: Path

    kind = "lexical model"
    auto_class = "AutoModel"
    activations = ("none",)
    dropped: ClassVar[tuple[str, ...]] = ("cls_token", "eos_token", "pad_token", "unk_token")


class Layer(NamedTuple):
    """A module between pooling and autoencoder: Dense with an activation of torch.nn, or (None) Normalize."""

    folder: Path
    activation: str | None
    outputs: int
    has_bias: bool


@dataclass(frozen=True)
class AutoencoderSide(ModelSide):
    """A model whose pooled embedding is encoded as `k` of `features` features, which are numbers and not tokens.

    The embedding is the results of `poolings_of_tokens`, changed by `layers`. `autoencoder` is the folder of the
    weights. `normalize`: with mean 0 and deviation 1.
    """

    poolings_of_tokens: tuple[str, ...]
    layers: tuple[Layer, ...]
    autoencoder: Path
    features: int
    k: int
    normalize: bool

    kind = "autoencoder"
    has_words = False
    auto_class = "AutoModel"
    activations = ("none",)
    poolings = (None,)
    special_tokens = ("keep",)


@dataclass(frozen=True)
class WeightTableSide(CheckpointSide):
    """A weight for each token in the file `weights`, and the tokenizer in `folder`.

    `weights` is idf.json (token string to weight), query_token_weights.txt (the same as lines), or the tensor `weight`
    by token id in model.safetensors or pytorch_model.bin.
    """

    folder: Path
    weights: Path
    declared: dict[str, Any]

    kind = "weight table"
