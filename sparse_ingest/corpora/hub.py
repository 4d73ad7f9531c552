"""Hugging Face datasets as sources: of the hub, of a folder with the same layout, or saved by `save_to_disk`.

In: `hf:NAME[@REVISION][:CONFIG[:SPLIT]]`, where NAME is a hub id or a folder. Out: the rows of one split in the order
of the `datasets` library, streamed; their line is the number within the split. The revision is resolved to a commit.
The library finds the data files. JSON lines, csv, tsv, Parquet and Arrow are then read as in files.py, other formats by
the library: it imports torch if that is installed, which takes 600 MB of memory. It runs no code of a dataset.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from sparse_ingest.corpora.columns import chosen_columns, records_of, rows_of
from sparse_ingest.corpora.contents import ARCHIVE_SUFFIXES
from sparse_ingest.corpora.documents import BadRow, columns_text, json_object
from sparse_ingest.corpora.hub_names import FORM, Named, finding, parse, reading_rows
from sparse_ingest.corpora.pieces import RowUnits, Search, Task
from sparse_ingest.corpora.sources import ChooseColumns, Record, Source
from sparse_ingest.corpora.splits import BATCH_ROWS, SavedDataset, Split, sizes_of
from sparse_ingest.corpora.stored import BYTE_ORDER_MARK, FoundFile, file_changed, is_packed, suffix_of
from sparse_ingest.corpora.text_formats import JsonArray, JsonLines, Quoting
from sparse_ingest.errors import CorpusError, UsageError, listed, needs_extra
from sparse_ingest.storage.hub_session import guard_hub, hub_address
from sparse_ingest.storage.places import place_of
from sparse_ingest.storage.waiting import call_with_timeout

_ROW_BITS = 40  # of an offset; the higher bits are the data file
_HEAD_BYTES = 1 << 16
# Settings of a dataset that our readers support.
_HEEDED = ("name", "version", "data_dir", "data_files", "description", "features", "sep", "delimiter")
_DATA = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow")
_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "state.json")
OpenFile = Callable[..., Source]  # source_of in files.py, which imports this module
_COMMIT = re.compile(r"@([0-9a-f]{40})(?:/|$)")


class DataFile(NamedTuple):
    """A data file of a split; `name` is within the dataset, a `size` of 0 is unknown."""

    path: str
    name: str
    size: int


def hub_source(
    spec: str, choose: ChooseColumns, open_file: OpenFile, quoting: Quoting | None, notes: list[str]
) -> Source:
    """Return the split of a dataset as a source; `quoting` is for csv and tsv.

    A message about files of a folder that the library does not read is added to `notes`.

    Raises:
        CorpusError: the dataset, config or split does not exist, or cannot be reached.
        UsageError: `quoting` is given for another format.
    """
    named = parse(spec)
    with needs_extra("encode", f'The corpus "{spec}"'):
        import datasets
    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        if named.local and _is_saved(Path(named.path)):
            _refuse_quoting(quoting, named, "arrow")
            return _saved(named, choose)
        if named.local:
            return _streamed(named, choose, open_file, quoting, notes)
        guard_hub()
        place = f"the hub {hub_address()}, for the dataset {named.path}"
        return call_with_timeout(lambda: _streamed(named, choose, open_file, quoting, notes), place)
    finally:
        if bars:
            datasets.enable_progress_bars()


class StreamedDataset(Split):
    """One split, read from its data files. An offset is a data file and a row in it.

    `stream` returns the IterableDataset of the library; `files` are in its order; `format` is None if it reads them.
    """

    def __init__(
        self,
        named: Named,
        stream: Callable[[], Any],
        choose: ChooseColumns,
        open_file: OpenFile,
        *,
        files: list[DataFile],
        format: str | None,
        commit: str | None,
        quoting: Quoting | None,
    ) -> None:
        super().__init__(named, choose, {file.name: file.size for file in files}, commit)
        self._new_stream, self._open_file, self._files, self._format = stream, open_file, files, format
        self.quoting = quoting
        self._sources: dict[int, Source | None] = {}  # of the files that were opened; None: the library reads it
        self._first: tuple[int, Sequence[str]] | None = None  # the first table that was read, and its columns

    @cached_property
    def _stream(self) -> Any:
        return self._new_stream()

    @property
    def _count_of_files(self) -> int:
        if self._format is None or any(_is_for_library(file.path, self._format) for file in self._files):
            return int(self._stream.num_shards)  # files in an archive are several
        return len(self._files)

    def passed(self, offset: int) -> int | None:
        """Return the bytes before a row as if rows had equal sizes, or before its file if its rows are not known."""
        file, row = divmod(offset, 1 << _ROW_BITS)
        sizes = [each.size for each in self._files]
        if self.bytes is None or file >= len(sizes):
            return self.bytes
        source = self._sources.get(file) if self._format == "parquet" else None
        return sum(sizes[:file]) + ((source.passed(row) or 0) if source else 0)

    def merged(self) -> list[str]:
        """Return a message for each file whose quotes may have merged rows that were read."""
        return [message for _, source in sorted(self._sources.items()) if source for message in source.merged()]

    def records(self, offset: int, line: int) -> Iterator[Record]:
        """Yield every row from `offset` on, which is row `line` of the split."""
        reached = [line]
        start, skip = divmod(offset, 1 << _ROW_BITS)
        with reading_rows(self.label, reached):
            for file in range(start, self._count_of_files):
                if file not in self._sources:
                    self._sources[file] = self._source(file)
                source = self._sources[file]
                name = self._file_name(file) if self._format in ("jsonl", "csv", "tsv") else ""
                if source is not None and self._format == "parquet":
                    records = source.records(skip, skip + 1)
                else:
                    records = islice(source.records(0, 1) if source else self._of_library(file), skip, None)
                for following, record in enumerate(records, (file << _ROW_BITS | skip) + 1):
                    reached[0] += 1
                    number = reached[0]
                    yield Record(record.columns, record.reason, number - 1, following, number, record.plain, name)
                skip = 0
        self._refuse_changed()

    def pieces(self, search: Search) -> Iterator[Task]:
        """Yield a task for each data file, which counts its rows."""
        return (partial(self._count, file, search) for file in range(self._count_of_files))

    def _count(self, file: int, search: Search) -> RowUnits:
        with reading_rows(self.label, [1]):
            source = self._sources[file] = self._source(file)
            pieces = [task() for task in source.pieces(search)] if source else [None]
            groups = pieces[0] if self._format == "parquet" else None
            if not isinstance(groups, RowUnits):
                rows = [piece.rows for piece in pieces if piece]
                if len(rows) < len(pieces):
                    rows = [self._counted(source.records(0, 1) if source else self._of_library(file), search)]
                groups = RowUnits((sum(rows),))
        self._refuse_changed()
        return replace(groups, first=file << _ROW_BITS, following=(file + 1) << _ROW_BITS)

    def _counted(self, records: Iterator[Record], search: Search) -> int:
        rows = 0
        for _ in islice(records, search.limit):
            rows += 1
            search.check_stopped()
        return rows

    def _refuse_changed(self) -> None:
        if self._commit is None and (sizes := sizes_of(self._named.path, list(self._sizes))) != self._sizes:
            name = next(name for name, size in sizes.items() if size != self._sizes[name])
            how = f"it had {self._sizes[name]} bytes at first and has {sizes[name]} now"
            raise file_changed(f"{self.label} ({name})", how)

    def _file_name(self, file: int) -> str:
        return self._files[file].name if file < len(self._files) and len(self._files) > 1 else ""

    def _source(self, file: int) -> Source | None:
        """Return a data file as a source, or None if the library must read it."""
        if self._format is None or file >= len(self._files):
            return None
        path, name, _ = self._files[file]
        if _is_for_library(path, self._format):
            return None
        stored, label = FoundFile.found(place_of(path)), f"{self.label} ({name})"
        if self._format == "jsonl" and (begin := _begin_of_json(stored, label)) != "{":
            return JsonArray(stored, label) if begin == "[" else None
        choose = partial(self._choose_in, file)
        return self._open_file(stored, choose, label=label, format=self._format, quoting=self.quoting)

    def _of_library(self, file: int) -> Iterator[Record]:
        name = self._file_name(file)
        label = f"{self.label} ({name})" if name else self.label
        tables = iter(self._stream.shard(self._stream.num_shards, file).iter(BATCH_ROWS))
        following = partial(next, tables, None)
        while (table := following() if self._named.local else call_with_timeout(following, label)) is not None:
            names = chosen_columns(table.schema, partial(self._choose_in, file), label)
            yield from records_of(rows_of(table.to_batches(), names), [1], 0)

    def _choose_in(self, file: int, columns: Sequence[str]) -> Mapping[str, str]:
        """Return the columns of a table to read. Raise `BadRow`, which names an earlier table that has them."""
        try:
            chosen = self._choose(columns)
        except BadRow as bad:
            if self._first is None or self._first[0] >= file:
                raise
            other, there = self._first
            advice = "name files, or a config of the dataset, that have the same columns"
            raise BadRow(f"{bad}. In {self._file_name(other)} {columns_text(dict.fromkeys(there))}: {advice}") from bad
        if self._first is None or file < self._first[0]:  # files may be counted at the same time
            self._first = file, list(columns)
        return chosen


def _is_for_library(path: str, format: str) -> bool:
    """Return whether only the library can read a file: in an archive, or compressed Parquet or Arrow."""
    indexed = format in ("parquet", "arrow")
    return "::" in path or path.lower().endswith(ARCHIVE_SUFFIXES) or (indexed and is_packed(path))


def _begin_of_json(file: FoundFile, label: str) -> str:
    """Return `{` for JSON lines, `[` for an array of objects, or "" if only the library can read it."""
    with JsonLines(file, label).opened([1]) as opened:
        head = opened.content.read(_HEAD_BYTES).removeprefix(BYTE_ORDER_MARK).lstrip()
    if head.startswith(b"["):
        return "[" if head[1:].lstrip().startswith(b"{") else ""
    line, end, _ = head.partition(b"\n")
    if not end or suffix_of(file.name) != ".json":
        return "{"
    try:
        return "{" if json_object(line) else ""
    except BadRow:  # one object over many lines
        return ""


# Finding a split


def _streamed(
    named: Named, choose: ChooseColumns, open_file: OpenFile, quoting: Quoting | None, notes: list[str]
) -> Source:
    with finding(named):
        builder = _builder(named)
        commit = found[1] if (found := _COMMIT.search(str(builder.base_path or ""))) else None
        if commit is None and not named.local:
            raise ConnectionError("the hub does not answer, and a cached dataset cannot be streamed")
        kind, format = _format_of(builder.config)
        # Streams import torch.
        splits = map(str, builder.config.data_files) if format else builder.as_streaming_dataset()
        split = _one_of("split", named.split, list(splits), named)
        named = named._replace(split=split, config=builder.config.name)
        _refuse_quoting(quoting, named, kind)
        files = _data_files(named, builder, split)
        if named.local and (missed := _missed(named, builder)):
            notes.append(
                f"Skipped in {named.label}: {listed(missed, 3)}. The datasets library does not read them as part of "
                "it. To read them, name the files without hf:."
            )
        stream = partial(_stream_of, builder, split, kind, quoting)
        return StreamedDataset(
            named, stream, choose, open_file, files=files, format=format, commit=commit, quoting=quoting
        )


def _format_of(config: Any) -> tuple[str, str | None]:
    """Return the kind of a dataset, and the format of its files for our readers.

    The format is None for other kinds, and for settings that only the library supports, such as an encoding.
    """
    kind = type(config).__module__.rpartition(".")[2]
    format = {"csv": "csv", "json": "jsonl", "parquet": "parquet", "arrow": "arrow"}.get(kind)
    names = [entry.name for entry in fields(config) if entry.name not in _HEEDED] if format else []
    default = type(config)() if format else None
    if any(getattr(config, name) != getattr(default, name) for name in names):
        return kind, None
    return kind, {",": "csv", "\t": "tsv"}.get(config.sep) if kind == "csv" else format


def _refuse_quoting(quoting: Quoting | None, named: Named, kind: str) -> None:
    if quoting is not None and kind != "csv":
        raise UsageError(f"--quoting {quoting} is for csv and tsv; {named.label} is {kind}. Omit --quoting.")


def _stream_of(builder: Any, split: str, kind: str, quoting: Quoting | None) -> Any:
    """Return the library's stream of a split."""
    if kind == "parquet":  # the default is a complete row group
        builder.config.batch_size = builder.config.batch_size or BATCH_ROWS
    streams = builder.as_streaming_dataset()
    if kind == "csv":
        streams = _of_strings(builder, streams[split], quoting)
    return streams[split].with_format("arrow")


