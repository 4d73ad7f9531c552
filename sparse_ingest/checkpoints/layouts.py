"""The families of checkpoints, each recognised from its files, never from its name.

In: a model folder. Out: a `Checkpoint` that says where its document side and its query side lie and which settings
their files declare. Only JSON is read: weights may be absent where they are not needed, and no code of a checkpoint
runs. Not covered: Router folders (routers.py), and what stands for a setting that no file declares (settings.py).
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from sparse_ingest.checkpoints.locate import fingerprint, locate
from sparse_ingest.checkpoints.modules import (
    Module,
    declared_by_splade,
    is_splade,
    module_of,
    prompts,
    read_json,
    read_modules,
)
from sparse_ingest.errors import CheckpointError

TABLE_ALONE = "weight table alone, no model"
# Checkpoints of this type come with remote code, but transformers has the same architecture under the name `gte`.
BUILT_AS_GTE = "new"
# In this order where a folder has both: OpenSearch's models ship the same table twice.
TABLE_FILES = ("idf.json", "query_token_weights.txt")

# Released sentence-transformers has no class `IDF` any more; the weights are the same.
ROUTER_TABLES = ("IDF", "SparseStaticEmbedding")


class MaskedLMSide(NamedTuple):
    """A masked LM in `folder`, with its tokenizer beside it."""

    folder: Path
    declared: dict[str, Any]


class WeightTableSide(NamedTuple):
    """A weight for each token in the file `weights`, and the tokenizer in `folder`; no model is needed.

    `weights` is idf.json (token string to weight), query_token_weights.txt (the same as lines), or the tensor `weight`
    by token id in model.safetensors or pytorch_model.bin.
    """

    folder: Path
    weights: Path
    declared: dict[str, Any]


class Sides(NamedTuple):
    """Both sides of a checkpoint: the folder of the documents' masked LM with what it declares, and the query side."""

    transformer: Path
    declared: dict[str, Any]
    query: MaskedLMSide | WeightTableSide


@dataclass(frozen=True)
class Checkpoint:
    """A model folder that was recognised.

    `transformer` is the folder of the document side's masked LM and `declared` what its files say about the settings
    of `[model]`; `query` is the query side; `max_active_dims` is how many terms of a row its library keeps, None for
    all.
    """

    name: str
    folder: Path
    revision: str | None
    family: str
    transformer: Path
    query: MaskedLMSide | WeightTableSide
    declared: dict[str, Any]
    max_active_dims: int | None = None

    @cached_property
    def sha256(self) -> str:
        """The fingerprint of the folder; hashed when it is first asked for, which a query never does."""
        return fingerprint(self.folder)

    @property
    def remote_code(self) -> str | None:
        """What of the checkpoint's own code would run to build its document side, None when nothing would."""
        return remote_code(self.transformer)


class Family(NamedTuple):
    """One row of the table: how a family is recognised, and how its sides are read.

    Both receive the folder and its modules, which are none without a modules.json.
    """

    name: str
    recognise: Callable[[Path, list[Module]], bool]
    read: Callable[[Path, list[Module]], Sides]


def read_checkpoint(name: str, revision: str | None = None, *, code: bool = False) -> Checkpoint:
    """Locate a model and recognise its family; `code` fetches the model's own Python files too, and runs none.

    Raises:
        CheckpointError: the model is not there, its family is unknown or not built here, or a file is missing.
    """
    located = locate(name, revision, code=code)
    folder = located.folder
    modules = read_modules(folder)
    for family in FAMILIES:
        if family.recognise(folder, modules):
            sides = family.read(folder, modules)
            return Checkpoint(
                name=name,
                folder=folder,
                revision=located.revision,
                family=family.name,
                transformer=sides.transformer,
                query=sides.query,
                declared=sides.declared,
                max_active_dims=_max_active_dims(folder),
            )
    files = ", ".join(sorted(entry.name for entry in folder.iterdir())[:12]) or "nothing"
    tried = "; ".join(family.name for family in FAMILIES)
    chain = f" Its modules: {', '.join(module.kind for module in modules)}." if modules else ""
    raise CheckpointError(
        f"{name} is no checkpoint of a known family. Looked for: {tried}. Found in the folder: {files}.{chain}"
    )


