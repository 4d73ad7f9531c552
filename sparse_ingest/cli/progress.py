"""Progress on standard error: a tqdm bar on a terminal, otherwise one line every 30 s. SIGTERM is a stop request."""

from __future__ import annotations

import signal
import sys
import threading
import time
from types import FrameType
from typing import Any, Self

import click
from tqdm import tqdm

from sparse_ingest.reporting import TqdmReporter
from sparse_ingest.storage.waiting import stopping

LINE_EVERY_S = 30.0


class TerminalReporter(TqdmReporter):
    """Counts what a stage does; rates leave out what an earlier start did. Use it in a `with` block.

    With `stoppable`, SIGTERM makes `stop_requested` true inside the block instead of ending the process.
    """

    def __init__(self, *, stoppable: bool = False) -> None:
        super().__init__()
        self._terminal = sys.stderr.isatty()
        self._stoppable = stoppable
        self._stopping = False
        self._before: Any = None
        self._lock = threading.RLock()
        self.begin("")

    def __enter__(self) -> Self:
        if self._stoppable:
            self._before = signal.signal(signal.SIGTERM, self._stop)
        return self

    def __exit__(self, *error: object) -> None:
        if self._stoppable:
            signal.signal(signal.SIGTERM, self._before)
            stopping.clear()
        self.close()

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._stopping = True
        stopping.set()
        click.echo("Stopping after the current shard.", err=True)

    def stop_requested(self) -> bool:
        """Return whether SIGTERM came."""
        return self._stopping

    def begin(self, unit: str, total: int | None = None) -> None:
        """Start a bar; the one before is finished."""
        with self._lock:
            self.close()
            self._unit, self._total = unit, total
            if self._terminal and unit:
                self._bar = tqdm(total=total, unit=f" {unit}", file=sys.stderr, smoothing=0.1, mininterval=0.2)
            self._done = self._earlier = self._tokens = 0
            self._began = self._last_line = time.monotonic()

    def expect(self, total: int) -> None:
        """Correct the number of units that the stage is believed to have."""
        self._total = total
        super().expect(total)

    def earlier(self, count: int) -> None:
        """Count units in the progress and not in the rate."""
        with self._lock:
            self._earlier += count
            self._done += count
            if self._bar is not None:
                self._bar.update(count)

    def advance(self, count: int, *, tokens: int = 0, detail: str = "") -> None:
        """Move the bar, or print a line when the last one is 30 s old."""
        with self._lock:
            self._done += count
            self._tokens += tokens
            now = time.monotonic()
            seconds = max(now - self._began, 1e-9)
            rate = f"{self._tokens / seconds:,.0f} tokens/s" if self._tokens else ""
            beside = ", ".join(part for part in (rate, detail) if part)
            if self._bar is not None:
                self._bar.set_postfix_str(beside, refresh=False)
                self._bar.update(count)
            elif now - self._last_line >= LINE_EVERY_S:
                self._last_line = now
                self.note(self._line(seconds, beside))

    def note(self, message: str) -> None:
        """Print one line without breaking the bar."""
        if self._bar is not None:
            self._bar.clear()
        click.echo(message, err=True)

    def _line(self, seconds: float, beside: str) -> str:
        rate = (self._done - self._earlier) / seconds
        parts = [f"{self._done:,} {self._unit}", f"{rate:,.1f} {self._unit}/s", beside]
        if self._total and rate:
            parts[0] = f"{self._done:,} of about {self._total:,} {self._unit}"
            parts.append(f"{tqdm.format_interval(max(0, self._total - self._done) / rate)} left")
        return ", ".join(part for part in parts if part)
