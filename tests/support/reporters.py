"""A reporter that records notes and progress, and calls the test while a stage runs."""

from __future__ import annotations

from collections.abc import Callable

from sparse_ingest.reporting import SilentReporter


class Recorder(SilentReporter):
    """`notes` are the messages, `done` the completed units including those of earlier starts.

    `on_step` is called with `done` after each step. After `stop_at` units it requests a stop.
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
