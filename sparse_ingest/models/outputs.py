"""The output of a model: from hidden states to the weights of a vector, and the name of each of its columns.

In: a side of a checkpoint, and its model on a device. Out: a head, which computes `[documents, columns]`. Which head it
is depends on the class of the side alone (checkpoints/sides.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_ingest.checkpoints.modules import damaged
from sparse_ingest.checkpoints.sides import AutoencoderSide, LexicalSide, ModelSide
from sparse_ingest.checkpoints.tensors import weight_files
from sparse_ingest.errors import UsageError
from sparse_ingest.models.bert import PackedBert
from sparse_ingest.models.body import Body
from sparse_ingest.models.heads.selection import build_head
from sparse_ingest.models.heads.tiles import Head
from sparse_ingest.models.heads.without_projection import (
    AutoencoderHead,
    LexicalHead,
    Step,
    dense,
    standardized,
    unit_length,
)
from sparse_ingest.models.masked_lms import read_weights
from sparse_ingest.models.tokenizer import Tokenizer

# The library writes the encoder of an autoencoder by the name of its transposed decoder, which has the same weights.
OTHER_NAMES = {"encoder.weight": "decoder.linear.weight"}
Shape = tuple[int, ...]
AnyBody = Body | PackedBert


class Output(NamedTuple):
    """A head, the string of each of its columns (None: no index can store it), and columns that never have a weight."""

    head: Head
    vocabulary: list[str | None]
    dropped: Sequence[int] = ()


def build_output(
    side: ModelSide, body: AnyBody, tokenizer: Tokenizer, *, device: torch.device, dtype: torch.dtype,
    integers: torch.dtype | None,
) -> Output:  # fmt: skip
    """Build the output of a side for hidden states of this device and dtype.

    `integers`: multiply a vocabulary projection in int8 or int16; other outputs compute in float32. Raise `UsageError`
    for int8 if the side has none, `CheckpointError` if the weights of its output are missing, damaged, or of another
    shape.
    """
    if body.projection:
        weight, bias = body.projection
        head = build_head(weight, bias, device=device, dtype=dtype, integers=integers)
        return Output(head, tokenizer.vocabulary(body.outputs))
    if integers == torch.int8:
        raise UsageError(
            f"int8 is for models with a vocabulary projection, and this is {side.described} without one. Encode with "
            "--dtype auto, bfloat16 or float32."
        )
    if isinstance(side, AutoencoderSide):
        features: list[str | None] = [*map(str, range(side.features))]
        return Output(_autoencoder(side, body, device), features)
    assert isinstance(side, LexicalSide)
    dropped = tokenizer.ids_of_special(side.dropped)
    return Output(_lexical(side, body, device), tokenizer.vocabulary(body.outputs), dropped)


def _lexical(side: LexicalSide, body: AnyBody, device: torch.device) -> LexicalHead:
    tensors = _tensors([side.weights], side.weights, {"weight": (1, body.hidden_size), "bias": (1,)}, device)
    return LexicalHead(tensors["weight"], tensors["bias"], body.outputs)


def _autoencoder(side: AutoencoderSide, body: AnyBody, device: torch.device) -> AutoencoderHead:
    steps: list[Step] = []
    width = body.hidden_size * len(side.poolings_of_tokens)
    for layer in side.layers:
        if layer.activation is None:
            steps.append(unit_length)
            continue
        files = weight_files(layer.folder)
        shapes: dict[str, Shape] = {"linear.weight": (layer.outputs, width)}
        if layer.has_bias:
            shapes["linear.bias"] = (layer.outputs,)
        tensors = _tensors(files, layer.folder, shapes, device)
        steps.append(dense(tensors["linear.weight"], tensors.get("linear.bias"), layer.activation))
        width = layer.outputs
    if side.normalize:
        steps.append(standardized)
    shapes = {"pre_bias": (width,), "latent_bias": (side.features,), "encoder.weight": (side.features, width)}
    tensors = _tensors(weight_files(side.autoencoder), side.autoencoder, shapes, device)
    biases = tensors["pre_bias"], tensors["latent_bias"]
    return AutoencoderHead(side.poolings_of_tokens, steps, biases, tensors["encoder.weight"], side.k)


def _tensors(
    files: Sequence[Path], place: Path, shapes: Mapping[str, Shape], device: torch.device
) -> dict[str, Tensor]:
    """Return the tensors of these names and shapes in weight files, as float32. Raise CheckpointError."""
    found = read_weights(files)
    tensors = {}
    for name, shape in shapes.items():
        tensor = found.get(name, found.get(OTHER_NAMES.get(name, name)))
        if tensor is None or tuple(tensor.shape) != shape:
            there = ", ".join(f"{key} {list(one.shape)}" for key, one in found.items()) or "no weights"
            raise damaged(f"{place} has {there}; expected {name} {list(shape)}")
        tensors[name] = tensor.to(device=device, dtype=torch.float32)
        if not tensors[name].isfinite().all():
            raise damaged(f"{place}: numbers of {name!r} are not finite in float32")
    return tensors
