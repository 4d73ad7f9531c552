"""A plan as text tables, a PNG, and a self-contained HTML page. Writing them to files: outputs.py."""

from __future__ import annotations

import html
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from string import Template
from typing import Any

from sparse_ingest.errors import needs_extra
from sparse_ingest.pipeline import in_words as settings_in_words
from sparse_ingest.planning.options import MOST_QUERIES
from sparse_ingest.planning.report import PlanReport, Point
from sparse_ingest.planning.sweep import rule_text
from sparse_ingest.reporting import aligned

SHOWN_LOSS = 0.1  # a short table omits points that lose more
SHOWN_ROWS = 10

# Heading, attribute of a point, format. Bytes are shown in MB.
_NUMBERS = (
    ("loss", "loss", ".2%"), ("nDCG@10", "ndcg_10", ".4f"), ("overlap@10", "overlap_10", ".4f"),
    ("overlap@100", "overlap_100", ".4f"), ("terms/document", "terms", ".1f"), ("MB of postings", "bytes", ".2f"),
    ("MB of index", "index_bytes", ".2f"), ("postings/query", "visited", ",.0f"),
    ("p50 ms", "latency_p50_ms", ".2f"), ("p95 ms", "latency_p95_ms", ".2f"),
)  # fmt: skip

_COLORS = {"all": "black", "top_k": "tab:blue", "max_ratio": "tab:orange", "alpha_mass": "tab:green",
            "exact": "black", "two-phase": "tab:red", "seismic": "tab:purple", "pruned": "tab:brown"}  # fmt: skip


def sentences(report: PlanReport) -> Iterator[str]:
    """Yield the result of a plan as sentences."""
    what, how = ("unpruned vectors", "exact search with 9-bit weights")
    if report.hybrid:
        what, how = ("hybrid search with unpruned queries", settings_in_words(report.hybrid))
    full = f"{report.quality} of {what}: {report.full_quality:.4f}"
    yield f"{report.documents:,} documents, {report.queries} queries; {full}, {how}."
    if report.index_bytes is not None:
        postings = next((point.bytes for point in report.settings if point.bytes is not None), None)
        share = "" if postings is None else f", about {postings / 1e6:,.2f} MB of it postings"
        yield f"Index {report.index} is {report.index_bytes / 1e6:,.2f} MB{share}."
    allowed, choice, doubt = f"{report.allowed_loss * 100:g}%", report.choice, report.unsettled
    points = report.settings or report.points
    if choice is None and all(point.loss > report.allowed_loss for point in points):
        yield f"No setting keeps the loss within {allowed}."
    elif choice is None:
        kept = "" if report.settings else ": keep unpruned vectors"
        yield f"No cheaper setting is certain to stay within {allowed}{kept}."
    else:
        yield f"Chosen: {_named(choice.point)}. " + (
            "Nothing is pruned, so nothing is lost."
            if choice.point.is_lossless
            else f"It loses {choice.loss:.2%} ({_interval(choice.interval)}) on the half of the queries that confirmed "
            f"the choice, {choice.chosen_by:.2%} on the other."
        )
        if choice.passed_over:
            cheaper = "setting was" if choice.passed_over == 1 else "settings were"
            yield f"{choice.passed_over} cheaper {cheaper} not confirmed; each of them widens the interval."
        if choice.point.tied:
            yield f"In {choice.point.tied} queries, more documents have the tenth best score than an index returns."
        if choice.point.emptied:
            yield f"{choice.point.emptied:,} documents have no terms left: no sparse query finds them."
    if doubt:
        most = f"; at most {MOST_QUERIES:,}" if doubt.sample > MOST_QUERIES else ""
        yield (
            f"Not certain: {_named(doubt.point)}. It loses {doubt.point.loss:.2%} on all queries, {doubt.loss:.2%} "
            f"({_interval(doubt.interval)}) on one half. About {doubt.sample:,} queries would settle it "
            f"(--sample{most})."
        )


