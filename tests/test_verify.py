"""`verify` finds what differs, and nothing where nothing does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from made_runs import DOCUMENTS, make_run

from sparse_ingest.cli import loading
from sparse_ingest.errors import ClusterError, Interrupted, RunError
from sparse_ingest.load import load
from sparse_ingest.opensearch.client import Client, Connection, connect
from sparse_ingest.pipeline import IndexSettings, Pipeline
from sparse_ingest.runs.manifest import Run
from sparse_ingest.verify import VerifyReport, verify

TERMS = sum(len(terms) for terms in DOCUMENTS.values())


@pytest.fixture
def client(opensearch_url: str) -> Iterator[Client]:
    with closing(connect(Connection(opensearch_url))) as client:
        yield client


@pytest.fixture
def loaded(client: Client, index_name: str, tmp_path: Path) -> Run:
    run = make_run(tmp_path / "run")
    load(run.path, index=index_name, pipeline=Pipeline(), connection=Connection(client.address))
    return run


def compare(client: Client, index: str, run: Run, **settings) -> VerifyReport:
    return verify(run.path, index=index, connection=Connection(client.address), **settings)


def overwrite(client: Client, index: str, doc_id: str, terms: dict[str, float]) -> None:
    client.call("POST", f"/{index}/_bulk", b"%b\n%b\n" % (
        json.dumps({"index": {"_id": doc_id}}).encode(), json.dumps({"sparse": terms}).encode()
    ))  # fmt: skip


def test_a_fresh_load_is_the_same_to_the_last_bit(client: Client, index_name: str, loaded: Run) -> None:
    report = compare(client, index_name, loaded)
    assert report.same
    assert (report.index_documents, report.expected_documents) == (5, 5)
    assert (report.checked_documents, report.checked_weights) == (5, TERMS)


def test_float32_runs_and_other_fields_are_compared_too(client: Client, index_name: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", weights="float32")
    pipeline = Pipeline(index=IndexSettings(field="other.vector"))
    load(run.path, index=index_name, pipeline=pipeline, connection=Connection(client.address))
    assert compare(client, index_name, run).checked_weights == TERMS


def test_a_changed_weight_is_named_with_both_values(client: Client, index_name: str, loaded: Run) -> None:
    terms = dict(DOCUMENTS["words"])
    terms["river"] = terms["river"] * 1.01
    overwrite(client, index_name, "words", terms)
    report = compare(client, index_name, loaded)
    assert not report.same
    assert report.differing == 1
    (difference,) = report.differences
    assert (difference.doc_id, difference.token) == ("words", "river")
    assert difference.expected == pytest.approx(1 / 9, rel=2**-8)
    assert difference.found == pytest.approx(1.01 / 9, rel=2**-8)


def test_a_weight_that_is_gone_or_too_many_is_found(client: Client, index_name: str, loaded: Run) -> None:
    gone = {token: weight for token, weight in DOCUMENTS["words"].items() if token != "lamp"}
    overwrite(client, index_name, "words", gone)
    overwrite(client, index_name, "empty", {"a.b": 0.5})
    report = compare(client, index_name, loaded)
    found = {difference.doc_id: difference for difference in report.differences}
    assert report.differing == 2
    assert (found["words"].token, found["words"].found) == ("lamp", None)
    assert found["empty"] == ("empty", None, 0.0, 0.5)


def test_a_missing_document_is_named_and_the_count_differs(client: Client, index_name: str, loaded: Run) -> None:
    client.call("DELETE", f"/{index_name}/_doc/empty")
    report = compare(client, index_name, loaded)
    assert (report.same, report.missing, report.missing_ids) == (False, 1, ["empty"])
    assert (report.index_documents, report.expected_documents) == (4, 5)


def test_a_document_too_many_is_a_difference_in_the_count(client: Client, index_name: str, loaded: Run) -> None:
    client.call("PUT", f"/{index_name}/_doc/stranger", {})
    report = compare(client, index_name, loaded)
    assert not report.same
    assert (report.index_documents, report.expected_documents, report.differing) == (6, 5, 0)


def test_the_sample_is_spread_over_the_run(client: Client, index_name: str, tmp_path: Path) -> None:
    documents = {f"d{number}": {"river": 1 + number / 64} for number in range(100)}
    run = make_run(tmp_path / "run", documents, shard_rows=30)
    load(run.path, index=index_name, pipeline=Pipeline(), connection=Connection(client.address))
    for number in range(0, 100, 50):
        client.call("DELETE", f"/{index_name}/_doc/d{number}")
    sampled = compare(client, index_name, run, sample=3)
    assert (sampled.checked_documents, sampled.missing_ids) == (2, ["d0"])
    everything = compare(client, index_name, run, sample=None)
    assert (everything.checked_documents, everything.missing_ids) == (98, ["d0", "d50"])


def test_long_documents_are_read_in_groups_of_max_clause_count(client: Client, index_name: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    documents = {
        doc_id: {f"t{number}": float(weight) for number, weight in enumerate(rng.gamma(1, 1, 2500) + 0.01)}
        for doc_id in ("a", "b")
    }
    run = make_run(tmp_path / "run", documents)
    load(run.path, index=index_name, pipeline=Pipeline(), connection=Connection(client.address))
    report = compare(client, index_name, run)
    assert report.same
    assert report.checked_weights == 5000


def test_an_unfinished_load_differs(client: Client, index_name: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {f"d{number}": {"river": 1.0} for number in range(9)}, shard_rows=3)
    with pytest.raises(Interrupted):
        stops = iter([False, True])
        load(
            run.path,
            index=index_name,
            pipeline=Pipeline(),
            connection=Connection(client.address),
            stop=lambda: next(stops),
        )
    report = compare(client, index_name, run)
    assert (report.same, report.unloaded_shards, report.differing, report.missing) == (False, 2, 0, 0)
    load(run.path, index=index_name, pipeline=Pipeline(), connection=Connection(client.address))
    assert compare(client, index_name, run).same


def test_what_cannot_be_compared_is_refused(client: Client, index_name: str, loaded: Run, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="There is no index.*Load the run first"):
        compare(client, f"{index_name}-other", loaded)
    with pytest.raises(ClusterError, match="is of 'another-model'"):
        compare(client, index_name, make_run(tmp_path / "other", model="another-model"))
    with pytest.raises(RunError, match="is not complete"):
        compare(client, index_name, make_run(tmp_path / "half", complete=False))


def test_the_command_prints_what_differs_and_exits_with_1(
    client: Client, index_name: str, loaded: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(loaded.path), "--index", index_name, "--url", client.address]
    assert loading.verify.main([*arguments, "--sample", "3"], standalone_mode=False) == 0
    assert "The index holds what the run says." in capsys.readouterr().out
    overwrite(client, index_name, "small", {"lamp": 2.0})
    client.call("DELETE", f"/{index_name}/_doc/empty")
    assert loading.verify.main([*arguments, "--all"], standalone_mode=False) == 1
    printed = capsys.readouterr().out
    assert "missing: empty" in printed
    assert "small: token 'lamp': expected 6.0" in printed
    assert "token 'cloud': expected 0.299804688, found none" in printed
    assert loading.verify.main([*arguments, "--all", "--json"], standalone_mode=False) == 1
    assert json.loads(capsys.readouterr().out)["missing_ids"] == ["empty"]
