"""The commands `encode` and `status`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from sparse_ingest.cli.options import PLACE, json_option, model_options, print_json
from sparse_ingest.cli.progress import Progress, asked_to_stop
from sparse_ingest.errors import UsageError
from sparse_ingest.pipeline import Pipeline, override
from sparse_ingest.storage.places import Place

if TYPE_CHECKING:
    from sparse_ingest.corpora.sources import Corpus
    from sparse_ingest.encoding.encode import EncodeOptions


@click.command()
@model_options
@click.option("--corpus", "specs", multiple=True, required=True, metavar="SPEC",
              help="File, folder, glob or - for standard input; s3://, gs:// or https:// address of one; or a "
                   "dataset, hf:NAME[@REVISION][:CONFIG[:SPLIT]]; may be repeated")  # fmt: skip
@click.option("--out", type=PLACE, metavar="RUN", help="Run folder to make or finish; may be s3://BUCKET/PREFIX")
@click.option("--dry-run", is_flag=True, help="Read and check the whole corpus, and write nothing")
@click.option("--format", "format_", metavar="FORMAT",
              help="Format of the corpus whatever its suffix: jsonl, csv, tsv, msmarco, parquet or arrow")  # fmt: skip
@click.option("--columns", metavar="A,B,C", help="Names of the columns of csv and tsv files that have no header")
@click.option("--id-field", metavar="NAME", help="Column of the id; :row numbers the rows  [default: _id, else id]")
@click.option("--text-field", metavar="NAME", help="Column of the text  [default: text]")
@click.option("--title-field", metavar="NAME", help="Column of the title  [default: title, where there is one]")
@click.option("--keep", multiple=True, metavar="FIELD", help="Carry this column into the run; may be repeated")
@click.option("--no-text", is_flag=True, help="Carry neither title nor text into the run")
@click.option("--limit", type=click.IntRange(min=1), help="Encode only the first rows")
@click.option("--on-bad-document", type=click.Choice(["fail", "skip"]), default="fail", show_default=True,
              help="Stop at a bad document, or leave it out and name it in skipped/")  # fmt: skip
@click.option("--device", default="auto", show_default=True,
              help="cpu, cuda (all GPUs), cuda:N, or several as cuda:0,cuda:1, each in a process of its own; one may "
                   "stand twice, for two processes that feed it; auto: all GPUs, else the CPU")  # fmt: skip
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16", "int8", "int8-bfloat16"]),
              help="Precision of the computation  [default: that of the pipeline, else auto]")  # fmt: skip
@click.option("--weights", type=click.Choice(["float16", "float32"]),
              help="Precision of the stored weights  [default: that of the pipeline, else float16]")  # fmt: skip
@click.option("--max-length", type=click.IntRange(min=1), help="Tokens of a document at most  [default: the model's]")
@click.option("--batch-tokens", type=click.IntRange(min=1), help="Padded tokens of a batch  [default: by device]")
@click.option("--shard-rows", type=click.IntRange(min=1), default=65536, show_default=True, help="Rows of a shard")
@click.option("--trust-corpus", is_flag=True, help="Go on without hashing the rows of finished shards again")
@click.option("--reuse", type=PLACE, metavar="OLD_RUN",
              help="Copy the vectors of texts that are in this run, made with the same settings")  # fmt: skip
@click.option("--dedup-text", type=click.Choice(["off", "encode-once"]), default="off", show_default=True,
              help="Compute one vector for equal texts of a shard; every document is kept")  # fmt: skip
@json_option
def encode(
    pipeline: Pipeline, specs: tuple[str, ...], out: Place | None, dry_run: bool, as_json: bool, **given: Any
) -> int:
    """Encode a corpus into a run folder; started again, it continues.

    \b
    sparse-ingest encode --pipeline splade-mini --corpus corpus.jsonl --out RUN

    Exit code 3: finished, but bad documents were left out, which RUN/skipped names; or a dry run found some.
    """
    from sparse_ingest.corpora.files import FieldNames, open_corpus
    from sparse_ingest.encoding.encode import EncodeOptions
    from sparse_ingest.encoding.encode import encode as encode_corpus

    settings = {"encode.dtype": "dtype", "encode.weights": "weights", "model.max_length": "max_length",
                "encode.batch_tokens": "batch_tokens"}  # fmt: skip
    pipeline = override(pipeline, [f"{key}={given[name]}" for key, name in settings.items() if given[name]])
    names = FieldNames(
        given["id_field"], given["text_field"], given["title_field"], given["keep"], carry_text=not given["no_text"]
    )
    chosen = ("device", "shard_rows", "limit", "on_bad_document", "trust_corpus", "reuse", "dedup_text")
    options = EncodeOptions(**{key: given[key] for key in chosen})
    columns = given["columns"].split(",") if given["columns"] is not None else None
    corpus = open_corpus(specs, fields=names, format=given["format_"], columns=columns)
    if dry_run:
        return _dry_run(corpus, pipeline, options, as_json)
    if out is None:
        raise UsageError("No run folder was named. Name one with --out, or check the corpus alone with --dry-run.")
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
        if report.deduplicated:
            click.echo(f"{report.deduplicated:,} documents have the vector of an equal text, computed once.")
    if report.skipped:
        click.echo(f"{report.skipped:,} bad documents were left out; {report.run / 'skipped'} names them.", err=True)
    return 3 if report.skipped else 0


def _dry_run(corpus: Corpus, pipeline: Pipeline, options: EncodeOptions, as_json: bool) -> int:
    """Check a corpus, and print what was found; 3 if some of it could not be encoded."""
    from sparse_ingest.encoding.encode import dry_run

    with EncodeProgress("rows") as progress:

        def read(rows: int, share: float | None) -> None:
            progress.read(rows, share)
            progress.reach(rows)

        found = dry_run(corpus, pipeline=pipeline, options=options, progress=read)
    if as_json:
        print_json(asdict(found))
    else:
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


class EncodeProgress(Progress):
    """Documents with tokens a second; the total is estimated from the bytes read so far."""

    def __init__(self, unit: str = "documents") -> None:
        super().__init__(unit)
        self._tokens = 0
        self._slowest: Callable[[], str] = str
        self.describe(self._said)

    def _said(self, seconds: float) -> str:
        rate = f"{self._tokens / seconds:,.0f} tokens/s" if self._tokens else ""
        return ", ".join(part for part in (rate, self._slowest()) if part)

    def stages(self, slowest: Callable[[], str]) -> None:
        """`slowest` tells at any time which stage holds up the others."""
        self._slowest = slowest

    def __enter__(self) -> EncodeProgress:
        return self

    def estimate(self, sentence: str) -> None:
        """What the run will cost."""
        self.note(sentence)

    def copied(self, documents: int) -> None:
        """Vectors of so many documents were copied, not computed."""
        self.earlier(documents)

    def read(self, rows: int, share: float | None) -> None:
        """`rows` of the corpus have been read, which is `share` of it."""
        if share:
            self.expect(round(rows / share))

    def encoded(self, documents: int, tokens: int) -> None:
        """A batch is done."""
        self._tokens += tokens
        self.advance(documents)


@click.command()
@click.argument("run", type=PLACE)
@json_option
def status(run: Place, as_json: bool) -> None:
    """Show what a run folder holds: settings, shards, documents, and where it was loaded."""
    from sparse_ingest.runs.run import open_run

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
