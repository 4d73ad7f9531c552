"""`inspect`: properties of a model, and warnings."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from support import checkpoints
from support.checkpoints import make_dense_lm
from support.forked import command
from support.json_page import check
from support.tables import write_table
from support.without_projection import UNIGRAM, make_autoencoder, make_bge_m3

from sparse_ingest.checkpoints.card import count_parameters, named_ranges, read_card
from sparse_ingest.checkpoints.inspect import Inspection, inspect_model
from sparse_ingest.checkpoints.sides import NO_WORDS
from sparse_ingest.errors import CheckpointError, UsageError
from sparse_ingest.models.query_encoders import query_encoder
from sparse_ingest.pipeline import ModelSettings, Pipeline

CLEAN = "package:cognition/model"
CONFIG = {
    "architectures": ["BertForMaskedLM"], "model_type": "bert", "num_hidden_layers": 2, "hidden_size": 32,
    "max_position_embeddings": 64, "vocab_size": len(checkpoints.WORDPIECE),
}  # fmt: skip
SPECIAL = {"cls_token": "[CLS]", "sep_token": {"content": "[SEP]"}, "pad_token": "[PAD]", "unk_token": "[UNK]"}
MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.sparse_encoder.models.MLMTransformer"},
    {"idx": 1, "name": "1", "path": "1_SpladePooling", "type": "sentence_transformers.models.SpladePooling"},
]
SPLADE = {
    "modules.json": MODULES,
    "sentence_bert_config.json": {"max_seq_length": 40, "do_lower_case": True},
    "1_SpladePooling/config.json": {"pooling_strategy": "max", "activation_function": "log1p_relu"},
    "config_sentence_transformers.json": {"prompts": {"query": "q: ", "document": "d: "}, "max_active_dims": 50},
}
CARD = b"---\nlicense: apache-2.0\nlanguage:\n- en\n- de\n---\n# A model\n"


def safetensors(**shapes: list[int]) -> bytes:
    """Return a safetensors file of float32 zeros."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        size = 4
        for length in shape:
            size *= length
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + bytes(at)


def make(folder: Path, tokenizer: str = "wordpiece", **files: Any) -> Path:
    """Write a plain masked LM, with `files` added, or removed if the content is None."""
    plain = {
        "config.json": CONFIG,
        "model.safetensors": safetensors(a=[3, 4], b=[5], c=[]),
        "tokenizer_config.json": {"model_max_length": 48, **SPECIAL},
    }
    for name, content in {**plain, **{name.replace("__", "/"): content for name, content in files.items()}}.items():
        if content is not None:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    if tokenizer == "wordpiece":
        checkpoints.wordpiece(cased=False).save(str(folder / "tokenizer.json"))
    elif tokenizer == "bpe":
        checkpoints.byte_level_bpe().save(str(folder / "tokenizer.json"))
    return folder


def inspect_folder(folder: Path | str, **settings: Any) -> Inspection:
    return inspect_model(ModelSettings(document=str(folder), **settings))


def has_warning(found: Inspection, message: str) -> bool:
    for warning in found.warnings:
        assert "\n" not in warning and warning.endswith(".")
    return any(message in warning for warning in found.warnings)


def test_a_symmetric_model_with_every_property(tmp_path: Path) -> None:
    found = inspect_folder(make(tmp_path, **SPLADE, **{"README.md": CARD}))
    side = found.document
    assert side is not None and found.query == type(side)(**{**asdict(side), "prompt": "q: "})
    sha256 = side.sha256
    assert asdict(side) == {
        "model": str(tmp_path), "family": "symmetric SPLADE, sentence-transformers layout", "kind": "masked LM",
        "revision": None, "sha256": sha256, "license": "apache-2.0", "languages": ["en", "de"],
        "architecture": "BertForMaskedLM", "layers": 2, "hidden_size": 32, "parameters": 18,
        "vocabulary_size": len(checkpoints.WORDPIECE), "ids_without_token": [], "tokenizer": "WordPiece",
        "activation": "log1p_relu",
        "pooling": "max", "attention": None, "max_length": 40, "positions": 64, "prompt": "d: ", "lower_case": True,
        "special_tokens": {"cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]", "pad_token": "[PAD]"},
        "special_token_weights": "keep", "missing_idf_weight": None, "max_active_dims": 50, "remote_code": None,
    }  # fmt: skip
    assert sha256 and len(sha256) == 64


