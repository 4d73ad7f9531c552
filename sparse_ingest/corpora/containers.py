"""Rows of the containers that Python programs keep rows in.

In: an iterable of mappings, a pandas or polars DataFrame, an Arrow table, batch or reader (whatever has
`__arrow_c_stream__`), or a `datasets` Dataset. Out: the Python values of the columns that documents are made of, row by
row; other columns are not read. A container is read once, in pieces of bounded size. The index of a pandas DataFrame is
not a column.

pandas, polars and datasets are never imported here: a container of theirs exists only where they are imported already.
Without pandas, an Arrow timestamp that is finer than a microsecond is a value that cannot be read.

Not covered: converting values that JSON lacks (json_values.py).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import repeat
from typing import Any, NamedTuple, cast

import pyarrow as pa
import pyarrow.types as types

from sparse_ingest.corpora.columns import slices_of
from sparse_ingest.corpora.documents import shown
from sparse_ingest.corpora.json_values import Unreadable, type_name
from sparse_ingest.errors import UsageError, first_line

_BATCH_ROWS = 512  # that are Python objects at one time


class Column(NamedTuple):
    """A column to read: its name, and its place among the columns of the row."""

    name: str
    place: int


Row = Mapping[str, object] | Unreadable  # the values of the columns that are read, by name
Choose = Callable[[tuple[object, ...]], list[Column] | Unreadable]  # names of all columns -> the columns to read


def rows_in(container: Any, choose: Choose) -> Iterator[Row]:
    """Return an iterator over the rows of a container. What the container raises while it is read is not caught.

    Raises:
        UsageError: the value is not a container of rows.
    """
    if isinstance(container, (str, bytes, bytearray, os.PathLike, Mapping)):
        raise _no_rows(container)
    if _comes_from("datasets", "Dataset", container) or _comes_from("datasets", "IterableDataset", container):
        return _rows_of_dataset(container, choose)
    if _comes_from("pandas", "DataFrame", container):
        return _rows_of_frame(container, container.columns, _pandas_values, choose)
    if _comes_from("polars", "DataFrame", container):
        return _rows_of_frame(container, container.columns, _polars_values, choose)
    series = _comes_from("pandas", "Series", container) or _comes_from("polars", "Series", container)
    if not series and (batches := _batches_of(container)) is not None:
        return _rows_of_batches(batches, choose)
    if isinstance(container, Iterable):
        return _rows_of_mappings(container, choose)
    raise _no_rows(container)


def _comes_from(module: str, name: str, container: Any) -> bool:
    """Whether the container is an instance of a class of a library, without importing the library."""
    return isinstance(container, getattr(sys.modules.get(module), name, ()))


def _no_rows(container: object) -> UsageError:
    advice = "Give an iterable of mappings, a DataFrame, an Arrow table or a Dataset."
    if _comes_from("datasets", "DatasetDict", container) or _comes_from("datasets", "IterableDatasetDict", container):
        advice = f"Give one of its splits: {', '.join(map(str, cast(Mapping[object, object], container)))}."
    elif isinstance(container, Mapping):
        advice = "One mapping is one row: give a list of them."
    return UsageError(f"Rows of a corpus were expected, found a value of type {type_name(container)}. {advice}")


# Mappings


def _rows_of_mappings(rows: Iterable[object], choose: Choose) -> Iterator[Row]:
    for row in rows:
        if not isinstance(row, Mapping):
            value = f": {shown(row)}" if isinstance(row, str) else ""
            yield Unreadable(
                f"a mapping of columns to values was expected, found a value of type {type_name(row)}{value}"
            )
            continue
        names = tuple(row)
        chosen = choose(names)
        yield chosen if isinstance(chosen, Unreadable) else {name: row[names[place]] for name, place in chosen}


# DataFrames


def _rows_of_frame(
    frame: Any, names: Iterable[object], values_of: Callable[[Any, int, int, int], list[object]], choose: Choose
) -> Iterator[Row]:
    chosen = choose(tuple(names))
    for start in range(0, len(frame), _BATCH_ROWS):
        end = min(start + _BATCH_ROWS, len(frame))
        if isinstance(chosen, Unreadable):
            yield from repeat(chosen, end - start)
        else:
            yield from _zipped(chosen, [values_of(frame, place, start, end) for _, place in chosen])


def _pandas_values(frame: Any, place: int, start: int, end: int) -> list[object]:
    series = frame.iloc[start:end, place]
    if hasattr(series.dtype, "pyarrow_dtype"):
        return _arrow_values(pa.array(series.array))
    return cast(list[object], series.tolist())


def _polars_values(frame: Any, place: int, start: int, end: int) -> list[object]:
    series = frame.to_series(place).slice(start, end - start)
    # Through Arrow, because to_list drops nanoseconds. But Arrow has no 128-bit integers, and an Object column exports
    # the addresses of its objects.
    if series.dtype != sys.modules["polars"].Object:
        try:
            return _arrow_values(series.to_arrow())
        except pa.ArrowException:
            pass
    return cast(list[object], series.to_list())


def _zipped(chosen: Sequence[Column], columns: Sequence[list[object]]) -> Iterator[Row]:
    names = [name for name, _ in chosen]
    for values in zip(*columns, strict=True):
        yield dict(zip(names, values, strict=True))


# Arrow


def _batches_of(container: Any) -> Iterable[pa.RecordBatch] | None:
    """The record batches of an object with Arrow's C interface; None for other objects."""
    if isinstance(container, pa.RecordBatchReader):  # through the C interface its iterator's exceptions become OSError
        return cast(Iterable[pa.RecordBatch], container)
    try:
        if hasattr(container, "__arrow_c_stream__"):
            return cast(Iterable[pa.RecordBatch], pa.RecordBatchReader.from_stream(container))
        if hasattr(container, "__arrow_c_array__"):
            return [pa.record_batch(container)]
    except pa.ArrowException as error:
        raise UsageError(
            f"The value of type {type_name(container)} is not a table that Arrow can read: {first_line(error)}. Give a "
            "table with named columns of types that Arrow has."
        ) from error
    return None


