"""Checkpoints: found by name, recognised from their files, and refused in one sentence. Only JSON is needed here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparse_ingest.checkpoints.layouts import read_checkpoint
from sparse_ingest.checkpoints.locate import fingerprint, locate
from sparse_ingest.errors import CheckpointError

CONFIG = {"architectures": ["BertForMaskedLM"], "model_type": "bert", "max_position_embeddings": 64}
OLD = "sentence_transformers.sparse_encoder.models"


def make(folder: Path, files: dict[str, object]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return folder


def modules(*types: str, paths: tuple[str, ...] = ("", "1_SpladePooling")) -> list[dict]:
    return [{"idx": n, "name": str(n), "path": paths[n], "type": kind} for n, kind in enumerate(types)]


PLAIN = {"config.json": CONFIG, "model.safetensors": b"weights", "tokenizer_config.json": {"model_max_length": 48}}
SYMMETRIC = {
    **PLAIN,
    "modules.json": modules(f"{OLD}.MLMTransformer", f"{OLD}.SpladePooling"),
    "1_SpladePooling/config.json": {"pooling_strategy": "max", "activation_function": "log1p_relu"},
    "sentence_bert_config.json": {"max_seq_length": 40, "do_lower_case": True},
    "config_sentence_transformers.json": {"prompts": {"query": "q: ", "document": "d: "}},
}


def message_of(folder: Path | str) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(str(folder))
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".")
    return message


# Names


def test_a_folder_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "model", PLAIN)
    monkeypatch.chdir(tmp_path)
    assert locate("model") == locate(str(tmp_path / "model")) == locate("./model") == (tmp_path / "model", None)


def test_a_folder_in_a_package_is_found_without_importing_it() -> None:
    before = set(sys.modules)
    folder, revision = locate("package:cognition/model")
    assert (folder / "model.safetensors").exists() and revision is None
    assert not {name for name in set(sys.modules) - before if name.startswith("cognition")}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("package:no_such_package/model", "No installed Python package 'no_such_package'"),
        ("package:cognition/nothing", "has no folder 'nothing'"),
        ("package:", "No installed Python package"),
        ("./nothing", "No model folder './nothing'"),
        ("/nothing/here", "No model folder '/nothing/here'"),
        ("a/b/c", "No model folder 'a/b/c'"),
        ("~nobody-of-this-name/model", "No model folder"),
        ("two words", "No model folder 'two words'"),
        ("", "No model folder"),
    ],
)
def test_what_is_not_there_is_said(name: str, said: str) -> None:
    assert said in message_of(name)


def test_a_hub_id_without_a_hub_is_one_sentence(tmp_path: Path) -> None:
    """In a process of its own: the hub's library reads its environment when it is imported."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    arguments = ["encode", "--model", "nobody/nothing", "--corpus", "corpus.jsonl", "--out", "run"]
    make(tmp_path, {"corpus.jsonl": {"id": "1", "text": "one"}})
    result = subprocess.run(
        [sys.executable, "-c", "from sparse_ingest.cli.main import main; main()", *arguments],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert result.returncode == 1, result.stderr
    assert result.stderr.startswith("Error: No folder 'nobody/nothing' here, and the model cannot be fetched")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


# Families


def test_a_plain_masked_lm(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(str(make(tmp_path, PLAIN)))
    assert checkpoint.family == "masked LM, plain layout"
    assert (checkpoint.transformer, checkpoint.declared, checkpoint.revision) == (tmp_path, {}, None)


@pytest.mark.parametrize(
    "types",
    [
        (f"{OLD}.MLMTransformer", f"{OLD}.SpladePooling"),
        ("sentence_transformers.base.modules.transformer.Transformer",
         "sentence_transformers.sparse_encoder.modules.splade_pooling.SpladePooling"),
        ("sentence_transformers.models.Transformer", "sentence_transformers.a.place.of.tomorrow.SpladePooling"),
    ],
)  # fmt: skip
def test_a_symmetric_splade_by_the_last_part_of_its_types(tmp_path: Path, types: tuple[str, str]) -> None:
    checkpoint = read_checkpoint(str(make(tmp_path, {**SYMMETRIC, "modules.json": modules(*types)})))
    assert checkpoint.family == "symmetric SPLADE, sentence-transformers layout"
    assert checkpoint.transformer == tmp_path
    assert checkpoint.declared == {
        "activation": "log1p_relu", "pooling": "max", "max_length": 40, "lower_case": True,
        "document_prompt": "d: ", "query_prompt": "q: ",
    }  # fmt: skip


def test_a_symmetric_splade_whose_transformer_has_a_folder(tmp_path: Path) -> None:
    files = {"0_MLMTransformer/" + name: content for name, content in PLAIN.items()}
    types = modules(f"{OLD}.MLMTransformer", f"{OLD}.SpladePooling", paths=("0_MLMTransformer", "1_SpladePooling"))
    make(
        tmp_path, {**files, "modules.json": types, "0_MLMTransformer/sentence_bert_config.json": {"max_seq_length": 9}}
    )
    checkpoint = read_checkpoint(str(tmp_path))
    assert checkpoint.transformer == tmp_path / "0_MLMTransformer"
    assert checkpoint.declared == {"max_length": 9}


def test_modules_are_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    backwards = list(reversed(SYMMETRIC["modules.json"]))
    assert read_checkpoint(str(make(tmp_path, {**SYMMETRIC, "modules.json": backwards}))).declared["max_length"] == 40


def test_a_prompt_of_another_name(tmp_path: Path) -> None:
    prompts = {"config_sentence_transformers.json": {"prompts": {"corpus": "c: ", "passage": "p: "}}}
    assert read_checkpoint(str(make(tmp_path, {**SYMMETRIC, **prompts}))).declared["document_prompt"] == "p: "


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({**PLAIN, "modules.json": modules(f"{OLD}.Router")}, "Router with a separate query side"),
        ({**PLAIN, "modules.json": modules("sentence_transformers.models.Asym")}, "cannot build"),
        ({**PLAIN, "idf.json": {"a": 1.0}}, "'masked LM with idf.json, plain layout', which this release cannot build"),
        ({**PLAIN, "modules.json": modules("custom_st.Transformer", f"{OLD}.SpladePooling")},
         "names remote code (custom_st.Transformer), which this release does not run"),
        ({**PLAIN, "modules.json": modules(f"{OLD}.Transformer", "sentence_transformers.models.Pooling")},
         "no checkpoint of a known family"),
        ({**PLAIN, "config.json": {"architectures": ["BertModel"]}}, "no checkpoint of a known family"),
        ({**PLAIN, "config.json": {}}, "Found in the folder: config.json, model.safetensors"),
        ({}, "Found in the folder: nothing"),
        ({**PLAIN, "config.json": b"{"}, "config.json is no JSON"),
        ({**PLAIN, "config.json": b"[]"}, "config.json must hold a JSON object"),
        ({**PLAIN, "modules.json": b"\xff"}, "modules.json is no JSON"),
        ({**PLAIN, "modules.json": {}}, "modules.json must list modules"),
        ({"config.json": CONFIG}, "has no weights as safetensors"),
        ({"config.json": CONFIG, "pytorch_model.bin": b"pickle"}, "found the pickle pytorch_model.bin, which is never"),
        ({name: content for name, content in SYMMETRIC.items() if name != "config.json"}, "has no config.json"),
    ],
)  # fmt: skip
def test_what_cannot_be_built_is_named(tmp_path: Path, files: dict[str, object], said: str) -> None:
    assert said in message_of(make(tmp_path, files))


# Fingerprint


def test_the_fingerprint_follows_contents_and_names_but_not_the_folder(tmp_path: Path) -> None:
    first = fingerprint(make(tmp_path / "a", SYMMETRIC))
    assert fingerprint(make(tmp_path / "another name", SYMMETRIC)) == first
    seen = {first}
    for change in (
        {"model.safetensors": b"weighty"},
        {"tokenizer_config.json": {"model_max_length": 49}},
        {"1_SpladePooling/config.json": {}},
        {"vocab.txt": b""},
        {"model-2.safetensors": b"weights"},
    ):
        folder = tmp_path / f"changed-{len(seen)}"
        seen.add(fingerprint(make(folder, {**SYMMETRIC, **change})))
    assert len(seen) == 6


def test_the_fingerprint_leaves_out_what_is_never_read(tmp_path: Path) -> None:
    folder = make(tmp_path, PLAIN)
    before = fingerprint(folder)
    make(folder, {"README.md": b"words", "heads.pt": b"pickle", "training_args.bin": b"pickle"})
    assert fingerprint(folder) == before
