"""The command `demo`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparse_ingest.cli.encoding import EncodeProgress
from sparse_ingest.cli.options import json_option, print_json

if TYPE_CHECKING:
    from sparse_ingest.cli.demo_steps import Answers, DemoReport
    from sparse_ingest.searching.search import Hit

COLUMN = 52  # characters of one engine's column


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), default=Path("demo-run"), show_default=True,
              help="Where the corpus and the run folder go")  # fmt: skip
@click.option("--keep-server", is_flag=True, help="Leave the server running, to ask more")
@json_option
def demo(folder: Path, keep_server: bool, as_json: bool) -> None:
    """Run the whole pipeline on Python's language reference: encode, load, verify, search.

    Needs the extra "demo". Downloads OpenSearch (180 MB) the first time and says so.
    """
    from sparse_ingest.cli.demo_steps import run_demo

    began = time.monotonic()
    with EncodeProgress() as progress:
        report = run_demo(folder, progress=progress, keep_server=keep_server, note=progress.note)
    if as_json:
        print_json(_as_json(report))
        return
    for answers in report.answers:
        click.echo("\n".join(_as_text(answers)))
    click.echo(
        f"\nAll of it took {time.monotonic() - began:.0f} s. BERT-tiny is the smallest of SPLADE models; on small"
    )
    click.echo("collections BM25 often beats it, which is why it stands beside it. Ask your own question:\n")
    if keep_server or not report.server_started:
        click.echo(f'  sparse-ingest search --url {report.url} --index {report.loaded.index} "what is a decorator"')
        click.echo("  sparse-ingest server stop")
    else:
        click.echo(f'  sparse-ingest search --run {report.run} "what is a decorator"      (no server needed)')
        click.echo("  sparse-ingest demo --keep-server                                  (and then search --index)")


def _as_text(answers: Answers) -> list[str]:
    lines = ["", click.style(answers.question, bold=True), f"    {'learned sparse':<{COLUMN}}  BM25"]
    for rank in range(max(len(answers.sparse), len(answers.bm25))):
        left, right = (_title(hits[rank]) if rank < len(hits) else "" for hits in (answers.sparse, answers.bm25))
        lines.append(f"  {rank + 1} {left:<{COLUMN}}  {right}".rstrip())
    if answers.sparse:
        best = answers.sparse[0]
        text = " ".join(str(best.fields.get("text", "")).split())
        terms = " · ".join(f"{term.token} {term.contribution:.1f}" for term in best.terms[:6])
        lines += [f"    {text[:100]}…", f"    {best.score:.2f} = {terms} · …"]
    return lines


def _title(hit: Hit) -> str:
    title = f"{hit.doc_id}  {hit.fields.get('title', '')}"
    return title if len(title) <= COLUMN else title[: COLUMN - 1] + "…"


def _as_json(report: DemoReport) -> dict[str, Any]:
    return {
        "url": report.url,
        "corpus": str(report.corpus),
        "run": str(report.run),
        "documents": report.encoded.rows,
        "terms": report.encoded.terms,
        "loaded": report.loaded.acknowledged,
        "refused": report.loaded.refused,
        "weights_checked": report.verified.checked_weights,
        "weights_differing": report.verified.differing,
        "answers": [
            {
                "question": answers.question,
                "sparse": [{"id": hit.doc_id, "score": hit.score} for hit in answers.sparse],
                "bm25": [{"id": hit.doc_id, "score": hit.score} for hit in answers.bm25],
            }
            for answers in report.answers
        ],
    }


COMMANDS = [demo]
