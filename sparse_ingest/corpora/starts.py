"""The planner: where every shard of a corpus starts, found once, in pieces that are counted at the same time.

In: a corpus, the rows of a shard and the limit. Out: the positions that a `Cursor` has at the start of each shard.
Lines are counted without parsing them; Parquet and Arrow files by their headers. csv and tsv with quotes are read row
by row, as is the rest of a source in which a piece cannot be counted: that raises the error of the file.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import chain, groupby, islice
from operator import itemgetter
from threading import Event
from typing import NamedTuple, TypeVar

from sparse_ingest.corpora.pieces import Piece, Search
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
    search = Search(shard_rows, limit, piece_bytes, Event())
    with ThreadPoolExecutor(threads, "planner") as pool:
        try:
            return _Planner(corpus, search, pool, reporter).starts(ahead=_AHEAD * threads)
        finally:
            search.stopped.set()
            pool.shutdown(cancel_futures=True)


class _ShardStart(NamedTuple):
    """The start of a shard; `before` and `after` are as in `Border`."""

    position: Position
    begin: Position
    before: int = 0
    after: int = 0


class _Planner:
    def __init__(self, corpus: Corpus, search: Search, pool: ThreadPoolExecutor, reporter: Reporter) -> None:
        self._sources, self._search, self._pool, self._reporter = corpus.sources, search, pool, reporter
        self._limit = sys.maxsize if search.limit is None else search.limit
        self._rows = 0
        self._last_read = -1  # the last source that was read row by row
        self._found: list[list[_ShardStart] | Future[list[_ShardStart]]] = []

    def starts(self, ahead: int) -> Starts:
        """Count all pieces, at most `ahead` before they are needed, and look up the starts in them."""
        for source, counting in groupby(self._counting(ahead), itemgetter(0)):
            self._count(source, (future for _, future in counting))
            if self._rows >= self._limit:
                break
        rows = min(self._rows, self._limit)
        found = [one if isinstance(one, list) else self._result(one) for one in self._found]
        starts = [start for start in chain([_ShardStart(START, START)], *found) if start.position.row < rows]
        positions, begins = [start.position for start in starts], [start.begin for start in starts]
        return Starts(rows, positions, begins, _groups(starts, rows, self._search.shard_rows))

    def _counting(self, ahead: int) -> Iterator[tuple[int, Future[Piece | None]]]:
        """Yield the sources and the results of their tasks in order."""
        submitted: deque[tuple[int, Future[Piece | None]]] = deque()
        for index, source in enumerate(self._sources):
            for task in source.pieces(self._search):
                if index <= self._last_read:
                    break
                submitted.append((index, self._pool.submit(task)))
                if len(submitted) > ahead:
                    yield submitted.popleft()
        yield from submitted

    def _count(self, source: int, counting: Iterable[Future[Piece | None]]) -> None:
        """Add the pieces of a source, up to the first one that cannot be counted; read the rows from there on."""
        source_start, lines, end = self._rows, 0, 0
        for future in counting:
            self._check_stop()
            try:
                piece = self._result(future)
            except CorpusError:  # reading row by row raises it at the right row, if that is within the limit
                piece = None
            if piece is None:
                self._read_rows(source, source_start, end, lines + 1 if end else 1)
                return
            borders = self._search.shard_borders(self._rows)
            rows = range(borders.start, min(piece.rows, self._limit - self._rows - 1) + 1, borders.step)
            if rows:
                self._found.append(self._pool.submit(_starts_in, piece, rows, source, self._rows, lines))
            self._rows += piece.rows
            lines += piece.lines
            end = end if piece.end is None else piece.end
            self._reporter.advance(piece.rows)
            if self._rows >= self._limit:
                return

    def _read_rows(self, index: int, source_start: int, offset: int, line: int) -> None:
        """Read the rest of a source row by row, from an offset on; its first row is `source_start`."""
        self._last_read = index
        source, found = self._sources[index], list[_ShardStart]()
        for record in islice(source.records(offset, line), self._limit - self._rows):
            self._rows += 1
            if self._rows % self._search.shard_rows == 0:
                position = Position(index, record.offset, record.next_line, self._rows)
                found.append(_ShardStart(position, position, 0 if source.seekable else self._rows - source_start))
            if self._rows % _CHECK_ROWS == 0:
                self._check_stop()
                self._reporter.advance(_CHECK_ROWS)
        if found and found[-1].position.row == self._rows:
            found[-1] = _ShardStart(found[-1].position, Position(index + 1, 0, 1, self._rows))
        self._found.append(found)

    def _result(self, future: Future[T]) -> T:
        while not wait([future], _CHECK_S).done:
            self._check_stop()
        return future.result()

    def _check_stop(self) -> None:
        if self._reporter.stop_requested():
            raise Interrupted("Stopped on request before a shard was encoded. Run the same command again to continue.")


def _starts_in(piece: Piece, rows: range, source: int, rows_before: int, lines_before: int) -> list[_ShardStart]:
    """Return the starts of shards after numbers of rows of a piece."""
    found = []
    for border in piece.borders_after(rows):
        row, line = rows_before + border.rows, lines_before + border.line
        position, begin = Position(source, border.offset, line, row), Position(source + 1, 0, 1, row)
        if border.begin is not None:
            begin = Position(source, border.begin, line, row)
        found.append(_ShardStart(position, begin, border.before, border.after))
    return found


def _groups(starts: list[_ShardStart], rows: int, shard_rows: int) -> list[range]:
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
