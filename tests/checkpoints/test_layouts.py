"""Checkpoint layouts: recognized from JSON files alone, and refused in one message."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparse_ingest.checkpoints.layouts import read_checkpoint, remote_code
from sparse_ingest.checkpoints.sides import WeightTableSide
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
def test_a_symmetric_splade_is_recognized_by_the_class_names_of_its_modules(
    tmp_path: Path, types: tuple[str, str]
) -> None:
    checkpoint = read_checkpoint(str(make(tmp_path, {**SYMMETRIC, "modules.json": modules(*types)})))
    assert checkpoint.family == "symmetric SPLADE, sentence-transformers layout"
    assert checkpoint.transformer == tmp_path
    assert checkpoint.declared == {
        "activation": "log1p_relu", "pooling": "max", "max_length": 40, "lower_case": True,
        "document_prompt": "d: ", "query_prompt": "q: ",
    }  # fmt: skip


def test_a_symmetric_splade_with_the_transformer_in_a_subfolder(tmp_path: Path) -> None:
    files = {"0_MLMTransformer/" + name: content for name, content in PLAIN.items()}
    types = modules(f"{OLD}.MLMTransformer", f"{OLD}.SpladePooling", paths=("0_MLMTransformer", "1_SpladePooling"))
    make(
        tmp_path,
        {
            **files,
            "modules.json": types,
            "0_MLMTransformer/sentence_bert_config.json": {"max_seq_length": 9},
            "1_SpladePooling/config.json": {},
        },
    )
    checkpoint = read_checkpoint(str(tmp_path))
    assert checkpoint.transformer == tmp_path / "0_MLMTransformer"
    assert checkpoint.declared == {"max_length": 9}


def test_modules_are_ordered_by_their_idx(tmp_path: Path) -> None:
    reversed_modules = list(reversed(SYMMETRIC["modules.json"]))
    assert (
        read_checkpoint(str(make(tmp_path, {**SYMMETRIC, "modules.json": reversed_modules}))).declared["max_length"]
        == 40
    )


def test_a_prompt_with_another_name_is_ignored(tmp_path: Path) -> None:
    """As in sentence-transformers, which tests/models/test_parity.py compares with."""
    config = {"prompts": {"corpus": "c: ", "passage": "p: "}, "default_prompt_name": "corpus"}
    checkpoint = read_checkpoint(str(make(tmp_path, {**SYMMETRIC, "config_sentence_transformers.json": config})))
    assert "document_prompt" not in checkpoint.declared


@pytest.mark.parametrize(
    ("config", "document", "query"),
    [
        ({"max_seq_length": 40, "do_lower_case": False, "architecture": "BertForMaskedLM"}, 40, 40),
        ({"max_seq_length": 40, "tokenizer_args": {"model_max_length": 30}, "model_args": {}}, 30, 30),
        ({"processor_kwargs": {"model_max_length": 30}, "query_length": 8, "document_length": None}, 30, 8),
        ({"transformer_task": "fill-mask", "document_length": 50}, 50, None),
        ({"processing_kwargs": {"text": {"max_length": 20}}, "query_length": 8}, 20, 20),
    ],
)
def test_max_length_is_read_from_the_config_of_every_release(tmp_path: Path, config: dict, document, query) -> None:
    checkpoint = read_checkpoint(str(make(tmp_path, {**SYMMETRIC, "sentence_bert_config.json": config})))
    assert (checkpoint.declared.get("max_length"), checkpoint.query.declared.get("max_length")) == (document, query)


def test_the_config_name_of_the_first_releases_is_found(tmp_path: Path) -> None:
    files = {**SYMMETRIC, "sentence_distilbert_config.json": {"max_seq_length": 33}}
    del files["sentence_bert_config.json"]
    assert read_checkpoint(str(make(tmp_path, files))).declared["max_length"] == 33


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "sentence_bert_config.json",
            {"max_seq_length": "40"},
            "Expected `int | null`, got `str` - at `$.max_seq_length`",
        ),
        ("sentence_bert_config.json", {"max_seq_length": -1}, "Expected `int` >= 1 - at `$.max_seq_length`"),
        (
            "config_sentence_transformers.json",
            {"prompts": ["q: "]},
            "Expected `object | null`, got `array` - at `$.prompts`",
        ),
        ("config_sentence_transformers.json", {"max_active_dims": 0}, "Expected `int` >= 1 - at `$.max_active_dims`"),
        ("config_sentence_transformers.json", {"max_active_dims": "10"}, "got `str` - at `$.max_active_dims`"),
        (
            "modules.json",
            [{"idx": "first", "type": f"{OLD}.SpladePooling"}],
            "Expected `int`, got `str` - at `$[0].idx`",
        ),
        ("1_SpladePooling/config.json", None, "The pooling has no settings: looked for"),
        # As saved with a tokenizer that has a chat template.
        (
            "sentence_bert_config.json",
            {"modality_config": {"text": {"method": "forward"}, "message": {"method": "forward"}}},
            "puts each text into the chat template of the tokenizer",
        ),
    ],
)
def test_invalid_settings_are_one_message(tmp_path: Path, name: str, content: object, message: str) -> None:
    files = {**SYMMETRIC, name: content}
    assert message in message_of(
        make(tmp_path, {name: content for name, content in files.items() if content is not None})
    )


def test_architectures_that_are_not_a_list_are_refused(tmp_path: Path) -> None:
    assert "not a checkpoint of a known family" in message_of(make(tmp_path, {"config.json": {"architectures": 5}}))


def test_a_masked_lm_with_idf_json(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(str(make(tmp_path, {**PLAIN, "idf.json": {"a": 1.0}})))
    assert checkpoint.family == "masked LM with idf.json, plain layout"
    assert checkpoint.declared == {"document_special_tokens": "zero", "activation": None}
    declared = {"query_special_tokens": "zero", "missing_idf_weight": 1.0}
    assert checkpoint.query == WeightTableSide(tmp_path, tmp_path / "idf.json", declared)


def test_a_table_in_lines_is_read_if_there_is_no_idf_json(tmp_path: Path) -> None:
    lines = {"query_token_weights.txt": b"a\t1.0\n"}
    assert read_checkpoint(str(make(tmp_path / "a", {**PLAIN, **lines}))).query.weights.suffix == ".txt"
    both = {**PLAIN, **lines, "idf.json": {}}
    assert read_checkpoint(str(make(tmp_path / "b", both))).query.weights.suffix == ".json"


def test_a_weight_table_alone(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(str(make(tmp_path, {"idf.json": {"a": 1.0}, "tokenizer.json": {}})))
    assert checkpoint.family == "weight table alone, no model"
    assert isinstance(checkpoint.query, WeightTableSide)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "mine", "auto_map": {"AutoModelForMaskedLM": "modeling_mine.MineForMaskedLM"}},
         "class MineForMaskedLM of modeling_mine.py"),
        ({"model_type": "mine", "auto_map": {"AutoConfig": "a/b--conf.C", "AutoModelForMaskedLM": "a/b--model.M"}},
         "class M of model.py of the repository a/b"),
        ({"model_type": "mine"}, None),
        ({"model_type": "bert", "auto_map": {"AutoModelForMaskedLM": "modeling_mine.MineForMaskedLM"}}, None),
        ({"model_type": "xlm-roberta", "auto_map": {"AutoConfig": "x.Y"}}, None),
        ({"model_type": "new", "auto_map": {"AutoModelForMaskedLM": "a/b--modeling.NewForMaskedLM"}}, None),
    ],
)  # fmt: skip
def test_remote_code_of_a_checkpoint_is_named(tmp_path: Path, config: dict, expected: str | None) -> None:
    files = {**PLAIN, "config.json": {"architectures": ["MineForMaskedLM"], **config}}
    assert remote_code(read_checkpoint(str(make(tmp_path, files))).transformer) == expected


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({**PLAIN, "modules.json": modules("custom_st.Transformer", f"{OLD}.SpladePooling")},
         "names remote code: the module custom_st.Transformer, class Transformer of custom_st, would run"),
        ({**PLAIN, "modules.json": modules("sentence_transformersx.Transformer", f"{OLD}.SpladePooling")},
         "names remote code"),
        ({**SYMMETRIC, "sentence_bert_config.json": {"transformer_task": "feature-extraction"}},
         'transformer_task = "feature-extraction"; expected "fill-mask"'),
        ({**SYMMETRIC, "modules.json": modules(*[f"{OLD}.{kind}" for kind in ("Transformer", "SpladePooling")],
                                               paths=("../..", ""))}, "'../..', which is outside the checkpoint"),
        ({**PLAIN, "modules.json": modules(f"{OLD}.Transformer", "sentence_transformers.models.Pooling")},
         "not a checkpoint of a known family"),
        ({**PLAIN, "config.json": {"architectures": ["BertModel"]}}, "not a checkpoint of a known family"),
        ({**PLAIN, "config.json": {"architectures": ["NewForTokenClassification"], "auto_map": {"AutoModel": "m.C"}}},
         "names 'NewForTokenClassification' with code of its own (auto_map). Models whose weights are computed only"),
        ({**PLAIN, "config.json": {"architectures": ["XLMRobertaModel"]}},
         "lexical weights, BGE-M3 layout (config.json with sparse_linear.safetensors or sparse_linear.pt)"),
        ({**PLAIN, "config.json": {}}, "Found in the folder: config.json, model.safetensors"),
        ({}, "Found in the folder: nothing"),
        ({**PLAIN, "config.json": b"{"}, "config.json cannot be read: Expecting property name"),
        ({**PLAIN, "config.json": b"[]"}, "config.json cannot be read: Expected `object`, got `array`"),
        ({**PLAIN, "modules.json": b"\xff"}, "modules.json cannot be read"),
        ({**PLAIN, "modules.json": {}}, "modules.json cannot be read: Expected `array`, got `object`"),
    ],
)  # fmt: skip
def test_unsupported_checkpoints_are_refused(tmp_path: Path, files: dict[str, object], message: str) -> None:
    assert message in message_of(make(tmp_path, files))