def _max_active_dims(folder: Path) -> int | None:
    path = folder / "config_sentence_transformers.json"
    limit = read_json(path).get("max_active_dims")
    if limit is not None and (type(limit) is not int or limit <= 0):
        raise CheckpointError(f"{path}: max_active_dims is {limit!r}; expected a whole number above zero.")
    return limit


def remote_code(folder: Path) -> str | None:
    """What code of its own a masked LM brings for an architecture that transformers itself cannot build.

    Known architectures that bring code as well are built without it, and so is `model_type = "new"`.
    """
    repository, dashes, local = _code_reference(folder).rpartition("--")
    file, _, name = local.rpartition(".")
    return f"class {name} of {file}.py" + (f" of the repository {repository}" if dashes else "") if name else None


def trusted_code(checkpoint: Checkpoint, folder: Path, *, trusted: bool) -> str | None:
    """What of a masked LM's own code will run and where it comes from, None when nothing will.

    Raises:
        CheckpointError: it is not trusted, or lies in another repository, where no revision pins it.
    """
    code = remote_code(folder)
    if code is None:
        return None
    place = f"revision {checkpoint.revision}" if checkpoint.revision else str(checkpoint.folder)
    if not trusted:
        raise CheckpointError(
            f"{checkpoint.name} brings remote code: {code} ({place}) would run. Read it, then allow it with "
            "--trust-remote-code or [model] trust_remote_code = true."
        )
    if "--" in _code_reference(folder):
        raise CheckpointError(
            f"{checkpoint.name} ({place}) takes its code from elsewhere, where its revision pins nothing: {code}. "
            "Put those files into a copy of the model's folder, name them in its auto_map, and load the copy."
        )
    return f"{code} ({place})"


def _code_reference(folder: Path) -> str:
    """The entry of auto_map that building the masked LM would follow, empty when none."""
    config = read_json(folder / "config.json")
    references = config.get("auto_map") or {}
    kind = str(config.get("model_type") or "")
    if not references or kind == BUILT_AS_GTE or transformers_has(kind):
        return ""
    return str(references.get("AutoModelForMaskedLM") or next(iter(references.values())))


