"""The protocol for progress, notes, warnings and stop requests of a stage, silent by default; findings of `doctor`.

A stage calls its `Reporter` and never prints. cli/progress.py has the reporter for terminals, executors/ one that
writes to a pipe.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from sparse_ingest.errors import UsageError, first_line, short_repr

_RATE_S = 120.0  # shortest time over which a rate is measured
NOTE = 25  # level of a log record that the command line prints by default, between INFO and WARNING

if TYPE_CHECKING:
    from tqdm import tqdm


class Reporter(Protocol):
    """The calls of a running stage. `plan`, `advance`, `earlier` and `note` may be called from several threads."""

    def begin(self, unit: str, total: int | None = None) -> None:
        """Start a stage that counts `unit`, such as "documents"; `total` is None if it is unknown."""

    def expect(self, total: int) -> None:
        """Correct the estimated number of units."""

    def plan(self, count: int, tokens: int) -> None:
        """Announce `count` units with `tokens` tokens, which are computed next."""

    def advance(self, count: int, *, tokens: int = 0, detail: str = "") -> None:
        """Report `count` more units with `tokens` tokens; `detail` is shown with the progress.

        The clock of rate and time left starts with the first call of `plan` or `advance`; `count` may be 0.
        """

    def earlier(self, count: int) -> None:
        """Report `count` units that an earlier start finished."""

    def note(self, message: str) -> None:
        """Show a message."""

    def warn(self, message: str) -> None:
        """Show a message that a user may have to act on."""

    def stop_requested(self) -> bool:
        """Return whether the stage should end with `Interrupted`: `encode` after its window, others after a shard."""
        ...


class SilentReporter(Reporter):
    """Shows nothing and never requests a stop. Base class of other reporters."""

    def _ignore(self, *given: Any, **named: Any) -> None:
        pass

    begin = expect = plan = advance = earlier = note = _ignore

    def warn(self, message: str) -> None:  # noqa: D102 - see Reporter
        self.note(message)

    def stop_requested(self) -> bool:  # noqa: D102
        return False


SILENT = SilentReporter()


class Progress:
    """The progress of a stage, with its rate and the time left.

    The clock starts with the first call of `plan` or `advance`. The rate is measured over the last two minutes, or over
    half of the elapsed time if that is longer. If the stage plans tokens, the time left is computed from tokens: the
    longest documents of a row group come first. Units that are not planned yet count as average ones.
    """

    def __init__(self, unit: str, total: int | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.unit, self.total, self.done, self._clock = unit, total, 0, clock
        self._earlier = self._tokens = self._planned = self._planned_tokens = 0
        self._began = 0.0
        self._marks: deque[tuple[float, int, int]] = deque()  # time, units that took time, tokens

    def plan(self, count: int, tokens: int) -> None:
        """Count units and tokens that are computed next."""
        self._begin()
        self._planned += count
        self._planned_tokens += tokens

    def advance(self, count: int, tokens: int = 0) -> None:
        """Count units and tokens."""
        self.done += count
        self._tokens += tokens
        self._begin()
        now = self._clock()
        if now - self._marks[-1][0] >= _RATE_S / 100:
            self._marks.append((now, self.done - self._earlier, self._tokens))
            while now - self._marks[1][0] > max(_RATE_S, (now - self._began) / 2):
                self._marks.popleft()

    def earlier(self, count: int) -> None:
        """Count units that took no time."""
        self.done += count
        self._earlier += count

    def text(self, detail: str = "") -> str:
        """Return the time left and the rate, if they are known, and the detail."""
        from tqdm import tqdm

        if not self._marks:
            return detail
        began, units, tokens = self._marks[0]
        seconds = max(1e-9, self._clock() - began)
        if self._tokens:
            unit, rate, left = "tokens", (self._tokens - tokens) / seconds, self._tokens_left()
        else:
            rate, left = (self.done - self._earlier - units) / seconds, self.total and float(self.total - self.done)
            unit = self.unit
        parts = [f"{tqdm.format_interval(round(max(0.0, left) / rate))} left"] if rate and left is not None else []
        parts += [f"{rate:,.{0 if rate >= 100 else 1}f} {unit}/s"] if rate else []
        return ", ".join([*parts, detail] if detail else parts)

    def line(self, detail: str = "") -> str:
        """Return the progress as one line."""
        of = f" of about {self.total:,}" if self.total else ""
        return ", ".join(filter(None, (f"{self.done:,}{of} {self.unit}", self.text(detail))))

    def _begin(self) -> None:
        if not self._marks:
            self._began = self._clock()
            self._marks.append((self._began, self.done - self._earlier, self._tokens))

    def _tokens_left(self) -> float | None:
        if not (self.total and self._planned):
            return None
        unplanned = max(0, self.total - self._earlier - self._planned)
        return self._planned_tokens - self._tokens + unplanned * self._planned_tokens / self._planned


class TqdmReporter(SilentReporter):
    """Progress with tqdm.auto: a widget in a notebook, a bar on a terminal. Notes go to standard error."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None
        self._lock = threading.RLock()
        self._progress = Progress("")

    def begin(self, unit: str, total: int | None = None) -> None:
        """Finish the previous bar, and start a new one."""
        with self._lock:
            self.close()
            self._progress = Progress(unit, total)
            self._bar = self._new_bar(total=total, unit=f" {unit}", bar_format=_bar_format(total))

    def expect(self, total: int) -> None:
        """Correct the length of the bar."""
        with self._lock:
            self._progress.total = total
            if self._bar is not None:
                self._bar.total, self._bar.bar_format = total, _bar_format(total)

    def plan(self, count: int, tokens: int) -> None:
        """Compute the time left from tokens."""
        with self._lock:
            self._progress.plan(count, tokens)

    def advance(self, count: int, *, tokens: int = 0, detail: str = "") -> None:
        """Move the bar."""
        with self._lock:
            self._progress.advance(count, tokens)
            self._show(count, detail)

    def earlier(self, count: int) -> None:
        """Move the bar without changing the rate."""
        with self._lock:
            self._progress.earlier(count)
            self._show(count)

    def note(self, message: str) -> None:
        """Write a line above the bar."""
        from tqdm.auto import tqdm

        tqdm.write(message, file=sys.stderr)

    def close(self) -> None:
        """Finish the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _new_bar(self, **settings: Any) -> tqdm[Any] | None:
        from tqdm.auto import tqdm

        return tqdm(**settings)

    def _show(self, count: int, detail: str = "") -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(self._progress.text(detail), refresh=False)
            self._bar.update(count)


def _bar_format(total: int | None) -> str:
    """Return tqdm's format without its own rate and time left, which count units."""
    counts = "{l_bar}{bar}| {n_fmt}/{total_fmt}" if total else "{n_fmt}"
    return f"{counts}{{unit}} [{{elapsed}}{{postfix}}]"


