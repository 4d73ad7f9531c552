"""Router checkpoints of sentence-transformers: one chain of modules for documents, another for queries.

In: router_config.json, or config.json of the first versions (types, structure, parameters). Out: the folder of the
document side's masked LM, and the query side, which is a weight table or a masked LM of its own.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from sparse_ingest.checkpoints.modules import Module, declared_by_splade, is_splade, module_of, prompts, read_json
from sparse_ingest.checkpoints.sides import MaskedLMSide, Sides, WeightTableSide
from sparse_ingest.errors import CheckpointError

# Released sentence-transformers has no class `IDF` any more; the weights are the same.
TABLE_TYPES = ("IDF", "SparseStaticEmbedding")


def read_router(folder: Path, place: Path) -> Sides:
    """Both sides of the router in `place`, a folder of the checkpoint in `folder`.

    Raises:
        CheckpointError: a side is missing, or is a chain of modules that is not built here.
    """
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
    elif len(chains["query"]) == 1 and chains["query"][0].kind in TABLE_TYPES:
        query = _read_static_table(chains["query"][0].folder, both)
    else:
        expected = f"{' or '.join(TABLE_TYPES)} alone, or a masked LM and SpladePooling"
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
