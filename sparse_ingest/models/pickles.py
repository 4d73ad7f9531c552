"""Weight tables from a pickle: read by torch with `weights_only`, which runs no code, or not at all."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch

from sparse_ingest.errors import CheckpointError, first_line


def read_table(path: Path) -> list[float]:
    """The weights of a query side by token id, from pytorch_model.bin.

    Raises:
        CheckpointError: the file holds more than tensors, or no table.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError) as error:
        raise CheckpointError(
            f"{path} is a pickle that torch does not read as plain weights ({first_line(error)}); a pickle that holds "
            "more could run code. Ask for the table as model.safetensors or idf.json."
        ) from error
    table = content.get("weight") if isinstance(content, dict) else None
    if not isinstance(table, torch.Tensor) or table.dim() != 1:
        raise CheckpointError(f"{path} must hold one tensor `weight` with a number for each token.")
    weights: list[float] = table.float().tolist()
    return weights
