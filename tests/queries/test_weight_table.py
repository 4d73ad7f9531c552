"""Weight tables of queries: a tiny tokenizer created here, and OpenSearch's published table if installed."""

from __future__ import annotations

import json
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from support.tables import TOKENS, WEIGHTS, write_table
from tokenizers import Tokenizer

from sparse_ingest.checkpoints.sides import WeightTableSide
from sparse_ingest.errors import CheckpointError
from sparse_ingest.models.query_encoders import query_encoder
from sparse_ingest.pipeline import ModelSettings, QuerySettings
from sparse_ingest.queries.weight_table import WeightTable, as_query_weights, prune_query, read_vector

BERT = Path(__file__).parents[2].parent / "shared" / "data" / "bert-uncased"
needs_bert = pytest.mark.skipif(not BERT.is_dir(), reason="shared/data/bert-uncased is not there")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("table")
    write_table(folder)
    return folder


def table(folder: Path, weights: str | Path = "idf.json", *, max_active_dims: int | None = None, **settings):
    asked = {"query_special_tokens": "zero", "missing_idf_weight": 0.0, **settings}
    side = WeightTableSide(folder, folder / weights, {})
    return WeightTable(side, ModelSettings(**asked), max_active_dims=max_active_dims)


def weights_of(text: str, folder: Path, *given, **settings) -> dict[str, float]:
    return table(folder, *given, **settings).encode([text])[0]


def float32(value: float) -> float:
    return struct.unpack("<f", struct.pack("<f", value))[0]


def test_each_distinct_token_gets_its_table_weight_heaviest_first(folder: Path) -> None:
    weights = weights_of("an exception an EXCEPTION catch an", folder)
    assert list(weights.items()) == [("except", 4.75), ("##ion", 2.5), ("catch", 2.5), ("an", float32(0.1))]


def test_a_missing_token_is_omitted_or_gets_missing_idf_weight(folder: Path) -> None:
    assert weights_of("river catch", folder) == {"catch": 2.5}
    assert weights_of("river catch", folder, missing_idf_weight=1.0) == {"catch": 2.5, "river": 1.0}


def test_a_token_of_weight_zero_is_omitted(folder: Path) -> None:
    assert weights_of("stone catch", folder, missing_idf_weight=1.0) == {"catch": 2.5}


def test_special_and_unknown_tokens_have_no_weight_unless_in_the_table(folder: Path) -> None:
    text = "[CLS] zebra catch [SEP]"
    assert weights_of(text, folder, missing_idf_weight=1.0) == {"catch": 2.5}
    assert weights_of(text, folder, query_special_tokens="keep") == {"catch": 2.5, "[CLS]": 1.0, "[UNK]": 1.0}


def test_truncation_and_padding_in_tokenizer_json_are_ignored(folder: Path) -> None:
    assert set(weights_of("river an exception catch", folder, missing_idf_weight=1.0)) == {
        "river", "an", "except", "##ion", "catch",
    }  # fmt: skip


def test_a_text_is_truncated_at_max_length_without_special_tokens(folder: Path) -> None:
    assert list(weights_of("catch an exception", folder, max_length=2)) == ["catch", "an"]


def test_max_active_dims_of_a_checkpoint_limits_tokens(folder: Path) -> None:
    assert list(weights_of("catch an exception", folder, max_active_dims=2)) == ["except", "##ion"]


def test_lowercasing_and_the_prompt_are_applied_before_the_tokenizer(folder: Path, tmp_path: Path) -> None:
    write_table(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**content, "normalizer": None}))
    assert weights_of("CATCH", tmp_path) == {}
    assert weights_of("CATCH", tmp_path, lower_case=True) == {"catch": 2.5}
    assert weights_of("exception", folder, query_prompt="catch ") == {"except": 4.75, "##ion": 2.5, "catch": 2.5}


def test_texts_keep_their_order_and_an_empty_text_gives_an_empty_dict(folder: Path) -> None:
    assert table(folder).encode(["", "catch", " \n"]) == [{}, {"catch": 2.5}, {}]


