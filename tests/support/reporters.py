"""Reporters for tests: one that records notes and progress, and one that fails at any note."""

from __future__ import annotations

from collections.abc import Callable

from sparse_ingest.reporting import SilentReporter


class NoNotes(SilentReporter):
    """Fails the test at any note."""

    def note(self, message: str) -> None:
        raise AssertionError(message)


class Recorder(SilentReporter):
    """`notes` are the messages, `done` the units so far, including earlier starts.

    `on_step` is called with `done` after each step; after `stop_at` units it requests a stop.
    """

    def __init__(self, on_step: Callable[[int], object] | None = None, *, stop_at: int | None = None) -> None:
        self.notes: list[str] = []
        self.done = 0
        self._on_step, self._stop_at = on_step, stop_at

    def note(self, message: str) -> None:
        self.notes.append(message)

    def earlier(self, count: int) -> None:
        self._step(count)

    def advance(self, count: int, *, tokens: int = 0, detail: str = "") -> None:
        self._step(count)

    def stop_requested(self) -> bool:
        return self._stop_at is not None and self.done >= self._stop_at

    def _step(self, count: int) -> None:
        self.done += count
        if self._on_step is not None:
            self._on_step(self.done)
