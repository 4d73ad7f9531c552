"""Corpora in memory: the rows of a Python object, written to a temporary file that other processes can read.

The rows are read once, in pieces. The file is in TMPDIR and is removed with the corpus, or when the process exits. The
documents are the same as from JSON lines; json_values.py converts other types.

The identity is the number of rows and a SHA-256 over the JSON lines of the columns that documents need, sorted by name;
the line of a bad row is `null`, since reasons may change between releases. It does not depend on the container.

pandas, polars and datasets are never imported here. Without pandas, Arrow timestamps with nanoseconds cannot be read.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice, repeat
from pathlib import Path
from typing import Any, cast

import pyarrow as pa

from sparse_ingest.corpora.columns import Row, rows_of, slices_of
from sparse_ingest.corpora.documents import BadRow, FieldNames, needed_columns, without_carried
from sparse_ingest.corpora.files import open_corpus
from sparse_ingest.corpora.json_values import json_line, type_name
from sparse_ingest.corpora.sources import Corpus
from sparse_ingest.corpora.stored import MAX_LINE, FoundFile
from sparse_ingest.corpora.text_formats import JsonLines, Quoting
from sparse_ingest.errors import CorpusError, UsageError, first_line, shown
from sparse_ingest.storage.foreign_json import parse_json
from sparse_ingest.storage.scratch import ScratchFolder

_BLOCK_BYTES = 1 << 20  # per write
_BATCH_ROWS = 512  # Python objects at one time
_LAYOUTS = 256  # cached lists of column names; every mapping may have its own

# Names of all columns -> the columns to read, each with its index; or what is wrong.
Choose = Callable[[tuple[object, ...]], dict[str, int] | str]


def corpus_of(
    corpus: object,
    *,
    fields: FieldNames,
    format: str | None = None,
    columns: Sequence[str] | None = None,
    quoting: Quoting | None = None,
    limit: int | None = None,
) -> Corpus:
    """Return the corpus of a value: a `Corpus`, names of files (`open_corpus`), or rows (`memory_corpus`).

    `limit` is for rows in memory; the stages apply it to files.
    """
    if isinstance(corpus, Corpus):
        return corpus
    if isinstance(corpus, (list, tuple)) and not corpus:
        raise UsageError("The corpus is an empty list. Pass rows, or the names of files.")
    specs = corpus if isinstance(corpus, (list, tuple)) else [corpus]
    if all(isinstance(spec, (str, os.PathLike)) for spec in specs):
        names = [os.fsdecode(cast("str | os.PathLike[str]", spec)) for spec in specs]
        return open_corpus(names, fields=fields, format=format, columns=columns, quoting=quoting)
    for option, value in (("format", format), ("columns", columns), ("quoting", quoting)):
        if value is not None:
            raise UsageError(f"{option} is for files; rows in memory have their own columns. Omit it.")
    return memory_corpus(corpus, fields=fields, limit=limit)


def memory_corpus(rows: object, *, fields: FieldNames, limit: int | None = None) -> Corpus:
    """Write the first `limit` rows to a temporary file, and return the corpus that reads and owns it.

    Rows are an iterable of mappings, a pandas or polars DataFrame, an object with `__arrow_c_stream__` (an Arrow table,
    batch or reader), or a `datasets` Dataset or IterableDataset. Its exceptions are not caught.
    """
    fields = without_carried(fields)
    found = islice(_rows_in(rows, _choice(fields)), limit)  # a stream may be endless
    folder = ScratchFolder()
    try:
        path = folder.path / "rows.jsonl"
        count, digest = _spool(found, path)
        return Corpus((SpooledRows(FoundFile.found(path), count, digest, folder),), fields)
    except BaseException:
        folder.close()  # the traceback keeps a reference
        raise


class SpooledRows(JsonLines):
    """Rows in a temporary file: a JSON object per line, or a string, the reason of a bad row.

    `owner` removes the file when it is collected; a pickled copy has none.
    """

    unit = "row"

    def __init__(self, file: FoundFile, rows: int, sha256: str, owner: ScratchFolder | None = None) -> None:
        super().__init__(file, "memory")
        self.name = self.label
        self._rows, self._sha256, self._owner = rows, sha256, owner

    def __reduce__(self) -> tuple[type[SpooledRows], tuple[object, ...]]:
        return SpooledRows, (self.file, self._rows, self._sha256)

    def identity(self) -> dict[str, object]:
        """Return the number of rows, and their hash."""
        return {"name": self.name, "rows": self._rows, "sha256": self._sha256}

    def _columns(self, raw: bytes) -> dict[str, object] | None:
        if raw.startswith(b'"'):
            raise BadRow(str(parse_json(raw)))
        return super()._columns(raw)


def _choice(fields: FieldNames) -> Choose:
    """Return a function that chooses the columns to read, sorted by name."""

    @functools.lru_cache(_LAYOUTS)
    def choose(columns: tuple[object, ...]) -> dict[str, int] | str:
        names = [str(name) for name in columns]
        kept = tuple(name for name in fields.keep if name in names)  # optional, as in JSON lines
        try:
            needed = needed_columns(names, replace(fields, keep=kept))
        except BadRow as bad:
            return str(bad)
        return {name: names.index(name) for name in sorted(needed)}

    return choose


def _spool(rows: Iterable[Row], path: Path) -> tuple[int, str]:
    """Write rows to a new file. Return their number and hash."""
    digest = hashlib.sha256()
    block = bytearray()
    count = 0
    with _writing(path):
        file = path.open("xb", buffering=0)
    with file:
        for count, (columns, reason) in enumerate(rows, 1):  # noqa: B007
            try:
                if columns is None:
                    raise BadRow(reason)
                line = hashed = json_line(columns)
                if len(line) >= MAX_LINE:
                    raise BadRow(f"the row has {len(line):,} bytes as JSON; expected less than {MAX_LINE:,}")
            except BadRow as bad:
                line, hashed = json.dumps(str(bad)).encode() + b"\n", b"null\n"
            digest.update(hashed)
            block += line
            if len(block) >= _BLOCK_BYTES:
                _write(file, block)
        _write(file, block)
    return count, digest.hexdigest()


def _write(file: io.FileIO, block: bytearray) -> None:
    with _writing(file.name):
        while block:
            del block[: file.write(block)]


@contextmanager
def _writing(path: object) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        advice = "Free space there, or set TMPDIR to another folder."
        raise CorpusError(f"{path} cannot be written: {error.strerror}. {advice}") from error


# Rows of a container


def _rows_in(container: Any, choose: Choose) -> Iterator[Row]:
    """Return the rows of a container with the columns that documents need. Raise UsageError for another value."""
    if _comes_from("datasets", "Dataset", container) or _comes_from("datasets", "IterableDataset", container):
        return _rows_of_dataset(container, choose)
    if _comes_from("pandas", "DataFrame", container):
        return _rows_of_frame(container, choose)
    if (batches := _batches_of(container)) is not None:
        return _rows_of_batches(batches, choose)
    if isinstance(container, Iterable) and not isinstance(container, (str, bytes, Mapping)):
        return _rows_of_mappings(container, choose)
    advice = "Pass an iterable of mappings, a DataFrame, an Arrow table or a Dataset."
    if type(container).__name__ in ("DatasetDict", "IterableDatasetDict"):
        advice = f"Pass one of its splits: {', '.join(container)}."
    elif isinstance(container, Mapping):
        advice = "One mapping is one row: pass a list of them."
    raise UsageError(f"Expected the rows of a corpus, found a value of type {type_name(container)}. {advice}")


def _comes_from(module: str, name: str, container: Any) -> bool:
    """Return whether the container is an instance of a class of a library, which is not imported."""
    return isinstance(container, getattr(sys.modules.get(module), name, ()))


def _rows_of_mappings(rows: Iterable[object], choose: Choose) -> Iterator[Row]:
    for row in rows:
        if not isinstance(row, Mapping):
            value = f": {shown(row)}" if isinstance(row, str) else ""
            yield None, f"expected a mapping of columns to values, found a value of type {type_name(row)}{value}"
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
    """Return the record batches of an object with Arrow's C interface, otherwise None."""
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
            f"The value of type {type_name(container)} is not a table that Arrow can read: {first_line(error)}. Pass a "
            "table with named columns."
        ) from error


def _rows_of_batches(batches: Iterable[pa.RecordBatch], choose: Choose) -> Iterator[Row]:
    for batch in batches:
        chosen = choose(tuple(batch.schema.names))
        if isinstance(chosen, str):
            yield from repeat((None, chosen), batch.num_rows)
        else:
            yield from rows_of(slices_of(batch.select(list(chosen.values()))), list(chosen))


def _rows_of_dataset(dataset: Any, choose: Choose) -> Iterator[Row]:
    if getattr(dataset, "format", {}).get("type") != "custom":  # a transform may change the columns
        dataset = dataset.with_format(None)
        # The rows of a generator may have different columns.
        known = dataset.column_names is not None and dataset.features is not None
        if known and not isinstance(chosen := choose(tuple(dataset.column_names)), str):
            for batch in dataset.select_columns(list(chosen)).iter(_BATCH_ROWS):
                yield from _zipped(chosen, (batch[name] for name in chosen))
            return
    yield from _rows_of_mappings(dataset, choose)
