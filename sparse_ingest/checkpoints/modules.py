"""The files by which sentence-transformers describes a model, from 4.2.0.dev0 to 6.x.

In: modules.json, sentence_bert_config.json, a pooling's config.json, config_sentence_transformers.json. Out: modules
by the last part of their type (released versions moved their classes and renamed some, the last part stayed), and the
settings of `[model]` that they declare. Where versions differ the newest is followed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, Required, TypedDict, TypeVar

from sparse_ingest.checkpoints.hub import FILES, PICKLES
from sparse_ingest.errors import CheckpointError
from sparse_ingest.storage import foreign_json
from sparse_ingest.storage.foreign_json import shown

TRANSFORMER_TYPES = ("Transformer", "MLMTransformer")
# The name that sentence-transformers looks for first, and those of its first versions.
TRANSFORMER_CONFIGS = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)

MAX_BYTES = 8 << 20  # of a config; empty lists of that size take 180 MB in Python
T = TypeVar("T")


class _Entry(TypedDict, total=False):
    """A module in modules.json."""

    idx: int
    type: Required[str]
    path: str


class _Transformer(TypedDict, total=False):
    """sentence_bert_config.json, by the names of all releases."""

    transformer_task: str
    processor_kwargs: dict[str, Any] | None
    tokenizer_args: dict[str, Any] | None
    processing_kwargs: dict[str, dict[str, Any] | None] | None
    query_length: int | None
    document_length: int | None
    max_seq_length: int | None
    do_lower_case: bool | None


class _Pooling(TypedDict, total=False):
    activation_function: str | None
    pooling_strategy: str | None


class _Saved(TypedDict, total=False):
    """config_sentence_transformers.json."""

    prompts: dict[str, str | None] | None


class Module(NamedTuple):
    """One module of a model: the last part of its type, and its folder."""

    kind: str
    folder: Path


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a model folder, as `read_as`."""
    return read_as(path, dict[str, Any])


def read_as(path: Path, expected: type[T], max_bytes: int = MAX_BYTES) -> T:
    """Read a JSON file of a model folder as the type that is expected. A missing file is an empty object.

    Raises:
        CheckpointError: it is no JSON, too large or too deep, or something in it has another type.
    """
    try:
        if not path.exists():
            return foreign_json.checked({}, expected)
        return foreign_json.read_json(path, expected, max_bytes)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Fetch the model again.") from error


def read_modules(folder: Path) -> list[Module]:
    """Read the modules of a model folder in their order. There are none without a modules.json."""
    path = folder / "modules.json"
    modules = read_as(path, list[_Entry]) if path.exists() else []
    ordered = sorted(modules, key=lambda entry: entry.get("idx", 0))
    return [module_of(path, entry["type"], folder, entry.get("path", "")) for entry in ordered]


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
    return Module(kind, inside(declared_in, folder, inner))


def inside(declared_in: Path, folder: Path, inner: str) -> Path:
    """Return the path of a file or folder within `folder`, also after links.

    Raises:
        CheckpointError: it is outside.
    """
    root, place = folder.resolve(), folder / inner
    # The hub's cache: models--OWNER--NAME/snapshots/COMMIT/config.json is a link to ../../blobs/HASH.
    roots = [root, *([root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [])]
    try:
        place.exists()
        found = place.resolve()
    except (OSError, ValueError, RuntimeError):  # too long, no path at all, or a ring of links
        found = Path()
    if not any(found.is_relative_to(one) for one in roots):
        raise CheckpointError(f"{declared_in} names {shown(inner)}, which is outside the checkpoint and is not read.")
    return place


def refuse_links(folder: Path) -> None:
    """Raise CheckpointError if a file that is read from a model folder is a link to a place outside."""
    for path in (path for pattern in (*FILES, PICKLES) for path in folder.rglob(pattern)):
        if path.is_symlink():
            inside(folder, folder, str(path.relative_to(folder)))


def is_splade(chain: list[Module]) -> bool:
    """Whether a chain of modules is a masked LM and the pooling of SPLADE, and nothing else."""
    return len(chain) == 2 and chain[0].kind in TRANSFORMER_TYPES and chain[1].kind == "SpladePooling"


def read_splade(transformer: Module, pooling: Module, task: str) -> dict[str, Any]:
    """Read the settings that the files of a masked LM and its pooling declare; `task` is "query" or "document".

    Raises:
        CheckpointError: the transformer is declared to compute something else than a masked LM, or a file lacks or
            holds what no release writes.
    """
    found = (path for name in TRANSFORMER_CONFIGS if (path := transformer.folder / name).exists())
    config = read_as(next(found, transformer.folder / TRANSFORMER_CONFIGS[0]), _Transformer)
    job = config.get("transformer_task", "fill-mask")
    if job != "fill-mask":
        raise CheckpointError(
            f'{transformer.folder} is declared with transformer_task = "{job}"; expected "fill-mask", a masked LM.'
        )
    processor = config.get("processor_kwargs") or config.get("tokenizer_args") or {}
    text = (config.get("processing_kwargs") or {}).get("text") or {}
    of_task = config.get("query_length") if task == "query" else config.get("document_length")
    lengths = (text.get("max_length"), of_task, processor.get("model_max_length"))
    length = next((length for length in lengths if length is not None), config.get("max_seq_length"))
    if length is not None and (type(length) is not int or length <= 0):
        raise CheckpointError(
            f"{transformer.folder} is declared to cut a text at {length!r} tokens; expected a whole number above zero."
        )
    path = pooling.folder / "config.json"
    # A folder without its masked LM may still serve queries; with one, the activation is said nowhere else.
    if not path.exists() and (transformer.folder / "config.json").exists():
        raise CheckpointError(f"The pooling has no settings: looked for {path}. Fetch the model again.")
    splade = read_as(path, _Pooling)
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
    saved = read_as(folder / "config_sentence_transformers.json", _Saved).get("prompts") or {}
    return {f"{side}_prompt": prompt for side in ("document", "query") if (prompt := saved.get(side)) is not None}