def _of_strings(builder: Any, stream: Any, quoting: Quoting | None) -> Any:
    """Return the csv streams of a dataset with all values as strings, without numbers and nulls."""
    import datasets

    config = builder.config
    config.keep_default_na = config.na_filter = False
    if quoting == "none":
        config.quoting = csv.QUOTE_NONE
    first = next(iter(stream.with_format("arrow").iter(1)), None)
    if first is not None:
        config.features = datasets.Features(dict.fromkeys(first.column_names, datasets.Value("string")))
        builder.info.features = config.features
    return builder.as_streaming_dataset()


def _builder(named: Named) -> Any:
    import datasets

    at: dict[str, Any] = {} if named.local else {"revision": named.revision}
    try:
        return datasets.load_dataset_builder(named.path, named.config, **at)
    except ValueError as error:
        # Only the message shows that the config is wrong.
        if "onfig" not in str(error):
            raise
        _one_of("config", named.config, datasets.get_dataset_config_names(named.path, **at), named)
        raise


def _data_files(named: Named, builder: Any, split: str) -> list[DataFile]:
    """Return the data files of a split."""
    import fsspec

    found = []
    for file in map(str, builder.config.data_files[split]):
        if named.local:
            name, outer = os.path.relpath(file, named.path), file.rpartition("::")[2]  # an archive
            if "://" in outer or os.path.relpath(outer, named.path).startswith(os.pardir):
                raise CorpusError(
                    f"The folder {named.path!r} names a data file outside of it, {outer!r}. Copy it into the folder."
                )
            size = sizes_of(named.path, [name])[name]
        else:
            filesystem, path = fsspec.url_to_fs(file)
            # hf://datasets/OWNER/NAME@COMMIT/...
            name, size = file.partition("@")[2].partition("/")[2], int(filesystem.info(path).get("size") or 0)
        found.append(DataFile(file, name, size))
    return found


