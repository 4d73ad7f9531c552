"""Find out why a search of an index found nothing.

In: the search as it was sent. Out: messages, read from the vocabulary or counted by the server in up to five requests;
none if no check explains it. For runs see run_search.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from sparse_ingest.cluster.client import Client, path_of
from sparse_ingest.cluster.dialects import kind_of
from sparse_ingest.cluster.hybrid_bodies import bm25_body
from sparse_ingest.cluster.indexes import count_matching
from sparse_ingest.cluster.mappings import leaves
from sparse_ingest.cluster.postings import document_frequencies
from sparse_ingest.cluster.reading import UnsearchableFieldError
from sparse_ingest.cluster.search_bodies import Engine
from sparse_ingest.queries.weight_table import QueryWeights
from sparse_ingest.searching.index_search import Asker, without_source
from sparse_ingest.searching.query import named, not_in_vocabulary

_FINDS_LESS = {
    "two-phase": "Two-phase search finds documents by the heavy tokens of the query only",
    "pruned": "Pruned search finds no document by frequent tokens with a low weight in the query",
}


def why_empty_index(
    client: Client, index: str, weights: QueryWeights, engine: Engine, text: str, filter: Mapping[str, Any] | None
) -> list[str]:
    """Return why a search of an index found nothing. `text` is the query of a hybrid search, otherwise empty.

    Raise `ClusterError` if the server cannot answer.
    """
    path = path_of(index)
    documents = count_matching(client, path, {"match_all": {}})
    if not documents:
        return [f"Index {index!r} has no documents that a search can find. Load a run into it, or wait for a refresh."]
    if filter:
        matching = count_matching(client, path, filter)
        if not matching:
            return [
                f"The filter matches none of the {documents:,} documents of index {index!r}. Keywords must be equal, "
                "with the same case."
            ]
        if _finds(client, index, engine, weights, text):
            return [
                f"The filter matches {matching:,} of {documents:,} documents, but the query finds none of them; "
                "without the filter it finds others."
            ]
    found = _without_tokens(client, index, engine, weights)
    if (why := _FINDS_LESS.get(engine.name)) and _finds(client, index, replace(engine, name="exact"), weights, text):
        found.append(f"{why}; --engine exact finds some.")
    if engine.hybrid and not count_matching(client, path, bm25_body(text, field=engine.field, size=1)["query"]):
        found.append("BM25 finds no word of the query in titles and texts.")
    return found


def _finds(client: Client, index: str, engine: Engine, weights: QueryWeights, text: str) -> bool:
    """Return whether a search without a filter finds a document."""
    answer, _ = Asker(client, index, engine).ask(weights, text, size=1, change=without_source)
    return bool(answer["hits"]["hits"])


def _without_tokens(client: Client, index: str, engine: Engine, weights: QueryWeights) -> list[str]:
    """Return messages about tokens that the vocabulary or the field lacks, if no document has any of the others."""
    keys = {token: token for token in weights} if engine.keys is None else engine.keys
    known, unknown = ([token for token in weights if (token in keys) == there] for there in (True, False))
    held = [key for token in known if (key := keys[token]) is not None]
    found = [not_in_vocabulary(unknown, f"of index {index!r}")] if unknown else []
    if not known or _holds(client, index, engine.field, held) is not False:
        return found
    what = f"No document of index {index!r} has any token of the query in field {engine.field!r}: {named(known)}."
    others = (
        name for name, entry in leaves(engine.mappings or {})
        if kind_of(entry) == engine.kind and name != engine.field
    )  # fmt: skip
    elsewhere = [name for name in others if _holds(client, index, name, held)]
    if elsewhere:
        what += f" Field {elsewhere[0]!r} has some: pass --set index.field={elsewhere[0]}."
    return [*found, what]


def _holds(client: Client, index: str, field: str, keys: Sequence[str]) -> bool | None:
    """Return whether a document has one of these keys, or None for a cluster without the neural-search plugin."""
    try:
        return any(document_frequencies(client, index, field, keys).values())
    except UnsearchableFieldError:
        return None
