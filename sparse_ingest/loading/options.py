"""Options of `load` and `publish`, for the command line and the Python API."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from sparse_ingest.executors.options import RayOptions
from sparse_ingest.pipeline import FieldType, Pruning, option
from sparse_ingest.runs.run import RunLike

# The rules of the first releases are in every stamp and journal line, others only where they are used.
_FIRST_RULES = ("top_k", "max_ratio")


@dataclass(frozen=True)
class LoadOptions(RayOptions, Pruning):
    """Options of `load`; the inherited ones prune documents, and send shards in tasks of Ray.

    If `field`, `kind` or a rule is None, the pipeline's [index] or [load] applies.
    """

    field: str | None = option(None, "Name of the sparse field  [default: the pipeline's, otherwise sparse]")
    kind: Literal["rank_features", "sparse_vector"] | None = option(None, "Type of the sparse field")
    fields: dict[str, FieldType] | None = option(
        None,
        "Type of a kept field: keyword, text, integer, long, float, double, boolean or date; may be repeated  "
        "[default: inferred from the run]",
        metavar="FIELD=TYPE",
        flags="--map",
    )
    replace: bool = option(False, "Delete the index first, unless it is an unfinished load of this run")
    from_scratch: bool = option(False, "With --replace: also delete an unfinished load of this run")
    allow_empty: bool = option(False, "Load a run that has no documents")
    partial: bool = option(False, "Load the finished shards of an unfinished run")
    update: bool = option(False, "Add the vectors to existing documents; do not change their other fields")
    since: RunLike | None = option(
        None, "Send only what differs from this run, which the index was loaded from", metavar="OLD_RUN"
    )
    delete_missing: bool = option(False, "With --since: delete documents that OLD_RUN has and RUN lacks")
    retry_dead: bool = option(False, "Send refused documents again")
    merge: bool = option(False, "Merge every shard into one segment at the end")
    max_rate: float | None = option(None, "Send at most this many documents/s", range=(0, math.inf))
    tune: bool = option(
        False, "Also turn off refreshes and replicas of an index that another client created or that an alias points to"
    )
    async_translog: bool = option(
        False, "Let the server confirm writes before they are on disk; if it crashes, other clients may lose theirs"
    )

    @property
    def pruning(self) -> dict[str, int | float | None]:
        """The pruning rules of this load, as `_meta` and the journal keep them."""
        return {name: value for name, value in self.rules.items() if name in _FIRST_RULES or value is not None}


@dataclass(frozen=True)
class PublishOptions(LoadOptions):
    """Options of a load behind an alias."""

    drop_old: bool = option(False, "With --alias: delete the index that it served before")
    allow_fewer: bool = option(
        False, "With --alias: accept an index with fewer than half of the documents that the alias serves now"
    )
    replica_patience_s: float = option(300.0, range=(0, 86_400))


@dataclass(frozen=True)
class WithheldOptions(PublishOptions):
    """Options of the load within `publish`."""

    withheld: str | None = None  # the alias, which an index template must not give to a new index
