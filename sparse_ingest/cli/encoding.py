"""The commands `encode` and `status`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from sparse_ingest.cli.options import PLACE, json_option, model_options, print_json, stage_options
from sparse_ingest.cli.progress import TerminalReporter
from sparse_ingest.encoding.options import EncodeOptions
from sparse_ingest.errors import UsageError
from sparse_ingest.pipeline import Pipeline
from sparse_ingest.storage.places import Place


@click.command()
@model_options
@click.option("--corpus", "specs", multiple=True, required=True, metavar="SPEC",
              help="File, folder, glob or - for standard input; s3://, gs:// or https:// address of one; or a "
                   "dataset, hf:NAME[@REVISION][:CONFIG[:SPLIT]]; may be repeated")  # fmt: skip
@click.option("--out", type=PLACE, metavar="RUN", help="Run folder to make or finish; may be s3://BUCKET/PREFIX")
@click.option("--dry-run", is_flag=True, help="Read and check the whole corpus, and write nothing")
@stage_options(EncodeOptions)
@json_option
def encode(
    pipeline: Pipeline, specs: tuple[str, ...], out: Place | None, dry_run: bool, options: EncodeOptions, as_json: bool
) -> int:
    """Encode a corpus into a run folder; started again, it continues.

    \b
    sparse-ingest encode --pipeline splade-mini --corpus corpus.jsonl --out RUN

    Exit code 3: finished, but bad documents were left out, which RUN/skipped names; or a dry run found some.
    """
    if dry_run:
        return _dry_run(specs, pipeline, options, as_json)
    if out is None:
        raise UsageError("No run folder was named. Name one with --out, or check the corpus alone with --dry-run.")
    from sparse_ingest.encoding.encode import encode as encode_corpus

    with TerminalReporter(stoppable=True) as reporter:
        run = encode_corpus(specs, out, pipeline=pipeline, options=options, progress=reporter)
    report = run.report
    if as_json:
        print_json(report.to_dict())
    else:
        row = "passage" if run.manifest.identity.get("overflow") == "passages" else "document"
        click.echo(
            f"{run.path}: {report.rows:,} {row}s, {report.terms:,} terms "
            f"({report.terms / max(1, report.rows):.1f} a {row}) in {report.shards} shards; "
            f"{report.empty:,} without a term, {report.truncated:,} cut at the model's limit, "
            f"{report.underflow:,} weights too small for float16."
        )
        if report.windows > report.rows:
            click.echo(f"The documents were read in {report.windows:,} windows.")
        if report.reused:
            click.echo(f"{report.reused:,} vectors were copied, not computed.")
        if report.deduplicated:
            click.echo(f"{report.deduplicated:,} documents have the vector of an equal text, computed once.")
    if report.skipped:
        click.echo(f"{report.skipped:,} bad documents were left out; {run.path / 'skipped'} names them.", err=True)
    return 3 if report.skipped else 0


def _dry_run(specs: tuple[str, ...], pipeline: Pipeline, options: EncodeOptions, as_json: bool) -> int:
    """Check a corpus, and print what was found; 3 if some of it could not be encoded."""
    from sparse_ingest.encoding.encode import dry_run

    with TerminalReporter() as reporter:
        found = dry_run(specs, pipeline=pipeline, options=options, progress=reporter)
    if as_json:
        print_json(asdict(found))
        return 3 if found.bad or found.duplicates else 0
    click.echo(
        f"{found.rows:,} rows: {found.documents:,} documents ({found.empty:,} with an empty text) of "
        f"{found.text_bytes:,} bytes of text in {found.shards:,} shards; {found.bad:,} bad rows, "
        f"{found.duplicates:,} ids that an earlier document has."
    )
    click.echo(
        f"{found.equal_texts:,} documents have the text of an earlier one, {found.equal_in_shard:,} of one in "
        "their shard, which --dedup-text encode-once would not compute again."
    )
    if tokens := found.tokens:
        click.echo(
            f"Tokens of a document, by a sample of {tokens['documents']:,}: {tokens['mean']:,.1f} on average, "
            f"{tokens['median']:,.0f} median, {tokens['p95']:,.0f} for 95 % of them, {tokens['longest']:,.0f} at "
            f"most; {tokens['longer']:.1%} are longer than the model takes at a time."
        )
    for example in found.examples:
        click.echo(example)
    return 3 if found.bad or found.duplicates else 0


@click.command()
@click.argument("run", type=PLACE)
@json_option
def status(run: Place, as_json: bool) -> None:
    """Show what a run folder holds: settings, shards, documents, and where it was loaded."""
    from sparse_ingest.searching.search import open_run

    opened = open_run(run)
    manifest = opened.manifest
    records = [record for shard in opened.done_shards() if (record := opened.done(shard))]
    state: dict[str, Any] = {
        "run": str(run),
        "run_id": manifest.run_id,
        "model": manifest.model.get("document"),
        "dtype": manifest.identity.get("dtype"),
        "complete": opened.complete() is not None,
        **opened.totals(),
        "seconds": {
            stage: round(sum(record.get("seconds", {}).get(stage, 0.0) for record in records), 1)
            for stage in dict.fromkeys(stage for record in records for stage in record.get("seconds", {}))
        },
        "loads": [_load_state(folder) for folder in opened.load_folders()],
    }
    if as_json:
        print_json(state)
        return
    state["seconds"] = ", ".join(f"{stage} {seconds:,}" for stage, seconds in state["seconds"].items())
    for key, value in state.items():
        if key != "loads":
            click.echo(f"{key:>12}  {value}")
    for load in state["loads"]:
        click.echo(f"{'loaded':>12}  {load['shards']} shards into index {load['index_uuid']}, {load['dead']} refused")


def _load_state(folder: Place) -> dict[str, Any]:
    from sparse_ingest.cluster.journal import Journal

    journal = Journal(folder)
    return {
        "cluster_uuid": folder.parent.name,
        "index_uuid": folder.name,
        "shards": len(journal.finished()),
        "dead": sum(1 for _ in journal.dead()),
    }


COMMANDS = [encode, status]
