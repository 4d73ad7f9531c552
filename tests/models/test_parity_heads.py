"""Vocabulary projections of every kind, compared with sentence-transformers on the same folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import transformers
from support.checkpoints import WORDPIECE, make_tokenizer, sizes
from support.families import DOCUMENTS, QUERIES, as_rows, assert_same, dense, encoder_of, reference_of
from support.heads import HEADS_OF, SPARE_IDS, XLM_R_TOKENS, make_head, make_large_vocabulary

from sparse_ingest.errors import CheckpointError
from sparse_ingest.models.query_encoders import query_encoder
from sparse_ingest.pipeline import ModelSettings


@pytest.fixture(scope="module", params=HEADS_OF)
def head(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of each checkpoint in turn."""
    return str(make_head(tmp_path_factory.mktemp("heads") / request.param, request.param))


def with_a_token(weights: np.ndarray, folder: str) -> np.ndarray:
    """Set the weights on ids without a token to zero: an index cannot store them."""
    weights[:, [token is None for token in encoder_of(folder).vocabulary]] = 0
    return weights


def test_document_weights_match_the_library(head: str) -> None:
    expected = reference_of(head).encode_document(list(DOCUMENTS), convert_to_sparse_tensor=False).numpy()
    assert_same(dense(encoder_of(head).encode(DOCUMENTS), expected.shape[1]), with_a_token(expected, head))
    assert np.count_nonzero(expected) > 10 * len(DOCUMENTS)


# A symmetric model computes queries as it computes documents.
@pytest.mark.parametrize(
    "head", [one if one == "electra" else pytest.param(one, marks=pytest.mark.slow) for one in HEADS_OF], indirect=True
)
def test_query_weights_match_the_library(head: str) -> None:
    expected = reference_of(head).encode_query(list(QUERIES), convert_to_sparse_tensor=False).numpy()
    ids = {token: place for place, token in enumerate(encoder_of(head).vocabulary)}
    found = query_encoder(ModelSettings(document=head)).encode(QUERIES)
    assert_same(as_rows(found, ids, expected.shape[1]), with_a_token(expected, head))


def test_weights_on_ids_without_a_token_are_counted(tmp_path: Path) -> None:
    folder = make_head(tmp_path / "cut", "bert-cut")
    encoder = encoder_of(str(folder))
    expected = reference_of(str(folder)).encode_document(list(DOCUMENTS), convert_to_sparse_tensor=False).numpy()
    assert encoder.vocabulary[-SPARE_IDS:] == [None] * SPARE_IDS
    assert encoder.encode(DOCUMENTS).without_token == np.count_nonzero(expected[:, -SPARE_IDS:]) > 0


@pytest.mark.slow
def test_a_vocabulary_of_250_002_tokens_matches_the_library(tmp_path: Path) -> None:
    folder = str(make_large_vocabulary(tmp_path / "xlm-r"))
    texts = ["the river word7 stones", "word123456 word249000 the", "stone"]
    expected = reference_of(folder).encode_document(texts, convert_to_sparse_tensor=False).numpy()
    encoder = encoder_of(folder)
    assert_same(dense(encoder.encode(texts), XLM_R_TOKENS), expected)
    assert np.count_nonzero(expected) > 1000 and encoder.vocabulary[-2:] == ["▁word249992", "<mask>"]


def test_a_token_without_an_embedding_is_refused_with_its_id(tmp_path: Path) -> None:
    """The tokenizer has four tokens more than the model; texts without them are encoded."""
    model = transformers.BertForMaskedLM(transformers.BertConfig(**sizes(len(WORDPIECE) - 4)))
    model.save_pretrained(tmp_path)
    make_tokenizer("bert").save_pretrained(tmp_path)
    encoder = encoder_of(str(tmp_path))
    assert len(encoder.encode(["the river"]).vectors.doc_ids) == 1
    message = f"the id {len(WORDPIECE) - 1}, but .* has embeddings for ids below {len(WORDPIECE) - 4}"
    with pytest.raises(CheckpointError, match=message):
        encoder.encode(["the river", "aly"])
