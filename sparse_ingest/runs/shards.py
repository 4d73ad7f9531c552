"""Shards: sparse vectors as Parquet, written and read one row group at a time.

In and out: `ShardPart`s of at most 8192 rows. The two parallel list columns are CSR already, so neither direction
touches single weights. Float16 weights are made by dropping bits, never by rounding: the 9 bits that an index keeps
are then those of the float32 weight.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from sparse_ingest.errors import RunError, first_line
from sparse_ingest.records import SparseRows
from sparse_ingest.storage.durable import move_whole
from sparse_ingest.storage.places import Place, RemotePath

PART_ROWS = 8192
_PART_BYTES = 16 << 20  # of fields read at a time: 8192 articles have hundreds of MB
MAX_FLOAT16 = 65504.0
WeightType = Literal["float16", "float32"]


class ShardPart(NamedTuple):
    """One row group, or a piece of one whose fields are long.

    `rows` (uint64) are source rows, `text_hashes` 16 bytes each, `fields` JSON objects.
    """

    rows: npt.NDArray[np.uint64]
    text_hashes: list[bytes]
    vectors: SparseRows
    fields: list[str]


def text_hash(text: str) -> bytes:
    """The first 16 bytes of the SHA-256 of the text that the model reads."""
    return hashlib.sha256(text.encode()).digest()[:16]


def shard_schema(vocabulary_size: int, weights: WeightType) -> pa.Schema:
    """The columns of format 1; token ids take 16 bits when the vocabulary allows it."""
    return pa.schema(
        [
            pa.field("row", pa.uint64(), nullable=False),
            pa.field("doc_id", pa.string(), nullable=False),
            pa.field("text_hash", pa.binary(16), nullable=False),
            pa.field("token_ids", pa.list_(pa.uint16() if vocabulary_size <= 65536 else pa.uint32()), nullable=False),
            pa.field("weights", pa.list_(pa.float16() if weights == "float16" else pa.float32()), nullable=False),
            pa.field("fields", pa.string(), nullable=False),
        ]
    )


def shard_schema_of(path: Place) -> pa.Schema:
    """The columns of a shard that is there."""
    with _opened(path) as file:
        return file.schema_arrow


def write_shard(
    parts: Iterable[ShardPart],
    *,
    scratch: Path,
    target: Place,
    schema: pa.Schema,
    before: Callable[[], None] = lambda: None,
) -> str:
    """Write a shard to `scratch` part by part, then give it its final name. Returns its SHA-256 in hexadecimal.

    `before` is called before anything changes under that name, and may refuse.
    """
    with (
        open_file(scratch, "w") as file,
        pq.ParquetWriter(file, schema, compression="zstd", use_dictionary=["token_ids.list.element"]) as writer,
    ):
        for part in parts:
            writer.write_batch(_record_batch(part, schema), row_group_size=PART_ROWS)
    with scratch.open("rb+") as written:
        sha256 = hashlib.file_digest(written, "sha256").hexdigest()
        os.fsync(written.fileno())
    move_whole(scratch, target, before)
    return sha256


def read_shard(path: Place, *, opened: pa.NativeFile | None = None) -> Iterator[ShardPart]:
    """Read a shard one row group at a time, or less where fields are long.

    Args:
        path: The Parquet file of the shard.
        opened: Its content, if it is open already; `path` is then used in messages only.

    Raises:
        RunError: the file is missing, is no Parquet, or has other columns than format 1.
    """
    with _opened(path, opened) as file:
        yield from map(_shard_part, _tables(file, ["row", "doc_id", "text_hash", "token_ids", "weights", "fields"]))


def read_doc_ids(path: Place) -> Iterator[tuple[int, str]]:
    """Source row and document id of each row of a shard, without its vectors.

    Raises:
        RunError: as `read_shard`.
    """
    with _opened(path) as file:
        for table in _tables(file, ["row", "doc_id"]):
            yield from zip(table.column("row").to_pylist(), table.column("doc_id").to_pylist(), strict=True)


def read_text_hashes(path: Place) -> Iterator[bytes]:
    """The text hashes of each row group of a shard, 16 bytes a row, one behind the other.

    Raises:
        RunError: as `read_shard`.
    """
    with _opened(path) as file:
        for table in _tables(file, ["text_hash"]):
            hashes = _only_chunk(table.column("text_hash"))
            yield hashes.buffers()[1].to_pybytes()[16 * hashes.offset : 16 * (hashes.offset + len(hashes))]


def read_vectors(path: Place, group: int) -> SparseRows:
    """The ids and vectors of one row group of a shard.

    Raises:
        RunError: as `read_shard`.
    """
    with _opened(path) as file:
        return _vectors(file.read_row_group(group, columns=["doc_id", "token_ids", "weights"]).combine_chunks())


def read_shard_vectors(path: Place) -> Iterator[SparseRows]:
    """The ids and vectors of a shard one row group at a time, without its fields.

    Raises:
        RunError: as `read_shard`.
    """
    with _opened(path) as file:
        yield from map(_vectors, _tables(file, ["doc_id", "token_ids", "weights"]))


def _tables(file: pq.ParquetFile, columns: list[str]) -> Iterator[pa.Table]:
    """Yield each row group as one table of one chunk, or as several if it has many bytes of fields that are wanted."""
    for group in range(file.num_row_groups):
        about = file.metadata.row_group(group)
        stored = map(about.column, range(about.num_columns))
        sizes = {column.path_in_schema: column.total_uncompressed_size for column in stored}
        pieces = -(-sizes["fields"] // _PART_BYTES) if "fields" in columns else 1
        if pieces < 2:
            yield file.read_row_group(group, columns=columns).combine_chunks()
        else:
            rows = max(1, about.num_rows // pieces)
            for batch in file.iter_batches(batch_size=rows, row_groups=[group], columns=columns, use_threads=False):
                yield pa.Table.from_batches([batch])


@contextmanager
def _opened(path: Place, opened: pa.NativeFile | None = None) -> Iterator[pq.ParquetFile]:
    """Open the Parquet file of a shard for the block. Errors in the block become a `RunError`."""
    remote = opened is None and isinstance(path, RemotePath)
    try:
        with nullcontext(opened) if opened else _source(path) as source:
            # With a buffer pages are read as they are needed, not a column of a row group at once. At an address each
            # read is a request, so the wanted columns of a row group are fetched together.
            with pq.ParquetFile(source, buffer_size=0 if remote else 1 << 20, pre_buffer=remote) as file:
                yield file
    except (OSError, pa.ArrowException, KeyError) as error:
        raise RunError(
            f"{path} cannot be read as a shard: {first_line(error)}. Delete its file in done/ and encode again."
        ) from error


def _source(path: Place) -> AbstractContextManager[Any]:
    return closing(path.open_ranges()) if isinstance(path, RemotePath) else open_file(path)


def open_file(path: Path, mode: Literal["r", "w"] = "r") -> pa.OSFile:
    """Open a local file with Arrow by the bytes of its name, since Arrow refuses strings that are not UTF-8."""
    return pa.OSFile(os.fsencode(path), mode)


def drop_bits(weights: npt.NDArray[np.float32]) -> npt.NDArray[np.float16]:
    """Float32 weights as float16, towards zero.

    Raises:
        ValueError: a weight is negative, not finite or above 65504, the largest float16.
    """
    if weights.size and not (weights.min() >= 0 and weights.max() <= MAX_FLOAT16):
        raise ValueError(f"weights from {weights.min()} to {weights.max()} do not fit into float16 (0 to 65504)")
    with np.errstate(over="ignore"):
        halves = weights.astype(np.float16)
    # Conversion rounds to nearest; where it went up, the next lower bit pattern is the truncated value.
    rounded_up = halves.astype(np.float32) > weights
    return (halves.view(np.uint16) - rounded_up).view(np.float16)


def store_weights(vectors: SparseRows, kind: WeightType) -> SparseRows:
    """The vectors as a shard keeps them; weights that become zero (underflow) are dropped."""
    if kind == "float32":
        if not np.isfinite(vectors.weights).all():
            raise ValueError("some are not finite numbers")
        return vectors
    halves = drop_bits(vectors.weights.astype(np.float32, copy=False))
    kept = halves > 0
    stored = vectors._replace(weights=halves)
    return stored if kept.all() else stored.keep(kept)


def drop_rows(part: ShardPart, rows: Sequence[int]) -> ShardPart:
    """The part without the documents of some source rows."""
    kept = ~np.isin(part.rows, np.array(rows, dtype=np.uint64))
    return part if kept.all() else take_rows(part, np.flatnonzero(kept))


def take_rows(part: ShardPart, places: npt.NDArray[np.integer]) -> ShardPart:
    """The part with the documents at these places only."""
    chosen = places.tolist()
    hashes, fields = [part.text_hashes[i] for i in chosen], [part.fields[i] for i in chosen]
    return ShardPart(part.rows[places], hashes, part.vectors.take(places), fields)


def _record_batch(part: ShardPart, schema: pa.Schema) -> pa.RecordBatch:
    offsets = _array(part.vectors.indptr.astype(np.int32), pa.int32())

    def lists(values: npt.NDArray[Any], name: str) -> pa.Array[Any]:
        kind = schema.field(name).type
        flat = _array(values.astype(kind.value_type.to_pandas_dtype(), copy=False), kind.value_type)
        return pa.ListArray.from_arrays(offsets, flat, type=kind)

    columns = [
        _array(part.rows, pa.uint64()),
        _strings(part.vectors.doc_ids),
        pa.Array.from_buffers(pa.binary(16), len(part.rows), [None, pa.py_buffer(b"".join(part.text_hashes))]),
        lists(part.vectors.token_ids, "token_ids"),
        lists(part.vectors.weights, "weights"),
        _strings(part.fields),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _array(numbers: npt.NDArray[Any], kind: pa.DataType) -> pa.Array[Any]:
    """Numbers as an Arrow array. `pa.array` imports pandas where it is installed: 40 MB, and half a second."""
    return pa.Array.from_buffers(kind, len(numbers), [None, pa.py_buffer(np.ascontiguousarray(numbers))])


def _strings(strings: Sequence[str]) -> pa.Array[Any]:
    encoded = [string.encode() for string in strings]
    offsets = np.fromiter(accumulate(map(len, encoded), initial=0), dtype=np.int32, count=len(encoded) + 1)
    return pa.Array.from_buffers(
        pa.string(), len(encoded), [None, pa.py_buffer(offsets), pa.py_buffer(b"".join(encoded))]
    )


def _shard_part(batch: pa.Table) -> ShardPart:
    rows = _numbers(_only_chunk(batch.column("row")))
    hashes, fields = (batch.column(name).to_pylist() for name in ("text_hash", "fields"))
    return ShardPart(rows, hashes, _vectors(batch), fields)


def _vectors(batch: pa.Table) -> SparseRows:
    lists = [_only_chunk(batch.column(name)) for name in ("token_ids", "weights")]
    offsets = _numbers(lists[0].offsets).astype(np.int64)
    start, end = (int(offsets[0]), int(offsets[-1])) if len(offsets) else (0, 0)
    token_ids, weights = (_numbers(column.values)[start:end] for column in lists)
    return SparseRows(batch.column("doc_id").to_pylist(), offsets - start, token_ids, weights)


def _numbers(array: pa.Array[Any]) -> npt.NDArray[Any]:
    """The numbers of an array without nulls, not copied. `to_numpy` imports pandas where it is installed: 40 MB."""
    return np.from_dlpack(array)


def _only_chunk(column: pa.ChunkedArray[Any]) -> Any:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
