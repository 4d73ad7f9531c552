"""`verify` reports every difference between a run and an index, and none if they are equal."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from support.loads import StopBefore
from support.runs import DOCUMENTS, make_run
from support.secure_proxy import Refusal, Request, secure_proxy

from sparse_ingest.cli import loading
from sparse_ingest.cluster import postings, reading
from sparse_ingest.cluster.client import Client, Connection
from sparse_ingest.errors import ClusterError, Interrupted, RunError
from sparse_ingest.loading.load import load
from sparse_ingest.pipeline import IndexSettings, Pipeline
from sparse_ingest.runs.run import Run
from sparse_ingest.verification.comparison import VerifyReport
from sparse_ingest.verification.verify import verify

# Quick on Elasticsearch are the tests of what the products answer differently.
pytestmark = [pytest.mark.usefixtures("hasty_merges"), pytest.mark.both_products(quick=False)]

TERMS = sum(len(terms) for terms in DOCUMENTS.values())


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


@pytest.mark.both_products
def test_a_fresh_load_matches_bit_for_bit(client: Client, index_name: str, loaded: Run) -> None:
    report = compare(client, index_name, loaded)
    assert report.ok
    assert (report.index_documents, report.expected_documents) == (5, 5)
    assert (report.checked_documents, report.checked_weights) == (5, TERMS)


def test_float32_runs_and_other_fields_are_compared_too(client: Client, index_name: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", weights="float32")
    pipeline = Pipeline(index=IndexSettings(field="other.vector"))
    load(run.path, index=index_name, pipeline=pipeline, connection=Connection(client.address))
    assert compare(client, index_name, run).checked_weights == TERMS


@pytest.mark.both_products
def test_a_changed_weight_is_reported_with_both_values(client: Client, index_name: str, loaded: Run) -> None:
    terms = dict(DOCUMENTS["words"])
    terms["river"] = terms["river"] * 1.01
    overwrite(client, index_name, "words", terms)
    report = compare(client, index_name, loaded)
    assert not report.ok
    assert report.differing == 1
    (difference,) = report.differences
    assert (difference.doc_id, difference.token) == ("words", "river")
    assert difference.expected == pytest.approx(1 / 9, rel=2**-8)
    assert difference.found == pytest.approx(1.01 / 9, rel=2**-8)


@pytest.mark.both_products
def test_a_missing_or_additional_weight_is_found(client: Client, index_name: str, loaded: Run) -> None:
    gone = {token: weight for token, weight in DOCUMENTS["words"].items() if token != "lamp"}
    overwrite(client, index_name, "words", gone)
    overwrite(client, index_name, "empty", {"a.b": 0.5})
    report = compare(client, index_name, loaded)
    found = {difference.doc_id: difference for difference in report.differences}
    assert report.differing == 2
    assert (found["words"].token, found["words"].found) == ("lamp", None)
    assert found["empty"] == ("empty", None, 0.0, 0.5)


def test_a_sample_finds_differences(client: Client, index_name: str, loaded: Run) -> None:
    overwrite(client, index_name, "words", {**DOCUMENTS["words"], "river": 0.75})
    overwrite(client, index_name, "empty", {"a.b": 0.5})
    assert compare(client, index_name, loaded, sample=4).differences == [
        ("empty", None, 0.0, 0.5),
        ("words", "river", pytest.approx(1 / 9, rel=2**-8), 0.75),
    ]


def test_a_missing_document_is_reported_and_the_count_differs(client: Client, index_name: str, loaded: Run) -> None:
    client.call("DELETE", f"/{index_name}/_doc/empty")
    report = compare(client, index_name, loaded)
    assert (report.ok, report.missing, report.missing_ids) == (False, 1, ["empty"])
    assert (report.index_documents, report.expected_documents) == (4, 5)


@pytest.mark.parametrize("sample", [pytest.param(None, marks=pytest.mark.slow), 2])
def test_an_additional_document_is_reported(client: Client, index_name: str, loaded: Run, sample: int | None) -> None:
    client.call("PUT", f"/{index_name}/_doc/stranger", {})
    report = compare(client, index_name, loaded, sample=sample)
    assert not report.ok
    assert (report.index_documents, report.expected_documents, report.differing) == (6, 5, 0)
    assert (report.extra, report.extra_ids) == (1, ["stranger"])


def test_one_missing_and_one_additional_document_differ_although_the_counts_match(
    client: Client, index_name: str, loaded: Run
) -> None:
    client.call("DELETE", f"/{index_name}/_doc/empty")
    client.call("PUT", f"/{index_name}/_doc/stranger", {})
    report = compare(client, index_name, loaded, sample=1)
    assert report.index_documents == report.expected_documents
    assert not report.ok
    assert (report.missing_ids, report.extra_ids) == (["empty"], ["stranger"])


def test_documents_of_other_clients_are_no_difference(client: Client, index_name: str, tmp_path: Path) -> None:
    mapping = {"properties": {"sparse": client.dialect.field_entry()}}
    client.call("PUT", f"/{index_name}", {"mappings": mapping})
    client.call("PUT", f"/{index_name}/_doc/theirs", {"sparse": {"river": 2.5}}, params={"refresh": "true"})
    run = make_run(tmp_path / "run")
    load(run.path, index=index_name, pipeline=Pipeline(), connection=Connection(client.address))
    report = compare(client, index_name, run, sample=None)
    assert report.ok
    assert (report.expected_documents, report.extra) == (None, 1)


@pytest.mark.parametrize("others", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_id_duplicated_under_two_routings_is_a_difference(
    client: Client, index_name: str, tmp_path: Path, others: bool
) -> None:
    body = {"settings": {"number_of_shards": 2}, "mappings": {"properties": {"sparse": client.dialect.field_entry()}}}
    path = tmp_path / "body.json"
    path.write_text(json.dumps(body))
    run = make_run(tmp_path / "run")
    pipeline = Pipeline(index=IndexSettings(body=str(path)))
    if others:
        client.call("PUT", f"/{index_name}", body)
    load(run.path, index=index_name, pipeline=pipeline, connection=Connection(client.address))
    for routing in range(8):
        client.call("PUT", f"/{index_name}/_doc/empty", {}, params={"routing": str(routing)})
    report = compare(client, index_name, run, sample=1)
    assert not report.ok
    assert (report.missing, report.extra, report.doubled, report.doubled_ids) == (0, 0, 1, ["empty"])


def test_a_changed_weight_too_small_to_change_the_sum_is_found(client: Client, index_name: str, loaded: Run) -> None:
    overwrite(client, index_name, "words", {**DOCUMENTS["words"], "a.b": 1e-9})
    report = compare(client, index_name, loaded, sample=None)
    assert [(one.doc_id, one.token, one.expected) for one in report.differences] == [("words", "a.b", 0.0)]
    assert report.differences[0].found == pytest.approx(1e-9, rel=2**-8)


def test_a_pruned_load_is_compared_with_the_pruned_run(client: Client, index_name: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    load(run.path, index=index_name, pipeline=Pipeline(), connection=Connection(client.address), top_k=3)
    report = compare(client, index_name, run)
    assert report.ok
    assert report.checked_weights == sum(min(3, len(terms)) for terms in DOCUMENTS.values())
    overwrite(client, index_name, "words", DOCUMENTS["words"])
    assert compare(client, index_name, run).differing == 1


@pytest.mark.opensearch_only
@pytest.mark.parametrize("merge", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_sparse_vector_field_matches_bit_for_bit_and_a_change_is_reported(
    client: Client, index_name: str, tmp_path: Path, merge: bool
) -> None:
    run = make_run(tmp_path / "run")
    pipeline = Pipeline(index=IndexSettings(kind="sparse_vector"))
    load(run.path, index=index_name, pipeline=pipeline, connection=Connection(client.address), merge=merge)
    report = compare(client, index_name, run)
    assert report.ok
    assert (report.checked_documents, report.checked_weights) == (5, TERMS)
    river, stone = (str(run.vocabulary().index(token)) for token in ("river", "stone"))
    overwrite(client, index_name, "small", {river: 2.0, stone: 1.0})
    if merge:
        client.call("POST", f"/{index_name}/_forcemerge", params={"max_num_segments": "1"})
    report = compare(client, index_name, run, sample=4)
    nothing = 0.0 if merge else None  # a segment with clusters has one byte per token
    # The small weight of "lamp" is byte zero, as for a missing token; the sum shows the difference.
    lamp = set() if merge else {("small", "lamp", None)}
    assert {(one.doc_id, one.token, one.found) for one in report.differences} == {("small", "cloud", nothing), *lamp}


@pytest.mark.both_products
def test_every_document_of_many_pages_is_compared(client: Client, index_name: str, tmp_path: Path) -> None:
    mappings = {"properties": {"sparse": client.dialect.field_entry()}}
    body = tmp_path / "body.json"
    body.write_text(json.dumps({"settings": {"max_result_window": 7}, "mappings": mappings}))
    documents = {f"d{number}": {"river": 1 + number / 64, "stone": 2 - number / 128} for number in range(60)}
    run = make_run(tmp_path / "run", documents, shard_rows=25)
    pipeline = Pipeline(index=IndexSettings(body=str(body)))
    load(run.path, index=index_name, pipeline=pipeline, connection=Connection(client.address))
    assert compare(client, index_name, run, sample=None).ok
    overwrite(client, index_name, "d41", {**documents["d41"], "river": 3.0})
    client.call("DELETE", f"/{index_name}/_doc/d7")
    report = compare(client, index_name, run, sample=None)
    assert [(one.doc_id, one.token) for one in report.differences] == [("d41", "river")]
    assert (report.missing_ids, report.checked_documents, report.checked_weights) == (["d7"], 59, 118)


def test_the_sample_is_spread_evenly_over_the_run(client: Client, index_name: str, tmp_path: Path) -> None:
    documents = {f"d{number}": {"river": 1 + number / 64} for number in range(100)}
    run = make_run(tmp_path / "run", documents, shard_rows=30)
    load(run.path, index=index_name, pipeline=Pipeline(), connection=Connection(client.address))
    for number in range(0, 100, 50):
        client.call("DELETE", f"/{index_name}/_doc/d{number}")
    sampled = compare(client, index_name, run, sample=3)
    assert sampled.checked_documents == 2  # d0, d49 and d99; d0 is missing
    assert sampled.missing_ids == ["d0", "d50"]
    everything = compare(client, index_name, run, sample=None)
    assert (everything.checked_documents, everything.missing_ids) == (98, ["d0", "d50"])


@pytest.mark.both_products
def test_long_documents_are_read_in_groups_of_max_clause_count(client: Client, index_name: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    documents = {
        doc_id: {f"t{number}": float(weight) for number, weight in enumerate(rng.gamma(1, 1, 2500) + 0.01)}
        for doc_id in ("a", "b")
    }
    run = make_run(tmp_path / "run", documents)
    load(run.path, index=index_name, pipeline=Pipeline(), connection=Connection(client.address))
    report = compare(client, index_name, run)
    assert report.ok
    assert report.checked_weights == 5000


@pytest.mark.opensearch_only
@pytest.mark.parametrize("sample", [4, None])
def test_requests_and_answers_stay_small_in_an_index_with_a_large_window(
    client: Client, index_name: str, loaded: Run, monkeypatch: pytest.MonkeyPatch, sample: int | None
) -> None:
    client.call("PUT", f"/{index_name}/_settings", {"index.max_result_window": 2**31 - 1})
    for module, name, value in ((postings, "PAGE", 2), (reading, "_MAX_BYTES", 3000), (reading, "_MOST_CLAUSES", 20)):
        monkeypatch.setattr(module, name, value)

    def check(request: Request) -> Refusal | None:
        return (413, {}) if len(request.body) > 3000 or b'"size": 2147483647' in request.body else None

    with secure_proxy(client.address, check=check) as proxy:
        report = verify(loaded.path, index=index_name, connection=Connection(proxy.url), sample=sample)
    assert report.ok
    assert report.checked_documents == (sample or len(DOCUMENTS))


def test_an_unfinished_load_is_a_difference(client: Client, index_name: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {f"d{number}": {"river": 1.0} for number in range(9)}, shard_rows=3)
    with pytest.raises(Interrupted):
        load(run.path, index=index_name, connection=Connection(client.address), progress=StopBefore(1))
    report = compare(client, index_name, run)
    assert (report.ok, report.unloaded_shards, report.differing, report.missing) == (False, 2, 0, 0)
    load(run.path, index=index_name, pipeline=Pipeline(), connection=Connection(client.address))
    assert compare(client, index_name, run).ok


@pytest.mark.opensearch_only
def test_without_a_point_in_time_documents_are_explained_with_a_note(
    client: Client, index_name: str, loaded: Run
) -> None:
    forbidden = {"error": {"type": "security_exception", "reason": "no permissions for [indices:data/read/point]"}}
    client.call("DELETE", f"/{index_name}/_doc/empty")
    with secure_proxy(
        client.address, check=lambda one: (403, forbidden) if "point_in_time" in one.path else None
    ) as proxy:
        report = verify(loaded.path, index=index_name, connection=Connection(proxy.url), sample=None)
    assert (report.checked_documents, report.missing_ids, report.differing) == (4, ["empty"], 0)
    assert len(report.notes) == 1
    assert report.notes[0].startswith("The ids of the index could not be compared (")


def test_incomparable_runs_and_indexes_are_refused(
    client: Client, index_name: str, loaded: Run, tmp_path: Path
) -> None:
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
    assert "The index matches the run." in capsys.readouterr().out
    overwrite(client, index_name, "small", {"lamp": 2.0})
    client.call("DELETE", f"/{index_name}/_doc/empty")
    client.call("PUT", f"/{index_name}/_doc/x%0AThe%20index%20matches", {"text": "an id with a line of output"})
    assert loading.verify.main([*arguments, "--all"], standalone_mode=False) == 1
    printed = capsys.readouterr().out
    assert r"extra: 'x\nThe index matches'" in printed
    assert "missing: empty" in printed
    assert "small: token 'lamp': expected 6.0" in printed
    assert "token 'cloud': expected 0.299804688, found none" in printed
    assert loading.verify.main([*arguments, "--all", "--json"], standalone_mode=False) == 1
    assert json.loads(capsys.readouterr().out)["missing_ids"] == ["empty"]
