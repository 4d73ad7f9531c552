"""The JSON files of sentence-transformers, from 4.2.0.dev0 to 6.x: modules and settings of a model.

A module is known by the last part of its type: releases moved their classes. Where releases differ, the newest counts.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Required, TypedDict, TypeVar

from msgspec import Meta

from sparse_ingest.checkpoints.hub import FILES, PICKLES
from sparse_ingest.errors import CheckpointError, short_repr
from sparse_ingest.storage import foreign_json

TRANSFORMER_TYPES = ("Transformer", "MLMTransformer")
# The current name first, then the names in early releases.
TRANSFORMER_CONFIGS = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
SAVED = "config_sentence_transformers.json"
MAX_CONFIG_BYTES = 8 << 20  # of a config; empty lists of that size take 180 MB in Python
Length = Annotated[int, Meta(ge=1)] | None
T = TypeVar("T")


class _Entry(TypedDict, total=False):
    """A module in modules.json."""

    idx: int
    type: Required[str]
    path: str


class _Lengths(TypedDict, total=False):
    max_length: Length
    model_max_length: Length


class _Settings(TypedDict, total=False):
    """Settings by the names of all releases."""

    # sentence_bert_config.json
    transformer_task: str
    processor_kwargs: _Lengths | None
    tokenizer_args: _Lengths | None
    processing_kwargs: dict[str, _Lengths | None] | None
    modality_config: dict[str, Any] | None
    query_length: Length
    document_length: Length
    max_seq_length: Length
    do_lower_case: bool | None
    # config.json of the pooling
    activation_function: str | None
    pooling_strategy: str | None
    # config_sentence_transformers.json
    prompts: dict[str, str | None] | None
    max_active_dims: Length


class Module(NamedTuple):
    """One module of a model: the last part of its type, and its folder."""

    kind: str
    folder: Path


def damaged(message: str) -> CheckpointError:
    """Return an error with the advice to fetch the model again."""
    return CheckpointError(f"{message}. Fetch the model again.")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of a model folder, as `read_as`."""
    return read_as(path, dict[str, Any])


def read_as(path: Path, expected: type[T], max_bytes: int = MAX_CONFIG_BYTES) -> T:
    """Read a JSON file of a model folder as the expected type. A missing file is an empty object.

    Raise `CheckpointError` if it is not JSON, too large or too deep, or a value has another type.
    """
    try:
        if not path.exists():
            return foreign_json.checked({}, expected)
        return foreign_json.read_json(path, expected, max_bytes)
    except (OSError, ValueError) as error:
        raise damaged(f"{path} cannot be read: {error}") from error


def read_modules(folder: Path) -> list[Module]:
    """Read the modules of a model folder in their order; without a modules.json the list is empty."""
    path = folder / "modules.json"
    modules = read_as(path, list[_Entry]) if path.exists() else []
    ordered = sorted(modules, key=lambda entry: entry.get("idx", 0))
    return [module_of(path, entry["type"], folder, entry.get("path", "")) for entry in ordered]


def module_of(declared_in: Path, dotted: str, folder: Path, inner: str) -> Module:
    """Return a module from its dotted type and its folder. Raise CheckpointError for code, or outside of the model."""
    package, _, kind = dotted.rpartition(".")
    if not dotted.startswith("sentence_transformers."):
        # Also with `trust_remote_code`: such a module may compute anything, and only its library could run it.
        raise CheckpointError(
            f"{declared_in} names remote code: the module {dotted}, class {kind} of {package or kind}, would run. "
            "Only modules of sentence_transformers are supported. Use a checkpoint without other modules."
        )
    return Module(kind, inside(declared_in, folder, inner))


def inside(declared_in: Path, folder: Path, inner: str) -> Path:
    """Return a path within `folder`. Raise CheckpointError if it is outside, also through a link."""
    root, place = folder.resolve(), folder / inner
    # In the hub's cache models--OWNER--NAME/snapshots/COMMIT/config.json is a link to ../../blobs/HASH.
    roots = [root, *([root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [])]
    try:
        with suppress(FileNotFoundError, NotADirectoryError):
            place.stat()
        found = place.resolve()
    except (OSError, ValueError):  # too long, a NUL byte, or a loop of links
        found = Path()
    if not any(found.is_relative_to(one) for one in roots):
        raise CheckpointError(
            f"{declared_in} names {short_repr(inner)}, which is outside the checkpoint. It is not read."
        )
    return place


def refuse_links(folder: Path) -> None:
    """Raise CheckpointError if a file that is read from a model folder is a link out of it."""
    for path in (path for pattern in (*FILES, PICKLES) for path in folder.rglob(pattern)):
        if path.is_symlink():
            inside(folder, folder, str(path.relative_to(folder)))


def is_splade(chain: list[Module]) -> bool:
    """Return whether a chain of modules is a masked LM and SpladePooling, and nothing else."""
    return len(chain) == 2 and chain[0].kind in TRANSFORMER_TYPES and chain[1].kind == "SpladePooling"


def read_transformer(transformer: Module, task: str, expected: str) -> dict[str, Any]:
    """Read the settings that the files of a transformer declare; `task` is "query" or "document".

    Raise `CheckpointError` if it is declared with another transformer_task than `expected`, or a file is malformed.
    """
    found = (path for name in TRANSFORMER_CONFIGS if (path := transformer.folder / name).exists())
    path = next(found, transformer.folder / TRANSFORMER_CONFIGS[0])
    config = read_as(path, _Settings)
    if "message" in (config.get("modality_config") or {}):
        raise CheckpointError(
            f"{path} has modality_config.message: sentence-transformers puts each text into the chat template of the "
            "tokenizer, which is not supported. Use another model."
        )
    if (job := config.get("transformer_task", expected)) != expected:
        raise CheckpointError(
            f'{transformer.folder} is declared with transformer_task = "{job}"; expected "{expected}".'
        )
    processor = config.get("processor_kwargs") or config.get("tokenizer_args") or {}
    text = (config.get("processing_kwargs") or {}).get("text") or {}
    of_task = config.get("query_length") if task == "query" else config.get("document_length")
    lengths = (text.get("max_length"), of_task, processor.get("model_max_length"))
    length = next((length for length in lengths if length is not None), config.get("max_seq_length"))
    declared = {"max_length": length, "lower_case": config.get("do_lower_case")}
    return {key: value for key, value in declared.items() if value is not None}


def read_splade(transformer: Module, pooling: Module, task: str) -> dict[str, Any]:
    """Read the settings that the files of a masked LM and its pooling declare, as `read_transformer`."""
    declared = read_transformer(transformer, task, "fill-mask")
    path = pooling.folder / "config.json"
    # A folder without its masked LM may still serve queries. With one, no other file has the activation.
    if not path.exists() and (transformer.folder / "config.json").exists():
        raise damaged(f"The pooling has no settings: looked for {path}")
    splade = read_as(path, _Settings)
    of_pooling = {"activation": splade.get("activation_function"), "pooling": splade.get("pooling_strategy")}
    return declared | {key: value for key, value in of_pooling.items() if value is not None}


def prompts(folder: Path) -> dict[str, str]:
    """Return the prompts of both sides. As in sentence-transformers, `default_prompt_name` does not replace one."""
    saved = read_as(folder / SAVED, _Settings).get("prompts") or {}
    return {f"{side}_prompt": prompt for side in ("document", "query") if (prompt := saved.get(side)) is not None}


def max_active_dims(folder: Path) -> int | None:
    """Return the number of terms of a row that the library of the checkpoint keeps; None: all."""
    return read_as(folder / SAVED, _Settings).get("max_active_dims")
