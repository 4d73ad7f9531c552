"""BGE-M3's lexical weights and sparse autoencoders, compared with their libraries' formulas."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.checkpoints import POSITIONS, build_encoder
from support.families import DOCUMENTS, assert_same, changed, dense, reference_of
from support.without_projection import UNIGRAM, bge_m3_weights, make_autoencoder, make_bge_m3, write_linear

from sparse_ingest import SparseEncoder
from sparse_ingest.checkpoints.layouts import read_checkpoint
from sparse_ingest.errors import CheckpointError, UsageError
from sparse_ingest.models.linear import has_avx2, has_vnni
from sparse_ingest.models.precision import faster_dtypes
from sparse_ingest.models.vectors import NO_RULES

QUERIES = ("river stone", "Searching the the Bird!", "日本 überé Ωmega", "water " * 100, "<mask> of </s> <unk> river")
SAME = (*DOCUMENTS, *QUERIES, "<s> the <mask> river </s> <pad> stone")


def rows_of(model: str | Path, side: str = "document", **options: Any) -> np.ndarray:
    encoder = SparseEncoder(str(model), device="cpu", **options)
    vectors = encoder.encode_document(SAME) if side == "document" else encoder.encode_query(SAME)
    return vectors.to_scipy().toarray()


@pytest.fixture(scope="module")
def bge_m3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bge_m3(tmp_path_factory.mktemp("m3") / "bge-m3")


@pytest.mark.parametrize("side", ["document", "query"])
def test_lexical_weights_match_the_formula_of_flag_embedding(bge_m3: Path, side: str) -> None:
    expected = bge_m3_weights(bge_m3, SAME, POSITIONS)
    assert_same(rows_of(bge_m3, side), expected)
    assert np.count_nonzero(expected) > 3 * len(SAME)


def test_lexical_weights_are_read_from_safetensors_too(bge_m3: Path, tmp_path: Path) -> None:
    import torch

    folder = shutil.copytree(bge_m3, tmp_path / "converted")
    write_linear(folder / "sparse_linear.safetensors", torch.load(folder / "sparse_linear.pt", weights_only=True))
    (folder / "sparse_linear.pt").unlink()
    assert read_checkpoint(str(folder)).sha256 != read_checkpoint(str(bge_m3)).sha256
    assert np.array_equal(rows_of(folder), rows_of(bge_m3))


def test_a_text_of_8192_tokens_is_read_to_its_end(tmp_path: Path) -> None:
    folder = make_bge_m3(tmp_path / "long", positions=8192)
    encoder = SparseEncoder(str(folder), device="cpu")
    text = "river " * 8189
    found = encoder.encode_document([f"{text} stone", f"{text} river stone"])
    assert "▁stone" in found[0] and "▁stone" not in found[1]
    assert_same(found[:1].to_scipy().toarray(), bge_m3_weights(folder, [f"{text} stone"], 8192))


def test_windows_keep_the_largest_weight_of_each_token(bge_m3: Path) -> None:
    encoder = build_encoder(bge_m3, max_length=8, window_stride=6)
    texts = ["the river and the stone of sparse cloud and fire", "water"]
    windows = [["the river and the stone of", "sparse cloud and fire"], ["water"]]
    found = dense(encoder.encode_windows(encoder.cut(texts)), len(UNIGRAM))
    for row, parts in zip(found, windows, strict=True):
        assert_same(row, bge_m3_weights(bge_m3, parts, 8).max(0))


@pytest.mark.parametrize("model", ["bge-m3", "autoencoder"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_keeps_the_terms(bge_m3: Path, autoencoder: Path, model: str, dtype: str) -> None:
    folder = bge_m3 if model == "bge-m3" else autoencoder
    expected, found = rows_of(folder), rows_of(folder, dtype=dtype)
    assert not np.array_equal(found, expected)
    # Of an autoencoder another feature may be the last one that is kept.
    common = (found > 0) & (expected > 0)
    assert expected[common].sum() > 0.95 * expected.sum()
    assert np.abs(found - expected)[common].max() < 0.1 * expected.max()


@pytest.mark.skipif(not has_vnni(), reason="without VNNI int8 is refused for another reason")
def test_int8_is_refused_without_a_projection(bge_m3: Path, autoencoder: Path) -> None:
    for folder, kind in ((bge_m3, "lexical model"), (autoencoder, "autoencoder")):
        with pytest.raises(UsageError, match=f"int8 is for models with a vocabulary projection.* {kind} "):
            rows_of(folder, dtype="int8")


def test_int8_is_not_tried_without_a_projection() -> None:
    assert all("int8" not in dtype for dtype in faster_dtypes("cpu", projects=False))


@pytest.mark.skipif(not has_avx2(), reason="this CPU has no AVX2")
def test_linear_layers_compute_in_int16_without_a_projection(bge_m3: Path, autoencoder: Path) -> None:
    for folder in (bge_m3, autoencoder):
        expected, found = rows_of(folder), rows_of(folder, dtype="int16")
        assert not np.array_equal(found, expected)
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-3 * expected.max())


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_autoencoder(tmp_path_factory.mktemp("csr") / "csr")


def test_features_are_named_by_their_numbers(autoencoder: Path) -> None:
    encoder = SparseEncoder(str(autoencoder), device="cpu")
    vectors = encoder.encode_document(["the river", "stone"])
    assert vectors.vocabulary == [str(number) for number in range(96)]
    assert np.diff(vectors.indptr).max() <= 20
    query = encoder.encode_query("the river")
    assert query == pytest.approx(vectors[0], abs=1e-4) and len(encoder.encode_query("river", max_active_dims=3)) == 3
    expected = reference_of(str(autoencoder)).encode_document(["the river", "stone"], convert_to_sparse_tensor=False)
    np.testing.assert_allclose(encoder.similarity([query], vectors), expected[:1] @ expected.T, atol=1e-4)


def test_max_active_dims_of_the_library_replaces_k(autoencoder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(autoencoder, tmp_path / "more")
    changed(folder, "config_sentence_transformers.json", {"max_active_dims": 30})
    expected = reference_of(str(folder)).encode_document(list(DOCUMENTS), convert_to_sparse_tensor=False).numpy()
    assert np.count_nonzero(expected, axis=1).max() > 20
    assert_same(dense(build_encoder(folder).encode(DOCUMENTS), 96), expected)


class Code:
    """Runs a function when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("executed"),)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"weight": (1, 31), "bias": (1,)}, r"_linear.pt has weight \[1, 31\], bias \[1\]; expected weight \[1, 32\]"),
        ({"own.weight": (1, 32), "bias": (1,)}, r"has own.weight \[1, 32\], bias \[1\]; expected weight \[1, 32\]"),
        ({"weight": (1, 32)}, r"expected bias \[1\]"),
        ({}, "sparse_linear.pt has no weights; expected weight"),
    ],
)  # fmt: skip
def test_other_weights_of_the_lexical_output_are_refused(
    bge_m3: Path, tmp_path: Path, tensors: dict[str, tuple[int, ...]], message: str
) -> None:
    import torch

    folder = shutil.copytree(bge_m3, tmp_path / "own")
    write_linear(folder / "sparse_linear.pt", {name: torch.ones(shape) for name, shape in tensors.items()})
    with pytest.raises(CheckpointError, match=message):
        rows_of(folder)


