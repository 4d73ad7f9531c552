"""What is sent for a shard of a run: the operations, as bulk requests.

In: a run, the writer that fits the index, the rules of this load. Out: `BulkRequest`s, one shard at a time.
Not covered: sending them and noting what became of them (load.py).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from sparse_ingest.cluster.bodies import BodyWriter, BulkRequest
from sparse_ingest.pruning import prune
from sparse_ingest.runs.changes import Changes
from sparse_ingest.runs.run import Run
from sparse_ingest.runs.shards import ShardPart, read_shard, take_rows


class Operations(Protocol):
    """What a load sends. `rules` stand in every line of the journal: a load goes on only with the same ones."""

    @property
    def rules(self) -> Mapping[str, Any]:
        """What makes the vectors in the index other than those of the run."""

    def requests(
        self, shard: int, *, rows: Collection[int] | None = None, max_bytes: Callable[[], int]
    ) -> Iterator[BulkRequest]:
        """The operations of a shard, or only those of some source rows."""

    def unchanged(self, shard: int) -> int:
        """How many documents of a shard the index holds already, so that they are not sent."""


@dataclass(frozen=True)
class WholeDocuments:
    """Every document of a shard, its vector pruned: with all its fields, or with `update` the vector alone."""

    run: Run
    writer: BodyWriter
    pruning: Mapping[str, Any] = field(default_factory=dict)
    update: bool = False

    @property
    def rules(self) -> Mapping[str, Any]:
        """The pruning, and `update` where documents are updated."""
        return rules_of(self.pruning, self.update)

    def requests(
        self, shard: int, *, rows: Collection[int] | None = None, max_bytes: Callable[[], int]
    ) -> Iterator[BulkRequest]:
        """The documents of a shard, or only those of some source rows."""
        chosen = self.parts(shard) if rows is None else _only(read_shard(self.run.shard_path(shard)), rows)
        pruned = (part._replace(vectors=prune(part.vectors, **self.pruning)) for part in chosen)
        yield from self.writer.requests(pruned, shard=shard, max_bytes=max_bytes)

    def parts(self, shard: int) -> Iterator[ShardPart]:
        """What is sent of a shard."""
        return read_shard(self.run.shard_path(shard))

    def unchanged(self, shard: int) -> int:
        """None."""
        return 0


@dataclass(frozen=True)
class ChangedDocuments(WholeDocuments):
    """Those documents of a shard that differ from an older run, which the index holds."""

    changes: Changes = field(kw_only=True)

    def parts(self, shard: int) -> Iterator[ShardPart]:
        """What is sent of a shard."""
        return self.changes.documents(shard)

    def unchanged(self, shard: int) -> int:
        """The documents that do not differ."""
        return int((self.run.done(shard) or {})["rows"]) - self.changes.differing(shard)


def rules_of(pruning: Mapping[str, Any], update: bool) -> Mapping[str, Any]:
    """What stands as `rules` in the lines of the journal."""
    return {"pruning": dict(pruning), **({"update": True} if update else {})}


def _only(parts: Iterator[ShardPart], rows: Collection[int]) -> Iterator[ShardPart]:
    """The parts with only some source rows."""
    wanted = np.array(list(rows), dtype=np.uint64)
    for part in parts:
        places = np.flatnonzero(np.isin(part.rows, wanted))
        if len(places):
            yield take_rows(part, places)
