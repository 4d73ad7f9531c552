"""One vector out of a safetensors file, without numpy, torch or the safetensors library.

A query needs nothing else of that format: eight bytes of length, a JSON header, and the numbers as they lie.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

from sparse_ingest.errors import CheckpointError

# Type of a tensor -> how `struct` names it; bfloat16 is the upper half of a float32.
FORMATS = {"F64": "d", "F32": "f", "F16": "e", "BF16": "H"}
MAX_HEADER_BYTES = 100_000_000  # the format's own limit


def read_vector(path: Path, name: str) -> list[float]:
    """The vector `name` of a safetensors file.

    Raises:
        CheckpointError: the file is damaged, or has no such vector of floating-point numbers.
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > MAX_HEADER_BYTES:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(file.read(length))
            entry = header[name]
            form, (start, end) = FORMATS[entry["dtype"]], entry["data_offsets"]
            [count] = entry["shape"]
            file.seek(8 + length + start)
            numbers = struct.unpack(f"<{count}{form}", file.read(end - start))
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise CheckpointError(
            f"{path} must hold the vector {name!r} as safetensors ({type(error).__name__}: {error}). "
            "Fetch the model again."
        ) from error
    if form == "H":
        numbers = struct.unpack(f"<{count}f", b"".join(struct.pack("<HH", 0, upper) for upper in numbers))
    return [float(number) for number in numbers]
