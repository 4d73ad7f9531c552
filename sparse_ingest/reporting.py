"""Progress, notes, warnings and stop requests of a stage: one protocol, silent by default.

A stage is given a `Reporter` and calls it; it never prints. cli/progress.py has the one for terminals, executors/
the one that speaks through a pipe to another process. `reporter_of` turns the `progress=` of the Python API into one.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from tqdm import tqdm


class Reporter(Protocol):
    """What a stage calls while it runs. `advance`, `earlier` and `note` may be called from several threads."""

    def begin(self, unit: str, total: int | None = None) -> None:
        """A stage begins that counts `unit`, such as "documents"; `total` is None where it is not known yet."""

    def expect(self, total: int) -> None:
        """Correct the number of units that the stage is believed to have."""

    def advance(self, count: int, *, tokens: int = 0, detail: str = "") -> None:
        """`count` more units, with `tokens` tokens, are done. `detail` is what else is worth a look now."""

    def earlier(self, count: int) -> None:
        """`count` units cost this start no work: an earlier one did them, or their vectors were copied."""

    def note(self, message: str) -> None:
        """Show a message that a user should read."""

    def warn(self, message: str) -> None:
        """Show a message that a user should read and may have to act on."""

    def stop_requested(self) -> bool:
        """Return whether the stage should end after its current shard. The stage raises `Interrupted` then."""
        ...


class SilentReporter(Reporter):
    """Shows nothing and never asks to stop. Other reporters override what they show."""

    def _ignore(self, *given: Any, **named: Any) -> None:
        pass

    begin = expect = advance = earlier = note = _ignore

    def warn(self, message: str) -> None:  # noqa: D102 - see Reporter
        self.note(message)

    def stop_requested(self) -> bool:  # noqa: D102
        return False


SILENT = SilentReporter()


class TqdmReporter(SilentReporter):
    """Progress as tqdm.auto shows it: a widget in a notebook, a bar on a terminal. Notes go to standard error."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None

    def begin(self, unit: str, total: int | None = None) -> None:
        """Start a bar; the one before is finished."""
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
    """Return the reporter that `progress=` means: itself, tqdm.auto for True, silence for False."""
    if progress is True:
        return TqdmReporter()
    return SILENT if progress is False else progress


def size_text(count: float) -> str:
    """Return a number of bytes as text with a unit, such as 2.5 MB; units are powers of 1,000."""
    for unit in ("bytes", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.0f} {unit}" if unit in ("bytes", "KB") else f"{count:,.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table: the first column is aligned to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
