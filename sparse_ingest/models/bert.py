"""BERT, RoBERTa, DistilBERT and gte up to the vocabulary projection, on packed documents and without transformers.

In: a checkpoint's files. Out: the same hidden states as those of transformers' classes, up to the order of sums, in
less time: transformers takes seconds to import, and here residual sums are part of the linear layers, and query, key
and value are one product. body.py builds every other checkpoint with transformers, and reports missing, damaged or
misshapen weights.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding, layer_norm

from sparse_ingest.checkpoints.checks import read_config
from sparse_ingest.checkpoints.layouts import BUILT_AS_GTE, Checkpoint, code_reference
from sparse_ingest.checkpoints.sides import MaskedLMSide
from sparse_ingest.checkpoints.tensors import weight_files
from sparse_ingest.models.body import CLOSE
from sparse_ingest.models.linear import Parts, feed_forward_of, gelu_of, product_of, sum_of
from sparse_ingest.models.masked_lms import read_slices, refuse_other_gte, rotary_frequencies
from sparse_ingest.models.memory import is_out_of_memory
from sparse_ingest.models.packing import Packing, ordinal_positions, packed_attention, positions_behind
from sparse_ingest.models.projection import Projection
from sparse_ingest.models.tokenizer import TokenIds

Rotation = tuple[Tensor, Tensor]  # cosines and sines of rotary positions
EPS = 1e-12  # transformers' default
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Names:
    """The names of the tensors of an architecture, and of the options in its config."""

    embeddings: str
    layer: str
    attention: tuple[str, str, str, str]  # query, key, value, output
    feed_forward: tuple[str, ...]  # up and down, and a gate if there is one
    norms: tuple[str, str]  # after attention, after the feed-forward layers
    head: tuple[str, str]  # dense layer and norm before the projection
    projection: tuple[str, ...]  # names of its weight; without one of them it is that of the word embeddings
    biases: tuple[str, ...]  # names of its bias
    sizes: tuple[str, str, str, str] = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    activation: str = "hidden_act"
    positions: str = "absolute"  # the only value of `position_embedding_type`
    renamed: tuple[tuple[str, str], ...] = ()  # regular expressions of other names, and the replacements


BERT = Names(
    embeddings="bert.embeddings",
    layer="bert.encoder.layer",
    attention=("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"),
    feed_forward=("intermediate.dense", "output.dense"),
    norms=("attention.output.LayerNorm", "output.LayerNorm"),
    head=("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm"),
    projection=("cls.predictions.decoder.weight",),
    biases=("cls.predictions.decoder.bias", "cls.predictions.bias"),
)
ROBERTA = replace(
    BERT,
    embeddings="roberta.embeddings",
    layer="roberta.encoder.layer",
    head=("lm_head.dense", "lm_head.layer_norm"),
    projection=("lm_head.decoder.weight",),
    biases=("lm_head.decoder.bias", "lm_head.bias"),
)
DISTILBERT = Names(
    embeddings="distilbert.embeddings",
    layer="distilbert.transformer.layer",
    attention=("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin"),
    feed_forward=("ffn.lin1", "ffn.lin2"),
    norms=("sa_layer_norm", "output_layer_norm"),
    head=("vocab_transform", "vocab_layer_norm"),
    projection=("vocab_projector.weight",),
    biases=("vocab_projector.bias",),
    sizes=("dim", "n_layers", "n_heads", "hidden_dim"),
    activation="activation",
)
GTE = replace(
    BERT,
    embeddings="gte.embeddings",
    layer="gte.encoder.layer",
    attention=("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj"),
    feed_forward=("mlp.up_proj", "mlp.down_proj", "mlp.gate_proj"),
    norms=("attn_ln", "mlp_ln"),
    head=("lm_head.dense", "lm_head.norm"),
    projection=("lm_head.decoder.weight",),
    biases=("lm_head.decoder.bias",),
    positions="rope",
    # The prefix of Alibaba's checkpoints, and the names of transformers.
    renamed=(
        (r"^new\.", "gte."), (r"^gte\.layers\.", "gte.encoder.layer."), (r"\.self_attn\.", ".attention."),
        (r"\.post_attention_layernorm\.", ".attn_ln."), (r"\.post_mlp_layernorm\.", ".mlp_ln."),
        (r"^lm_head\.layer_norm\.", "lm_head.norm."),
    ),
)  # fmt: skip
# Layers that checkpoints of gte store as one.
JOINED = {"attention.qkv_proj": GTE.attention[:3], "mlp.up_gate_proj": ("mlp.up_proj", "mlp.gate_proj")}
ARCHITECTURES = {
    "bert": BERT,
    "roberta": ROBERTA,
    "xlm-roberta": ROBERTA,
    "camembert": ROBERTA,
    "distilbert": DISTILBERT,
    "gte": GTE,
    BUILT_AS_GTE: GTE,
}
# Norms of checkpoints from TensorFlow have a gamma and a beta.
NORMS = ((r"(^|\.)gamma$", r"\1weight"), (r"(^|\.)beta$", r"\1bias"))
# Options that change what is computed, with the only values that are computed here.
PLAIN_OPTIONS: dict[str, tuple[Any, ...]] = {
    "is_decoder": (None, False), "add_cross_attention": (None, False), "embedding_size": (None,),
    "pruned_heads": (None, {}), "is_causal": (None, False), "head_dim": (None,),
}  # fmt: skip


class _Norm(NamedTuple):
    weight: Tensor
    bias: Tensor
    eps: float

    def __call__(self, rows: Tensor) -> Tensor:
        return layer_norm(rows, rows.shape[-1:], self.weight, self.bias, self.eps)


class _Layer(NamedTuple):
    projections: Callable[[Tensor], Tensor]  # query, key and value
    output: Callable[[Tensor, Tensor], Tensor]
    attention_norm: _Norm
    feed_forward: Callable[[Tensor], Tensor]  # adds its input
    norm: _Norm


class _Unlike(Exception):
    """The checkpoint is not computed here."""


def packed_bert(
    checkpoint: Checkpoint, *, device: torch.device, dtype: torch.dtype, integers: torch.dtype | None = None
) -> PackedBert | None:
    """Build the body of a checkpoint, or return None if it has to be built by transformers."""
    try:
        found = PackedBert(checkpoint, device=device, dtype=dtype, integers=integers)
        sample = [np.arange(length, dtype=np.int32) % found.ids for length in (16, 5, 5, 3)]
        with torch.inference_mode():
            states = found.hidden(sample, 0)[0].to("cpu", torch.float32)
            if device.type != "cpu":
                expected = PackedBert(checkpoint, device=torch.device("cpu"), dtype=torch.float32).hidden(sample, 0)[0]
                if (states - expected).abs().amax() > CLOSE[dtype] * expected.abs().amax():
                    raise _Unlike(f"its hidden states differ on {device}")
        if not states.isfinite().all():
            raise _Unlike("its hidden states are not finite")
    except Exception as reason:  # also of torch and safetensors for damaged files, which body.py reports
        if is_out_of_memory(reason):  # it may have fit in another process of this run, and the last bits would differ
            raise
        logger.debug("%s is built by transformers: %s.", checkpoint.name, reason)
        return None
    return found


class PackedBert:
    """A model of `ARCHITECTURES` on one device in one dtype; as `Body`, but always packed.

    With `integers` the linear layers multiply in int8 or int16.
    """

    packs = True

    def __init__(
        self, checkpoint: Checkpoint, *, device: torch.device, dtype: torch.dtype, integers: torch.dtype | None = None
    ) -> None:
        side = checkpoint.document
        config = read_config(side.folder)
        names = ARCHITECTURES.get(str(config.get("model_type")))
        if names is None or type(side) is not MaskedLMSide or code_reference(side.folder, side.auto_class):
            raise _Unlike("it has another architecture")
        # transformers reads the sizes of DistilBERT under BERT's names too.
        sizes = {key: (None, config.get(own)) for key, own in zip(BERT.sizes, names.sizes, strict=True)}
        activations = ("gelu",) if names.activation in config else (None,)  # null is an error
        only = {names.activation: activations, "position_embedding_type": (None, names.positions)}
        options: dict[str, tuple[Any, ...]] = {**PLAIN_OPTIONS, **sizes, **only}
        if unusual := [key for key, plain in options.items() if config.get(key) not in plain]:
            raise _Unlike(f"its config has {unusual[0]}")
        self.device, self._dtype, self._integers = device, dtype, integers
        width, layers, self._heads, self._inner = (int(config[size]) for size in names.sizes)
        self._eps = float(config.get("layer_norm_eps", EPS)) if names is not DISTILBERT else EPS
        found = _Tensors(side.folder, names)
        words = found.of_shape(f"{names.embeddings}.word_embeddings.weight", config["vocab_size"], width)
        self._frequencies = None
        if names is GTE:
            self._frequencies = _frequencies(checkpoint.name, config, width // self._heads // 2).to(device)
            segments, places = config.get("type_vocab_size", 1), torch.zeros(width)
        else:
            segments, longest = config.get("type_vocab_size", 2), config["max_position_embeddings"]
            places = found.of_shape(f"{names.embeddings}.position_embeddings.weight", longest, width)
        if names is not DISTILBERT and (names is not GTE or segments != 0):  # every token is in the first segment
            places = places + found.of_shape(f"{names.embeddings}.token_type_embeddings.weight", segments, width)[0]
        padding_id = config.get("pad_token_id", 1 if names is ROBERTA else 0)
        if padding_id not in range(len(words)):
            raise _Unlike("it has no token for padding")
        self._positions = partial(positions_behind, padding_id) if names is ROBERTA else ordinal_positions
        tied = config.get("tie_word_embeddings", True)
        if not isinstance(tied, bool):
            raise _Unlike("its config has another tie_word_embeddings")
        weight = found.one_of(names.projection, words if tied else None)
        self.projection: Projection | None = Projection(weight, found.one_of(names.biases, None))
        self.ids = self.outputs = len(words)
        self.width = self.hidden_size = width
        if weight.shape != words.shape or self.projection.bias.shape != (len(words),):
            raise _Unlike("its projection has another size than its embeddings")
        self._words, self._places = self._put(words), self._put(places)
        self._norm = self._norm_of(found, f"{names.embeddings}.LayerNorm")
        self._layers = [self._layer(found, names, f"{names.layer}.{number}") for number in range(layers)]
        # Not in integers: 8 bits would cost BERT-tiny nearly as much of its weights here as in all layers.
        self._head = gelu_of(product_of(*self._linear(found, width, width, names.head[0])))
        self._head_norm = self._norm_of(found, names.head[1])

    def hidden(self, token_ids: Sequence[TokenIds], padding_id: int) -> tuple[Tensor, Packing]:
        """Return the hidden states `[rows, hidden]` of a batch, and the rows of each document."""
        packing = Packing(tuple(map(len, token_ids)), self.device, tuple(token_ids))
        places = packing.of_rows(self._positions(token_ids))
        rotation = None if self._frequencies is None else _rotation(places[:, None] * self._frequencies, self._dtype)
        added = embedding(places, self._places) if rotation is None else self._places
        rows = self._norm(embedding(packing.ids, self._words) + added)
        for layer in self._layers:
            rows = layer.attention_norm(layer.output(self._attend(layer.projections(rows), packing, rotation), rows))
            rows = layer.norm(layer.feed_forward(rows))
        return packing.without_padding(self._head_norm(self._head(rows))), packing

    def _attend(self, projected: Tensor, packing: Packing, rotation: Rotation | None) -> Tensor:
        """Return `[rows, width]` of `[rows, 3 * width]`, which is overwritten if heads are rotated."""
        heads = projected.view(1, len(projected), 3, self._heads, -1)
        if rotation is not None:
            _rotate(heads[0, :, :2], *rotation)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        found, _ = packed_attention(None, query, key, value, None, packing=packing)
        return found.reshape(len(projected), -1)

    def _layer(self, found: _Tensors, names: Names, at: str) -> _Layer:
        *projections, output = (f"{at}.{name}" for name in names.attention)
        up, down, *gates = (f"{at}.{name}" for name in names.feed_forward)
        width, inner = self.width, self._inner
        if gates:  # without biases
            both = (found.of_shape(f"{name}.weight", inner, width) for name in (up, *gates))
            ups: list[Parts] = [(self._put(weight), None) for weight in both]
        else:
            ups = [self._linear(found, inner, width, up)]
        after_attention, after = (self._norm_of(found, f"{at}.{name}") for name in names.norms)
        return _Layer(
            product_of(*self._linear(found, width, width, *projections), integers=self._integers),
            sum_of(*self._linear(found, width, width, output), integers=self._integers),
            after_attention,
            feed_forward_of(self._linear(found, width, inner, down), *ups, integers=self._integers),
            after,
        )

    def _linear(self, found: _Tensors, rows: int, columns: int, *names: str) -> Parts:
        """Return the weight and the bias of linear layers, each of `[rows, columns]`, as one."""
        weight = torch.cat([found.of_shape(f"{name}.weight", rows, columns) for name in names])
        bias = torch.cat([found.of_shape(f"{name}.bias", rows) for name in names])
        return self._put(weight), self._put(bias)

    def _norm_of(self, found: _Tensors, name: str) -> _Norm:
        weight, bias = (self._put(found.of_shape(f"{name}.{part}", self.width)) for part in ("weight", "bias"))
        return _Norm(weight, bias, self._eps)

    def _put(self, tensor: Tensor) -> Tensor:
        return tensor.to(device=self.device, dtype=self._dtype)


def _frequencies(name: str, config: dict[str, Any], half: int) -> Tensor:
    """Return the rotary frequency of each of `half` pairs of numbers in a head of gte."""
    rope = config
    if config["model_type"] == BUILT_AS_GTE:
        refuse_other_gte(name, config)
    else:
        rope, others = config["rope_parameters"], (config.get("rope_theta"), config.get("rope_scaling"))
        if rope.keys() != {"rope_type", "rope_theta"} or rope["rope_type"] != "default" or others != (None, None):
            raise _Unlike("its config has other rotary positions")
    if not isinstance(rope.get("rope_theta", 1.0), int | float):
        raise _Unlike("its config has another rope_theta")
    return rotary_frequencies(rope, half)


def _rotation(angles: Tensor, dtype: torch.dtype) -> Rotation:
    """Return the factors of `_rotate`, each `[rows, 1, 1, size]`, for angles `[rows, size / 2]`."""
    cosines, sines = angles.cos(), angles.sin()
    factors = torch.stack((torch.cat((cosines, cosines), 1), torch.cat((-sines, sines), 1))).to(dtype)
    return factors[0, :, None, None], factors[1, :, None, None]


def _rotate(heads: Tensor, cosines: Tensor, sines: Tensor) -> None:
    """Rotate heads `[rows, 2, heads, size]` in place; the numbers of a pair are half a head apart."""
    others = heads.roll(heads.shape[-1] // 2, -1)
    heads.mul_(cosines).addcmul_(others, sines)


class _Tensors:
    """The tensors of a checkpoint in float32, under the names of `Names`."""

    def __init__(self, folder: Path, names: Names) -> None:
        self._tensors: dict[str, tuple[Any, int, int]] = {}  # a tensor, and which of how many parts of it
        for given, tensor in read_slices(weight_files(folder)).items():
            name = given
            for pattern, ours in (*NORMS, *names.renamed):
                name = re.sub(pattern, ours, name)
            joined = next((joined for joined in JOINED if f".{joined}." in name), "")
            parts = [name.replace(joined, part) for part in JOINED[joined]] if joined else [name]
            for place, part in enumerate(parts):
                if self._tensors.setdefault(part, (tensor, place, len(parts)))[0] is not tensor:
                    raise _Unlike(f"it has two tensors for {part}")

    def __getitem__(self, name: str) -> Tensor:
        """Return a tensor; raise `_Unlike` if it is missing, or has a number that is not finite."""
        if name not in self._tensors:
            raise _Unlike(f"it has no {name}")
        given, place, parts = self._tensors[name]
        rows, more = divmod((given.shape if isinstance(given, Tensor) else given.get_shape())[0], parts)
        if more:
            raise _Unlike(f"{name} is part of a tensor of another size")
        tensor: Tensor = given[place * rows : (place + 1) * rows].to(torch.float32)
        if not tensor.sum().isfinite():
            raise _Unlike(f"{name} may not be finite")
        return tensor

    def of_shape(self, name: str, *shape: int) -> Tensor:
        """Return a tensor; raise `_Unlike` if it has another shape."""
        tensor = self[name]
        if tensor.shape != shape:
            raise _Unlike(f"{name} has another size than in its config")
        return tensor

    def one_of(self, names: Sequence[str], tied: Tensor | None) -> Tensor:
        """Return the tensor of these names, and the same as `tied` if that is given."""
        found = [self[name] for name in names if name in self._tensors] + ([] if tied is None else [tied])
        if not found or any(not torch.equal(one, found[0]) for one in found):
            raise _Unlike(f"{' and '.join(names)} are missing or differ")
        return found[0]
