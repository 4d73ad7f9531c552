"""Router checkpoints: both sides are found under every name that releases used; others are refused in one message."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_layouts import OLD, PLAIN, make, message_of, modules

from sparse_ingest.checkpoints.layouts import read_checkpoint
from sparse_ingest.checkpoints.sides import MaskedLMSide, WeightTableSide

ROUTER = {
    **{f"document_0_MLMTransformer/{name}": content for name, content in PLAIN.items()},
    "modules.json": modules("sentence_transformers.models.Router"),
    "router_config.json": {
        "types": {
            "query_0_SparseStaticEmbedding": f"{OLD}.SparseStaticEmbedding",
            "document_0_MLMTransformer": f"{OLD}.MLMTransformer",
            "document_1_SpladePooling": f"{OLD}.SpladePooling",
        },
        "structure": {
            "query": ["query_0_SparseStaticEmbedding"],
            "document": ["document_0_MLMTransformer", "document_1_SpladePooling"],
        },
        "parameters": {"default_route": "document", "allow_empty_key": True},
    },
    "document_0_MLMTransformer/sentence_bert_config.json": {"max_seq_length": 44},
    "document_1_SpladePooling/config.json": {"pooling_strategy": "max", "activation_function": "log1p_relu"},
    "query_0_SparseStaticEmbedding/config.json": {"frozen": False},
    "query_0_SparseStaticEmbedding/model.safetensors": b"weights",
    "query_0_SparseStaticEmbedding/tokenizer_config.json": {"model_max_length": 12},
    "config_sentence_transformers.json": {"prompts": {"query": "q: "}},
}


def rename(old: str, new: str) -> dict[str, object]:
    """Return ROUTER with a name replaced in file names and JSON."""
    text = json.dumps({name: content for name, content in ROUTER.items() if not isinstance(content, bytes)})
    kept = {name.replace(old, new): content for name, content in ROUTER.items() if isinstance(content, bytes)}
    return {**json.loads(text.replace(old, new)), **kept}


def with_config(old: str, new: str) -> dict[str, object]:
    """Return ROUTER with a word replaced in router_config.json."""
    config = json.loads(json.dumps(ROUTER["router_config.json"]).replace(old, new))
    return {**ROUTER, "router_config.json": config}


def test_a_router_with_a_weight_table(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(str(make(tmp_path, ROUTER)))
    assert checkpoint.family == "Router with a separate query side"
    assert checkpoint.transformer == tmp_path / "document_0_MLMTransformer"
    assert checkpoint.declared == {
        "activation": "log1p_relu", "pooling": "max", "max_length": 44, "query_prompt": "q: ",
    }  # fmt: skip
    table = tmp_path / "query_0_SparseStaticEmbedding"
    declared = {"query_special_tokens": "keep", "missing_idf_weight": 0.0, "max_length": 12, "query_prompt": "q: "}
    assert checkpoint.query == WeightTableSide(table, table / "model.safetensors", declared)


@pytest.mark.parametrize(
    "files",
    [
        rename("SparseStaticEmbedding", "IDF"),
        rename("MLMTransformer", "Transformer"),
        rename("sentence_transformers.models.Router", "sentence_transformers.models.Asym"),
        rename("router_config.json", "config.json"),
        rename("sentence_transformers.models.Router", "sentence_transformers.base.modules.router.Router"),
    ],
    ids=["IDF", "Transformer", "Asym", "config.json", "6.x"],
)
def test_a_router_is_recognized_by_every_name_of_its_parts(tmp_path: Path, files: dict) -> None:
    checkpoint = read_checkpoint(str(make(tmp_path, files)))
    assert checkpoint.family == "Router with a separate query side"
    assert isinstance(checkpoint.query, WeightTableSide) and checkpoint.query.weights.is_file()
    assert checkpoint.declared["max_length"] == 44


def test_a_router_with_its_transformer_in_the_same_folder_ignores_idf_json(tmp_path: Path) -> None:
    """OpenSearch publishes its v3 models like this: an empty module name, and the table in two files."""
    files = {name.removeprefix("document_0_MLMTransformer/"): content for name, content in ROUTER.items()}
    text = json.dumps(files["router_config.json"]).replace("document_0_MLMTransformer", "")
    files |= {"router_config.json": json.loads(text), "idf.json": {"a": 1.0}}
    checkpoint = read_checkpoint(str(make(tmp_path, files)))
    assert checkpoint.family == "Router with a separate query side"
    assert checkpoint.transformer == tmp_path and checkpoint.declared["activation"] == "log1p_relu"
    assert checkpoint.query.weights.name == "model.safetensors"


def test_a_router_in_a_subfolder(tmp_path: Path) -> None:
    outside = ("modules.json", "config_sentence_transformers.json")
    files = {name if name in outside else f"0_Router/{name}": content for name, content in ROUTER.items()}
    files["modules.json"] = modules("sentence_transformers.models.Router", paths=("0_Router",))
    checkpoint = read_checkpoint(str(make(tmp_path, files)))
    assert checkpoint.transformer == tmp_path / "0_Router" / "document_0_MLMTransformer"


def test_a_router_with_route_mappings(tmp_path: Path) -> None:
    files = with_config('"query":', '"short":')
    mappings = {"('query', None)": "short", "(None, 'text')": "document", "broken": "x"}
    files["router_config.json"]["parameters"]["route_mappings"] = mappings
    assert isinstance(read_checkpoint(str(make(tmp_path, files))).query, WeightTableSide)


def test_a_router_of_two_masked_lms(tmp_path: Path) -> None:
    config = with_config("", "")["router_config.json"]
    config["types"] |= {"query_0_Transformer": f"{OLD}.Transformer", "query_1_SpladePooling": f"{OLD}.SpladePooling"}
    config["structure"]["query"] = ["query_0_Transformer", "query_1_SpladePooling"]
    files = {
        **ROUTER, "router_config.json": config, "query_1_SpladePooling/config.json": {"activation_function": "relu"},
        "query_0_Transformer/sentence_bert_config.json": {"max_seq_length": 9},
    }  # fmt: skip
    declared = {"activation": "relu", "max_length": 9, "query_prompt": "q: "}
    query = read_checkpoint(str(make(tmp_path, files))).query
    assert query == MaskedLMSide(tmp_path / "query_0_Transformer", declared)


def test_a_weight_table_with_a_path_in_the_config(tmp_path: Path) -> None:
    files = {"query_0_SparseStaticEmbedding/config.json": {"path": "my.json"},
             "query_0_SparseStaticEmbedding/my.json": {"a": 1.0}}  # fmt: skip
    assert read_checkpoint(str(make(tmp_path, {**ROUTER, **files}))).query.weights.name == "my.json"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (with_config("structure", "other"), "missing required field `structure`"),
        ({**ROUTER, "router_config.json": {**ROUTER["router_config.json"], "parameters": [1]}},
         "Expected `object | null`, got `array` - at `$.parameters`"),
        (with_config('["query_0_SparseStaticEmbedding"]', "[]"), "sends queries through no module"),
        (with_config('"query":', '"ask":'), "sends queries through no module, which is not supported"),
        (with_config(f"{OLD}.SparseStaticEmbedding", f"{OLD}.BoW"), "sends queries through BoW"),
        (with_config(f"{OLD}.SpladePooling", f"{OLD}.Pooling"), "sends documents through MLMTransformer, Pooling"),
        (with_config(f"{OLD}.SparseStatic", "idf.SparseStatic"), "remote code: the module idf.SparseStaticEmbedding"),
        (with_config("query_0_SparseStaticEmbedding", "../elsewhere"), "'../elsewhere', which is outside"),
        (with_config('["query_0', '["query_9'), "no type for the module 'query_9_SparseStaticEmbedding'"),
        ({**ROUTER, "query_0_SparseStaticEmbedding/config.json": {"path": "none.json"}}, "looked for"),
        ({name: content for name, content in ROUTER.items() if not name.endswith("Embedding/model.safetensors")},
         "query side has no weights"),
    ],
)  # fmt: skip
def test_unsupported_routers_are_refused(tmp_path: Path, files: dict, message: str) -> None:
    assert message in message_of(make(tmp_path, files))
