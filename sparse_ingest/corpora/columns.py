"""Columnar tables as sources: Parquet, and Arrow's IPC as a file (Feather) or a stream.

Row groups and record batches are read one at a time, with only the columns that documents need. A text must be a column
of strings, an id of strings or integers. Kept fields have the values of the same data as JSON lines (json_values.py).
Rows are numbered within the file, from 1. An IPC stream has no index and is always read from its start.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from io import RawIOBase
from typing import Any, cast

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pyarrow.types as types
from msgspec.structs import replace

from sparse_ingest.corpora.arrow_headers import batch_rows
from sparse_ingest.corpora.documents import BadRow
from sparse_ingest.corpora.json_values import json_value
from sparse_ingest.corpora.pieces import RowUnits, Search, Task
from sparse_ingest.corpora.sources import ChooseColumns, Record
from sparse_ingest.corpora.stored import ContentStream, FileSource, StoredFile
from sparse_ingest.errors import CorpusError, first_line, shown

_BATCH_BYTES = 4 << 20  # of Python objects at one time
_BATCH_ROWS = 4096
_IN_BATCH = 32  # bits of an IPC file's offset for the row within its record batch
_FILE_MAGIC = b"ARROW1"
# Bytes that are not UTF-8, dates after the year 9999, nanoseconds without pandas, unknown time zones, maps with
# duplicate or unhashable keys, deeply nested JSON.
_NO_PYTHON_VALUE = (ValueError, OverflowError, LookupError, TypeError, RecursionError, pa.ArrowException)

Row = tuple[dict[str, Any] | None, str | None]  # the columns; or None and what is wrong


class ColumnTable(FileSource):
    """Base class of columnar files."""

    format: str

    def __init__(self, file: StoredFile, label: str, choose: ChooseColumns) -> None:
        super().__init__(file, label)
        self._choose = choose

    def identity(self) -> dict[str, object]:
        """Return name, size and format."""
        return {**super().identity(), "format": self.format}


class Parquet(ColumnTable):
    """A Parquet file. An offset is a row."""

    format = "parquet"
    content = "Parquet"
    _rows = 0

    def passed(self, offset: int) -> int | None:
        """Return the stored bytes before a row as if rows had equal sizes."""
        return self.bytes * offset // self._rows if self.bytes and self._rows else None

    def records(self, offset: int, line: int) -> Iterator[Record]:
        """Yield every row from `offset` on."""
        reached = [line]
        with self.opened(reached) as each:
            # With a buffer, a file with one row group is read in pieces, not as complete column chunks.
            table = pq.ParquetFile(each.stored, pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True)
            self._rows = table.metadata.num_rows
            names = chosen_columns(table.schema_arrow, self._choose, self.label)
            first = 0
            for group in range(table.num_row_groups):
                described = table.metadata.row_group(group)
                end = first + described.num_rows
                if end > offset:
                    size = _batch_rows(described.total_byte_size, described.num_rows)
                    batches = table.iter_batches(size, row_groups=[group], columns=names)
                    yield from records_of(rows_of(batches, names, offset - first), reached, offset)
                    offset = end
                first = end

    def pieces(self, search: Search) -> Iterator[Task]:
        """Yield a task that reads the numbers of rows in the footer."""
        yield self._row_groups

    def _row_groups(self) -> RowUnits:
        with self.opened([1]) as each:
            table = pq.ParquetFile(each.stored, pre_buffer=False)
            chosen_columns(table.schema_arrow, self._choose, self.label)
            groups = range(table.num_row_groups)
            return RowUnits(tuple(table.metadata.row_group(group).num_rows for group in groups))


class Arrow(ColumnTable):
    """An IPC file or stream. An offset is a row of a stream; of a file the record batch and a row in it."""

    format = "arrow"
    content = "Arrow"
    _batches = 0  # of a file

    def passed(self, offset: int) -> int | None:
        """Return the bytes before a record batch as if they had equal sizes; of a stream the bytes that were read."""
        if self.bytes and self._batches:
            return self.bytes * (offset >> _IN_BATCH) // self._batches
        return self._opened.taken if self.bytes and self._opened else None

    def records(self, offset: int, line: int) -> Iterator[Record]:
        """Yield every row from `offset` on, which is row `line`."""
        reached = [line]
        with self.opened(reached) as each:
            yield from (self._of_file if _is_file(each) else self._of_stream)(each, offset, reached)

    def pieces(self, search: Search) -> Iterator[Task]:
        """Yield a task that reads the numbers of rows in the headers of a file, or the record batches of a stream."""
        yield partial(self._record_batches, search)

    def _record_batches(self, search: Search) -> RowUnits | None:
        with self.opened([1]) as each:
            if not _is_file(each):
                table = pa.ipc.open_stream(each.content)
                chosen_columns(table.schema, self._choose, self.label)
                rows = 0
                for batch in table:
                    search.check_stopped()
                    rows += batch.num_rows
                return None if each.content.read(1) else RowUnits((rows,))
            chosen_columns(self._schema(each), self._choose, self.label)
            try:
                return RowUnits(batch_rows(cast(RawIOBase, each.content.raw), self.bytes or 0), "unit", _IN_BATCH)
            except ValueError:
                return None

    def _of_file(self, each: ContentStream, offset: int, reached: list[int]) -> Iterator[Record]:
        schema = self._schema(each)
        places = [schema.names.index(name) for name in chosen_columns(schema, self._choose, self.label)]
        table = pa.ipc.open_file(each.stored, options=pa.ipc.IpcReadOptions(included_fields=places))
        self._batches = table.num_record_batches
        start, skip = divmod(offset, 1 << _IN_BATCH)
        for place in range(start, self._batches):
            batch = validated(table.get_batch(place))
            base = place << _IN_BATCH
            rows = rows_of(slices_of(batch), batch.schema.names, skip)
            for record in records_of(rows, reached, base + skip):
                is_last = record.offset == base + batch.num_rows
                yield replace(record, offset=(place + 1) << _IN_BATCH) if is_last else record
            skip = 0

    def _schema(self, each: ContentStream) -> pa.Schema:
        """Return the schema of a file."""
        if each.packed or self.file.bytes is None:
            raise CorpusError(
                f"{self.file.place} is an Arrow file: it cannot be read from a pipe or compressed. Use Arrow's stream "
                "format."
            )
        return pa.ipc.open_file(each.stored).schema

    def _of_stream(self, each: ContentStream, offset: int, reached: list[int]) -> Iterator[Record]:
        table = pa.ipc.open_stream(each.content)
        names = chosen_columns(table.schema, self._choose, self.label)
        first = 0
        for batch in table:
            if first + batch.num_rows > offset:
                rows = rows_of(slices_of(validated(batch.select(names))), names, offset - first)
                yield from records_of(rows, reached, offset)
                offset = first + batch.num_rows
            first += batch.num_rows
        # Arrow stops at the end mark, before the checksum of a compressed file or a second stream.
        if each.content.read(1):
            raise pa.ArrowInvalid("something follows the end of the stream")


def _is_file(each: ContentStream) -> bool:
    return each.content.peek(len(_FILE_MAGIC)).startswith(_FILE_MAGIC)


def chosen_columns(schema: pa.Schema, choose: ChooseColumns, label: str) -> list[str]:
    """Return the columns to read, whose types are correct. Raise `CorpusError`."""
    try:
        chosen = choose(schema.names)
        _refuse_types(schema, chosen)
    except BadRow as bad:
        raise CorpusError(f"{label}: {bad}") from bad
    return list(chosen)


def _refuse_types(schema: pa.Schema, chosen: Mapping[str, str]) -> None:
    """Raise `BadRow` if a column has the wrong type for its role; `chosen` is from `needed_columns`."""
    for name, role in chosen.items():
        type_ = schema.field(name).type
        of_values = type_.value_type if types.is_dictionary(type_) else type_
        # A column of JSON may have only strings.
        strings = _is_string(of_values) or types.is_null(of_values) or _has_json(of_values)
        found = f'the {role} in "{name}" is of type {type_}'
        if role in ("text", "title") and not strings:
            raise BadRow(f"{found}; expected strings")
        integers = types.is_integer(of_values) or (types.is_decimal(of_values) and of_values.scale <= 0)
        if role == "id" and not (strings or integers or str(of_values) == "extension<arrow.uuid>"):
            raise BadRow(f"{found}; expected strings, integers or UUIDs")


def _is_string(type_: pa.DataType) -> bool:
    return bool(types.is_string(type_) or types.is_large_string(type_) or types.is_string_view(type_))


def _has_json(type_: pa.DataType) -> bool:
    return "extension<arrow.json" in str(type_)


def _is_plain(type_: pa.DataType) -> bool:
    """Return whether JSON has every value of a type; it lacks NaN, so floats are not plain."""
    if types.is_struct(type_):
        return all(_is_plain(field.type) for field in type_)
    is_list = types.is_list(type_) or types.is_large_list(type_) or types.is_fixed_size_list(type_)
    if is_list or types.is_dictionary(type_):
        return _is_plain(type_.value_type)
    return bool(types.is_null(type_) or types.is_boolean(type_) or types.is_integer(type_) or _is_string(type_))


def _values(column: pa.Array) -> list[Any]:
    """Return the JSON values of a column. Raise `BadRow`, or one of `_NO_PYTHON_VALUE`."""
    if _is_plain(column.type):
        return cast("list[Any]", column.to_pylist())  # at four times the speed
    values: list[Any] = column.to_pylist(maps_as_pydicts="strict")
    if _has_json(column.type):
        values = [_parsed(value, column.type) for value in values]
    return [json_value(value) for value in values]


def _parsed(value: Any, type_: pa.DataType) -> Any:
    """Return a value with the texts of Arrow's JSON type in it parsed."""
    if value is None or not _has_json(type_):
        return value
    if isinstance(type_, pa.BaseExtensionType):
        return json.loads(value)
    if types.is_struct(type_):
        return {field.name: _parsed(value[field.name], field.type) for field in type_}
    if types.is_map(type_):
        return {key: _parsed(each, type_.item_type) for key, each in value.items()}
    return _parsed(value, type_.value_type) if isinstance(value, str) else [_parsed(v, type_.value_type) for v in value]


