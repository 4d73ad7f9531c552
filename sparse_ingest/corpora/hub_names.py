"""The names of Hugging Face datasets, and the messages if one cannot be found or read."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import NamedTuple

from sparse_ingest.errors import CorpusError, SparseIngestError, UsageError, first_line, printable
from sparse_ingest.storage.hub_session import refused_token, token_state, without_token

PREFIX = "hf:"
FORM = "hf:NAME[@REVISION][:CONFIG[:SPLIT]]"


class Named(NamedTuple):
    """The parts of `hf:NAME[@REVISION][:CONFIG[:SPLIT]]`."""

    path: str
    revision: str | None
    config: str | None
    split: str | None

    @property
    def local(self) -> bool:
        """Whether it is a local folder, not a repository of the hub."""
        return Path(self.path).is_dir()

    @property
    def name(self) -> str:
        """Its name in the identity of a source; for a folder, the last part of the path."""
        return printable(Path(self.path).resolve().name if self.local else self.path)

    @property
    def label(self) -> str:
        """Its name in messages."""
        return PREFIX + ":".join(part for part in (self.name, self.config, self.split) if part)


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
        found = f'the folder "{parts[0]}" does not exist' if name.startswith(("/", ".", "~")) else "unknown form"
        raise UsageError(f'"{spec}" is not a dataset: {found}; expected {FORM}, with a hub id or a folder as NAME.')
    return Named(name, revision or None, *_two(parts[1:]))


def _two(parts: list[str]) -> tuple[str | None, str | None]:
    config, split = [*(part or None for part in parts), None, None][:2]
    return config, split


def reading_rows(label: str, reached: list[int]) -> AbstractContextManager[None]:
    """Convert exceptions of the block, which reads row `reached[0]`, to `CorpusError`."""
    advice = "Fix the file, or try again if the hub could not be reached."
    return _explained(lambda error: f"{label} cannot be read after row {reached[0] - 1}: {_cause(error)}. {advice}")


def finding(named: Named) -> AbstractContextManager[None]:
    """Convert exceptions of the block, which looks up a dataset, to `CorpusError`."""
    return _explained(lambda error: _message(named, error))


@contextmanager
def _explained(explain: Callable[[Exception], str]) -> Iterator[None]:
    try:
        yield
    except SparseIngestError:
        raise
    except Exception as error:  # of any library that reads a format
        raise CorpusError(without_token(_unwritten(error) or explain(error))) from error


def _unwritten(error: Exception) -> str | None:
    """Return the message for a cache that cannot be written, otherwise None."""
    if not isinstance(error, OSError) or error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return None
    from datasets import config

    place = error.filename or config.HF_CACHE_HOME
    return f"{place} cannot be written: {error.strerror}. Free space there, or set HF_HOME to another folder."


def _message(named: Named, error: Exception) -> str:
    from datasets import config, exceptions
    from datasets.data_files import EmptyDatasetError

    text = str(error)
    at = f" at revision {named.revision!r}" if named.revision else ""
    what = f"The folder {named.path!r}" if named.local else f"The dataset {named.path!r}{at}"
    if "scripts are no longer supported" in text:
        return (
            f"{what} is built by a Python script, which is never run. Name a revision with Parquet files, such as "
            "@refs/convert/parquet, or another dataset."
        )
    if isinstance(error, exceptions.DataFilesNotFoundError | EmptyDatasetError):
        return f"{what} has no data files that can be read ({first_line(error)}). Name another."
    if isinstance(error, exceptions.DatasetNotFoundError):
        if "gated" in text:
            return f"{what} is gated, and {token_state()}: accept its conditions on the hub, and set HF_TOKEN."
        if "Revision" in text:
            return f"The dataset {named.path!r} has no revision {named.revision!r} on the hub. Correct it, or omit it."
        return (
            f"No dataset {named.path!r}: looked for a folder of that name here, and for a dataset of that name on the "
            f"hub {config.HF_ENDPOINT}, where {token_state()}. Correct the name; for a private dataset set HF_TOKEN."
        )
    if message := refused_token(error):
        return message
    if not named.local and config.HF_HUB_OFFLINE:
        return f"No folder {named.path!r} here, and the hub is not contacted (HF_HUB_OFFLINE is set). Name a folder."
    if not named.local and (isinstance(error, ConnectionError) or "reach" in text):
        what = f"No folder {named.path!r} here, and the hub {config.HF_ENDPOINT} cannot be reached"
        return f"{what} ({_cause(error)}). Try again when the hub can be reached, or name a folder."
    return f"{what} cannot be opened ({_cause(error)}). Check its files and its README, or try again."


def _cause(error: Exception) -> str:
    cause = error.__cause__ or error
    return f"{type(cause).__name__}: {first_line(cause)}"
