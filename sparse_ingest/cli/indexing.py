"""The commands of `index`, and `idf`."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparse_ingest.cli.help import Group, command
from sparse_ingest.cli.options import (
    NO_MODEL,
    connection_options,
    json_option,
    pipeline_options,
    print_report,
    print_table,
    stage_options,
)
from sparse_ingest.cli.progress import TerminalReporter
from sparse_ingest.corpora.options import IdfOptions
from sparse_ingest.errors import UsageError, counted
from sparse_ingest.pipeline import Pipeline, in_words
from sparse_ingest.reporting import size_text

if TYPE_CHECKING:
    from sparse_ingest.cluster.connection import Connection
    from sparse_ingest.cluster.index_admin import IndexReport

_INDEX = click.option("--index", required=True, metavar="NAME", help="Name of the index")


@click.group(cls=Group)
def index() -> None:
    """List, create, show or delete indexes.

    \b
    sparse-ingest index list
    sparse-ingest index create --index articles --search-pipeline two-phase
    sparse-ingest index show   --index articles
    sparse-ingest index drop   --index articles
    """


@index.command("list")
@click.argument("pattern", default="*", metavar="[PATTERN]")
@connection_options
@json_option
def list_(pattern: str, connection: Connection, as_json: bool) -> None:
    """List the indexes that sparse-ingest created or loaded.

    PATTERN, such as 'articles*', limits the list. Pass one if you may not read all indexes of the cluster. Values that
    you may not read are shown as "unknown".
    """
    from sparse_ingest.cluster.index_list import list_indexes

    found = list_indexes(pattern, connection=connection)
    rows = [
        [
            one.index,
            ", ".join(one.aliases) or "-",
            "unknown" if one.documents is None else f"{one.documents:,}",
            "unknown" if one.bytes is None else size_text(one.bytes),
            one.kind or "-",
            one.model or "-",
            {"done": "done", "loading": "unfinished"}.get(one.load or "", "never"),
            (one.created or "unknown")[:16].replace("T", " "),
        ]
        for one in found
    ]
    headings = ["index", "aliases", "documents", "size", "kind", "model", "load", "created (UTC)"]
    print_table(as_json, [asdict(one) for one in found], headings, rows)
    if not found and not as_json:
        click.echo("Found no index that sparse-ingest created or loaded.", err=True)


@index.command()
@_INDEX
@pipeline_options("index encode", *NO_MODEL)
@click.option("--field", help="Name of the sparse field  [default: the pipeline's, otherwise sparse]")
@click.option("--kind", type=click.Choice(["rank_features", "sparse_vector"]), help="Type of the sparse field")
@click.option("--body", metavar="FILE", help="Index body as JSON  [default: the packaged body for the kind]")
@click.option("--search-pipeline", "search", multiple=True,
              type=click.Choice(["two-phase", "neural-query-enricher", "hybrid", "rrf"]),
              help="Processor of the search pipeline NAME-search; may be repeated")  # fmt: skip
@click.option("--ingest-pipeline", "ingest", type=click.Choice(["sparse-encoding", "text-chunking"]),
              help="Processor of the ingest pipeline NAME-ingest, which encodes on the server")  # fmt: skip
@click.option("--model-id", metavar="ID", help="Model on the server for --ingest-pipeline and neural-query-enricher")
@click.option("--default", is_flag=True, help="Make these pipelines the defaults of the index")
@connection_options
@json_option
def create(index: str, as_json: bool, **given: Any) -> None:
    """Create an empty index, for a load with the same settings, and pipelines on the server.

    \b
    index create --index NAME --search-pipeline two-phase --default
    index create --index NAME --ingest-pipeline sparse-encoding --model-id ID

    `load` bypasses the ingest pipeline: its documents have vectors already. The ingest pipeline prunes by
    [encode] of the pipeline file.
    """
    from sparse_ingest.cluster.index_admin import create_index

    with TerminalReporter() as reporter:
        report = create_index(index, progress=reporter, **given)
    lines = [f"Created the empty index {report.index!r} with the {report.kind} field {report.field!r}."]
    for what, name, key in (
        ("search", report.search_pipeline, "search_pipeline"), ("ingest", report.ingest_pipeline, "pipeline")
    ):  # fmt: skip
        if name:
            use = "is the index's default" if report.default else f"is used by requests that name it ({key})"
            lines.append(f"The {what} pipeline {name!r} {use}.")
    print_report(as_json, asdict(report), lines)


@index.command()
@_INDEX
@connection_options
@json_option
def show(index: str, connection: Connection, as_json: bool) -> None:
    """Show the field, model, load, documents, size and pipelines of an index or alias."""
    from sparse_ingest.cluster.index_admin import show_index

    report = show_index(index, connection=connection)
    print_report(as_json, asdict(report), (f"{key:>16}  {value}" for key, value in _shown(report).items() if value))


@index.command()
@_INDEX
@click.option("--yes", is_flag=True, help="Do not ask for confirmation")
@click.option("--force", is_flag=True, help="Also delete an index that is red, behind an alias, or of another client")
@connection_options
@json_option
def drop(index: str, yes: bool, force: bool, connection: Connection, as_json: bool) -> int:
    """Delete an index that sparse-ingest created or loaded, and the pipelines that `index create` installed for it.

    Run folders, and pipelines that another client replaced or another index uses, are kept.
    """
    from sparse_ingest.cluster.index_admin import drop_index

    report = drop_index(index, connection=connection, force=force, sure=(lambda _: True) if yes else _ask)
    if report is None:
        click.echo("Nothing was deleted.", err=True)
        return 1
    many = "an unknown number of" if report.documents is None else f"{report.documents:,}"
    lines = [f"Index {report.index!r} was deleted, with {many} documents."]
    if report.pipelines:
        lines.append(f"Its pipelines were deleted: {', '.join(report.pipelines)}.")
    print_report(as_json, asdict(report), lines)
    for message in report.kept:
        click.echo(message, err=True)
    return 0


@command()
@pipeline_options("model", "engine")
@click.option("--corpus", "specs", multiple=True, required=True, metavar="SPEC",
              help="File, folder, address, hf:NAME, or - for standard input (see encode); may be repeated")  # fmt: skip
@click.option("--out", required=True, type=click.Path(path_type=Path), metavar="F", help="Table to write, idf.json")
@stage_options(IdfOptions, "keep", "no_text")
@json_option
def idf(pipeline: Pipeline, specs: tuple[str, ...], out: Path, options: IdfOptions, as_json: bool) -> int:
    """Count a corpus and write the IDF weight of each token, for inference-free queries.

    \b
    sparse-ingest idf --model MODEL --corpus corpus.jsonl --out idf.json

    The weight of a token is ln(1 + (N - n + 0.5) / (n + 0.5)) if n of N documents have it, and 1.0 if no document does.
    A folder with this idf.json and the model's tokenizer files can be used as [model] query; a tokenizer model of
    OpenSearch consists of the same two files. Needs no torch.

    Exit code 3: finished, but bad documents were skipped.
    """
    from sparse_ingest.queries.idf import write_idf

    with TerminalReporter() as reporter:
        report = write_idf(specs, out, pipeline=pipeline, options=options, progress=reporter)
    line = (
        f"{report.out}: weights of {report.vocabulary:,} tokens, {report.seen:,} of them in "
        f"{counted(report.documents, 'document')}; the others have weight 1."
    )
    print_report(as_json, {**report._asdict(), "out": str(report.out)}, [line])
    if report.skipped:
        click.echo(f"Bad documents that were skipped: {report.skipped:,}.", err=True)
    return 3 if report.skipped else 0


def _ask(question: str) -> bool:
    if sys.stdin is None or not sys.stdin.isatty():
        raise UsageError(f"{question} Standard input is not a terminal: pass --yes.")
    return click.confirm(question, err=True)


def _shown(report: IndexReport) -> dict[str, object]:
    """Return a report as text by label; missing values are None or empty."""
    model = report.model or {}
    loaded = f"run {report.run_id}, {report.load}" if report.run_id else "never loaded by sparse-ingest"
    fields = (f"{name} ({kind or 'not mapped'})" for name, kind in sorted(report.fields.items()))
    return {
        "index": report.index if report.index == report.asked else f"{report.index} (alias {report.asked})",
        "uuid": report.uuid,
        "aliases": ", ".join(report.aliases),
        "field": f"{report.field} ({report.kind})" if report.field else "no sparse field",
        "model": model.get("document"),
        "revision": model.get("revision"),
        "load": report.unreadable or loaded,
        "runs": len(report.runs) if len(report.runs) > 1 else None,
        "pruning": in_words(report.pruning or {}),
        "query settings": in_words(report.query or {}),
        "kept fields": ", ".join(fields),
        "token map": f"{report.numbered_tokens:,} tokens" if report.numbered_tokens is not None else None,
        "documents": f"{report.documents:,}",
        "size": f"{size_text(report.bytes)} in {counted(report.segments, 'segment')}",
        "shards": f"{counted(report.primaries, 'primary', 'primaries')}, {counted(report.replicas, 'replica')} each",
        "search pipeline": report.search_pipeline,
        "ingest pipeline": report.ingest_pipeline,
        "final pipeline": report.final_pipeline,
        "installed": ", ".join(report.installed),
    }
