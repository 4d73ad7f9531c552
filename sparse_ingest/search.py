"""The verb `search`: query weights to explained hits.

Two things can be searched: an index, which is asked with the request that `query` prints, and a run folder, which is
searched exactly and needs no server. Both give the same `Hit`s; on the weights that an index keeps
(`search_run(..., stored=True)`) also the same scores, bit for bit. Not covered: text to
query weights (query.py), files of queries and measures.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

from sparse_ingest.errors import ClusterError
from sparse_ingest.opensearch.requests import (
    MAX_CLAUSES,
    bm25_body,
    explained_terms,
    fit_weights,
    neural_sparse_body,
    rank_feature_body,
    seismic_body,
)
from sparse_ingest.queries.protocol import QueryWeights, to_float32
from sparse_ingest.query import DEFAULT_FIELD, known_keys

if TYPE_CHECKING:
    from sparse_ingest.opensearch.client import Client
    from sparse_ingest.runs.manifest import Run
    from sparse_ingest.runs.shards import ShardPart

SNIPPET_CHARACTERS = 160
logger = logging.getLogger(__name__)


class TermShare(NamedTuple):
    """What one token gave to a score."""

    token: str
    query_weight: float
    document_weight: float
    contribution: float


class Hit(NamedTuple):
    """One found document; `terms` lie heaviest first and their contributions sum to `score`, as float32."""

    rank: int
    score: float
    doc_id: str
    fields: dict[str, Any]
    terms: list[TermShare]


def search_index(
    client: Client,
    index: str,
    weights: QueryWeights,
    *,
    field: str = DEFAULT_FIELD,
    size: int,
    collapse: str | None = None,
    keys: Mapping[str, str] | None = None,
    seismic: Mapping[str, Any] | None = None,
) -> list[Hit]:
    """Ask an index; the terms of each hit come from the server's own explanation of its score.

    A sparse_vector field needs the `keys` of tokens (see `token_keys`), and takes `seismic` settings; a hit of its
    clusters names the `top_n` heaviest tokens of the query only.
    `collapse` names a field: of the documents that share its value, as passages share their `parent`, only the best is
    a hit. Documents without the field count as sharing one.
    """
    fitted = fit_weights(weights, max_clauses=len(weights))
    tokens: dict[str, str] = {}
    if keys is None:
        answer = _ask(client, index, fitted.weights, field=field, size=size, collapse=collapse)
    else:
        known = known_keys(fitted.weights, keys)
        tokens = {keys[token]: token for token in known}
        keyed = {keys[token]: weight for token, weight in known.items()}
        body = seismic_body(keyed, field=field, size=size, settings=seismic or {}, explain=True, collapse=collapse)
        answer = client.call("POST", f"/{quote(index, safe='')}/_search", body)
    hits = []
    for rank, found in enumerate(answer["hits"]["hits"], start=1):
        shares = (
            TermShare(
                tokens.get(term.token, term.token),
                to_float32(term.query_weight) * fitted.scale,
                to_float32(term.stored_weight),
                to_float32(term.contribution) * fitted.scale,
            )
            for term in explained_terms(found["_explanation"], field)
        )
        # JSON prints the shortest decimal of a float32; the value behind it is what two scores are compared by.
        score = to_float32(found["_score"]) * fitted.scale
        hits.append(Hit(rank, score, found["_id"], found.get("_source", {}), _heaviest_first(shares)))
    return hits


def search_words(client: Client, index: str, text: str, *, field: str = DEFAULT_FIELD, size: int) -> list[Hit]:
    """Ask an index with BM25 on title and text, which learned-sparse search is compared with; hits have no terms."""
    answer = client.call("POST", f"/{quote(index, safe='')}/_search", bm25_body(text, field=field, size=size))
    return [
        Hit(rank, found["_score"], found["_id"], found.get("_source", {}), [])
        for rank, found in enumerate(answer["hits"]["hits"], start=1)
    ]


def search_run(
    run: Run, weights: QueryWeights, *, size: int, stored: bool = False, collapse: str | None = None
) -> list[Hit]:
    """Search the finished shards of a run exactly; `stored`: with the weights that an index keeps of the run's own.

    `collapse` is as for `search_index`, on a field that the run carries. The run is read again with more hits until
    enough of them differ in it.
    """
    import numpy as np

    from sparse_ingest.retrieval.exact import QueryVector, search_exact

    # Listed once: an encode that goes on meanwhile must not move the rows.
    shards = run.done_shards()
    if run.complete() is None:
        logger.warning("%s is unfinished: only its %d finished shards are searched.", run.path, len(shards))
    tokens = _known_tokens(run, weights)
    vector = QueryVector(
        np.array(list(tokens), dtype=np.uint32), np.array([weights[token] for token in tokens.values()], np.float32)
    )
    asked = size
    while True:
        [found] = search_exact((part.vectors for part in _parts(run, shards, stored)), [vector], asked)
        rows = _rows_at(run, shards, set(found.positions.tolist()), stored)
        places = _best_of_each([rows[position][0] for position in found.positions.tolist()], collapse)
        if len(places) >= size or len(found.doc_ids) < asked:
            break
        asked *= 4
    hits = []
    for rank, place in enumerate(places[:size], start=1):
        carried, held = rows[int(found.positions[place])]
        shares = (
            TermShare(token, weights[token], held[token_id], to_float32(weights[token] * held[token_id]))
            for token_id, token in tokens.items()
            if token_id in held
        )
        score = float(found.scores[place])
        hits.append(Hit(rank, score, found.doc_ids[place], json.loads(carried), _heaviest_first(shares)))
    return hits


def snippet(hit: Hit) -> str:
    """About 160 characters of the text around the first place of the heaviest matched term that stands in it."""
    text = " ".join(str(hit.fields.get("text") or "").split())
    if len(text) <= SNIPPET_CHARACTERS:
        return text
    places = (_place_of(term.token, text) for term in hit.terms)
    place = next((place for place in places if place is not None), 0)
    # A third before the term, moved to the border of a word when one is near; not every language has spaces.
    start = max(0, min(place - SNIPPET_CHARACTERS // 3, len(text) - SNIPPET_CHARACTERS))
    start = text.rfind(" ", max(0, start - 20), start) + 1 or start
    end = start + SNIPPET_CHARACTERS
    border = text.find(" ", end, end + 20)
    end = border if border >= 0 else end
    return ("…" if start else "") + text[start:end] + ("…" if end < len(text) else "")


def _place_of(token: str, text: str) -> int | None:
    """Where a token stands in a text as a word, or else as the beginning of one."""
    word = token.removeprefix("Ġ").removeprefix("▁")
    if not word.isalnum():  # punctuation, and pieces such as ##ing, which alone say little
        return None
    found = re.search(rf"\b{word}\b", text, re.IGNORECASE) or re.search(rf"\b{word}", text, re.IGNORECASE)
    return found.start() if found else None


def _best_of_each(carried: Sequence[str], collapse: str | None) -> list[int]:
    """The places of those rows, given by their fields, best first, whose value of `collapse` comes first there."""
    if collapse is None:
        return list(range(len(carried)))
    first: dict[str, int] = {}
    for place, fields_of_row in enumerate(carried):
        first.setdefault(json.dumps(json.loads(fields_of_row).get(collapse)), place)
    return list(first.values())


def _ask(
    client: Client, index: str, weights: QueryWeights, *, field: str, size: int, collapse: str | None = None
) -> Any:
    """The answer of the cluster, with or without the neural-search plugin."""
    from sparse_ingest.opensearch.indexes import max_clauses

    # A request of its own, so only when the answer matters.
    limit = max_clauses(client) if len(weights) > MAX_CLAUSES else MAX_CLAUSES
    path = f"/{quote(index, safe='')}/_search"
    body = neural_sparse_body(weights, field=field, size=size, explain=True, max_clauses=limit, collapse=collapse)
    try:
        return client.call("POST", path, body)
    except ClusterError as error:
        if "unknown query [neural_sparse]" not in str(error):
            raise
    kept = {token: weight for token, weight in weights.items() if "." not in token}
    if len(kept) < len(weights):
        lost = ", ".join(repr(token) for token in weights if token not in kept)
        logger.warning(
            "The cluster lacks the neural-search plugin and cannot be asked for tokens with a dot; left out: %s.", lost
        )
    body = rank_feature_body(kept, field=field, size=size, explain=True, max_clauses=limit, collapse=collapse)
    return client.call("POST", path, body)


def _parts(run: Run, shards: Iterable[int], stored: bool) -> Iterator[ShardPart]:
    """The row groups of some shards; `stored`: with the weights that an index keeps of them."""
    from sparse_ingest.opensearch.scores import stored_weights
    from sparse_ingest.runs.shards import read_shard

    for shard in shards:
        for part in read_shard(run.shard_path(shard)):
            if stored:
                part = part._replace(vectors=part.vectors._replace(weights=stored_weights(part.vectors.weights)))
            yield part


def _rows_at(
    run: Run, shards: Sequence[int], positions: set[int], stored: bool
) -> dict[int, tuple[str, dict[int, float]]]:
    """Fields and terms of the rows at these places among all rows of the shards; shards without one are not read."""
    rows: dict[int, tuple[str, dict[int, float]]] = {}
    first = 0
    for shard in shards:
        after = first + int((run.done(shard) or {})["rows"])
        if any(first <= position < after for position in positions):
            for part in _parts(run, [shard], stored):
                for position in positions.intersection(range(first, first + len(part.fields))):
                    token_ids, weights = part.vectors.row(position - first)
                    terms = dict(zip(token_ids.tolist(), weights.tolist(), strict=True))
                    rows[position] = part.fields[position - first], terms
                first += len(part.fields)
        first = after
    return rows


def _known_tokens(run: Run, weights: QueryWeights) -> dict[int, str]:
    """The query's tokens by their id in the run, ascending."""
    tokens = {token_id: token for token_id, token in enumerate(run.vocabulary()) if token in weights}
    unknown = sorted(weights.keys() - tokens.values())
    if unknown:
        logger.warning(
            "%d of the %d tokens of the query are not in the vocabulary of the run, such as %r: "
            "the query was made with another model.",
            len(unknown),
            len(weights),
            unknown[0],
        )
    return tokens


def _heaviest_first(shares: Iterable[TermShare]) -> list[TermShare]:
    return sorted(shares, key=lambda share: (-share.contribution, share.token))
