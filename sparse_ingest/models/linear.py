"""Linear layers for CPUs: their weights laid out once for oneDNN, which is a tenth faster than torch's own product.

In: a model in float32 or bfloat16. Out: the same model, computing the same up to the order of its sums. torch's
compiler uses these operators in the same way; they are no public part of torch, so they are tried first and left where
they fail. Whether they do follows from torch's version and the CPU, both of which say what the last bits of a run are.
Not covered: float16, which CPUs compute slowly.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import cache

import torch

from sparse_ingest.errors import first_line

# torch and oneDNN both keep a product of its own for each number of rows that they met, with its working memory: 1,024
# of them, which is gigabytes, and slower than to make one anew. They look here at the first product of the process.
for _cache in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
    os.environ.setdefault(_cache, "64")

# Rows for which oneDNN chooses the layout; any number of rows is then computed with it.
ROWS = 2048

Product = Callable[[torch.Tensor], torch.Tensor]
logger = logging.getLogger(__name__)


def pack_linear_layers(model: torch.nn.Module) -> None:
    """Replace the products of every linear layer of a model on the CPU, and drop the weights as they were."""
    for module in model.modules():
        # Layers of other classes may add something of their own, and so does a forward that was set from outside.
        if type(module) is torch.nn.Linear and "forward" not in vars(module) and is_faster(module.weight.dtype):
            bias = None if module.bias is None else module.bias.detach()
            module.__dict__["forward"] = product_of(module.weight.detach(), bias)
            module.weight.data = module.weight.new_empty(0)


def product_of(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Product:
    """Rows to `rows @ weight.T + bias`."""
    if not is_faster(weight.dtype):
        return lambda rows: torch.nn.functional.linear(rows, weight, bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)

    def product(rows: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], "")
        return found

    return product


@cache
def is_faster(dtype: torch.dtype) -> bool:
    """Whether oneDNN's own linear layers are there for this dtype and compute what they should."""
    if dtype not in (torch.float32, torch.bfloat16):
        return False
    # Whole numbers that both dtypes hold exactly.
    rows, weight, bias = torch.eye(8, dtype=dtype), torch.arange(64).view(8, 8).to(dtype), torch.arange(8).to(dtype)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
        found = torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], "")
        return torch.equal(found, weight.T + bias)
    except Exception as error:  # not there, of another signature, not for this CPU: torch says each in its own way
        logger.debug("The linear layers of oneDNN are not used: %s.", first_line(error))
        return False
