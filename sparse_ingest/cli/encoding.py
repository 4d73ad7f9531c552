"""The commands `encode` and `status`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from sparse_ingest.cli.options import json_option, model_options, print_json
from sparse_ingest.cli.progress import Progress, asked_to_stop
from sparse_ingest.pipeline import Pipeline, override


@click.command()
@model_options
@click.option("--corpus", "specs", multiple=True, required=True, metavar="SPEC",
              help="File, folder, glob, or - for standard input; may be repeated")  # fmt: skip
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), metavar="RUN", help="Run folder to make or finish"
)
@click.option("--format", "format_", metavar="FORMAT", help="Format of the corpus whatever its suffix: jsonl")
@click.option("--id-field", metavar="NAME", help="Column of the id; :row numbers the rows  [default: _id, else id]")
@click.option("--text-field", metavar="NAME", help="Column of the text  [default: text]")
@click.option("--title-field", metavar="NAME", help="Column of the title  [default: title, where there is one]")
@click.option("--keep", multiple=True, metavar="FIELD", help="Carry this column into the run; may be repeated")
@click.option("--no-text", is_flag=True, help="Carry neither title nor text into the run")
@click.option("--limit", type=click.IntRange(min=1), help="Encode only the first rows")
@click.option("--on-bad-document", type=click.Choice(["fail", "skip"]), default="fail", show_default=True,
              help="Stop at a bad document, or leave it out and name it in skipped/")  # fmt: skip
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N")
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
              help="Precision of the computation  [default: that of the pipeline, else auto]")  # fmt: skip
@click.option("--weights", type=click.Choice(["float16", "float32"]),
              help="Precision of the stored weights  [default: that of the pipeline, else float16]")  # fmt: skip
@click.option("--max-length", type=click.IntRange(min=1), help="Tokens of a document at most  [default: the model's]")
@click.option("--batch-tokens", type=click.IntRange(min=1), help="Padded tokens of a batch  [default: by device]")
@click.option("--shard-rows", type=click.IntRange(min=1), default=65536, show_default=True, help="Rows of a shard")
@click.option("--trust-corpus", is_flag=True, help="Go on without hashing the rows of finished shards again")
@click.option("--reuse", type=click.Path(path_type=Path), metavar="OLD_RUN",
              help="Copy the vectors of texts that are in this run, made with the same settings")  # fmt: skip
@json_option
def encode(pipeline: Pipeline, specs: tuple[str, ...], out: Path, as_json: bool, **given: Any) -> int:
    """Encode a corpus into a run folder; started again, it continues.

    \b
    sparse-ingest encode --pipeline splade-mini --corpus corpus.jsonl --out RUN

    Exit code 3: finished, but bad documents were left out; RUN/skipped names them.
    """
    from sparse_ingest.corpora.files import FieldNames, open_corpus
    from sparse_ingest.encode import EncodeOptions
    from sparse_ingest.encode import encode as encode_corpus

    settings = {"encode.dtype": "dtype", "encode.weights": "weights", "model.max_length": "max_length",
                "encode.batch_tokens": "batch_tokens"}  # fmt: skip
    pipeline = override(pipeline, [f"{key}={given[name]}" for key, name in settings.items() if given[name]])
    names = FieldNames(
        given["id_field"], given["text_field"], given["title_field"], given["keep"], carry_text=not given["no_text"]
    )
    options = EncodeOptions(
        **{key: given[key] for key in ("device", "shard_rows", "limit", "on_bad_document", "trust_corpus", "reuse")}
    )
    corpus = open_corpus(specs, fields=names, format=given["format_"])
    with EncodeProgress() as progress, asked_to_stop() as stopping:
        report = encode_corpus(corpus, out, pipeline=pipeline, options=options, progress=progress, stopping=stopping)
    if as_json:
        print_json({**report._asdict(), "run": str(report.run)})
    else:
        row = "passage" if pipeline.encode.overflow == "passages" else "document"
        click.echo(
            f"{report.run}: {report.rows:,} {row}s, {report.terms:,} terms "
            f"({report.terms / max(1, report.rows):.1f} a {row}) in {report.shards} shards; "
            f"{report.empty:,} without a term, {report.truncated:,} cut at the model's limit, "
            f"{report.underflow:,} weights too small for float16."
        )
        if report.windows > report.rows:
            click.echo(f"The documents were read in {report.windows:,} windows.")
        if report.reused:
            click.echo(f"{report.reused:,} vectors were copied, not computed.")
    if report.skipped:
        click.echo(f"{report.skipped:,} bad documents were left out; {report.run / 'skipped'} names them.", err=True)
    return 3 if report.skipped else 0


class EncodeProgress(Progress):
    """Documents with tokens a second; the total is estimated from the bytes read so far."""

    def __init__(self) -> None:
        super().__init__("documents")
        self._tokens = 0
        self.describe(lambda seconds: f"{self._tokens / seconds:,.0f} tokens/s" if self._tokens else "")

    def __enter__(self) -> EncodeProgress:
        return self

    def read(self, rows: int, share: float | None) -> None:
        """`rows` of the corpus have been read, which is `share` of it."""
        if share:
            self.expect(round(rows / share))

    def encoded(self, documents: int, tokens: int) -> None:
        """A batch is done."""
        self._tokens += tokens
        self.advance(documents)


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@json_option
def status(run: Path, as_json: bool) -> None:
    """Show what a run folder holds: settings, shards, documents, and where it was loaded."""
    from sparse_ingest.runs.manifest import open_run

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
            stage: round(sum(record["seconds"][stage] for record in records), 1)
            for stage in ("read", "encode", "write")
        },
        "loads": [_load_state(folder) for folder in sorted(run.glob("load/*/*/"))],
    }
    if as_json:
        print_json(state)
        return
    for key, value in state.items():
        if key != "loads":
            click.echo(f"{key:>10}  {value}")
    for load in state["loads"]:
        click.echo(f"{'loaded':>10}  {load['shards']} shards into index {load['index_uuid']}, {load['dead']} refused")


def _load_state(folder: Path) -> dict[str, Any]:
    from sparse_ingest.opensearch.journal import Journal

    journal = Journal(folder)
    return {
        "cluster_uuid": folder.parent.name,
        "index_uuid": folder.name,
        "shards": len(journal.finished()),
        "dead": sum(1 for _ in journal.dead()),
    }


COMMANDS = [encode, status]
