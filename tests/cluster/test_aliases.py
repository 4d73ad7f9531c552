"""Aliases: what they point to, and that a move is atomic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.loads import into
from support.runs import make_run

from sparse_ingest.cluster import aliases, indexes
from sparse_ingest.cluster.client import Client, Connection
from sparse_ingest.errors import ClusterError, UsageError
from sparse_ingest.searching.search import open_index

pytestmark = pytest.mark.both_products(quick=False)


@pytest.fixture
def two(client: Client, index_name: str) -> tuple[indexes.Index, indexes.Index]:
    body = {"settings": {"number_of_replicas": 0}, "mappings": {"properties": {"language": {"type": "keyword"}}}}
    first, second = (indexes.create_index(client, f"{index_name}-{number}", body) for number in (1, 2))
    return first, second


def add(client: Client, index: indexes.Index, alias: str, **properties: Any) -> None:
    client.call("POST", "/_aliases", {"actions": [{"add": {"index": index.name, "alias": alias, **properties}}]})


def test_an_unused_name_points_to_nothing_and_can_become_an_alias(client: Client, index_name: str, two) -> None:
    alias = f"{index_name}-alias"
    served = aliases.served_by(client, alias)
    assert served == {}
    aliases.move_alias(client, alias, served, two[0])
    assert aliases.served_by(client, alias) == {two[0].name: {}}


def test_moving_an_alias_keeps_its_filter_and_routing(client: Client, index_name: str, two) -> None:
    alias = f"{index_name}-alias"
    properties = {
        "filter": {"term": {"language": {"value": "en", "boost": 1.0}}},
        "index_routing": "a",
        "search_routing": "a,b",
        "is_write_index": True,
    }
    add(client, two[0], alias, **properties)
    aliases.move_alias(client, alias, aliases.served_by(client, alias), two[1])
    assert aliases.served_by(client, alias) == {two[1].name: properties}
    assert indexes.check_uuid(client, two[0]).aliases == {}


def test_an_alias_that_another_client_changed_is_not_moved(client: Client, index_name: str, two) -> None:
    alias = f"{index_name}-alias"
    add(client, two[0], alias)
    served = aliases.served_by(client, alias)
    client.call("POST", "/_aliases", {"actions": [{"remove": {"index": two[0].name, "alias": alias}}]})
    with pytest.raises(ClusterError, match=f"it served '{two[0].name}' when this command started, now nothing"):
        aliases.move_alias(client, alias, served, two[1])
    assert aliases.served_by(client, alias) == {}


def test_a_name_of_an_index_and_an_alias_of_two_indexes_are_refused(client: Client, index_name: str, two) -> None:
    with pytest.raises(UsageError, match=f"'{two[0].name}' is an index, so it cannot be an alias"):
        aliases.served_by(client, two[0].name)
    alias = f"{index_name}-alias"
    for index in two:
        add(client, index, alias)
    with pytest.raises(UsageError, match=f"points to 2 indexes \\({two[0].name}, {two[1].name}\\)"):
        aliases.served_by(client, alias)


@pytest.mark.parametrize("name", ["a*", "a,b", "_all", "", "-a", "a/b"])
def test_a_name_that_can_match_several_indexes_is_refused(client: Client, name: str) -> None:
    with pytest.raises(UsageError, match="is not an alias name"):
        aliases.served_by(client, name)


def test_an_alias_of_indexes_with_different_models_is_not_searched(
    client: Client, index_name: str, tmp_path: Path
) -> None:
    alias = f"{index_name}-alias"
    for number, model in enumerate(("one", "one", "two")):
        run = make_run(tmp_path / str(number), {f"d{number}": {"river": 1.0 + number}}, model=model)
        into(client, f"{index_name}-{number}", run)
        index = indexes.need_index(client, f"{index_name}-{number}", "")
        add(client, index, alias, is_write_index=number == 0)
        if number < 2:
            with open_index(alias, connection=Connection(client.address)) as opened:
                assert len(opened.search({"river": 1.0})) == number + 1
    with pytest.raises(ClusterError, match=f"searches '{index_name}-0' and '{index_name}-2', which have vectors of"):
        open_index(alias, connection=Connection(client.address))
