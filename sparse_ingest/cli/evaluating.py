"""The commands `evaluate`, with measures, sparsity and latency for queries and judgments (qrels), and `plan`."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparse_ingest.cli.completion import RUN
from sparse_ingest.cli.help import command
from sparse_ingest.cli.options import (
    CONNECTION_FLAGS,
    connection_options,
    json_option,
    pipeline_options,
    print_report,
    refuse_flags,
    stage_options,
)
from sparse_ingest.cli.progress import TerminalReporter
from sparse_ingest.cli.searching import Target, target_options
from sparse_ingest.errors import UsageError
from sparse_ingest.evaluation.options import EvaluateOptions
from sparse_ingest.pipeline import HybridSettings, Pipeline
from sparse_ingest.planning.options import MOST_QUERIES, PlanOptions
from sparse_ingest.reporting import aligned, shortened
from sparse_ingest.storage.places import Place
from sparse_ingest.storage.scratch import ScratchFolder

if TYPE_CHECKING:
    from sparse_ingest.evaluation.evaluate import Evaluation, Latency
    from sparse_ingest.evaluation.measures import Comparison

QUERY_CHARACTERS = 50
FILE = click.Path(exists=True, path_type=Path)
_NOT_FOR_NANO_BEIR = CONNECTION_FLAGS | {
    "queries", "qrels", "index", "run", "engine", "concurrency", "stored", "force", "trec_run", "compare", "per_query",
    "quoting", "allow_partial", *HybridSettings.__dataclass_fields__,
}  # fmt: skip


@command()
@click.option("--queries", type=FILE, metavar="F", help="File of queries, or folder of a BEIR or MTEB collection")
@click.option("--qrels", type=FILE, metavar="F", help="Relevance judgments: file or folder  [default: from --queries]")
@stage_options(
    EvaluateOptions,
    trec_run=click.Path(dir_okay=False, path_type=Path),
    compare=click.Path(exists=True, dir_okay=False, path_type=Path),
)
@click.option("--nano-beir", "nano_beir", multiple=True, metavar="NAME",
              help="Encode and evaluate a collection of NanoBEIR, or all of them; may be repeated")  # fmt: skip
@click.option("--nano-beir-data", metavar="D", help="Data set or folder in NanoBEIR's layout  "
              "[default: sentence-transformers/NanoBEIR-en]")  # fmt: skip
@click.option("--device", help="Device for --nano-beir: auto, cpu or cuda  [default: auto]")
@click.option("--per-query", is_flag=True, help="Also print the values of each query, and with --compare the "
              "largest changes")  # fmt: skip
@json_option
@target_options("Allow a model that differs from the documents' model", "model encode index query")
def evaluate(target: Target, options: EvaluateOptions, as_json: bool, **given: Any) -> None:
    """Measure search quality on an index or a run folder, with relevance judgments.

    \b
    sparse-ingest evaluate --queries q.jsonl --qrels qrels.tsv --index NAME
    sparse-ingest evaluate --queries COLLECTION --run RUN
    sparse-ingest evaluate --nano-beir all --model MODEL

    Queries without judgments are skipped; a query without hits counts as zero; ties are broken by descending document
    id, as in trec_eval. The default model is stored in the run or index.
    """
    from sparse_ingest.evaluation.evaluate import evaluate as evaluate_target

    _refuse_conflicts(target, nano_beir=bool(given["nano_beir"]))
    if given["nano_beir"]:
        print_report(as_json, *_nano_beir(target.pipeline, options, given))
        return
    with target.opened() as opened:
        found = evaluate_target(opened, queries=given["queries"], qrels=given["qrels"], options=options)
    print_report(as_json, found.to_dict(per_query=given["per_query"]), _lines(found, options, given["per_query"]))


def _refuse_conflicts(target: Target, *, nano_beir: bool) -> None:
    """Refuse options that would have no effect."""
    if nano_beir:
        why = "has no effect with --nano-beir, which searches its own documents exactly"
        refuse_flags(_NOT_FOR_NANO_BEIR, why)
        for name in ("engine", "hybrid"):
            if getattr(target.pipeline.query, name):
                raise UsageError(f"query.{name} {why}. Omit it.")
    else:
        refuse_flags(("nano_beir_data", "device"), "is for --nano-beir: nothing is encoded here")
        if target.index is not None:
            refuse_flags(("stored",), "is for --run: an index always uses the weights that it stores")


def _nano_beir(pipeline: Pipeline, options: EvaluateOptions, given: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Evaluate collections of NanoBEIR; return the results as JSON and as lines."""
    from sparse_ingest.corpora.nano_beir import DATA_SET, collections_named
    from sparse_ingest.evaluation.nano_beir import CARD_MEASURES, evaluate_nano_beir, figures

    if not pipeline.model.document:
        raise UsageError("--nano-beir needs a model: pass --model or --pipeline.")
    names = list(dict.fromkeys([*CARD_MEASURES, *options.measures]))
    with contextlib.closing(ScratchFolder()) as scratch, TerminalReporter() as reporter:
        found = dict(
            evaluate_nano_beir(
                collections_named(given["nano_beir"]),
                scratch.path,
                pipeline=pipeline,
                options=replace(options, measures=tuple(names)),
                data_set=given["nano_beir_data"] or DATA_SET,
                device=given["device"] or "auto",
                progress=reporter,
            )
        )
    rows = {name: figures([evaluation], names) for name, evaluation in found.items()}
    mean = figures(list(found.values()), names)
    # As on model cards: a line for each measure, a column for each collection.
    columns = {**rows, "mean": mean}
    lines = _figures(["", *columns], ((key, [row[key] for row in columns.values()]) for key in mean))
    return {"collections": rows, "mean": mean}, lines


