"""`evaluate`: queries and judgements in; measures, sparsity and latency out."""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from sparse_ingest.cli.options import (
    PLACE,
    connection_options,
    engine_option,
    json_option,
    model_options,
    print_json,
)
from sparse_ingest.errors import UsageError
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
    from sparse_ingest.evaluation.evaluate import depth_of
    from sparse_ingest.evaluation.measures import DEFAULT_MEASURES

    if nano_beir:
        _refuse_beside_nano_beir({**given, "index": index, "run": run_path, "engine": pipeline.query.engine})
        _nano_beir(nano_beir, pipeline, measures, size, as_json, given)
        return
    # Each once, in this order.
    names = list(dict.fromkeys([*DEFAULT_MEASURES, *measures]))
    needed = depth_of(names)
    if size is not None and size < needed:
        click.echo(
            f"-k {size} is less than the cut-off {needed} of a measure, to which the rest is not found.", err=True
        )
    size = size or needed
    _refuse_conflicts({**given, "index": index, "run": run_path, "engine": pipeline.query.engine})
    evaluation, comparisons = _evaluate(index, run_path, names, size, pipeline, connection, given)
    if as_json:
        print_json(_as_json(evaluation, comparisons, per_query=given["per_query"]))
    else:
        click.echo(_as_text(evaluation))
        if comparisons:
            click.echo(_comparison_text(comparisons, given["other"]))
        if given["per_query"]:
            click.echo(_per_query_text(evaluation.search))


def _evaluate(
    index: str | None,
    run_path: Place | None,
    names: Sequence[str],
    size: int,
    pipeline: Pipeline,
    connection: Connection,
    given: dict[str, Any],
) -> tuple[Evaluation, list[Comparison]]:
    from sparse_ingest.evaluation.evaluate import (
        compare,
        evaluate_index,
        evaluate_run,
        measure_trec_run,
        read_collection,
    )
    from sparse_ingest.runs.run import open_run
    from sparse_ingest.searching.query import pipeline_of_index, pipeline_of_run
    from sparse_ingest.searching.search import engine_of

    queries, qrels = given["queries"] or given["qrels"], given["qrels"] or given["queries"]
    if queries is None or not (queries.is_dir() or qrels != queries):
        raise UsageError("Give --queries F and --qrels F, or the folder that holds both.")
    collection = read_collection(queries, qrels)
    # Read before the search, which may be long.
    other = measure_trec_run(given["other"], collection, names) if given["other"] else None
    with _written(given["trec_run"]) as trec:
        if run_path is not None:
            run = open_run(run_path)
            pipeline = pipeline_of_run(pipeline, run, force=given["force"])
            evaluation = evaluate_run(
                run,
                collection,
                pipeline,
                measures=names,
                size=size,
                stored=given["stored"],
                bm25=bool(given["bm25"]),
                trec=trec,
            )
        else:
            from sparse_ingest.cluster.client import connect

            client, index = connect(connection), str(index)
            pipeline = pipeline_of_index(pipeline, client, index, force=given["force"])
            evaluation = evaluate_index(
                client,
                index,
                collection,
                pipeline,
                engine_of(pipeline, client, index),
                measures=names,
                size=size,
                concurrency=given["concurrency"] or 1,
                bm25=given["bm25"] is not False,
                trec=trec,
            )
    comparisons = compare(evaluation.search.measured.per_query, other.per_query) if other else []
    return evaluation, comparisons


def _refuse_conflicts(given: dict[str, Any]) -> None:
    """Refuse options of which one would silently have no effect."""
    if (given["index"] is None) == (given["run"] is None):
        raise UsageError("Give either --index NAME or --run RUN.")
    for name in ("nano_beir_data", "device"):
        if given[name]:
            raise UsageError(f"--{name.replace('_', '-')} is for --nano-beir: nothing is encoded here.")
    if given["index"] is not None and given["stored"]:
        raise UsageError("--stored is for --run: an index always has the weights that it stores.")
    if given["run"] is not None and given["concurrency"]:
        raise UsageError("--concurrency is for --index: a run folder answers all queries at once.")
    if given["run"] is not None and given["engine"] not in (None, "exact"):
        raise UsageError(f"The engine {given['engine']} needs --index: a run folder is searched exactly.")


def _refuse_beside_nano_beir(given: dict[str, Any]) -> None:
    names = ["queries", "qrels", "index", "run", "engine", "concurrency", "stored", "force"]
    names += ["trec_run", "other", "per_query"]
    wrong = [name for name in names if given[name]]
    if wrong:
        option = "compare" if wrong[0] == "other" else wrong[0].replace("_", "-")
        raise UsageError(
            f"--nano-beir brings its own queries and documents, and searches them exactly; leave out --{option}."
        )


def _nano_beir(
    asked: tuple[str, ...],
    pipeline: Pipeline,
    measures: tuple[str, ...],
    size: int | None,
    as_json: bool,
    given: dict[str, Any],
) -> None:
    from sparse_ingest.cli.encoding import EncodeProgress
    from sparse_ingest.corpora.nano_beir import DATA_SET, collections_named
    from sparse_ingest.evaluation.evaluate import depth_of
    from sparse_ingest.evaluation.nano_beir import CARD_MEASURES, evaluate_nano_beir, figures, mean_figures

    if not pipeline.model.document:
        raise UsageError("--nano-beir needs the model to evaluate: give --model or --pipeline.")
    names = list(dict.fromkeys([*CARD_MEASURES, *measures]))
    with tempfile.TemporaryDirectory(prefix="sparse-ingest-") as folder:
        found = dict(
            evaluate_nano_beir(
                collections_named(asked),
                Path(folder),
                pipeline=pipeline,
                measures=names,
                size=size or depth_of(names),
                progress=EncodeProgress,
                note=functools.partial(click.echo, err=True),
                data_set=given["nano_beir_data"] or DATA_SET,
                bm25=bool(given["bm25"]),
                device=given["device"] or "auto",
            )
        )
    rows = {name: figures(evaluation) for name, evaluation in found.items()}
    mean = mean_figures(list(found.values()))
    if as_json:
        print_json({"collections": rows, "mean": mean})
        return
    # As the cards have it: a line for each measure, a column for each collection.
    columns = {**rows, "mean": mean}
    lines = [["", *columns], *([key, *(f"{row[key]:.4f}" for row in columns.values())] for key in mean)]
    click.echo(_table(lines))


@contextlib.contextmanager
def _written(path: Path | None) -> Iterator[TextIO | None]:
    """A file that gets its name when the block is done, whole or not at all."""
    if path is None:
        yield None
        return
    if not path.parent.is_dir():
        raise UsageError(f"--trec-run {path}: there is no folder {path.parent}. Make it first.")
    handle, temporary = tempfile.mkstemp(prefix=".new-", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _as_json(evaluation: Evaluation, comparisons: list[Comparison], *, per_query: bool) -> dict[str, Any]:
    def row(row: Row) -> dict[str, Any]:
        values = {**row.measured.mean, "engine": row.name, "latency": row.latency._asdict()}
        if per_query:
            values["per_query"] = row.measured.per_query
        return values

    return {
        **row(evaluation.search),
        "queries": asdict(evaluation.queries),
        "documents": asdict(evaluation.documents) if evaluation.documents else None,
        "flops": evaluation.flops,
        "bm25": row(evaluation.bm25) if evaluation.bm25 else None,
        **({"comparison": [comparison._asdict() for comparison in comparisons]} if comparisons else {}),
    }


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
