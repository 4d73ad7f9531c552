"""Proof that what the index confirmed is on its disk, for an index that confirms writes earlier.

With `translog.durability: async` a killed server forgets writes that it has confirmed. A shard of a run counts as
loaded only after a flush, and only when no primary has been restarted or moved since the load began: then everything
that was confirmed is among what was flushed. With `request`, the default, a confirmation is the proof, and nothing
is asked.
"""

from __future__ import annotations

from urllib.parse import quote

from sparse_ingest.cluster.client import Client
from sparse_ingest.cluster.indexes import Index
from sparse_ingest.errors import ClusterError


class Durability:
    """Watches the primaries of an index that confirms early, from now on."""

    def __init__(self, client: Client, index: Index) -> None:
        self._client = client
        self._index = index
        self._began = self._primaries()

    def settle(self) -> None:
        """Bring everything that was confirmed onto the disk.

        Raises:
            ClusterError: a primary was restarted or moved; what it had confirmed before may be lost.
        """
        answer = self._client.call("POST", f"/{quote(self._index.name, safe='')}/_flush", timeout_s=600)
        if answer["_shards"]["failed"] or self._primaries() != self._began:
            raise ClusterError(
                f"A primary of index {self._index.name!r} was restarted or moved while the index confirmed writes "
                "early (translog.durability is async): what it confirmed last may be lost. Start the same command "
                "again: it sends every shard that is not in the journal, and only those."
            )

    def _primaries(self) -> list[tuple[int, int, str]]:
        """Shard, time of the last start and node of each primary that has started."""
        answer = self._client.call("GET", f"/{quote(self._index.name, safe='')}/_recovery")
        return sorted(
            (int(shard["id"]), int(shard["start_time_in_millis"]), str(shard["target"]["id"]))
            for shard in answer.get(self._index.name, {}).get("shards", [])
            if shard["primary"]
        )