def _lines(found: Evaluation, options: EvaluateOptions, per_query: bool) -> Iterator[str]:
    if per_query:  # first: on a terminal, the lines after it stay in view
        each = found.search.measured.per_query
        by_query = ((query_id, [each[name][query_id] for name in each]) for query_id in next(iter(each.values())))
        yield from (*_figures(["query", *each], by_query), "")
    rows = [row for row in (found.search, found.bm25) if row]
    yield from _figures(["", *found.measures], ((row.name, row.measured.mean.values()) for row in rows))
    yield ""
    sides = [["", "count", "active dimensions", "sparsity"]]
    for name, side in (("queries", found.queries), ("documents", found.documents)):
        if side is not None:
            sides.append([name, f"{side.count:,}", f"{side.active_dimensions:.1f}", f"{side.sparsity:.4f}"])
    yield from aligned(sides)
    if found.flops is not None:
        yield f"FLOPS {found.flops:.3f}: mean number of terms that a query and a document share"
    for row in rows:
        yield f"{row.name}: {_in_words(row.latency)}"
    if found.comparisons:
        yield from _compared(found.comparisons, options, per_query)


def _compared(comparisons: list[Comparison], options: EvaluateOptions, per_query: bool) -> Iterator[str]:
    """Yield the table of a comparison; with `per_query` also the changes of nDCG@10 and of requested measures."""
    name = Path(options.compare or "").name
    table = [["", "here", name, "change", "p (t-test)", "p (random)", "wins", "losses", "ties"]]
    for one in comparisons:
        values = [f"{one.first:.4f}", f"{one.second:.4f}", f"{one.difference:+.4f}"]
        counts = [f"{one.wins:,}", f"{one.losses:,}", f"{one.ties:,}"]
        table.append([one.measure, *values, f"{one.t_test:.4f}", f"{one.randomisation:.4f}", *counts])
    yield from ("", *aligned(table))
    for one in comparisons:
        if per_query and one.changes and one.measure in (comparisons[0].measure, *options.measures):
            rows = [[change.query_id, f"{change.first:.4f}", f"{change.second:.4f}"] for change in one.changes]
            texts = ["query", *(shortened(change.text, QUERY_CHARACTERS) for change in one.changes)]
            yield from ("", f"Largest changes of {one.measure}:")
            lines = aligned([["", "here", name], *rows])
            yield from (f"{line}  {text}".rstrip() for line, text in zip(lines, texts, strict=True))


def _figures(headings: list[str], rows: Iterable[tuple[str, Iterable[float]]]) -> list[str]:
    return aligned([headings, *([name, *(f"{value:.4f}" for value in values)] for name, values in rows)])


def _in_words(latency: Latency) -> str:
    if latency.p50_ms is None:
        return f"{latency.mean_ms:.2f} ms per query, all queries together"
    return (
        f"p50 {latency.p50_ms:.1f} ms, p95 {latency.p95_ms:.1f} ms, p99 {latency.p99_ms:.1f} ms; "
        f"the server reports {latency.took_ms:.0f} ms"
    )


PATH = click.Path(path_type=Path)
SAMPLE = click.IntRange(10, MOST_QUERIES)


@command()
@click.argument("run", type=RUN)
@click.option("--queries", required=True, type=PATH, metavar="F",
              help="File of queries, or folder of a collection")  # fmt: skip
@click.option("--index", metavar="NAME", help="Index loaded from RUN: measure its engines and choose one")
@stage_options(PlanOptions, qrels=PATH, out=PATH, sample=SAMPLE, loss=click.FloatRange(0, 1, max_open=True))
@click.option("--all", "every", is_flag=True, help="Show all rows of the frontier, not only ten")
@pipeline_options("model index query", "engine")
@connection_options
@json_option
def plan(run: Place, queries: Path, options: PlanOptions, every: bool, as_json: bool, **named: Any) -> int:
    """Find the cheapest pruning, or with --index the fastest engine, that loses no more than --loss.

    \b
    plan RUN --queries F --out DIR                        how to prune
    load RUN --index NAME --pipeline DIR/pipeline.toml    apply it
    plan RUN --queries F --index NAME                     which engine to use

    The index remembers the query settings of the plan that was applied.

    Every pruning rule is tried in one pass; the ground truth is exact search of unpruned vectors. One half of the
    queries chooses, the other half confirms: on both, the 95% interval of the loss must end within --loss. The table
    shows the Pareto frontier, and exact search for comparison; * marks the chosen setting.

    Exit code 1: no setting is certain to keep the loss within --loss.
    """
    if named["index"] is None:
        refuse_flags(CONNECTION_FLAGS, "is for --index: a run folder is planned without a server")
    from sparse_ingest.planning.drawing import as_text
    from sparse_ingest.planning.plan import plan as plan_run

    with TerminalReporter() as reporter:
        report = plan_run(run, queries, options=options, progress=reporter, **named)
    lines = as_text(report, every=every).split("\n")
    if options.out and report.choice:
        flags = f" --pipeline {shlex.quote(str(Path(options.out) / 'pipeline.toml'))}"
    else:
        flags = report.load_flags
    if flags:
        lines.append(f"To apply it: sparse-ingest load {run} --index {report.index or 'NAME'}{flags}")
    print_report(as_json, report.to_dict(), lines)
    for path in report.written:
        click.echo(f"Wrote {path}", err=True)
    return 0 if report.choice else 1
