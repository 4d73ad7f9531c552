"""`search`: text in; ranked hits with the terms that made their scores out. Many queries give a run file."""

from __future__ import annotations

import json
import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparse_ingest.cli import querying
from sparse_ingest.cli.options import (
    PLACE,
    connection_options,
    engine_option,
    filter_option,
    json_option,
    model_options,
    print_json,
)
from sparse_ingest.cli.querying import collapse_option, queries_option, size_option
from sparse_ingest.errors import UsageError
from sparse_ingest.pipeline import Pipeline
from sparse_ingest.storage.places import Place

if TYPE_CHECKING:
    from sparse_ingest.cluster.client import Connection
    from sparse_ingest.queries.protocol import QueryWeights
    from sparse_ingest.searching.hits import Hit, Ranked

SHOWN_TERMS = 6
MOST_AT_ONCE = 32


@dataclass(frozen=True)
class Asked:
    """What is searched and how, as the options have it."""

    index: str | None
    run_path: Place | None
    size: int
    collapse: str | None
    filter: dict[str, Any] | None
    hybrid: bool
    explain: bool
    concurrency: int
    force: bool
    pipeline: Pipeline
    connection: Connection

    def refuse_conflicts(self, *, many: bool) -> None:
        """Refuse options of which one would silently have no effect."""
        if (self.index is None) == (self.run_path is None):
            raise UsageError("Give either --index NAME or --run RUN.")
        only_index = {"--filter": self.filter, "--hybrid": self.hybrid, "--engine": self.pipeline.query.engine}
        if self.run_path is not None:
            _refuse(only_index, "asks a server, and --run searches exactly without one")
        if many:
            _refuse(
                {"--collapse": self.collapse, "--explain": self.explain, "--hybrid": self.hybrid}, "is for one TEXT"
            )
        elif self.concurrency > 1:
            raise UsageError("--concurrency goes with --queries; one TEXT is one request.")
        if self.hybrid:
            _refuse({"--collapse": self.collapse, "--explain": self.explain}, "goes without --hybrid")


@click.command()
@click.argument("text", required=False)
@queries_option
@click.option("--index", metavar="NAME", help="Search this index or alias")
@click.option("--run", "run_path", metavar="RUN", type=PLACE, help="Search this run folder exactly, no server")
@size_option
@collapse_option
@filter_option
@click.option("--hybrid", is_flag=True, help="Beside BM25 on title and text; the server brings both scores together")
@click.option("--explain", is_flag=True, help="Show every term of each score: query weight x stored weight")
@click.option("--trec", is_flag=True, help="Print a TREC run: query Q0 document rank score tag")
@click.option(
    "--concurrency",
    type=click.IntRange(1, MOST_AT_ONCE),
    default=1,
    show_default=True,
    help="With --queries: requests on their way at once",
)
@click.option("--force", is_flag=True, help="Search with another model than the index or run was made with")
@json_option
@model_options
@engine_option
@connection_options
def search(text: str | None, queries_path: Path | None, trec: bool, as_json: bool, **options: Any) -> None:
    """Search an index or a run folder for TEXT, and show which terms made each score.

    The model is the one that made the run or the index; --model or --pipeline may name it again, such as where it lies
    elsewhere. With --queries it prints a TREC run, or with --json a line a query, and says on standard error how long
    they took.
    """
    asked = Asked(**options)
    if (text is None) == (queries_path is None):
        raise UsageError("Give either TEXT or --queries F.")
    if trec and as_json:
        raise UsageError("--trec and --json are two forms of the same answer. Give one of them.")
    asked.refuse_conflicts(many=text is None)
    if text is None:
        _print_ranked(_rank(asked, queries_path or Path()), asked, as_json=as_json)
        return
    weights, hits = _search_index(asked, text) if asked.run_path is None else _search_run(asked, text)
    if as_json:
        print_json({"query": weights, "hits": [_as_json(hit) for hit in hits]})
    elif trec:
        _print_trec(hits)
    else:
        for hit in hits:
            click.echo(_as_text(hit, explain=asked.explain))
    if not hits and not as_json:
        click.echo("Nothing found.", err=True)


def _refuse(options: dict[str, Any], why: str) -> None:
    for name in (name for name, given in options.items() if given):
        raise UsageError(f"{name} {why}. Leave it out.")


def _search_index(asked: Asked, text: str) -> tuple[QueryWeights, list[Hit]]:
    from sparse_ingest.cluster.client import connect
    from sparse_ingest.searching.query import pipeline_of_index, weigh
    from sparse_ingest.searching.search import engine_of, search_hybrid, search_index

    client, index = connect(asked.connection), str(asked.index)
    pipeline = pipeline_of_index(asked.pipeline, client, index, force=asked.force)
    engine = engine_of(pipeline, client, index)
    weights = weigh(text, pipeline)
    if asked.hybrid:
        return weights, search_hybrid(client, index, text, weights, size=asked.size, engine=engine, filter=asked.filter)
    hits = search_index(
        client, index, weights, size=asked.size, engine=engine, filter=asked.filter, collapse=asked.collapse
    )
    return weights, hits


def _search_run(asked: Asked, text: str) -> tuple[QueryWeights, list[Hit]]:
    from sparse_ingest.runs.run import open_run
    from sparse_ingest.searching.query import pipeline_of_run, weigh
    from sparse_ingest.searching.search import search_run

    run = open_run(asked.run_path or Path())
    weights = weigh(text, pipeline_of_run(asked.pipeline, run, force=asked.force))
    return weights, search_run(run, weights, size=asked.size, collapse=asked.collapse)


