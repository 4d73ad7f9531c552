"""Results of a search: hits with the terms of their scores, rankings, snippets."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from sparse_ingest.records import TermShare

SNIPPET_CHARACTERS = 160


class Hit(NamedTuple):
    """One found document; `terms` are sorted heaviest first and their contributions sum to `score`, as float32.

    In a two-phase search, which adds two such sums, the last bit may differ. A hit of a hybrid search has both scores
    in `sub_scores`, before they are normalized: `bm25` and `sparse`; `terms` explain `sparse`. A score is absent if its
    search did not find the document.
    """

    rank: int
    score: float
    id: str
    fields: dict[str, Any]
    terms: list[TermShare]
    sub_scores: dict[str, float] | None = None

    @property
    def doc_id(self) -> str:
        """Old name of `id`."""
        return self.id

    def to_dict(self, *, words: bool = True) -> dict[str, Any]:
        """Return the hit as `search --json` prints it; not `words`: terms are features, and not in the snippet."""
        shown = self if words else self._replace(terms=[])
        found = {**self._asdict(), "snippet": snippet(shown), "terms": [term._asdict() for term in self.terms]}
        return {key: value for key, value in found.items() if key != "sub_scores" or value is not None}


class Explanation(NamedTuple):
    """The rank of one document among the hits of a query, and why.

    Attributes:
        id: The document.
        reason: Why it is not one of the first `k` hits: "not found", "no common term", "filtered out", "low score" or
            "missed" (its score is high enough, but SEISMIC or two-phase did not visit it); None: it is one of them.
        rank: Its rank among all hits, from 1. None: it is not a hit, or the engine does not rank all documents.
        score: Its score, without the filter.
        k: Number of requested hits.
        last_score: The score of hit number `k`, or of the last one if there are fewer; None without hits.
        matching: How many documents are hits; None: not counted.
        equal: How many other documents have the same score; None: not counted.
        fields: Its fields.
        terms: The terms of its score, heaviest first.
        lacking: The tokens of the query that the document lacks, heaviest first.
    """

    id: str
    reason: str | None
    k: int
    rank: int | None = None
    score: float | None = None
    last_score: float | None = None
    matching: int | None = None
    equal: int | None = None
    fields: dict[str, Any] = {}
    terms: Sequence[TermShare] = ()
    lacking: Sequence[str] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the explanation as `search --doc ID --json` prints it."""
        return {**self._asdict(), "terms": [term._asdict() for term in self.terms]}


class Ranked(NamedTuple):
    """The ranking of one of many queries, best first, without the documents.

    `latency_s` is seen by the caller, `took_ms` reported by the server (None for a run folder).
    """

    query_id: str
    doc_ids: list[str]
    scores: list[float]
    latency_s: float = 0.0
    took_ms: float | None = None

    def without(self, doc_id: str, size: int | None = None) -> Ranked:
        """Return the first `size` documents, without this one."""
        pairs = zip(self.doc_ids, self.scores, strict=True)
        kept = [(found, score) for found, score in pairs if found != doc_id][:size]
        return self._replace(doc_ids=[found for found, _ in kept], scores=[score for _, score in kept])


def heaviest_first(shares: Iterable[TermShare]) -> list[TermShare]:
    """Sort the terms of a hit by contribution, then by token."""
    return sorted(shares, key=lambda share: (-share.contribution, share.token))


def first_of_each(keys: Iterable[str]) -> list[int]:
    """Return the position of the first occurrence of each key, in order."""
    first: dict[str, int] = {}
    for place, key in enumerate(keys):
        first.setdefault(key, place)
    return list(first.values())


def snippet(hit: Hit) -> str:
    """Return about 160 characters of the text around the heaviest matched term that occurs in it."""
    text = " ".join(str(hit.fields.get("text") or "").split())
    if len(text) <= SNIPPET_CHARACTERS:
        return text
    places = (_place_of(term.token, text) for term in hit.terms)
    place = next((place for place in places if place is not None), 0)
    # A third before the term, moved to a near word boundary; not every language has spaces.
    start = max(0, min(place - SNIPPET_CHARACTERS // 3, len(text) - SNIPPET_CHARACTERS))
    start = text.rfind(" ", max(0, start - 20), start) + 1 or start
    end = start + SNIPPET_CHARACTERS
    border = text.find(" ", end, end + 20)
    end = border if border >= 0 else end
    return ("…" if start else "") + text[start:end] + ("…" if end < len(text) else "")


def marked(text: str, hit: Hit, mark: Callable[[str], str]) -> str:
    """Apply `mark` to every occurrence of a matched term, as a word or a word prefix."""
    words = sorted({word for term in hit.terms if (word := _word_of(term.token))}, key=len, reverse=True)
    if not words:
        return text
    pattern = rf"\b(?:{'|'.join(words)})"
    return re.sub(pattern, lambda found: mark(found[0]), text, flags=re.IGNORECASE)


def _word_of(token: str) -> str | None:
    """Return the word that a token starts; None for punctuation and for suffixes such as ##ing."""
    word = token.removeprefix("Ġ").removeprefix("▁")
    return word if word.isalnum() else None


def _place_of(token: str, text: str) -> int | None:
    """Return the position of a token in a text, as a word or otherwise as a word prefix."""
    word = _word_of(token)
    if word is None:
        return None
    found = re.search(rf"\b{word}\b", text, re.IGNORECASE) or re.search(rf"\b{word}", text, re.IGNORECASE)
    return found.start() if found else None