def reporter_of(progress: Reporter | bool) -> Reporter:
    """Return the reporter of a `progress=` argument: tqdm.auto for True, a silent one for False, or the argument."""
    if progress is True:
        return TqdmReporter()
    if progress is not False and not hasattr(progress, "stop_requested"):
        raise UsageError(f"progress is {short_repr(progress)}; expected True, False or a Reporter.")
    return SILENT if progress is False else progress


def size_text(count: float) -> str:
    """Return a number of bytes as text with a unit, such as 2.5 MB; units are powers of 1,000."""
    for unit in ("bytes", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.0f} {unit}" if unit in ("bytes", "KB") else f"{count:,.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


class Check(NamedTuple):
    """A finding of `doctor`.

    `missing` can be added, `problem` is broken, `unknown` could not be checked. `advice` says what to
    do.
    """

    name: str
    state: Literal["ok", "missing", "problem", "unknown"]
    found: str
    advice: str = ""


def checks_of(
    name: str, ask: Callable[[], Iterable[Check]], why: Callable[[Exception], str | None] = lambda error: None
) -> list[Check]:
    """Return the findings of `ask`. If it raises, those before that and one with the error, as `why` explains it."""
    found = []
    try:
        for one in ask():
            found.append(one)  # noqa: PERF402 - those before an error are kept
    except Exception as error:  # a check may fail in any way, and must not end the others
        general = f"could not be checked ({type(error).__name__}: {first_line(error)})"
        found.append(Check(name, "unknown", why(error) or general))
    return found


def duration_text(seconds: float) -> str:
    """Return a duration with a unit that suits it, such as 40 s, 25 min or 3.5 h."""
    minutes = seconds / 60
    if minutes < 2:
        return f"{seconds:,.0f} s"
    return f"{minutes:,.0f} min" if minutes < 120 else f"{minutes / 60:,.1f} h"


def shortened(text: str, characters: int) -> str:
    """Return a text in one line, truncated with an ellipsis."""
    line = " ".join(text.split())
    return line if len(line) <= characters else line[:characters] + "…"


def aligned(rows: Sequence[Sequence[str]], adjust: Callable[[str, int], str] = str.rjust) -> list[str]:
    """Return the lines of a table with the first column aligned to the left, the others by default to the right."""
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    return ["  ".join([row[0].ljust(first), *map(adjust, row[1:], others)]) for row in rows]
