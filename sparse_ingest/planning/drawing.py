"""A plan as pictures and as text: a table, a PNG, and one HTML page that needs nothing but itself.

In: a `PlanReport`. Out: lines, bytes. matplotlib draws, and is imported for that only.
Not covered: writing files (outputs.py).
"""

from __future__ import annotations

import html
import io
import json
from collections.abc import Iterator, Sequence
from typing import Any

from sparse_ingest.errors import needs_extra
from sparse_ingest.planning.report import PlanReport, Point
from sparse_ingest.planning.rules import in_words
from sparse_ingest.reporting import aligned

SHOWN_LOSS = 0.1  # a table leaves out what loses more

# Heading, attribute of a point, format.
_NUMBERS = (
    ("loss", "loss", ".2%"), ("nDCG@10", "ndcg_10", ".4f"), ("overlap@10", "overlap_10", ".4f"),
    ("overlap@100", "overlap_100", ".4f"), ("terms", "terms", ".1f"), ("MB", "megabytes", ".2f"),
    ("visited", "visited", ",.0f"), ("p50 ms", "latency_p50_ms", ".2f"), ("p95 ms", "latency_p95_ms", ".2f"),
)  # fmt: skip

_COLOURS = {"all": "black", "top_k": "tab:blue", "max_ratio": "tab:orange", "alpha_mass": "tab:green",
            "exact": "black", "two-phase": "tab:red", "seismic": "tab:purple"}  # fmt: skip
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.5 sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; }}
table {{ border-collapse: collapse; }}
td, th {{ padding: .2em .8em; text-align: right; border-bottom: 1px solid #ddd; }}
td:first-child, th:first-child {{ text-align: left; }}
.taken {{ background: #fff3c4; }}
svg {{ max-width: 100%; height: auto; }}
</style></head><body>
<h1>{title}</h1>
{paragraphs}
{drawing}
{tables}
<script type="application/json" id="plan">{numbers}</script>
</body></html>
"""


def sentences(report: PlanReport) -> Iterator[str]:
    """What a plan says in words."""
    full = f"{report.quality} of whole vectors: {report.full_quality:.4f}"
    yield f"{report.documents:,} documents, {report.queries} queries; {full}, exact search on the 9 bits of an index."
    choice = report.choice
    if choice is None:
        yield f"Nothing loses {report.allowed_loss:.2%} or less on both halves of the queries."
        return
    point, low, high = choice.point, *choice.interval
    engine = ", ".join([point.engine, *_parameters(point)])
    yield (
        f"Taken: documents {in_words(point.documents)}, queries {in_words(point.query)}, {engine}. "
        f"It loses {choice.loss:.2%} (95%: {low:.2%} to {high:.2%}) on the half of the queries that confirmed the "
        f"choice, {choice.chosen_by:.2%} on the other."
    )
    if choice.passed_over:
        yield f"{choice.passed_over} cheaper ones were not confirmed; the range is wider for each of them."
    if point.tied:
        yield f"In {point.tied} queries other documents have the score of the tenth best: an index gives some of them."
    if point.emptied:
        yield f"{point.emptied:,} documents keep no term: no sparse query finds them."


def table(report: PlanReport, points: Sequence[Point], best: Sequence[int]) -> tuple[list[list[str]], list[bool]]:
    """The headings and the rows of a frontier, and which of these rows is the point that was taken."""
    shown = [points[place] for place in best if points[place].loss <= max(SHOWN_LOSS, report.allowed_loss)]
    headings = ["documents", "queries", "engine", *(heading for heading, _, _ in _NUMBERS)]
    columns = [column for column in zip(headings, *map(_cells, shown), strict=True) if any(column[1:]) or not shown]
    taken = report.choice.point if report.choice else None
    return [list(row) for row in zip(*columns, strict=True)], [False, *(point == taken for point in shown)]


def _cells(point: Point) -> list[str]:
    numbers = ((getattr(point, name), form) for _, name, form in _NUMBERS)
    return [
        in_words(point.documents),
        in_words(point.query),
        point.engine + (f" ({', '.join(_parameters(point))})" if point.parameters else ""),
        *("" if number is None else format(number, form) for number, form in numbers),
    ]


def _parameters(point: Point) -> list[str]:
    return [f"{name} {value:g}" for name, value in point.parameters.items()]


def as_text(report: PlanReport) -> str:
    """The frontiers as tables, and the choice."""
    blocks = []
    for _, points, best in _frontiers(report):
        rows, taken = table(report, points, best)
        lines = zip(taken, aligned(rows), strict=True)
        blocks.append("\n".join(("* " if is_taken else "  ") + line for is_taken, line in lines))
    return "\n\n".join([*blocks, "\n".join(sentences(report))])


def as_png(report: PlanReport) -> bytes:
    """The frontiers as a picture."""
    file = io.BytesIO()
    _figure(report).savefig(file, format="png", dpi=120)
    return file.getvalue()


def as_html(report: PlanReport) -> str:
    """One page with picture, tables and all numbers, which asks nothing of any other place."""
    file = io.StringIO()
    _figure(report).savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    drawing = file.getvalue()
    drawing = drawing[drawing.index("<svg") :]  # behind the XML declaration and the address of a DTD
    tables = ""
    for heading, points, best in _frontiers(report):
        rows, taken = table(report, points, best)
        escaped = [[html.escape(cell) for cell in row] for row in rows]
        head = "".join(f"<th>{cell}</th>" for cell in escaped[0])
        body = "".join(
            f"<tr{' class=taken' if is_taken else ''}><td>{'</td><td>'.join(row)}</td></tr>\n"
            for row, is_taken in zip(escaped[1:], taken[1:], strict=True)
        )
        tables += f"<h2>{html.escape(heading)}</h2>\n<table><tr>{head}</tr>\n{body}</table>\n"
    return _PAGE.format(
        title=html.escape(f"Plan of {report.run}"),
        paragraphs="".join(f"<p>{html.escape(line)}</p>" for line in sentences(report)),
        drawing=drawing,
        tables=tables,
        # The one sequence that could end the element.
        numbers=json.dumps(report.to_dict()).replace("</", "<\\/"),
    )


def _frontiers(report: PlanReport) -> Iterator[tuple[str, Sequence[Point], Sequence[int]]]:
    yield "Pruning", report.points, report.frontier
    if report.settings:
        yield f"Engines of {report.index}", report.settings, report.settings_frontier


def figure_class() -> Any:
    """matplotlib's.

    Raises:
        MissingExtraError: it is not installed.
    """
    with needs_extra("evaluate", "Drawing a plan"):
        from matplotlib.figure import Figure
    return Figure


def _figure(report: PlanReport) -> Any:
    pruning, settings = (report.points, report.frontier), (report.settings, report.settings_frontier)
    costs = [
        (label, cost, points, best)
        for label, cost, (points, best) in (
            ("postings a document", "terms", pruning),
            ("predicted MB", "megabytes", pruning),
            ("postings visited by a query", "visited", pruning),
            ("latency p50, ms", "latency_p50_ms", settings),
        )
        if any(getattr(point, cost) is not None for point in points)
    ]
    figure = figure_class()(figsize=(5 * len(costs), 4.2), layout="constrained")
    for axes, (label, cost, points, best) in zip(figure.subplots(1, len(costs), squeeze=False)[0], costs, strict=True):
        _draw(axes, points, best, cost, report)
        axes.set_xlabel(label)
        axes.set_ylabel(f"{report.quality}, share of whole vectors")
    return figure


def _draw(axes: Any, points: Sequence[Point], best: Sequence[int], cost: str, report: PlanReport) -> None:
    """All points by their kind, the frontier as a line, what is allowed, and the one that was taken."""
    kinds: dict[str, list[tuple[float, float]]] = {}
    for point in points:
        if (value := getattr(point, cost)) is not None:
            kind = point.engine if point.latency_p50_ms is not None else next(iter(point.documents), "all")
            kinds.setdefault(kind, []).append((value, 1 - point.loss))
    for kind, places in kinds.items():
        axes.scatter(*zip(*places, strict=True), s=12, alpha=0.6, color=_COLOURS.get(kind), label=kind)
    line: list[tuple[float, float]] = []
    for value, kept in sorted((getattr(points[place], cost) or 0.0, 1 - points[place].loss) for place in best):
        if not line or kept > line[-1][1]:
            line.append((value, kept))
    axes.step(*zip(*line, strict=True), where="post", color="grey", linewidth=1)
    axes.axhline(1 - report.allowed_loss, color="grey", linestyle=":", linewidth=1)
    taken = report.choice.point if report.choice else None
    if taken in points and taken is not None and (value := getattr(taken, cost)) is not None:
        axes.scatter([value], [1 - taken.loss], s=120, facecolors="none", edgecolors="red", label="taken")
    heights = [kept for places in kinds.values() for _, kept in places]
    axes.set_ylim(max(min(heights), 1 - 3 * max(SHOWN_LOSS, report.allowed_loss)) - 0.01, max(heights) + 0.01)
    axes.legend(fontsize=8, loc="lower right")
