"""`query`: text in, the request body that asks an index for it out; no cluster is needed."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparse_ingest.cli.options import engine_option, filter_option, model_options, print_json
from sparse_ingest.errors import UsageError
from sparse_ingest.pipeline import Pipeline

if TYPE_CHECKING:
    from sparse_ingest.cluster.requests import Engine, SearchBody
    from sparse_ingest.queries.weight_table import QueryWeights

size_option = click.option(
    "-k", "--size", type=click.IntRange(min=1), default=10, show_default=True, help="How many documents to find"
)
collapse_option = click.option(
    "--collapse", metavar="FIELD", help="Find only the best document of each value of FIELD, such as parent of passages"
)
queries_option = click.option(
    "--queries",
    "queries_path",
    metavar="F",
    type=click.Path(exists=True, path_type=Path),
    help="Many queries: a file of JSON lines, of id<TAB>text, of TREC topics, or a collection's folder",
)


@dataclass(frozen=True)
class QueryForm:
    """Which body is asked for, as the options of `query` have it."""

    size: int
    collapse: str | None
    filter: dict[str, Any] | None
    hybrid: bool
    search_pipeline: str | None
    analyzer: str | None
    model_id: str | None
    without_plugin: bool

    @property
    def is_server_side(self) -> bool:
        """Whether the server makes the weights."""
        return self.analyzer is not None or self.model_id is not None

    def refuse_conflicts(self) -> None:
        """Refuse options of which one would silently have no effect."""
        forms = {"--hybrid": self.hybrid, "--analyzer": self.analyzer, "--model-id": self.model_id}
        forms |= {"--without-plugin": self.without_plugin}
        chosen = [name for name, given in forms.items() if given]
        if len(chosen) > 1:
            raise UsageError(f"{' and '.join(chosen)} are different requests. Give one of them.")
        if self.collapse is not None and (self.hybrid or self.is_server_side):
            raise UsageError(f"{chosen[0]} goes without --collapse. Leave out one of them.")


@click.command()
@click.argument("text", required=False)
@queries_option
@click.option("--index", metavar="NAME", help="With --queries: the index to name in each header; else the URL names it")
@size_option
@collapse_option
@filter_option
@click.option("--hybrid", is_flag=True, help="Beside BM25 on title and text; the server brings both scores together")
@click.option("--search-pipeline", metavar="NAME", help="Name this installed search pipeline instead of bringing one")
@click.option(
    "--analyzer", metavar="NAME", help="Let this analyzer of the server make the weights; needs no model here"
)
@click.option("--model-id", metavar="ID", help="Let this model, deployed in the cluster, make the weights")
@click.option("--table", is_flag=True, help="Print the weight of every token of an inference-free model, for services")
@click.option("--without-plugin", is_flag=True, help="For a cluster that lacks neural-search: rank_feature clauses")
@model_options
@engine_option
def query(
    text: str | None, queries_path: Path | None, index: str | None, table: bool, pipeline: Pipeline, **options: Any
) -> None:
    """Print the request body that asks an index for TEXT; needs no cluster.

    \b
    sparse-ingest query --model MODEL "your question" |
        curl -H 'content-type: application/json' -d @- URL/INDEX/_search

    With --queries it prints the lines of one request to URL/INDEX/_msearch, for curl --data-binary @- with
    content-type application/x-ndjson. A body brings the search pipeline that it needs; nothing has to be installed.

    With --table it prints a JSON object from token to weight, which with the model's tokenizer.json is all that a
    service in any language needs.
    """
    from sparse_ingest.cluster.requests import msearch_bytes
    from sparse_ingest.searching.pipelines import engine_of

    if table:
        if text is not None or queries_path is not None:
            raise UsageError("--table is of the model, not of a text. Leave out TEXT and --queries.")
        _print_table(pipeline)
        return
    form = QueryForm(**options)
    form.refuse_conflicts()
    if (text is None) == (queries_path is None):
        raise UsageError("Give either TEXT or --queries F.")
    if index is not None and queries_path is None:
        raise UsageError("--index goes with --queries; the URL of a single request names its index.")
    if form.is_server_side and (pipeline.query.top_k or pipeline.query.max_ratio):
        raise UsageError(
            "query.top_k and query.max_ratio prune weights that are made here; those that the server makes stay whole. "
            "Leave them out, or leave out --analyzer and --model-id."
        )
    engine = engine_of(pipeline)
    asked = _one(str(text), pipeline, form) if queries_path is None else _many(queries_path, pipeline, form)
    for body in bodies(asked, engine, form):
        if queries_path is None:
            print_json(body)
        else:
            sys.stdout.buffer.write(msearch_bytes([body], index))


def _print_table(pipeline: Pipeline) -> None:
    from sparse_ingest.checkpoints.layouts import read_checkpoint
    from sparse_ingest.checkpoints.sides import WeightTableSide
    from sparse_ingest.models.query_encoders import query_encoder
    from sparse_ingest.queries.weight_table import WeightTable

    model = pipeline.model
    name, revision = (model.query, model.query_revision) if model.query else (model.document, model.revision)
    # Looked at first: building a masked LM takes seconds.
    if name and not isinstance(read_checkpoint(name, revision, code=model.trust_remote_code).query, WeightTableSide):
        raise UsageError(
            f"The queries of {name} are made by a masked LM, which has no table. A service must run the model, or ask "
            "one that does."
        )
    encoder = query_encoder(model)
    assert isinstance(encoder, WeightTable)
    weights = encoder.table()
    print_json(weights)
    click.echo(
        f"{len(weights)} tokens have a weight. A query's weights are those of its distinct tokens, which the model's "
        f"tokenizer.json makes (do_lower_case and the like in tokenizer_config.json go over it): {encoder.reading()}.",
        err=True,
    )


def bodies(asked: Iterable[tuple[str, QueryWeights]], engine: Engine, form: QueryForm) -> Iterator[SearchBody]:
    """The bodies of some texts with their weights; says at the end what was left out or scaled."""
    from sparse_ingest.cluster.limits import fit_weights
    from sparse_ingest.searching.query import keyed, tell_of_lost

    scaled, scale = 0, 1.0
    lost: dict[str, None] = {}
    for text, weights in asked:
        if engine.keys is not None:
            weights = keyed(weights, engine.keys, lost)
        fitted = fit_weights(weights)
        scaled, scale = scaled + (fitted.scale != 1), max(scale, fitted.scale)
        body = _body(text, weights, engine, form)
        yield body | {"search_pipeline": form.search_pipeline} if form.search_pipeline else body
    tell_of_lost(lost)
    if scaled:
        what = f"the weights of {scaled} queries were divided" if scaled > 1 else "all were divided"
        most = "up to " if scaled > 1 else ""
        click.echo(f"OpenSearch takes weights up to 64: {what} by {most}{scale:g}, and so are the scores.", err=True)


def _body(text: str, weights: QueryWeights, engine: Engine, form: QueryForm) -> SearchBody:
    from sparse_ingest.cluster.requests import engine_body, hybrid_body, rank_feature_body, server_side_body

    settings: dict[str, Any] = {"size": form.size, "filter": form.filter}
    if form.is_server_side:
        return server_side_body(text, engine, analyzer=form.analyzer, model_id=form.model_id, **settings)
    if form.hybrid:
        return hybrid_body(text, weights, engine, **settings)
    if form.without_plugin:
        if engine.name != "exact":
            raise UsageError(f"Without the neural-search plugin there is no engine {engine.name}. Leave out --engine.")
        return rank_feature_body(weights, field=engine.field, collapse=form.collapse, **settings)
    return engine_body(weights, engine, collapse=form.collapse, **settings)


def _one(text: str, pipeline: Pipeline, form: QueryForm) -> Iterator[tuple[str, QueryWeights]]:
    from sparse_ingest.searching.query import query_weights

    yield text, {} if form.is_server_side else query_weights(text, pipeline)


def _many(path: Path, pipeline: Pipeline, form: QueryForm) -> Iterator[tuple[str, QueryWeights]]:
    """The texts of a file of queries with their weights, as many at a time as the model takes."""
    from itertools import tee

    from sparse_ingest.corpora.collections import read_queries
    from sparse_ingest.searching.query import many_query_weights

    queries, texts = tee(read_queries(path))
    if form.is_server_side:
        yield from ((query.text, {}) for query in queries)
    else:
        yield from (
            (query.text, weights)
            for query, (_, weights) in zip(texts, many_query_weights(queries, pipeline), strict=True)
        )


COMMANDS = [query]
