"""The commands `encode` and `status`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from sparse_ingest.cli.completion import RUN
from sparse_ingest.cli.help import command
from sparse_ingest.cli.options import json_option, pipeline_options, print_report, print_result, stage_options
from sparse_ingest.cli.progress import TerminalReporter
from sparse_ingest.encoding.options import EncodeOptions
from sparse_ingest.errors import CorpusError, UsageError, counted
from sparse_ingest.pipeline import Pipeline
from sparse_ingest.reporting import duration_text, size_text
from sparse_ingest.storage.places import Place

if TYPE_CHECKING:
    from sparse_ingest.encoding.survey import CorpusSurvey
    from sparse_ingest.encoding.trial import Prediction
    from sparse_ingest.runs.run import Run

# Labels of `status` that differ from the JSON key, apart from those of counts.
_LABELS = {"run_id": "run id", "seconds": "seconds per stage"}


@command()
@pipeline_options("model encode", "engine")
@click.option("--corpus", "specs", multiple=True, required=True, metavar="SPEC",
              help="File, folder, glob, s3://, gs:// or https:// address, hf:NAME[@REVISION][:CONFIG[:SPLIT]] for a "
                   "dataset, or - for standard input; may be repeated")  # fmt: skip
@click.option("--out", type=RUN, metavar="RUN", help="Run folder to create or continue, or s3://BUCKET/PREFIX")
@click.option("--dry-run", is_flag=True, help="Check the corpus; with a model, predict size and time")
@stage_options(EncodeOptions)
@json_option
def encode(
    pipeline: Pipeline, specs: tuple[str, ...], out: Place | None, dry_run: bool, options: EncodeOptions, as_json: bool
) -> int:
    """Encode a corpus into a run folder; rerun the command to continue.

    \b
    sparse-ingest encode --pipeline splade-mini --corpus corpus.jsonl --out RUN

    Several machines share a run: --plan-only on one, then --part 1/N to N/N with the same options, at the same time or
    one after another, then --finish.

    Exit code 3: finished, but bad documents were skipped (listed in RUN/skipped), or a dry run found some. --part then
    exits with 0.
    """
    from sparse_ingest.encoding import encode as encoding

    if dry_run:
        with TerminalReporter() as reporter:
            found = encoding.dry_run(specs, pipeline=pipeline, options=options, progress=reporter)
        print_report(as_json, asdict(found), _surveyed(found))
        if not (found.documents or options.allow_empty):
            raise CorpusError("The corpus has no documents. Check --corpus, or pass --allow-empty.")
        return 3 if found.bad or found.duplicates else 0
    if out is None:
        raise UsageError("No run folder. Name one with --out, or only check the corpus with --dry-run.")
    with TerminalReporter(stops_after="window") as reporter:
        run = encoding.encode(specs, out, pipeline=pipeline, options=options, progress=reporter)
    if options.plan_only or options.part:
        _print_step(run, options, as_json)
        return 0
    report = run.report
    row = "passage" if run.manifest.identity.get("overflow") == "passages" else "document"
    lines = [
        f"{run.path}: {report.rows:,} {row}s, {report.terms:,} terms "
        f"({report.terms / max(1, report.rows):.1f} per {row}) in {counted(report.shards, 'shard')}; "
        f"{report.empty:,} without terms, {report.truncated:,} truncated to the model's limit, "
        f"{report.underflow:,} weights below the float16 range."
    ]
    if report.windows > report.rows:
        lines.append(f"The documents were read in {report.windows:,} windows.")
    if report.reused:
        lines.append(f"{report.reused:,} vectors were copied instead of computed.")
    if report.deduplicated:
        lines.append(f"{report.deduplicated:,} documents share the vector of an equal text.")
    print_result(as_json, report.to_dict(), lines)
    if report.skipped:
        click.echo(f"Bad documents that were skipped: {report.skipped:,} (listed in {run.path / 'skipped'}).", err=True)
    return 3 if report.skipped else 0


def _print_step(run: Run, options: EncodeOptions, as_json: bool) -> None:
    """Print what a step of a shared run planned or made."""
    from sparse_ingest.encoding.planner import part_of, stored_starts

    starts = stored_starts(run)
    shards = part_of(options.part, starts) if options.part else range(len(starts.positions))
    done = len(run.done_shards())
    state = {
        "run": str(run.path),
        "run_id": run.manifest.run_id,
        "rows": starts.rows,
        "shards": len(starts.positions),
        "done": done,
        "first": shards.start,
        "end": shards.stop,
    }
    what = f"{starts.rows:,} rows in {counted(len(starts.positions), 'shard')} are planned"
    then = "encode them with --part 1/N to N/N, then run --finish"
    if options.part:
        named = f"shards {shards.start} to {shards.stop - 1}" if len(shards) > 1 else f"shard {shards.start}"
        what = f"part {options.part} is done ({named if shards else 'no shard'})"
        then = f"{done} of {counted(len(starts.positions), 'shard')} are done"
        if done == len(starts.positions):
            then += "; run --finish"
    if run.complete():
        then = "the run is complete"
    print_result(as_json, state, [f"{run.path}: {what}; {then}."])


def _surveyed(found: CorpusSurvey) -> Iterator[str]:
    yield (
        f"{found.rows:,} rows: {found.documents:,} documents ({found.empty:,} with an empty text) of "
        f"{found.text_bytes:,} bytes of text in {counted(found.shards, 'shard')}; "
        f"{counted(found.bad, 'bad row')}, {counted(found.duplicates, 'duplicate id')}."
    )
    if found.equal_texts:
        yield (
            f"Documents with an earlier text: {found.equal_texts:,}, {found.equal_in_shard:,} of them in the "
            "same shard: --dedup-text encode-once computes those only once."
        )
    if tokens := found.tokens:
        yield (
            f"Tokens per document, in a sample of {tokens['documents']:,}: mean {tokens['mean']:,.1f}, "
            f"median {tokens['median']:,.0f}, 95th percentile {tokens['p95']:,.0f}, maximum {tokens['longest']:,.0f}; "
            f"{tokens['longer']:.1%} are longer than the model's limit."
        )
    if found.prediction:
        yield from _predicted(found.prediction, found.documents)
    yield from found.examples


def _predicted(run: Prediction, documents: int) -> Iterator[str]:
    """Yield the size and time of a run, and the time on other devices if it was measured."""
    yield f"Prediction for the run, from {run.sampled:,} documents encoded on this machine:"
    for what, count in (("tokens", run.tokens), ("terms", run.terms)):
        yield f"  {what:<14}{count:,} ({count / max(1, documents):,.1f} per document)"
    yield f"  {'run folder':<14}{size_text(run.run_bytes)}"
    yield f"  {'merged index':<14}{size_text(run.index_bytes)}, without replicas"
    speed = f"{run.tokens_per_second:,.0f} tokens/s on {run.device} in {run.dtype}"
    yield f"  {'time here':<14}{duration_text(run.seconds)}, {speed}"
    for other in run.others:
        seconds = other["seconds"]
        shown = f"{duration_text(seconds)} in {other['dtype']}" if isinstance(seconds, float) else "not measured"
        yield f"  {'elsewhere':<14}{shown}: {other['device']}"


@command()
@click.argument("run", type=RUN)
@json_option
def status(run: Place, as_json: bool) -> None:
    """Show the settings, shards and documents of a run folder, and where it was loaded."""
    from sparse_ingest.cluster.journal import journals
    from sparse_ingest.runs.files import COUNT_LABELS, STAGE_LABELS
    from sparse_ingest.searching.search import open_run

    opened = open_run(run)
    opened.refuse_mixed()
    manifest = opened.manifest
    seconds: Counter[str] = Counter()
    for shard in opened.done_shards():
        seconds.update((opened.done(shard) or {}).get("seconds", {}))
    state: dict[str, Any] = {
        "run": str(run),
        "run_id": manifest.run_id,
        "model": manifest.model.get("document"),
        "dtype": manifest.identity.get("dtype"),
        "complete": opened.complete() is not None,
        **opened.totals(),
        "seconds": {stage: round(spent, 1) for stage, spent in seconds.items()},
        "loads": [
            {
                "cluster_uuid": cluster_uuid,
                "index_uuid": index_uuid,
                "shards": len(journal.finished()),
                "dead": sum(1 for _ in journal.dead()),
            }
            for (cluster_uuid, index_uuid), journal in journals(opened).items()
        ],
    }
    shown = {
        **state,
        "complete": "yes" if state["complete"] else "no",
        "seconds": ", ".join(f"{STAGE_LABELS.get(key, key)} {spent:,}" for key, spent in state["seconds"].items()),
    }
    lines = [
        ((COUNT_LABELS | _LABELS).get(key, key), f"{value:,}" if isinstance(value, int) else value)
        for key, value in shown.items()
        if key != "loads"
    ]
    for load in state["loads"]:
        shards = counted(load["shards"], "shard")
        lines.append(("loaded", f"{shards} into index {load['index_uuid']}, {load['dead']} refused"))
    print_report(as_json, state, (f"{label:>27}  {value}" for label, value in lines))
