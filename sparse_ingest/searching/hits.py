"""What a search gives: hits with the terms that made their scores, rankings, and the snippet of a hit.

Nothing here asks a server or reads a run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from sparse_ingest.records import TermShare

SNIPPET_CHARACTERS = 160


class Hit(NamedTuple):
    """One found document; `terms` are sorted heaviest first and their contributions sum to `score`, as float32.

    Of a two-phase search the last bit may differ, which adds two such sums.
    """

    rank: int
    score: float
    id: str
    fields: dict[str, Any]
    terms: list[TermShare]

    @property
    def doc_id(self) -> str:
        """The name of `id` in the first edition."""
        return self.id


class Ranked(NamedTuple):
    """What one of many queries found, best first, without the documents themselves.

    `latency_s` is what the caller waited for, `took_ms` what the server says of itself; a run folder has no server.
    """

    query_id: str
    doc_ids: list[str]
    scores: list[float]
    latency_s: float = 0.0
    took_ms: float | None = None

    def without(self, doc_id: str) -> Ranked:
        """Return the ranking without this document."""
        kept = [place for place, found in enumerate(self.doc_ids) if found != doc_id]
        return self._replace(
            doc_ids=[self.doc_ids[place] for place in kept], scores=[self.scores[place] for place in kept]
        )

    def best(self, size: int) -> Ranked:
        """Return the ranking of its first `size` documents."""
        return self._replace(doc_ids=self.doc_ids[:size], scores=self.scores[:size])


def heaviest_first(shares: Iterable[TermShare]) -> list[TermShare]:
    """The terms of a hit in the order that they are shown in."""
    return sorted(shares, key=lambda share: (-share.contribution, share.token))


def first_of_each(keys: Iterable[str]) -> list[int]:
    """The places where each key comes first, in order."""
    first: dict[str, int] = {}
    for place, key in enumerate(keys):
        first.setdefault(key, place)
    return list(first.values())


def snippet(hit: Hit) -> str:
    """About 160 characters of the text around the first place of the heaviest matched term that is in it."""
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


def marked(text: str, hit: Hit, mark: Callable[[str], str]) -> str:
    """The text with every place of a matched term, as a word or as the beginning of one, put through `mark`."""
    words = sorted({word for term in hit.terms if (word := _word_of(term.token))}, key=len, reverse=True)
    if not words:
        return text
    pattern = rf"\b(?:{'|'.join(words)})"
    return re.sub(pattern, lambda found: mark(found[0]), text, flags=re.IGNORECASE)


def _word_of(token: str) -> str | None:
    """The word that a token begins; None for punctuation, and for pieces such as ##ing, which alone say little."""
    word = token.removeprefix("Ġ").removeprefix("▁")
    return word if word.isalnum() else None


def _place_of(token: str, text: str) -> int | None:
    """Where a token is in a text as a word, or else as the beginning of one."""
    word = _word_of(token)
    if word is None:
        return None
    found = re.search(rf"\b{word}\b", text, re.IGNORECASE) or re.search(rf"\b{word}", text, re.IGNORECASE)
    return found.start() if found else None
