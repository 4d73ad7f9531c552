"""Hostile model folders (code, hangs, memory, truncation): each ends in one message, in little memory."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.checkpoints import make_masked_lm, make_router, make_splade_card
from support.deadlines import HANGING_S
from support.forked import PRELOADED, command

MOST_MB = 300
HUGE = 10**12


class Measurement(NamedTuple):
    """Exit code, output, and peak MB above the start, of a command in its own process."""

    code: int
    output: str
    peak_mb: float


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    lm = make_masked_lm(root / "lm")
    for layout in ("lm", "card", "router"):
        (root / f"corpus-{layout}.jsonl").write_text('{"_id": "1", "text": "the river ' + "a" * 40 + '!"}\n')
    return {
        "lm": lm, "card": make_splade_card(root / "card"), "router": make_router(root / "router", lm),
        "corpus": root / "corpus-lm.jsonl",
    }  # fmt: skip


def measure(*arguments: object) -> Measurement:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measured, args=(sender, [str(argument) for argument in arguments]))
    process.start()
    sender.close()
    try:
        assert receiver.poll(HANGING_S), f"{arguments} did not end within {HANGING_S} s"
        return Measurement(*receiver.recv())
    finally:
        process.kill()
        process.join()


def _measured(pipe: Any, arguments: list[str]) -> None:
    os.environ["RUST_BACKTRACE"] = "0"
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak, to the current size
    before = _resident("VmRSS")
    answer = command(*arguments)
    pipe.send((answer.code, answer.out + answer.err, (_resident("VmHWM") - before) / 1024))


def _resident(kind: str) -> int:
    found = re.search(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1])


def changed(name: str, **values: Any) -> Callable[[Path], None]:
    """Return a function that sets keys of a JSON file; `a__b` is key b of object a."""

    def change(folder: Path) -> None:
        path = folder / name
        content = json.loads(path.read_text()) if path.exists() else {}
        for key, value in values.items():
            inner = content
            *outer, last = key.split("__")
            for one in outer:
                inner = inner[one]
            inner[last] = value
        path.write_text(json.dumps(content))

    return change


def config(**values: Any) -> Callable[[Path], None]:
    return changed("config.json", **values)


def tokenizer(**values: Any) -> Callable[[Path], None]:
    return changed("tokenizer.json", **values)


def file(name: str, content: bytes | str) -> Callable[[Path], None]:
    return lambda folder: _write(folder / name, content)


def _write(path: Path, content: bytes | str) -> None:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def header(content: bytes, numbers: bytes = b"") -> Callable[[Path], None]:
    return file("model.safetensors", struct.pack("<Q", len(content)) + content + numbers)


def tensor(name: str, value: float, dtype: str = "F32", place: int = 3) -> Callable[[Path], None]:
    """Return a function that sets one number of a tensor and stores the tensor as `dtype`."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        stored = tensors[name].astype({"F32": np.float32, "F16": np.float16, "F64": np.float64}[dtype])
        stored.reshape(-1)[place] = value
        save_file({**tensors, name: stored}, folder / "model.safetensors", {"format": "pt"})

    return change


def pipe(folder: Path) -> None:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")


