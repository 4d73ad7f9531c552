"""Build the model of a checkpoint as a model of transformers in float32, or read its pickled query weights.

Weights are safetensors, or a pickle, which torch reads with `weights_only`, so that no code runs. `model_type = "new"`
(Alibaba's gte models, which have remote code) is built as transformers' own `gte` architecture.
"""

from __future__ import annotations

import contextlib
import logging
import math
import pickle
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from sparse_ingest.checkpoints.checks import read_config
from sparse_ingest.checkpoints.layouts import BUILT_AS_GTE, Checkpoint, code_reference, trusted_code
from sparse_ingest.checkpoints.modules import damaged
from sparse_ingest.checkpoints.sides import LanguageModelSide, ModelSide
from sparse_ingest.checkpoints.tensors import read_header, weight_files
from sparse_ingest.errors import CheckpointError, first_line, short_repr
from sparse_ingest.storage.foreign_json import LFS_POINTER, NOT_FETCHED

# Defaults of the remote code, and the only values that transformers' `gte` supports.
GTE_CHOICES = {
    "hidden_act": "gelu", "layer_norm_type": "layer_norm", "position_embedding_type": "rope",
    "logn_attention_scale": False,
}  # fmt: skip
GTE_KEYS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
    "max_position_embeddings", "type_vocab_size", "layer_norm_eps", "pad_token_id", "tie_word_embeddings",
)  # fmt: skip
# Defaults of the remote code that differ from transformers' `gte`.
GTE_DEFAULTS = {"vocab_size": 30528, "max_position_embeddings": 2048, "pad_token_id": 0}
# For `pack_qkv = false`; transformers unpacks packed weights.
GTE_NAMES = {r"attention\.([qkv])_proj": r"self_attn.\1_proj"}
# Keys of a config without a meaning here. `num_labels` creates as many names.
UNUSED_KEYS = ("auto_map", "torch_dtype", "dtype", "num_labels", "id2label", "label2id", "_name_or_path")
# The table of transformers with the architectures of each auto class; with _NAMES, by name.
MAPPINGS = {
    "AutoModelForMaskedLM": "MODEL_FOR_MASKED_LM_MAPPING", "AutoModel": "MODEL_MAPPING",
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING",
}  # fmt: skip
# Types of weights, of torch and in safetensors; other types mean quantized weights, whose scales are in other tensors.
FLOATS = {torch.float64, torch.float32, torch.float16, torch.bfloat16, "F64", "F32", "F16", "BF16"}
# A model may exceed its weights by this; the difference is then reported as missing.
SPARE_NUMBERS, SPARE_TENSORS = 1 << 24, 500
logger = logging.getLogger(__name__)


def build_model(checkpoint: Checkpoint, *, attention: str | None = None, trust_remote_code: bool = False) -> Any:
    """Build the transformer of a checkpoint's document side.

    `attention` is that of a causal language model. Raise `CheckpointError` if it cannot be built, lacks weights, or has
    code that is not trusted.
    """
    from safetensors import SafetensorError
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # a bar for a second of reading weights
    side, folder = checkpoint.document, checkpoint.transformer
    if code := trusted_code(checkpoint, side, trusted=trust_remote_code):
        logger.warning("Running remote code of %s: %s.", checkpoint.name, code)
    config = read_config(folder)
    as_gte = config.get("model_type") == BUILT_AS_GTE
    try:
        tensors = read_slices(weight_files(folder))
        architecture, built, options = _gte(checkpoint.name, config, side) if as_gte else _known(config, side, code)
        if isinstance(side, LanguageModelSide):
            built.is_causal, built.use_cache = attention == "causal", False
        with without_report(), _no_more_than(checkpoint.name, tensors):
            # Without a folder transformers reads no other file, such as an adapter.
            model, report = architecture.from_pretrained(
                None,
                config=built,
                state_dict=tensors,
                dtype=torch.float32,
                # Refused below, with the name of one.
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **options,
            )
        if as_gte:
            _scale_rotations(model, config)
    except SafetensorError as error:
        raise damaged(f"The weights of {checkpoint.name} are damaged: {first_line(error)}") from error
    except CheckpointError:
        raise
    except Exception as error:  # transformers and remote code may raise any type
        raise CheckpointError(f"{checkpoint.name} cannot be built: {first_line(error)}.") from error
    _refuse_gaps(checkpoint.name, type(model).__name__, report)
    _refuse_infinite(checkpoint.name, model)
    return model.eval()


