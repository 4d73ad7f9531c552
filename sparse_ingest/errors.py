"""The exceptions of sparse-ingest, each with the exit code of the command: 1, 2 for usage errors, 130 when interrupted.

A message has three parts: what was found, what was expected and what to do next. The command line prints it as one
line. Exit code 3 (finished, but documents were refused or skipped) is a result, not an exception.
"""

from __future__ import annotations

import copyreg
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, without its full stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


class SparseIngestError(Exception):
    """Base class for errors shown to users."""

    exit_code = 1

    def __reduce__(self) -> tuple[object, ...]:
        """Return the parts for pickle: subclasses have other arguments than the message."""
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]


class UsageError(SparseIngestError):
    """Wrong arguments that click does not detect."""

    exit_code = 2


class PipelineError(UsageError):
    """The pipeline file is wrong."""


class CorpusError(SparseIngestError):
    """A corpus file or a document in it cannot be read."""


class CheckpointError(SparseIngestError):
    """A model folder is missing, incomplete or of an unknown family."""


class RunError(SparseIngestError):
    """A run folder is missing, belongs to another identity, is unfinished or damaged."""


class ClusterError(SparseIngestError):
    """The cluster cannot be reached, refuses a request, or has an index that does not match."""


class DocumentNotFoundError(RunError, ClusterError):
    """A run or an index has no document with this id."""


class StorageError(SparseIngestError):
    """A store or web server with a run or a corpus fails, refuses a request, or does not support it."""


class LocalServerError(SparseIngestError):
    """The local OpenSearch cannot be downloaded, started or stopped."""


class MissingExtraError(SparseIngestError):
    """An optional part of sparse-ingest is not installed."""

    def __init__(self, extra: str, purpose: str) -> None:
        install = f'pip install "sparse-ingest[{extra}]", or ".[{extra}]" in a clone'
        super().__init__(f'{purpose} needs the extra "{extra}": {install}')


def counted(count: int, what: str, plural: str = "") -> str:
    """Return a number and its unit, such as `1 shard` or `2 shards`, for a message."""
    return f"{count:,} {what if count == 1 else plural or f'{what}s'}"


def listed(names: Sequence[str], most: int) -> str:
    """Return the first names of a list and the number of further ones, for a message."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def short_repr(value: object) -> str:
    """Return a value for a message, in one line and truncated to 100 characters."""
    try:
        text = repr(value)
    except ValueError:  # an int of more than 4,300 digits
        return f"a huge {type(value).__name__}"
    return text if len(text) <= 100 else f"{text[:100]}…"


def shown(value: object) -> str:
    """Return a value for a message, as JSON of at most 60 characters that can be encoded as UTF-8."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except RecursionError:
        return "a deeply nested value"
    return printable(text if len(text) <= 60 else text[:60] + "…")


def printable(text: str) -> str:
    r"""Return the text with lone surrogates written as `\udXXX`, so that it can be encoded as UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()


@contextmanager
def needs_extra(extra: str, purpose: str) -> Iterator[None]:
    """Raise `MissingExtraError` if an import in the block fails."""
    try:
        yield
    except ImportError as error:
        raise MissingExtraError(extra, purpose) from error


class Interrupted(SparseIngestError):
    """Stopped on request; finished shards and journal lines are kept."""

    exit_code = 130
