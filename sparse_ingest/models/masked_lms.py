"""The weights of a checkpoint: its masked LM as a model of transformers in float32, or its table of query weights.

In: a folder with config.json and weights (safetensors), or a pickle, which torch reads with `weights_only`, so that no
code runs. Out: the model or the table. `model_type = "new"` (Alibaba's gte models, which come with remote code) is
built as transformers' own `gte` architecture. body.py computes with the model.
"""

from __future__ import annotations

import contextlib
import logging
import math
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from sparse_ingest.checkpoints.checks import read_config
from sparse_ingest.checkpoints.layouts import BUILT_AS_GTE, Checkpoint, code_reference, trusted_code
from sparse_ingest.checkpoints.tensors import read_header, weight_files
from sparse_ingest.errors import CheckpointError, first_line
from sparse_ingest.storage.foreign_json import shown

# Choices and defaults of the remote code, and the only ones that transformers' `gte` has.
GTE_CHOICES = {
    "hidden_act": "gelu", "layer_norm_type": "layer_norm", "position_embedding_type": "rope",
    "logn_attention_scale": False,
}  # fmt: skip
GTE_KEYS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
    "max_position_embeddings", "type_vocab_size", "layer_norm_eps", "pad_token_id", "tie_word_embeddings",
)  # fmt: skip
# Where the remote code's own default differs from that of transformers' `gte`.
GTE_DEFAULTS = {"vocab_size": 30528, "max_position_embeddings": 2048, "pad_token_id": 0}
# transformers itself unpacks packed weights; this is for `pack_qkv = false`.
GTE_NAMES = {r"attention\.([qkv])_proj": r"self_attn.\1_proj"}
# Of a config: what a masked LM in float32 has no use for. A number of labels creates as many names.
UNUSED_KEYS = ("auto_map", "torch_dtype", "dtype", "num_labels", "id2label", "label2id", "_name_or_path")
# What a model may have beyond its weights, which is reported as missing.
SPARE_NUMBERS, SPARE_TENSORS = 1 << 24, 500
logger = logging.getLogger(__name__)


def build_masked_lm(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> Any:
    """Build the masked LM of a checkpoint's document side.

    Raises:
        CheckpointError: it cannot be built, lacks weights, or brings code that is not trusted.
    """
    from safetensors import SafetensorError
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # a bar for a second of reading weights
    folder = checkpoint.transformer
    if code := trusted_code(checkpoint, folder, trusted=trust_remote_code):
        logger.warning("Running remote code of %s: %s.", checkpoint.name, code)
    config = read_config(folder)
    as_gte = config.get("model_type") == BUILT_AS_GTE
    try:
        tensors = _read_weights(folder)
        architecture, built, options = _gte(checkpoint.name, config) if as_gte else _known(folder, config, code)
        with without_report(), _no_more_than(checkpoint.name, tensors):
            # From no folder: transformers reads nothing but what is given here, no adapter and no other file.
            model, report = architecture.from_pretrained(
                None,
                config=built,
                state_dict=tensors,
                dtype=torch.float32,
                # They are in the report, and refused below with the name of one.
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **options,
            )
    except pickle.UnpicklingError as error:
        raise _unsafe_pickle(f"The weight file of {checkpoint.name}", "its weights as safetensors") from error
    except SafetensorError as error:
        raise CheckpointError(
            f"The weights of {checkpoint.name} are damaged: {first_line(error)}. Fetch the model again."
        ) from error
    except CheckpointError:
        raise
    except Exception as error:  # transformers and remote code may raise any type
        raise CheckpointError(f"{checkpoint.name} cannot be built: {first_line(error)}.") from error
    _refuse_gaps(checkpoint.name, type(model).__name__, report)
    _refuse_infinite(checkpoint.name, model)
    if as_gte:
        _scale_rotations(model, config)
    return model.eval()


def _known(folder: Path, config: dict[str, Any], code: str | None) -> tuple[Any, Any, dict[str, Any]]:
    """Return the class of a masked LM, its config, and no further arguments; `code` is what is trusted to run."""
    from transformers import AutoConfig
    from transformers.dynamic_module_utils import get_class_from_dynamic_module
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING_NAMES

    if code:
        built = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=True)
        reference = code_reference(folder)
        return get_class_from_dynamic_module(reference, str(folder), local_files_only=True), built, {}
    # Files of the first releases name the class alone.
    kinds = {name: kind for kind, name in MODEL_FOR_MASKED_LM_MAPPING_NAMES.items()}
    kind = config.get("model_type") or kinds.get(config["architectures"][0])
    if kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        raise CheckpointError(
            f"{folder / 'config.json'} has model_type = {shown(kind)}, of which the installed transformers builds no "
            "masked LM. Name another model, or pip install -U transformers."
        )
    built = CONFIG_MAPPING[kind].from_dict({key: value for key, value in config.items() if key not in UNUSED_KEYS})
    return MODEL_FOR_MASKED_LM_MAPPING[type(built)], built, {}


