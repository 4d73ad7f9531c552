"""Progress on standard error: a tqdm bar on a terminal, otherwise one line every 10 s. Stops on SIGTERM."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from typing import Any, Self

import click
from tqdm import tqdm

from sparse_ingest.reporting import NOTE, TqdmReporter
from sparse_ingest.storage.waiting import handling_signals, stopping

LINE_EVERY_S = 10.0
logger = logging.getLogger(__name__)


class TerminalReporter(TqdmReporter):
    """Progress of a stage, and its notes and warnings as log records (verbosity.py). Use it in a `with` block.

    With `stops_after`, such as "shard", SIGTERM and SIGHUP set `stop_requested` in the block instead of ending the
    process.
    """

    def __init__(self, *, stops_after: str | None = None) -> None:
        super().__init__()
        self._handling = handling_signals(self._stop) if stops_after else contextlib.nullcontext()
        self._stops_after = stops_after
        self._stopping = False
        self._last_line = time.monotonic()

    def __enter__(self) -> Self:
        self._handling.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self._stopping:
            stopping.clear()
        self._handling.__exit__(None, None, None)
        self.close()

    def _stop(self, *signal_and_frame: object) -> None:
        self._stopping = True
        stopping.set()
        with contextlib.suppress(RuntimeError):  # a line was being written
            click.echo(f"Stopping after the current {self._stops_after}.", err=True)

    def stop_requested(self) -> bool:
        """Return whether SIGTERM or SIGHUP was received."""
        return self._stopping

    def note(self, message: str) -> None:
        """Log a note."""
        logger.log(NOTE, "%s", message)

    def warn(self, message: str) -> None:
        """Log a warning."""
        logger.warning("%s", message)

    def _new_bar(self, **settings: Any) -> tqdm[Any] | None:
        self._last_line = time.monotonic()
        if not (sys.stderr.isatty() and logger.isEnabledFor(NOTE)):
            return None
        return tqdm(**settings, file=sys.stderr, mininterval=0.2)

    def _show(self, count: int, detail: str = "") -> None:
        super()._show(count, detail)
        now = time.monotonic()
        if self._bar is None and now - self._last_line >= LINE_EVERY_S:
            self._last_line = now
            self.note(self._progress.line(detail))