def _named(point: Point) -> str:
    engine = ", ".join([point.engine, *_parameters(point)])
    return f"documents {rule_text(point.documents)}, queries {rule_text(point.query)}, {engine}"


def _interval(interval: tuple[float, float]) -> str:
    return f"95%: {interval[0]:.2%} to {interval[1]:.2%}"


def table(
    report: PlanReport, points: Sequence[Point], best: Sequence[int], most: int | None = None
) -> tuple[list[list[str]], list[bool], int]:
    """Return headings and rows of a frontier, which row is the chosen point, and how many rows are omitted.

    The first point of exact search with unpruned queries and the chosen point are always included. With `most`, the
    other rows are evenly spaced among those with a small loss.
    """
    exact = next((place for place, point in enumerate(points) if point.engine == "exact" and not point.query), None)
    taken = points.index(report.choice.point) if report.choice and report.choice.point in points else None
    fixed = {place for place in (exact, taken) if place is not None}
    places = [place for place in best if place not in fixed]
    total = len(places)
    if most is not None:
        small = [place for place in places if points[place].loss <= max(SHOWN_LOSS, report.allowed_loss)] or places
        step = max(1.0, len(small) / (most - len(fixed)))
        places = [small[int(number * step)] for number in range(min(len(small), most - len(fixed)))]
    rows = sorted({*places, *fixed}, key=lambda place: points[place].loss)
    headings = ["documents", "queries", "engine", *(heading for heading, _, _ in _NUMBERS)]
    cells = [_cells(points[place]) for place in rows]
    columns = [column for column in zip(headings, *cells, strict=True) if any(column[1:])]
    return [list(row) for row in zip(*columns, strict=True)], [place == taken for place in rows], total - len(places)


def _cells(point: Point) -> list[str]:
    engine = point.engine + (f" ({', '.join(_parameters(point))})" if point.parameters else "")
    cells = [rule_text(point.documents), rule_text(point.query), engine]
    for _, name, form in _NUMBERS:
        value = getattr(point, name)
        if value is not None and name.endswith("bytes"):
            value /= 1e6
        cells.append("" if value is None else format(value, form))
    return cells


def _parameters(point: Point) -> list[str]:
    return [f"{name} {value:g}" for name, value in point.parameters.items()]


def as_text(report: PlanReport, *, every: bool = False) -> str:
    """Return the frontiers as tables, of `SHOWN_ROWS` rows each unless `every` is set, and the choice as sentences."""
    blocks = []
    for heading, points, best in _frontiers(report):
        (head, *rows), taken, omitted = table(report, points, best, None if every else SHOWN_ROWS)
        lines = zip([False, *taken], aligned([head, *rows]), strict=True)
        block = [heading, *(("* " if is_taken else "  ") + line for is_taken, line in lines)]
        if omitted:
            block.append(f"  {omitted} more rows: --all")
        blocks.append("\n".join(block))
    return "\n\n".join([*blocks, "\n".join(sentences(report))])


def as_png(report: PlanReport) -> bytes:
    """Plot the frontier."""
    file = io.BytesIO()
    _figure(report).savefig(file, format="png", dpi=120)
    return file.getvalue()


def as_html(report: PlanReport) -> str:
    """Return a page with plot, tables and all numbers, which loads nothing else."""
    file = io.StringIO()
    _figure(report).savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    drawing = file.getvalue()
    drawing = drawing[drawing.index("<svg") :]  # without XML declaration and DTD
    tables = ""
    for heading, points, best in _frontiers(report):
        (head, *rows), taken, _ = table(report, points, best)
        escaped = [[html.escape(cell) for cell in row] for row in rows]
        body = "".join(
            f"<tr{' class=taken' if is_taken else ''}><td>{'</td><td>'.join(row)}</td></tr>\n"
            for row, is_taken in zip(escaped, taken, strict=True)
        )
        columns = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
        tables += f"<h2>{html.escape(heading)}</h2>\n<table><tr>{columns}</tr>\n{body}</table>\n"
    return Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8")).substitute(
        title=html.escape(f"Plan of {report.run}"),
        paragraphs="".join(f"<p>{html.escape(line)}</p>" for line in sentences(report)),
        drawing=drawing,
        tables=tables,
        # "<" could start a tag or comment in the element.
        numbers=json.dumps(report.to_dict()).replace("<", "\\u003c"),
    )


