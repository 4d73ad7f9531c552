"""The fast WordPiece tokenizer gives the same tokens as `tokenizers`, or is not used."""

from __future__ import annotations

import random
import sys
from functools import partial
from typing import Any

import numpy as np
import pytest
from support.checkpoints import PACKAGED, make_tokenizer

from sparse_ingest.checkpoints.layouts import read_checkpoint
from sparse_ingest.models import tokenizer as module
from sparse_ingest.models.nanotokens import COMPARED, WORDS, OtherTokens, build_nanotokens
from sparse_ingest.models.tokenizer import Tokenizer
from sparse_ingest.pipeline import ModelSettings

SPECIAL = ["[CLS]", "[SEP]", " [MASK] ", "[mask]", "<mask>"]
KINDS = [(32, 127), (9, 14), (0x80, 0x3000), (0x3000, 0xD800), (0xE000, 0x110000)]


def texts(count: int) -> list[str]:
    """Return ASCII words mixed with characters of every kind, some of them long."""
    chance = random.Random(0)

    def character() -> str:
        if chance.random() < 0.02:
            return chance.choice(SPECIAL)
        first, last = KINDS[0] if chance.random() < 0.7 else chance.choice(KINDS)
        return chr(chance.randrange(first, last))

    return ["".join(character() for _ in range(chance.randrange(400))) for _ in range(count)]


def tokenizer_of(model: str, **options: Any) -> Tokenizer:
    return Tokenizer(read_checkpoint(model).transformer, ModelSettings(**options))


def without_fire(tokenizer: Any) -> str:
    """Return the tokenizer's JSON with "fire" replaced by another word."""
    return tokenizer.to_str().replace('"fire":', '"fireless":', 1)


class Disguised:
    """A tokenizer that returns the JSON of another one."""

    def __init__(self, real: Any, other: Any) -> None:
        self._real = real
        self.to_str = other.to_str

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


@pytest.fixture
def wordpiece() -> Any:
    pytest.importorskip("nanotoken")
    return tokenizer_of(PACKAGED)._tokenizer


def test_tokens_match_those_of_tokenizers(wordpiece: Any) -> None:
    quick = build_nanotokens(wordpiece)
    assert quick
    some = texts(500)
    expected = [one.ids for one in wordpiece.encode_batch(some, add_special_tokens=False)]
    assert [ids.tolist() for ids in quick(some, None)] == expected
    assert [ids.tolist() for ids in quick(some, 11)] == [ids[:11] for ids in expected]


@pytest.mark.parametrize(
    "options",
    [
        {"document_prompt": "passage: "},
        *(pytest.param(one, marks=pytest.mark.slow) for one in ({}, {"lower_case": True})),
    ],
)
@pytest.mark.parametrize("whole", [False, True])
def test_a_large_corpus_is_truncated_like_a_small_one(
    options: dict, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("nanotoken")
    some = [*texts(40), "fire and water " * 40, ""]
    tokenizer = tokenizer_of(PACKAGED, max_length=32, **options)
    expected = tokenizer.cut(some, full=whole)
    monkeypatch.setattr(module, "QUICK_CHARACTERS", 1)
    found = tokenizer.cut(some, full=whole)
    for one, other in zip(found, expected, strict=True):
        assert (one.token_ids.dtype, one.prompt, one.windows) == (np.int32, other.prompt, other.windows)
        assert [one.window(number).tolist() for number in range(one.windows)] == [
            other.window(number).tolist() for number in range(other.windows)
        ]
    assert (tokenizer.__dict__.get("_quick") is None) == (whole and "document_prompt" in options)


def test_bpe_uses_tokenizers() -> None:
    assert build_nanotokens(make_tokenizer("roberta").backend_tokenizer) is None


def test_nanotoken_is_not_used_if_its_tokens_differ(wordpiece: Any) -> None:
    cased = type(wordpiece).from_str(wordpiece.to_str().replace('"lowercase":true', '"lowercase":false'))
    assert cased.encode("Fire").ids != wordpiece.encode("Fire").ids
    assert build_nanotokens(wordpiece)
    assert build_nanotokens(Disguised(wordpiece, cased)) is None


def test_every_added_token_is_checked(wordpiece: Any) -> None:
    one = type(wordpiece).from_str(wordpiece.to_str())
    one.add_tokens(["Foo-Bar"])
    words = sorted(one.get_vocab())
    assert not any("Foo-Bar" in words[start :: 64 * WORDS] for start in range(64)), "no word of the sample"
    assert build_nanotokens(one)
    assert build_nanotokens(Disguised(one, wordpiece)) is None


def test_tokens_that_differ_later_end_the_run(wordpiece: Any) -> None:
    quick = build_nanotokens(wordpiece)
    assert quick
    some = ["fire and water"] * (COMPARED + 1)
    assert isinstance(quick, partial)
    quick(some, None)
    # Simulate a fault in nanotoken: an extra token in a text that is compared.
    wrong = partial(quick.func, *quick.args[:1], type(quick.args[1]).from_json(without_fire(wordpiece)))
    with pytest.raises(OtherTokens, match="starts with 'fire and water'.*uninstall nanotoken"):
        wrong(some, None)
    with pytest.raises(OtherTokens):
        wrong(["water"] * COMPARED + ["fire"], 3)
    assert len(wrong(["water", "fire"], None)) == 2, "not compared"


def test_without_nanotoken_tokenizers_is_used(wordpiece: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nanotoken", None)
    assert build_nanotokens(wordpiece) is None
