"""`show`: the terms of stored documents or of a text. Also the lines of `search --doc`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from sparse_ingest.cli import querying
from sparse_ingest.cli.help import command
from sparse_ingest.cli.options import (
    CONNECTION_FLAGS,
    connection_options,
    json_option,
    pipeline_options,
    print_report,
    refuse_flags,
    utf8_text,
)
from sparse_ingest.errors import UsageError, listed
from sparse_ingest.pipeline import Pipeline
from sparse_ingest.reporting import aligned, shortened
from sparse_ingest.storage.places import place_of

if TYPE_CHECKING:
    from sparse_ingest.cluster.connection import Connection
    from sparse_ingest.queries.weight_table import QueryWeights
    from sparse_ingest.searching.document_terms import DocumentTerm, DocumentTerms
    from sparse_ingest.searching.hits import Explanation, Hit
    from sparse_ingest.searching.search import SearchableIndex, SearchableRun

TEXT_CHARACTERS = 160
LACKING = 10  # named terms of the query
# Reason of an `Explanation` to words.
_REASONS = {
    "not found": "No document has this id. Check it: ids are compared exactly.",
    "no common term": "It has none of the query's terms, so it is not a hit.",
    "filtered out": "The filter excludes it.",
    "missed": "Its score is high enough, but the engine did not visit it. Search a rank_features field with --engine "
    "exact, or change [query] seismic or two_phase.",
}


@command()
@click.argument("names", nargs=-1, metavar="[RUN] [ID]...")
@click.option("--index", metavar="NAME", help="Show documents of this index or alias, with the weights that it stores")
@click.option("--text", metavar="T", type=utf8_text, help="Encode this text with --model, and show its terms")
@click.option("--as", "side", type=click.Choice(["document", "query"]), default="document", show_default=True,
              help="With --text: encode it as a document or as a query")  # fmt: skip
@click.option("--query", "query_text", metavar="TEXT", type=utf8_text,
              help="Show what each term contributes to the score for this query")  # fmt: skip
@click.option("--top-k", type=click.IntRange(min=1), metavar="N",
              help="Show the N heaviest terms, and those that match the query  [default: all]")  # fmt: skip
@click.option("--force", is_flag=True, help="Allow a query model that differs from the documents' model")
@json_option
@pipeline_options("model encode index query", "engine")
@connection_options
def show(names: tuple[str, ...], index: str | None, text: str | None, as_json: bool, **given: Any) -> None:
    """Show the terms of documents, heaviest first, with their weights.

    \b
    sparse-ingest show RUN ID
    sparse-ingest show --index NAME ID --query "your question"
    sparse-ingest show --model MODEL --text "some text" --top-k 20

    Terms that the text does not contain are marked as expansion, if the text is stored and the model's tokenizer can be
    read.
    """
    query_text = given["query_text"]
    if text is not None:
        documents = [_encoded(text, names, index, **given)]
    else:
        refuse_flags(("side",), "needs --text")
        with _opened(names, index, **given) as opened:
            documents = opened.show(*map(utf8_text, names if index else names[1:]), query=query_text)
    content = [one.to_dict(given["top_k"]) for one in documents]
    lines = (line for one in documents for line in _document(one, one.heaviest(given["top_k"])))
    print_report(as_json, {"query": query_text, "documents": content}, lines)


def _opened(
    names: Sequence[str], index: str | None, pipeline: Pipeline, connection: Connection, force: bool, **_: Any
) -> contextlib.AbstractContextManager[SearchableRun | SearchableIndex]:
    from sparse_ingest.searching.search import open_run

    if len(names) < 1 + (index is None):
        raise UsageError("Give RUN and one or more ids, --index NAME and one or more ids, or --text T with --model.")
    if index is not None:
        return querying.opened_index(index, connection, pipeline, force=force)
    refuse_flags(CONNECTION_FLAGS, "is for --index: a run folder is read without a server")
    return contextlib.nullcontext(open_run(place_of(names[0]), pipeline=pipeline, force=force))


def _encoded(
    text: str, names: Sequence[str], index: str | None, side: str, query_text: str | None, pipeline: Pipeline, **_: Any
) -> DocumentTerms:
    from sparse_ingest.searching.document_terms import terms_of_text
    from sparse_ingest.searching.query import query_weights

    if names or index is not None:
        raise UsageError("--text is encoded now: omit RUN, ids and --index, or omit --text.")
    refuse_flags({*CONNECTION_FLAGS, "force"}, "is for stored documents: --text is encoded here")
    if not (pipeline.model.document or pipeline.model.query):
        raise UsageError("--text needs a model: pass --model or --pipeline.")
    weights = None if query_text is None else query_weights(query_text, pipeline)
    return terms_of_text(text, pipeline, as_query=side == "query", query=weights)


def _document(document: DocumentTerms, shown: Sequence[DocumentTerm]) -> Iterator[str]:
    if document.id is not None:
        yield from _heading(document.id, document.fields)
    added = sum(bool(term.expansion) for term in document.terms)
    known = any(term.expansion is not None for term in document.terms)
    omitted = len(document.terms) - len(shown)
    counts = f"{len(document.terms):,} terms" + (f", {added:,} of them expansion" if known else "")
    yield f"     {counts}" + (f"; {omitted:,} lighter ones are not shown" if omitted else "")
    rows = [["term", "weight", "query", "contribution", ""]]
    for term in shown:
        asked = [] if term.query_weight is None else [f"x {term.query_weight:.4f}", f"= {term.contribution:.4f}"]
        note = "expansion" if term.expansion else ""
        rows.append([term.text, f"{term.weight:.4f}", *(asked or ["", ""]), note])
    if document.score is None:
        rows = [[row[0], row[1], row[4]] for row in rows]
    else:
        rows.append(["score", "", "", f"{document.score:.4f}", ""])
    yield from (f"     {line}".rstrip() for line in aligned(rows))


def _heading(doc_id: str, fields: dict[str, Any]) -> Iterator[str]:
    title, text = (shortened(str(fields.get(name) or ""), TEXT_CHARACTERS) for name in ("title", "text"))
    yield f"{doc_id}  {title}".rstrip()
    if text:
        yield f"     {text}"
    # An index returns fields in an order of its own.
    if kept := " · ".join(f"{name}: {fields[name]}" for name in sorted(fields.keys() - {"title", "text"})):
        yield f"     {shortened(kept, TEXT_CHARACTERS)}"


def print_explanation(as_json: bool, weights: QueryWeights, found: Explanation) -> None:
    """Print the result of `search --doc`."""
    print_report(as_json, {"query": weights, "document": found.to_dict()}, _explanation(found))


def _explanation(found: Explanation) -> Iterator[str]:
    yield from _heading(found.id, found.fields)
    if found.rank is not None:
        of_hits = "" if found.matching is None else f" of {found.matching:,} hits"
        same = f", {found.equal:,} more with the same score" if found.equal else ""
        yield f"     rank {found.rank:,}{of_hits}{same}"
    if found.reason in _REASONS:
        yield f"     {_REASONS[found.reason]}"
    elif found.reason and found.last_score is not None and found.score is not None:
        short = found.last_score - found.score
        below = f"{short:.4f} below that" if short else "that"
        yield f"     Its score is {below} of hit {found.k:,}, which is {found.last_score:.4f}."
    if found.terms and found.score is not None:
        yield from (f"     {line}" for line in shares(found))
    if found.lacking and found.reason != "not found":
        yield f"     Terms of the query that it lacks: {listed(found.lacking, LACKING)}"


def shares(found: Hit | Explanation, sub_scores: Mapping[str, float] | None = None) -> list[str]:
    """Return a table of the terms of a score, whose contributions sum to it, and of both scores of a hybrid hit."""
    terms, score = found.terms, found.score or 0.0
    if not (terms or sub_scores):
        return []
    scores = {"score": score} if sub_scores is None else {**sub_scores, "hybrid": score}
    total = score if sub_scores is None else sub_scores.get("sparse", 0.0)
    width = max(8, *(len(term.token) for term in terms), 0)
    rows = [f"{'token':<{width}}  {'query':>9} x {'stored':>9} = contribution"]
    rows += [
        f"{term.token:<{width}}  {term.query_weight:>9.4f} x {term.document_weight:>9.4f} = {term.contribution:>12.4f}"
        for term in terms
    ]
    rest = total - sum(term.contribution for term in terms)
    # A SEISMIC search explains only the top_n heaviest tokens of the query.
    sums = {"other": rest} if abs(rest) > 1e-5 * total else {}
    return rows + [f"{name:<{width}}  {'':>9}   {'':>9}   {value:>12.4f}" for name, value in {**sums, **scores}.items()]