def test_settings_of_the_pipeline_override_the_files(tmp_path: Path) -> None:
    found = inspect_folder(make(tmp_path, **SPLADE), max_length=12, activation="relu", query_prompt="")
    assert found.document is not None
    assert (found.document.max_length, found.document.activation, found.query.prompt) == (12, "relu", "")


def test_a_bert_uncased_model_has_no_warning() -> None:
    found = inspect_folder(CLEAN)
    assert found.warnings == [] and found.document is not None and found.document == found.query
    assert (found.document.vocabulary_size, found.document.license) == (30522, None)


def test_parameters_are_counted_as_by_the_safetensors_library(tmp_path: Path) -> None:
    from safetensors import safe_open

    from sparse_ingest.checkpoints.locate import locate

    folder, _ = locate(CLEAN)
    with safe_open(folder / "model.safetensors", framework="np") as opened:
        shapes = [opened.get_slice(name).get_shape() for name in opened.keys()]  # noqa: SIM118
    counted = 0
    for shape in shapes:
        size = 1
        for length in shape:
            size *= length
        counted += size
    assert count_parameters(folder) == counted > 4_000_000
    parts = {"model-1.safetensors": safetensors(a=[7, 3]), "model-2.safetensors": safetensors(b=[2])}
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    sharded = make(tmp_path, **parts, **{"model.safetensors": None, "model.safetensors.index.json": index})
    assert count_parameters(sharded) == 23


@pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 64, struct.pack("<Q", 2) + b"[]"])
def test_a_file_that_is_not_safetensors_is_an_error(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(CheckpointError, match="model.safetensors is not a safetensors file"):
        inspect_folder(make(tmp_path, **{"model.safetensors": content}))


def test_a_truncated_download_is_an_error(tmp_path: Path) -> None:
    content = safetensors(a=[3, 4])
    with pytest.raises(
        CheckpointError, match=f"has {len(content) - 1:,} bytes, but its header declares {len(content):,}"
    ):
        inspect_folder(make(tmp_path, **{"model.safetensors": content[:-1]}))


def test_a_weight_table_is_a_separate_query_side(tmp_path: Path) -> None:
    found = inspect_folder(make(tmp_path, **{"idf.json": {"the": 0.5}}))
    assert found.document is not None
    assert (found.document.kind, found.document.special_token_weights) == ("masked LM", "zero")
    query = found.query
    assert (query.kind, query.missing_idf_weight, query.special_token_weights) == ("weight table", 1.0, "zero")
    assert (query.parameters, query.architecture, query.activation) == (None, None, None)
    assert query.vocabulary_size == len(checkpoints.WORDPIECE)


def test_models_without_a_projection(tmp_path: Path) -> None:
    found = inspect_model(str(make_bge_m3(tmp_path / "m3")))
    side = found.document
    assert side is not None and asdict(side) == asdict(found.query)
    assert (side.kind, side.activation, side.pooling) == ("lexical model", "none", "max")
    assert (side.vocabulary_size, side.max_length) == (len(UNIGRAM), checkpoints.POSITIONS)
    assert side.special_token_weights == "cls_token, eos_token, pad_token, unk_token"
    found = inspect_model(str(make_autoencoder(tmp_path / "csr")))
    side = found.document
    assert side is not None and asdict(side) == asdict(found.query)
    assert (side.kind, side.activation, side.pooling) == ("autoencoder", "none", "mean")
    assert (side.vocabulary_size, side.max_active_dims, side.special_token_weights) == (96, 20, None)
    assert found.warnings == [NO_WORDS]
    lines = command("inspect", tmp_path / "csr").out
    assert "autoencoder, BertModel" in lines and "96 features" in lines and NO_WORDS in lines


def test_a_table_alone_has_no_document_side(tmp_path: Path) -> None:
    write_table(tmp_path)
    found = inspect_folder(tmp_path)
    assert found.document is None and found.query.kind == "weight table"
    assert command("inspect", tmp_path).out.count("weight table: no model runs for a query") == 1
    assert command("inspect", "--model", tmp_path) == command("inspect", tmp_path)
    twice = command("inspect", "--model", "other", tmp_path)
    assert (twice.code, twice.err) == (2, f"Error: The model is {str(tmp_path)!r} and --model 'other'. Give it once.\n")


def test_two_models_are_both_shown(tmp_path: Path) -> None:
    license = {"README.md": b"---\nlicense: cc-by-nc-sa-4.0\nlanguage: en\n---\n"}
    document, query = make(tmp_path / "doc", **license), make(tmp_path / "query")
    found = inspect_folder(document, query=str(query))
    assert found.document is not None
    assert (found.document.model, found.query.model) == (str(document), str(query))
    assert (found.document.license, found.query.license) == ("cc-by-nc-sa-4.0", None)
    (tmp_path / "pair.toml").write_text('[model]\ndocument = "doc"\nquery = "query"\n')
    shown = command("inspect", "--pipeline", tmp_path / "pair.toml").out
    assert "license     cc-by-nc-sa-4.0" in shown and f"query model {query}" in shown


LARGE = {"config.json": {**CONFIG, "vocab_size": 50265, "architectures": ["RobertaForMaskedLM"]}}
CODE = {
    "config.json": {
        **CONFIG, "model_type": "made-up", "architectures": ["MadeForMaskedLM"],
        "auto_map": {"AutoModelForMaskedLM": "modeling_made.MadeForMaskedLM"},
    }
}  # fmt: skip
BARE = {name: token for name, token in SPECIAL.items() if name != "pad_token"}
PICKLED = {"model.safetensors": None, "pytorch_model.bin": b"pickle"}


@pytest.mark.parametrize(
    ("tokenizer", "files", "message"),
    [
        ("wordpiece", LARGE, "has 50,265 token ids, and a sparse_vector index (SEISMIC) distinguishes 32,768"),
        ("wordpiece", {"README.md": b"---\nlicense: cc-by-nc-4.0\n---\n"}, "license cc-by-nc-4.0, which forbids"),
        ("wordpiece", CODE, "needs remote code: class MadeForMaskedLM of modeling_made.py"),
        ("bpe", LARGE, "has BPE tokens such as Ġthe that OpenSearch's analyzer bert-uncased does not give"),
        ("wordpiece", {}, "has WordPiece tokens that OpenSearch's analyzer bert-uncased"),
        ("wordpiece", {"tokenizer_config.json": BARE}, "has no padding token"),
        ("none", {"vocab.txt": b"[PAD]\nthe\nthe\n"}, "gives the token 'the' to several ids"),
        ("none", {}, "has neither tokenizer.json nor vocab.txt"),
        ("wordpiece", PICKLED, "has its weights in a pickle"),
        ("wordpiece", {"model.safetensors": None}, "has no weights as safetensors"),
        ("wordpiece", {**SPLADE, "1_SpladePooling/config.json": {"activation_function": "gelu"}}, "activation 'gelu'"),
    ],
)
def test_problems_of_later_stages_are_warnings(tmp_path: Path, tokenizer: str, files: dict, message: str) -> None:
    assert has_warning(inspect_folder(make(tmp_path / "model", tokenizer, **files)), message)


def test_ids_without_a_token_are_listed(tmp_path: Path) -> None:
    known = len(checkpoints.WORDPIECE)
    folder = make(tmp_path, **{"config.json": {**CONFIG, "vocab_size": known + 6}})
    found = inspect_folder(folder)
    assert found.document is not None
    assert found.document.ids_without_token == [(known, known + 5)]
    assert f"ids without a token: {known}-{known + 5}; their weights are omitted" in command("inspect", folder).out
    assert named_ranges([(0, 0), (7, 9), *((id_, id_) for id_ in range(20, 40, 2))]) == (
        "0, 7-9, 20, 22, 24, 26, 28, 30, and 4 more ranges"
    )


def test_32768_token_ids_give_no_seismic_warning(tmp_path: Path) -> None:
    assert not has_warning(
        inspect_folder(make(tmp_path, **{"config.json": {**CONFIG, "vocab_size": 32768}})), "SEISMIC"
    )


@pytest.mark.parametrize(
    ("card", "expected", "non_commercial"),
    [
        ("license: mit\nlanguage: en", ("mit", ["en"]), False),
        ("license: cc-by-nc-sa-4.0", ("cc-by-nc-sa-4.0", []), True),
        ("license: CC-BY-NC-4.0", ("CC-BY-NC-4.0", []), True),
        ("license: ncsa", ("ncsa", []), False),
        ("license: other\nlicense_name: acme-non-commercial", ("acme-non-commercial", []), True),
        ("license: other", ("other", []), False),
        ("language: [en, fr]", (None, ["en", "fr"]), False),
        ("license: [mit", (None, []), False),
        ("- a\n- b", (None, []), False),
    ],
)
def test_license_and_languages_are_read_from_the_card(
    tmp_path: Path, card: str, expected: tuple, non_commercial: bool
) -> None:
    (tmp_path / "README.md").write_text(f"---\n{card}\n---\n# words\n")
    found = read_card(tmp_path)
    assert (found.license, found.languages) == expected
    assert found.is_non_commercial == non_commercial


def test_a_missing_or_invalid_card_gives_nothing(tmp_path: Path) -> None:
    assert read_card(tmp_path) == (None, [])
    (tmp_path / "README.md").write_bytes(b"no front matter, and no UTF-8: \xff")
    assert read_card(tmp_path) == (None, [])


def test_the_command_prints_lines_and_json(tmp_path: Path) -> None:
    folder = make(tmp_path, **SPLADE, **{"README.md": CARD})
    shown = command("inspect", folder)
    assert (shown.code, shown.err) == (0, "")
    for line in (
        f"model       {folder}",
        "family      symmetric SPLADE, sentence-transformers layout",
        "license     apache-2.0",
        "language    en, de",
        "documents   masked LM, BertForMaskedLM, 2 layers of 32, 18 parameters",
        "activation  log1p(log1p(relu)), pooling max",
        "limit       40 tokens (position table: 64)",
        "special     cls [CLS] sep [SEP] unk [UNK] pad [PAD]; weights in vectors: kept",
        "terms       at most 50 per text",
        "prompt      'd: '",
        "queries     same as documents",
        "prompt      'q: '",
    ):
        assert f"\n{line}\n" in f"\n{shown.out}"
    assert f"\nWarning: {folder} has WordPiece tokens that" in shown.out
    printed = json.loads(command("inspect", folder, "--json").out)
    assert printed == json.loads(json.dumps(asdict(inspect_folder(folder))))
    check("inspect", printed)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "Error: No model: give MODEL or --pipeline."),
        (["no such model"], 1, "Error: No model folder 'no such model'"),
        (["--pipeline", "nope"], 2, "Error: No pipeline file 'nope'"),
        ([CLEAN, "--set", "model.revision=v1"], 1, "is a folder, which has no revision 'v1'"),
        ([CLEAN, "--set", "model.max_length=513"], 2, "has positions for 512 tokens"),
    ],
)
def test_each_error_is_one_message(arguments: list[str], code: int, message: str) -> None:
    answer = command("inspect", *arguments)
    assert (answer.code, answer.out) == (code, "")
    assert message in answer.err and answer.err.count("\n") == 1


