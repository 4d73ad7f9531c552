"""Carry exceptions and log records from a process that works to the one that reports them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NoReturn

from sparse_ingest import errors
from sparse_ingest.errors import SparseIngestError


def carried(error: SparseIngestError | OSError) -> tuple[type[Exception], tuple[Any, ...]]:
    """Return the class and the arguments of an exception. Both can be pickled."""
    if isinstance(error, OSError):
        return OSError, (error.errno, error.strerror or str(error), error.filename)
    # The base class in errors.py: the attributes of subclasses are not needed.
    return next(one for one in type(error).__mro__ if one.__module__ == errors.__name__), (str(error),)


def raise_carried(kind: type[Exception], arguments: tuple[Any, ...]) -> NoReturn:
    """Raise the exception that `carried` described."""
    # Without the constructor, which may need other arguments than the message.
    raise kind.__new__(kind, *arguments) if issubclass(kind, SparseIngestError) else kind(*arguments)


class RecordHandler(logging.Handler):
    """Sends log records as the message `log` with the arguments of `Logger.log`."""

    def __init__(self, send: Callable[..., None]) -> None:
        super().__init__()
        self._send = send

    def emit(self, record: logging.LogRecord) -> None:
        """Send a record."""
        self._send("log", record.levelno, "%s", record.getMessage())
