"""The choice: the cheapest that both halves of the queries allow, and what no point beats."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from sparse_ingest.pipeline import EncodeSettings, IndexSettings, ModelSettings, Pipeline, QuerySettings, read_pipeline
from sparse_ingest.planning.outputs import pipeline_text
from sparse_ingest.planning.report import Choice, Point, choose, frontier, loss_of

FULL = np.full(40, 0.5)


def point(cost: int, first: float, second: float) -> Point:
    """A point that loses so much on the half that chooses, and so much on the other."""
    values = FULL.copy()
    values[::2] *= 1 - first
    values[1::2] *= 1 - second
    return Point(
        documents={"top_k": cost}, query={}, engine="exact", parameters={}, overlap_10=1.0, overlap_100=1.0,
        ndcg_10=None, terms=1.0, postings=cost, emptied=0, bytes=cost, visited=float(cost), tied=0, latency_p50_ms=None,
        latency_p95_ms=None, loss=loss_of(values, FULL), per_query=values,
    )  # fmt: skip


def taken(*points: Point, loss: float = 0.02) -> Choice | None:
    return choose(points, FULL, loss=loss, cost=lambda one: one.postings)


def test_the_cheapest_within_the_loss_is_taken() -> None:
    choice = taken(point(9, 0, 0), point(3, 0.01, 0.015), point(5, 0.0, 0.0), point(1, 0.3, 0.3))
    assert choice and choice.point.postings == 3
    assert (round(choice.chosen_by, 6), round(choice.loss, 6), choice.passed_over) == (0.01, 0.015, 0)


def test_what_the_other_half_does_not_confirm_is_passed_over_and_counted() -> None:
    choice = taken(point(1, 0.0, 0.5), point(2, 0.019, 0.021), point(3, 0.0, 0.02 - 1e-9))
    assert choice and (choice.point.postings, choice.passed_over) == (3, 2)


def test_nothing_is_taken_when_nothing_is_within_the_loss() -> None:
    assert taken(point(1, 0.1, 0.0), point(2, 0.0, 0.1)) is None


def test_the_interval_grows_with_the_spread_and_with_every_look() -> None:
    narrow = taken(point(1, 0.01, 0.01))
    assert narrow and narrow.interval[0] < 0.01 < narrow.interval[1]
    spread = point(2, 0.0, 0.0)
    spread.per_query[1::4] *= 1.2
    spread.per_query[3::4] *= 0.8
    wide, wider = taken(spread), taken(point(1, 0.0, 0.5), spread)
    assert wide and wide.interval[0] < -0.02 < wide.loss < 0.02 < wide.interval[1]
    assert wider and wider.passed_over == 1 and wider.interval[1] > 1.1 * wide.interval[1]


def test_the_interval_holds_the_true_loss_also_after_many_looks() -> None:
    random = np.random.default_rng(3)
    true = np.linspace(0.0, 0.08, 60)
    missed, looks = [], []
    for _ in range(200):
        full = random.uniform(0.3, 1.0, 40)
        points = []
        for cost, share in zip(range(60, 0, -1), true, strict=True):
            # Each of the ten best documents is lost with that probability.
            values = full * (1 - random.binomial(10, share, 40) / 10)
            points.append(replace(point(cost, 0, 0), loss=loss_of(values, full), per_query=values))
        choice = choose(points, full, loss=0.02, cost=lambda one: one.postings)
        assert choice
        missed.append(not choice.interval[0] <= true[60 - choice.point.postings] <= choice.interval[1])
        looks.append(choice.passed_over)
    # A twentieth, and two deviations of the mean of 200; as if each look were the first it would be a fifth.
    assert np.mean(missed) <= 0.08 and np.mean(looks) > 1


def test_a_point_that_is_beaten_in_everything_is_no_part_of_the_frontier() -> None:
    best, cheap, beaten = point(9, 0, 0), point(1, 0.5, 0.5), point(9, 0.1, 0.1)
    assert frontier([beaten, cheap, best]) == [best, cheap]
    quick = replace(beaten, latency_p50_ms=1.0)
    slow = [replace(one, latency_p50_ms=2.0) for one in (best, cheap)]
    assert frontier([quick, *slow]) == [slow[0], quick, slow[1]]
    assert frontier([]) == []


def test_a_pipeline_file_says_what_is_not_the_default_and_is_read_back(tmp_path: Path) -> None:
    model = ModelSettings(document="package:cognition/model", query_prompt="", document_prompt='a "b"\n\x7f\\é')
    pipeline = Pipeline(
        model, EncodeSettings(alpha_mass=0.95), query=QuerySettings(engine="two-phase", two_phase={"prune_ratio": 0.4})
    )
    (tmp_path / "p.toml").write_text(pipeline_text(pipeline, ["why", ""]))
    assert read_pipeline(str(tmp_path / "p.toml")) == pipeline
    assert (tmp_path / "p.toml").read_text().startswith("# why\n#\n\n[model]\n")
    assert "[index]" not in (tmp_path / "p.toml").read_text()
    typed = Pipeline(index=IndexSettings(fields={"a.b": "float", 'c "d"': "date"}))
    (tmp_path / "p.toml").write_text(pipeline_text(typed, []))
    assert read_pipeline(str(tmp_path / "p.toml")) == typed


def test_a_path_in_a_pipeline_file_is_that_folder_from_anywhere(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/p.toml").write_text(pipeline_text(Pipeline(ModelSettings(document=str(model))), []))
    assert read_pipeline(str(tmp_path / "out/p.toml")).model.document == str(model)