def transformers_has(kind: str) -> bool:
    """Whether the installed transformers has an architecture, by its folders: importing it takes seconds."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or not spec.submodule_search_locations or not kind:
        return False
    return any(
        (Path(location) / "models" / kind.replace("-", "_")).is_dir() for location in spec.submodule_search_locations
    )


def _read_symmetric(folder: Path, modules: list[Module]) -> Sides:
    transformer, pooling = modules
    of_query, of_document = (declared_by_splade(transformer, pooling, task) for task in ("query", "document"))
    both = prompts(folder)
    return Sides(transformer.folder, of_document | both, MaskedLMSide(transformer.folder, of_query | both))


def _read_router(folder: Path, modules: list[Module]) -> Sides:
    """Both sides of the router in `place`, a folder of the checkpoint in `folder`.

    Raises:
        CheckpointError: a side is missing, or is a chain of modules that is not built here.
    """
    place = modules[0].folder
    path = place / "router_config.json"
    if not path.exists():
        path = place / "config.json"
    config = read_json(path)
    types: Any = config.get("types")
    structure: Any = config.get("structure")
    if not all(isinstance(part, dict) for part in (types, structure, config.get("parameters") or {})):
        raise CheckpointError(f"{path} must hold a router's types, structure and parameters. Fetch the model again.")
    chains: dict[str, list[Module]] = {}
    for task in ("document", "query"):
        names = structure.get(_route(config, task)) or []
        if missing := [name for name in names if name not in types]:
            raise CheckpointError(f"{path} gives no type for the module {missing[0]!r}. Fetch the model again.")
        chains[task] = [module_of(path, str(types[name]), place, name) for name in names]
    if not is_splade(chains["document"]):
        raise CheckpointError(_unknown(path, "documents", chains["document"], "a masked LM and SpladePooling"))
    both = prompts(folder)
    transformer, pooling = chains["document"]
    declared = declared_by_splade(transformer, pooling, "document") | both
    query: MaskedLMSide | WeightTableSide
    if is_splade(chains["query"]):
        of_query, pooling = chains["query"]
        query = MaskedLMSide(of_query.folder, declared_by_splade(of_query, pooling, "query") | both)
    elif len(chains["query"]) == 1 and chains["query"][0].kind in ROUTER_TABLES:
        query = _read_static_table(chains["query"][0].folder, both)
    else:
        expected = f"{' or '.join(ROUTER_TABLES)} alone, or a masked LM and SpladePooling"
        raise CheckpointError(_unknown(path, "queries", chains["query"], expected))
    return Sides(transformer.folder, declared, query)


def _route(config: dict[str, Any], task: str) -> str:
    """The route of a task: what the parameters map it to, else the route of that name."""
    parameters = config.get("parameters") or {}
    mapped = {_key(key): route for key, route in (parameters.get("route_mappings") or {}).items()}
    for key in ((task, "text"), (task, None), (None, "text"), (None, None)):
        if key in mapped:
            return str(mapped[key])
    return task


def _key(written: str) -> tuple[Any, ...]:
    """A key of route_mappings, which is written as Python writes a tuple: "('query', None)"."""
    try:
        key = ast.literal_eval(written)
    except (ValueError, SyntaxError):
        return ()
    return key if isinstance(key, tuple) else ()


def _unknown(path: Path, what: str, chain: list[Module], expected: str) -> str:
    found = ", ".join(module.kind for module in chain) or "no module"
    return f"{path} sends {what} through {found}, which this release cannot build; expected is {expected}."


def _read_static_table(folder: Path, both: dict[str, str]) -> WeightTableSide:
    declared: dict[str, Any] = {
        "query_special_tokens": "keep",
        "missing_idf_weight": 0.0,
        # Its tokenizer cuts there, without special tokens; one that has no limit writes 1e30.
        "max_length": read_json(folder / "tokenizer_config.json").get("model_max_length"),
    }
    written = str(read_json(folder / "config.json").get("path") or "")
    if written.endswith(".json"):
        # Written by hand: relative to the module, or to where the library was started.
        candidates = [folder / written, Path(written)]
    else:
        candidates = [folder / name for name in ("model.safetensors", "pytorch_model.bin")]
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        looked = ", ".join(str(path) for path in candidates)
        raise CheckpointError(f"The query side has no weights: looked for {looked}. Fetch the model again.")
    return WeightTableSide(folder, found, {key: value for key, value in (declared | both).items() if value is not None})


def _is_masked_lm(folder: Path, modules: list[Module]) -> bool:
    architectures = read_json(folder / "config.json").get("architectures")
    known = isinstance(architectures, list) and any(str(name).endswith("ForMaskedLM") for name in architectures)
    return known and not modules


def _read_masked_lm(folder: Path, modules: list[Module]) -> Sides:
    return Sides(folder, {}, MaskedLMSide(folder, {}))


def _has_table(folder: Path, modules: list[Module]) -> bool:
    return not modules and any((folder / name).is_file() for name in TABLE_FILES)


def _read_table(folder: Path, modules: list[Module]) -> Sides:
    """As OpenSearch's own cards and analyzers compute them: special tokens weigh nothing, unlisted tokens 1.0."""
    weights = next(folder / name for name in TABLE_FILES if (folder / name).is_file())
    query = WeightTableSide(folder, weights, {"query_special_tokens": "zero", "missing_idf_weight": 1.0})
    return Sides(folder, {"document_special_tokens": "zero"}, query)


# Recognised in this order.
FAMILIES = (
    Family(
        "symmetric SPLADE, sentence-transformers layout", lambda folder, modules: is_splade(modules), _read_symmetric
    ),
    Family(
        "Router with a separate query side",
        lambda folder, modules: [module.kind for module in modules] in (["Router"], ["Asym"]),
        _read_router,
    ),
    Family(
        "masked LM with idf.json, plain layout",
        lambda folder, modules: _has_table(folder, modules) and _is_masked_lm(folder, modules),
        _read_table,
    ),
    Family("masked LM, plain layout", _is_masked_lm, _read_masked_lm),
    Family(TABLE_ALONE, _has_table, _read_table),
)
