"""Hugging Face datasets as a source: of the hub, of a folder laid out like one, or saved by `save_to_disk`.

In: `hf:NAME[@REVISION][:CONFIG[:SPLIT]]`, where NAME is a hub id or a folder. Out: one split, streamed by the
`datasets` library in its own order, without a download first. Configs and splits are looked up when the source is
created, and the revision is resolved to a commit, so that a run that is resumed next month reads the same rows.

An offset is a data file and a row in it. Reading goes on at that file, in Parquet at the row group that has the row.
The line of a row is its number within the split, from 1.

The library honors HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE; messages never contain a token. It runs no code of a
dataset. It imports torch if that is installed, which takes 600 MB of memory. Not covered: slices of splits
(`train[:10%]`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from sparse_ingest.corpora.columns import chosen_columns, records_of, rows_of
from sparse_ingest.corpora.documents import printable
from sparse_ingest.corpora.sources import ChooseColumns, Record, Source
from sparse_ingest.corpora.stored import changed
from sparse_ingest.errors import CorpusError, UsageError, first_line, needs_extra
from sparse_ingest.storage.places import without_secrets

PREFIX = "hf:"
FORM = "hf:NAME[@REVISION][:CONFIG[:SPLIT]]"

_BATCH_ROWS = 512  # that are Python objects at one time
_ROW_BITS = 40  # of an offset; the higher bits are the data file
_COMMIT = re.compile(r"@([0-9a-f]{40})(?:/|$)")


class Named(NamedTuple):
    """A dataset as `--corpus` names it."""

    path: str
    revision: str | None
    config: str | None
    split: str | None

    @property
    def local(self) -> bool:
        """Whether it is a folder of this machine, not a repository of the hub."""
        return Path(self.path).is_dir()

    @property
    def name(self) -> str:
        """Its name in the identity: of a folder the last part of the path."""
        return printable(Path(self.path).resolve().name if self.local else self.path)

    @property
    def label(self) -> str:
        """Its name in the places of its rows."""
        return PREFIX + ":".join(part for part in (self.name, self.config, self.split) if part)


def hub_source(spec: str, choose: ChooseColumns) -> Source:
    """Return the split that `spec` names.

    Raises:
        CorpusError: the dataset, config or split does not exist, or cannot be reached.
    """
    named = parse(spec)
    with needs_extra("encode", f'The corpus "{spec}"'):
        import datasets
    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        if named.local and _is_saved(Path(named.path)):
            return _saved(named, choose)
        return _streamed(named, choose)
    finally:
        if bars:
            datasets.enable_progress_bars()


class _Split:
    """What the two kinds of splits have in common; the sizes of their files are 0 where they are unknown."""

    rereadable = True
    unit = "row"

    def __init__(self, named: Named, choose: ChooseColumns, sizes: dict[str, int], commit: str | None = None) -> None:
        self.name, self.label = named.name, named.label
        self.bytes = sum(sizes.values()) if all(sizes.values()) else None
        self._named, self._choose, self._sizes, self._commit = named, choose, sizes, commit

    def identity(self) -> dict[str, object]:
        """Return config, split and commit; of a folder the names and sizes of the data files."""
        content: dict[str, object] = {"revision": self._commit} if self._commit else {"files": dict(self._sizes)}
        return {"name": self.name, "config": self._named.config, "split": self._named.split, **content}


class StreamedDataset(_Split):
    """One split of a dataset that the library reads from its data files.

    `stream` is its IterableDataset, `commit` the revision on the hub, `files` the data files in the order of the
    stream, as paths or addresses, with names and sizes (0: unknown).
    """

    def __init__(
        self, named: Named, stream: Any, choose: ChooseColumns, *, commit: str | None, files: dict[str, tuple[str, int]]
    ) -> None:
        super().__init__(named, choose, dict(files.values()), commit)
        self._stream, self._paths = stream, list(files)
        self._rows: dict[int, int] = {}  # of the files where they are known

    def passed(self, offset: int) -> int | None:
        """Return the bytes before a row, as if rows were equally long. A file of unknown rows counts at its end."""
        file, row = divmod(offset, 1 << _ROW_BITS)
        sizes = list(self._sizes.values())
        if self.bytes is None or file >= len(sizes):
            return self.bytes
        within = sizes[file] * row // max(1, self._rows[file]) if file in self._rows else 0
        return sum(sizes[:file]) + within

    def records(self, offset: int, line: int) -> Iterator[Record]:
        """Yield every row from `offset` on, which is row `line` of the split."""
        reached = [line]
        start, skip = divmod(offset, 1 << _ROW_BITS)
        with reading(self.label, reached):
            names = self._names()
            for file in range(start, self._stream.num_shards):
                batches, inside = self._batches(file, skip)
                yield from records_of(rows_of(batches, names, inside), reached, file << _ROW_BITS | skip)
                skip = 0
        if self._commit is None and (sizes := _sizes(self._named.path, list(self._sizes))) != self._sizes:
            name = next(name for name, size in sizes.items() if size != self._sizes[name])
            how = f"it had {self._sizes[name]} bytes at first and has {sizes[name]} now"
            raise changed(f"{self.label} ({name})", how)

    def _batches(self, file: int, skip: int) -> tuple[Iterator[pa.RecordBatch], int]:
        """Return the rows of a data file from its first row or a later one, and how many are before row `skip`."""
        stream = self._stream.shard(self._stream.num_shards, file)
        streams = [stream]
        path = self._paths[file] if file < len(self._paths) else ""
        if path.endswith(".parquet") and (skip or self._commit is None):
            import fsspec

            with fsspec.open(path) as opened:
                metadata = pq.read_metadata(opened)
            self._rows[file] = metadata.num_rows
            # Each row group opens the file anew: too slow for more than the file where a run goes on. Earlier releases
            # of the library do not cut files at their row groups; there the file is read from its start.
            groups = stream.reshard() if skip and hasattr(stream, "reshard") else stream
            if skip and groups.num_shards == metadata.num_row_groups:
                place = 0
                while place < metadata.num_row_groups and skip >= metadata.row_group(place).num_rows:
                    skip -= metadata.row_group(place).num_rows
                    place += 1
                streams = [groups.shard(groups.num_shards, each) for each in range(place, groups.num_shards)]
        tables = (table for one in streams for table in one.iter(_BATCH_ROWS))
        return (batch for table in tables for batch in table.to_batches()), skip

    def _names(self) -> list[str]:
        """Return the columns to read. Raises `CorpusError`."""
        if features := self._stream.features:
            schema = features.arrow_schema
        else:  # only known from the first rows
            first = next(iter(self._stream.iter(1)), None)
            if first is None:
                return []
            schema = first.schema
        return chosen_columns(schema, self._choose, self.label)


class SavedDataset(_Split):
    """One split that `save_to_disk` wrote. An offset is a row."""

    def __init__(self, named: Named, dataset: Any, choose: ChooseColumns) -> None:
        files = [os.path.relpath(file["filename"], named.path) for file in dataset.cache_files]
        super().__init__(named, choose, _sizes(named.path, files))
        self._table = dataset.with_format("arrow")

    def passed(self, offset: int) -> int | None:
        """Return the bytes before a row, as if rows were equally long."""
        return sum(self._sizes.values()) * offset // max(1, len(self._table))

    def records(self, offset: int, line: int) -> Iterator[Record]:
        """Yield every row from `offset` on."""
        reached = [line]
        with reading(self.label, reached):
            schema = self._table.features.arrow_schema
            names = chosen_columns(schema, self._choose, self.label)
            starts = range(offset, len(self._table), _BATCH_ROWS)
            batches = (batch for start in starts for batch in self._table[start : start + _BATCH_ROWS].to_batches())
            yield from records_of(rows_of(batches, names), reached, offset)


# Finding a split


def parse(spec: str) -> Named:
    """Return the parts of a spec. A folder's name may contain `:` and `@`: the longest that exists is used."""
    rest = spec.removeprefix(PREFIX)
    parts = rest.split(":")
    for end in range(len(parts), max(0, len(parts) - 3), -1):
        if rest and (folder := Path(":".join(parts[:end]))).is_dir():
            # The library refuses . and .. as names.
            path = str(folder.resolve()) if folder.name in ("", "..") else str(folder)
            return Named(path, None, *_two(parts[end:]))
    name, _, revision = parts[0].partition("@")
    if not name or len(parts) > 3 or (not revision and "@" in parts[0]) or name.startswith(("/", ".", "~")):
        found = f'there is no folder "{parts[0]}"' if name.startswith(("/", ".", "~")) else "the form is not known"
        raise UsageError(f'"{spec}" names no dataset: {found}; expected {FORM}, with a hub id or a folder as NAME.')
    return Named(name, revision or None, *_two(parts[1:]))