def test_the_model_is_named_as_in_other_functions(tmp_path: Path) -> None:
    table = write_table(tmp_path / "table")
    settings = ModelSettings(query=str(table))
    assert query_encoder(Pipeline(settings)).encode(["river"]) == query_encoder(table).encode(["river"]) != [{}]
    assert inspect_model(table) == inspect_model(str(table)) == inspect_model(ModelSettings(document=str(table)))
    wrong: Any = 7
    for function in (inspect_model, query_encoder):
        with pytest.raises(UsageError, match="model is int; expected a hub id"):
            function(wrong)


def test_without_a_model_the_function_raises_a_usage_error() -> None:
    with pytest.raises(UsageError, match="No model"):
        inspect_model(ModelSettings())


def test_inspect_needs_no_torch() -> None:
    program = (
        "import sys; sys.modules['torch'] = None; "
        "from sparse_ingest.cli.main import cli; cli.main(['inspect', sys.argv[1]], standalone_mode=False); "
        "assert not {'transformers', 'safetensors', 'opensearchpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program, CLEAN], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "4,416,698 parameters" in done.stdout


def test_a_masked_lm_without_sparse_training_is_reported(tmp_path: Path) -> None:
    """`inspect` encodes a few texts, `encode` checks its first batch. Neither reports a SPLADE model."""
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"_id": "1", "text": "the river"}\n{"_id": "2", "text": "a lamp"}\n')
    dense = make_dense_lm(tmp_path / "dense", terms=3000)
    for model, reported in ((dense, True), (CLEAN, False)):
        inspected = command("inspect", model)
        encoded = command("encode", "--model", model, "--corpus", corpus, "--out", tmp_path / f"run-{reported}")
        assert (inspected.code, encoded.code) == (0, 0), inspected.err + encoded.err
        for shown in (inspected.out, encoded.err):
            assert bool(re.search(r"[23],\d\d\d terms per document", shown)) is reported
            assert ("Is this a SPLADE model?" in shown) is reported
