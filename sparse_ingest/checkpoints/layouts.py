"""Checkpoints: a model folder with its family, its two sides, and the remote code that it needs.

In: the name of a model. Out: a `Checkpoint`, with the settings that its files declare. Only JSON is read, and no code
of a checkpoint runs. Not covered: how a family is recognized (families.py), and defaults of settings (settings.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sparse_ingest.checkpoints.families import FAMILIES, TABLE_ALONE
from sparse_ingest.checkpoints.locate import fingerprint, locate, package_folders
from sparse_ingest.checkpoints.modules import Module, max_active_dims, read_json, read_modules, refuse_links
from sparse_ingest.checkpoints.sides import AutoencoderSide, LanguageModelSide, MaskedLMSide, ModelSide, WeightTableSide
from sparse_ingest.errors import CheckpointError, short_repr

# Checkpoints of this type have remote code, but transformers has the same architecture under the name `gte`.
BUILT_AS_GTE = "new"


@dataclass(frozen=True)
class Checkpoint:
    """A recognized model folder.

    `document` and `query` are its sides, with the settings of `[model]` that their files declare. `max_active_dims` is
    the number of terms of a row that its library keeps; None: all.
    """

    name: str
    folder: Path
    revision: str | None
    family: str
    document: ModelSide
    query: ModelSide | WeightTableSide
    max_active_dims: int | None

    @cached_property
    def sha256(self) -> str:
        """The fingerprint of the folder, computed on first access."""
        return fingerprint(self.folder)

    @property
    def transformer(self) -> Path:
        """The folder of the document side, with its model and tokenizer."""
        return self.document.folder

    @property
    def declared(self) -> dict[str, Any]:
        """The settings that the files of the document side declare."""
        return self.document.declared

    @property
    def encodes_documents(self) -> bool:
        """Return False for a weight table alone, which serves queries only."""
        return self.family != TABLE_ALONE


def read_checkpoint(name: str, revision: str | None = None, *, code: bool = False) -> Checkpoint:
    """Locate a model and recognize its family. `code` also fetches its Python files, which are not run.

    Raise `CheckpointError` if the model is not found, its family is unknown or not supported, or a file is missing.
    """
    folder, commit = locate(name, revision, code=code)
    refuse_links(folder)
    modules = read_modules(folder)
    for family, row in FAMILIES.items():
        if sides := row.read(folder, modules):
            limit = max_active_dims(folder) or (sides[0].k if isinstance(sides[0], AutoencoderSide) else None)
            return Checkpoint(name, folder, commit, family, *sides, limit)
    raise CheckpointError(_unknown(name, folder, modules))


def _unknown(name: str, folder: Path, modules: list[Module]) -> str:
    """Return the message for a folder of no known family."""
    files = ", ".join(sorted(entry.name for entry in folder.iterdir())[:12]) or "nothing"
    chain = f" Its modules: {', '.join(module.kind for module in modules)}." if modules else ""
    config = read_json(folder / "config.json")
    architectures = config.get("architectures")
    built = ", ".join(map(str, architectures)) if isinstance(architectures, list) else ""
    own = " with code of its own (auto_map)" if config.get("auto_map") else ""
    model = f" Its config.json names {short_repr(built)}{own}." if built or own else ""
    looked = "; ".join(f"{family} ({row.files})" for family, row in FAMILIES.items())
    return (
        f"{name} is not a checkpoint of a known family. Looked for: {looked}. Found in the folder: {files}."
        f"{chain}{model} Models whose weights are computed only by their own code, such as gte-multilingual and "
        "MILCO, are not supported. Use another model."
    )


def remote_code(folder: Path, auto_class: str = MaskedLMSide.auto_class) -> str | None:
    """Return the remote code that a model needs, None for an architecture that transformers itself can build."""
    repository, dashes, local = code_reference(folder, auto_class).rpartition("--")
    file, _, name = local.rpartition(".")
    return f"class {name} of {file}.py" + (f" of the repository {repository}" if dashes else "") if name else None


def trusted_code(checkpoint: Checkpoint, side: ModelSide, *, trusted: bool) -> str | None:
    """Return which remote code of a model will run and where it is from; None if there is none.

    Raise `CheckpointError` if it is not trusted, or is in another repository, which no revision pins.
    """
    code = remote_code(side.folder, side.auto_class)
    if code is None:
        return None
    place = f"revision {checkpoint.revision}" if checkpoint.revision else str(checkpoint.folder)
    if isinstance(side, LanguageModelSide):
        raise CheckpointError(
            f"{checkpoint.name} is a causal language model with remote code: {code}. transformers has no architecture "
            f"{short_repr(read_json(side.folder / 'config.json').get('model_type'))}, and code of such a model never "
            "runs here. Use a copy of the folder with the config.json of its architecture, such as qwen3 or llama, and "
            "is_causal = false in it."
        )
    if not trusted:
        raise CheckpointError(
            f"{checkpoint.name} has remote code: {code} ({place}) would run. Read it, then allow it with "
            "--trust-remote-code or [model] trust_remote_code = true."
        )
    if "--" in code_reference(side.folder, side.auto_class):
        raise CheckpointError(
            f"{checkpoint.name} ({place}) has its code in another repository, which its revision does not pin: {code}. "
            "Copy the model's folder, put those files into the copy, name them in its auto_map, and use the copy."
        )
    return f"{code} ({place})"


def code_reference(folder: Path, auto_class: str) -> str:
    """Return the entry of auto_map that is needed to build a model of this class, or an empty string."""
    config = read_json(folder / "config.json")
    references = config.get("auto_map") or {}
    kind = str(config.get("model_type") or "")
    if not references or kind == BUILT_AS_GTE or transformers_has(kind):
        return ""
    references = references if isinstance(references, dict) else {"": references}
    return str(references.get(auto_class) or next(iter(references.values())))


def transformers_has(kind: str) -> bool:
    """Return whether the installed transformers has an architecture, without importing it, which takes seconds."""
    name = kind.replace("-", "_")
    return name[:100].isidentifier() and any(
        (folder / "models" / name[:100]).is_dir() for folder in package_folders("transformers")
    )
