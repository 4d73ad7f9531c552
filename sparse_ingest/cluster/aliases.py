"""The alias that searches use: the index that it serves, and its move to another one.

A move is one request, and keeps filter and routing. A removal has `must_exist`: OpenSearch would skip an alias that
another client has moved. An alias that serves nothing is claimed first, hidden and with a write index: OpenSearch
refuses an alias with two write indexes, and one that only some indexes hide, so one of several loads wins. After a kill
between the two requests the alias serves its index, and the next move makes it a plain alias.
"""

from __future__ import annotations

from typing import Any

from sparse_ingest.cluster.answers import Indexes
from sparse_ingest.cluster.client import Client, ResponseError, path_of
from sparse_ingest.cluster.indexes import Index, is_one_name, pointed_to, with_alias
from sparse_ingest.errors import ClusterError, UsageError

CLAIM = {"is_hidden": True, "is_write_index": True}
Served = dict[str, dict[str, Any]]  # indexes that an alias points to, and its properties there


def served_by(client: Client, alias: str, to: str | None = None) -> Served:
    """Return the index that an alias points to, or {}.

    Raise `UsageError` if it cannot be an alias, or points to several indexes, of which none is `to`.
    """
    if not is_one_name(alias):
        raise UsageError(f"--alias {alias!r} is not an alias name. Give one name, without wildcards.")
    found = client.find(path_of(alias), expected=Indexes) or {}  # one request: another load may create it between two
    served = with_alias(found, alias)
    if alias in found:
        raise UsageError(
            f"{alias!r} is an index, so it cannot be an alias. Give --alias another name, or load into the index with "
            f"--index {alias}."
        )
    if found.keys() != served.keys():
        raise UsageError(f"{alias!r} is a data stream, so it cannot be an alias. Give --alias another name.")
    if len(served) > 1 and to not in served:
        raise UsageError(
            f"Alias {alias!r} points to {len(served)} indexes ({', '.join(sorted(served))}), but --alias needs "
            f"an alias of one. Keep one: sparse-ingest load --alias {alias} --to INDEX, or name another alias."
        )
    return served


def move_alias(client: Client, alias: str, served: Served, target: Index) -> None:
    """Point the alias to `target` alone.

    Raise `ClusterError` if another client has created, moved or removed it since it was read, or adds an index to it.
    """
    properties = kept_properties(served, target)
    add = {"index": target.name, "alias": alias, **({} if properties == CLAIM else properties)}
    remove = [{"remove": {"index": name, "alias": alias, "must_exist": True}} for name in served]
    try:
        if not served:
            client.call("POST", "/_aliases", {"actions": [{"add": {"index": target.name, "alias": alias, **CLAIM}}]})
        client.call("POST", "/_aliases", {"actions": [*remove, {"add": add}]})
    except ResponseError as error:
        if error.status != 404 and error.kind != "illegal_state_exception":
            raise
        raise moved_error(client, alias, served) from error
    if pointed_to(client, alias).keys() != {target.name}:
        if not served:  # releases before 3 do not hide the claimed alias, so two loads can add their index
            client.call("POST", "/_aliases", {"actions": [{"remove": {"index": target.name, "alias": alias}}]})
        raise moved_error(client, alias, served)


def kept_properties(served: Served, target: Index) -> dict[str, Any]:
    """Return the properties, such as a filter, that an alias keeps when it moves to `target`."""
    return served.get(target.name, next(iter(served.values()), {}))


def moved_error(client: Client, alias: str, served: Served) -> ClusterError:
    """Return the error for an alias that has changed since it was read."""
    before, now = (", ".join(map(repr, names)) or "nothing" for names in (served, pointed_to(client, alias)))
    return ClusterError(
        f"Another client moved alias {alias!r}: it served {before} when this command started, now {now}. It was "
        "not changed. Start the same command again to move it, or choose an index: sparse-ingest load --alias "
        f"{alias} --to INDEX"
    )
