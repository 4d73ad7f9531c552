"""Document encoding: same results as sentence-transformers, for any batch and any number of workers."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from support.checkpoints import CHECKPOINTS, PACKAGED, TEXTS, build_encoder, make_masked_lm
from support.families import changed, dense
from tokenizers import Tokenizer

from sparse_ingest.checkpoints.layouts import read_checkpoint
from sparse_ingest.checkpoints.settings import resolve_pipeline
from sparse_ingest.errors import CheckpointError, PipelineError, UsageError
from sparse_ingest.models.bert import PackedBert
from sparse_ingest.models.documents import choose_device
from sparse_ingest.models.query_encoders import query_encoder
from sparse_ingest.pipeline import ModelSettings, Pipeline
from sparse_ingest.records import in_batches

# Enough documents of different lengths for several batches of 256 tokens.
MANY = [" ".join(text.split()[: 3 + place % 11]) for place in range(12) for text in TEXTS]


# Cached: only for checkpoints that no test changes.
shared_encoder = functools.cache(build_encoder)


def encoded_rows(model: str | Path, texts=TEXTS, **settings) -> np.ndarray:
    encoder = shared_encoder(model, **settings)
    return dense(encoder.encode(texts), len(encoder.vocabulary))


@pytest.fixture(scope="session")
def plain(checkpoints: dict[str, str]) -> Path:
    return Path(checkpoints["plain-bert"])


@pytest.fixture
def own(plain: Path, tmp_path: Path) -> Path:
    """A copy of the plain BERT that the test may change."""
    return Path(shutil.copytree(plain, tmp_path / "own"))


# One of each layout; tests/models/test_parity.py compares every architecture with the same library.
QUICK = ("plain-distilbert", "card-log1p_relu", "saved-roberta", PACKAGED)


@pytest.mark.parametrize(
    "name", [one if one in QUICK else pytest.param(one, marks=pytest.mark.slow) for one in CHECKPOINTS]
)
def test_vectors_match_sentence_transformers(name: str, checkpoints: dict[str, str]) -> None:
    from sentence_transformers import SparseEncoder

    model = checkpoints[name]
    reference = SparseEncoder(str(read_checkpoint(model).folder), device="cpu")
    expected = reference.encode_document(list(TEXTS), convert_to_sparse_tensor=False).numpy()
    encoder = shared_encoder(model)
    encoded = encoder.encode(TEXTS)
    found = dense(encoded, expected.shape[1])
    # A weight within the tolerance of zero may be a term in one result and absent in the other.
    differing = (found > 0) != (expected > 0)
    assert np.maximum(found, expected)[differing].max(initial=0) < 1e-5
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert all(np.diff(encoded.vectors.indptr) > 0)
    prompted = [(reference.prompts["document"] or "") + text for text in TEXTS]
    lengths = [len(ids) for ids in reference.tokenizer(prompted)["input_ids"]]
    assert encoded.truncated_of.tolist() == [length > reference.max_seq_length for length in lengths]


def test_truncated_texts_are_counted(checkpoints: dict[str, str]) -> None:
    encoder = shared_encoder(checkpoints["plain-bert"], max_length=8)
    encoded = encoder.encode(["river " * 6, "river " * 7, "", "river " * 70])
    assert (encoded.truncated_of.tolist(), encoded.tokens) == ([0, 1, 0, 1], 8 + 8 + 2 + 8)
    assert shared_encoder(PACKAGED).encode(["river " * 600]).truncated_of.tolist() == [1]


def test_a_vector_does_not_depend_on_the_rest_of_its_batch(checkpoints: dict[str, str]) -> None:
    encoder = shared_encoder(checkpoints[PACKAGED])
    size = len(encoder.vocabulary)
    together = dense(encoder.encode(TEXTS), size)
    alone = np.concatenate([dense(encoder.encode([text]), size) for text in TEXTS])
    np.testing.assert_allclose(together, alone, atol=1e-3)


@pytest.mark.parametrize("name", ["plain-distilbert", PACKAGED])
def test_any_number_of_workers_gives_the_same_bits(name: str, checkpoints: dict[str, str]) -> None:
    encoder = shared_encoder(checkpoints[name], batch_tokens=256)
    answers = []
    for workers in (1, 2, 3):
        encoder.maker.workers = workers
        answers.append(encoder.encode(MANY).vectors)
    for other in answers[1:]:
        for field in ("indptr", "token_ids", "weights"):
            assert getattr(other, field).tobytes() == getattr(answers[0], field).tobytes()


def test_every_worker_computes_on_one_thread(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum split over threads has another order on another machine."""
    import torch

    encoder, before, seen = shared_encoder(plain), torch.get_num_threads(), []
    hidden = PackedBert.hidden
    monkeypatch.setattr(PackedBert, "hidden", lambda *given: seen.append(torch.get_num_threads()) or hidden(*given))
    encoder.encode(TEXTS)
    assert set(seen) == {1} and torch.get_num_threads() == before