def _read_weights(folder: Path) -> dict[str, Any]:
    """Return every tensor of the weights by its name: of safetensors as a slice, which is read when it is used."""
    from safetensors import safe_open

    tensors: dict[str, Any] = {}
    for path in weight_files(folder):
        if path.suffix == ".safetensors":
            read_header(path)
            opened: Any = safe_open(path, framework="pt")
            tensors |= {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - no dict
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
            if not isinstance(content, dict) or not all(isinstance(one, torch.Tensor) for one in content.values()):
                raise CheckpointError(f"{path} holds other than tensors by name. Fetch the model again.")
            tensors |= content
    return tensors


@contextlib.contextmanager
def _no_more_than(name: str, tensors: dict[str, Any]) -> Iterator[None]:
    """Stop building a model that has more or larger parameters than its weights, such as a billion layers."""
    shapes = {key: list(one.get_shape() if hasattr(one, "get_shape") else one.shape) for key, one in tensors.items()}
    sizes = {key: math.prod(shape) for key, shape in shapes.items()}
    largest = max(sizes, key=lambda key: sizes[key], default="")
    # A projection that is tied to the embeddings is created before it is tied.
    most_numbers, most = sum(sizes.values()) + sizes.get(largest, 0) + SPARE_NUMBERS, 2 * len(sizes) + SPARE_TENSORS
    numbers = count = 0

    def add(module: torch.nn.Module, key: str, parameter: torch.nn.Parameter | None) -> None:
        nonlocal numbers, count
        if parameter is not None and parameter.is_meta:
            numbers, count = numbers + parameter.numel(), count + 1
            if numbers > most_numbers or count > most:
                raise CheckpointError(
                    f"The config.json of {name} describes a larger model than its weights are: the parameter {key!r} "
                    f"of shape {list(parameter.shape)} is number {count:,}, with {numbers:,} numbers in all. The "
                    f"weights are {len(sizes):,} tensors, the largest of shape {shapes.get(largest)}. Fetch the model "
                    "again."
                )

    handle = torch.nn.modules.module.register_module_parameter_registration_hook(add)
    try:
        yield
    finally:
        handle.remove()


def _refuse_infinite(name: str, model: Any) -> None:
    """Refuse weights that are not finite in float32: a document's weights would be missing or wrong."""
    for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
        # A sum is finite where each number is, and fast. A sum of large ones may not be.
        if tensor.is_floating_point() and not tensor.detach().sum().isfinite():
            wrong = (~tensor.detach().isfinite()).nonzero()
            if len(wrong):
                first = wrong[0].tolist()
                raise CheckpointError(
                    f"The weights of {name} are damaged: {len(wrong):,} of the {tensor.numel():,} numbers of {key!r} "
                    f"are not finite in float32, the first at {first}: {tensor[tuple(first)].item()}. Fetch the model "
                    "again."
                )


def _refuse_gaps(name: str, built: str, report: dict[str, Any]) -> None:
    """Refuse missing weights: transformers would fill them with random numbers and go on."""
    shapes = (f"{key} ({list(found)} for {list(needed)})" for key, found, needed in report["mismatched_keys"])
    if missing := [*sorted(report["missing_keys"]), *sorted(shapes)]:
        raise CheckpointError(
            f"{name} lacks {len(missing)} of the weights that {built} needs, or has them in another shape, such as "
            f"{missing[0]}. Fetch the model again, or name a checkpoint with its masked-LM head."
        )


@contextlib.contextmanager
def without_report() -> Iterator[None]:
    """Suppress transformers' table of missing weights, which are refused here, and of unused ones, such as poolers."""
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def _gte(name: str, config: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """Return the class of transformers to build, its config, and further arguments."""
    try:
        from transformers import GteConfig, GteForMaskedLM
    except ImportError as error:
        raise CheckpointError(
            f'{name} is of model_type "{BUILT_AS_GTE}" and needs a transformers with the gte architecture; '
            "pip install -U transformers."
        ) from error
    for key, needed in GTE_CHOICES.items():
        if (found := config.get(key, needed)) != needed:
            raise CheckpointError(
                f"{name} has {key} = {found!r}, which transformers' own gte architecture cannot compute; "
                f"expected {needed!r}."
            )
    scaling = config.get("rope_scaling")
    if scaling and (kind := scaling.get("type") or scaling.get("rope_type")) != "ntk":
        raise CheckpointError(f'{name} has rope_scaling of type {kind!r}; expected "ntk".')
    given = {key: config[key] for key in GTE_KEYS if key in config}
    rope = {"rope_type": "default", "rope_theta": float(config.get("rope_theta", 10000.0))}
    as_gte = GteConfig(**{**GTE_DEFAULTS, **given}, rope_parameters=rope)
    return GteForMaskedLM, as_gte, {"key_mapping": GTE_NAMES}


def _scale_rotations(model: Any, config: dict[str, Any]) -> None:
    """Set the rotary frequencies of NTK scaling, which transformers does not have.

    As in the remote code they are scaled for every length, not only beyond the trained one. The formulas are (6) of
    https://kexue.fm/archives/9706, and with `mixed_b` (10) to (13).
    """
    scaling = config.get("rope_scaling") or {}
    factor, mixed = float(scaling.get("factor", 1.0)), scaling.get("mixed_b")
    if factor <= 1.0:
        return
    rotary = model.gte.rotary_emb
    half = rotary.inv_freq.numel()
    places = torch.arange(0, 2 * half, 2, dtype=torch.float32) / (2 * half)
    theta = float(config.get("rope_theta", 10000.0))
    if mixed is None:
        frequencies = 1.0 / (theta * factor) ** places / factor ** (1 / half)
    else:
        steps = torch.arange(1, half + 1, dtype=torch.float32)
        growth = torch.tensor(factor).log() / half**mixed
        frequencies = 1.0 / theta**places / (growth * steps**mixed).exp()
    rotary.inv_freq.copy_(frequencies)
    rotary.original_inv_freq.copy_(frequencies)


def read_table(path: Path) -> list[float]:
    """Read the weights of a query side by token id, from pytorch_model.bin.

    Raises:
        CheckpointError: the file holds more than tensors, or no table.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _unsafe_pickle(str(path), "model.safetensors or idf.json") from error
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {first_line(error)}. Fetch the model again.") from error
    table = content.get("weight") if isinstance(content, dict) else None
    if not isinstance(table, torch.Tensor) or table.dim() != 1:
        raise CheckpointError(f"{path} must hold one tensor `weight` with a number for each token.")
    weights: list[float] = table.float().tolist()
    return weights


def _unsafe_pickle(path: str, instead: str) -> CheckpointError:
    """Why a pickle is not read; torch's own message advises to read it without `weights_only`."""
    return CheckpointError(
        f"{path} is no pickle of plain weights: damaged, or it holds more than tensors and could run code, so it is "
        f"not read. Fetch the model again, or ask for {instead}."
    )
