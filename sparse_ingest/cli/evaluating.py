"""`evaluate`: queries and judgements in; measures, sparsity and latency out."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparse_ingest.cli.options import PLACE, connection_options, engine_option, json_option, model_options, print_json
from sparse_ingest.cli.progress import TerminalReporter
from sparse_ingest.errors import UsageError
from sparse_ingest.evaluation.options import EvaluateOptions
from sparse_ingest.pipeline import Pipeline
from sparse_ingest.storage.places import Place

if TYPE_CHECKING:
    from sparse_ingest.cluster.client import Connection
    from sparse_ingest.evaluation.evaluate import Evaluation, Row
    from sparse_ingest.evaluation.measures import Comparison

FILE = click.Path(exists=True, path_type=Path)


@click.command()
@click.option("--queries", type=FILE, metavar="F", help="Queries: a file, or the folder of a BEIR or MTEB collection")
@click.option("--qrels", type=FILE, metavar="F", help="Judgements: a file, or the folder  [default: that of --queries]")
@click.option("--index", metavar="NAME", help="Search this index or alias")
@click.option("--run", "run_path", metavar="RUN", type=PLACE, help="Search this run folder exactly, no server")
@click.option("--stored", is_flag=True, help="With --run: keep 9 bits of each weight, as an index does")
@click.option("--measure", "measures", multiple=True, metavar="NAME",
              help="Measure of ir-measures beside the usual five, such as Success@1; may be repeated")  # fmt: skip
@click.option("-k", "--size", type=click.IntRange(min=1),
              help="How many documents to find  [default: 100, or the largest cut-off]")  # fmt: skip
@click.option("--bm25/--no-bm25", default=None,
              help="Add a row of BM25 (a run: over its texts, in memory)  [default: with an index]")  # fmt: skip
@click.option("--concurrency", type=click.IntRange(min=1),
              help="Requests to an index on their way at once  [default: 1]")  # fmt: skip
@click.option("--nano-beir", "nano_beir", multiple=True, metavar="NAME",
              help="Encode and evaluate a collection of NanoBEIR, or all; may be repeated")  # fmt: skip
@click.option("--nano-beir-data", metavar="D", help="Data set or folder with NanoBEIR's layout  "
              "[default: sentence-transformers/NanoBEIR-en]")  # fmt: skip
@click.option("--device", help="Where --nano-beir encodes: auto, cpu or cuda  [default: auto]")
@click.option("--trec-run", "trec_run", metavar="FILE", type=click.Path(dir_okay=False, path_type=Path),
              help="Write what was found as a run file of trec_eval")  # fmt: skip
@click.option("--compare", "other", metavar="RUNFILE", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="Test against this run file of trec_eval: paired t-test and randomisation")  # fmt: skip
@click.option("--per-query", is_flag=True, help="Print the values of each query too")
@click.option("--force", is_flag=True, help="Ask with another model than the one that encoded the documents")
@json_option
@model_options
@engine_option
@connection_options
def evaluate(
    pipeline: Pipeline,
    connection: Connection,
    index: str | None,
    run_path: Place | None,
    as_json: bool,
    measures: tuple[str, ...],
    size: int | None,
    nano_beir: tuple[str, ...],
    **given: Any,
) -> None:
    """Measure how well an index or a run folder answers queries that have judgements.

    \b
    sparse-ingest evaluate --queries queries.jsonl --qrels qrels/test.tsv --index NAME
    sparse-ingest evaluate --queries COLLECTION --run RUN
    sparse-ingest evaluate --nano-beir all --model MODEL

    Queries without judgements are not asked; a query that finds nothing counts as zero; of equal scores the larger
    document id comes first, as in trec_eval. The model is the one that made the run or the index.
    """
    from sparse_ingest.evaluation.measures import DEFAULT_MEASURES, depth_of

    _refuse_conflicts(
        {**given, "index": index, "run": run_path, "engine": pipeline.query.engine, "nano_beir": nano_beir}
    )
    options = EvaluateOptions(
        stored=given["stored"],
        measures=measures,
        k=size,
        bm25=given["bm25"],
        concurrency=given["concurrency"],
        trec_run=given["trec_run"],
        compare=given["other"],
    )
    if nano_beir:
        _nano_beir(nano_beir, pipeline, options, given["nano_beir_data"], given["device"], as_json=as_json)
        return
    needed = depth_of([*DEFAULT_MEASURES, *measures])
    if size is not None and size < needed:
        click.echo(
            f"-k {size} is less than the cut-off {needed} of a measure, to which the rest is not found.", err=True
        )
    evaluation = _evaluate(index, run_path, pipeline, connection, options, given)
    if as_json:
        print_json(evaluation.to_dict(per_query=given["per_query"]))
    else:
        click.echo(_as_text(evaluation))
        if evaluation.comparisons:
            click.echo(_comparison_text(evaluation.comparisons, given["other"]))
        if given["per_query"]:
            click.echo(_per_query_text(evaluation.search))


def _evaluate(
    index: str | None,
    run_path: Place | None,
    pipeline: Pipeline,
    connection: Connection,
    options: EvaluateOptions,
    given: dict[str, Any],
) -> Evaluation:
    from sparse_ingest.evaluation.evaluate import evaluate as evaluate_target
    from sparse_ingest.searching.search import open_index, open_run

    where = {"queries": given["queries"], "qrels": given["qrels"]}
    if run_path is not None:
        return evaluate_target(open_run(run_path, pipeline=pipeline, force=given["force"]), options=options, **where)
    with open_index(str(index), connection=connection, pipeline=pipeline, force=given["force"]) as opened:
        return evaluate_target(opened, options=options, **where)


def _refuse_conflicts(given: dict[str, Any]) -> None:
    """Refuse options of which one would silently have no effect."""
    if given["nano_beir"]:
        names = ["queries", "qrels", "index", "run", "engine", "concurrency", "stored", "force"]
        names += ["trec_run", "other", "per_query"]
        for name in (name for name in names if given[name]):
            option = "compare" if name == "other" else name.replace("_", "-")
            raise UsageError(
                f"--nano-beir brings its own queries and documents, and searches them exactly; leave out --{option}."
            )
        return
    if (given["index"] is None) == (given["run"] is None):
        raise UsageError("Give either --index NAME or --run RUN.")
    for name in ("nano_beir_data", "device"):
        if given[name]:
            raise UsageError(f"--{name.replace('_', '-')} is for --nano-beir: nothing is encoded here.")
    if given["index"] is not None and given["stored"]:
        raise UsageError("--stored is for --run: an index always has the weights that it stores.")


def _nano_beir(
    named: tuple[str, ...],
    pipeline: Pipeline,
    options: EvaluateOptions,
    data_set: str | None,
    device: str | None,
    *,
    as_json: bool,
) -> None:
    from sparse_ingest.corpora.nano_beir import DATA_SET, collections_named
    from sparse_ingest.evaluation.nano_beir import CARD_MEASURES, evaluate_nano_beir, figures, mean_figures

    if not pipeline.model.document:
        raise UsageError("--nano-beir needs the model to evaluate: give --model or --pipeline.")
    names = list(dict.fromkeys([*CARD_MEASURES, *options.measures]))
    with tempfile.TemporaryDirectory(prefix="sparse-ingest-") as folder, TerminalReporter() as reporter:
        found = dict(
            evaluate_nano_beir(
                collections_named(named),
                Path(folder),
                pipeline=pipeline,
                options=replace(options, measures=tuple(names)),
                data_set=data_set or DATA_SET,
                device=device or "auto",
                progress=reporter,
            )
        )
    rows = {name: figures(evaluation, names) for name, evaluation in found.items()}
    mean = mean_figures(list(found.values()), names)
    if as_json:
        print_json({"collections": rows, "mean": mean})
        return
    # As the cards have it: a line for each measure, a column for each collection.
    columns = {**rows, "mean": mean}
    lines = [["", *columns], *([key, *(f"{row[key]:.4f}" for row in columns.values())] for key in mean)]
    click.echo(_table(lines))


def _as_text(evaluation: Evaluation) -> str:
    rows = [evaluation.search, *([evaluation.bm25] if evaluation.bm25 else [])]
    names = list(evaluation.search.measured.mean)
    lines = [["", *names], *([row.name, *(f"{row.measured.mean[name]:.4f}" for name in names)] for row in rows)]
    sides = [["", "count", "active dimensions", "sparsity"]]
    for name, side in (("queries", evaluation.queries), ("documents", evaluation.documents)):
        if side is not None:
            share = "" if side.sparsity is None else f"{side.sparsity:.4f}"
            sides.append([name, f"{side.count:,}", f"{side.active_dimensions:.1f}", share])
    notes = []
    if evaluation.flops is not None:
        notes.append(f"FLOPS {evaluation.flops:.3f}: the terms that a query and a document share, on average")
    return "\n".join([_table(lines), "", _table(sides), *notes, *(_latency_text(row) for row in rows)])


def _latency_text(row: Row) -> str:
    latency = row.latency
    if latency.p50_ms is None:
        return f"{row.name}: {latency.mean_ms:.2f} ms a query, all asked at once"
    return (
        f"{row.name}: p50 {latency.p50_ms:.1f} ms, p95 {latency.p95_ms:.1f} ms, p99 {latency.p99_ms:.1f} ms; "
        f"the server says {latency.took_ms:.0f} ms"
    )


def _comparison_text(comparisons: list[Comparison], path: Path) -> str:
    lines = [["", "here", path.name, "difference", "p (t-test)", "p (randomisation)"]]
    for one in comparisons:
        values = [f"{one.first:.4f}", f"{one.second:.4f}", f"{one.difference:+.4f}"]
        lines.append([one.measure, *values, f"{one.t_test:.4f}", f"{one.randomisation:.4f}"])
    return "\n" + _table(lines)


def _per_query_text(row: Row) -> str:
    names = list(row.measured.per_query)
    lines = [["query", *names]]
    for query_id in row.measured.per_query[names[0]]:
        lines.append([query_id, *(f"{row.measured.per_query[name][query_id]:.4f}" for name in names)])
    return "\n" + _table(lines)


def _table(lines: list[list[str]]) -> str:
    """Columns side by side, the first to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    )


COMMANDS = [evaluate]
