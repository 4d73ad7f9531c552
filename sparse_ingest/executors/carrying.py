"""Carry progress, messages and exceptions from a process that works to the one that reports them.

A `Collector` is the reporter of a process that works. What it `take`s is sent, and a `Forwarder` passes it on.
"""

from __future__ import annotations

import logging
import threading
from typing import Any, NamedTuple, NoReturn

from sparse_ingest import errors
from sparse_ingest.errors import SparseIngestError
from sparse_ingest.reporting import Reporter, SilentReporter

_LOGGER = "sparse_ingest"
Message = tuple[Any, ...]  # the name of a call of the reporter, or "log", and its arguments


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


class Counts(NamedTuple):
    """Progress of a process, as the calls of a `Reporter` add it up."""

    units: int = 0
    tokens: int = 0
    planned: int = 0
    planned_tokens: int = 0
    earlier: int = 0


class Collected(NamedTuple):
    """The counts of a process since its start, its last detail, and its messages since the last time."""

    counts: Counts
    detail: str
    messages: list[Message]


class Collector(SilentReporter):
    """Adds up the progress of a process, from any of its threads, and keeps its messages until they are sent."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts, self._detail = Counts(), ""
        self._messages: list[Message] = []
        self.stopping = threading.Event()

    def take(self) -> Collected:
        """Return what to send."""
        with self._lock:
            messages, self._messages = self._messages, []
            return Collected(self._counts, self._detail, messages)

    def advance(self, count: int, *, tokens: int = 0, detail: str = "") -> None:
        """Count units and tokens."""
        self._add(Counts(units=count, tokens=tokens))
        self._detail = detail

    def plan(self, count: int, tokens: int) -> None:
        """Count planned units and tokens."""
        self._add(Counts(planned=count, planned_tokens=tokens))

    def earlier(self, count: int) -> None:
        """Count units that an earlier start finished."""
        self._add(Counts(earlier=count))

    def note(self, message: str) -> None:
        """Keep a note."""
        self.keep("note", message)

    def warn(self, message: str) -> None:
        """Keep a warning."""
        self.keep("warn", message)

    def keep(self, *message: Any) -> None:
        """Keep a call of the reporter, or a log record."""
        with self._lock:
            self._messages.append(message)

    def stop_requested(self) -> bool:
        """Return whether this process was asked to stop."""
        return self.stopping.is_set()

    def collect_log(self, level: int) -> None:
        """Keep log records of this package from a level on."""
        logger = logging.getLogger(_LOGGER)
        logger.setLevel(level)
        if not any(isinstance(one, _RecordHandler) for one in logger.handlers):
            logger.addHandler(_RecordHandler(self))

    def _add(self, more: Counts) -> None:
        with self._lock:
            self._counts = Counts(*map(sum, zip(self._counts, more, strict=True)))


class _RecordHandler(logging.Handler):
    """Keeps log records as the message `log` with the arguments of `Logger.log`."""

    def __init__(self, collector: Collector) -> None:
        super().__init__()
        self._collector = collector

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record."""
        self._collector.keep("log", record.levelno, "%s", record.getMessage())


class Forwarder:
    """Passes what processes have collected to a reporter. A message that all of them send is shown once."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._shown: set[Message] = set()

    def show(self, before: Counts, collected: Collected) -> Counts:
        """Show what is new since `before`, and return the counts so far. Lower counts are those of a repetition."""
        counts = Counts(*map(max, zip(before, collected.counts, strict=True)))
        units, tokens, planned, planned_tokens, earlier = (now - then for now, then in zip(counts, before, strict=True))
        if planned:
            self._reporter.plan(planned, planned_tokens)
        if earlier:
            self._reporter.earlier(earlier)
        if units or tokens:
            self._reporter.advance(units, tokens=tokens, detail=collected.detail)
        for message in collected.messages:
            if message not in self._shown:
                self._shown.add(message)
                name, *given = message
                getattr(self._reporter if name != "log" else logging.getLogger(_LOGGER), name)(*given)
        return counts


def log_level() -> int:
    """Return the level of the log records that this process reports."""
    return logging.getLogger(_LOGGER).getEffectiveLevel()
