"""The page of a report: sections, tables and charts in one HTML document, which loads nothing and runs no script."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from sparse_ingest.errors import counted, listed
from sparse_ingest.pipeline import in_words as settings_in_words
from sparse_ingest.planning.drawing import best_at_cost, charted, sentences
from sparse_ingest.planning.drawing import table as plan_table
from sparse_ingest.planning.report import PlanReport
from sparse_ingest.reporting import shortened, size_text
from sparse_ingest.reports.charts import Caption, bar_chart, escaped, line_chart, number_text, range_text, ranked_bars
from sparse_ingest.reports.distributions import Distribution
from sparse_ingest.reports.figures import LoadHistory, ReportFigures, ShardSpeed
from sparse_ingest.runs.files import COUNT_LABELS, STAGE_LABELS
from sparse_ingest.verification.comparison import VerifyReport

_VALUE_CHARACTERS = 300
_ROWS = 20  # of a table that could have thousands
_OVERLAP = "From the first request of a shard to its last answer. Shards overlap, so the load as a whole was faster."


def as_html(figures: ReportFigures) -> str:
    """Return the page."""
    sections = [(title, content) for title, content in _sections(figures) if content]
    names = [title.lower().replace(" ", "-") for title, _ in sections]
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return Template(template).substitute(
        title=f"Report of {escaped(figures.run.rstrip('/').rpartition('/')[2])}",
        subtitle=f"Run <code>{escaped(figures.run)}</code>, id <code>{escaped(figures.run_id[:12])}</code>",
        links="".join(
            f'<li><a href="#{name}">{title}</a></li>' for name, (title, _) in zip(names, sections, strict=True)
        ),
        sections="\n".join(
            f'<section id="{name}"><h2>{title}</h2>\n{content}</section>'
            for name, (title, content) in zip(names, sections, strict=True)
        ),
        footer=f"Created {escaped(figures.created)} by sparse-ingest {escaped(figures.release)}.",
    )


def _sections(figures: ReportFigures) -> Iterator[tuple[str, str]]:
    """Yield title and content of each section; those without content are omitted."""
    yield "Summary", _tiles(figures) + _notes(figures)
    yield "Corpus", _corpus(figures.corpus)
    yield "Model", _facts(figures.model)
    auto = {f"auto {name}": settings_in_words(found) for name, found in figures.auto.items() if isinstance(found, dict)}
    yield "Settings", _facts({**figures.settings, **auto})
    yield "Speed", _speed(figures)
    yield "Distributions", _distributions(figures)
    yield "Pruning", _plan(figures.plan) if figures.plan else ""
    yield "Loads", _loads(figures)
    yield "Index", _index(figures)
    yield "Verification", _verification(figures)


def _tiles(figures: ReportFigures) -> str:
    counts, unit = figures.counts, _unit(figures)
    rows = counts["rows"]
    tiles = [
        (f"{rows:,}", f"{unit}s in {counted(counts['shards'], 'shard')}"),
        (f"{counts['nnz']:,}", "terms (non-zero weights)"),
        (f"{counts['nnz'] / max(1, rows):,.1f}", f"terms per {unit}"),
    ]
    wall = sum(one.seconds for one in figures.speeds)
    if wall:
        tiles.append((number_text(rows / wall, 3), f"{unit}s/s while encoding"))
    if figures.index:
        tiles.append((size_text(figures.index.bytes), f"index {figures.index.index}"))
    inner = "".join(f"<div><dd>{escaped(value)}</dd><dt>{escaped(label)}</dt></div>" for value, label in tiles)
    return f'<dl class="tiles">{inner}</dl>\n'


def _notes(figures: ReportFigures) -> str:
    """Return what a reader should know first, each with a word for its weight, not only a color."""
    counts, unit, found = figures.counts, _unit(figures), figures.distributions
    notes = [("OK", "The run is complete.")]
    if not figures.complete:
        notes = [("Warning", "The run is not complete: the figures are those of its finished shards.")]
    for name, word in (("skipped", "Warning"), ("truncated", "Note"), ("empty", "Note"), ("without_token", "Note")):
        if counts.get(name):
            notes.append((word, f"{COUNT_LABELS[name].capitalize()}: {counts[name]:,}."))
    if found.shards < counts["shards"]:
        read = f"{found.documents:,} {unit}s in {found.shards:,} of {counts['shards']:,} shards, evenly spaced"
        notes.append(("Note", f"Terms, weights and posting lists are those of {read}."))
    if refused := sum(load.refused for load in figures.loads):
        notes.append(("Warning", f"Clusters refused {counted(refused, 'document')}; see Loads."))
    if figures.index and figures.index.run_id != figures.run_id:
        notes.append(("Warning", "The last load into this index was not of this run."))
    report = figures.verification
    if report is None:
        notes.append(("Note", "No index was compared with the run: not verified."))
    elif report.ok:
        notes.append(("OK", f"The index matches the run: {_compared(report)}."))
    else:
        notes.append(("Warning", "The index differs from the run; see Verification."))
    return _list_of(notes)


def _list_of(notes: Sequence[tuple[str, str]]) -> str:
    inner = "".join(f'<li class="{word.lower()}"><strong>{word}</strong> {escaped(text)}</li>' for word, text in notes)
    return f'<ul class="notes">{inner}</ul>\n'


def _corpus(sources: Sequence[Mapping[str, Any]]) -> str:
    if not sources:
        return ""
    keys = list(dict.fromkeys(["name", *(key for one in sources[:_ROWS] for key in one)]))
    rows = [[one.get(key, "") for key in keys] for one in sources[:_ROWS]]
    more = len(sources) - len(rows)
    return _table(keys, rows, "Sources of the corpus") + (f"<p>And {counted(more, 'more source')}.</p>" if more else "")


def _speed(figures: ReportFigures) -> str:
    recorded: dict[str, Any] = {name.replace("_", " "): found for name, found in figures.recorded.items()}
    hosts = len(recorded.pop("host"))  # not their names: a report is passed on
    recorded["machines"] = hosts or None
    seconds = {name: spent for name, spent in figures.seconds.items() if name != "wall"}
    charts = ""
    if busy := sum(seconds.values()):
        wall = figures.seconds.get("wall") or busy
        rows = [(STAGE_LABELS.get(name, name), spent) for name, spent in seconds.items()]
        caption = Caption(
            "Busy time by stage",
            "Seconds that each stage was busy, summed over shards, with its share of the duration. Stages overlap.",
        )
        svg = ranked_bars(caption, [(name, spent, f"{spent:,.1f} s, {spent / wall:.0%}") for name, spent in rows])
        cells = [[name, round(spent, 3), f"{spent / wall:.1%}"] for name, spent in rows]
        charts += _figure(caption, svg, ["stage", "seconds busy", "share of duration"], cells)
    unit = f"{_unit(figures)}s/s"
    charts += _rates("Encoding speed by shard", "From the first row of a shard to its file.", figures.speeds, unit)
    return _grid(charts) + _facts(recorded)


def _rates(title: str, shows: str, speeds: Sequence[ShardSpeed], unit: str) -> str:
    """Return a chart of the speed of each shard; "" if fewer than two have a time."""
    timed = [one for one in speeds if one.seconds and one.documents]
    if len(timed) < 2:
        return ""
    caption = Caption(title, shows, "shard", unit)
    svg = line_chart(caption, [(one.shard, one.documents / one.seconds) for one in timed])
    slowest = sorted(timed, key=lambda one: one.documents / one.seconds)[:_ROWS]
    rows = [[one.shard, one.documents, one.seconds, round(one.documents / one.seconds, 1)] for one in slowest]
    return _figure(caption, svg, ["shard", "documents", "seconds", unit], rows, "Slowest shards")


def _distributions(figures: ReportFigures) -> str:
    found, unit = figures.distributions, _unit(figures)
    sampled = found.characters.count if found.characters else 0
    sample = f"In a sample of {sampled:,} {unit}s." if sampled < figures.counts["rows"] else f"Of all {unit}s."
    used = f"{found.used:,} of {found.vocabulary:,} tokens of the vocabulary occur. Bars grow by 1, 2, 5, 10."
    charts = [
        _histogram(Caption(title, shows, x, y), distribution, every)
        for distribution, every, title, shows, x, y in (
            (found.terms, 0, f"Terms per {unit}", "Non-zero weights of each vector.", "terms", f"{unit}s"),
            (found.weights, 0, "Weights", "Non-zero weights of all vectors.", "weight", "terms"),
            (found.characters, 0, "Lengths of texts", sample, "characters", f"{unit}s"),
            (found.postings, 3, "Lengths of posting lists", used, f"{unit}s with the token", "tokens"),
        )
        if distribution
    ]
    if found.longest:
        shows = (
            f"The {len(found.longest)} tokens that occur in most {unit}s. A query with one of them visits that many."
        )
        caption = Caption("Longest posting lists", shows)
        named = [(_token_text(one.token), one) for one in found.longest]
        bars = [(text, one.documents, f"{number_text(one.documents)}, {one.share:.0%}") for text, one in named]
        rows = [[text, one.documents, f"{one.share:.2%}", round(one.mean_weight, 4)] for text, one in named]
        charts.append(_figure(caption, ranked_bars(caption, bars), ["token", f"{unit}s", "share", "mean weight"], rows))
    return _grid("".join(charts)) or f"<p>The run has no {unit}s.</p>"


def _histogram(caption: Caption, found: Distribution, every: int) -> str:
    named = {"Mean": found.mean, "median": found.median, "95th percentile": found.p95, "largest": found.largest}
    summary = ", ".join(f"{name} {number_text(value, 3)}" for name, value in named.items()) + "."
    caption = caption._replace(shows=f"{caption.shows} {summary}".strip())
    rows = [[range_text(bar), bar.count, f"{bar.count / found.count:.2%}"] for bar in found.bars]
    return _figure(caption, bar_chart(caption, found.bars, every=every), [caption.x, caption.y, "share"], rows)


def _plan(plan: PlanReport) -> str:
    points, best, cost, x = charted(plan)
    title = "Engine frontier" if plan.settings else "Pruning frontier"
    chart = ""
    if line := best_at_cost((points[place] for place in best), cost):
        shows = f"The best {plan.quality} at each cost, relative to unpruned vectors ({plan.full_quality:.4f})."
        caption = Caption(title, shows, x, "quality kept")
        chosen = plan.choice and getattr(plan.choice.point, cost)
        ring = (float(chosen), 1 - plan.choice.point.loss) if plan.choice and chosen else None
        limit = 1 - plan.allowed_loss, f"loss of {plan.allowed_loss:.1%}"
        low = min(max(line[0][1], 1 - 10 * plan.allowed_loss), line[-1][1])
        shown = [point for point in line if point[1] >= low]
        svg = line_chart(caption, shown, low=min(low, limit[0]), chosen=ring, limit=limit)
        (head, *rows), _, _ = plan_table(plan, points, best, _ROWS)
        chart = _figure(caption, svg, head, rows)
    return "".join(f"<p>{escaped(line)}</p>" for line in sentences(plan)) + _grid(chart)


def _loads(figures: ReportFigures) -> str:
    if not figures.loads:
        return "<p>No load of this run is recorded.</p>"
    return "".join(_load(figures, load) for load in figures.loads)


def _load(figures: ReportFigures, load: LoadHistory) -> str:
    name = f"index {load.index_uuid}"
    if figures.index and figures.index.uuid == load.index_uuid:
        name = f"index {figures.index.index}"
    shards = figures.counts["shards"]
    notes = []
    if load.current < load.shards:
        notes.append(("Warning", "The run was encoded again after this load; load it again."))
    elif load.shards < shards:
        notes.append(("Warning", f"Not finished: {load.shards:,} of {counted(shards, 'shard')} are loaded."))
    if load.waiting:
        notes.append(("Warning", f"Settings that a stopped load has not restored: {', '.join(load.waiting)}."))
    rate = f", at least {number_text(load.documents / load.seconds, 3)} documents/s" if load.seconds else ""
    facts = {
        "cluster UUID": load.cluster_uuid,
        "index UUID": load.index_uuid,
        "shards": f"{load.shards:,} of {shards:,}",
        "documents": f"{load.documents:,}{rate}",
        "found unchanged": load.unchanged,
        "refused": load.refused,
        "pruning": "; ".join(filter(None, map(settings_in_words, load.pruning))) or "none",
    }
    refusals = [[one.documents, one.status or "", one.reason, one.example] for one in load.refusals]
    heads = ["documents", "status", "reason", "example"]
    return (
        f"<h3>Load into {escaped(name)}</h3>"
        + (_list_of(notes) if notes else "")
        + _facts(facts)
        + (_table(heads, refusals, f"Documents refused by {name}") if refusals else "")
        + _grid(_rates(f"Loading speed by shard, {name}", _OVERLAP, load.speeds, "documents/s"))
    )


def _index(figures: ReportFigures) -> str:
    index = figures.index
    if index is None:
        return ""
    refused = sum(load.refused for load in figures.loads if load.index_uuid == index.uuid)
    facts = {
        "name": index.index,
        "UUID": index.uuid,
        "aliases": ", ".join(index.aliases),
        "documents": index.documents,
        "documents of this run refused": refused,
        "size": f"{size_text(index.bytes)} in {counted(index.segments, 'segment')}, without replicas",
        "shards": f"{index.primaries} primary, {counted(index.replicas, 'replica')} each",
        "sparse field": f"{index.field} ({index.kind})" if index.field else "none",
        "model": (index.model or {}).get("document"),
        "last load": index.load,
        "loaded runs": ", ".join(run_id[:12] for run_id in index.runs),
        "pruning": settings_in_words(index.pruning or {}) or "none",
        "query settings": settings_in_words(index.query or {}),
        "stamp": index.unreadable,
    }
    return _facts(facts) + _table(["field", "type"], list((figures.mapping or {}).items()), "Mapped fields")


def _verification(figures: ReportFigures) -> str:
    report = figures.verification
    if report is None:
        return (
            "<p>Not verified. Pass <code>--verify</code> with <code>--index</code>, or run "
            "<code>sparse-ingest verify</code>.</p>"
        )
    expected = report.expected_documents
    facts = {
        "result": "the index matches the run" if report.ok else "the index differs from the run",
        "documents": f"{report.index_documents:,} in the index, "
        + ("other clients wrote too" if expected is None else f"{expected:,} expected"),
        "compared": _compared(report),
        "different weights": report.differing,
        "missing documents": _counted_ids(report.missing, report.missing_ids),
        "extra documents": _counted_ids(report.extra, report.extra_ids),
        "duplicate documents": _counted_ids(report.doubled, report.doubled_ids),
        "shards not loaded": report.unloaded_shards,
        "could not be checked": " ".join(report.notes),
    }
    rows = [[one.doc_id, "sum of a group" if one.token is None else _token_text(one.token), one.expected,
             "none" if one.found is None else one.found] for one in report.differences]  # fmt: skip
    heads = ["document", "token", "expected", "found"]
    return _facts(facts) + (_table(heads, rows, "First different weights") if rows else "")


def _compared(report: VerifyReport) -> str:
    ids = "" if report.notes else "all ids and "
    return f"{ids}{report.checked_weights:,} weights of {report.checked_documents:,} documents were compared"


def _counted_ids(count: int, doc_ids: Sequence[str]) -> str:
    return f"{count:,}" + (f": {listed(doc_ids, 5)}" if doc_ids else "")


def _unit(figures: ReportFigures) -> str:
    return "passage" if figures.settings.get("overflow") == "passages" else "document"


def _token_text(token: str) -> str:
    """Return a token as shown: quoted with escapes if it could not be seen otherwise."""
    return token if token.isprintable() and token.strip() == token != "" else ascii(token)


def _facts(facts: Mapping[str, Any]) -> str:
    """Return names and values; values that are empty are omitted."""
    inner = "".join(
        f"<div><dt>{escaped(name)}</dt><dd>{escaped(_value_text(value))}</dd></div>"
        for name, value in facts.items()
        if value not in (None, "", [], {})
    )
    return f'<dl class="facts">{inner}</dl>\n' if inner else ""


def _value_text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return f"{value:,}"
    return shortened(", ".join(map(str, value)) if isinstance(value, list) else str(value), _VALUE_CHARACTERS)


def _table(headings: Sequence[str], rows: Sequence[Sequence[Any]], caption: str) -> str:
    """Return a table; columns of numbers are aligned to the right."""
    columns = [[row[place] for row in rows] for place in range(len(headings))]
    numeric = [all(isinstance(cell, int | float) or str(cell)[-1:] == "%" for cell in cells) for cells in columns]
    kinds = [' class="number"' if one else "" for one in numeric]
    head = "".join(f'<th scope="col"{kind}>{escaped(one)}</th>' for kind, one in zip(kinds, headings, strict=True))
    body = "".join(
        "<tr>"
        + "".join(f"<td{kind}>{escaped(_value_text(cell))}</td>" for kind, cell in zip(kinds, row, strict=True))
        + "</tr>\n"
        for row in rows
    )
    return (
        f'<div class="scroll" role="region" aria-label="{escaped(caption)}" tabindex="0"><table>'
        f"<caption>{escaped(caption)}</caption><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>\n"
    )


def _figure(caption: Caption, svg: str, headings: Sequence[str], rows: Sequence[Sequence[Any]], table: str = "") -> str:
    table = table or caption.title
    return (
        f"<figure><h3>{escaped(caption.title)}</h3><p>{escaped(caption.shows)}</p>{svg}"
        f"<details><summary>Table: {escaped(table)}</summary>{_table(headings, rows, table)}</details></figure>\n"
    )


def _grid(figures: str) -> str:
    return f'<div class="grid">{figures}</div>\n' if figures else ""
