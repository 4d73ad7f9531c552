"""The claim of a load on an index: no later load has started, and `_meta` has the stamp of this one.

In: an index that this load has created or stamped. Out: a `Claim`, which is checked before each shard counts. A load
sends to a private alias and removes the aliases of other loads, so a paused load can send nothing more.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

from sparse_ingest.cluster.client import Client
from sparse_ingest.cluster.indexes import Index, add_private_alias, check_uuid, private_alias, stamp_index
from sparse_ingest.cluster.journal import Journal
from sparse_ingest.cluster.stamps import Stamp
from sparse_ingest.errors import ClusterError, SparseIngestError
from sparse_ingest.reporting import Reporter

CLEANUP_S = 3.0  # timeout of a request after a failure: a cluster that hangs must not delay Ctrl-C
_IDENTITY = ("run_id", "takeover", "pruning", "since", "field", "token_map")  # of a load, in its stamp


class LostClaimError(ClusterError):
    """Another load into the index has started."""


@dataclass
class Claim:
    """One load and its index. `_meta` must contain `stamp`; the journal has the same settings."""

    client: Client
    index: Index
    stamp: Stamp
    alias: str
    journal: Journal
    reporter: Reporter

    def check(self, *, aliased: bool = True) -> Index:
        """Read the index again. A stamp that another client has removed is written again, and reported.

        Raises:
            LostClaimError: another load has started.
            ClusterError: the index was deleted, or the stamp does not stay in `_meta`.
        """
        for _ in range(2):
            there = check_uuid(self.client, self.index)
            refuse_other(there, self.stamp)
            name = repr(there.name)
            if aliased and self.alias not in there.aliases:
                raise LostClaimError(
                    f"Alias {self.alias!r} of this load is gone: another load of the same run has started, or a client "
                    "removed it. Wait until no other load is running, then start the same command again."
                )
            if there.stamp or not aliased:
                return there
            self.reporter.warn(
                f"Index {name} lost its stamp (_meta.sparse_ingest): another client replaced _meta. It is written "
                "again. Change that client so that it keeps the other keys of _meta."
            )
            stamp_index(self.client, self.index, replace(self.stamp, settings=self.journal.settings()))
        raise ClusterError(
            f"Index {name} has no stamp (_meta.sparse_ingest): another client keeps removing it. Stop that client, "
            "then start the same command again."
        )


def refuse_other(there: Index, expected: Stamp | None) -> None:
    """Raise `LostClaimError` if an index has the stamp of another load than `expected`."""
    found = there.stamp
    if found and (expected is None or any(getattr(found, key) != getattr(expected, key) for key in _IDENTITY)):
        raise LostClaimError(
            f"A load of run {str(found.run_id)[:8]} into index {there.name!r} has started after this one, so this one "
            "stopped. Wait until the other load has ended. Start the same command again only if the index should have "
            "this run: it then sends all shards again."
        )


@contextlib.contextmanager
def claimed(
    client: Client, index: Index, stamp: Stamp, load_id: str, journal: Journal, reporter: Reporter
) -> Iterator[Claim]:
    """Claim an index that has this stamp, so that it refuses what other loads send.

    Raise `LostClaimError` if another load has started since the index was stamped.
    """
    claim = Claim(client, index, stamp, private_alias(index.name, load_id), journal, reporter)
    there = claim.check(aliased=False)
    others = sorted(there.aliases.keys() - {claim.alias, *there.serving_aliases})
    if others:
        actions = [{"remove": {"index": index.name, "alias": other}} for other in others]
        client.call("POST", "/_aliases", {"actions": actions})
    add_private_alias(client, there, load_id)
    try:
        claim.check()
        yield claim
    finally:
        # A leftover alias does no harm. Cleaning up must neither raise another error nor wait long.
        remove = {"actions": [{"remove": {"index": index.name, "alias": claim.alias}}]}
        with contextlib.suppress(SparseIngestError):
            client.call("POST", "/_aliases", remove, timeout_s=CLEANUP_S)