def _rank(asked: Asked, queries_path: Path) -> Iterator[Ranked]:
    """The rankings of a file of queries, in its order."""
    from sparse_ingest.corpora.collections import read_queries
    from sparse_ingest.searching.query import pipeline_of_index, pipeline_of_run, weigh_many
    from sparse_ingest.searching.search import engine_of, rank_index, rank_run

    queries = read_queries(queries_path)
    if asked.run_path is not None:
        from sparse_ingest.runs.run import open_run

        run = open_run(asked.run_path)
        pipeline = pipeline_of_run(asked.pipeline, run, force=asked.force)
        yield from rank_run(run, weigh_many(queries, pipeline), size=asked.size)
        return
    from sparse_ingest.cluster.client import connect

    client, index = connect(asked.connection), str(asked.index)
    pipeline = pipeline_of_index(asked.pipeline, client, index, force=asked.force)
    engine = engine_of(pipeline, client, index)
    yield from rank_index(
        client,
        index,
        weigh_many(queries, pipeline),
        engine,
        size=asked.size,
        filter=asked.filter,
        concurrency=asked.concurrency,
    )


def _print_ranked(ranked: Iterator[Ranked], asked: Asked, *, as_json: bool) -> None:
    from sparse_ingest.evaluation.trec import trec_lines

    began = time.perf_counter()
    latencies, took, empty = array("d"), array("d"), 0
    for one in ranked:
        latencies.append(one.latency_s * 1000)
        if one.took_ms is not None:
            took.append(one.took_ms)
        empty += not one.doc_ids
        if as_json:
            pairs = zip(one.doc_ids, one.scores, strict=True)
            hits = [{"rank": rank, "id": doc_id, "score": score} for rank, (doc_id, score) in enumerate(pairs, start=1)]
            line = {"query_id": one.query_id, "hits": hits, "latency_ms": latencies[-1], "took_ms": one.took_ms}
            click.echo(json.dumps(line, ensure_ascii=False))
        else:
            for text in trec_lines([one]):
                click.echo(text, nl=False)
    seconds = time.perf_counter() - began
    click.echo(_summary(latencies, took, seconds, empty, asked), err=True)


def _summary(latencies: array[float], took: array[float], seconds: float, empty: int, asked: Asked) -> str:
    """How many queries there were and how long they took, as sentences."""
    count = len(latencies)
    if not count:
        return "The file holds no query."
    found = f" {empty} of them found nothing." if empty else ""
    rate = f"{count} queries in {seconds:.2f} s, {count / seconds:.1f} a second, encoding included.{found}"
    if asked.run_path is not None:
        return rate
    at_once = f" with {asked.concurrency} at once" if asked.concurrency > 1 else ""
    return f"{rate} A request took {_percentiles(latencies)}{at_once}; the server says {_percentiles(took)}."


def _percentiles(milliseconds: array[float]) -> str:
    import numpy as np

    p50, p95, p99 = np.percentile(np.asarray(milliseconds), [50, 95, 99])
    return f"p50 {p50:.1f} ms, p95 {p95:.1f} ms, p99 {p99:.1f} ms"


def _print_trec(hits: list[Hit]) -> None:
    from sparse_ingest.evaluation.trec import trec_lines
    from sparse_ingest.searching.hits import Ranked

    # One query has no id of its own.
    ranked = Ranked("1", [hit.doc_id for hit in hits], [hit.score for hit in hits], 0.0, None)
    for line in trec_lines([ranked]):
        click.echo(line, nl=False)


def _as_json(hit: Hit) -> dict[str, Any]:
    from sparse_ingest.searching.search import snippet

    return {
        "rank": hit.rank,
        "score": hit.score,
        "id": hit.doc_id,
        "snippet": snippet(hit),
        "fields": hit.fields,
        "terms": [term._asdict() for term in hit.terms],
    }


def _as_text(hit: Hit, *, explain: bool) -> str:
    from sparse_ingest.searching.hits import marked, snippet

    title = " ".join(str(hit.fields.get("title") or "").split())
    # Styles show on a terminal only.
    text = marked(snippet(hit), hit, lambda word: click.style(word, bold=True))
    lines = [f"{hit.rank:>3}  {hit.score:.4f}  {hit.doc_id}  {title}".rstrip(), text]
    if explain:
        lines += _explained(hit)
    else:
        shown = [f"{term.token} {term.contribution:.2f}" for term in hit.terms[:SHOWN_TERMS]]
        lines.append(" · ".join(shown + (["…"] if len(hit.terms) > SHOWN_TERMS else [])))
    return "\n     ".join(line for line in lines if line)


def _explained(hit: Hit) -> list[str]:
    """The table of a hit's terms: their contributions sum to the score."""
    if not hit.terms:
        return []
    width = max(8, *(len(term.token) for term in hit.terms))
    rows = [f"{'token':<{width}}  {'query':>9} x {'stored':>9} = contribution"]
    rows += [
        f"{term.token:<{width}}  {term.query_weight:>9.4f} x {term.document_weight:>9.4f} = {term.contribution:>12.4f}"
        for term in hit.terms
    ]
    rest = hit.score - sum(term.contribution for term in hit.terms)
    if abs(rest) > 1e-5 * hit.score:  # clusters explain the top_n heaviest tokens of the query only
        rows.append(f"{'others':<{width}}  {'':>9}   {'':>9}   {rest:>12.4f}")
    return [*rows, f"{'score':<{width}}  {'':>9}   {'':>9}   {hit.score:>12.4f}"]


COMMANDS = [*querying.COMMANDS, search]
