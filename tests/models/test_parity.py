"""Compare every checkpoint family with its own library, for documents and queries in batches.

The library is the installed sentence-transformers on the same folder. It cannot read three layouts: modules of the
removed class `IDF` and `NewForMaskedLM` without remote code are compared with the same weights under names it knows;
OpenSearch's plain layout is compared with the formula on OpenSearch's cards (special tokens of documents 0, unlisted
query tokens 1.0).
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from support.checkpoints import PACKAGED, make_masked_lm, make_splade_card, write_idf
from support.families import (
    DOCUMENTS,
    FAMILY_OF_TWIN,
    QUERIES,
    SPECIAL,
    Twin,
    as_rows,
    assert_same,
    dense,
    encoder_of,
    reference_of,
)

from sparse_ingest.checkpoints.layouts import read_checkpoint
from sparse_ingest.checkpoints.sides import WeightTableSide
from sparse_ingest.models.query_encoders import query_encoder
from sparse_ingest.pipeline import ModelSettings

IDF_ALONE = Path(__file__).parents[2].parent / "shared" / "data" / "bert-uncased"


@pytest.mark.parametrize("name", FAMILY_OF_TWIN)
def test_document_weights_match_the_library(twins: dict[str, Twin], name: str) -> None:
    twin = twins[name]
    assert read_checkpoint(twin.model).family == twin.family
    expected = reference_of(twin.reference).encode_document(list(DOCUMENTS), convert_to_sparse_tensor=False).numpy()
    encoder = encoder_of(twin.model)
    assert_same(dense(encoder.encode(DOCUMENTS), expected.shape[1]), expected)
    alone = np.concatenate([dense(encoder.encode([text]), expected.shape[1]) for text in DOCUMENTS])
    assert_same(alone, expected)
    assert np.count_nonzero(expected) > 10 * len(DOCUMENTS)


@pytest.mark.parametrize("name", FAMILY_OF_TWIN)
def test_query_weights_match_the_library(twins: dict[str, Twin], name: str) -> None:
    twin = twins[name]
    encoder = query_encoder(ModelSettings(document=twin.model))
    assert isinstance(read_checkpoint(twin.model).query, WeightTableSide) == (FAMILY_OF_TWIN[name] == "router")
    expected = reference_of(twin.reference).encode_query(list(QUERIES), convert_to_sparse_tensor=False).numpy()
    ids = {token: place for place, token in enumerate(encoder_of(twin.model).vocabulary)}
    assert_same(as_rows(encoder.encode(QUERIES), ids, expected.shape[1]), expected)
    alone = [encoder.encode([query])[0] for query in QUERIES]
    assert_same(as_rows(alone, ids, expected.shape[1]), expected)


def test_a_padding_token_in_a_text_has_the_same_weight_in_a_batch_and_alone(twins: dict[str, Twin]) -> None:
    """In the library a longer text in the same batch removes its weight, because padding overwrites it."""
    twin = twins["router-saved"]
    texts = ["[PAD] stone", "the river and the stone"]
    reference, encoder = reference_of(twin.reference), query_encoder(ModelSettings(document=twin.model))
    ids = {token: place for place, token in enumerate(encoder_of(twin.model).vocabulary)}
    alone = reference.encode_query(texts[:1], convert_to_sparse_tensor=False).numpy()
    together = reference.encode_query(texts, convert_to_sparse_tensor=False).numpy()
    assert alone[0, ids["[PAD]"]] > 0 and not together[0, ids["[PAD]"]]
    assert_same(as_rows(encoder.encode(texts)[:1], ids, alone.shape[1]), alone)


def test_a_document_and_a_query_checkpoint_each_keep_their_own_files(tmp_path: Path) -> None:
    """naver's pair: two plain folders in one pipeline, each with its own tokenizer and length."""
    document = make_masked_lm(tmp_path / "doc", "distilbert", model_max_length=40)
    query = make_masked_lm(tmp_path / "query", "bert", cased=True, seed=7, model_max_length=9)
    expected = reference_of(str(query)).encode_query(list(QUERIES), convert_to_sparse_tensor=False).numpy()
    encoder = query_encoder(ModelSettings(document=str(document), query=str(query)))
    ids = {token: place for place, token in enumerate(encoder_of(str(query)).vocabulary)}
    assert_same(as_rows(encoder.encode(QUERIES), ids, expected.shape[1]), expected)
    documents = reference_of(str(document)).encode_document(list(DOCUMENTS), convert_to_sparse_tensor=False).numpy()
    assert_same(dense(encoder_of(document).encode(DOCUMENTS), documents.shape[1]), documents)


