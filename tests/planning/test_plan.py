"""`plan`: predictions match the index, and the written files hold the plan."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from support.forked import command
from support.json_page import check
from support.plans import DOCUMENTS, made_plan
from support.runs import make_run

from sparse_ingest.cluster.client import Client, Connection
from sparse_ingest.cluster.engines import ENGINES, engines_of
from sparse_ingest.cluster.scores import posting_bytes
from sparse_ingest.cluster.search_bodies import Engine
from sparse_ingest.errors import ClusterError, MissingExtraError, UsageError
from sparse_ingest.evaluation.measures import measure
from sparse_ingest.loading.load import load
from sparse_ingest.pipeline import IndexSettings, ModelSettings, Pipeline, QuerySettings, changed, read_pipeline
from sparse_ingest.planning import drawing, engines, outputs
from sparse_ingest.planning.plan import plan
from sparse_ingest.planning.report import PlanReport
from sparse_ingest.planning.sweep import rule_text
from sparse_ingest.pruning import prune
from sparse_ingest.runs.shards import read_shard_vectors
from sparse_ingest.searching.index_search import rank_index
from sparse_ingest.searching.query import many_query_weights
from sparse_ingest.searching.run_search import rank_run
from sparse_ingest.searching.search import open_index

pytestmark = pytest.mark.usefixtures("hasty_merges")

Made = tuple[Any, Any, Any]


@pytest.fixture(scope="module")
def plan_inputs(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return made_plan(tmp_path_factory.mktemp("plan"))


@pytest.fixture(scope="module")
def judged(plan_inputs: Made) -> PlanReport:
    run, queries, qrels = plan_inputs
    return plan(run.path, queries, pipeline=Pipeline(), qrels=qrels, loss=0.05)


@pytest.fixture(scope="module")
def unjudged(plan_inputs: Made) -> PlanReport:
    run, queries, _ = plan_inputs
    return plan(run.path, queries, pipeline=Pipeline(), loss=0.1)


@pytest.fixture(scope="module")
def files(judged: PlanReport, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files") / "out"
    written = outputs.write_outputs(judged, folder)
    assert written == [folder / name for name in ("plan.json", "plan.png", "plan.html", "pipeline.toml")]
    return folder


def into(client: Client, index: str, run: Any, rule: dict[str, Any], kind: Any = "rank_features") -> None:
    pipeline = Pipeline(index=IndexSettings(kind=kind))
    load(run.path, index=index, pipeline=pipeline, connection=Connection(client.address), merge=True, **rule)


def posting_file_bytes(client: Client, index: str) -> int:
    """Return the size of Lucene's files of documents and frequencies."""
    answer = client.call(
        "GET", f"/{quote(index)}/_stats/segments", params={"include_segment_file_sizes": "true", "level": "shards"}
    )
    files = answer["_all"]["primaries"]["segments"]["file_sizes"]
    return int(files["doc"]["size_in_bytes"])


def test_a_written_plan_is_read_as_it_was(judged: PlanReport, files: Path) -> None:
    assert outputs.read_plan(files).to_dict() == judged.to_dict()


