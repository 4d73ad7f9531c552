"""The families of checkpoints: one row of a table for each, with the function that recognizes it by its files.

In: a model folder and its modules. Out: the side of documents and the side of queries, and the settings that their
files declare. Only JSON is read, and no code of a checkpoint runs.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Required, TypedDict

from sparse_ingest.checkpoints.autoencoders import AUTOENCODER, read_autoencoder
from sparse_ingest.checkpoints.modules import (
    Module,
    damaged,
    inside,
    is_splade,
    max_active_dims,
    module_of,
    prompts,
    read_as,
    read_json,
    read_splade,
)
from sparse_ingest.checkpoints.sides import LanguageModelSide, LexicalSide, MaskedLMSide, ModelSide, WeightTableSide
from sparse_ingest.errors import CheckpointError

TABLE_ALONE = "weight table alone, no model"
PLAIN = "masked LM, plain layout"
# Ends of the names of classes of causal language models: of transformers, and of LLM2Vec.
CAUSAL_CLASSES = ("ForCausalLM", "ForMNTP")
# The first is used if a folder has both: some models of OpenSearch have one table in both forms.
TABLE_FILES = ("idf.json", "query_token_weights.txt")
# Two names of one class in sentence-transformers.
ROUTER_TABLES = ("IDF", "SparseStaticEmbedding")

# The output of BGE-M3; the safetensors are converted by other tools.
LEXICAL_FILES = ("sparse_linear.safetensors", "sparse_linear.pt")

Sides = tuple[ModelSide, ModelSide | WeightTableSide]  # of documents, and of queries


class _Parameters(TypedDict, total=False):
    route_mappings: dict[str, str] | None


class _Router(TypedDict, total=False):
    types: Required[dict[str, str]]
    structure: Required[dict[str, list[str]]]
    parameters: _Parameters | None


def _read_symmetric(folder: Path, modules: list[Module]) -> Sides | None:
    if not is_splade(modules):
        return None
    both = prompts(folder)
    return _splade_side(modules, "document", both), _splade_side(modules, "query", both)


def _splade_side(chain: list[Module], task: str, both: dict[str, str]) -> MaskedLMSide:
    transformer, pooling = chain
    declared = read_splade(transformer, pooling, task) | both
    return _lm_side(transformer.folder, declared) or MaskedLMSide(transformer.folder, declared)


def _read_router(folder: Path, modules: list[Module]) -> Sides | None:
    """Read a Router of sentence-transformers: one chain of modules for documents, another for queries."""
    if [module.kind for module in modules] not in (["Router"], ["Asym"]):
        return None
    place = modules[0].folder
    path = place / "router_config.json"
    if not path.exists():  # in the first releases
        path = place / "config.json"
    config = read_as(path, _Router)
    types, structure = config["types"], config["structure"]
    chains: dict[str, list[Module]] = {}
    for task in ("document", "query"):
        names = structure.get(_route(config, task)) or []
        if missing := [name for name in names if name not in types]:
            raise damaged(f"{path} gives no type for the module {missing[0]!r}")
        chains[task] = [module_of(path, types[name], place, name) for name in names]
    if not is_splade(chains["document"]):
        raise CheckpointError(_unknown(path, "documents", chains["document"], "a masked LM and SpladePooling"))
    both = prompts(folder)
    document = _splade_side(chains["document"], "document", both)
    if is_splade(chains["query"]):
        return document, _splade_side(chains["query"], "query", both)
    if len(chains["query"]) == 1 and chains["query"][0].kind in ROUTER_TABLES:
        return document, _read_static_table(folder, chains["query"][0].folder, both)
    expected = f"{' or '.join(ROUTER_TABLES)} alone, or a masked LM and SpladePooling"
    raise CheckpointError(_unknown(path, "queries", chains["query"], expected))


def _route(config: _Router, task: str) -> str:
    """Return the route that the parameters map a task to, else the route of the task's name."""
    parameters = config.get("parameters") or {}
    mapped = {_key(key): route for key, route in (parameters.get("route_mappings") or {}).items()}
    keys = ((task, "text"), (task, None), (None, "text"), (None, None))
    return next((mapped[key] for key in keys if key in mapped), task)


def _key(written: str) -> tuple[Any, ...]:
    """Parse a key of route_mappings: the text of a Python tuple, such as "('query', None)"."""
    try:
        key = ast.literal_eval(written)
    except (ValueError, SyntaxError, RecursionError, MemoryError):  # the last two: many brackets
        return ()
    return key if isinstance(key, tuple) else ()


def _unknown(path: Path, what: str, chain: list[Module], expected: str) -> str:
    found = ", ".join(module.kind for module in chain) or "no module"
    return f"{path} sends {what} through {found}, which is not supported; expected {expected}."