@pytest.mark.parametrize("activation", ["relu", "log1p_relu"])
def test_opensearch_plain_layout_follows_its_own_card(tmp_path: Path, activation: str) -> None:
    """Such a folder does not state `log1p_relu`, which v3 models use; the pipeline file sets it."""
    import torch
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    folder = write_idf(make_masked_lm(tmp_path / "doc-v2", "distilbert"), left_out=("stone", "[MASK]"))
    model = AutoModelForMaskedLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, model_max_length=64)
    inputs = tokenizer(list(DOCUMENTS), padding=True, truncation=True, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        weights = (model(**inputs).logits * inputs["attention_mask"].unsqueeze(-1)).amax(1).relu().log1p()
    weights = weights.log1p() if activation == "log1p_relu" else weights
    weights[:, tokenizer.all_special_ids] = 0
    encoder = encoder_of(folder, activation=activation)
    assert_same(dense(encoder.encode(DOCUMENTS), weights.shape[1]), weights.numpy())
    idf = json.loads((folder / "idf.json").read_text())
    for text, found in zip(QUERIES, query_encoder(ModelSettings(document=str(folder))).encode(QUERIES), strict=True):
        tokens = set(tokenizer.tokenize(text)) - set(tokenizer.all_special_tokens)
        assert found == pytest.approx({token: idf.get(token, 1.0) for token in tokens})


def test_prompts_are_read_under_the_names_that_the_library_uses(tmp_path: Path) -> None:
    """A prompt named "passage" and a default prompt are not applied."""
    folder = make_splade_card(tmp_path / "card", prompts={})
    path = folder / "config_sentence_transformers.json"
    prompts = {"prompts": {"passage": "stone ", "search": "river "}, "default_prompt_name": "search"}
    path.write_text(json.dumps({**json.loads(path.read_text()), **prompts}))
    expected = reference_of(str(folder)).encode_document(["the lamp"], convert_to_sparse_tensor=False).numpy()
    assert_same(dense(encoder_of(folder).encode(["the lamp"]), expected.shape[1]), expected)
    expected = reference_of(str(folder)).encode_query(["the lamp"], convert_to_sparse_tensor=False).numpy()
    encoder = query_encoder(ModelSettings(document=str(folder)))
    ids = {token: place for place, token in enumerate(encoder_of(folder).vocabulary)}
    assert_same(as_rows(encoder.encode(["the lamp"]), ids, expected.shape[1]), expected)


@pytest.mark.skipif(not IDF_ALONE.is_dir(), reason="the folder shared/data is not there")
def test_bert_uncased_queries_match_the_library() -> None:
    """The table as `query` and the module that sentence-transformers builds from it, except for special tokens."""
    from sentence_transformers.sparse_encoder.modules import SparseStaticEmbedding
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(IDF_ALONE / "tokenizer.json"), pad_token="[PAD]")
    module = SparseStaticEmbedding.from_json(str(IDF_ALONE / "idf.json"), tokenizer)
    texts = [text for text in QUERIES if text and text not in SPECIAL]
    expected = module(module.preprocess(texts))["sentence_embedding"].detach().numpy()
    # A character outside the vocabulary is [UNK], which has weight 0 here and more in the library.
    expected[:, tokenizer.convert_tokens_to_ids(["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"])] = 0
    found = query_encoder(ModelSettings(document=PACKAGED, query=str(IDF_ALONE))).encode(texts)
    assert_same(as_rows(found, tokenizer.get_vocab(), expected.shape[1]), expected)
