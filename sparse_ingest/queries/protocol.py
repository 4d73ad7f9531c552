"""What every query encoder gives: the weights of a query's tokens, by token string.

Token strings and not ids, because a request to OpenSearch names features by string, and because a query side may
number its tokens differently from the document side.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from struct import Struct
from typing import Protocol

# Token string -> weight above zero. Each weight is a float32 value; heaviest first, equal weights by token string.
QueryWeights = dict[str, float]

_FLOAT32 = Struct("<f")


class QueryEncoder(Protocol):
    """Turns query texts into query weights."""

    def encode(self, texts: Sequence[str]) -> list[QueryWeights]:
        """The weights of each text, in the order of the texts; a text without a weighted token gives an empty dict."""
        ...


def query_weights(weights: Iterable[tuple[str, float]]) -> QueryWeights:
    """Put weights into the form of `QueryWeights`: float32 values, zeros left out, heaviest first."""
    rounded = ((token, to_float32(weight)) for token, weight in weights)
    return dict(sorted((pair for pair in rounded if pair[1] > 0), key=lambda pair: (-pair[1], pair[0])))


def to_float32(value: float) -> float:
    """The float32 nearest to a value: what the server makes of a number in JSON."""
    return float(_FLOAT32.unpack(_FLOAT32.pack(value))[0])
