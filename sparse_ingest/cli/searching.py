"""`search`: search an index or a run folder for one text, with the terms of each score, or for a file of queries."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparse_ingest.cli import querying
from sparse_ingest.cli.completion import RUN
from sparse_ingest.cli.help import command
from sparse_ingest.cli.options import (
    CONNECTION_FLAGS,
    F,
    connection_options,
    joined_options,
    json_option,
    pipeline_options,
    print_json,
    print_report,
    refuse_flags,
    stage_options,
    utf8_text,
)
from sparse_ingest.cli.querying import queries_options, require_one_input
from sparse_ingest.cli.showing import print_explanation, shares
from sparse_ingest.cli.terminal import bold
from sparse_ingest.errors import UsageError
from sparse_ingest.pipeline import HybridSettings, Pipeline
from sparse_ingest.searching.options import SearchOptions
from sparse_ingest.storage.places import Place

if TYPE_CHECKING:
    from sparse_ingest.cluster.connection import Connection
    from sparse_ingest.searching.hits import Hit, Ranked
    from sparse_ingest.searching.search import SearchableIndex, SearchableRun

SHOWN_TERMS = 6
MOST_AT_ONCE = 32


@dataclass(frozen=True)
class Target:
    """The index or run folder to search, and the model."""

    index: str | None
    run: Place | None
    force: bool
    pipeline: Pipeline
    connection: Connection

    def opened(self, *, connects: bool = False) -> contextlib.AbstractContextManager[SearchableRun | SearchableIndex]:
        """Open the index or run for the block. Raise `UsageError` if both are given, or neither.

        `connects`: the command uses the connection too, so that its options are allowed with a run.
        """
        from sparse_ingest.searching.search import open_run

        if (self.index is None) == (self.run is None):
            raise UsageError("Give either --index NAME or --run RUN.")
        how: dict[str, Any] = {"pipeline": self.pipeline, "force": self.force}
        if self.run is not None:
            refuse_flags(
                (() if connects else CONNECTION_FLAGS), "is for --index: a run folder is searched without a server"
            )
            return contextlib.nullcontext(open_run(self.run, **how))
        return querying.opened_index(str(self.index), self.connection, **how)


def target_options(force: str, tables: str = "model index query") -> Callable[[F], F]:
    """Add --index, --run, --force and the options of model and connection; the command receives `target`."""
    options = {
        "index": click.option("--index", metavar="NAME", help="Search this index or alias"),
        "run": click.option("--run", metavar="RUN", type=RUN, help="Search this run folder, without a server"),
        "force": click.option("--force", is_flag=True, help=force),
    }
    target = joined_options("target", Target, options, "pipeline", "connection")
    return lambda command: pipeline_options(tables)(connection_options(target(command)))


@command()
@click.argument("text", required=False, type=utf8_text)
@queries_options
@stage_options(SearchOptions, concurrency=click.IntRange(1, MOST_AT_ONCE))
@click.option("--explain", is_flag=True, help="Show query weight x stored weight of every term")
@click.option("--doc", metavar="ID", type=utf8_text, help="Show the rank of this document, or why it is not a hit")
@click.option("--trec", is_flag=True, help="Print a TREC run: query Q0 document rank score tag")
@json_option
@target_options("Allow a model that differs from the model of the index or run")
def search(text: str | None, queries_path: Path | None, target: Target, options: SearchOptions, **given: Any) -> None:
    """Search an index or a run folder for TEXT, and show the terms of each score.

    The default model is stored in the run or index; --model or --pipeline can give its new location. With --queries it
    prints a TREC run, or with --json one line per query, and latencies on standard error.
    """
    from sparse_ingest.corpora.collections import read_queries
    from sparse_ingest.evaluation.trec import trec_lines
    from sparse_ingest.searching.hits import Ranked

    explain, trec, as_json = (given[name] for name in ("explain", "trec", "as_json"))
    require_one_input(text, queries_path)
    if trec and as_json:
        raise UsageError("--trec and --json cannot be combined. Pass one of them.")
    _refuse_conflicts(target, options, many=text is None)
    if given["doc"] is not None:
        refuse_flags(("collapse", "explain", "hybrid", "trec", "queries_path"), "cannot be combined with --doc")
    with target.opened() as opened:
        if text is None:
            ranked = opened.rank(read_queries(queries_path or Path(), given["quoting"]), options)
            _print_ranked(ranked, options.concurrency if target.run is None else None, as_json=as_json)
            return
        weights = opened.query_weights(text)
        if given["doc"] is not None:
            print_explanation(as_json, weights, opened.explain(weights, given["doc"], options))
            _say_no_words(opened)
            return
        hits = opened.search(text, options)
        why = [] if hits else opened.why_empty(text, options)
        words = opened.has_words
        if explain and hits:
            _say_no_words(opened)
    if trec:
        # One query has no id of its own.
        one = Ranked("1", [hit.id for hit in hits], [hit.score for hit in hits])
        click.echo(trec_lines(one), nl=False)
    else:
        found = {"query": weights, "hits": [hit.to_dict(words=words) for hit in hits], "why": why}
        print_report(as_json, found, (line for hit in hits for line in _as_lines(hit, words, explain=explain)))
    if not hits and not as_json:
        # A query without weights is logged when it is encoded.
        click.echo(" ".join(["Nothing found.", *(why if weights else why[1:])]), err=True)


def _refuse_conflicts(target: Target, options: SearchOptions, *, many: bool) -> None:
    """Refuse options that would have no effect."""
    if target.run is not None:
        why = "needs a server, and --run searches exactly without one"
        hybrid = () if options.hybrid is False else HybridSettings.__dataclass_fields__
        refuse_flags(("filter", "allow_partial", *hybrid), why)
        if target.pipeline.query.engine:
            raise UsageError(f"--engine {why}. Omit it.")
    if many:
        refuse_flags(("collapse", "explain"), "is for one TEXT")
    if not many and options.concurrency > 1:
        raise UsageError("--concurrency needs --queries. Omit it.")


def _print_ranked(ranked: Iterator[Ranked], concurrency: int | None, *, as_json: bool) -> None:
    """Print the rankings, then their times; `concurrency` is None for a run folder."""
    from sparse_ingest.evaluation.trec import trec_lines

    began = time.perf_counter()
    latencies: list[float] = []
    took: list[float] = []
    empty = 0
    with tempfile.TemporaryFile("w+", encoding="utf-8", newline="") as trec:
        for one in ranked:
            latencies.append(one.latency_s * 1000)
            if one.took_ms is not None:
                took.append(one.took_ms)
            empty += not one.doc_ids
            if as_json:
                pairs = enumerate(zip(one.doc_ids, one.scores, strict=True), start=1)
                hits = [{"rank": rank, "id": doc_id, "score": score} for rank, (doc_id, score) in pairs]
                line = {"query_id": one.query_id, "hits": hits, "latency_ms": latencies[-1], "took_ms": one.took_ms}
                print_json(line, indent=None)
            else:
                # An id that a TREC run cannot contain is refused before the first line is printed.
                trec.write(trec_lines(one))
        trec.seek(0)
        for text in trec:
            click.echo(text, nl=False)
    seconds, count = time.perf_counter() - began, len(latencies)
    if not count:
        click.echo("The file has no queries.", err=True)
        return
    summary = f"{count} queries in {seconds:.2f} s, {count / seconds:.1f} queries/s, including encoding."
    if empty:
        summary += f" {empty} of them have no hits: search for one TEXT to see why."
    if concurrency is not None:
        in_flight = f" with {concurrency} in flight" if concurrency > 1 else ""
        summary += f" A request took {_percentiles(latencies)}{in_flight}; the server reports {_percentiles(took)}."
    click.echo(summary, err=True)


def _percentiles(milliseconds: list[float]) -> str:
    import numpy as np

    p50, p95, p99 = np.percentile(milliseconds, [50, 95, 99])
    return f"p50 {p50:.1f} ms, p95 {p95:.1f} ms, p99 {p99:.1f} ms"


def _say_no_words(opened: SearchableRun | SearchableIndex) -> None:
    from sparse_ingest.checkpoints.sides import NO_WORDS

    if not opened.has_words:
        click.echo(NO_WORDS, err=True)


def _as_lines(hit: Hit, words: bool, *, explain: bool) -> list[str]:
    from sparse_ingest.searching.hits import marked, snippet

    title = " ".join(str(hit.fields.get("title") or "").split())
    matched = hit if words else hit._replace(terms=[])  # the feature 7 is not a 7 in the text
    text = marked(snippet(matched), matched, bold)
    lines = [f"{hit.rank:>3}  {hit.score:.4f}  {hit.id}  {title}".rstrip(), text]
    if explain:
        lines += shares(hit, hit.sub_scores)
    else:
        if hit.sub_scores is not None:
            lines.append(" · ".join(f"{name} score {score:.4f}" for name, score in hit.sub_scores.items()))
        shown = [f"{term.token} {term.contribution:.2f}" for term in hit.terms[:SHOWN_TERMS]]
        lines.append(" · ".join(shown + (["…"] if len(hit.terms) > SHOWN_TERMS else [])))
    return [lines[0], *(f"     {line}" for line in lines[1:] if line)]
