"""One vector out of a safetensors file, without numpy, torch or the safetensors library.

A query needs nothing else of that format: the header (checkpoints/files.py), and the numbers as they lie.
"""

from __future__ import annotations

import struct
from pathlib import Path

from sparse_ingest.checkpoints.files import read_header
from sparse_ingest.errors import CheckpointError

# Type of a tensor -> how `struct` names it; bfloat16 is the upper half of a float32.
FORMATS = {"F64": "d", "F32": "f", "F16": "e", "BF16": "H"}


def read_vector(path: Path, name: str) -> list[float]:
    """The vector `name` of a safetensors file.

    Raises:
        CheckpointError: the file is damaged, or has no such vector of floating-point numbers.
    """
    numbers_begin, tensors = read_header(path)
    try:
        entry = tensors[name]
        form, (start, end) = FORMATS[entry["dtype"]], entry["data_offsets"]
        [count] = entry["shape"]
        with path.open("rb") as file:
            file.seek(numbers_begin + start)
            numbers = struct.unpack(f"<{count}{form}", file.read(end - start))
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise CheckpointError(
            f"{path} must hold the vector {name!r} as safetensors ({type(error).__name__}: {error}). "
            "Fetch the model again."
        ) from error
    if form == "H":
        numbers = struct.unpack(f"<{count}f", b"".join(struct.pack("<HH", 0, upper) for upper in numbers))
    return [float(number) for number in numbers]
