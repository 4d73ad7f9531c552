"""The plan of a run: where its shards start in the corpus, found once and stored as starts.json, and its parts.

corpora/starts.py finds the starts. Every process that works on the run reads them, so none reads the rows before its
own shards.
"""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Annotated

from msgspec import Meta, defstruct

from sparse_ingest.corpora.sources import Corpus, Position
from sparse_ingest.corpora.starts import Starts, find_starts
from sparse_ingest.errors import RunError, UsageError
from sparse_ingest.reporting import Reporter, SilentReporter
from sparse_ingest.runs.files import read_record, write_json
from sparse_ingest.runs.manifest import Count
from sparse_ingest.runs.run import Run

_SAY_S = 10.0  # between two notes about planning
_Position = tuple[Count, Count, Annotated[int, Meta(ge=1)], Count]
# `groups` has the first shard of each group, and the number of shards.
_StartsRecord = defstruct(
    "_StartsRecord",
    [("rows", Count), ("positions", list[_Position]), ("begins", list[_Position]), ("groups", list[Count])],
)


def planned(run: Run, corpus: Corpus, limit: int | None, reporter: Reporter) -> Starts:
    """Return where the shards of a run start, found now unless starts.json has it."""
    if (run.path / "starts.json").exists():
        found = stored_starts(run)
        if any(begin.file >= len(corpus.sources) for begin in found.begins):
            raise _unusable(run)
        return found
    found = find_starts(corpus, run.manifest.shard_rows, limit, reporter=_Planning(reporter))
    if run.writable:
        groups = [group.start for group in found.groups] + [len(found.positions)]
        content = {"rows": found.rows, "positions": found.positions, "begins": found.begins, "groups": groups}
        write_json(run.path / "starts.json", content, exclusive=True)
    return found


class _Planning(SilentReporter):
    """Reports the rows that were counted, every `_SAY_S` seconds; usual corpora take less."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter, self._rows, self._said = reporter, 0, time.monotonic()

    def advance(self, count: int, *, tokens: int = 0, detail: str = "") -> None:
        self._rows += count
        if time.monotonic() - self._said >= _SAY_S:
            self._said = time.monotonic()
            self._reporter.note(f"Finding where the shards start: {self._rows:,} rows so far.")

    def stop_requested(self) -> bool:
        return self._reporter.stop_requested()


def stored_starts(run: Run) -> Starts:
    """Read where the shards of a run start from its starts.json. Raise `RunError` if that is missing, or damaged."""
    record = read_record(run.path / "starts.json", _StartsRecord)
    if record is None:
        raise RunError(f"{run.path} has no plan of its shards. Run `sparse-ingest encode --plan-only` first.")
    positions, begins = ([Position(*one) for one in record[name]] for name in ("positions", "begins"))
    groups, shard_rows = record["groups"], run.manifest.shard_rows
    rows = [shard * shard_rows for shard in range(-(-record["rows"] // shard_rows))]
    if not (
        rows == [position.row for position in positions] == [begin.row for begin in begins]
        and groups == sorted({0, *groups, len(positions)})
    ):
        raise _unusable(run)
    return Starts(record["rows"], positions, begins, [range(*group) for group in pairwise(groups)])


def _unusable(run: Run) -> RunError:
    path = run.path / "starts.json"
    return RunError(f"{path} does not match the corpus, or is damaged. Delete it, and run the command again.")


def rows_of(starts: Starts, shards: range) -> int:
    """Return the number of rows of consecutive shards."""
    borders = [*(position.row for position in starts.positions), starts.rows]
    return borders[shards.stop] - borders[shards.start]


def part_of(part: str, starts: Starts) -> range:
    """Return the consecutive shards of part I/N, which contain whole groups. Raise `UsageError` for another form."""
    number, slash, parts = part.partition("/")
    if not (slash and number.isdecimal() and parts.isdecimal() and 1 <= int(number) <= int(parts)):
        raise UsageError(f"--part {part}: expected I/N with I from 1 to N, such as 3/8.")
    shards = len(starts.positions)
    # A group belongs to the part that has its first shard.
    first, end = (-(-shards * border // int(parts)) for border in (int(number) - 1, int(number)))
    own = [group for group in starts.groups if first <= group.start < end]
    return range(own[0].start, own[-1].stop) if own else range(0)
