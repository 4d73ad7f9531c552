"""nanotoken instead of tokenizers for WordPiece: the same token ids in a hundredth of the time.

In: a tokenizer of the library tokenizers. Out: a function from texts to token ids, or None if nanotoken is not
installed, does not support the tokenizer, or returns other ids in a trial: every character of the basic plane inside a
word and alone, words of the vocabulary, added tokens, and text in which tokenizers are known to differ. Later every
64th text is compared too. nanotoken returns no offsets, so tokenizer.py does not use it where it needs them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from sparse_ingest.errors import SparseIngestError, first_line

# Words that a thread caches: 16 MB per thread, instead of 130 MB with nanotoken's default.
REMEMBERED = 1 << 17
# All code points of the basic plane, then a sample of the rest.
CHARACTERS = [*range(0xD800), *range(0xE000, 0x10000), *range(0x10000, 0x1FB00, 7), *range(0x1FB00, 0x110000, 4099)]
WORDS = 8  # every eighth word of the vocabulary
COMPARED = 64  # every 64th text, and the first of each call
HARD = (
    "", " ", "\t\n\r", "a" * 99, "a" * 100, "a" * 101, "é" * 60 + "e\u0301" * 60, "[CLS] a [SEP]", "x[MASK]y [ MASK ]",
    "[mask] [PAD][UNK]", " <s> x</s><mask> y<pad>", "İstanbul ıI", "ΑΣ ΟΔΟΣ σς", "ﬁ ﬂ ß ẞ ŉ ǅ", "²³ ½ Ⅷ ① 𝔘𝟘",
    "a\u0300\u0301\u0316b \u0301", "你好,世界。中文abc", "한국어 ㄱ", "ก็ไทย", "नमस्ते", "שָׁלוֹם", "مُرَحِّب", "🏳️‍🌈 👍🏽",
    "a##b ## #", "\u200b\u200d\u2060w\ufeff\u00ad", "g\x0bh\x0ci\x1cj\x85k\u2028l", "don't U.S.A. 3.14 1,000 e-mail",
    "http://a.b/c?d=e&f=g#h",
)  # fmt: skip


class OtherTokens(SparseIngestError):
    """nanotoken and tokenizers disagree on a text."""

    def __init__(self, text: str) -> None:
        super().__init__(
            f"nanotoken and tokenizers disagree on the text that starts with {text[:100]!r}. Earlier texts may "
            "have wrong tokens: uninstall nanotoken, and encode into a new folder."
        )


# Texts to token ids without special tokens; the second argument limits the tokens of a text.
Encode = Callable[[Sequence[str], int | None], list[npt.NDArray[np.int32]]]
logger = logging.getLogger(__name__)


def build_nanotokens(tokenizer: Any) -> Encode | None:
    """Return nanotoken's equivalent of a tokenizer, which raises OtherTokens if it finds a difference; or None."""
    try:
        import nanotoken
    except ImportError:
        return None
    try:
        nanotoken.set_cache_entries(REMEMBERED)
        quick = nanotoken.Tokenizer.from_json(tokenizer.to_str())
        if _trial(tokenizer, quick):
            return partial(_encode_compared, tokenizer, quick)
        reason = "its tokens differ"
    except Exception as error:  # mostly for a kind of tokenizer that it does not know
        reason = first_line(error)
    logger.info("nanotoken is not used: %s. Continuing with tokenizers, which is slower.", reason)
    return None


def _encode(quick: Any, texts: Sequence[str], enough: int | None) -> list[npt.NDArray[np.int32]]:
    found = quick.encode_batch(texts, add_special_tokens=False, max_length=enough)
    ids = found.ids.view(np.int32)
    return [ids[start:end] for start, end in pairwise(found.offsets.tolist())]


def _encode_compared(
    tokenizer: Any, quick: Any, texts: Sequence[str], enough: int | None
) -> list[npt.NDArray[np.int32]]:
    found = _encode(quick, texts, enough)
    some = list(texts[::COMPARED])
    for text, ids, one in zip(some, found[::COMPARED], _expected(tokenizer, some), strict=True):
        if ids.tolist() != one[:enough]:
            raise OtherTokens(text)
    return found


def _expected(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    return [one.ids for one in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def _trial(tokenizer: Any, quick: Any) -> bool:
    """Return whether nanotoken returns the same tokens for the trial's texts."""
    vocabulary = sorted(tokenizer.get_vocab())
    words = [" ".join(vocabulary[start :: 64 * WORDS]) for start in range(64)]
    added = [str(token) for token in tokenizer.get_added_tokens_decoder().values()]
    characters = ["".join(f"a{chr(point)}b {chr(point)} " for point in CHARACTERS[start::64]) for start in range(64)]
    with_added = [f"a{token}b {token} {token}{token}" for token in added]
    texts = [*HARD, *words, *with_added, *characters, " ".join(HARD), "".join(HARD)]
    expected = _expected(tokenizer, texts)
    return all(
        found.tolist() == ids[:enough]
        for enough in (None, 7)
        for found, ids in zip(_encode(quick, texts, enough), expected, strict=True)
    )