def test_damaged_weights_of_the_lexical_output_are_refused(
    bge_m3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(bge_m3, tmp_path / "own")
    path = folder / "sparse_linear.pt"
    path.write_bytes(path.read_bytes()[:400])
    with pytest.raises(CheckpointError, match=r"sparse_linear.pt cannot be read"):
        rows_of(folder)
    write_linear(path, {"weight": torch.full((1, 32), np.inf), "bias": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"sparse_linear.pt: numbers of 'weight' are not finite"):
        rows_of(folder)
    torch.save({"weight": Code()}, path)
    with pytest.raises(CheckpointError, match=r"sparse_linear.pt was not read: .* could run code"):
        rows_of(folder)
    assert not (tmp_path / "executed").exists()
    path.unlink()
    with pytest.raises(CheckpointError, match=r"config.json with sparse_linear.safetensors or sparse_linear.pt"):
        rows_of(folder)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("1_Pooling/config.json", {"pooling_mode": "median"}, "pooling_mode = 'median'; expected cls, max, mean"),
        ("1_Pooling/config.json", {"include_prompt": False}, "include_prompt = false, which is not supported"),
        ("2_SparseAutoEncoder/config.json", {"k": 97}, "has 96 features, and 97 of them"),
        ("2_SparseAutoEncoder/config.json", {"hidden_dim": "many"}, "Expected `int`, got `str`"),
        ("2_SparseAutoEncoder/config.json", {"hidden_dim": 64}, r"expected latent_bias \[64\]"),
        ("sentence_bert_config.json", {"transformer_task": "fill-mask"}, 'expected "feature-extraction"'),
        ("modules.json", {"type": "sentence_transformers.models.LSTM"}, "expected Transformer, Pooling, then any"),
    ],
)  # fmt: skip
def test_other_autoencoders_are_refused(
    autoencoder: Path, tmp_path: Path, name: str, values: dict[str, Any], message: str
) -> None:
    folder = shutil.copytree(autoencoder, tmp_path / "own")
    path = folder / name
    content = json.loads(path.read_text())
    if name == "modules.json":
        content.insert(2, {"idx": 1, "name": "x", "path": "x", **values})
    else:
        content |= {"max_active_dims": None, **values}
    path.write_text(json.dumps(content))
    changed(folder, "config_sentence_transformers.json", {"max_active_dims": None})
    with pytest.raises(CheckpointError, match=message):
        rows_of(folder)


