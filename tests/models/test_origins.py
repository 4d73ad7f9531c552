"""Origins of terms: the tokens are those whose logits, computed by transformers, are largest."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from support.checkpoints import PACKAGED, TEXTS, build_encoder

from sparse_ingest.checkpoints.layouts import read_checkpoint
from sparse_ingest.models.origins import origins

shared_encoder = functools.cache(build_encoder)


@functools.cache
def library(model: str):
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    folder = read_checkpoint(model).transformer
    return AutoModelForMaskedLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def logits_of(model: str, text: str) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Return logits [tokens, vocabulary] of a complete text, and the span of each token; (0, 0): a special token."""
    masked_lm, tokenizer = library(model)
    inputs = tokenizer(text, return_tensors="pt", return_offsets_mapping=True, truncation=True)
    spans = [tuple(span) for span in inputs.pop("offset_mapping")[0].tolist()]
    with torch.inference_mode():
        return masked_lm(**inputs).logits[0].numpy(), spans


@pytest.mark.parametrize("name", ["plain-bert", "plain-roberta", "plain-modernbert", PACKAGED])
@pytest.mark.parametrize("text", TEXTS)
def test_each_term_comes_from_the_token_with_its_largest_logit(
    checkpoints: dict[str, str], name: str, text: str
) -> None:
    model = checkpoints[name]
    encoder = shared_encoder(model)
    vector = encoder.encode([text]).vectors
    tokens = [encoder.vocabulary[token_id] for token_id in vector.token_ids]
    found = origins(encoder, text, tokens)
    assert [origin.token for origin in found] == tokens
    np.testing.assert_allclose([origin.weight for origin in found], vector.weights, atol=1e-4)
    logits, spans = logits_of(model, text)
    for token_id, origin in zip(vector.token_ids, found, strict=True):
        column = logits[:, token_id]
        # Equal tokens may have logits that differ in the last bits only.
        near = [spans[place] for place in np.flatnonzero(column >= column.max() - 1e-4)]
        shown = "" if origin.start is None else text[origin.start : origin.end]
        assert shown in {text[start:end].strip() for start, end in near}, origin
        assert not shown or any(start <= origin.start < origin.end <= end for start, end in near), origin


def test_a_term_of_the_prompt_or_a_special_token_has_no_place(checkpoints: dict[str, str]) -> None:
    encoder = shared_encoder(checkpoints["plain-bert"], document_prompt="the bird of fire: ")
    tokens = [token for token in encoder.vocabulary if token]
    found = origins(encoder, "stone", tokens)
    assert {(origin.start, origin.end) for origin in found} == {(None, None), (0, 5)}


def test_a_long_text_is_read_to_its_end_only_in_windows(checkpoints: dict[str, str]) -> None:
    encoder = shared_encoder(checkpoints["plain-bert"], max_length=12)
    text = "the river and the stone " * 4 + "lamp searching sparse vectors"
    tokens = [token for token in encoder.vocabulary if token]
    for windows, vector in ((False, encoder.encode([text])), (True, encoder.encode_windows(encoder.cut([text])))):
        found = origins(encoder, text, tokens, windows=windows)
        expected = {encoder.vocabulary[number]: weight for number, weight in zip(*vector.vectors.row(0), strict=True)}
        assert {origin.token: origin.weight for origin in found} == pytest.approx(expected, abs=1e-4)
        last = max(origin.end or 0 for origin in found)
        assert (last > text.index("lamp")) == windows


def test_tokens_that_documents_never_have_are_skipped(checkpoints: dict[str, str]) -> None:
    zeroed = shared_encoder(checkpoints["plain-bert"], document_special_tokens="zero")
    special = [token for token in zeroed.vocabulary if token and token.startswith("[")]
    assert origins(zeroed, "[CLS] stone", [*special, "no such token"]) == []
    kept = shared_encoder(checkpoints["plain-bert"], document_special_tokens="keep")
    assert {origin.token for origin in origins(kept, "[CLS] stone", special)}