def _two(parts: list[str]) -> tuple[str | None, str | None]:
    config, split = [*(part or None for part in parts), None, None][:2]
    return config, split


def _streamed(named: Named, choose: ChooseColumns) -> Source:
    from datasets.packaged_modules.parquet.parquet import ParquetConfig

    with finding(named):
        builder = _builder(named)
        commit = found[1] if (found := _COMMIT.search(str(builder.base_path or ""))) else None
        if commit is None and not named.local:
            raise ConnectionError("the hub does not answer, and what its cache holds cannot be streamed")
        streams = builder.as_streaming_dataset()
        split = _one_of("split", named.split, list(streams), named)
        named = named._replace(split=split, config=builder.config.name)
        if isinstance(builder.config, ParquetConfig):  # only the columns that are used, and never a complete row group
            if (features := streams[split].features) and builder.config.columns is None:
                builder.config.columns = chosen_columns(features.arrow_schema, choose, named.label)
            builder.config.batch_size = builder.config.batch_size or _BATCH_ROWS
            streams = builder.as_streaming_dataset()
        files = _data_files(named, builder, split)
        return StreamedDataset(named, streams[split].with_format("arrow"), choose, commit=commit, files=files)


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


def _data_files(named: Named, builder: Any, split: str) -> dict[str, tuple[str, int]]:
    """Return the data files of a split with their names within the dataset and sizes; 0 if the hub gives none."""
    import fsspec

    found = {}
    for file in map(str, builder.config.data_files[split]):
        if named.local:
            name = os.path.relpath(file, named.path)
            size = _sizes(named.path, [name])[name]
        else:
            filesystem, path = fsspec.url_to_fs(file)
            # hf://datasets/OWNER/NAME@COMMIT/...
            name, size = file.partition("@")[2].partition("/")[2], int(filesystem.info(path).get("size") or 0)
        found[file] = (name, size)
    return found