@pytest.mark.both_products(quick=False)
def test_predictions_of_the_chosen_point_match_the_index(
    plan_inputs: Made, judged: PlanReport, client: Client, index_name: str
) -> None:
    run, queries, qrels = plan_inputs
    assert judged.choice
    point = judged.choice.point
    assert point.documents and point.loss <= 0.05 and point.postings < 0.7 * judged.points[0].postings
    into(client, index_name, run, dict(point.documents))
    asked = list(many_query_weights(queries, judged.pipeline))
    ranked = list(rank_index(client, index_name, asked, Engine(), size=10))
    check_like_predicted(measure(ranked, qrels, ["nDCG@10"]).per_query["nDCG@10"], point, judged_order(queries))
    # The 10 scores equal those of the run bit for bit; of ties at the cutoff the index may return other documents.
    exact = rank_run(run, asked, size=11, stored=True, prune=lambda vectors: prune(vectors, **point.documents))
    tied = 0
    for here, there in zip(ranked, exact, strict=True):
        assert here.scores == there.scores[:10]
        if there.scores[9:10] == there.scores[10:]:
            tied += 1
        else:
            assert set(here.doc_ids) == set(there.doc_ids[:10])
    assert tied == point.tied > 0
    # A query visits each document that has one of its tokens once.
    visited = [sum(_count(client, index_name, token) for token in weights) for _, weights in asked[:5]]
    pruned = [
        prune(vectors, **point.documents)
        for shard in run.done_shards()
        for vectors in read_shard_vectors(run.shard_path(shard))
    ]
    number = {token: place for place, token in enumerate(run.vocabulary())}
    together = np.bincount(np.concatenate([part.token_ids for part in pruned]), minlength=len(number))
    assert visited == [sum(int(together[number[token]]) for token in weights) for _, weights in asked[:5]]
    assert together.sum() == point.postings
    everything = [np.mean([sum(together[number[token]] for token in weights) for _, weights in asked])]
    assert everything == [pytest.approx(point.visited)]


def judged_order(queries: list[Any]) -> list[str]:
    """Return the query ids in the order of a point's values."""
    return sorted((query.id for query in queries), key=lambda name: hashlib.sha256(name.encode()).digest())


def check_like_predicted(found: dict[str, float], point: Any, order: list[str]) -> None:
    """Check that each query has the predicted quality, except for ties at the cutoff of 10."""
    same = [found[query_id] == value for query_id, value in zip(order, point.per_query.tolist(), strict=True)]
    assert len(same) - sum(same) <= point.tied <= len(same) // 5


def _count(client: Client, index: str, token: str) -> int:
    body = {"size": 0, "track_total_hits": True, "query": client.dialect.tokens_clause("sparse", {token: 1.0})}
    return int(client.call("POST", f"/{index}/_search", body)["hits"]["total"]["value"])


def test_predicted_posting_bytes_match_the_index(
    plan_inputs: Made, judged: PlanReport, client: Client, index_name: str
) -> None:
    run, _, _ = plan_inputs
    rules: list[dict[str, Any]] = [{}, {"max_ratio": 0.2}, {"top_k": 6}]
    measured, predicted = [], []
    for number, rule in enumerate(rules):
        into(client, f"{index_name}-{number}", run, rule)
        measured.append(posting_file_bytes(client, f"{index_name}-{number}"))
        predicted.append(next(point.bytes for point in judged.points if point.documents == rule) if number < 2 else
                         _predicted(run, rule))  # fmt: skip
    # Compare differences, because the files also hold the words of titles and texts.
    for place in (1, 2):
        assert predicted[0] - predicted[place] == pytest.approx(measured[0] - measured[place], rel=0.1)


def _predicted(run: Any, rule: dict[str, Any]) -> int:
    counts = np.zeros(len(run.vocabulary()), dtype=np.int64)
    for shard in run.done_shards():
        for vectors in read_shard_vectors(run.shard_path(shard)):
            counts += np.bincount(prune(vectors, **rule).token_ids, minlength=len(counts))
    return round(posting_bytes(counts, DOCUMENTS))


def test_without_judgments_quality_is_recall_of_the_ground_truth(plan_inputs: Made, unjudged: PlanReport) -> None:
    (run, queries, _), report = plan_inputs, unjudged
    assert (report.quality, report.full_quality) == ("overlap@10", 1.0)
    assert report.points[0].loss == 0 and report.points[0].overlap_100 == 1.0
    assert report.choice
    point, whole = report.choice.point, list(many_query_weights(queries, Pipeline(model=report.pipeline.model)))
    # Any document with the score at the cutoff is correct.
    truth = [
        {doc_id for doc_id, score in zip(one.doc_ids, one.scores, strict=True) if score >= one.scores[:10][-1]}
        for one in rank_run(run, whole, size=100, stored=True)
    ]
    pruned = rank_run(
        run, list(many_query_weights(queries, report.pipeline)), size=10, stored=True,
        prune=lambda vectors: prune(vectors, **point.documents),
    )  # fmt: skip
    shares = [len(right.intersection(one.doc_ids)) / 10 for right, one in zip(truth, pruned, strict=True)]
    assert np.mean(shares) == pytest.approx(point.overlap_10)