def test_progress_counts_every_document(plain: Path) -> None:
    heard = []
    encoded = shared_encoder(plain, batch_tokens=256).encode(MANY, lambda *counts: heard.append(counts))
    assert tuple(map(sum, zip(*heard, strict=True))) == (len(MANY), encoded.tokens)
    assert len(heard) > 2


def test_no_texts_give_no_rows(plain: Path) -> None:
    encoded = shared_encoder(plain).encode([])
    assert encoded.vectors.indptr.tolist() == [0] and not len(encoded.vectors.weights)


def test_log1p_relu_applies_the_logarithm_twice(plain: Path) -> None:
    once, twice = encoded_rows(plain), encoded_rows(plain, activation="log1p_relu")
    np.testing.assert_allclose(np.log1p(once), twice, rtol=1e-6)


def test_special_tokens_can_be_zeroed(plain: Path) -> None:
    kept, zeroed = encoded_rows(plain), encoded_rows(plain, document_special_tokens="zero")
    assert kept[:, :5].any() and not zeroed[:, :5].any()
    assert np.array_equal(kept[:, 5:], zeroed[:, 5:])


def test_the_prompt_is_prepended_to_every_text(plain: Path) -> None:
    prompted = encoded_rows(plain, document_prompt="the bird: ")
    assert np.array_equal(prompted, encoded_rows(plain, ["the bird: " + text for text in TEXTS]))


def test_lower_case_lowercases_texts(tmp_path: Path) -> None:
    model = make_masked_lm(tmp_path / "cased", cased=True)
    cased, lowered = encoded_rows(model), encoded_rows(model, lower_case=True)
    assert not np.array_equal(cased, lowered)
    assert np.array_equal(lowered, encoded_rows(model, [text.lower() for text in TEXTS]))


def test_a_text_without_any_token_gets_an_empty_row(own: Path) -> None:
    tokenizer = Tokenizer.from_file(str(own / "tokenizer.json"))
    content = json.loads(tokenizer.to_str())
    (own / "tokenizer.json").write_text(json.dumps({**content, "post_processor": None}))
    encoder = build_encoder(own)
    for texts in (["", "river stone", ""], [""]):
        lengths = np.diff(encoder.encode(texts).vectors.indptr)
        assert [length > 0 for length in lengths] == [bool(text) for text in texts]


def test_two_ids_with_the_same_string_are_refused(plain: Path) -> None:
    from sparse_ingest.models.tokenizer import Tokenizer as OurTokenizer

    class Repeating:
        """A tokenizer in which two ids share one string, as a byte fallback and a word may."""

        def id_to_token(self, token_id: int) -> str:
            return "again" if token_id in (4, 9) else str(token_id)

    tokenizer = OurTokenizer(plain, ModelSettings(max_length=64))
    tokenizer._tokenizer = Repeating()
    with pytest.raises(CheckpointError, match=r"'again' to two ids, 4 and 9"):
        tokenizer.vocabulary(12)


def test_weights_of_ids_without_a_token_are_omitted_and_counted(own: Path) -> None:
    whole = build_encoder(own)
    rows = dense(whole.encode(TEXTS), len(whole.vocabulary))
    content = json.loads((own / "tokenizer.json").read_text())
    place = content["model"]["vocab"].pop("lamp")
    (own / "tokenizer.json").write_text(json.dumps(content))
    encoder = build_encoder(own)
    assert encoder.vocabulary[place] is None and whole.vocabulary[place] == "lamp"
    encoded = encoder.encode(TEXTS)
    found = dense(encoded, len(whole.vocabulary))
    assert encoded.without_token == np.count_nonzero(rows[:, place]) > 0
    assert not found[:, place].any()
    rows[:, place] = 0
    assert np.array_equal(found, rows)