def million() -> bytes:
    names = (f'"tensor.number.{n}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for n in range(1_000_000))
    return ("{" + ",".join(names) + "}").encode()


DEEP = '{"a":' * 100_000 + "1" + "}" * 100_000
SPLIT = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
POSITIONS = "bert.embeddings.position_embeddings.weight"
BIAS = "cls.predictions.bias"

# Layout, change, and a part of the message ("" if the model is accepted).
CASES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    # Code
    "kernel": ("lm", config(attn_implementation="evil/kernel"), "config.json has attn_implementation = 'evil/kernel'"),
    "kernel function": ("card", config(_attn_implementation="evil/kernel@main:fn"), "_attn_implementation"),
    "kernel of a part": ("lm", config(attn_implementation={"": "sdpa", "text": "kernels-community/x"}), "attn_impl"),
    "nested kernel": ("lm", config(text_config={"_attn_implementation": "evil/kernel"}), "evil/kernel"),
    "flash attention": ("lm", config(attn_implementation="flash_attention_2"), "flash_attention_2"),
    "experts": ("lm", config(experts_implementation="evil/experts"), "experts_implementation"),
    "quantization": ("lm", config(quantization_config={"quant_method": "hqq"}), "quantization_config"),
    "generation": ("lm", changed("generation_config.json", custom_generate="evil/code"), "custom_generate"),
    "adapter": ("lm", changed("adapter_config.json", base_model_name_or_path="evil/base"), "adapter_config.json"),
    "arguments": ("card", changed("sentence_bert_config.json", model_args={"attn_implementation": "evil/k"}), "evil/k"),
    "unknown type": ("lm", config(model_type="evil"), "model_type = 'evil'"),
    "code as a list": ("lm", config(model_type="evil", auto_map=["evil--x.Y"]), "remote code"),
    "own tokenizer": ("lm", changed("tokenizer_config.json", auto_map={"AutoTokenizer": ["x.Y", None]}), "auto_map"),
    "dotted tokenizer": ("lm", changed("tokenizer_config.json", tokenizer_class="os.system"), "os.system"),
    "model as tokenizer": ("lm", changed("tokenizer_config.json", tokenizer_class="AutoModel"), "AutoModel"),
    "modules": ("card", file("modules.json", '[{"type": "os.path", "path": ""}]'), "remote code"),
    "architectures": ("card", config(architectures=5), ""),
    "long type": ("lm", config(model_type="a" * 5000, auto_map={}), "model_type = 'aaa"),
    "long path": ("router", changed("router_config.json", structure={"query": ["b" * 5000], "document": []},
                                    types={"b" * 5000: "sentence_transformers.models.IDF"}), "outside the checkpoint"),
    # Sizes
    "vocabulary": ("lm", config(vocab_size=HUGE), "vocab_size = 1000000000000"),
    "layers": ("lm", config(num_hidden_layers=10**9), "num_hidden_layers = 1000000000"),
    "many layers": ("lm", config(num_hidden_layers=128), "describes a larger model than its weights"),
    "width": ("card", config(hidden_size=10**9), "hidden_size = 1000000000"),
    "large width": ("lm", config(hidden_size=100_000), "describes a larger model than its weights"),
    "feed forward": ("lm", config(intermediate_size=HUGE), "intermediate_size"),
    "large feed forward": ("lm", config(intermediate_size=131_072), "larger model"),
    "positions": ("lm", config(max_position_embeddings=HUGE), "max_position_embeddings"),
    "large positions": ("lm", config(max_position_embeddings=4_000_000), "larger model"),
    "heads": ("lm", config(num_attention_heads=0), "num_attention_heads = 0"),
    "odd heads": ("lm", config(num_attention_heads=5), "is not a multiple of the number of attention heads (5)"),
    "types": ("lm", config(type_vocab_size=-2), "type_vocab_size = -2"),
    "text": ("lm", config(vocab_size="116"), "vocab_size = '116'"),
    "fraction": ("lm", config(num_hidden_layers=2.5), "num_hidden_layers = 2.5"),
    "truth": ("lm", config(hidden_size=True), "hidden_size = True"),
    "labels": ("lm", config(num_labels=10**9), ""),
    "padding": ("lm", config(pad_token_id=10**9), "cannot be built"),
    "activation": ("lm", config(hidden_act=["gelu"]), "cannot be built"),
    "epsilon": ("lm", config(layer_norm_eps="small"), "cannot be built"),
    "other family": ("lm", config(model_type="albert", num_hidden_groups=10**9), "num_hidden_groups"),
    "window": ("lm", config(sliding_window=10**9), ""),
    "length": ("card", changed("sentence_bert_config.json", max_seq_length=[1]), "max_seq_length"),
    # JSON
    "deep config": ("lm", file("config.json", DEEP), "config.json cannot be read: it is nested more than 100 levels"),
    "deep header": ("lm", header(DEEP.encode()), "nested more than 100 levels"),
    "deep tokenizer": ("lm", file("tokenizer.json", DEEP), "tokenizer.json cannot be read"),
    "deep tokenizer config": ("lm", file("tokenizer_config.json", DEEP), "nested more than 100 levels"),
    "deep modules": ("card", file("modules.json", "[" * 100_000), "modules.json cannot be read"),
    "large config": ("lm", file("config.json", "[" + "[]," * 5_000_000 + "[]]"), "config.json cannot be read"),
    "list": ("lm", file("tokenizer_config.json", "[]"), "tokenizer_config.json cannot be read"),
    # Headers
    "million tensors": ("lm", header(million()), "model.safetensors is not a safetensors file, or"),
    "endless header": ("lm", file("model.safetensors", b"\xff" * 8), "not a safetensors file"),
    "shape": ("lm", header(b'{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4]}}', b"0000"), "beyond"),
    "header of text": ("lm", header(b'{"a":{"dtype":1,"shape":"x","data_offsets":[0,4]}}', b"0000"), "safetensors"),
    "pipe": ("lm", pipe, "regular"),
    # Weights
    "nan": ("lm", tensor(POSITIONS, float("nan")), "1 of the 2,048 numbers of 'bert.embeddings.position_embeddings"),
    "nan in float16": ("lm", tensor(BIAS, float("nan"), "F16"), f"'{BIAS}' are not finite in float32, the first at [3"),
    "beyond float32": ("card", tensor(POSITIONS, 1e300, "F64"), "the first at [0, 3]: inf"),
    "too large": ("lm", tensor("bert.embeddings.word_embeddings.weight", 3e38), "infinite or undefined"),
    # Tokenizers
    "pattern": ("lm", tokenizer(pre_tokenizer=SPLIT), "repeats a group"),
    "replacement": (
        "lm", tokenizer(normalizer={"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10**5}),
        "content has 100,000",
    ),
    "long words": ("lm", tokenizer(model__max_input_chars_per_word=10**9), "max_input_chars_per_word"),
    "padded": ("lm", tokenizer(padding={"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None,
                                        "pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]"}), ""),
    "large vocabulary": ("lm", file("tokenizer.json", '{"model":{"vocab":[' + "0," * 2_000_000 + "0]}}"), "786,432"),
    "vocabulary of text": ("lm", tokenizer(model__vocab={"a": "b"}), "cannot be read as a tokenizer"),
    "charsmap": ("lm", tokenizer(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}), "cannot be read"),
    "added ids": ("lm", changed("tokenizer_config.json", added_tokens_decoder={"1000000000000": {"content": "x"}}), ""),
    "added text": ("lm", changed("tokenizer_config.json", added_tokens_decoder=[1]), "cannot be read as a tokenizer"),
    "other file": ("lm", changed("tokenizer_config.json", vocab_file="/etc/passwd", tokenizer_file="/etc/passwd"), ""),
    "template": ("lm", changed("tokenizer_config.json", chat_template="{{ 1 / 0 }}" * 10), ""),
    # Routers
    "route": ("router", changed("router_config.json", parameters={"route_mappings": ["x"]}), "route_mappings"),
    "module of a number": ("router", changed("router_config.json", structure={"query": [1]}), "router_config.json"),
}  # fmt: skip


# 2 s each: `make test` runs every 20th, `make test-all` all.
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow if place % 20 else ()) for place, case in enumerate(CASES)]
)
def test_a_hostile_model_ends_in_one_message(models: dict[str, Path], tmp_path: Path, case: str) -> None:
    layout, change, message = CASES[case]
    folder = Path(shutil.copytree(models[layout], tmp_path / "model"))
    change(folder)
    encode = measure("encode", "--model", folder, "--corpus", models["corpus"], "--out", tmp_path / "run")
    found = {"inspect": measure("inspect", folder), "encode": encode}
    for name, answer in found.items():
        assert "Traceback" not in answer.output and "\x1b" not in answer.output, answer
        assert answer.peak_mb < MOST_MB, (name, answer)
        assert answer.code in (0, 1), answer
    assert message in encode.output, encode
    assert (encode.code == 1) is bool(message), encode


