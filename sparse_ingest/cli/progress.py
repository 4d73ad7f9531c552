"""Progress on standard error: a tqdm bar on a terminal, otherwise one line every 10 s. SIGTERM handling."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Self

import click
from tqdm import tqdm

from sparse_ingest.reporting import TqdmReporter
from sparse_ingest.storage.waiting import stopping

LINE_EVERY_S = 10.0


@contextlib.contextmanager
def handling(handler: Callable[..., object]) -> Iterator[None]:
    """Handle SIGTERM and SIGHUP in the block. An ignored signal, as SIGHUP under nohup, stays ignored."""
    numbers = [one for one in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(one) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


class TerminalReporter(TqdmReporter):
    """Progress of a stage; rates exclude units that an earlier start finished. Use it in a `with` block.

    With `stoppable`, SIGTERM and SIGHUP set `stop_requested` in the block instead of ending the process.
    """

    def __init__(self, *, stoppable: bool = False) -> None:
        super().__init__()
        self._terminal = sys.stderr.isatty()
        self._handling = handling(self._stop) if stoppable else contextlib.nullcontext()
        self._stopping = False
        self._lock = threading.RLock()
        self.begin("")

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
            click.echo("Stopping after the current shard.", err=True)

    def stop_requested(self) -> bool:
        """Return whether SIGTERM or SIGHUP was received."""
        return self._stopping

    def begin(self, unit: str, total: int | None = None) -> None:
        """Start a bar; finish the previous one."""
        with self._lock:
            self.close()
            self._unit, self._total = unit, total
            if self._terminal and unit:
                self._bar = tqdm(total=total, unit=f" {unit}", file=sys.stderr, smoothing=0.1, mininterval=0.2)
            self._done = self._earlier = self._tokens = 0
            self._began = self._last_line = time.monotonic()

    def expect(self, total: int) -> None:
        """Correct the expected number of units."""
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
        """Move the bar, or print a line when the last one is 10 s old."""
        with self._lock:
            self._done += count
            self._tokens += tokens
            now = time.monotonic()
            seconds = max(now - self._began, 1e-9)
            rate = f"{self._tokens / seconds:,.0f} tokens/s" if self._tokens else ""
            details = ", ".join(part for part in (rate, detail) if part)
            if self._bar is not None:
                self._bar.set_postfix_str(details, refresh=False)
                self._bar.update(count)
            elif now - self._last_line >= LINE_EVERY_S:
                self._last_line = now
                self.note(self._line(seconds, details))

    def note(self, message: str) -> None:
        """Print one line without breaking the bar."""
        if self._bar is not None:
            self._bar.clear()
        click.echo(message, err=True)

    def _line(self, seconds: float, details: str) -> str:
        rate = (self._done - self._earlier) / seconds
        parts = [f"{self._done:,} {self._unit}", f"{rate:,.1f} {self._unit}/s", details]
        if self._total and rate:
            parts[0] = f"{self._done:,} of about {self._total:,} {self._unit}"
            parts.append(f"{tqdm.format_interval(max(0, self._total - self._done) / rate)} left")
        return ", ".join(part for part in parts if part)
