"""Shards: sparse vectors as Parquet, written and read one row group at a time.

In and out: `ShardPart`s of at most 8192 rows. The two list columns are CSR arrays, so they are not converted row by
row. Float16 weights are truncated, never rounded: an index keeps the same 9 bits as of the float32 weight.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from sparse_ingest.errors import RunError, first_line
from sparse_ingest.records import SparseRows
from sparse_ingest.storage.foreign_json import checked
from sparse_ingest.storage.places import Place, RemotePath

PART_ROWS = 8192
_ANY = 1 << 32  # above every token id
_COLUMNS = {
    "row": ("uint64",),
    "doc_id": ("string",),
    "text_hash": ("fixed_size_binary[16]",),
    "token_ids": ("list of uint16", "list of uint32"),
    "weights": ("list of halffloat", "list of float"),
    "fields": ("string",),
}
_VECTORS = ["doc_id", "token_ids", "weights"]
_PART_BYTES = 16 << 20  # of fields read at a time: the fields of 8192 articles have hundreds of MB
MAX_FLOAT16 = 65504.0
_FIELDS = msgspec.json.Decoder(dict[str, Any])
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
    """Return the first 16 bytes of the SHA-256 of the text that the model reads."""
    return hashlib.sha256(text.encode()).digest()[:16]


def shard_schema(vocabulary_size: int, weights: WeightType) -> pa.Schema:
    """Return the columns of format 1; token ids have 16 bits if the vocabulary allows it."""
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
    """Return the columns of an existing shard."""
    with _opened(path) as file:
        return file.schema_arrow


def parse_fields(carried: str, doc_id: str) -> dict[str, Any]:
    """Return the fields of a document. Raise `RunError` if they are not a JSON object or nested too deeply."""
    with suppress(ValueError, RecursionError):
        return _FIELDS.decode(carried)  # five times faster than json
    try:
        # json also reads NaN, numbers above float64 and lone surrogates.
        return checked(json.loads(carried), dict[str, Any])
    except (ValueError, RecursionError) as error:
        raise RunError(
            f"The fields of document {doc_id[:80]!r} are not a JSON object: {first_line(error)}. "
            "Encode into a new folder."
        ) from error


def write_parts(parts: Iterable[ShardPart], *, scratch: Path, schema: pa.Schema) -> str:
    """Write a shard to `scratch` part by part, synced, and return its SHA-256 in hexadecimal."""
    with (
        open_file(scratch, "w") as file,
        pq.ParquetWriter(file, schema, compression="zstd", use_dictionary=["token_ids.list.element"]) as writer,
    ):
        for part in parts:
            writer.write_batch(_record_batch(part, schema), row_group_size=PART_ROWS)
    with scratch.open("rb+") as written:
        sha256 = hashlib.file_digest(written, "sha256").hexdigest()
        os.fsync(written.fileno())
    return sha256


def read_shard(path: Place, *, opened: pa.NativeFile | None = None, tokens: int = _ANY) -> Iterator[ShardPart]:
    """Yield the row groups of a shard, in smaller parts where fields are long.

    Args:
        path: The Parquet file of the shard.
        opened: Its content, if it is open already; `path` is then used in messages only.
        tokens: The size of the vocabulary.

    Raises:
        RunError: the file is missing, not Parquet, or has columns or values that format 1 does not allow.
    """
    with _opened(path, opened) as file:
        yield from _parts(file, range(file.num_row_groups), tokens)


def read_row(path: Place, group: int, place: int, *, tokens: int = _ANY) -> ShardPart:
    """Return one row of a row group. Other row groups are not read; raises like `read_shard`."""
    with _opened(path) as file:
        for part in _parts(file, [group], tokens):
            if place < len(part.rows):
                return take_rows(part, np.array([place]))
            place -= len(part.rows)
        raise ValueError(f"row group {group} has no row {place}")


def find_doc_ids(path: Place, wanted: Sequence[str]) -> Iterator[tuple[str, int, int, int]]:
    """Yield the wanted ids that a shard has, with the row group of each, its place there and its place in the shard.

    Only the column of ids is read; raises like `read_shard`.
    """
    import pyarrow.compute as pc

    values, first = _strings(wanted), 0
    with _opened(path) as file:
        for group, table in enumerate(_tables(file, ["doc_id"])):
            doc_ids = _only_chunk(table.column("doc_id"))
            for place in pc.indices_nonzero(pc.is_in(doc_ids, value_set=values)).to_pylist():
                yield doc_ids[place].as_py(), group, place, first + place
            first += table.num_rows


def read_doc_ids(path: Place) -> Iterator[tuple[int, str]]:
    """Yield the source row and document id of each row of a shard; raises like `read_shard`."""
    with _opened(path) as file:
        for table in _tables(file, ["row", "doc_id"]):
            yield from zip(table.column("row").to_pylist(), table.column("doc_id").to_pylist(), strict=True)


def read_text_hashes(path: Place) -> Iterator[bytes]:
    """Yield the concatenated text hashes of each row group, 16 bytes per row; raises like `read_shard`."""
    with _opened(path) as file:
        for table in _tables(file, ["text_hash"]):
            hashes = _only_chunk(table.column("text_hash"))
            yield hashes.buffers()[1].to_pybytes()[16 * hashes.offset : 16 * (hashes.offset + len(hashes))]


def read_vectors(path: Place, group: int, *, tokens: int = _ANY) -> SparseRows:
    """Return the ids and vectors of one row group of a shard; raises like `read_shard`."""
    with _opened(path) as file:
        first = sum(file.metadata.row_group(before).num_rows for before in range(group))
        return _vectors(file.read_row_group(group, columns=_VECTORS).combine_chunks(), first, tokens)


def read_shard_vectors(path: Place, *, tokens: int = _ANY) -> Iterator[SparseRows]:
    """Yield the ids and vectors of each row group of a shard, without its fields; raises like `read_shard`."""
    first = 0
    with _opened(path) as file:
        for table in _tables(file, _VECTORS):
            yield _vectors(table, first, tokens)
            first += table.num_rows


def _parts(file: pq.ParquetFile, groups: Iterable[int], tokens: int) -> Iterator[ShardPart]:
    first = 0
    for table in _tables(file, list(_COLUMNS), groups):
        hashes, fields = (table.column(name).to_pylist() for name in ("text_hash", "fields"))
        yield ShardPart(_numbers(_only_chunk(table.column("row"))), hashes, _vectors(table, first, tokens), fields)
        first += table.num_rows


def _tables(file: pq.ParquetFile, columns: list[str], groups: Iterable[int] | None = None) -> Iterator[pa.Table]:
    """Yield row groups, by default all, each as a table of one chunk, or several if its fields have many bytes."""
    for group in range(file.num_row_groups) if groups is None else groups:
        about = file.metadata.row_group(group)
        stored = map(about.column, range(about.num_columns))
        sizes = {column.path_in_schema: column.total_uncompressed_size for column in stored}
        pieces = -(-sizes["fields"] // _PART_BYTES) if "fields" in columns else 1
        if pieces < 2:
            tables = iter([file.read_row_group(group, columns=columns).combine_chunks()])
        else:
            rows = max(1, about.num_rows // pieces)
            batches = file.iter_batches(batch_size=rows, row_groups=[group], columns=columns, use_threads=False)
            tables = (pa.Table.from_batches([batch]) for batch in batches)
        for table in tables:
            for name in columns:
                if table.column(name).null_count:
                    raise ValueError(f"column {name} has nulls")
            yield table


@contextmanager
def _opened(path: Place, opened: pa.NativeFile | None = None) -> Iterator[pq.ParquetFile]:
    """Open the Parquet file of a shard for the block, in which errors become a `RunError`."""
    remote = opened is None and isinstance(path, RemotePath)
    with reading_shard(path), nullcontext(opened) if opened else _source(path) as source:
        # With a buffer, Arrow reads page by page instead of complete columns of a row group. At an address each read
        # is a request, so the requested columns of a row group are fetched together.
        with pq.ParquetFile(source, buffer_size=0 if remote else 1 << 20, pre_buffer=remote) as file:
            for name, kinds in _COLUMNS.items():
                kind = file.schema_arrow.field(name).type
                if (found := f"list of {kind.value_type}" if pa.types.is_list(kind) else str(kind)) not in kinds:
                    raise ValueError(f"column {name} is {found}, expected {' or '.join(kinds)}")
            yield file


@contextmanager
def reading_shard(path: Place) -> Iterator[None]:
    """Turn errors of reading a shard into a `RunError`, which calls the shard damaged only if its bytes are."""
    try:
        yield
    except (OSError, MemoryError, pa.ArrowException, KeyError, ValueError) as error:
        # Arrow's own errors about content have no errno.
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno):
            reason = "out of memory" if isinstance(error, MemoryError) else os.strerror(error.errno or 0)
            raise RunError(
                f"{path} cannot be read as a shard: {reason}. Check its disk, its permissions and the limits of memory "
                "and open files (ulimit -v, ulimit -n), then run the command again. Nothing was deleted."
            ) from error
        raise RunError(
            f"{path} cannot be read as a shard: {first_line(error)}. Copy it again if its SHA-256 differs from the one "
            "in its record in done/; otherwise another program wrote it: encode the corpus again."
        ) from error


def _source(path: Place) -> AbstractContextManager[Any]:
    return closing(path.open_ranges()) if isinstance(path, RemotePath) else open_file(path)


def open_file(path: Path, mode: Literal["r", "w"] = "r") -> pa.OSFile:
    """Open a local file with Arrow by the bytes of its name, since Arrow refuses strings that are not UTF-8.

    For writing, an existing file, link or named pipe of that name is removed.

    Raises:
        ValueError: for reading, it is not a regular file.
    """
    if mode == "w":
        path.unlink(missing_ok=True)
    elif not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("it is not a regular file")
    return pa.OSFile(os.fsencode(path), mode)


def drop_bits(weights: npt.NDArray[np.float32]) -> npt.NDArray[np.float16]:
    """Return float32 weights as float16, rounded toward zero.

    Raise `ValueError` if a weight is negative, not finite or above 65504, the largest float16.
    """
    if weights.size and not (weights.min() >= 0 and weights.max() <= MAX_FLOAT16):
        raise ValueError(f"weights from {weights.min()} to {weights.max()} do not fit into float16 (0 to 65504)")
    with np.errstate(over="ignore"):
        halves = weights.astype(np.float16)
    # The conversion rounds to nearest; where it rounded up, the next lower bit pattern is the truncated value.
    rounded_up = halves.astype(np.float32) > weights
    return (halves.view(np.uint16) - rounded_up).view(np.float16)


def store_weights(vectors: SparseRows, kind: WeightType) -> SparseRows:
    """Return vectors with the stored type of weights; weights that become zero (underflow) are dropped."""
    if kind == "float32":
        if not np.isfinite(vectors.weights).all():
            raise ValueError("some are not finite numbers")
        return vectors
    halves = drop_bits(vectors.weights.astype(np.float32, copy=False))
    kept = halves > 0
    stored = vectors._replace(weights=halves)
    return stored if kept.all() else stored.keep(kept)


def take_rows(part: ShardPart, places: npt.NDArray[np.integer]) -> ShardPart:
    """Return the part with the documents at these places only."""
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
    """Return an Arrow array. `pa.array` would import pandas if it is installed, which takes 40 MB and half a second."""
    return pa.Array.from_buffers(kind, len(numbers), [None, pa.py_buffer(np.ascontiguousarray(numbers))])


def _strings(strings: Sequence[str]) -> pa.Array[Any]:
    encoded = [string.encode() for string in strings]
    offsets = np.fromiter(accumulate(map(len, encoded), initial=0), dtype=np.int32, count=len(encoded) + 1)
    return pa.Array.from_buffers(
        pa.string(), len(encoded), [None, pa.py_buffer(offsets), pa.py_buffer(b"".join(encoded))]
    )


def _vectors(batch: pa.Table, first: int, tokens: int) -> SparseRows:
    """Return the vectors of a table that starts at row `first` of the shard; ValueError names a bad row and its id."""
    doc_ids, borders, values = batch.column("doc_id").to_pylist(), [], []
    for name in ("token_ids", "weights"):
        column = _only_chunk(batch.column(name))
        offsets = _numbers(column.offsets).astype(np.int64)
        start, end = (int(offsets[0]), int(offsets[-1])) if len(offsets) else (0, 0)
        borders.append(offsets - start)
        values.append(_numbers(column.values)[start:end])
    (indptr, weights_indptr), (token_ids, weights) = borders, values

    def refuse(row: int, what: str) -> NoReturn:
        raise ValueError(f"row {first + row} (id {doc_ids[row][:80]!r}) has {what}")

    if not np.array_equal(indptr, weights_indptr):
        row = int(np.flatnonzero(np.diff(indptr) != np.diff(weights_indptr))[0])
        refuse(row, f"{np.diff(indptr)[row]} token ids and {np.diff(weights_indptr)[row]} weights")
    if len(weights):
        # Bit patterns above infinity: NaN, and everything negative.
        bits, above = (array.view(f"u{weights.itemsize}") for array in (weights, np.array([np.inf], weights.dtype)))
        falls = token_ids[1:] <= token_ids[:-1]
        falls[indptr[1:-1][(0 < indptr[1:-1]) & (indptr[1:-1] < len(weights))] - 1] = False
        for broken, what, found in (
            (bits >= above, "a weight that is negative or not finite", weights),
            (token_ids >= tokens, f"a token id outside the vocabulary, which has {tokens}", token_ids),
            (np.concatenate(([False], falls)), "token ids that do not ascend", token_ids),
        ):
            if broken.any():
                place = int(broken.argmax())
                refuse(int(np.searchsorted(indptr, place, side="right")) - 1, f"{what}: {found[place]}")
    return SparseRows(doc_ids, indptr, token_ids, weights)


def _numbers(array: pa.Array[Any]) -> npt.NDArray[Any]:
    """Return the numbers of an array without nulls, not copied. `to_numpy` would import pandas if it is installed."""
    return np.from_dlpack(array)


def _only_chunk(column: pa.ChunkedArray[Any]) -> Any:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
