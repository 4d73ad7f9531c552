"""The claim of a load on an index: no other load has begun since, and `_meta` still has the stamp of this one.

In: an index that this load has created or stamped. Out: a `Claim`, which is checked before each shard counts. A load
sends to a private alias of its own and removes those of other loads, so one that was paused can send nothing more.

Not covered: what a stamp holds (indexes.py), which settings a load changes (settings_guard.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

from sparse_ingest.cluster.client import Client
from sparse_ingest.cluster.indexes import Index, Stamp, add_private_alias, check_uuid, private_alias, stamp_index
from sparse_ingest.cluster.journal import Journal
from sparse_ingest.errors import ClusterError, SparseIngestError
from sparse_ingest.reporting import Reporter

CLEANUP_S = 3.0  # timeout of a request after a failure: a cluster that hangs must not hold up Ctrl-C


class LostClaimError(ClusterError):
    """Another load into the index has begun."""


@dataclass
class Claim:
    """One load and its index. `stamp` is what `_meta` must hold, but for the settings, which are in the journal."""

    client: Client
    index: Index
    stamp: Stamp
    alias: str
    journal: Journal
    reporter: Reporter

    def check(self) -> Index:
        """Read the index again. A stamp that another client has removed is written again, and reported.

        Raises:
            LostClaimError: another load has begun since.
            ClusterError: the index was deleted, or the stamp does not stay in `_meta`.
        """
        there = check_uuid(self.client, self.index)
        self.refuse_other(there)
        if self.alias not in there.aliases:
            raise LostClaimError(
                f"Index {self.index.name!r} no longer has alias {self.alias!r}, to which this load sends: another load "
                "of the same run has begun since, or a client removed it. This one sends nothing more. Wait until no "
                "other load is running, then start the same command again: it continues."
            )
        if there.stamp is None:
            self.reporter.warn(
                f"Index {self.index.name!r} lost its stamp (_meta.sparse_ingest): another client replaced _meta during "
                "the load. The stamp is written again. Have that client keep the keys of _meta that are not its own."
            )
            stamp_index(self.client, self.index, replace(self.stamp, settings=self.journal.settings()))
            there = check_uuid(self.client, self.index)
            if there.stamp is None:
                raise ClusterError(
                    f"Index {self.index.name!r} has no stamp (_meta.sparse_ingest): another client keeps removing "
                    "it. Stop that client, then start the same command again."
                )
        return there

    def refuse_other(self, there: Index) -> None:
        """Refuse an index whose stamp is that of another load.

        Raises:
            LostClaimError: names the run of the other load.
        """
        found = there.stamp
        if found is not None and _identity(found) != _identity(self.stamp):
            raise LostClaimError(
                f"A load of run {str(found.run_id)[:8]} into index {there.name!r} has begun since; this one, of run "
                f"{self.stamp.run_id[:8]}, sends nothing more. Wait until the other has ended. Start the same command "
                "again only if the index is to hold this run: it then sends all shards again."
            )


@contextlib.contextmanager
def claimed(
    client: Client, index: Index, stamp: Stamp, load_id: str, journal: Journal, reporter: Reporter
) -> Iterator[Claim]:
    """Claim an index that has this stamp: what other loads still send to it is refused from now on.

    Raises:
        LostClaimError: another load has begun since the index was stamped.
    """
    there = check_uuid(client, index)
    claim = Claim(client, there, stamp, private_alias(index.name, load_id), journal, reporter)
    claim.refuse_other(there)
    add_private_alias(client, there, load_id)
    try:
        claim.check()
        yield claim
    finally:
        # A leftover alias does no harm, and cleaning up must not raise another error or wait long.
        remove = {"actions": [{"remove": {"index": index.name, "alias": claim.alias}}]}
        with contextlib.suppress(SparseIngestError):
            client.call("POST", "/_aliases", remove, timeout_s=CLEANUP_S)


def _identity(stamp: Stamp) -> tuple[object, ...]:
    return stamp.run_id, stamp.takeover, stamp.pruning, stamp.since, stamp.field