def _read_static_table(root: Path, folder: Path, both: dict[str, str]) -> WeightTableSide:
    declared: dict[str, Any] = {
        "query_special_tokens": "keep",
        "missing_idf_weight": 0.0,
        # Counted without special tokens. A tokenizer without a limit writes 1e30.
        "max_length": read_json(folder / "tokenizer_config.json").get("model_max_length"),
    }
    written = str(read_json(folder / "config.json").get("path") or "")
    if written.endswith(".json"):
        # Written by hand: relative to the module, or to the working directory.
        candidates = [inside(folder / "config.json", root, str(folder / written))]
        if Path(written).resolve().is_relative_to(root.resolve()):
            candidates.append(Path(written))
    else:
        candidates = [folder / name for name in ("model.safetensors", "pytorch_model.bin")]
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        looked = ", ".join(str(path) for path in candidates)
        raise damaged(f"The query side has no weights: looked for {looked}")
    return WeightTableSide(folder, found, {key: value for key, value in (declared | both).items() if value is not None})


def _read_autoencoder(folder: Path, modules: list[Module]) -> Sides | None:
    if not modules or modules[-1].kind != AUTOENCODER:
        return None
    limit = max_active_dims(folder)
    document, query = (read_autoencoder(folder, modules, task, limit) for task in ("document", "query"))
    return document, query


def _read_lexical(folder: Path, _: list[Module]) -> Sides | None:
    """Read the files of BGE-M3. Its modules are those of dense vectors."""
    weights = next((folder / name for name in LEXICAL_FILES if (folder / name).is_file()), None)
    if weights is None or not (folder / "config.json").exists():
        return None
    side = LexicalSide(folder, {"activation": "none"}, weights)
    return side, side


def _lm_side(folder: Path, declared: dict[str, Any]) -> MaskedLMSide | None:
    """Return a side with a vocabulary projection by the names of classes in config.json; None if there is no such."""
    config = read_json(folder / "config.json")
    architectures, references = config.get("architectures"), config.get("auto_map")
    names = [str(name) for name in architectures] if isinstance(architectures, list) else []
    if any(name.endswith("ForMaskedLM") for name in names):
        return MaskedLMSide(folder, declared)
    # The class of a checkpoint's own code may have any name, such as Splade.
    code = references if isinstance(references, dict) else {}
    if any(str(name).endswith(CAUSAL_CLASSES) for name in (*names, *code, *code.values())):
        return LanguageModelSide(folder, _attention(config) | declared)
    return None


def _attention(config: dict[str, Any]) -> dict[str, Any]:
    """Return the attention that a config states; transformers itself writes nothing for a causal language model."""
    is_causal, both_ways = config.get("is_causal"), config.get("use_bidirectional_attention")  # the latter: Gemma
    # `bidirectional` is a key of SPLADE-Code's own code.
    if is_causal is False or both_ways in (True, "all") or config.get("bidirectional") is True:
        return {"attention": "bidirectional"}
    return {"attention": "causal"} if is_causal is True else {}


def _read_plain(folder: Path, modules: list[Module], kind: type[MaskedLMSide]) -> Sides | None:
    side = None if modules else _lm_side(folder, {})
    return (side, side) if type(side) is kind else None


def _read_lm_and_table(folder: Path, modules: list[Module]) -> Sides | None:
    return _read_table(folder, modules) if _lm_side(folder, {}) else None


def _read_table(folder: Path, modules: list[Module]) -> Sides | None:
    """Declare what OpenSearch's model cards and analyzers compute: special tokens weigh 0, unlisted tokens 1.0.

    No file of this layout has the activation, and OpenSearch's models differ: with None, settings.py refuses to guess.
    """
    weights = next((folder / name for name in TABLE_FILES if (folder / name).is_file()), None)
    if modules or weights is None:
        return None
    query = WeightTableSide(folder, weights, {"query_special_tokens": "zero", "missing_idf_weight": 1.0})
    declared = {"document_special_tokens": "zero", "activation": None}
    return _lm_side(folder, declared) or MaskedLMSide(folder, declared), query


class Family(NamedTuple):
    """A row of the table: `read` gets the folder and its modules, and returns None for another family.

    `files` names what it looks for, for a message.
    """

    read: Callable[[Path, list[Module]], Sides | None]
    files: str


# Tried in this order.
FAMILIES = {
    "symmetric SPLADE, sentence-transformers layout": Family(
        _read_symmetric, "modules.json with a masked LM and SpladePooling"
    ),
    "Router with a separate query side": Family(_read_router, "modules.json with a Router"),
    "sparse autoencoder, sentence-transformers layout": Family(
        _read_autoencoder, "modules.json that ends in SparseAutoEncoder"
    ),
    "lexical weights, BGE-M3 layout": Family(_read_lexical, f"config.json with {' or '.join(LEXICAL_FILES)}"),
    "masked LM with idf.json, plain layout": Family(
        _read_lm_and_table, f"config.json of a ...ForMaskedLM with {' or '.join(TABLE_FILES)}"
    ),
    PLAIN: Family(partial(_read_plain, kind=MaskedLMSide), "config.json of a ...ForMaskedLM without modules.json"),
    "language model, plain layout": Family(
        partial(_read_plain, kind=LanguageModelSide), "config.json of a ...ForCausalLM without modules.json"
    ),
    TABLE_ALONE: Family(_read_table, f"{' or '.join(TABLE_FILES)} without modules.json"),
}