def _saved(named: Named, choose: ChooseColumns) -> Source:
    import datasets

    with finding(named):
        found = datasets.load_from_disk(named.path)
        if named.config and named.split:
            raise CorpusError(f"{named.label}: a dataset saved to disk has no configs. Name its split alone.")
        splits = found if isinstance(found, datasets.DatasetDict) else {str(found.split or ""): found}
        split = _one_of("split", named.split or named.config, list(splits), named)
        return SavedDataset(named._replace(config=None, split=split or None), splits[split], choose)


def _is_saved(folder: Path) -> bool:
    one = (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    return one or (folder / "dataset_dict.json").is_file()


def _one_of(what: str, asked: str | None, there: list[str], named: Named) -> str:
    """Return the requested name, or the only one. Raises `CorpusError`, which lists them."""
    if asked in there:
        return asked
    if asked is None and len(there) == 1:
        return there[0]
    listed = ", ".join(there) or "none"
    found = f'no {what} "{asked}"' if asked else f"{len(there)} {what}s, and none was named"
    raise CorpusError(f"The dataset {named.name} has {found}; the {what}s there are: {listed}. Name one, as in {FORM}.")


def _sizes(folder: str, files: list[str]) -> dict[str, int]:
    """Return the sizes of files in a folder; 0 for a missing one."""
    return {file: path.stat().st_size if (path := Path(folder, file)).is_file() else 0 for file in files}


# Messages


def reading(label: str, reached: list[int]) -> AbstractContextManager[None]:
    """Raise what the library raises while rows are read as a `CorpusError` that names the row before `reached[0]`."""
    advice = "Mend the file, or try again if the hub could not be reached."
    return _explained(lambda error: f"{label} cannot be read after row {reached[0] - 1}: {_cause(error)}. {advice}")


def finding(named: Named) -> AbstractContextManager[None]:
    """Raise what the library raises while a dataset is looked for as a `CorpusError`."""
    return _explained(lambda error: _sentence(named, error))


@contextmanager
def _explained(explain: Callable[[Exception], str]) -> Iterator[None]:
    try:
        yield
    except (CorpusError, UsageError):
        raise
    except Exception as error:  # of any library that reads one of its formats; each layer has exceptions of its own
        # An address in it may have secrets, and so may a library's message.
        token, message = _token(), explain(error)
        raise CorpusError(without_secrets(message.replace(token, "(token)") if token else message)) from error


def _sentence(named: Named, error: Exception) -> str:
    from datasets import config, exceptions
    from datasets.data_files import EmptyDatasetError

    said = str(error)
    at = f" at revision {named.revision!r}" if named.revision else ""
    what = f"The folder {named.path!r}" if named.local else f"The dataset {named.path!r}{at}"
    token = "the token that was sent does not open it" if _token() else "no token was sent"
    if "scripts are no longer supported" in said:
        return (
            f"{what} is made by a Python script, which is never run. Name a revision or another dataset that holds "
            "its rows as Parquet, such as @refs/convert/parquet."
        )
    if isinstance(error, exceptions.DataFilesNotFoundError | EmptyDatasetError):
        return f"{what} holds no data files that can be read ({first_line(error)}). Name another."
    if isinstance(error, exceptions.DatasetNotFoundError) and "gated" in said:
        return f"{what} is gated, and {token}: accept its conditions on its page on the hub, and set HF_TOKEN."
    if isinstance(error, exceptions.DatasetNotFoundError) and "Revision" in said:
        return f"The dataset {named.path!r} has no revision {named.revision!r} on the hub. Mend it, or leave it out."
    if isinstance(error, exceptions.DatasetNotFoundError):
        return (
            f"No dataset {named.path!r}: looked for a folder of that name here, and for a dataset of that name on the "
            f"hub {config.HF_ENDPOINT}, where {token}. Mend the name; for a private one set HF_TOKEN."
        )
    if getattr(getattr(error, "response", None), "status_code", None) == 401:
        return f"The hub {config.HF_ENDPOINT} refuses the token that was sent. Set HF_TOKEN to a valid one, or to none."
    if config.HF_HUB_OFFLINE and not named.local:
        return f"No folder {named.path!r} here, and the hub is not asked (HF_HUB_OFFLINE is set). Name a folder."
    if not named.local and (isinstance(error, ConnectionError) or "reach" in said):
        return (
            f"No folder {named.path!r} here, and the hub {config.HF_ENDPOINT} cannot be reached ({_cause(error)}). "
            "Try again with the hub in reach, or name a folder."
        )
    return f"{what} cannot be opened ({_cause(error)}). Check its files and its README, or try again."


def _cause(error: Exception) -> str:
    """Return the type and first line of the cause of an error, or of the error if it has none."""
    return f"{type(error.__cause__ or error).__name__}: {first_line(error.__cause__ or error)}"


def _token() -> str | None:
    """Return the token that the library sends: that of HF_TOKEN, or of an earlier login."""
    from huggingface_hub import get_token

    with suppress(Exception):  # a failed exchange of tokens; the request for the dataset failed before
        return get_token()
    return None
