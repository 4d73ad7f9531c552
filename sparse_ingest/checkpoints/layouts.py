"""The families of checkpoints, each recognised from its files, never from its name.

In: a model folder. Out: a `Checkpoint` that says which folder holds the masked LM and which settings its files
declare. A family that this release cannot build is recognised too, so that the message can name it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from sparse_ingest.checkpoints.locate import fingerprint, locate
from sparse_ingest.errors import CheckpointError

TRANSFORMER_TYPES = ("Transformer", "MLMTransformer")


@dataclass(frozen=True)
class Checkpoint:
    """A model folder that was recognised.

    `declared` holds what its files say about the settings of `[model]`; `transformer` is the folder of the masked LM;
    `max_active_dims` is how many terms of a row its library keeps, None for all.
    """

    name: str
    folder: Path
    revision: str | None
    family: str
    transformer: Path
    declared: dict[str, Any]
    max_active_dims: int | None = None

    @cached_property
    def sha256(self) -> str:
        """The fingerprint of the folder; hashed when it is first asked for, which a query never does."""
        return fingerprint(self.folder)


class Family(NamedTuple):
    """One row of the table: how a family is recognised, and where its masked LM and settings lie.

    `recognise` receives the folder and the last parts of the module types in modules.json (empty without that file).
    """

    name: str
    recognise: Callable[[Path, list[str]], bool]
    read: Callable[[Path], tuple[Path, dict[str, Any]]] | None


def read_checkpoint(name: str, revision: str | None = None) -> Checkpoint:
    """Locate a model and recognise its family.

    Raises:
        CheckpointError: the model is not there, its family is unknown or not built here, or a file is missing.
    """
    located = locate(name, revision)
    types = [_last_part(module["type"]) for module in _modules(located.folder)]
    for family in FAMILIES:
        if family.recognise(located.folder, types):
            if family.read is None:
                raise CheckpointError(
                    f"{name} is a checkpoint of the family {family.name!r}, which this release cannot build."
                )
            transformer, declared = family.read(located.folder)
            _require_weights(name, transformer)
            limit = read_json(located.folder / "config_sentence_transformers.json").get("max_active_dims")
            return Checkpoint(
                name,
                located.folder,
                located.revision,
                family.name,
                transformer,
                declared,
                max_active_dims=limit,
            )
    files = ", ".join(sorted(entry.name for entry in located.folder.iterdir())[:12]) or "nothing"
    tried = "; ".join(family.name for family in FAMILIES)
    raise CheckpointError(
        f"{name} is no checkpoint of a known family. Looked for: {tried}. Found in the folder: {files}."
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a model folder; an absent file is an empty object."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{path} is no JSON: {error}. Fetch the model again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object. Fetch the model again.")
    return content


def _is_symmetric(folder: Path, types: list[str]) -> bool:
    return len(types) == 2 and types[0] in TRANSFORMER_TYPES and types[1] == "SpladePooling"


def _is_masked_lm(folder: Path, types: list[str]) -> bool:
    architectures = read_json(folder / "config.json").get("architectures") or []
    return not types and any(str(name).endswith("ForMaskedLM") for name in architectures)


def _read_symmetric(folder: Path) -> tuple[Path, dict[str, Any]]:
    transformer, pooling = (folder / module.get("path", "") for module in _modules(folder))
    module_config = read_json(transformer / "sentence_bert_config.json") or read_json(
        folder / "sentence_bert_config.json"
    )
    pooling_config = read_json(pooling / "config.json")
    prompts = read_json(folder / "config_sentence_transformers.json").get("prompts") or {}
    document_prompts = (prompts[key] for key in ("document", "passage", "corpus") if key in prompts)
    declared = {
        "activation": pooling_config.get("activation_function"),
        "pooling": pooling_config.get("pooling_strategy"),
        "max_length": module_config.get("max_seq_length"),
        "lower_case": module_config.get("do_lower_case"),
        "document_prompt": next(document_prompts, None),
        "query_prompt": prompts.get("query"),
    }
    return transformer, {key: value for key, value in declared.items() if value is not None}


def _read_masked_lm(folder: Path) -> tuple[Path, dict[str, Any]]:
    return folder, {}


FAMILIES = (
    Family("symmetric SPLADE, sentence-transformers layout", _is_symmetric, _read_symmetric),
    Family("Router with a separate query side", lambda folder, types: bool({"Router", "Asym"} & set(types)), None),
    Family(
        "masked LM with idf.json, plain layout",
        lambda folder, types: not types and (folder / "idf.json").exists(),
        None,
    ),
    Family("masked LM, plain layout", _is_masked_lm, _read_masked_lm),
)


def _modules(folder: Path) -> list[dict[str, Any]]:
    path = folder / "modules.json"
    if not path.exists():
        return []
    try:
        modules = json.loads(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{path} is no JSON: {error}. Fetch the model again.") from error
    if not isinstance(modules, list) or not all(isinstance(entry, dict) and "type" in entry for entry in modules):
        raise CheckpointError(f"{path} must list modules, each with a type. Fetch the model again.")
    foreign = [entry["type"] for entry in modules if not str(entry["type"]).startswith("sentence_transformers.")]
    if foreign:
        raise CheckpointError(f"{path} names remote code ({foreign[0]}), which this release does not run.")
    return sorted(modules, key=lambda entry: int(entry.get("idx", 0)))


def _last_part(dotted: str) -> str:
    """`SpladePooling` from any module path: released libraries moved their classes, the last part stayed."""
    return str(dotted).rpartition(".")[2]


def _require_weights(name: str, folder: Path) -> None:
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{name} has no config.json in {folder}. Fetch the model again.")
    if not list(folder.glob("*.safetensors")):
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt") for path in folder.glob(pattern))
        found = f"found the pickle {pickles[0]}, which is never read" if pickles else "found none"
        raise CheckpointError(
            f"{name} has no weights as safetensors in {folder}: {found}. "
            "Convert it with save_pretrained(), then try again."
        )