def test_a_table_outside_the_checkpoint_is_refused_and_not_printed(models: dict[str, Path], tmp_path: Path) -> None:
    secret = tmp_path / "secret.json"
    secret.write_text('{"aws_secret_access_key": "AKIA-TOPSECRET"}')
    (tmp_path / "other").mkdir()
    for number, path in enumerate(("../../secret.json", str(secret), "link.json", "loop.json", "a\0.json")):
        folder = Path(shutil.copytree(models["router"], tmp_path / f"router-{number}"))
        table = folder / "query_0_SparseStaticEmbedding"
        (table / "link.json").symlink_to(secret)
        (table / "loop.json").symlink_to("loop.json")
        if path != "link.json":
            (table / "link.json").unlink()
        if path != "loop.json":
            (table / "loop.json").unlink()
        (table / "config.json").write_text(json.dumps({"path": path}))
        for arguments in (("query", "--model", folder, "the river"), ("inspect", folder)):
            answer = command(*arguments)
            assert answer.code == 1 and "outside the checkpoint" in answer.err, answer
            assert "TOPSECRET" not in answer.err and "Traceback" not in answer.err and "aws_" not in answer.err


def test_links_out_of_the_folder_are_refused_except_into_the_hub_cache(models: dict[str, Path], tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--a--b" / "blobs").mkdir()
    for number, path in enumerate(sorted(models["lm"].iterdir())):
        shutil.copy(path, tmp_path / "models--a--b" / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert command("inspect", snapshot).code == 0
    folder = Path(shutil.copytree(models["lm"], tmp_path / "model"))
    for name in ("config.json", "model.safetensors", "vocab.txt"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(models["lm"] / "config.json")
        answer = command("inspect", folder)
        assert answer.code == 1 and f"names '{name}', which is outside the checkpoint" in answer.err
        (folder / name).unlink()
        if (models["lm"] / name).exists():
            shutil.copy(models["lm"] / name, folder)


def test_shards_outside_the_folder_of_their_index_are_refused(models: dict[str, Path], tmp_path: Path) -> None:
    for name in ("../lm/model.safetensors", str(models["lm"] / "model.safetensors"), "absent.safetensors"):
        folder = Path(shutil.copytree(models["lm"], tmp_path / f"model-{len(name)}"))
        (folder / "model.safetensors").rename(folder / "other.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
        answer = command("inspect", folder)
        assert answer.code == 1 and "expected files beside it" in answer.err and "Traceback" not in answer.err


STAND_IN = """
import sys
from pathlib import Path
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    def called(*given, **named):
        if name not in ("use_kernel_forward_from_hub", "use_kernelized_func", "use_kernel_func_from_hub"):
            Path({ran!r}).write_text(name)
        return lambda one: one
    return called
class Mode: INFERENCE = TRAINING = TORCH_COMPILE = 1
class Device: pass
class CUDAProperties: pass
class ROCMProperties: pass
class LayerRepository: pass
class LocalLayerRepository: pass
class KernelizeFallback: pass
"""


def test_installed_kernels_and_adapters_are_never_called(models: dict[str, Path], tmp_path: Path) -> None:
    """transformers imports `kernels` if it is installed, and uses its decorators; fetching calls other functions."""
    ran, site = tmp_path / "ran", tmp_path / "site"
    for package, version in (("kernels", "0.18.5"), ("peft", "99.0")):
        (site / package).mkdir(parents=True)
        code = STAND_IN.format(ran=str(ran)) if package == "kernels" else f"open({str(ran)!r}, 'w').write('peft')"
        (site / package / "__init__.py").write_text(code)
        (site / package / "layer").mkdir()
        (site / package / "layer" / "__init__.py").write_text("")
        (site / package / "layer" / "mode.py").write_text("class Mode: INFERENCE = TRAINING = 1")
        (site / f"{package}-{version}.dist-info").mkdir()
        (site / f"{package}-{version}.dist-info" / "METADATA").write_text(f"Name: {package}\nVersion: {version}\n")
    folders = []
    for number, (name, values) in enumerate(
        (
            ("config.json", {"attn_implementation": "evil/kernel"}),
            ("config.json", {"_attn_implementation": "flash_attention_2"}),
            ("config.json", {"attn_implementation_internal": "evil/kernel"}),
            ("config.json", {"quantization_config": {"quant_method": "hqq"}}),
            ("adapter_config.json", {"base_model_name_or_path": "evil/base", "peft_type": "LORA"}),
            ("config.json", {}),
        )
    ):
        folders.append(Path(shutil.copytree(models["lm"], tmp_path / f"model-{number}")))
        changed(name, **values)(folders[-1])
    program = (
        "import sys; from sparse_ingest import SparseEncoder; from sparse_ingest.errors import CheckpointError\n"
        "from transformers.utils import is_kernels_available, is_peft_available\n"
        "assert is_kernels_available() and is_peft_available()\n"
        "for folder in sys.argv[1:]:\n"
        "    for trusted in (False, True):\n"
        "        try: SparseEncoder(folder, trust_remote_code=trusted).encode_document(['a']); print('encoded')\n"
        "        except CheckpointError as error: print(error)\n"
    )
    given = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-c", program, *folders], capture_output=True, text=True, timeout=120, env=given
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 12 and lines[-2:] == ["encoded", "encoded"]
    for line in lines[:8]:
        assert "config.json has " in line and "would fetch or import code" in line
    assert all("adapter_config.json describes an adapter" in line for line in lines[8:10])
    assert not ran.exists(), ran.read_text()
