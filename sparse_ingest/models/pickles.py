"""Weight tables from a pickle: read by torch with `weights_only`, which runs no code, or not at all."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch

from sparse_ingest.errors import CheckpointError, first_line


def refused(path: str, instead: str) -> str:
    """Why a pickle is not read; torch's own words advise to read it with the protection off."""
    return (
        f"{path} is no pickle of plain weights: damaged, or it holds more than tensors and could run code, so it is "
        f"not read. Fetch the model again, or ask for {instead}."
    )


def read_table(path: Path) -> list[float]:
    """The weights of a query side by token id, from pytorch_model.bin.

    Raises:
        CheckpointError: the file holds more than tensors, or no table.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(refused(str(path), "model.safetensors or idf.json")) from error
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {first_line(error)}. Fetch the model again.") from error
    table = content.get("weight") if isinstance(content, dict) else None
    if not isinstance(table, torch.Tensor) or table.dim() != 1:
        raise CheckpointError(f"{path} must hold one tensor `weight` with a number for each token.")
    weights: list[float] = table.float().tolist()
    return weights