def test_a_masked_lm_without_its_head_is_refused(own: Path) -> None:
    weights = load_file(own / "model.safetensors")
    head = [name for name in weights if name.startswith("cls.predictions.")]
    assert head
    save_file({k: v for k, v in weights.items() if k not in head}, own / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks \d+ of the weights .* cls\.predictions"):
        build_encoder(own)


def test_weights_of_another_shape_are_refused(own: Path) -> None:
    changed(own, "config.json", {"intermediate_size": 48})
    with pytest.raises(CheckpointError, match=r"in another shape, such as bert\.\S+ \(\[64\] for \[48\]\)"):
        build_encoder(own)


def test_a_damaged_weight_file_is_refused(own: Path) -> None:
    content = (own / "model.safetensors").read_bytes()
    (own / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="or is damaged"):
        build_encoder(own)


def test_a_checkpoint_without_a_tokenizer_is_refused(own: Path) -> None:
    """transformers would create one in which every word is unknown."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (own / name).unlink()
        with pytest.raises(CheckpointError, match="has no tokenizer: looked for tokenizer.json, vocab.txt"):
            build_encoder(own)


def test_a_max_length_without_room_for_text_is_refused(plain: Path) -> None:
    for length in (1, 2):
        with pytest.raises(PipelineError, match=f"max_length = {length}, but every text gets 2 special tokens"):
            build_encoder(plain, max_length=length)
    assert build_encoder(plain, max_length=3).encode(["river stone"]).truncated_of.tolist() == [1]


def test_the_max_length_of_roberta_follows_its_position_table(tmp_path: Path) -> None:
    model = make_masked_lm(tmp_path / "roberta", "roberta")
    encoded = build_encoder(model).encode(["river " * 100])
    assert (encoded.tokens, encoded.truncated_of.tolist()) == (64, [1])


def test_a_missing_gpu_is_reported() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert choose_device("auto") == "cpu"
    with pytest.raises(UsageError, match="torch sees 0 GPUs"):
        choose_device("cuda:1")


def test_queries_use_their_own_prompt(checkpoints: dict[str, str]) -> None:
    from sentence_transformers import SparseEncoder

    model = checkpoints["saved-bert"]
    queries = ["river stone", "", "Searching"]
    reference = SparseEncoder(model, device="cpu")
    expected = reference.encode_query(queries, convert_to_sparse_tensor=False).numpy()
    vocabulary = {token: place for place, token in enumerate(build_encoder(model).vocabulary)}
    for row, weights in zip(expected, query_encoder(ModelSettings(document=model)).encode(queries), strict=True):
        assert {vocabulary[token] for token in weights} == set(np.flatnonzero(row > 0).tolist())
        assert all(abs(row[vocabulary[token]] - weight) < 1e-4 for token, weight in weights.items())
        assert list(weights.values()) == sorted(weights.values(), reverse=True)


def test_max_active_dims_of_a_checkpoint_is_applied(checkpoints: dict[str, str], tmp_path: Path) -> None:
    """As in sentence-transformers: `max_active_dims` in its config file limits documents and queries."""
    from sentence_transformers import SparseEncoder

    folder = Path(shutil.copytree(checkpoints["saved-bert"], tmp_path / "saved"))
    changed(folder, "config_sentence_transformers.json", {"max_active_dims": 7})
    pipeline = resolve_pipeline(Pipeline(), read_checkpoint(str(folder)))
    theirs = SparseEncoder(str(folder), device="cpu")
    assert pipeline.encode.top_k == theirs.max_active_dims == 7
    [weights] = query_encoder(ModelSettings(document=str(folder))).encode([TEXTS[-1]])
    expected = theirs.encode_query(TEXTS[-1]).to_dense()
    assert len(weights) == 7
    assert sorted(weights.values()) == pytest.approx(sorted(expected[expected > 0].tolist()), abs=1e-4)


@pytest.mark.parametrize("device", ["foo", "mps", "cuda:0,cuda:1", "cuda:", "cpu:1", ""])
def test_an_unknown_device_is_reported(device: str) -> None:
    with pytest.raises(UsageError, match="expected auto, cpu, cuda or cuda:N"):
        choose_device(device)


def test_long_texts_are_tokenized_a_few_at_a_time() -> None:
    from sparse_ingest.models.tokenizer import Tokenizer as OurTokenizer

    tokenizer = OurTokenizer
    texts = ["x" * length for length in (5, tokenizer.CHUNK_CHARACTERS, 7, 9)] + ["y"] * (tokenizer.CHUNK_TEXTS + 1)
    chunks = list(in_batches(texts, tokenizer.CHUNK_TEXTS, tokenizer.CHUNK_CHARACTERS))
    assert [text for chunk in chunks for text in chunk] == texts
    assert all(len(chunk) <= tokenizer.CHUNK_TEXTS for chunk in chunks)
    assert all(len(chunk) == 1 or sum(map(len, chunk)) <= tokenizer.CHUNK_CHARACTERS for chunk in chunks)