def _rows_of_batches(batches: Iterable[pa.RecordBatch], choose: Choose) -> Iterator[Row]:
    for batch in batches:
        chosen = choose(tuple(batch.schema.names))
        if isinstance(chosen, Unreadable):
            yield from repeat(chosen, batch.num_rows)
            continue
        for piece in slices_of(batch.select([place for _, place in chosen])):
            yield from _zipped(chosen, [_arrow_values(column) for column in piece.columns])


def _arrow_values(array: pa.Array | pa.ChunkedArray) -> list[object]:
    try:
        values = array.to_pylist()
    except _NO_PYTHON_VALUE:
        values = [_arrow_value(array[place]) for place in range(len(array))]
    return [_with_objects(value, array.type) for value in values] if _has_maps(array.type) else values


# Bytes that are not UTF-8, dates beyond the year 9999, nanoseconds without pandas, unknown time zones.
_NO_PYTHON_VALUE = (ValueError, OverflowError, LookupError, pa.ArrowException)


def _arrow_value(scalar: pa.Scalar) -> object:
    try:
        return scalar.as_py()
    except _NO_PYTHON_VALUE as error:
        return Unreadable(f"a value of type {scalar.type} that Python cannot read: {first_line(error)}")


def _has_maps(type_: pa.DataType) -> bool:
    return types.is_map(type_) or any(_has_maps(type_.field(place).type) for place in range(type_.num_fields))


def _with_objects(value: Any, type_: pa.DataType) -> object:
    """The value with each map, which Arrow gives as a list of pairs, as an object."""
    if value is None or isinstance(value, Unreadable):
        return value
    if types.is_map(type_):
        try:
            found = {key: _with_objects(each, type_.item_type) for key, each in value}
        except TypeError:
            return Unreadable(f"a value of type {type_}, whose keys JSON does not have")
        return found if len(found) == len(value) else Unreadable("a map with a key that is there twice")
    if types.is_struct(type_):
        return {field.name: _with_objects(value[field.name], field.type) for field in type_}
    if types.is_nested(type_) and hasattr(type_, "value_type"):
        return [_with_objects(each, type_.value_type) for each in value]
    return value


# Datasets


def _rows_of_dataset(dataset: Any, choose: Choose) -> Iterator[Row]:
    if dataset.column_names is None or dataset.features is None:  # rows of a generator, of any types
        return _rows_of_mappings(dataset.with_format(None), choose)
    if getattr(dataset, "format", {}).get("type") == "custom":  # a transform, which is applied to rows as they are read
        return _rows_of_mappings(dataset, choose)
    chosen = choose(tuple(dataset.column_names))
    if not isinstance(chosen, Unreadable):
        dataset = dataset.select_columns([dataset.column_names[place] for _, place in chosen])
    # Arrow holds such values before they are decoded: Json as a string, for example.
    if sys.modules["datasets"].features.features.require_decoding(dict(dataset.features)):
        return _rows_of_mappings(dataset.with_format(None), choose)
    tables = dataset.with_format("arrow").iter(_BATCH_ROWS)
    return _rows_of_batches((batch for table in tables for batch in table.to_batches()), choose)
