"""Loading of weights and code: shards, pickles of tensors only, and remote code only if trusted."""

from __future__ import annotations

import json
import logging
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from support.checkpoints import TEXTS, build_encoder, make_masked_lm, make_router, table_weights

from sparse_ingest.checkpoints.layouts import read_checkpoint
from sparse_ingest.checkpoints.settings import document_identity, resolve_settings
from sparse_ingest.cli.main import cli
from sparse_ingest.errors import CheckpointError, MissingExtraError
from sparse_ingest.models.masked_lms import read_table
from sparse_ingest.models.query_encoders import query_encoder
from sparse_ingest.pipeline import ModelSettings
from sparse_ingest.searching.pipelines import remembered_model


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_masked_lm(tmp_path_factory.mktemp("lms") / "bert")


@pytest.fixture
def own(bert: Path, tmp_path: Path) -> Path:
    """A copy that the test may change."""
    return Path(shutil.copytree(bert, tmp_path / "own"))


def weights_of(folder: Path, **settings: Any) -> np.ndarray:
    return build_encoder(folder, **settings).encode(TEXTS).vectors.weights


class Dangerous:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


def test_sharded_weights_are_the_same(bert: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForMaskedLM

    folder = Path(shutil.copytree(bert, tmp_path / "shards"))
    (folder / "model.safetensors").unlink()
    AutoModelForMaskedLM.from_pretrained(bert).save_pretrained(folder, max_shard_size="20KB")
    assert (folder / "model.safetensors.index.json").exists() and len(list(folder.glob("model-*.safetensors"))) > 1
    assert np.array_equal(weights_of(folder), weights_of(bert))


def test_unused_weights_are_ignored_silently(
    own: Path, bert: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as the pooler of a training checkpoint."""
    tensors = load_file(own / "model.safetensors")
    save_file({**tensors, "bert.pooler.dense.bias": torch.zeros(32)}, own / "model.safetensors", {"format": "pt"})
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    assert np.array_equal(weights_of(own), weights_of(bert))
    assert not caplog.records
    logging.getLogger("transformers.made").warning("said again")
    assert "said again" in caplog.text


def test_a_pickle_of_tensors_is_read(bert: Path, own: Path) -> None:
    tensors = load_file(own / "model.safetensors")
    (own / "model.safetensors").unlink()
    torch.save(tensors, own / "pytorch_model.bin")
    assert np.array_equal(weights_of(own), weights_of(bert))


def test_a_pickle_with_other_objects_is_refused_and_not_executed(own: Path, tmp_path: Path) -> None:
    tensors = load_file(own / "model.safetensors")
    (own / "model.safetensors").unlink()
    torch.save({**tensors, "more": Dangerous(tmp_path / "ran")}, own / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="could run code"):
        build_encoder(own)
    (own / "pytorch_model.bin").write_bytes(pickle.dumps(Dangerous(tmp_path / "ran"), protocol=2))
    with pytest.raises(CheckpointError, match="could run code") as caught:
        build_encoder(own)
    assert "weights_only" not in str(caught.value)  # torch advises disabling weights_only
    assert not (tmp_path / "ran").exists()


def test_a_pickle_whose_tensors_are_larger_than_its_bytes_is_refused(own: Path) -> None:
    tensors = load_file(own / "model.safetensors")
    (own / "model.safetensors").unlink()
    tensors["bert.encoder.layer.0.output.dense.bias"] = torch.zeros(1).expand(1 << 20, 1 << 20)
    torch.save(tensors, own / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="'bert.encoder.layer.0.output.dense.bias' has the shape"):
        build_encoder(own)


@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn])
def test_quantized_weights_are_refused(own: Path, kind: torch.dtype) -> None:
    """Their shape fits if the scales are in other tensors, and their config lost its quantization_config."""
    tensors, name = load_file(own / "model.safetensors"), "bert.encoder.layer.0.output.dense.weight"
    save_file({**tensors, name: tensors[name].to(kind)}, own / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"'{name}' has the type .*: quantized weights"):
        build_encoder(own)


def test_weights_under_other_names_are_named(own: Path) -> None:
    """Such as those of torch.compile and of DistributedDataParallel."""
    tensors = {f"_orig_mod.{name}": one for name, one in load_file(own / "model.safetensors").items()}
    save_file(tensors, own / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 44 of the weights .* It has others, such as '_orig_mod\.bert"):
        build_encoder(own)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "tokenizer.json", "config.json"])
def test_a_pointer_of_git_lfs_is_recognized(own: Path, name: str) -> None:
    if name == "pytorch_model.bin":
        (own / "model.safetensors").unlink()
    (own / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 438000000\n")
    with pytest.raises(CheckpointError, match=f"{name} .*pointer of Git LFS, not the file: run git lfs pull"):
        build_encoder(own)


def test_a_tokenizer_in_python_is_refused(own: Path) -> None:
    (own / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "river"]))
    settings = {"tokenizer_class": "BertJapaneseTokenizer", "word_tokenizer_type": "basic"}
    (own / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="BertJapaneseTokenizer is not a fast tokenizer"):
        build_encoder(own)


def test_a_tokenizer_that_keeps_the_end_is_refused(own: Path) -> None:
    path = own / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "truncation_side": "left"}))
    with pytest.raises(CheckpointError, match='truncation_side = "left"; expected "right"'):
        build_encoder(own)


def test_safetensors_are_preferred_to_a_pickle(bert: Path, own: Path) -> None:
    (own / "pytorch_model.bin").write_bytes(b"anything")
    assert np.array_equal(weights_of(own), weights_of(bert))


def test_a_weight_table_in_a_pickle_needs_torch_only(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_router(tmp_path / "router", bert)
    expected = query_encoder(ModelSettings(document=str(folder))).encode(["the river"])
    table = folder / "query_0_SparseStaticEmbedding"
    (table / "model.safetensors").unlink()
    weights = torch.from_numpy(table_weights(len(json.loads((bert / "tokenizer.json").read_text())["model"]["vocab"])))
    torch.save({"weight": weights}, table / "pytorch_model.bin")
    assert query_encoder(ModelSettings(document=str(folder))).encode(["the river"]) == expected
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="a pickle that only torch reads safely, needs the extra"):
        query_encoder(ModelSettings(document=str(folder)))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"other": torch.zeros(3)}, "no tensor `weight`"),
        ({"weight": torch.zeros(3, 3)}, "no tensor `weight`"),
        ([1.0], "it has a list; expected tensors by name"),
        ({"weight": 1.0}, "it has a float with the name 'weight'; expected tensors"),
        ({"weight": torch.zeros(3), 5: torch.zeros(3)}, "it has a Tensor with the name 5; expected .* strings"),
        ({None: torch.zeros(3)}, "it has a Tensor with the name None"),
    ],
)
def test_a_pickle_without_a_weight_table_is_refused(tmp_path: Path, content: Any, words: str) -> None:
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=words):
        read_table(tmp_path / "pytorch_model.bin")


def test_a_weight_table_in_a_pickle_with_other_objects_is_refused_and_not_executed(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(3), "more": Dangerous(tmp_path / "ran")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="could run code"):
        read_table(tmp_path / "pytorch_model.bin")
    assert not (tmp_path / "ran").exists()


CODE = """
from pathlib import Path
from transformers import BertConfig, BertForMaskedLM

Path({ran!r}).touch()

class MineConfig(BertConfig):
    model_type = "mine"

class MineForMaskedLM(BertForMaskedLM):
    config_class = MineConfig
"""


@pytest.fixture
def with_code(own: Path, tmp_path: Path) -> Path:
    """A BERT with its own model type and code file; the file records that it ran."""
    config = json.loads((own / "config.json").read_text())
    config |= {
        "model_type": "mine",
        "architectures": ["MineForMaskedLM"],
        "auto_map": {"AutoConfig": "modeling_mine.MineConfig", "AutoModelForMaskedLM": "modeling_mine.MineForMaskedLM"},
    }
    (own / "config.json").write_text(json.dumps(config))
    (own / "modeling_mine.py").write_text(CODE.format(ran=str(tmp_path / "ran")))
    return own


def test_remote_code_is_refused_and_the_file_is_named(with_code: Path, tmp_path: Path) -> None:
    for build in (lambda: build_encoder(with_code), lambda: query_encoder(ModelSettings(document=str(with_code)))):
        with pytest.raises(CheckpointError) as caught:
            build()
        message = str(caught.value)
        assert "class MineForMaskedLM of modeling_mine.py" in message and "--trust-remote-code" in message
        assert str(with_code) in message and "\n" not in message
    assert not (tmp_path / "ran").exists()


def test_trusted_remote_code_runs_and_is_reported(
    bert: Path, with_code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    with caplog.at_level(logging.WARNING, logger="sparse_ingest"):
        found = weights_of(with_code, trust_remote_code=True)
    np.testing.assert_allclose(found, weights_of(bert), atol=1e-5)
    assert (tmp_path / "ran").exists()
    [message] = caplog.messages
    assert "class MineForMaskedLM of modeling_mine.py" in message and str(with_code) in message


def test_the_command_line_flag_trusts_remote_code(
    with_code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    arguments = ["query", "--model", str(with_code), "the river"]
    refused = CliRunner().invoke(cli, arguments)
    assert isinstance(refused.exception, CheckpointError) and not (tmp_path / "ran").exists()
    trusted = CliRunner().invoke(cli, [*arguments, "--trust-remote-code"], catch_exceptions=False)
    assert trusted.exit_code == 0 and (tmp_path / "ran").exists()
    assert json.loads(trusted.stdout)["query"]


def test_an_index_or_a_run_cannot_grant_trust() -> None:
    stored = {"document": "some/model", "trust_remote_code": True, "query_side": {"trust_remote_code": True}}
    assert remembered_model(ModelSettings(), stored) == ModelSettings(document="some/model")
    asked = remembered_model(ModelSettings(trust_remote_code=True), stored)
    assert asked == ModelSettings(document="some/model", trust_remote_code=True)


def test_another_query_model_uses_its_own_settings() -> None:
    side = {"query_prompt": "q: ", "max_length": 9}
    stored = {"document": "a/doc", "revision": "1", "query": "a/query", "query_revision": "2", "query_side": side}
    mine = ModelSettings(document="a/doc", revision="1", query="my/query")
    assert remembered_model(ModelSettings(query="my/query"), stored) == mine
    pinned = {"document": "a/doc", "revision": "1", "query": "a/query", "query_revision": "2", **side}
    assert remembered_model(ModelSettings(), stored) == ModelSettings(**pinned)


def test_code_in_another_repository_is_refused_even_when_trusted(with_code: Path) -> None:
    """The revision does not pin that repository, so transformers would run its newest commit."""
    config = json.loads((with_code / "config.json").read_text())
    config["auto_map"] = {name: f"someone/else--{code}" for name, code in config["auto_map"].items()}
    (with_code / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="of the repository someone/else"):
        build_encoder(with_code, trust_remote_code=True)


def test_trusted_code_is_part_of_the_identity(with_code: Path) -> None:
    def identity() -> dict[str, Any]:
        checkpoint = read_checkpoint(str(with_code))
        return document_identity(checkpoint, resolve_settings(ModelSettings(trust_remote_code=True), checkpoint))

    before = identity()
    with (with_code / "modeling_mine.py").open("a") as file:
        file.write("# changed\n")
    assert identity() != before


def test_code_of_a_known_architecture_never_runs(own: Path, bert: Path, tmp_path: Path) -> None:
    config = json.loads((own / "config.json").read_text())
    config["auto_map"] = {"AutoModelForMaskedLM": "modeling_mine.MineForMaskedLM"}
    (own / "config.json").write_text(json.dumps(config))
    (own / "modeling_mine.py").write_text(CODE.format(ran=str(tmp_path / "ran")))
    for trusted in (False, True):
        assert np.array_equal(weights_of(own, trust_remote_code=trusted), weights_of(bert))
    assert not (tmp_path / "ran").exists()
