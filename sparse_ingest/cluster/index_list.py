"""List the indexes that sparse-ingest created or loaded: those with its keys in `_meta`.

Needs the rights of `show_index`. What the user may not read of a single index is None.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TypeVar

from sparse_ingest.cluster import indexes, mappings
from sparse_ingest.cluster.client import Client, ConnectionLike, PartialAnswerError, ResponseError, connect, path_of
from sparse_ingest.cluster.dialects import kind_of
from sparse_ingest.cluster.failures import is_block
from sparse_ingest.cluster.installed import MADE_KEY
from sparse_ingest.cluster.stamps import META_KEY
from sparse_ingest.errors import ClusterError, UsageError

T = TypeVar("T")


@dataclass(frozen=True)
class ListedIndex:
    """One index of `list_indexes`; `--json` prints these keys.

    `model`, `run_id` and `load` are None if nothing was loaded into it or its stamp cannot be read. `documents` and
    `bytes` (of the primaries) are None if the user may not read them or a shard does not answer. `created` is the time
    in UTC at which the index was created.
    """

    index: str
    aliases: list[str]
    documents: int | None
    bytes: int | None
    field: str | None
    kind: str | None
    model: str | None
    run_id: str | None
    load: str | None
    created: str | None


def list_indexes(
    pattern: str = "*", *, url: str | None = None, connection: ConnectionLike | None = None
) -> list[ListedIndex]:
    """Return the indexes that sparse-ingest created or loaded, by name.

    Args:
        pattern: Indexes to look at: names separated by commas, with `*` for any characters.
        url: Where the cluster is; by default the SPARSE_INGEST_* variables name it.
        connection: A `Connection` or an `opensearchpy.OpenSearch`, instead of `url`.

    Raises:
        UsageError: the pattern is empty or not one of indexes.
        ClusterError: the user may not list these indexes.
    """
    if not pattern or "/" in pattern or pattern.startswith("_"):
        raise UsageError(f"{pattern!r} is not a pattern of index names. Pass one such as 'articles*'.")
    with connect(connection, url=url) as client:
        keys = ",".join(f"*.mappings._meta.{key}" for key in (META_KEY, MADE_KEY))
        params = {"filter_path": keys, "expand_wildcards": "open,closed", "ignore_unavailable": "true"}
        try:
            found = client.find(path_of(pattern), params=params) or {}
        except ResponseError as error:
            if error.status != 403 or is_block(error.status, error.kind):
                raise
            raise ClusterError(
                f"{client.address} does not let this user list the indexes {pattern!r} (indices:admin/get). Pass a "
                "pattern of those that the user may read: sparse-ingest index list 'NAME*'"
            ) from error
        listed = (_listed(client, name) for name in sorted(found))
        return [one for one in listed if one is not None]


def _listed(client: Client, name: str) -> ListedIndex | None:
    """Return an index; None if it was deleted since it was found."""
    there = indexes.find_index(client, name)
    if there is None:
        return None
    stamp, created = there.stamp, there.setting("creation_date")
    field = stamp.field if stamp else mappings.sparse_field(there.mappings)
    return ListedIndex(
        index=there.name,
        aliases=there.serving_aliases,
        documents=_unless_refused(lambda: indexes.count_documents(client, there)),
        bytes=_unless_refused(lambda: _size(client, there)),
        field=field,
        kind=kind_of(mappings.field_mapping(there.mappings, field)) if field else None,
        model=stamp.model.get("document") if stamp else None,
        run_id=stamp.run_id if stamp else None,
        load=stamp.load if stamp else None,
        created=created and datetime.fromtimestamp(int(created) / 1000, UTC).isoformat(timespec="seconds"),
    )


def _size(client: Client, there: indexes.Index) -> int:
    answer = client.call("GET", f"{there.path}/_stats/store", params={"forbid_closed_indices": "false"})
    return int(answer["_all"]["primaries"]["store"]["size_in_bytes"])


def _unless_refused(ask: Callable[[], T]) -> T | None:
    """Return an answer; None if it is refused (no right, closed index) or lacks shards."""
    with suppress(ResponseError, PartialAnswerError):
        return ask()
    return None
