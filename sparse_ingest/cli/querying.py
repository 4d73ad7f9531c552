"""`query`: print the request body that searches an index for a text. Needs no cluster unless --index is given."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import tee
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparse_ingest.cli.options import (
    CONNECTION_FLAGS,
    F,
    connection_options,
    pipeline_options,
    print_json,
    refuse_flags,
    stage_options,
    utf8_text,
)
from sparse_ingest.cli.terminal import print_utf8
from sparse_ingest.errors import UsageError
from sparse_ingest.pipeline import Pipeline, QueryChanges, changed, in_words, option
from sparse_ingest.searching.options import SearchOptions

if TYPE_CHECKING:
    from sparse_ingest.cluster.client import Connection
    from sparse_ingest.cluster.search_bodies import Engine, SearchBody
    from sparse_ingest.corpora.text_formats import Quoting
    from sparse_ingest.queries.weight_table import QueryWeights
    from sparse_ingest.searching.search import SearchableIndex

_queries_option = click.option(
    "--queries",
    "queries_path",
    metavar="F",
    type=click.Path(exists=True, path_type=Path),
    help="Many queries: a file of JSON lines, of id<TAB>text, of TREC topics, or a collection's folder",
)
_quoting_option = click.option(
    "--quoting",
    type=click.Choice(["rfc4180", "none"]),
    help="With --queries: quotes in csv; none: a quote is a character like any other  [default: rfc4180]",
)


def queries_options(command: F) -> F:
    """Add --queries and --quoting; the command receives the keywords `queries_path` and `quoting`."""
    return _queries_option(_quoting_option(command))


@dataclass(frozen=True)
class QueryOptions(SearchOptions):
    """Options of `query`: which body is asked for."""

    search_pipeline: str | None = option(
        None, "Name this installed search pipeline instead of bringing one", metavar="NAME"
    )
    analyzer: str | None = option(
        None, "Let this analyzer of the server make the weights; needs no model here", metavar="NAME"
    )
    model_id: str | None = option(None, "Let this model, deployed in the cluster, make the weights", metavar="ID")
    without_plugin: bool = option(False, "For a cluster that lacks neural-search: rank_feature clauses")

    @property
    def is_server_side(self) -> bool:
        """Whether the server makes the weights."""
        return self.analyzer is not None or self.model_id is not None

    def refuse_conflicts(self) -> None:
        """Refuse options of which one would silently have no effect."""
        forms = ("hybrid", "analyzer", "model_id", "without_plugin")
        chosen = [f"--{name.replace('_', '-')}" for name in forms if getattr(self, name)]
        if len(chosen) > 1:
            raise UsageError(f"{' and '.join(chosen)} are different requests. Give one of them.")
        if self.collapse is not None and (self.hybrid or self.is_server_side):
            raise UsageError(f"{chosen[0]} goes without --collapse. Leave out one of them.")


@click.command()
@click.argument("text", required=False, type=utf8_text)
@queries_options
@click.option("--index", metavar="NAME",
              help="Use this index's model, field and query settings; --queries names it in each header")  # fmt: skip
@stage_options(QueryOptions, "concurrency")
@click.option("--force", is_flag=True, help="With --index: ask with another model than it was loaded with")
@click.option("--table", is_flag=True, help="Print the weight of every token of an inference-free model, for services")
@pipeline_options("model index query")
@connection_options
def query(
    text: str | None,
    queries_path: Path | None,
    quoting: Quoting | None,
    index: str | None,
    table: bool,
    pipeline: Pipeline,
    options: QueryOptions,
    **target: Any,
) -> None:
    """Print the request body that searches an index for TEXT. Needs no cluster, unless --index is given.

    \b
    sparse-ingest query --model MODEL "your question" |
        curl -H 'content-type: application/json' -d @- URL/INDEX/_search

    With --queries it prints the lines of one request to URL/INDEX/_msearch, for curl --data-binary @- with
    content-type application/x-ndjson. A body brings the search pipeline that it needs; nothing has to be installed.

    With --table it prints a JSON object from token to weight, which with the model's tokenizer.json is all that a
    service in any language needs.
    """
    from sparse_ingest.cluster.search_bodies import msearch_bytes

    if index is None:
        refuse_flags({*CONNECTION_FLAGS, "force"}, "is for --index: without it no cluster is asked")
    if table:
        if (text, queries_path, quoting, index) != (None, None, None, None):
            raise UsageError("--table is of the model, not of a text or an index. Omit TEXT, --queries and --index.")
        _print_table(pipeline)
        return
    options.refuse_conflicts()
    if (text is None) == (queries_path is None):
        raise UsageError("Give either TEXT or --queries F.")
    if quoting is not None and queries_path is None:
        raise UsageError("--quoting goes with --queries. Omit it.")
    if index is not None and queries_path is None and options.is_server_side:
        raise UsageError("--index goes with --queries here: the URL of one request names its index. Omit it.")
    if options.is_server_side and (pipeline.query.top_k or pipeline.query.max_ratio):
        raise UsageError(
            "query.top_k and query.max_ratio prune weights that are made here; those that the server makes stay whole. "
            "Leave them out, or leave out --analyzer and --model-id."
        )
    pipeline, engine = _with_index(None if options.is_server_side else index, pipeline, **target)
    for body in _bodies(_weighted(text, queries_path, quoting, pipeline, options), engine, options):
        if queries_path is None:
            print_json(body)
        else:
            print_utf8(msearch_bytes([body], index))


def opened_index(name: str, connection: Connection, pipeline: Pipeline, *, force: bool = False) -> SearchableIndex:
    """Open an index, and print the query settings that it remembers on standard error."""
    from sparse_ingest.searching.search import open_index

    opened = open_index(name, connection=connection, pipeline=pipeline, force=force)
    stamp = opened.index.stamp
    if stamp and stamp.query and isinstance(pipeline.query, QueryChanges):
        words = in_words(changed(opened.pipeline.query))
        click.echo(f"Query settings of index {name!r}: {words}. Pass --pipeline to use others.", err=True)
    return opened


def _with_index(
    index: str | None, pipeline: Pipeline, *, connection: Connection, force: bool
) -> tuple[Pipeline, Engine]:
    """Return pipeline and engine for an index: those given, if there is none, or no connection but a model."""
    from sparse_ingest.cluster.client import UnreachableError
    from sparse_ingest.searching.pipelines import engine_of

    if index is not None:
        try:
            with opened_index(index, connection, pipeline, force=force) as opened:
                return opened.pipeline, opened.engine
        except UnreachableError as error:
            if not (pipeline.model.document or pipeline.model.query):
                raise
            click.echo(f"Query settings of index {index!r} are not used: {error}", err=True)
    return pipeline, engine_of(pipeline)


def _print_table(pipeline: Pipeline) -> None:
    from sparse_ingest.searching.query import query_table

    table = query_table(pipeline.model)
    weights = table.table()
    print_json(weights)
    click.echo(
        f"{len(weights)} tokens have a weight. A query's weights are those of its distinct tokens, which the model's "
        f"tokenizer.json makes (do_lower_case and the like in tokenizer_config.json go over it): {table.reading()}.",
        err=True,
    )


def _weighted(
    text: str | None, path: Path | None, quoting: Quoting | None, pipeline: Pipeline, options: QueryOptions
) -> Iterator[tuple[str, QueryWeights]]:
    """The text, or those of a file of queries, with their weights, as many at a time as the model takes."""
    from sparse_ingest.corpora.collections import read_queries
    from sparse_ingest.searching.query import many_query_weights, query_weights

    queries = read_queries(path, quoting) if path else iter(())
    if options.is_server_side:
        texts = (query.text for query in queries) if path else [str(text)]
        yield from ((one, {}) for one in texts)
    elif path is None:
        yield str(text), query_weights(str(text), pipeline)
    else:
        queries, same = tee(queries)
        weighted = many_query_weights(queries, pipeline)
        yield from ((query.text, weights) for query, (_, weights) in zip(same, weighted, strict=True))


def _bodies(
    weighted: Iterable[tuple[str, QueryWeights]], engine: Engine, options: QueryOptions
) -> Iterator[SearchBody]:
    """The bodies of some texts with their weights; says at the end what was left out or scaled."""
    from sparse_ingest.cluster.limits import fit_weights
    from sparse_ingest.searching.query import keyed, tell_of_lost

    scaled, scale = 0, 1.0
    lost: dict[str, None] = {}
    for text, weights in weighted:
        weights = keyed(weights, engine.keys, lost)
        fitted = fit_weights(weights)
        scaled, scale = scaled + (fitted.scale != 1), max(scale, fitted.scale)
        body = _body(text, weights, engine, options)
        yield body | {"search_pipeline": options.search_pipeline} if options.search_pipeline else body
    tell_of_lost(lost)
    if scaled:
        what = f"the weights of {scaled} queries were divided" if scaled > 1 else "all were divided"
        most = "up to " if scaled > 1 else ""
        click.echo(f"OpenSearch takes weights up to 64: {what} by {most}{scale:g}, and so are the scores.", err=True)


def _body(text: str, weights: QueryWeights, engine: Engine, options: QueryOptions) -> SearchBody:
    from sparse_ingest.cluster.search_bodies import engine_body, hybrid_body, rank_feature_body, server_side_body

    settings: dict[str, Any] = {"size": options.k, "filter": options.filter}
    if options.is_server_side:
        return server_side_body(text, engine, analyzer=options.analyzer, model_id=options.model_id, **settings)
    if options.hybrid:
        return hybrid_body(text, weights, engine, **settings)
    if options.without_plugin:
        if engine.name != "exact":
            raise UsageError(f"Without the neural-search plugin there is no engine {engine.name}. Leave out --engine.")
        return rank_feature_body(weights, field=engine.field, collapse=options.collapse, **settings)
    return engine_body(weights, engine, collapse=options.collapse, **settings)


COMMANDS = [query]
