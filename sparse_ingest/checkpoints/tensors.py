"""The weight files of a model folder, and the headers of safetensors files. No weights are loaded.

A safetensors file has the length of its header in eight bytes, the header (JSON), then the numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from sparse_ingest.checkpoints.modules import damaged, read_as
from sparse_ingest.errors import short_repr
from sparse_ingest.storage.foreign_json import LFS_POINTER, NOT_FETCHED, checked, parse_json

MAX_HEADER_BYTES = 8 << 20  # 80,000 tensors; a masked LM has some hundreds
MAX_DIMENSIONS = 8
# Bytes of one number, by the name of its type in safetensors.
BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2, "U32": 4,
    "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
INDEX = ".index.json"


@dataclass(frozen=True)
class Tensor:
    """A tensor in the header of a safetensors file."""

    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


class _Index(TypedDict, total=False):
    weight_map: dict[str, str]


def weight_files(folder: Path) -> list[Path]:
    """Return the file or the shards with the weights of a folder. Raise CheckpointError if the index is wrong."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name]
        if (index := folder / f"{name}{INDEX}").exists():
            shards = sorted(set(read_as(index, _Index).get("weight_map", {}).values()))
            wrong = [shard for shard in shards if "/" in shard or not (folder / shard).is_file()]
            if wrong or not shards:
                raise damaged(f"{index} names {short_repr(wrong[0]) if wrong else 'no file'}; expected files beside it")
            return [folder / shard for shard in shards]
    return sorted(path for path in folder.glob("*.safetensors") if path.is_file())


def read_header(path: Path) -> tuple[int, dict[str, Tensor]]:
    """Return the offset of the first number of a safetensors file, and its tensors. Raise CheckpointError."""
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            if (start := stream.read(8)) == LFS_POINTER[:8]:
                raise ValueError(NOT_FETCHED)
            length = int.from_bytes(start, "little")
            if MAX_HEADER_BYTES < length <= size:
                raise ValueError(f"its header has {length:,} bytes; at most {MAX_HEADER_BYTES:,} are read")
            header = parse_json(stream.read(min(length, MAX_HEADER_BYTES)))
        if isinstance(header, dict):
            header.pop("__metadata__", None)
        tensors = checked(header, dict[str, Tensor])
        end = 8 + length + max((tensor.data_offsets[1] for tensor in tensors.values()), default=0)
        if size < end:
            raise ValueError(f"it has {size:,} bytes, but its header declares {end:,}")
        for name, tensor in tensors.items():
            (first, last), shape = tensor.data_offsets, tensor.shape
            fits = 0 <= min(shape, default=0) and len(shape) <= MAX_DIMENSIONS and 0 <= first <= last
            if not fits or math.prod(shape) * BYTES.get(tensor.dtype, 1) > last - first:
                raise ValueError(f"its tensor {short_repr(name)} has the shape {short_repr(shape)}, beyond its bytes")
    except (OSError, ValueError) as error:
        raise damaged(f"{path} is not a safetensors file, or is damaged: {error}") from error
    return 8 + length, tensors
