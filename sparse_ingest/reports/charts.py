"""Charts as inline SVG: the bars of a distribution, ranked bars, and a line with points.

In: numbers and labels. Out: an `svg` element that is 400 units wide, with a title and a description for screen readers.
Colors are classes of the page's style (page.py). All texts are escaped here.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import NamedTuple

from sparse_ingest.errors import printable
from sparse_ingest.reporting import shortened
from sparse_ingest.reports.distributions import Bar, round_up
from sparse_ingest.storage.addresses import without_secrets

_WIDTH, _HEIGHT = 400, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 12, 28, 44
_ROW, _LABEL, _VALUE = 22, 112, 100  # of ranked bars: height, width of the labels, width of the values
_LABELS = 6  # on the x axis
_POINTS = 120  # of a line; more are averaged
_UNITS = ((1e9, "B"), (1e6, "M"), (1e3, "k"))
Point = tuple[float, float]


class Caption(NamedTuple):
    """The texts of a chart: its title, what it shows, and the names of its axes with their units."""

    title: str
    shows: str
    x: str = ""
    y: str = ""


def escaped(text: object) -> str:
    """Return a text for HTML: escaped, and without the passwords and queries of addresses in it."""
    return html.escape(printable(without_secrets(str(text))))


def number_text(value: float, digits: int = 6) -> str:
    """Return a number with a unit from 10,000 on, and with at most so many digits, such as 0.25, 2,500 or 1.5M."""
    size, unit = next((one for one in _UNITS if abs(value) >= max(1e4, one[0])), (1.0, ""))
    if unit or value != int(value):
        value = float(f"{value / size:.{min(digits, 4) if unit else digits}g}")
    return f"{value:,.0f}{unit}" if value == int(value) else f"{value:,g}{unit}"


def range_text(bar: Bar) -> str:
    """Return the values of a bar, such as `20 to below 40`."""
    return f"{number_text(bar.low)} " + ("or more" if bar.high is None else f"to below {number_text(bar.high)}")


def bar_chart(caption: Caption, bars: Sequence[Bar], *, every: int = 0) -> str:
    """Draw a distribution, with a label under every `every`-th bar; 0: about six labels."""
    ticks = _ticks(0, max(bar.count for bar in bars), least=1)
    width, every = (_WIDTH - _LEFT - _RIGHT) / len(bars), every or -(-len(bars) // _LABELS)
    parts, is_open = _y_axis(ticks), bars[-1].high is None
    for place, bar in enumerate(bars):
        left, y = _LEFT + place * width, _height(bar.count, ticks)
        tip = f"{range_text(bar)}: {bar.count:,} {caption.y}"
        kind = "bar" if bar.high is not None else "bar tail"
        parts.append(_rect(kind, left, y, max(0.5, width - 1), _HEIGHT - _BOTTOM - y, tip))
        if place % every == 0 and (not is_open or left < _WIDTH - _RIGHT - 65):
            parts.append(_below(left, number_text(bar.low), "middle"))
    if is_open:
        parts.append(_below(_WIDTH - _RIGHT, f"{number_text(bars[-1].low)}+", "end"))
    return _svg(caption, _HEIGHT, parts)


def ranked_bars(caption: Caption, rows: Sequence[tuple[str, float, str]]) -> str:
    """Draw rows of label, number and the text beside the bar."""
    most = max(number for _, number, _ in rows) or 1
    parts = []
    for place, (label, number, text) in enumerate(rows):
        y, width = place * _ROW, max(1.0, (_WIDTH - _LABEL - _VALUE - 8) * number / most)
        parts.append(_text(_LABEL, y + 15, shortened(label, 15), "end", "label"))
        parts.append(_rect("bar", _LABEL + 6, y + 3, width, _ROW - 6, f"{label}: {text}"))
        parts.append(_text(_LABEL + 12 + width, y + 15, text, "start"))
    return _svg(caption, len(rows) * _ROW, parts)


def line_chart(
    caption: Caption,
    points: Sequence[Point],
    *,
    low: float = 0.0,
    chosen: Point | None = None,
    limit: tuple[float, str] | None = None,
) -> str:
    """Draw points, ascending in x, and the line between them.

    The y axis starts at `low`. `chosen` is a point with a ring, `limit` a height with a dashed line and its name.
    """
    points = _averaged(points)
    ticks = _ticks(low, max(y for _, y in points))
    left, right = points[0][0], points[-1][0]
    span = (right - left) or 1.0

    def at(point: Point) -> Point:
        across = (point[0] - left) / span if right > left else 0.5
        return _LEFT + 8 + across * (_WIDTH - _LEFT - _RIGHT - 16), _height(point[1], ticks)

    parts = _y_axis(ticks)
    parts += [_below(at((x, 0))[0], number_text(x), "middle") for x in _ticks(left, right) if left <= x <= right]
    if limit:
        y = _height(limit[0], ticks)
        parts.append(f'<line class="limit" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(_WIDTH - _RIGHT, y + 15, limit[1], "end"))
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(at, points))
    parts.append(f'<polyline class="line" points="{path}"/>')
    for point in points:
        tip = f"{number_text(point[0])} {caption.x}: {number_text(point[1])} {caption.y}"
        parts.append(_circle("bar", at(point), 2.5, tip))
    if chosen:
        x, y = at(chosen)
        parts.append(_circle("chosen", (x, y), 7, "chosen"))
        parts.append(_text(x, y - 11, "chosen", "start" if x < _WIDTH / 2 else "end", "label"))
    return _svg(caption, _HEIGHT, parts)


def _averaged(points: Sequence[Point]) -> list[Point]:
    """Return at most _POINTS points, each the mean of some."""
    step = -(-len(points) // _POINTS)
    groups = [points[start : start + step] for start in range(0, len(points), step)]
    return [(sum(x for x, _ in some) / len(some), sum(y for _, y in some) / len(some)) for some in groups]


def _ticks(low: float, high: float, *, least: float = 0.0) -> list[float]:
    """Return about five round numbers, at `least` so far apart, the first at most `low`, the last at least `high`."""
    step = max(least, round_up((high - low) / 4) if high > low else round_up(abs(high) or 1.0))
    first, last = int(low // step), int(-(-high // step))
    return [float(f"{place * step:.12g}") for place in range(first, max(last, first + 1) + 1)]


def _height(value: float, ticks: Sequence[float]) -> float:
    """Return the y coordinate of a value; values outside of the ticks are at the border."""
    share = (min(max(value, ticks[0]), ticks[-1]) - ticks[0]) / (ticks[-1] - ticks[0])
    return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)


def _y_axis(ticks: Sequence[float]) -> list[str]:
    parts = []
    for tick in ticks:
        y = _height(tick, ticks)
        parts.append(f'<line class="tick" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(_LEFT - 6, y + 4, number_text(tick), "end"))
    return parts


def _below(x: float, text: str, anchor: str) -> str:
    return _text(x, _HEIGHT - _BOTTOM + 16, text, anchor)


def _rect(kind: str, x: float, y: float, width: float, height: float, tip: str) -> str:
    size = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
    return f'<rect class="{kind}" {size}><title>{escaped(tip)}</title></rect>'


def _circle(kind: str, center: Point, radius: float, tip: str) -> str:
    place = f'cx="{center[0]:.1f}" cy="{center[1]:.1f}" r="{radius}"'
    return f'<circle class="{kind}" {place}><title>{escaped(tip)}</title></circle>'


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    name = f' class="{kind}"' if kind else ""
    return f'<text{name} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escaped(text)}</text>'


def _svg(caption: Caption, height: int, parts: list[str]) -> str:
    """Return the element; the names of the axes are above the y axis and below the x axis."""
    name = "".join(c if c.isalnum() else "-" for c in caption.title.lower())
    if caption.y:
        parts.append(_text(4, 14, caption.y, "start", "axis"))
    if caption.x:
        parts.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, height - 8, caption.x, "middle", "axis"))
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-labelledby="{name}-title {name}-shows">'
        f'<title id="{name}-title">{escaped(caption.title)}</title>'
        f'<desc id="{name}-shows">{escaped(caption.shows)}</desc>{"".join(parts)}</svg>'
    )
