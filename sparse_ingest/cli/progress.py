"""Progress on standard error: a tqdm bar on a terminal, a plain line every 30 s elsewhere; and the wish to stop."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click
from tqdm import tqdm

LINE_EVERY_S = 30.0


class Progress:
    """Counts what is done of a job; rates leave out what an earlier start did."""

    def __init__(self, unit: str, total: int | None = None) -> None:
        self._terminal = sys.stderr.isatty()
        self._unit = unit
        self._bar: tqdm[Any] = tqdm(
            total=total, unit=f" {unit}", disable=not self._terminal, file=sys.stderr, smoothing=0.1, mininterval=0.2
        )
        self._total = total
        self._done = 0
        self._earlier = 0
        self._extra: Callable[[float], str] = lambda seconds: ""
        self._began = time.monotonic()
        self._last_line = self._began

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def expect(self, total: int) -> None:
        """Correct the number of units that the job is believed to have."""
        self._total = self._bar.total = total

    def describe(self, extra: Callable[[float], str]) -> None:
        """Add a text to each line, made from the seconds since the start."""
        self._extra = extra

    def earlier(self, count: int) -> None:
        """`count` units were done before this start."""
        self._earlier += count
        self._done += count
        self._bar.update(count)

    def reach(self, done: int) -> None:
        """`done` units are done in all."""
        self.advance(done - self._done)

    def advance(self, count: int) -> None:
        """`count` more units are done."""
        self._done += count
        now = time.monotonic()
        seconds = max(now - self._began, 1e-9)
        if self._terminal:
            self._bar.set_postfix_str(self._extra(seconds), refresh=False)
            self._bar.update(count)
        elif now - self._last_line >= LINE_EVERY_S:
            self._last_line = now
            self.note(self._line(seconds))

    def note(self, message: str) -> None:
        """Print one line without breaking the bar."""
        if self._terminal:
            self._bar.clear()
        click.echo(message, err=True)

    def _line(self, seconds: float) -> str:
        rate = (self._done - self._earlier) / seconds
        parts = [f"{self._done:,} {self._unit}", f"{rate:,.1f} {self._unit}/s", self._extra(seconds)]
        if self._total and rate:
            parts[0] = f"{self._done:,} of about {self._total:,} {self._unit}"
            parts.append(f"{tqdm.format_interval(max(0, self._total - self._done) / rate)} left")
        return ", ".join(part for part in parts if part)


@contextmanager
def asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM came: the job ends after the current shard."""
    asked = False

    def ask(number: int, frame: object) -> None:
        nonlocal asked
        asked = True
        click.echo("Stopping after the current shard.", err=True)

    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGTERM, before)
