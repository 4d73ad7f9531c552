"""The files by which sentence-transformers describes a model, from 4.2.0.dev0 to 6.x.

In: modules.json, sentence_bert_config.json, a pooling's config.json, config_sentence_transformers.json. Out: modules
by the last part of their type (released versions moved their classes and renamed some, the last part stayed), and the
settings of `[model]` that they declare. Where versions differ the newest is followed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from sparse_ingest.errors import CheckpointError

TRANSFORMER_TYPES = ("Transformer", "MLMTransformer")
# The name that sentence-transformers looks for first, and those of its first versions.
TRANSFORMER_CONFIGS = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)


class Module(NamedTuple):
    """One module of a model: the last part of its type, and its folder."""

    kind: str
    folder: Path


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a model folder. A missing file is an empty object."""
    content = _parse(path) if path.exists() else {}
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object. Fetch the model again.")
    return content


def read_modules(folder: Path) -> list[Module]:
    """Read the modules of a model folder in their order. There are none without a modules.json."""
    path = folder / "modules.json"
    modules = _parse(path) if path.exists() else []
    if not isinstance(modules, list) or not all(isinstance(entry, dict) and "type" in entry for entry in modules):
        raise CheckpointError(f"{path} must list modules, each with a type. Fetch the model again.")
    try:
        ordered = sorted(modules, key=lambda entry: int(entry.get("idx", 0)))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path} gives a module an idx that is no number. Fetch the model again.") from error
    return [module_of(path, str(entry["type"]), folder, str(entry.get("path", ""))) for entry in ordered]


def _parse(path: Path) -> object:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{path} is no JSON: {error}. Fetch the model again.") from error


def module_of(declared_in: Path, dotted: str, folder: Path, inner: str) -> Module:
    """A module from its dotted type and its folder within `folder`.

    Raises:
        CheckpointError: the type is code of the checkpoint's own, or the folder is outside the checkpoint.
    """
    package, _, kind = dotted.rpartition(".")
    if not dotted.startswith("sentence_transformers."):
        # With `trust_remote_code` too: such a module may compute anything, and only its library could run it.
        raise CheckpointError(
            f"{declared_in} names remote code: the module {dotted}, class {kind} of {package or kind}, would run. "
            "Only modules of sentence_transformers are built here; name a checkpoint without modules of its own."
        )
    place = folder / inner
    if not place.resolve().is_relative_to(folder.resolve()):
        raise CheckpointError(f"{declared_in} names the folder {inner!r}, which is outside the checkpoint.")
    return Module(kind, place)


def is_splade(chain: list[Module]) -> bool:
    """Whether a chain of modules is a masked LM and the pooling of SPLADE, and nothing else."""
    return len(chain) == 2 and chain[0].kind in TRANSFORMER_TYPES and chain[1].kind == "SpladePooling"


def read_splade(transformer: Module, pooling: Module, task: str) -> dict[str, Any]:
    """Read the settings that the files of a masked LM and its pooling declare; `task` is "query" or "document".

    Raises:
        CheckpointError: the transformer is declared to compute something else than a masked LM, or a file lacks or
            holds what no release writes.
    """
    configs = (read_json(transformer.folder / name) for name in TRANSFORMER_CONFIGS)
    config = next((found for found in configs if found), {})
    job = config.get("transformer_task", "fill-mask")
    if job != "fill-mask":
        raise CheckpointError(
            f'{transformer.folder} is declared with transformer_task = "{job}"; expected "fill-mask", a masked LM.'
        )
    processor = config.get("processor_kwargs") or config.get("tokenizer_args") or {}
    text = (config.get("processing_kwargs") or {}).get("text") or {}
    lengths = (text.get("max_length"), config.get(f"{task}_length"), processor.get("model_max_length"))
    length = next((length for length in lengths if length is not None), config.get("max_seq_length"))
    if length is not None and (type(length) is not int or length <= 0):
        raise CheckpointError(
            f"{transformer.folder} is declared to cut a text at {length!r} tokens; expected a whole number above zero."
        )
    path = pooling.folder / "config.json"
    # A folder without its masked LM may still serve queries; with one, the activation is said nowhere else.
    if not path.exists() and (transformer.folder / "config.json").exists():
        raise CheckpointError(f"The pooling has no settings: looked for {path}. Fetch the model again.")
    splade = read_json(path)
    declared = {
        "activation": splade.get("activation_function"),
        "pooling": splade.get("pooling_strategy"),
        "max_length": length,
        "lower_case": config.get("do_lower_case"),
    }
    return {key: value for key, value in declared.items() if value is not None}


def prompts(folder: Path) -> dict[str, str]:
    """The prompts of both sides.

    Released sentence-transformers always has a "query" and a "document" here: an absent one is empty, and neither
    `default_prompt_name` nor another name stands in for it.
    """
    path = folder / "config_sentence_transformers.json"
    saved = read_json(path).get("prompts") or {}
    if not isinstance(saved, dict):
        raise CheckpointError(f"{path}: prompts is {saved!r}; expected an object from name to text.")
    return {f"{side}_prompt": saved[side] for side in ("document", "query") if isinstance(saved.get(side), str)}
