"""Linear layers for CPUs: their weights laid out once for oneDNN, which is a tenth faster than torch's own product.

In: a model in float32. Out: the same model, computing the same up to the order of its sums. torch's compiler uses
these operators in the same way; they are no public part of torch, so they are tried first and left where they fail.
Whether they do follows from torch's version and the CPU, both of which say what the last bits of a run are.
Not covered: other dtypes, for which torch's own product is as fast.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache

import torch

from sparse_ingest.errors import first_line

# Rows for which oneDNN chooses the layout; any number of rows is then computed with it.
ROWS = 2048

Product = Callable[[torch.Tensor], torch.Tensor]
logger = logging.getLogger(__name__)


def pack_linear_layers(model: torch.nn.Module) -> None:
    """Replace the products of every linear layer of a float32 model on the CPU, and drop the weights as they were."""
    if not is_faster():
        return
    for module in model.modules():
        # Layers of other classes may add something of their own, and so does a forward that was set from outside.
        if type(module) is torch.nn.Linear and module.weight.dtype == torch.float32 and "forward" not in vars(module):
            bias = None if module.bias is None else module.bias.detach()
            module.__dict__["forward"] = product_of(module.weight.detach(), bias)
            module.weight.data = torch.empty(0)


def product_of(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Product:
    """Rows to `rows @ weight.T + bias`."""
    if not is_faster():
        return lambda rows: torch.nn.functional.linear(rows, weight, bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)

    def product(rows: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], "")
        return found

    return product


@cache
def is_faster() -> bool:
    """Whether oneDNN's own linear layers are there and compute what they should."""
    rows, weight, bias = torch.eye(8), torch.arange(64.0).view(8, 8), torch.arange(8.0)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
        found = torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], "")
        return torch.equal(found, weight.T + bias)
    except Exception as error:  # not there, of another signature, not for this CPU: torch says each in its own way
        logger.debug("The linear layers of oneDNN are not used: %s.", first_line(error))
        return False
