"""`search`: text in; ranked hits with the terms that made their scores out. Many queries give a run file."""

from __future__ import annotations

import contextlib
import json
import time
from array import array
from collections.abc import Iterator
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
from sparse_ingest.searching.options import SearchOptions
from sparse_ingest.storage.places import Place

if TYPE_CHECKING:
    from sparse_ingest.cluster.client import Connection
    from sparse_ingest.searching.hits import Hit, Ranked
    from sparse_ingest.searching.search import SearchableIndex, SearchableRun

SHOWN_TERMS = 6
MOST_AT_ONCE = 32


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
def search(
    text: str | None,
    queries_path: Path | None,
    index: str | None,
    run_path: Place | None,
    trec: bool,
    as_json: bool,
    pipeline: Pipeline,
    connection: Connection,
    **given: Any,
) -> None:
    """Search an index or a run folder for TEXT, and show which terms made each score.

    The model is the one that made the run or the index; --model or --pipeline may name it again, such as where it lies
    elsewhere. With --queries it prints a TREC run, or with --json a line a query, and says on standard error how long
    they took.
    """
    if (text is None) == (queries_path is None):
        raise UsageError("Give either TEXT or --queries F.")
    if trec and as_json:
        raise UsageError("--trec and --json are two forms of the same answer. Give one of them.")
    _refuse_conflicts(index, run_path, pipeline, given, many=text is None)
    explain, force = given.pop("explain"), given.pop("force")
    options = SearchOptions(k=given.pop("size"), **given)
    with _opened(index, run_path, pipeline, connection, force=force) as target:
        if text is None:
            from sparse_ingest.corpora.collections import read_queries

            ranked = target.rank(read_queries(queries_path or Path()), options)
            _print_ranked(ranked, run_path is None, options.concurrency, as_json=as_json)
            return
        weights = target.query_weights(text)
        hits = target.search(text if options.hybrid else weights, options)
    if as_json:
        print_json({"query": weights, "hits": [_as_json(hit) for hit in hits]})
    elif trec:
        _print_trec(hits)
    else:
        for hit in hits:
            click.echo(_as_text(hit, explain=explain))
    if not hits and not as_json:
        click.echo("Nothing found.", err=True)


def _refuse_conflicts(
    index: str | None, run_path: Place | None, pipeline: Pipeline, given: dict[str, Any], *, many: bool
) -> None:
    """Refuse options of which one would silently have no effect."""
    if (index is None) == (run_path is None):
        raise UsageError("Give either --index NAME or --run RUN.")
    collapse, explain, hybrid = ({f"--{name}": given[name]} for name in ("collapse", "explain", "hybrid"))
    if run_path is not None:
        only_index = {"--filter": given["filter"], **hybrid, "--engine": pipeline.query.engine}
        _refuse(only_index, "asks a server, and --run searches exactly without one")
    if many:
        _refuse({**collapse, **explain, **hybrid}, "is for one TEXT")
    elif given["concurrency"] > 1:
        raise UsageError("--concurrency goes with --queries; one TEXT is one request.")
    if given["hybrid"]:
        _refuse({**collapse, **explain}, "goes without --hybrid")


def _refuse(options: dict[str, Any], why: str) -> None:
    for name in (name for name, given in options.items() if given):
        raise UsageError(f"{name} {why}. Leave it out.")


@contextlib.contextmanager
def _opened(
    index: str | None, run_path: Place | None, pipeline: Pipeline, connection: Connection, *, force: bool
) -> Iterator[SearchableRun | SearchableIndex]:
    from sparse_ingest.searching.search import open_index, open_run

    if run_path is not None:
        yield open_run(run_path, pipeline=pipeline, force=force)
        return
    with open_index(str(index), connection=connection, pipeline=pipeline, force=force) as opened:
        yield opened


def _print_ranked(ranked: Iterator[Ranked], by_server: bool, concurrency: int, *, as_json: bool) -> None:
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
    click.echo(_summary(latencies, took, seconds, empty, concurrency if by_server else None), err=True)


def _summary(latencies: array[float], took: array[float], seconds: float, empty: int, concurrency: int | None) -> str:
    """How many queries there were and how long they took; `concurrency` is None where no server answered."""
    count = len(latencies)
    if not count:
        return "The file holds no query."
    found = f" {empty} of them found nothing." if empty else ""
    rate = f"{count} queries in {seconds:.2f} s, {count / seconds:.1f} a second, encoding included.{found}"
    if concurrency is None:
        return rate
    at_once = f" with {concurrency} at once" if concurrency > 1 else ""
    return f"{rate} A request took {_percentiles(latencies)}{at_once}; the server says {_percentiles(took)}."


def _percentiles(milliseconds: array[float]) -> str:
    import numpy as np

    p50, p95, p99 = np.percentile(np.asarray(milliseconds), [50, 95, 99])
    return f"p50 {p50:.1f} ms, p95 {p95:.1f} ms, p99 {p99:.1f} ms"


def _print_trec(hits: list[Hit]) -> None:
    from sparse_ingest.evaluation.trec import trec_lines
    from sparse_ingest.searching.hits import Ranked

    # One query has no id of its own.
    ranked = Ranked("1", [hit.id for hit in hits], [hit.score for hit in hits], 0.0, None)
    for line in trec_lines([ranked]):
        click.echo(line, nl=False)


def _as_json(hit: Hit) -> dict[str, Any]:
    from sparse_ingest.searching.hits import snippet

    return {
        "rank": hit.rank,
        "score": hit.score,
        "id": hit.id,
        "snippet": snippet(hit),
        "fields": hit.fields,
        "terms": [term._asdict() for term in hit.terms],
    }


def _as_text(hit: Hit, *, explain: bool) -> str:
    from sparse_ingest.searching.hits import marked, snippet

    title = " ".join(str(hit.fields.get("title") or "").split())
    # Styles show on a terminal only.
    text = marked(snippet(hit), hit, lambda word: click.style(word, bold=True))
    lines = [f"{hit.rank:>3}  {hit.score:.4f}  {hit.id}  {title}".rstrip(), text]
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
