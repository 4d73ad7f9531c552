"""Ids that two shards of a run share: reported with both places, or removed from the later shard.

In: a run whose shards are all done, and its corpus. runs/ids.py finds the ids; a duplicate within one shard is a bad
document (corpora/sources.py). The ids of a large run may be hashed in other processes, such as tasks of Ray.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from msgspec.structs import replace

from sparse_ingest.corpora.sources import Cursor, Position, bad_document, repeated_id, skipped_duplicate
from sparse_ingest.encoding.counts import counts_of
from sparse_ingest.errors import RunError
from sparse_ingest.executors.local import Worker
from sparse_ingest.records import SourceRow, document_id
from sparse_ingest.reporting import Reporter
from sparse_ingest.runs.files import SkippedRow
from sparse_ingest.runs.ids import Duplicate, find_duplicates, id_hashes, pieces_of, remove_rows
from sparse_ingest.runs.run import Run, open_run
from sparse_ingest.runs.sorted_pieces import Numbers, SortedPieces
from sparse_ingest.storage.places import Place

AT_ONCE = 100_000  # duplicates whose places are in memory, about 100 MB; for more of them all ids are read again
TASK_ROWS = 500_000  # hashed in one task: 4 MB


class Duplicates:
    """The rows of a run whose id an earlier shard has.

    `starts` has the position of each shard in the corpus; `rows` is the number of documents; `hashes` has the hashed
    ids, if other processes computed them.
    """

    def __init__(
        self, run: Run, cursor: Cursor, starts: Sequence[Position], rows: int, hashes: SortedPieces | None
    ) -> None:
        self._run, self._cursor, self._starts, self._rows, self._hashes = run, cursor, starts, rows, hashes

    def refuse(self) -> None:
        """Raise `CorpusError` with both places of the first duplicate, if there is one."""
        if one := next(self._found(), None):
            first, again = self._places([one.first, one.again])
            raise bad_document(replace(again, reason=repeated_id(one.doc_id, first.place)))

    def skip(self) -> set[int]:
        """Remove the later rows from their shards and record them as skipped, `AT_ONCE` at a time to bound memory.

        Return the shards that were changed.
        """
        changed: set[int] = set()
        while found := list(itertools.islice(self._found(), AT_ONCE)):
            changed |= self._skip(found)
            if len(found) < AT_ONCE:
                break
            self._hashes = None  # of the rows before
        return changed

    def _skip(self, found: Sequence[Duplicate]) -> set[int]:
        firsts = self._places([duplicate.first for duplicate in found])
        agains = self._places([duplicate.again for duplicate in found])
        leaving: dict[int, dict[int, SkippedRow]] = {}
        for duplicate, first, again in zip(found, firsts, agains, strict=True):
            shard, row = duplicate.again
            reason = skipped_duplicate(duplicate.doc_id, first.file, first.line, first.unit)
            leaving.setdefault(shard, {})[row] = SkippedRow(row, again.file, again.line, reason)
        for shard, rows in sorted(leaving.items()):
            remove_rows(self._run, shard, rows, less=counts_of(self._run.need_done(shard), rows))
        return set(leaving)

    def _found(self) -> Iterator[Duplicate]:
        are_passages = self._run.manifest.identity["overflow"] == "passages"
        for one in find_duplicates(self._run, hashes=self._hashes, rows=self._rows):
            yield one._replace(doc_id=document_id(one.doc_id)) if are_passages else one

    def _places(self, positions: list[tuple[int, int]]) -> list[SourceRow]:
        """Return the source rows at (shard, row) positions; each shard is read again once."""
        wanted: dict[int, set[int]] = {}
        for shard, row in positions:
            wanted.setdefault(shard, set()).add(row)
        places: dict[int, SourceRow] = {}
        for shard, rows in sorted(wanted.items()):
            places.update(self._cursor.places(self._starts[shard], rows))
        if missing := sorted(row for _, row in positions if row not in places):
            raise RunError(f"The corpus changed: row {missing[0]} is missing. Encode into a new folder.")
        return [places[row] for _, row in positions]


def hash_in_tasks(run_on: Callable[..., None], run: Run) -> SortedPieces | None:
    """Return the hashed ids of all shards, or None for a small run, which one process hashes in a second.

    `run_on` calls the function of `build_hasher` in tasks.
    """
    groups = run.groups(len(run.done_shards()), TASK_ROWS)
    if len(groups) <= 1:
        return None
    hashes = pieces_of(run)
    run_on(build_hasher, (run.path,), lambda: groups, done=hashes.add)
    return hashes


def build_hasher(worker: Worker, run: Place, reporter: Reporter) -> Callable[[range], Numbers]:
    """Return the function that hashes the ids of consecutive shards."""
    opened = open_run(run)
    return lambda shards: np.concatenate([id_hashes(opened, shard) for shard in shards])
