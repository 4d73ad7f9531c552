"""Progress, notes, warnings and stop requests of a stage: one protocol, silent by default. Findings of `doctor`.

A stage calls its `Reporter` and never prints. cli/progress.py has the reporter for terminals, executors/ one that
writes to a pipe.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from sparse_ingest.errors import first_line

if TYPE_CHECKING:
    from tqdm import tqdm


class Reporter(Protocol):
    """The calls of a running stage. `advance`, `earlier` and `note` may be called from several threads."""

    def begin(self, unit: str, total: int | None = None) -> None:
        """Start a stage that counts `unit`, such as "documents"; `total` is None if it is unknown."""

    def expect(self, total: int) -> None:
        """Correct the estimated number of units."""

    def advance(self, count: int, *, tokens: int = 0, detail: str = "") -> None:
        """Report `count` more units with `tokens` tokens; `detail` is shown with the progress."""

    def earlier(self, count: int) -> None:
        """Report `count` units without work: an earlier start finished them, or their vectors were copied."""

    def note(self, message: str) -> None:
        """Show a message."""

    def warn(self, message: str) -> None:
        """Show a message that a user may have to act on."""

    def stop_requested(self) -> bool:
        """Return whether the stage should end after its current shard, with `Interrupted`."""
        ...


class SilentReporter(Reporter):
    """Shows nothing and never asks to stop. Base class of other reporters."""

    def _ignore(self, *given: Any, **named: Any) -> None:
        pass

    begin = expect = advance = earlier = note = _ignore

    def warn(self, message: str) -> None:  # noqa: D102 - see Reporter
        self.note(message)

    def stop_requested(self) -> bool:  # noqa: D102
        return False


SILENT = SilentReporter()


class TqdmReporter(SilentReporter):
    """Progress with tqdm.auto: a widget in a notebook, a bar on a terminal. Notes go to standard error."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None

    def begin(self, unit: str, total: int | None = None) -> None:
        """Finish the previous bar, and start a new one."""
        from tqdm.auto import tqdm

        self.close()
        self._bar = tqdm(total=total, unit=f" {unit}")

    def expect(self, total: int) -> None:
        """Correct the length of the bar."""
        if self._bar is not None:
            self._bar.total = total

    def advance(self, count: int, *, tokens: int = 0, detail: str = "") -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.set_postfix_str(detail, refresh=False)
            self._bar.update(count)

    def earlier(self, count: int) -> None:
        """Move the bar; `initial` keeps the rate right."""
        if self._bar is not None:
            self._bar.initial += count
            self._bar.update(count)

    def note(self, message: str) -> None:
        """Write a line above the bar."""
        from tqdm.auto import tqdm

        tqdm.write(message, file=sys.stderr)

    def close(self) -> None:
        """Finish the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def reporter_of(progress: Reporter | bool) -> Reporter:
    """Return the reporter of a `progress=` argument: tqdm.auto for True, a silent one for False, or the argument."""
    if progress is True:
        return TqdmReporter()
    return SILENT if progress is False else progress


class Check(NamedTuple):
    """A finding of `doctor`.

    `missing` is what can be added, `problem` what is broken, `unknown` what could not be checked. `advice` says what to
    do.
    """

    name: str
    state: Literal["ok", "missing", "problem", "unknown"]
    found: str
    advice: str = ""


def checks_of(name: str, ask: Callable[[], Iterable[Check]]) -> list[Check]:
    """Return the findings of `ask`. If it raises, those before that and one with the error."""
    found = []
    try:
        for one in ask():
            found.append(one)  # noqa: PERF402 - those before an error are kept
    except Exception as error:  # a check may fail in any way, and must not end the others
        found.append(Check(name, "unknown", f"could not be checked ({type(error).__name__}: {first_line(error)})"))
    return found


def size_text(count: float) -> str:
    """Return a number of bytes as text with a unit, such as 2.5 MB; units are powers of 1,000."""
    for unit in ("bytes", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.0f} {unit}" if unit in ("bytes", "KB") else f"{count:,.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def shortened(text: str, characters: int) -> str:
    """Return a text in one line, truncated with an ellipsis."""
    line = " ".join(text.split())
    return line if len(line) <= characters else line[:characters] + "…"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table with the first column aligned to the left and the other columns to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
