"""`query`: print the request body that searches an index for a text. Needs no cluster unless --index is given."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import tee
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparse_ingest.cli.completion import RUN
from sparse_ingest.cli.help import command
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
from sparse_ingest.cluster.dialects import DIALECTS, Product
from sparse_ingest.errors import UsageError
from sparse_ingest.pipeline import HybridSettings, Pipeline, QueryChanges, changed, in_words, option
from sparse_ingest.searching.options import SearchOptions
from sparse_ingest.storage.places import Place

if TYPE_CHECKING:
    from sparse_ingest.cluster.client import Connection
    from sparse_ingest.cluster.search_bodies import Engine, SearchBody
    from sparse_ingest.corpora.text_formats import Quoting
    from sparse_ingest.queries.weight_table import QueryWeights
    from sparse_ingest.searching.search import SearchableIndex


def queries_options(command: F) -> F:
    """Add --queries and --quoting; the command receives the keywords `queries_path` and `quoting`."""
    path = click.Path(exists=True, path_type=Path)
    what = "File of queries (JSON lines, id<TAB>text or TREC topics), or folder of a collection"
    quoting = "With --queries: quoting of csv files; none: quotes are ordinary characters  [default: rfc4180]"
    command = click.option("--quoting", type=click.Choice(["rfc4180", "none"]), help=quoting)(command)
    return click.option("--queries", "queries_path", metavar="F", type=path, help=what)(command)


_IN_PIPELINE = HybridSettings.__dataclass_fields__.keys() - {"hybrid"}


@dataclass(frozen=True)
class QueryOptions(SearchOptions):
    """Options of `query`."""

    search_pipeline: str | None = option(
        None, "Use this installed search pipeline instead of one in the body", metavar="NAME"
    )
    analyzer: str | None = option(None, "Analyzer on the server that computes the weights", metavar="NAME")
    model_id: str | None = option(None, "Model deployed in the cluster that computes the weights", metavar="ID")
    without_plugin: bool = option(False, "Use rank_feature clauses, for a cluster without neural-search")
    product: Product | None = option(None, "Product of the cluster  [default: opensearch, or that of --index]")

    @property
    def is_server_side(self) -> bool:
        """Whether the server computes the weights."""
        return self.analyzer is not None or self.model_id is not None

    def refuse_conflicts(self) -> None:
        """Refuse options that cannot be combined."""
        forms = ("hybrid", "analyzer", "model_id", "without_plugin")
        chosen = [f"--{name.replace('_', '-')}" for name in forms if getattr(self, name)]
        if len(chosen) > 1:
            raise UsageError(f"{' and '.join(chosen)} cannot be combined. Pass one of them.")
        if self.collapse is not None and self.is_server_side:
            raise UsageError(f"{chosen[0]} and --collapse cannot be combined. Omit one of them.")
        if self.search_pipeline is not None:
            refuse_flags(_IN_PIPELINE, "is a setting of the search pipeline, which --search-pipeline names")


def require_one_input(text: str | None, queries_path: Path | None) -> None:
    """Refuse both TEXT and --queries, neither of them, or --quoting without --queries."""
    if (text is None) == (queries_path is None):
        raise UsageError("Give either TEXT or --queries F.")
    if queries_path is None:
        refuse_flags(("quoting",), "needs --queries")


@command()
@click.argument("text", required=False, type=utf8_text)
@queries_options
@click.option("--index", metavar="NAME",
              help="Use the model, field and settings of this index; with --queries, name it in headers")  # fmt: skip
@click.option("--run", metavar="RUN", type=RUN, help="Use the model of this run, and its tokens for a large vocabulary")
@stage_options(QueryOptions, "concurrency")
@click.option("--force", is_flag=True, help="With --index or --run: allow a model that differs from theirs")
@click.option("--table", is_flag=True, help="Print the weights of all tokens of an inference-free model")
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
    """Print the request body that searches for TEXT. Needs no cluster unless --index is given.

    \b
    sparse-ingest query --model MODEL "your question" |
        curl -H 'content-type: application/json' -d @- URL/INDEX/_search

    With --queries it prints one request to URL/INDEX/_msearch, for curl --data-binary @- with content-type
    application/x-ndjson. Bodies include the search pipeline that they need.

    With --table it prints a JSON object from token to weight. A service in any language needs only this table and the
    model's tokenizer.json.

    A sparse_vector field of a model with more than 32,768 tokens needs --index or --run: the load numbers the tokens.
    """
    from sparse_ingest.cluster.search_bodies import msearch_bytes
    from sparse_ingest.searching.pipelines import hybrid_settings

    if index is None:
        refuse_flags(CONNECTION_FLAGS, "needs --index: without it, no request is sent to a cluster")
    if table:
        if (text, queries_path, quoting, index, target["run"]) != (None,) * 5:
            raise UsageError("--table prints a property of the model. Omit TEXT, --queries, --index and --run.")
        _print_table(pipeline)
        return
    _refuse_clashes(index, target["run"], options)
    options.refuse_conflicts()
    require_one_input(text, queries_path)
    if index is not None and queries_path is None and options.is_server_side:
        raise UsageError("--index needs --queries here: for one request, the URL names the index. Omit it.")
    if options.is_server_side and (pipeline.query.top_k or pipeline.query.max_ratio):
        raise UsageError(
            "query.top_k and query.max_ratio cannot prune weights that the server computes. Omit them, or omit "
            "--analyzer and --model-id."
        )
    index_read = None if options.is_server_side else index
    pipeline, engine = _with_target(index_read, pipeline, product=options.product, **target)
    if options.search_pipeline or options.without_plugin:
        DIALECTS[engine.product].refuse("pipelines" if options.search_pipeline else "plugin")
    engine = replace(engine, hybrid=hybrid_settings(pipeline.query, options))
    if engine.hybrid:
        replace(options, hybrid=True).refuse_conflicts()
    for body in _bodies(_weighted(text, queries_path, quoting, pipeline, options), engine, options):
        if queries_path is None:
            print_json(body)
        else:
            print_utf8(msearch_bytes([body], index))


def opened_index(name: str, connection: Connection, pipeline: Pipeline, *, force: bool = False) -> SearchableIndex:
    """Open an index, and print its stored query settings on standard error."""
    from sparse_ingest.searching.search import open_index

    opened = open_index(name, connection=connection, pipeline=pipeline, force=force)
    stamp = opened.index.stamp
    if stamp and stamp.query and isinstance(pipeline.query, QueryChanges):
        words = in_words(changed(opened.pipeline.query))
        click.echo(f"Query settings of index {name!r}: {words}. Pass --pipeline to use others.", err=True)
    return opened


def _refuse_clashes(index: str | None, run: Place | None, options: QueryOptions) -> None:
    """Refuse targets that cannot be combined, or would have no effect."""
    if run is not None and (index is not None or options.is_server_side):
        raise UsageError("--run cannot be combined with --index, --analyzer or --model-id. Omit one of them.")
    if run is None and index is None:
        refuse_flags(("force",), "needs --index or --run")


def _with_target(
    index: str | None,
    pipeline: Pipeline,
    *,
    product: Product | None,
    connection: Connection,
    force: bool,
    run: Place | None,
) -> tuple[Pipeline, Engine]:
    """Return pipeline and engine for an index or a run. Without one, or a connection to it, use `pipeline`."""
    from sparse_ingest.cluster.client import UnreachableError
    from sparse_ingest.cluster.token_map import MAX_KEYS
    from sparse_ingest.searching.pipelines import engine_of
    from sparse_ingest.searching.search import open_run

    if run is not None:
        opened_run = open_run(run, pipeline=pipeline, force=force)
        engine = engine_of(opened_run.pipeline, product=product or "opensearch", run=opened_run)
        if engine.keys is not None and len(engine.keys) > MAX_KEYS:
            pruning = in_words(pipeline.load.rules) or "none"
            click.echo(
                f"Keys are those of a new index into which {run} is loaded with pruning {pruning}. For an index with "
                "other pruning or several loads, pass --index.",
                err=True,
            )
        return opened_run.pipeline, engine
    if index is not None:
        try:
            with opened_index(index, connection, pipeline, force=force) as opened:
                if product not in (None, opened.engine.product):
                    raise UsageError(f"{index!r} is in {opened.client.dialect.name}. Omit --product {product}.")
                return opened.pipeline, opened.engine
        except UnreachableError as error:
            if not (pipeline.model.document or pipeline.model.query):
                raise
            click.echo(f"Query settings of index {index!r} are not used: {error}", err=True)
    return pipeline, engine_of(pipeline, product=product or "opensearch")


def _print_table(pipeline: Pipeline) -> None:
    from sparse_ingest.searching.query import query_table

    table = query_table(pipeline.model)
    weights = table.table()
    print_json(weights)
    click.echo(
        f"{len(weights)} tokens have a weight. To get the weights of a query, look up each of its distinct tokens by "
        f"tokenizer.json (settings in tokenizer_config.json, such as do_lower_case, override it): {table.reading()}.",
        err=True,
    )


def _weighted(
    text: str | None, path: Path | None, quoting: Quoting | None, pipeline: Pipeline, options: QueryOptions
) -> Iterator[tuple[str, QueryWeights]]:
    """Yield the text, or each text of a file of queries, with its weights; queries are encoded in batches."""
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
    """Yield the body of each text, then report omitted tokens and scaled weights."""
    from sparse_ingest.cluster.search_bodies import server_side_body
    from sparse_ingest.searching.bodies import body_of
    from sparse_ingest.searching.query import warn_of_omitted

    scaled, scale = 0, 1.0
    lost: dict[str, None] = {}
    for text, weights in weighted:
        if options.is_server_side:
            how: dict[str, Any] = {"size": options.k, "filter": options.filter}
            body = server_side_body(text, engine, analyzer=options.analyzer, model_id=options.model_id, **how)
        else:
            body, factor = body_of(text, weights, engine, options, lost, without_plugin=options.without_plugin)
            scaled, scale = scaled + (factor != 1), max(scale, factor)
        yield body | {"search_pipeline": options.search_pipeline} if options.search_pipeline else body
    warn_of_omitted(lost)
    if scaled:
        what = f"those of {scaled} queries are divided by up to" if scaled > 1 else "all are divided by"
        click.echo(f"A query has weights up to 64: {what} {scale:g}, and so are the scores.", err=True)