def _frontiers(report: PlanReport) -> Iterator[tuple[str, Sequence[Point], Sequence[int]]]:
    yield "Pruning", report.points, report.frontier
    if report.settings:
        yield f"Engines of {report.index}", report.settings, report.settings_frontier


def charted(report: PlanReport) -> tuple[Sequence[Point], Sequence[int], str, str]:
    """Return the points of the chart, their frontier, and name and label of their cost.

    They are the engines of an index if these were measured, otherwise pruning rules.
    """
    if report.settings:
        return report.settings, report.settings_frontier, "latency_p50_ms", "latency of a query, p50, ms"
    return report.points, report.frontier, "visited", "postings visited by a query"


def best_at_cost(points: Iterable[Point], cost: str) -> list[tuple[float, float]]:
    """Return cost and kept quality of the points that keep more than all cheaper ones, cheapest first."""
    line: list[tuple[float, float]] = []
    for value, kept in sorted((found, 1 - one.loss) for one in points if (found := getattr(one, cost)) is not None):
        if not line or kept > line[-1][1]:
            line.append((value, kept))
    return line


def figure_class() -> Any:
    """Return matplotlib's `Figure`, or raise `MissingExtraError`."""
    with needs_extra("evaluate", "Drawing a plan"):
        from matplotlib.figure import Figure
    return Figure


def _figure(report: PlanReport) -> Any:
    """Plot quality against cost: latency for an index, otherwise postings visited."""
    points, best, cost, label = charted(report)
    title = f"Engines of index {report.index}" if report.settings else "Pruning of documents and queries"
    figure = figure_class()(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    axes.set_title(f"{title}: {report.documents:,} documents, {report.queries} queries")
    axes.set_xlabel(label)
    axes.set_ylabel(f"{report.quality}, relative to unpruned vectors")
    known = [point for point in points if getattr(point, cost) is not None]
    _draw(axes, known, [points[place] for place in best], cost, report)
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


def _draw(axes: Any, points: Sequence[Point], best: Sequence[Point], cost: str, report: PlanReport) -> None:
    """Draw all points by kind, the frontier as a line, the allowed loss, and the chosen point."""
    kinds: dict[str, list[tuple[float, float]]] = {}
    for point in points:
        kind = point.engine if report.settings else f"documents: {next(iter(point.documents), 'all')}"
        kinds.setdefault(kind, []).append((getattr(point, cost), 1 - point.loss))
    for kind, places in kinds.items():
        axes.scatter(*zip(*places, strict=True), s=12, alpha=0.6, color=_COLORS[kind.split()[-1]], label=kind)
    line = zip(*best_at_cost(best, cost), strict=True)
    axes.step(*line, where="post", color="gray", linewidth=1, label="best at this cost")
    allowed = f"loss of {report.allowed_loss * 100:g}%"
    axes.axhline(1 - report.allowed_loss, color="gray", linestyle=":", linewidth=1, label=allowed)
    if report.choice and (value := getattr(report.choice.point, cost)) is not None:
        place = [value], [1 - report.choice.point.loss]
        axes.scatter(*place, s=120, facecolors="none", edgecolors="red", label="chosen")
    heights = [kept for places in kinds.values() for _, kept in places]
    axes.set_ylim(max(min(heights), 1 - 3 * max(SHOWN_LOSS, report.allowed_loss)) - 0.01, max(heights) + 0.01)
