"""Every family of checkpoints against its own library: documents and queries, whatever shares their batch.

The library is the installed sentence-transformers, reading the very same folder. It cannot read three of the layouts:
modules of the class `IDF`, which it no longer has, and `NewForMaskedLM` without its remote code are compared with the
same weights under names that it knows; OpenSearch's plain layout is compared with the formula of OpenSearch's own cards
(special tokens of documents zero, an unlisted query token 1.0).
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from support.checkpoints import (
    PACKAGED,
    TEXTS,
    build_encoder,
    make_masked_lm,
    make_new,
    make_router,
    make_splade_card,
    save_sparse_encoder,
    write_idf,
)

from sparse_ingest.checkpoints.layouts import WeightTableSide, read_checkpoint
from sparse_ingest.models.encoder import query_encoder
from sparse_ingest.pipeline import ModelSettings

SPECIAL = ("[CLS] the [MASK] river [SEP] [UNK] zzz", "<s> the <mask> river </s>", "[PAD] stone <pad>")
DOCUMENTS = (*TEXTS, *SPECIAL)
QUERIES = ("river stone", "", "Searching the the Bird!", "日本 überé Ωmega \U0001f600", "water " * 100, *SPECIAL[:2])
IDF_ALONE = Path(__file__).parents[2].parent / "shared" / "data" / "bert-uncased"


class Twin(NamedTuple):
    """A checkpoint, and what sentence-transformers is given in its place: the same folder unless it cannot read it."""

    model: str
    reference: str
    family: str


FAMILY = {
    "symmetric": "symmetric SPLADE, sentence-transformers layout",
    "router": "Router with a separate query side",
    "plain": "masked LM, plain layout",
}
# Name -> family. The first row of each is its card's own layout.
TWINS = {
    "card-distilbert": "symmetric", "card-bert": "symmetric", "card-roberta": "symmetric",
    "saved-modernbert": "symmetric", "card-lengths": "symmetric", "card-arguments": "symmetric",
    "router-idf": "router", "router-idf-config.json": "router", "router-static": "router", "router-root": "router",
    "router-saved": "router", "router-new": "router", "router-new-typed": "router", "router-new-unpacked": "router",
    "router-roberta": "router", "router-cased": "router",
    "plain-bert": "plain", "plain-new": "plain",
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Twin]:
    """The checkpoints of `TWINS`."""
    root = tmp_path_factory.mktemp("twins")
    lms = {kind: make_masked_lm(root / kind, kind) for kind in ("bert", "distilbert", "roberta", "modernbert", "gte")}
    typed = make_masked_lm(root / "gte-typed", "gte", seed=5, type_vocab_size=2)
    prompts = {"query": "find: ", "document": "text: "}
    ours = {
        "card-distilbert": make_splade_card(root / "mrl", "distilbert", max_seq_length=32),
        "card-bert": make_splade_card(root / "mini", "bert", max_seq_length=48),
        "card-roberta": make_splade_card(root / "card-roberta", "roberta", max_seq_length=48, prompts=prompts),
        "saved-modernbert": save_sparse_encoder(
            root / "saved", lms["modernbert"], prompts=prompts, max_seq_length=50, lower_case=False
        ),
        "router-idf": make_router(root / "idf", lms["distilbert"], table="IDF"),
        "router-idf-config.json": make_router(root / "old", lms["bert"], table="IDF", config_name="config.json"),
        "router-static": make_router(
            root / "static", lms["bert"], activation="log1p_relu", max_seq_length=20, prompts=prompts
        ),
        "router-root": make_router(root / "rooted", lms["bert"], transformer="", prompts={"document": "text: "}),
        "router-roberta": make_router(root / "router-roberta", lms["roberta"]),
        "card-lengths": _with(
            make_splade_card(root / "lengths"),
            "sentence_bert_config.json",
            {"transformer_task": "fill-mask", "query_length": 5, "document_length": 20},
        ),
        "card-arguments": _with(
            make_splade_card(root / "arguments"),
            "sentence_bert_config.json",
            {
                "tokenizer_args": {"model_max_length": 17},
                "model_args": {},
                "processing_kwargs": {"text": {"max_length": 9}},
            },
        ),
        # The class in tokenizer_config.json goes over the normalizer in tokenizer.json.
        "router-cased": _with(
            make_router(root / "cased", lms["bert"]),
            "query_0_SparseStaticEmbedding/tokenizer_config.json",
            {"tokenizer_class": "BertTokenizer", "do_lower_case": False, "model_max_length": 8},
        ),
        "router-saved": _save_router(root / "router-saved", lms["distilbert"]),
        "plain-bert": lms["bert"],
        "plain-new": make_new(root / "new", lms["gte"]),
    }
    references = {name: folder for name, folder in ours.items()}
    references["plain-new"] = lms["gte"]
    for name, masked_lm, packed in (("", lms["gte"], True), ("-typed", typed, True), ("-unpacked", lms["gte"], False)):
        new = make_new(root / f"new{name}-lm", masked_lm, packed=packed)
        ours[f"router-new{name}"] = make_router(root / f"router-new{name}", new, activation="log1p_relu")
        references[f"router-new{name}"] = make_router(root / f"as-gte{name}", masked_lm, activation="log1p_relu")
    for name in ("router-idf", "router-idf-config.json"):
        references[name] = _renamed(ours[name], root / f"renamed-{name}")
    return {name: Twin(str(ours[name]), str(references[name]), FAMILY[TWINS[name]]) for name in TWINS}


def _with(folder: Path, name: str, values: dict[str, Any]) -> Path:
    """The checkpoint with other values in one of its files."""
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return folder


def _renamed(router: Path, to: Path) -> Path:
    """The same router where the query side is called as the newest release calls it."""
    shutil.copytree(router, to)
    (to / "query_0_IDF").rename(to / "query_0_SparseStaticEmbedding")
    config = next(path for path in (to / "router_config.json", to / "config.json") if path.exists())
    text = config.read_text().replace("models.IDF", "models.SparseStaticEmbedding")
    config.write_text(text.replace("query_0_IDF", "query_0_SparseStaticEmbedding"))
    return to


def _save_router(folder: Path, masked_lm: Path) -> Path:
    """What the newest release itself saves."""
    import torch
    from sentence_transformers import SparseEncoder
    from sentence_transformers.base.modules import Router, Transformer
    from sentence_transformers.sparse_encoder.modules import SparseStaticEmbedding, SpladePooling

    transformer = Transformer(str(masked_lm), transformer_task="fill-mask", max_seq_length=40)
    weights = torch.rand(transformer.model.config.vocab_size) + 0.5
    router = Router.for_query_document(
        [SparseStaticEmbedding(transformer.tokenizer, weights)], [transformer, SpladePooling("max")]
    )
    SparseEncoder(modules=[router], prompts={"query": "the ", "document": ""}, device="cpu").save_pretrained(
        str(folder)
    )
    return folder


encoder_of = functools.cache(build_encoder)


@functools.cache
def reference_of(folder: str) -> Any:
    from sentence_transformers import SparseEncoder

    return SparseEncoder(folder, device="cpu")


def dense(encoded: Any, size: int) -> np.ndarray:
    rows = np.zeros((len(encoded.indptr) - 1, size), dtype=np.float32)
    for row, (start, end) in enumerate(zip(encoded.indptr[:-1], encoded.indptr[1:], strict=True)):
        rows[row, encoded.token_ids[start:end]] = encoded.weights[start:end]
    return rows


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    """Within 1e-4, and the same terms above 1e-4 (at the border a term may be on either side of it)."""
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)
    border = np.abs(expected - 1e-4) < 2e-5
    assert np.array_equal((found > 1e-4) & ~border, (expected > 1e-4) & ~border)


@pytest.mark.parametrize("name", TWINS)
def test_documents_weigh_what_the_library_gives(made: dict[str, Twin], name: str) -> None:
    twin = made[name]
    assert read_checkpoint(twin.model).family == twin.family
    expected = reference_of(twin.reference).encode_document(list(DOCUMENTS), convert_to_sparse_tensor=False).numpy()
    encoder = encoder_of(twin.model)
    assert_same(dense(encoder.encode(DOCUMENTS), expected.shape[1]), expected)
    alone = np.concatenate([dense(encoder.encode([text]), expected.shape[1]) for text in DOCUMENTS])
    assert_same(alone, expected)
    assert np.count_nonzero(expected) > 10 * len(DOCUMENTS)


@pytest.mark.parametrize("name", TWINS)
def test_queries_weigh_what_the_library_gives(made: dict[str, Twin], name: str) -> None:
    twin = made[name]
    encoder = query_encoder(ModelSettings(document=twin.model))
    assert isinstance(read_checkpoint(twin.model).query, WeightTableSide) == (TWINS[name] == "router")
    expected = reference_of(twin.reference).encode_query(list(QUERIES), convert_to_sparse_tensor=False).numpy()
    ids = {token: place for place, token in enumerate(encoder_of(twin.model).vocabulary)}
    assert_same(as_rows(encoder.encode(QUERIES), ids, expected.shape[1]), expected)
    alone = [encoder.encode([query])[0] for query in QUERIES]
    assert_same(as_rows(alone, ids, expected.shape[1]), expected)


def test_a_table_keeps_as_many_tokens_as_its_checkpoint_declares(made: dict[str, Twin], tmp_path: Path) -> None:
    """The same for documents is `[encode] top_k`, which the checkpoint fills (test_documents.py)."""
    folder = Path(shutil.copytree(made["router-static"].model, tmp_path / "top"))
    _with(folder, "config_sentence_transformers.json", {"max_active_dims": 2})
    expected = reference_of(str(folder)).encode_query(list(QUERIES), convert_to_sparse_tensor=False).numpy()
    found = query_encoder(ModelSettings(document=str(folder))).encode(QUERIES)
    ids = {token: place for place, token in enumerate(encoder_of(str(folder)).vocabulary)}
    assert max(map(len, found)) == 2
    assert_same(as_rows(found, ids, expected.shape[1]), expected)


def test_a_typed_padding_token_weighs_what_it_weighs_alone(made: dict[str, Twin]) -> None:
    """In the library a longer text in the same batch takes its weight away, since padding is written over it."""
    twin = made["router-saved"]
    texts = ["[PAD] stone", "the river and the stone"]
    reference, encoder = reference_of(twin.reference), query_encoder(ModelSettings(document=twin.model))
    ids = {token: place for place, token in enumerate(encoder_of(twin.model).vocabulary)}
    alone = reference.encode_query(texts[:1], convert_to_sparse_tensor=False).numpy()
    together = reference.encode_query(texts, convert_to_sparse_tensor=False).numpy()
    assert alone[0, ids["[PAD]"]] > 0 and not together[0, ids["[PAD]"]]
    assert_same(as_rows(encoder.encode(texts)[:1], ids, alone.shape[1]), alone)


def as_rows(queries: Sequence[dict[str, float]], ids: dict[str | None, int], size: int) -> np.ndarray:
    rows = np.zeros((len(queries), size), dtype=np.float32)
    for row, weights in enumerate(queries):
        for token, weight in weights.items():
            rows[row, ids[token]] = weight
    return rows


def test_a_document_and_a_query_checkpoint_each_keep_their_own_files(tmp_path: Path) -> None:
    """The pair of naver: two plain folders, named in one pipeline, with tokenizers and lengths of their own."""
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
    """Nothing in such a folder says `log1p_relu`, which the third generation has: its pipeline file does."""
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


def test_prompts_are_looked_for_under_the_names_that_the_library_knows(tmp_path: Path) -> None:
    """A prompt called "passage", and a default prompt, stand before nothing."""
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
def test_bert_uncased_as_a_query_side_gives_the_librarys_weights() -> None:
    """The table alone as `query`, against the module that sentence-transformers makes of it, but for special tokens."""
    from sentence_transformers.sparse_encoder.modules import SparseStaticEmbedding
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(IDF_ALONE / "tokenizer.json"), pad_token="[PAD]")
    module = SparseStaticEmbedding.from_json(str(IDF_ALONE / "idf.json"), tokenizer)
    texts = [text for text in QUERIES if text and text not in SPECIAL]
    expected = module(module.preprocess(texts))["sentence_embedding"].detach().numpy()
    # A character that the vocabulary lacks is [UNK], which weighs nothing here and something there.
    expected[:, tokenizer.convert_tokens_to_ids(["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"])] = 0
    found = query_encoder(ModelSettings(document=PACKAGED, query=str(IDF_ALONE))).encode(texts)
    assert_same(as_rows(found, tokenizer.get_vocab(), expected.shape[1]), expected)
