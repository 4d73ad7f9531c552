"""The origins of terms: which token of a text gave a term the weight that it has in the document's vector.

In: a document encoder, a text and some tokens of the vocabulary. Out: of each the place in the text whose logit is the
maximum, which is the one that counts. The head that encodes corpora returns maxima without places, so the few columns
are computed here with a plain product, in float32: weights may differ from those of a run in the last bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from sparse_ingest.models.documents import DocumentEncoder


class Origin(NamedTuple):
    """The token of a text with the largest logit of a term.

    Attributes:
        token: The term.
        weight: Its weight in the text's vector, before pruning.
        start: The first character of the token in the text; None for special tokens, white space and the prompt.
        end: The end of the token; None as `start`.
    """

    token: str
    weight: float
    start: int | None = None
    end: int | None = None


def origins(encoder: DocumentEncoder, text: str, tokens: Sequence[str], *, windows: bool = False) -> list[Origin]:
    """Return the origin of each token that has a weight in the vector of the text, in the order of `tokens`.

    Args:
        encoder: The document side of a model.
        text: The text that was encoded, without prompt.
        tokens: Token strings. Those that the vocabulary lacks are skipped.
        windows: Whether the complete text was encoded, in windows; otherwise only its first window is read.
    """
    wanted = set(tokens)
    ids = {token: number for number, token in enumerate(encoder.vocabulary) if token in wanted}
    cut = encoder.cut([text])[0]
    spans = encoder.spans(text)
    best: dict[str, Origin] = {}
    for number in range(cut.windows if windows else 1):
        window, (first, end) = cut.window(number), cut.text_tokens(number)
        if not ids or not len(window):
            continue
        before = len(cut.layout.before) + cut.prompt
        places, weights = encoder.maker.strongest(window, list(ids.values()))
        for token, place, weight in zip(ids, places.tolist(), weights, strict=True):
            if weight > (best[token].weight if token in best else 0.0):
                inside = 0 <= place - before < end - first
                shown = _visible(text, *spans[first + place - before].tolist()) if inside else (None, None)
                best[token] = Origin(token, weight, *shown)
    return [best[token] for token in dict.fromkeys(tokens) if token in best]


def _visible(text: str, start: int, end: int) -> tuple[int, int] | tuple[None, None]:
    """Return a span without the space that byte-level tokenizers count to a word; None of the prompt or of space."""
    length = len(text[max(0, start) : max(0, end)].strip())
    end = max(0, start) + len(text[max(0, start) : max(0, end)].rstrip())
    return (end - length, end) if length else (None, None)