def _known(config: dict[str, Any], side: ModelSide, code: str | None) -> tuple[Any, Any, dict[str, Any]]:
    """Return the class of a model, its config, and no further arguments; `code` is trusted remote code."""
    from transformers import AutoConfig
    from transformers.dynamic_module_utils import get_class_from_dynamic_module
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    folder, table = side.folder, MAPPINGS[side.auto_class]
    if code:
        built = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=True)
        reference = code_reference(folder, side.auto_class)
        return get_class_from_dynamic_module(reference, str(folder), local_files_only=True), built, {}
    # Files of the first releases have only the name of the class.
    names = getattr(modeling_auto, f"{table}_NAMES")
    kind = config.get("model_type") or {name: kind for kind, name in names.items()}.get(config["architectures"][0])
    if kind not in names:
        raise CheckpointError(
            f"{folder / 'config.json'} has model_type = {short_repr(kind)}, for which transformers has no "
            f"{side.auto_class}. Upgrade transformers with pip install -U transformers, or use another model."
        )
    built = CONFIG_MAPPING[kind].from_dict({key: value for key, value in config.items() if key not in UNUSED_KEYS})
    return getattr(modeling_auto, table)[type(built)], built, {}


def read_weights(files: Iterable[Path]) -> dict[str, torch.Tensor]:
    """Return the tensors of weight files by name. Raise CheckpointError."""
    from safetensors import SafetensorError

    try:
        found = read_slices(files)
        return {name: one if isinstance(one, torch.Tensor) else one[:] for name, one in found.items()}
    except SafetensorError as error:
        raise damaged(f"The weights in {', '.join(map(str, files))} are damaged: {first_line(error)}") from error