def _missed(named: Named, builder: Any) -> list[str]:
    """Return the data files of a folder that the library skips: it infers one format. None if its README names them."""
    readme = Path(named.path) / "README.md"
    if builder.config.name != "default" or (readme.exists() and b"data_files" in readme.read_bytes()):
        return []
    read = {os.path.relpath(str(file), named.path) for files in builder.config.data_files.values() for file in files}
    missed = []
    for folder, inner, names in os.walk(named.path):
        inner[:] = [name for name in inner if name[0] not in "._"]
        data = (name for name in names if suffix_of(name) in _DATA and name[0] not in "._")
        missed += [os.path.relpath(Path(folder) / name, named.path) for name in data if name not in _DESCRIPTIONS]
    return sorted(set(missed) - read)


def _saved(named: Named, choose: ChooseColumns) -> Source:
    import datasets

    with finding(named):
        found = datasets.load_from_disk(named.path)
        if named.config and named.split:
            raise CorpusError(f"{named.label}: a dataset saved to disk has no configs. Name only its split.")
        splits = found if isinstance(found, datasets.DatasetDict) else {str(found.split or ""): found}
        split = _one_of("split", named.split or named.config, list(splits), named)
        return SavedDataset(named._replace(config=None, split=split or None), splits[split], choose)


def _is_saved(folder: Path) -> bool:
    one = (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    return one or (folder / "dataset_dict.json").is_file()


def _one_of(what: str, asked: str | None, there: list[str], named: Named) -> str:
    """Return the requested name, or the only one. Raise `CorpusError`, which lists them."""
    if asked in there:
        return asked
    if asked is None and len(there) == 1:
        return there[0]
    known = ", ".join(there) or "none"
    found = f'no {what} "{asked}"' if asked else f"{len(there)} {what}s, and none was named"
    raise CorpusError(f"The dataset {named.name} has {found}; available {what}s: {known}. Name one, as in {FORM}.")