@pytest.fixture(scope="module")
def with_dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from sentence_transformers.base.modules import Dense

    return make_autoencoder(tmp_path_factory.mktemp("dense") / "csr", layers=[lambda width: Dense(width, 24)])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"activation_function": "my.package.Tanh"}, "activation_function = 'my.package.Tanh'"),
        (
            {"activation_function": "torch.nn.modules.module.Module"},
            "activation_function = 'torch.nn.modules.module.Module'",
        ),
        ({"use_residual": True}, "use_residual = True"),
        ({"module_input_name": "token_embeddings"}, "module_input_name = 'token_embeddings'"),
        ({"out_features": 25}, r"expected linear.weight \[25, 32\]"),
    ],
)
def test_other_dense_layers_are_refused(with_dense: Path, tmp_path: Path, values: dict[str, Any], message: str) -> None:
    folder = shutil.copytree(with_dense, tmp_path / "own")
    changed(folder, "2_Dense/config.json", values)
    with pytest.raises(CheckpointError, match=message):
        rows_of(folder)


def test_settings_that_an_output_lacks_are_refused(bge_m3: Path, autoencoder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"\(lexical model\) has activation 'relu'; expected none"):
        build_encoder(bge_m3, activation="relu")
    with pytest.raises(CheckpointError, match=r"\(autoencoder\) has pooling 'max'; expected no value"):
        build_encoder(autoencoder, pooling="max")
    with pytest.raises(CheckpointError, match=r"\(autoencoder\) has weights of special tokens 'zero'; expected keep"):
        build_encoder(autoencoder, query_special_tokens="zero")


@pytest.mark.parametrize("model", ["bge-m3", "autoencoder"])
def test_the_path_of_a_gpu_gives_the_same_vectors(bge_m3: Path, autoencoder: Path, model: str) -> None:
    """The next batch starts before the previous one is read, and the device compacts the rows; here on a CPU."""
    encoder = build_encoder(bge_m3 if model == "bge-m3" else autoencoder)
    token_ids = [window.token_ids for window in encoder.tokenize([text for text in SAME if text])]
    batches = [np.arange(0, 5), np.arange(5, len(token_ids))]
    maker = encoder.maker
    for found, expected in zip(
        maker.ahead(token_ids, batches, NO_RULES), maker.on_workers(token_ids, batches, NO_RULES), strict=True
    ):
        assert found[1] == expected[1] == 0
        for (ids, weights), (other_ids, other_weights) in zip(found[0], expected[0], strict=True):
            assert np.array_equal(ids, other_ids) and np.array_equal(weights, other_weights)