@pytest.fixture
def few_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure two values of each parameter of an engine: all of them take 10 s."""
    few = {name: {key: values[:2] for key, values in tried.items()} for name, tried in engines._TRIED.items()}
    monkeypatch.setattr(engines, "_TRIED", few)


def plan_of_index(plan_inputs: Made, client: Client, index_name: str, kind: Any) -> PlanReport:
    """Plan an index, and check what holds for every kind of field: its engines are measured, and one is chosen."""
    run, queries, qrels = plan_inputs
    rule = {"max_ratio": 0.03, "top_k": 40}
    into(client, index_name, run, rule, kind)
    report = plan(
        run.path, queries[:10], pipeline=Pipeline(), qrels=qrels, index=index_name,
        connection=Connection(client.address), loss=0.3,
    )  # fmt: skip
    # A sparse_vector field offers no exact search, so the baseline is exact search of the run.
    measured = [point for point in report.settings if kind == "rank_features" or point.engine != "exact"]
    assert len(report.settings) - len(measured) == (kind == "sparse_vector")
    assert all(point.documents == rule for point in report.settings)
    assert all(point.latency_p50_ms for point in measured)
    assert report.choice and report.choice.point in measured
    table = drawing.as_text(report).split("\n\n")[1]
    # A star marks the chosen row, which depends on latencies.
    rows = [line.replace("*", " ").split() for line in table.splitlines()]
    assert len([row for row in rows if row[5:7] == ["all", "exact"]]) == 1, table
    assert report.pipeline.index.kind == kind and changed(report.pipeline.load) == rule
    assert report.choice.point.latency_p50_ms == min(
        point.latency_p50_ms for point in report.settings if point == report.choice.point
    )
    return report


@pytest.mark.usefixtures("few_settings")
@pytest.mark.both_products(quick=False)
def test_an_index_is_planned_with_the_engines_of_its_product(
    plan_inputs: Made, client: Client, index_name: str
) -> None:
    report = plan_of_index(plan_inputs, client, index_name, "rank_features")
    assert {point.engine for point in report.settings} == {*engines_of("rank_features", client.dialect.product)}
    exact = next(point for point in report.settings if point.engine == "exact" and not point.query)
    offline = next(point for point in report.points if point.documents == exact.documents and not point.query)
    assert exact.tied == offline.tied
    differs = np.flatnonzero(exact.per_query != offline.per_query)
    assert len(differs) <= offline.tied
    assert abs(exact.overlap_10 - offline.overlap_10) <= 0.1 * offline.tied / 10


@pytest.mark.usefixtures("few_settings")
def test_an_index_of_a_sparse_vector_field_is_planned_with_seismic(
    plan_inputs: Made, client: Client, index_name: str
) -> None:
    report = plan_of_index(plan_inputs, client, index_name, "sparse_vector")
    assert {point.engine for point in report.settings} == {"seismic", "exact"}
    chosen = report.pipeline.query
    assert chosen.engine == "seismic" and chosen.seismic.keys() == {"top_n", "heap_factor", "k"}


def test_a_plan_of_every_engine_is_drawn(judged: PlanReport) -> None:
    first = judged.points[0]
    measured = [replace(first, engine=name, latency_p50_ms=1.0 + place) for place, name in enumerate(ENGINES)]
    drawn = drawing.as_png(replace(judged, settings=measured, settings_frontier=[0], choice=None))
    assert drawn.startswith(b"\x89PNG")


def test_a_hybrid_plan_measures_query_pruning_within_hybrid_search(
    plan_inputs: Made, client: Client, index_name: str
) -> None:
    run, queries, qrels = plan_inputs[0], plan_inputs[1][:10], plan_inputs[2]
    into(client, index_name, run, {})
    how: dict[str, Any] = {"pipeline": Pipeline(), "qrels": qrels, "loss": 0.3}
    how |= {"hybrid": True, "hybrid_weights": [0.2, 0.8]}
    report = plan(run.path, queries, index=index_name, connection=Connection(client.address), **how)
    rules = [point.query for point in report.settings]
    assert rules[0] == {} and len(rules) > 8 and {point.engine for point in report.settings} == {"exact"}
    assert report.settings[0].loss == 0 and report.settings[0].overlap_10 == 1
    assert report.hybrid == {"hybrid": True, "hybrid_weights": [0.2, 0.8]}
    # The quality is that of a hybrid search of the index, for unpruned queries and for the choice.
    assert report.choice
    for pipeline, quality in (
        (Pipeline(query=QuerySettings(hybrid=True, hybrid_weights=(0.2, 0.8))), report.full_quality),
        (replace(report.pipeline, model=ModelSettings()), report.choice.point.ndcg_10),
    ):
        with open_index(index_name, url=client.address, pipeline=pipeline) as opened:
            found = measure(opened.rank(queries, k=10), qrels, ["nDCG@10"]).mean["nDCG@10"]
        assert found == pytest.approx(quality)
    assert "nDCG@10 of hybrid search with unpruned queries" in drawing.as_text(report)
    with pytest.raises(UsageError, match="hybrid applies to --index only"):
        plan(run.path, queries, **how)


def test_an_index_of_another_run_is_refused(plan_inputs: Made, client: Client, index_name: str, tmp_path: Path) -> None:
    run, queries, _ = plan_inputs
    into(client, index_name, make_run(tmp_path / "other", model=run.manifest.model["document"]), {})
    with pytest.raises(
        ClusterError, match=f"was loaded from run .*, but the plan is for run {run.manifest.run_id[:8]}"
    ):
        plan(run.path, queries, pipeline=Pipeline(), index=index_name, connection=Connection(client.address))


def test_the_files_hold_the_plan_and_load_nothing(judged: PlanReport, files: Path) -> None:
    assert (files / "plan.png").read_bytes().startswith(b"\x89PNG")
    page = (files / "plan.html").read_text()
    # No URL except XML namespaces, and nothing that would load one.
    assert not re.search(r"(src|href)=\"(?!#)", page) and "url(http" not in page and "@import" not in page
    assert page.count("<svg") == 1 and "class=taken" in page
    stored = json.loads((files / "plan.json").read_text())
    inside = re.search(r'<script type="application/json" id="plan">(.*?)</script>', page, re.DOTALL)
    assert inside and json.loads(inside[1]) == stored == json.loads(json.dumps(judged.to_dict()))


def test_existing_files_are_not_overwritten(judged: PlanReport, tmp_path: Path) -> None:
    (tmp_path / "pipeline.toml").write_text("mine")
    with pytest.raises(UsageError, match="pipeline.toml already exists"):
        outputs.write_outputs(judged, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline.toml"]


def test_the_pipeline_file_holds_the_chosen_settings(judged: PlanReport, files: Path) -> None:
    assert judged.choice
    point, read = judged.choice.point, read_pipeline(str(files / "pipeline.toml"))
    assert read == judged.pipeline
    assert changed(read.load) == dict(point.documents) and changed(read.encode) == {}
    query = {"top_k": read.query.top_k, "max_ratio": read.query.max_ratio}
    assert {name: value for name, value in query.items() if value is not None} == dict(point.query)


def test_the_frontier_holds_points_that_no_other_dominates(judged: PlanReport) -> None:
    best = [judged.points[place] for place in judged.frontier]
    for point in best:
        for other in judged.points:
            pairs = [(other.loss, point.loss), (other.bytes, point.bytes), (other.visited, point.visited)]
            assert not (all(one <= two for one, two in pairs) and any(one < two for one, two in pairs))
    assert judged.choice and judged.choice.point in best


def test_the_table_shows_ten_rows_with_the_choice_and_the_baseline(judged: PlanReport, unjudged: PlanReport) -> None:
    assert len(unjudged.frontier) > 20 and unjudged.frontier[0] == 0
    assert 0 not in judged.frontier  # unpruned vectors lose nothing, but others find more
    for report, every, rows in (
        (unjudged, False, 10), (unjudged, True, len(unjudged.frontier)), (judged, True, 1 + len(judged.frontier)),
        (replace(unjudged, choice=None), False, 10), (replace(judged, choice=None), True, 1 + len(judged.frontier)),
    ):  # fmt: skip
        heading, headings, *table = drawing.as_text(report, every=every).split("\n\n")[0].splitlines()
        assert heading == "Pruning" and "MB of postings" in headings
        assert table.pop().endswith("more rows: --all") if not every else "--all" not in table[-1]
        assert len(table) == rows
        assert [line.split()[3] for line in table if line.split()[:3] == ["all", "all", "exact"]] == ["0.00%"]
        starred = [line for line in table if line.startswith("* ")]
        assert len(starred) == (report.choice is not None)
        assert report.choice is None or rule_text(report.choice.point.documents) in starred[0]


def test_the_message_without_a_choice_is_correct(judged: PlanReport) -> None:
    none = replace(judged, choice=None, unsettled=None)
    assert drawing.as_text(none).endswith("No cheaper setting is certain to stay within 5%: keep unpruned vectors.")
    hopeless = replace(none, points=[max(judged.points, key=lambda point: point.loss)], frontier=[0], allowed_loss=0.01)
    assert drawing.as_text(hopeless).endswith("No setting keeps the loss within 1%.")


def test_the_chart_has_a_title_and_its_legend_outside_the_points(judged: PlanReport) -> None:
    figure = drawing._figure(judged)
    figure.draw_without_rendering()
    [axes], [legend] = figure.axes, figure.legends
    assert "documents" in axes.get_title() and axes.get_legend() is None
    assert legend.get_window_extent().x0 >= axes.get_window_extent().x1
    assert {"chosen", "loss of 5%", "documents: all"} <= {text.get_text() for text in legend.get_texts()}


@pytest.mark.parametrize(
    ("queries", "qrels", "message"),
    [
        (5, None, "Found 5 queries with a weighted token; .* needs at least 10"),
        (40, {}, "Found 0 queries with relevance judgments"),
        (
            40,
            {f"q{number}": {"unknown": 1} for number in range(40)},
            "among the first 10. Give queries and judgments of the corpus that was encoded",
        ),
    ],
)
def test_unusable_queries_are_refused(plan_inputs: Made, queries: int, qrels: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan(plan_inputs[0].path, plan_inputs[1][:queries], pipeline=Pipeline(), qrels=qrels)


def test_the_command_writes_the_files_and_prints_the_plan(plan_inputs: Made, tmp_path: Path) -> None:
    run, queries, qrels = plan_inputs
    (tmp_path / "queries.tsv").write_text("".join(f"{query.id}\t{query.text}\n" for query in queries))
    answer = command("plan", run.path, "--queries", tmp_path / "queries.tsv", "--json", "--loss", "0.2",
                     "--out", tmp_path / "out")  # fmt: skip
    assert answer.code == 0, answer.err
    report = json.loads(answer.out)
    check("plan", report)
    assert report["choice"]["point"]["loss"] <= 0.2 and report["run_id"] == run.manifest.run_id
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(outputs.NAMES)


def test_missing_matplotlib_names_the_extra(
    judged: PlanReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match='"evaluate"'):
        outputs.write_outputs(judged, tmp_path / "out")
    assert not (tmp_path / "out").exists()