def test_a_jsonl_table_gives_the_same_weights(folder: Path, tmp_path: Path) -> None:
    write_table(tmp_path)
    (tmp_path / "idf.json").unlink()
    lines = "".join(f"{token}\t{weight}\n" for token, weight in WEIGHTS.items())
    (tmp_path / "query_token_weights.txt").write_text(lines)
    text = "an exception catch stone river"
    assert weights_of(text, tmp_path, "query_token_weights.txt") == weights_of(text, folder)


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.float16])
def test_a_tensor_gives_the_same_weights_as_the_table(folder: Path, tmp_path: Path, kind: type) -> None:
    write_table(tmp_path)
    # The reader must skip the tensors before the vector.
    by_id = np.array([WEIGHTS.get(token, 0.0) for token in TOKENS], dtype=kind)
    save_file({"before": np.arange(5), "weight": by_id}, tmp_path / "model.safetensors")
    found = weights_of("an exception catch stone river", tmp_path, "model.safetensors")
    assert found == pytest.approx(weights_of("an exception catch stone river", folder), rel=1e-3)
    assert found["except"] == 4.75


def test_a_bfloat16_tensor_is_read_exactly(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file as save_torch

    numbers = torch.tensor([0.1, -3.0, 6.9375, 1e-30]).bfloat16()
    save_torch({"weight": numbers}, tmp_path / "model.safetensors")
    assert read_vector(tmp_path / "model.safetensors", "weight") == numbers.float().tolist()


def by_recipe(text: str, weights: dict[str, float], tokenizer: Tokenizer) -> dict[str, float]:
    """Weigh a text as a service in another language does: look up each distinct token."""
    tokens = set(tokenizer.encode(text, add_special_tokens=False).tokens)
    return {token: weights[token] for token in tokens if token in weights}


@pytest.mark.parametrize("settings", [{}, {"missing_idf_weight": 1.0}, {"query_special_tokens": "keep"}])
def test_the_exported_table_and_the_tokenizer_give_the_same_weights(folder: Path, settings) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    encoder = table(folder, **settings)
    for text in ("catch an exception", "river river [CLS] zebra", "STONE [UNK] catch" * 5, ""):
        assert by_recipe(text, encoder.table(), tokenizer) == encoder.encode([text])[0]
    assert encoder.reading() == "nothing cut, no special tokens added"


def test_the_export_names_the_preprocessing_of_queries(folder: Path) -> None:
    encoder = table(folder, max_active_dims=8, query_prompt="q: ", max_length=5, lower_case=True)
    assert encoder.reading() == (
        "the prompt 'q: ' before it, lower-cased, cut after 5 tokens, no special tokens added, "
        "only the 8 heaviest tokens kept"
    )


@needs_bert
def test_the_exported_table_of_bert_uncased_gives_query_weights() -> None:
    tokenizer = Tokenizer.from_file(str(BERT / "tokenizer.json"))
    tokenizer.no_truncation()
    encoder = query_encoder(ModelSettings(document=str(BERT)))
    assert isinstance(encoder, WeightTable)
    weights = encoder.table()
    for text in ("how does bread rise", "[CLS] caf\u00e9 \u65e5\u672c \U0001f600 don't", "x" * 300, "word " * 900):
        assert by_recipe(text, weights, tokenizer) == encoder.encode([text])[0]


def test_negative_weights_are_omitted_and_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A trained table may have some. sentence-transformers keeps them, but an index cannot be queried with them."""
    write_table(tmp_path)
    by_id = np.array([-1.0 if token == "an" else 2.0 for token in TOKENS], dtype=np.float32)
    save_file({"weight": by_id}, tmp_path / "model.safetensors")
    assert weights_of("catch an", tmp_path, "model.safetensors") == {"catch": 2.0}
    assert "1 tokens have a weight below zero" in caplog.text


@pytest.mark.parametrize(
    "content", ["", "[1]", "{}", '{"a": "1"}', '{"a": -1}', '{"a": NaN}', '{"a": 1e39}', '{"a": true}']
)
def test_a_damaged_table_gives_one_message(folder: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "idf.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"idf\.json"):
        table(folder, tmp_path / "idf.json")


def test_a_damaged_tensor_gives_one_message(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"weight": np.zeros((2, 3), dtype=np.float32), "ids": np.arange(9)}, path)
    whole = path.read_bytes()
    for name in ("weight", "ids", "none"):
        with pytest.raises(CheckpointError, match="has no vector"):
            read_vector(path, name)
    for content in (whole[:40], b"", struct.pack("<Q", 1 << 60) + whole[8:], struct.pack("<Q", 3) + b"[1]"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="is not a safetensors file"):
            read_vector(path, "weight")
    path.write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match=f"has {len(whole) - 1} bytes, but its header declares {len(whole)}"):
        read_vector(path, "ids")
    save_file({"weight": np.array([1.0, np.nan], dtype=np.float32)}, path)
    with pytest.raises(
        CheckpointError, match="1 of 2 numbers of its tensor 'weight' are not finite in float32, the first at 1: nan"
    ):
        table(folder, path)


def test_a_missing_or_damaged_tokenizer_gives_one_message(folder: Path, tmp_path: Path) -> None:
    for content in (None, "{"):
        if content:
            (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(CheckpointError, match="cannot be read as a tokenizer"):
            table(tmp_path, folder / "idf.json")


def test_table_queries_import_neither_torch_nor_transformers_nor_numpy(folder: Path) -> None:
    """From the name of a checkpoint to the weights of a query."""
    code = (
        "import sys; from sparse_ingest.models.query_encoders import query_encoder; "
        "from sparse_ingest.pipeline import ModelSettings; "
        f"print(query_encoder(ModelSettings(document={str(folder)!r})).encode(['catch'])); "
        "print([name for name in ('torch', 'transformers', 'numpy', 'opensearchpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[{'catch': 2.5}]", "[]"]


@needs_bert
def test_bert_uncased_gives_the_published_weight_of_hello() -> None:
    assert weights_of("Hello hello", BERT) == {"hello": float32(6.937756538391113)}


@needs_bert
@pytest.mark.parametrize("kind", ["idf.json", "model.safetensors"])
def test_bert_uncased_starts_and_encodes_fast(kind: str, tmp_path: Path) -> None:
    path = BERT / "idf.json"
    if kind != "idf.json":
        path = tmp_path / kind
        save_file({"weight": np.linspace(0.1, 9, 30522, dtype=np.float32)}, path)
    tokenizer = Tokenizer.from_file(str(BERT / "tokenizer.json"))
    encoder = table(BERT, path)
    texts = ["what is the best way to catch an exception"]
    start = cpu_ratio(3, lambda: table(BERT, path), lambda: Tokenizer.from_file(str(BERT / "tokenizer.json")))
    query = cpu_ratio(200, lambda: encoder.encode(texts), lambda: tokenizer.encode_batch(texts))
    # 2.5 and 1.7 on a quiet machine.
    assert start < 8 and query < 5


def cpu_ratio(rounds: int, *calls: Callable[[], object]) -> float:
    """Return the CPU time of the first call divided by that of the second: medians of alternating calls."""
    seconds: tuple[list[float], ...] = ([], [])
    for _ in range(rounds):
        for call, taken in zip(calls, seconds, strict=True):
            started = time.process_time()
            call()
            taken.append(time.process_time() - started)
    return statistics.median(seconds[0]) / statistics.median(seconds[1])


def test_pruning_a_query_keeps_the_heaviest_tokens_and_breaks_ties_by_string() -> None:
    weights = as_query_weights([("d", 4.0), ("b", 1.0), ("a", 1.0), ("c", 2.0), ("e", 0.5)])
    assert list(prune_query(weights, QuerySettings())) == ["d", "c", "a", "b", "e"]
    assert list(prune_query(weights, QuerySettings(top_k=3))) == ["d", "c", "a"]
    assert list(prune_query(weights, QuerySettings(max_ratio=0.25))) == ["d", "c", "a", "b"]
    assert list(prune_query(weights, QuerySettings(top_k=1, max_ratio=0.5))) == ["d"]
    assert prune_query({}, QuerySettings(top_k=1, max_ratio=0.5)) == {}
