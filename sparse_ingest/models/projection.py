"""The vocabulary projection at the end of a language model, taken out of its forward pass.

In: a model that returns logits. Out: the weight and bias of its last step, and the model changed so that it returns the
hidden states before that step. Most models end in a linear layer. Others multiply with their embeddings (DeBERTa with
`legacy: false`, MobileBERT) or scale the logits (Granite): of these the step is measured, and the forward pass ends at
the layer before it. A step that is not linear is refused, such as the soft cap of Gemma 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from sparse_ingest.checkpoints.modules import damaged
from sparse_ingest.errors import CheckpointError

SAMPLE = 5  # tokens
CLOSE = 1e-3  # of logits computed both ways
LARGE = 64  # a cap changes small logits less than CLOSE, so larger hidden states are tried too


class HiddenStates(Exception):
    """Ends a forward pass before the projection."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class Projection(NamedTuple):
    """The last step of a model: logits are `hidden @ weight.T + bias`."""

    weight: torch.Tensor
    bias: torch.Tensor


def forward(model: Any, result: str, **inputs: Any) -> torch.Tensor:
    """Return a result of a model: of `split_projection` the hidden states, under the name of the logits."""
    try:
        found: torch.Tensor = getattr(model(**inputs), result)
    except HiddenStates as reached:
        return reached.hidden
    return found


def split_projection(model: Any, name: str) -> Projection:
    """Take the vocabulary projection out of a model. `name` is that of the checkpoint, for messages.

    Raises:
        CheckpointError: the model does not end in a linear projection, or computes infinite or undefined numbers.
    """
    logits, outputs = _traced(model, torch.arange(1, SAMPLE + 1).unsqueeze(0))
    if not logits.isfinite().all():
        raise damaged(
            f"{name} ({type(model).__name__}) computes numbers that are infinite or undefined in float32: some weights "
            "are too large"
        )
    last, output = outputs[-1]
    if isinstance(last, torch.nn.Linear) and torch.equal(output, logits):
        return _linear(last)
    # The last layer before the logits. One that is used several times would end the forward pass too early.
    before = [(layer, hidden) for layer, hidden in outputs if hidden.shape[-1] != logits.shape[-1]][-1:]
    if before and [layer for layer, _ in outputs].count(before[0][0]) == 1:
        layer, hidden = before[0]
        projection = _measured(model, layer, hidden)
        weight, bias = projection
        found, expected = LARGE * hidden @ weight.T + bias, _after(model, layer, LARGE * hidden)
        is_linear = bool((found - expected).abs().amax() <= CLOSE * expected.abs().amax())
        if is_linear and torch.allclose(hidden @ weight.T + bias, logits, rtol=CLOSE, atol=CLOSE):
            layer.register_forward_hook(_stop)
            return projection
    raise CheckpointError(
        f"{name} ({type(model).__name__}) does not end in a linear vocabulary projection, or computes something after "
        "it, which is not supported. Use another model."
    )


def _traced(model: Any, sample: torch.Tensor) -> tuple[torch.Tensor, list[tuple[torch.nn.Module, torch.Tensor]]]:
    """Return the logits of a sample, and the output of each layer that gives a row per token, in their order."""
    outputs: list[tuple[torch.nn.Module, torch.Tensor]] = []

    def note(layer: torch.nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor) and output.shape[:-1] == sample.shape:
            outputs.append((layer, output))

    with _hooked([layer for layer in model.modules() if not list(layer.children())], note), torch.no_grad():
        return model(input_ids=sample).logits, outputs


def _linear(layer: torch.nn.Linear) -> Projection:
    """Replace a linear layer with the identity. Its weight is freed, unless it is that of the embeddings too."""
    weight = layer.weight.detach()
    bias = weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias.detach().clone()
    layer.weight = torch.nn.Parameter(weight.new_empty(0), requires_grad=False)
    layer.forward = lambda input: input  # type: ignore[method-assign]
    return Projection(weight, bias)


def _measured(model: Any, layer: torch.nn.Module, hidden: torch.Tensor) -> Projection:
    """Measure the step after a layer: its output for zeros is the bias, for the unit vectors weight and bias."""
    units = torch.cat([torch.zeros_like(hidden[0, :1]), torch.eye(hidden.shape[-1], dtype=hidden.dtype)]).unsqueeze(0)
    found = _after(model, layer, units)[0]
    return Projection((found[1:] - found[0]).T.contiguous(), found[0].clone())


def _after(model: Any, layer: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """Return the logits if a layer had the output `hidden`."""
    with _hooked([layer], lambda *_: hidden), torch.no_grad():
        logits: torch.Tensor = model(input_ids=torch.arange(1, SAMPLE + 1).unsqueeze(0)).logits
    return logits


def _stop(_: torch.nn.Module, __: Any, output: torch.Tensor) -> None:
    raise HiddenStates(output)


@contextmanager
def _hooked(layers: list[torch.nn.Module], hook: Callable[..., Any]) -> Iterator[None]:
    """Call `hook` after each layer within the block."""
    handles = [layer.register_forward_hook(hook) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
