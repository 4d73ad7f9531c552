"""Loads into indexes that an index template of the cluster matches."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.loads import into, name_of, stamped
from support.reporters import Recorder
from support.runs import make_run

from sparse_ingest.cluster.client import Client, Connection, ResponseError
from sparse_ingest.cluster.indexes import create_index
from sparse_ingest.errors import ClusterError
from sparse_ingest.loading.publish import publish

pytestmark = pytest.mark.both_products(quick=False)


@contextmanager
def template(client: Client, index_name: str, content: dict[str, Any]) -> Iterator[None]:
    path = f"/_index_template/{index_name}"
    client.call("PUT", path, {"index_patterns": [f"{index_name}*"], "priority": 1000, "template": content})
    try:
        yield
    finally:
        client.call("DELETE", path)


def test_an_alias_of_a_template_serves_an_index_only_after_it_is_verified(
    client: Client, index_name: str, tmp_path: Path
) -> None:
    first, second = (make_run(tmp_path / model, model=model) for model in ("one", "two"))
    with template(client, index_name, {"aliases": {index_name: {}}}):
        for run in (first, second):
            recorder = Recorder()
            report = publish(run, alias=index_name, connection=Connection(client.address), progress=recorder)
            assert (report.serves, report.moved, report.verified) == (name_of(index_name, run), True, 5)
            assert any(f"template gave index {report.serves!r} the alias" in note for note in recorder.notes)
    assert list(client.call("GET", f"/_alias/{index_name}")) == [name_of(index_name, second)]


def test_the_stamp_of_another_index_in_a_template_is_replaced(client: Client, index_name: str, tmp_path: Path) -> None:
    run, other = make_run(tmp_path / "run"), f"{index_name}-other"
    into(client, other, run)
    foreign = stamped(client, other).as_meta() | {"query": {"top_k": 3}, "takeover": "abc", "load": {"state": "done"}}
    foreign["settings"] = {"refresh_interval": {"before": "7s", "loading": "-1"}}
    with template(client, index_name, {"mappings": {"_meta": {"sparse_ingest": foreign, "owner": "search"}}}):
        into(client, index_name, run)
    assert stamped(client, index_name) == stamped(client, other)
    mapping = client.call("GET", f"/{index_name}")[index_name]
    assert mapping["mappings"]["_meta"]["owner"] == "search"
    assert mapping["settings"]["index"].get("refresh_interval") != "7s"


def test_an_index_that_requires_a_routing_is_refused(client: Client, index_name: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with template(client, index_name, {"mappings": {"_routing": {"required": True}}}):
        for _ in range(2):  # created by this load, and by an earlier one
            with pytest.raises(ClusterError, match="requires a routing value for each document"):
                into(client, index_name, run)


def test_a_template_that_does_not_fit_is_named_as_a_cause(client: Client, index_name: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with template(client, index_name, {"settings": {"index.mapping.total_fields.limit": 2}}):
        with pytest.raises(ClusterError, match=f"Limit of total fields.*_simulate_index/{index_name} shows") as caught:
            into(client, index_name, run)
        client.call("POST", re.findall(r"POST (\S+)", str(caught.value))[0])


def test_a_template_is_not_named_for_errors_of_the_name_or_the_number_of_shards(
    client: Client, index_name: str
) -> None:
    with pytest.raises(ResponseError, match="invalid_index_name_exception") as caught:
        create_index(client, index_name.upper(), {})
    assert "template" not in str(caught.value)
    with pytest.raises(ResponseError, match="invalid_alias_name_exception") as caught:
        create_index(client, index_name, {"aliases": {"A#": {}}})
    assert "template" not in str(caught.value)
    with pytest.raises(ResponseError, match="maximum") as caught:
        create_index(client, index_name, {"settings": {"number_of_shards": 1000, "number_of_replicas": 5}})
    assert "template" not in str(caught.value)
    with pytest.raises(ResponseError, match=r"[^.;]\. Check the index body, and the index templates"):
        create_index(client, index_name, {"settings": {"number_of_shards": 0}})
