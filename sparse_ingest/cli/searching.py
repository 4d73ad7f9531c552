"""`query` and `search`: text in; a request body, or ranked hits with the terms that made their scores, out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparse_ingest.cli.options import connection_options, json_option, model_options, print_json
from sparse_ingest.errors import UsageError
from sparse_ingest.pipeline import Pipeline

if TYPE_CHECKING:
    from sparse_ingest.opensearch.client import Connection
    from sparse_ingest.queries.protocol import QueryWeights
    from sparse_ingest.search import Hit

SHOWN_TERMS = 6

size_option = click.option(
    "-k", "--size", type=click.IntRange(min=1), default=10, show_default=True, help="How many documents to find"
)

collapse_option = click.option(
    "--collapse", metavar="FIELD", help="Find only the best document of each value of FIELD, such as parent of passages"
)


@click.command()
@click.argument("text")
@size_option
@collapse_option
@model_options
def query(text: str, size: int, collapse: str | None, pipeline: Pipeline) -> None:
    """Print the request body that asks an index for TEXT; needs no cluster.

    \b
    sparse-ingest query --model MODEL "your question" |
        curl -H 'content-type: application/json' -d @- URL/INDEX/_search
    """
    from sparse_ingest.opensearch.requests import fit_weights, neural_sparse_body, seismic_body
    from sparse_ingest.query import known_keys, token_keys, weigh

    weights = weigh(text, pipeline)
    scale = fit_weights(weights).scale
    if scale != 1:
        click.echo(
            f"OpenSearch takes weights up to 64: all were divided by {scale:g}, and so are the scores.", err=True
        )
    field, keys = pipeline.index.field, token_keys(pipeline)
    if keys is None:
        body = neural_sparse_body(weights, field=field, size=size, collapse=collapse)
    else:
        keyed = {keys[token]: weight for token, weight in known_keys(weights, keys).items()}
        body = seismic_body(keyed, field=field, size=size, settings=pipeline.query.seismic, collapse=collapse)
    print_json(body)


@click.command()
@click.argument("text")
@click.option("--index", metavar="NAME", help="Search this index or alias")
@click.option(
    "--run",
    "run_path",
    metavar="RUN",
    type=click.Path(path_type=Path),
    help="Search this run folder exactly, no server",
)
@size_option
@collapse_option
@json_option
@model_options
@connection_options
def search(
    text: str,
    index: str | None,
    run_path: Path | None,
    size: int,
    collapse: str | None,
    as_json: bool,
    pipeline: Pipeline,
    connection: Connection,
) -> None:
    """Search an index or a run folder for TEXT, and show which terms made each score.

    The model is the one that made the run or the index, unless --model or --pipeline names another.
    """
    if index is not None and run_path is None:
        weights, hits = _search_index(index, text, size, collapse, pipeline, connection)
    elif run_path is not None and index is None:
        weights, hits = _search_run(run_path, text, size, collapse, pipeline)
    else:
        raise UsageError("Give either --index NAME or --run RUN.")
    if as_json:
        print_json({"query": weights, "hits": [_as_json(hit) for hit in hits]})
        return
    for hit in hits:
        click.echo(_as_text(hit))
    if not hits:
        click.echo("Nothing found.", err=True)


def _search_index(
    index: str, text: str, size: int, collapse: str | None, pipeline: Pipeline, connection: Connection
) -> tuple[QueryWeights, list[Hit]]:
    from sparse_ingest.opensearch.client import connect
    from sparse_ingest.query import pipeline_of_index, token_keys, weigh
    from sparse_ingest.search import search_index

    client = connect(connection)
    pipeline = pipeline_of_index(pipeline, client, index)
    weights = weigh(text, pipeline)
    hits = search_index(
        client,
        index,
        weights,
        field=pipeline.index.field,
        size=size,
        collapse=collapse,
        keys=token_keys(pipeline, client, index),
        seismic=pipeline.query.seismic,
    )
    return weights, hits


def _search_run(
    path: Path, text: str, size: int, collapse: str | None, pipeline: Pipeline
) -> tuple[QueryWeights, list[Hit]]:
    from sparse_ingest.query import pipeline_of_run, weigh
    from sparse_ingest.runs.manifest import open_run
    from sparse_ingest.search import search_run

    run = open_run(path)
    weights = weigh(text, pipeline_of_run(pipeline, run))
    return weights, search_run(run, weights, size=size, collapse=collapse)


def _as_json(hit: Hit) -> dict[str, Any]:
    from sparse_ingest.search import snippet

    return {
        "rank": hit.rank,
        "score": hit.score,
        "id": hit.doc_id,
        "snippet": snippet(hit),
        "fields": hit.fields,
        "terms": [term._asdict() for term in hit.terms],
    }


def _as_text(hit: Hit) -> str:
    from sparse_ingest.search import snippet

    title = " ".join(str(hit.fields.get("title") or "").split())
    shown = [f"{term.token} {term.contribution:.2f}" for term in hit.terms[:SHOWN_TERMS]]
    more = ["…"] if len(hit.terms) > SHOWN_TERMS else []
    lines = [f"{hit.rank:>3}  {hit.score:.4f}  {hit.doc_id}  {title}".rstrip(), snippet(hit), " · ".join(shown + more)]
    return "\n     ".join(line for line in lines if line)


COMMANDS = [query, search]
