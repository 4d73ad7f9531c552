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

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import repeat
from typing import Any, cast

import pyarrow as pa

from sparse_ingest.corpora.columns import rows_of, slices_of
from sparse_ingest.corpora.documents import shown
from sparse_ingest.corpora.json_values import type_name
from sparse_ingest.errors import UsageError, first_line

_BATCH_ROWS = 512  # that are Python objects at one time

Row = tuple[Mapping[str, object] | None, str | None]  # the columns that are read; or None, and what is wrong
# Names of all columns -> the columns to read, each with its place among them; or what is wrong.
Choose = Callable[[tuple[object, ...]], dict[str, int] | str]


def rows_in(container: Any, choose: Choose) -> Iterator[Row]:
    """Return an iterator over the rows of a container. What the container raises while it is read is not caught.

    Raises:
        UsageError: the value is not a container of rows.
    """
    if _comes_from("datasets", "Dataset", container) or _comes_from("datasets", "IterableDataset", container):
        return _rows_of_dataset(container, choose)
    if _comes_from("pandas", "DataFrame", container):
        return _rows_of_frame(container, choose)
    if (batches := _batches_of(container)) is not None:
        return _rows_of_batches(batches, choose)
    if isinstance(container, Iterable) and not isinstance(container, (str, bytes, Mapping)):
        return _rows_of_mappings(container, choose)
    advice = "Give an iterable of mappings, a DataFrame, an Arrow table or a Dataset."
    if type(container).__name__ in ("DatasetDict", "IterableDatasetDict"):
        advice = f"Give one of its splits: {', '.join(container)}."
    elif isinstance(container, Mapping):
        advice = "One mapping is one row: give a list of them."
    raise UsageError(f"Rows of a corpus were expected, found a value of type {type_name(container)}. {advice}")


def _comes_from(module: str, name: str, container: Any) -> bool:
    """Return whether the container is an instance of a class of a library, without importing the library."""
    return isinstance(container, getattr(sys.modules.get(module), name, ()))


def _rows_of_mappings(rows: Iterable[object], choose: Choose) -> Iterator[Row]:
    for row in rows:
        if not isinstance(row, Mapping):
            value = f": {shown(row)}" if isinstance(row, str) else ""
            yield None, f"a mapping of columns to values was expected, found a value of type {type_name(row)}{value}"
            continue
        names = tuple(row)
        chosen = choose(names)
        if isinstance(chosen, str):
            yield None, chosen
        else:
            yield {name: row[names[place]] for name, place in chosen.items()}, None


def _rows_of_frame(frame: Any, choose: Choose) -> Iterator[Row]:
    chosen = choose(tuple(frame.columns))
    if isinstance(chosen, str):
        yield from repeat((None, chosen), len(frame))
        return
    for start in range(0, len(frame), _BATCH_ROWS):
        part = frame.iloc[start : start + _BATCH_ROWS]
        yield from _zipped(chosen, (part.iloc[:, place].tolist() for place in chosen.values()))


def _zipped(names: Iterable[str], columns: Iterable[list[object]]) -> Iterator[Row]:
    return ((dict(zip(names, values, strict=True)), None) for values in zip(*columns, strict=True))


def _batches_of(container: Any) -> Iterable[pa.RecordBatch] | None:
    """Return the record batches of an object with Arrow's C interface; None for other objects."""
    if isinstance(container, pa.RecordBatch):
        return [container]
    if isinstance(container, pa.RecordBatchReader):  # through the C interface its iterator's exceptions become OSError
        return cast(Iterable[pa.RecordBatch], container)
    # A Series is an iterable of its values.
    if not hasattr(container, "__arrow_c_stream__") or type(container).__name__ == "Series":
        return None
    try:
        return cast(Iterable[pa.RecordBatch], pa.RecordBatchReader.from_stream(container))
    except pa.ArrowException as error:
        raise UsageError(
            f"The value of type {type_name(container)} is not a table that Arrow can read: {first_line(error)}. Give a "
            "table with named columns of types that Arrow has."
        ) from error


def _rows_of_batches(batches: Iterable[pa.RecordBatch], choose: Choose) -> Iterator[Row]:
    for batch in batches:
        chosen = choose(tuple(batch.schema.names))
        if isinstance(chosen, str):
            yield from repeat((None, chosen), batch.num_rows)
        else:
            yield from rows_of(slices_of(batch.select(list(chosen.values()))), list(chosen))


def _rows_of_dataset(dataset: Any, choose: Choose) -> Iterator[Row]:
    if getattr(dataset, "format", {}).get("type") != "custom":  # a transform, which makes the columns
        dataset = dataset.with_format(None)
        # A generator's columns are not known; its rows may differ in them.
        known = dataset.column_names is not None and dataset.features is not None
        if known and not isinstance(chosen := choose(tuple(dataset.column_names)), str):
            for batch in dataset.select_columns(list(chosen)).iter(_BATCH_ROWS):
                yield from _zipped(chosen, (batch[name] for name in chosen))
            return
    yield from _rows_of_mappings(dataset, choose)