def _batch_rows(size: int, rows: int) -> int:
    return min(_BATCH_ROWS, max(1, _BATCH_BYTES * rows // max(1, size)))


def slices_of(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """Yield slices of a batch of about 4 MB and at most 4096 rows, without copying."""
    rows = _batch_rows(batch.nbytes, batch.num_rows)
    for start in range(0, batch.num_rows, rows):
        yield batch.slice(start, rows)


def records_of(rows: Iterable[Row], reached: list[int], offset: int) -> Iterator[Record]:
    """Yield rows as records. The first is row `reached[0]`, which is advanced, at `offset`."""
    for following, (columns, reason) in enumerate(rows, offset + 1):
        reached[0] += 1
        yield Record(columns, reason, reached[0] - 1, following, reached[0])


def rows_of(batches: Iterable[pa.RecordBatch], names: Sequence[str], skip: int = 0) -> Iterator[Row]:
    """Yield these columns of every row after the first `skip`; or None and what is wrong."""
    for batch in batches:
        if skip >= batch.num_rows:
            skip -= batch.num_rows
            continue
        batch, skip = batch.slice(skip), 0
        try:
            columns = [_values(batch.column(name)) for name in names]
        except (BadRow, *_NO_PYTHON_VALUE):
            yield from (_row(batch, names, place) for place in range(batch.num_rows))
            continue
        for values in zip(*columns, strict=True):
            yield dict(zip(names, values)), None  # noqa: B905 (strict=True takes longer than building the dict)


def _row(batch: pa.RecordBatch, names: Sequence[str], place: int) -> Row:
    row = {}
    for name in names:
        try:
            (row[name],) = _values(batch.column(name).slice(place, 1))
        except BadRow as bad:
            return None, f"column {shown(name)}: {bad}"
        except UnicodeDecodeError as error:
            return None, f"not UTF-8: byte 0x{error.object[error.start]:02x} at byte {error.start + 1} of a value"
        except _NO_PYTHON_VALUE as error:
            type_ = batch.schema.field(name).type
            return None, f"column {shown(name)}: Python cannot read a value of type {type_}: {first_line(error)}"
    return row, None


def validated(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Return the batch if its offsets are within its buffers: Arrow does not check that when it reads."""
    for column in batch.columns:
        if _is_string(column.type) and not types.is_string_view(column.type):
            # As bytes: a value that is not UTF-8 is only one bad row.
            column = column.cast(pa.large_binary() if types.is_large_string(column.type) else pa.binary())
        column.validate(full=True)
    return batch