def read_slices(files: Iterable[Path]) -> dict[str, Any]:
    """Return the tensors of weight files by name; safetensors files give slices, which are read on use."""
    from safetensors import safe_open

    tensors: dict[str, Any] = {}
    for path in files:
        if path.suffix == ".safetensors":
            read_header(path)
            opened: Any = safe_open(path, framework="pt")
            tensors |= {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - no dict
        else:
            tensors |= _read_pickle(path)
    for name, one in tensors.items():
        dtype = one.dtype if isinstance(one, torch.Tensor) else one.get_dtype()
        if name.endswith("weight") and dtype not in FLOATS:
            raise CheckpointError(
                f"The tensor {short_repr(name)} has the type {dtype}: quantized weights, which are not supported. Use "
                "the model that was quantized."
            )
    return tensors


def _read_pickle(path: Path) -> dict[str, torch.Tensor]:
    try:
        with path.open("rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise ValueError(NOT_FETCHED)
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict):
            raise ValueError(f"it has a {type(content).__name__}; expected tensors by name")
        for name, one in content.items():
            if not (isinstance(name, str) and isinstance(one, torch.Tensor)):
                found = f"a {type(one).__name__} with the name {short_repr(name)}"
                raise ValueError(f"it has {found}; expected tensors with names that are strings")
            if one.nbytes > one.untyped_storage().nbytes():  # a few bytes may declare terabytes
                raise ValueError(f"its tensor {short_repr(name)} has the shape {list(one.shape)}, beyond its bytes")
    except pickle.UnpicklingError as error:  # torch's message advises to read it without `weights_only`
        raise CheckpointError(
            f"{path} was not read: it is damaged, or contains more than tensors and could run code. Fetch the model "
            "again, or use one with safetensors."
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        raise damaged(f"{path} cannot be read: {first_line(error)}") from error
    return content


@contextlib.contextmanager
def _no_more_than(name: str, tensors: dict[str, Any]) -> Iterator[None]:
    """Refuse a model with more or larger parameters than its weights, such as a billion layers."""
    shapes = {key: list(one.get_shape() if hasattr(one, "get_shape") else one.shape) for key, one in tensors.items()}
    sizes = {key: math.prod(shape) for key, shape in shapes.items()}
    largest = max(sizes, key=lambda key: sizes[key], default="")
    # A projection is created before it is tied to the embeddings.
    most_numbers, most = sum(sizes.values()) + sizes.get(largest, 0) + SPARE_NUMBERS, 2 * len(sizes) + SPARE_TENSORS
    numbers = count = 0

    def add(module: torch.nn.Module, key: str, parameter: torch.nn.Parameter | None) -> None:
        nonlocal numbers, count
        if parameter is not None and parameter.is_meta:
            numbers, count = numbers + parameter.numel(), count + 1
            if numbers > most_numbers or count > most:
                raise damaged(
                    f"The config.json of {name} describes a larger model than its weights: with parameter {count:,}, "
                    f"{key!r} of shape {list(parameter.shape)}, it has {numbers:,} numbers. The weights are "
                    f"{len(sizes):,} tensors, the largest of shape {shapes.get(largest)}"
                )

    handle = torch.nn.modules.module.register_module_parameter_registration_hook(add)
    try:
        yield
    finally:
        handle.remove()


def _refuse_infinite(name: str, model: Any) -> None:
    """Refuse weights that are not finite in float32."""
    for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
        # A sum is fast, and finite if every number is, unless they are large.
        if tensor.is_floating_point() and not tensor.detach().sum().isfinite():
            wrong = (~tensor.detach().isfinite()).nonzero()
            if len(wrong):
                first = wrong[0].tolist()
                raise damaged(
                    f"The weights of {name} are damaged: {len(wrong):,} of the {tensor.numel():,} numbers of {key!r} "
                    f"are not finite in float32, the first at {first}: {tensor[tuple(first)].item()}"
                )


def _refuse_gaps(name: str, built: str, report: dict[str, Any]) -> None:
    """Refuse missing weights, for which transformers uses random numbers."""
    shapes = (f"{key} ({list(found)} for {list(needed)})" for key, found, needed in report["mismatched_keys"])
    # The pooler of a model without a head is not used, and often not saved.
    names = (name for name in report["missing_keys"] if not name.startswith("pooler."))
    if missing := [*sorted(names), *sorted(shapes)]:
        others = sorted(report["unexpected_keys"])
        unused = f" It has others, such as {short_repr(others[0])}." if others else ""
        raise CheckpointError(
            f"{name} lacks {len(missing)} of the weights that {built} needs, or has them in another shape, such as "
            f"{missing[0]}.{unused} Fetch the model again, or use a checkpoint with its masked-LM head, saved with "
            "save_pretrained()."
        )


def refuse_other_attention(model: Any, name: str, attention: str | None) -> None:
    """Raise CheckpointError unless the model computes the requested attention, causal or bidirectional.

    transformers lets `is_causal` in a config switch the mask off (from 5.2), but only where the architecture uses its
    masks. So the model is tried. `name` is that of the checkpoint, for messages.
    """
    texts = torch.tensor([[1, 2, 3, 4, 5], [1, 2, 3, 4, 6]])
    with torch.inference_mode():
        first, second = model(input_ids=texts).logits[:, -2]
    # Two rows of one product may differ in their last bits; a token that is seen changes logits by far more.
    usual = float(first[first.isfinite()].abs().median())
    sees_ahead = not torch.allclose(first, second, rtol=1e-4, atol=1e-4 * usual)
    # Each attention of transformers has this attribute; layers without attention read a text in one direction.
    layers = sum(hasattr(module, "is_causal") for module in model.modules())
    if sees_ahead != (attention == "bidirectional") or (sees_ahead and layers < model.config.num_hidden_layers):
        raise CheckpointError(
            f"{name} cannot be computed with {attention} attention: transformers' {type(model).__name__} does not "
            "switch the causal mask of all layers. Upgrade transformers with pip install -U transformers, or use "
            "another model."
        )


@contextlib.contextmanager
def without_report() -> Iterator[None]:
    """Suppress transformers' table of missing and unused weights: missing ones are refused here."""
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def _gte(name: str, config: dict[str, Any], side: ModelSide) -> tuple[Any, Any, dict[str, Any]]:
    """Return the class of transformers to build, its config, and further arguments."""
    try:
        from transformers import GteConfig
        from transformers.models.auto import modeling_auto
    except ImportError as error:
        raise CheckpointError(
            f'{name} has model_type "{BUILT_AS_GTE}" and needs a transformers with the gte architecture: '
            "pip install -U transformers."
        ) from error
    refuse_other_gte(name, config)
    given = {key: config[key] for key in GTE_KEYS if key in config}
    rope = {"rope_type": "default", "rope_theta": float(config.get("rope_theta", 10000.0))}
    as_gte = GteConfig(**{**GTE_DEFAULTS, **given}, rope_parameters=rope)
    return getattr(modeling_auto, MAPPINGS[side.auto_class])[GteConfig], as_gte, {"key_mapping": GTE_NAMES}


def refuse_other_gte(name: str, config: dict[str, Any]) -> None:
    """Raise CheckpointError if a config of `new` has an option that is not computed here."""
    for key, needed in GTE_CHOICES.items():
        if (found := config.get(key, needed)) != needed:
            raise CheckpointError(
                f"{name} has {key} = {found!r}, which transformers' gte does not support; expected {needed!r}."
            )
    scaling = config.get("rope_scaling")
    if scaling and (kind := scaling.get("type") or scaling.get("rope_type")) != "ntk":
        raise CheckpointError(f'{name} has rope_scaling of type {kind!r}; expected "ntk".')


def _scale_rotations(model: Any, config: dict[str, Any]) -> None:
    """Set the rotary frequencies of NTK scaling, which transformers does not support, for texts of every length."""
    rotary = model.base_model.rotary_emb
    frequencies = rotary_frequencies(config, rotary.inv_freq.numel())
    rotary.inv_freq.copy_(frequencies)
    rotary.original_inv_freq.copy_(frequencies)


def rotary_frequencies(config: dict[str, Any], half: int) -> torch.Tensor:
    """Return the frequency of each of `half` pairs of numbers in a head, from a config of `new`.

    The formulas of NTK scaling are (6) of https://kexue.fm/archives/9706, and with `mixed_b` (10) to (13).
    """
    scaling = config.get("rope_scaling") or {}
    factor, mixed = float(scaling.get("factor", 1.0)), scaling.get("mixed_b")
    places = torch.arange(0, 2 * half, 2, dtype=torch.float32) / (2 * half)
    theta = torch.tensor(float(config.get("rope_theta", 10000.0)), dtype=torch.float32)
    plain = torch.pow(theta, places).reciprocal()
    if factor <= 1.0:
        return plain
    if mixed is None:
        return torch.pow(theta * factor, places).reciprocal() / math.pow(factor, 1 / half)
    steps = torch.arange(1, half + 1, dtype=torch.float32)
    growth = torch.tensor(factor, dtype=torch.float32).log() / math.pow(half, mixed)
    return plain / (growth * torch.pow(steps, mixed)).exp()


def read_table(path: Path) -> list[float]:
    """Read the weights of a query side by token id, from pytorch_model.bin. Raise CheckpointError."""
    table = _read_pickle(path).get("weight")
    if table is None or table.dim() != 1:
        raise damaged(f"{path} has no tensor `weight` with a number for each token")
    weights: list[float] = table.float().tolist()
    return weights
