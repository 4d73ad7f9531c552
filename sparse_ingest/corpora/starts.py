"""The planner: where every shard of a corpus starts, found once, in pieces that are counted at the same time.

In: a corpus, the rows of a shard and the limit. Out: the positions that a `Cursor` has at the start of each shard.
Lines are counted without parsing them; Parquet and Arrow files by their headers. csv and tsv with quotes are read row
by row, as is the rest of a source in which a piece cannot be counted: that raises the error of the file.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from itertools import islice
from threading import Event
from typing import NamedTuple, TypeVar

from sparse_ingest.corpora.pieces import Piece, Search, Spot
from sparse_ingest.corpora.sources import START, Corpus, Position
from sparse_ingest.errors import CorpusError, Interrupted
from sparse_ingest.reporting import SILENT, Reporter

PIECE_BYTES = 64 << 20
_MOST_DROPPED = 0.05  # of the rows of a group: rows that its reader reads and drops
_AHEAD = 2  # pieces per thread that are counted before they are needed
_CHECK_S = 1.0  # between checks for a stop request
_CHECK_ROWS = 1024
T = TypeVar("T")


@dataclass(frozen=True)
class Starts:
    """Where the shards of a corpus start.

    `rows` is the number of rows, at most the limit. `positions` has for each shard the position of a `Cursor` after the
    rows before it; `begins` is the same, but at a file's end it has the start of the next file, so that the file that
    ends is not read again. `groups` are consecutive shards; their first is read from its `begins`, the others
    after it without a jump, because one that starts within a compressed file or a row group would read again what is
    before it. A reader of a group drops at most a twentieth of its rows.
    """

    rows: int
    positions: list[Position]
    begins: list[Position]
    groups: list[range]


def find_starts(
    corpus: Corpus,
    shard_rows: int,
    limit: int | None = None,
    *,
    reporter: Reporter = SILENT,
    threads: int | None = None,
    piece_bytes: int = PIECE_BYTES,
) -> Starts:
    """Return where the shards of a corpus start.

    Args:
        corpus: of sources that can be read again.
        shard_rows: rows of each shard but the last.
        limit: the number of rows to read; None for all.
        reporter: gets the rows that were counted, as `advance`, and is asked for stop requests.
        threads: number of threads; by default four more than cores, because some wait for storage.
        piece_bytes: size of the pieces of a file of lines.

    Raises:
        CorpusError: as reading the rows would, but not for damage within rows.
        Interrupted: a stop was requested.
        ValueError: a source can be read only once.
    """
    if not corpus.rereadable:
        raise ValueError("the starts of shards cannot be found in a source that is read only once")
    if limit is not None and limit <= 0:
        return Starts(0, [], [], [])
    threads = threads or min(32, len(os.sched_getaffinity(0)) + 4)
    search = Search(shard_rows, limit, piece_bytes, None, Event())
    with ThreadPoolExecutor(threads, "planner") as pool:
        try:
            return _Planner(corpus, search, pool, reporter).starts(ahead=_AHEAD * threads)
        finally:
            search.stopped.set()
            pool.shutdown(cancel_futures=True)


class _Start(NamedTuple):
    """The start of a shard; `before` and `after` are as in `Spot`."""

    position: Position
    begin: Position
    before: int = 0
    after: int = 0


class _Piece(NamedTuple):
    """A piece with shards that start in it, after numbers of its rows, and what is before it in corpus and source."""

    source: int
    rows_before: int
    lines_before: int
    rows: range
    spots: Future[list[Spot]]


class _Planner:
    def __init__(self, corpus: Corpus, search: Search, pool: ThreadPoolExecutor, reporter: Reporter) -> None:
        self._sources, self._search, self._pool, self._reporter = corpus.sources, search, pool, reporter
        self._limit = sys.maxsize if search.limit is None else search.limit
        self._rows = 0
        self._source = self._source_rows = 0  # the latest source, and the rows before it
        self._lines = self._end = 0  # in that source
        self._read: set[int] = set()  # sources that were read row by row
        self._found: list[_Piece | _Start] = []

    def starts(self, ahead: int) -> Starts:
        """Count all pieces, at most `ahead` before they are needed, and look up the starts in them."""
        for source, counting in self._counting(ahead):
            self._check_stop()
            if source in self._read:
                continue
            if source != self._source:
                self._source, self._source_rows, self._lines, self._end = source, self._rows, 0, 0
            try:
                piece = self._result(counting)
            except CorpusError:  # reading row by row raises it at the right row, if that is within the limit
                piece = None
            if piece is None:
                self._read_rows(source)
            else:
                self._add(source, piece)
            if self._rows >= self._limit:
                break
        rows, shard_rows = min(self._rows, self._limit), self._search.shard_rows
        starts = [start for found in self._found for start in self._starts_in(found) if start.position.row < rows]
        starts = [_Start(START, START), *starts] if rows else []
        positions, begins = [start.position for start in starts], [start.begin for start in starts]
        return Starts(rows, positions, begins, _groups(starts, rows, shard_rows))

    def _counting(self, ahead: int) -> Iterator[tuple[int, Future[Piece | None]]]:
        """Yield the sources and the results of their tasks in order."""
        submitted: deque[tuple[int, Future[Piece | None]]] = deque()
        for index, source in enumerate(self._sources):
            for task in source.pieces(replace(self._search, rows_before=None if index else 0)):
                if index in self._read:
                    break
                submitted.append((index, self._pool.submit(task)))
                if len(submitted) > ahead:
                    yield submitted.popleft()
        yield from submitted

    def _add(self, source: int, piece: Piece) -> None:
        borders = self._search.borders(self._rows)
        rows = range(borders.start, min(piece.rows, self._limit - self._rows - 1) + 1, borders.step)
        if rows:
            self._found.append(_Piece(source, self._rows, self._lines, rows, self._pool.submit(piece.spots, rows)))
        self._rows += piece.rows
        self._lines += piece.lines
        self._end = self._end if piece.end is None else piece.end
        self._reporter.advance(piece.rows)

    def _read_rows(self, index: int) -> None:
        """Read the rest of a source row by row."""
        self._read.add(index)
        source = self._sources[index]
        records = source.records(self._end, self._lines + 1 if self._end else 1)
        for record in islice(records, self._limit - self._rows):
            self._rows += 1
            if self._rows % self._search.shard_rows == 0:
                position = Position(index, record.offset, record.next_line, self._rows)
                before = 0 if source.seekable else self._rows - self._source_rows
                self._found.append(_Start(position, position, before))
            if self._rows % _CHECK_ROWS == 0:
                self._check_stop()
                self._reporter.advance(_CHECK_ROWS)
        if self._found and isinstance(last := self._found[-1], _Start) and last.position.row == self._rows:
            self._found[-1] = _Start(last.position, Position(index + 1, 0, 1, self._rows))

    def _starts_in(self, found: _Piece | _Start) -> Iterator[_Start]:
        if isinstance(found, _Start):
            yield found
            return
        spots: list[Spot] = self._result(found.spots)
        for border, spot in zip(found.rows, spots, strict=True):
            row, line = found.rows_before + border, found.lines_before + spot.line
            begin = Position(found.source + 1, 0, 1, row)
            if spot.begin is not None:
                begin = Position(found.source, spot.begin, line, row)
            yield _Start(Position(found.source, spot.offset, line, row), begin, spot.before, spot.after)

    def _result(self, future: Future[T]) -> T:
        while not wait([future], _CHECK_S).done:
            self._check_stop()
        return future.result()

    def _check_stop(self) -> None:
        if self._reporter.stop_requested():
            raise Interrupted("Stopped on request before a shard was encoded. Run the same command again to continue.")


def _groups(starts: list[_Start], rows: int, shard_rows: int) -> list[range]:
    """Return the smallest groups, found from the end, whose readers drop at most a twentieth of their rows."""
    groups: list[range] = []
    end, end_row, end_after = len(starts), rows, 0
    for shard, start in reversed(list(enumerate(starts))):
        # The group that ends here has at least one shard, so its rows after this border are half of its share.
        may_end = start.after <= _MOST_DROPPED / 2 * shard_rows
        may_begin = start.before + end_after <= _MOST_DROPPED * (end_row - start.position.row)
        if shard == 0 or (may_end and may_begin):
            groups.append(range(shard, end))
            end, end_row, end_after = shard, start.position.row, start.after
    return groups[::-1]
