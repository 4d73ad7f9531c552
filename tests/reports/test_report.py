"""`report`: the figures are those of the run, and every state of a run and its loads gives a page."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from support.forked import command
from support.json_page import check
from support.loads import MANY, StopBefore, broken_titles, into, run_with_bad_titles
from support.runs import DOCUMENTS, make_run

from sparse_ingest.cluster.client import Client, Connection
from sparse_ingest.errors import Interrupted, RunError, UsageError
from sparse_ingest.reports import distributions
from sparse_ingest.reports.distributions import Distribution
from sparse_ingest.reports.figures import ReportFigures
from sparse_ingest.reports.report import report
from sparse_ingest.runs.run import Run

FROZEN = Path(__file__).parents[1] / "runs" / "frozen_run"


def written(run: Run | Path, folder: Path, **settings) -> tuple[ReportFigures, str]:
    """Return the figures and the page of a run."""
    out = folder / "new" / "report.html"
    figures = report(run, out=out, **settings)
    return figures, out.read_text(encoding="utf-8")


def check_bars(found: Distribution | None, values: list[float]) -> None:
    """Compare a distribution with its values."""
    assert found is not None
    assert found.count == len(values) == sum(bar.count for bar in found.bars)
    assert (found.mean, found.largest) == (pytest.approx(np.mean(values)), max(values))
    for share, quantile in ((0.5, found.median), (0.95, found.p95)):
        assert quantile == np.quantile(values, share, method="inverted_cdf")
    for bar in found.bars:
        high = np.inf if bar.high is None else bar.high
        assert bar.count == sum(bar.low <= value < high for value in values)


@pytest.mark.parametrize("weights", ["float16", "float32"])
def test_the_distributions_are_those_of_the_vectors(weights: str, tmp_path: Path) -> None:
    documents = {**MANY, **DOCUMENTS, "large": {"river": 60000.0, "cloud": 0.25}}
    run = make_run(tmp_path / "run", documents, weights=weights)
    found = written(run, tmp_path)[0].distributions
    stored = [np.float16(weight) for terms in documents.values() for weight in terms.values()]
    postings = Counter(token for terms in documents.values() for token in terms)
    check_bars(found.terms, [len(terms) for terms in documents.values()])
    assert found.weights is not None
    assert found.weights.count == sum(bar.count for bar in found.weights.bars) == len(stored)
    assert found.weights.mean == pytest.approx(np.mean(np.array(stored, dtype=np.float64)), rel=1e-3)
    check_bars(found.characters, [len(f"Text of {doc_id}.") for doc_id in documents])
    check_bars(found.postings, list(postings.values()))
    assert (found.used, found.documents) == (len(postings), len(documents))
    assert [(one.token, one.documents) for one in found.longest[:2]] == postings.most_common(2)
    river = [terms["river"] for terms in documents.values() if "river" in terms]
    assert found.longest[0].token == "river"
    assert found.longest[0].share == postings["river"] / len(documents)
    assert found.longest[0].mean_weight == pytest.approx(np.mean(river), rel=1e-3)


def test_of_a_large_run_some_shards_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run", MANY, shard_rows=6)
    monkeypatch.setattr(distributions, "MAX_DOCUMENTS", 20)
    monkeypatch.setattr(distributions, "TEXT_DOCUMENTS", 20)
    monkeypatch.setattr(distributions, "TEXT_SHARDS", 4)
    figures, page = written(run, tmp_path)
    assert (figures.distributions.shards, figures.distributions.documents) == (3, 18)
    assert "those of 18 documents in 3 of 10 shards, evenly spaced." in page
    assert "In a sample of 24 documents." in page


def test_a_run_of_an_older_release_has_a_report(tmp_path: Path) -> None:
    figures, page = written(FROZEN, tmp_path)
    assert (figures.complete, figures.counts["rows"], figures.loads, figures.ok) == (True, 12, [], True)
    for text in ("Bad documents skipped: 2.", "frozen_corpus.jsonl", "Busy time by stage", "No load of this run"):
        assert text in page


@pytest.mark.parametrize(
    ("documents", "complete", "texts"),
    [
        ({}, True, ["The run has no documents.", "The run is complete."]),
        ({"a": {}, "b": {}}, True, ["Without terms: 2.", "Lengths of texts"]),
        (DOCUMENTS, False, ["The run is not complete", "Longest posting lists"]),
    ],
)
def test_a_run_without_documents_terms_or_end_has_a_report(documents, complete, texts, tmp_path: Path) -> None:
    _, page = written(make_run(tmp_path / "run", documents, complete=complete), tmp_path)
    for text in (*texts, "Not verified."):
        assert text in page


def test_the_rows_of_a_run_of_passages_are_called_passages(tmp_path: Path) -> None:
    _, page = written(make_run(tmp_path / "run", overflow="passages"), tmp_path)
    assert "passages in 2 shards" in page and "Terms per passage" in page


def test_foreign_values_in_records_give_a_report(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", corpus=["text", {"name": None, "size": {"a": [1]}}])
    path = run.path / "done" / "part-00000.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "versions": [1], "device": {"a": 1}, "host": None}))
    figures, _ = written(run, tmp_path)
    assert figures.recorded["device"] == ["{'a': 1}"]


def test_without_an_index_no_request_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSE_INGEST_URL", "http://127.0.0.1:9")
    assert written(make_run(tmp_path / "run"), tmp_path)[0].index is None


def test_what_cannot_be_written_is_refused_and_kept(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (tmp_path / "file").write_text("mine")
    for out, message in {"file": "already exists", "file/report.html": "is a file"}.items():
        with pytest.raises(UsageError, match=message):
            report(run, out=tmp_path / out)
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(UsageError, match="web address"):
        report(run, out="https://127.0.0.1:9/report.html")
    with pytest.raises(UsageError, match="pass --index"):
        report(run, out=tmp_path / "new.html", verify=True)
    with pytest.raises(RunError, match="not a run"):
        report(tmp_path / "none", out=tmp_path / "new.html")
    assert not (tmp_path / "new.html").exists()


def test_a_loaded_and_verified_index_is_shown(client: Client, index_name: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", MANY, shard_rows=10)
    into(client, index_name, run, top_k=1)
    options = ("--index", index_name, "--verify", "--url", client.address, "--json")
    answer = command("report", run.path, "--out", tmp_path / "report.html", *options)
    assert answer.code == 0, answer.err
    found, page = json.loads(answer.out), (tmp_path / "report.html").read_text()
    assert (found["index"]["documents"], found["verification"]["same"]) == (60, True)
    assert found["mapping"] == {
        "parent": "keyword", "sparse": "rank_features", "text": "text", "title": "text",
    }  # fmt: skip
    for text in (
        f"Load into index {index_name}",
        "top_k 1",
        "The index matches the run: all ids and 60 weights of 60 documents",
        "6 of 6",
    ):
        assert text in page
    client.call("DELETE", f"/{index_name}/_doc/d7", params={"refresh": "true"})
    answer = command("report", run.path, "--out", tmp_path / "second.html", *options)
    assert answer.code == 1
    assert "The index differs from the run" in (tmp_path / "second.html").read_text()


def test_failed_loads_are_shown(client: Client, index_name: str, tmp_path: Path) -> None:
    run = run_with_bad_titles(tmp_path / "run", ("words",))
    into(client, index_name, run, pipeline=broken_titles(tmp_path, client))
    with pytest.raises(Interrupted):
        into(client, f"{index_name}-2", run, progress=StopBefore(1))
    figures, page = written(run, tmp_path, index=index_name, connection=Connection(client.address))
    assert figures.index
    check("report", json.loads(json.dumps(figures.to_dict())))
    loads = {load.index_uuid == figures.index.uuid: load for load in figures.loads}
    assert [(one.documents, one.example, one.status) for one in loads[True].refusals] == [(1, "words", 400)]
    assert (loads[False].shards, loads[False].current) == (1, 1)
    for text in (
        "Clusters refused 1 document; see Loads.",
        "failed to parse",
        "Not finished: 1 of 3 shards are loaded.",
    ):
        assert text in page
    other = make_run(tmp_path / "other", MANY)
    page = written(other, tmp_path / "b", index=index_name, connection=Connection(client.address))[1]
    assert "The last load into this index was not of this run." in page


def test_a_run_that_was_encoded_again_after_its_load_is_marked(client: Client, index_name: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", shard_rows=2)
    into(client, index_name, run)
    again = make_run(tmp_path / "again", {**DOCUMENTS, "small": {"lamp": 3.0}}, shard_rows=2)
    shutil.copytree(run.path / "load", again.path / "load")
    figures, page = written(again, tmp_path)
    assert figures.loads[0].current == 0
    assert "The run was encoded again after this load; load it again." in page
