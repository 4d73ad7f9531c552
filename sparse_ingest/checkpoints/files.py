"""The files of a model folder that are no plain JSON, read without the libraries that wrote them.

In: a path. Out: a tokenizer, or the header of a safetensors file. Not covered: pickles (models/masked_lms.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from sparse_ingest.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # as the safetensors library has it


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json.

    Raises:
        CheckpointError: the file is absent or malformed.
    """
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # `tokenizers` raises bare Exception for either
        raise CheckpointError(f"{path} cannot be read as a tokenizer: {error}. Fetch the model again.") from error


def read_header(path: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    """Where the numbers of a safetensors file begin, and what it says of each tensor: eight bytes of length, then JSON.

    Raises:
        CheckpointError: the file has no such header, or is shorter than its header says.
    """
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length) if length <= MAX_HEADER_BYTES else b"")
        tensors = {name: tensor for name, tensor in header.items() if name != "__metadata__"}
        end = 8 + length + max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(
            f"{path} is no safetensors file: its header cannot be read. Fetch the model again."
        ) from error
    if (size := path.stat().st_size) < end:
        raise CheckpointError(
            f"{path} has {size:,} bytes; a safetensors file with its header takes {end:,}. Fetch the model again."
        )
    return 8 + length, tensors
