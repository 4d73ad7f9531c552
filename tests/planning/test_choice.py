"""The choice of a plan: the cheapest setting that both halves of the queries allow and no other setting dominates."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from sparse_ingest.pipeline import (
    EncodeSettings,
    IndexSettings,
    ModelSettings,
    Pipeline,
    Pruning,
    QuerySettings,
    read_pipeline,
)
from sparse_ingest.planning.outputs import pipeline_text
from sparse_ingest.planning.report import Choice, Point, choose, frontier, loss_of, unsettled

FULL = np.full(40, 0.5)


def point(cost: int, first: float, second: float) -> Point:
    """Return a point with one loss on the half of the queries that chooses and another on the half that confirms."""
    values = FULL.copy()
    values[::2] *= 1 - first
    values[1::2] *= 1 - second
    return Point(
        documents={"top_k": cost}, query={}, engine="exact", parameters={}, overlap_10=1.0, overlap_100=1.0,
        ndcg_10=None, terms=1.0, postings=cost, emptied=0, bytes=cost, visited=float(cost), tied=0,
        loss=loss_of(values, FULL), per_query=values,
    )  # fmt: skip


WHOLE = replace(point(99, 0, 0), documents={})


def cost(point: Point) -> float:
    return point.postings


def chosen(*points: Point, loss: float = 0.03) -> Choice | None:
    return choose(points, FULL, loss=loss, cost=cost)


def test_the_cheapest_within_the_loss_is_chosen() -> None:
    choice = chosen(point(9, 0, 0), point(3, 0.01, 0.015), point(5, 0.0, 0.0), point(1, 0.3, 0.3))
    assert choice and choice.point.postings == 3
    assert (round(choice.chosen_by, 6), round(choice.loss, 6), choice.passed_over) == (0.01, 0.015, 0)


def test_points_that_the_other_half_does_not_confirm_are_skipped_and_counted() -> None:
    choice = chosen(point(1, 0.0, 0.5), point(2, 0.015, 0.031), point(3, 0.0, 0.015))
    assert choice and (choice.point.postings, choice.passed_over) == (3, 1)


def test_nothing_is_chosen_if_nothing_is_within_the_loss() -> None:
    assert chosen(point(1, 0.1, 0.0), point(2, 0.0, 0.1)) is None


def test_a_point_whose_interval_exceeds_the_loss_is_not_confirmed() -> None:
    doubtful = point(2, 0.01, 0.01)
    doubtful.per_query[:] *= np.tile([1.3, 1.3, 0.7, 0.7], 10)
    choice = chosen(doubtful, WHOLE)
    assert choice and choice.point == WHOLE and choice.interval == (0, 0)
    rest = unsettled([doubtful, WHOLE], FULL, choice, loss=0.03, cost=cost)
    assert rest and rest.point == doubtful and rest.interval[1] > 0.03
    # More queries of the same kind confirm it.
    times = -(-rest.sample // len(FULL))
    many = replace(doubtful, per_query=np.tile(doubtful.per_query, times))
    choice = choose([many, WHOLE], np.tile(FULL, times), loss=0.03, cost=cost)
    assert choice and choice.point == many
    half = replace(doubtful, per_query=np.tile(doubtful.per_query, times // 2))
    assert choose([half], np.tile(FULL, times // 2), loss=0.03, cost=cost) is None


def test_points_that_cost_or_lose_more_are_not_unsettled() -> None:
    choice = chosen(point(3, 0.01, 0.01), WHOLE)
    assert unsettled([point(1, 0.03, 0.04), point(3, 0.01, 0.01), point(5, 0, 0), WHOLE], FULL, choice, loss=0.03,
                     cost=cost) is None  # fmt: skip


def test_a_dominated_point_is_never_chosen() -> None:
    # Equal cost and loss on the half that chooses; the other point visits less and keeps more.
    better = replace(point(4, 0.0, 0.0), documents={"max_ratio": 0.1}, visited=3.0)
    choice = choose([point(4, 0.0, 0.001), better], FULL, loss=0.03, cost=lambda one: one.bytes or 0)
    assert choice and choice.point == better
    # Unpruned vectors lose nothing, but here a cheaper setting finds more.
    gains = replace(point(50, 0, 0), loss=-0.2)
    gains.per_query[:] *= np.tile([1.9, 0.5], 20)
    assert chosen(WHOLE, gains) is None


def test_the_interval_grows_with_the_spread_and_with_the_number_of_tests() -> None:
    narrow = chosen(point(1, 0.01, 0.01))
    assert narrow and narrow.interval[0] < 0.01 < narrow.interval[1]
    spread = point(2, 0.0, 0.0)
    spread.per_query[1::4] *= 1.2
    spread.per_query[3::4] *= 0.8
    wide, wider = chosen(spread, loss=0.2), chosen(point(1, 0.0, 0.5), spread, loss=0.2)
    assert wide and wide.interval[0] < -0.02 < wide.loss < 0.02 < wide.interval[1]
    assert wider and wider.passed_over == 1 and wider.interval[1] > 1.1 * wide.interval[1]


def test_a_loss_that_is_too_large_is_rarely_confirmed() -> None:
    random = np.random.default_rng(3)
    true = np.linspace(0.0, 0.08, 60)
    missed, wrong, looks = [], [], []
    for _ in range(200):
        full = random.uniform(0.3, 1.0, 100)
        points = []
        for postings, share in zip(range(60, 0, -1), true, strict=True):
            # Each of the 10 best documents is lost with that probability.
            values = full * (1 - random.binomial(10, share, 100) / 10)
            points.append(replace(point(postings, 0, 0), loss=loss_of(values, full), per_query=values))
        choice = choose(points, full, loss=0.04, cost=cost)
        assert choice
        lost = true[60 - choice.point.postings]
        missed.append(not choice.interval[0] <= lost <= choice.interval[1])
        wrong.append(lost > 0.04)
        looks.append(choice.passed_over)
    # 5%, and two standard deviations of the mean of 200.
    assert np.mean(missed) <= 0.08 and np.mean(wrong) <= 0.08 and np.mean(looks) > 0.2


def test_a_dominated_point_is_not_on_the_frontier() -> None:
    best, cheap, beaten = point(9, 0, 0), point(1, 0.5, 0.5), point(9, 0.1, 0.1)
    assert frontier([beaten, cheap, best, best]) == [best, cheap]
    quick = replace(beaten, latency_p50_ms=1.0)
    slow = [replace(one, latency_p50_ms=2.0) for one in (best, cheap)]
    assert frontier([quick, *slow]) == [slow[0], quick, slow[1]]
    # A quantity measured for only some points is not compared.
    unseen = replace(best, visited=None)
    assert frontier([unseen, replace(beaten, visited=1.0)]) == [unseen]
    assert frontier([]) == []


def test_a_pipeline_file_holds_non_default_settings_and_can_be_read(tmp_path: Path) -> None:
    model = ModelSettings(document="package:cognition/model", query_prompt="", document_prompt='a "b"\n\x7f\\é')
    pipeline = Pipeline(
        model, EncodeSettings(alpha_mass=0.95), query=QuerySettings(engine="two-phase", two_phase={"prune_ratio": 0.4}),
        load=Pruning(top_k=9),
    )  # fmt: skip
    (tmp_path / "p.toml").write_text(pipeline_text(pipeline, ["why", ""]))
    assert read_pipeline(str(tmp_path / "p.toml")) == pipeline
    assert (tmp_path / "p.toml").read_text().startswith("# why\n#\n\n[model]\n")
    assert "[index]" not in (tmp_path / "p.toml").read_text()
    typed = Pipeline(index=IndexSettings(fields={"a.b": "float", 'c "d"': "date"}))
    (tmp_path / "p.toml").write_text(pipeline_text(typed, []))
    assert read_pipeline(str(tmp_path / "p.toml")) == typed


def test_a_model_path_in_a_pipeline_file_is_absolute(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/p.toml").write_text(pipeline_text(Pipeline(ModelSettings(document=str(model))), []))
    assert read_pipeline(str(tmp_path / "out/p.toml")).model.document == str(model)
