"""pyproject.toml, constraints.txt, the Makefile and SECURITY.md agree."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LINES = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]


def requirements() -> Iterator[Requirement]:
    """Yield the requirements of the project, its extras and its dependency groups, without those on itself."""
    extras = PROJECT["project"]["optional-dependencies"]
    for group in (PROJECT["project"]["dependencies"], *extras.values(), *PROJECT["dependency-groups"].values()):
        for text in group:
            if isinstance(text, str) and not text.startswith("sparse-ingest["):
                yield Requirement(text)


def test_constraints_are_exact_versions_without_an_address() -> None:
    pattern = r"[\w.-]+==[\w.!+]+( ; [\w .'<>=!()]+)?"
    assert [line for line in LINES if not re.fullmatch(pattern, line)] == []


def test_constraints_have_a_version_that_fits_every_requirement() -> None:
    """If this fails, pyproject.toml changed: run `make lock`."""
    versions: dict[str, list[str]] = {}
    for line in LINES:
        name, _, version = line.partition(" ;")[0].partition("==")
        versions.setdefault(canonicalize_name(name), []).append(version)
    unfit = [
        str(requirement)
        for requirement in requirements()
        if not (known := versions.get(canonicalize_name(requirement.name)))
        or not all(requirement.specifier.contains(version) for version in known)
    ]
    assert unfit == []


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13", "3.14"])
def test_each_distribution_has_one_version_per_python(python: str) -> None:
    environment = {"python_version": python, "python_full_version": f"{python}.9", "sys_platform": "linux"}
    names = [
        constraint.name
        for constraint in map(Requirement, LINES)
        if constraint.marker is None or constraint.marker.evaluate(environment)
    ]
    assert len(names) == len(set(names)) > 100


def test_make_installs_existing_extras_and_groups() -> None:
    installed = re.findall(r"^INSTALL_\w+ := (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    groups = set(re.findall(r"--group (\w+)", " ".join(installed)))
    extras = {name for listed in re.findall(r"\.\[([\w,]+)\]", " ".join(installed)) for name in listed.split(",")}
    assert groups == set(PROJECT["dependency-groups"])
    assert {"demo"} <= extras <= set(PROJECT["project"]["optional-dependencies"])


def test_the_tests_that_security_md_names_exist() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", (ROOT / "SECURITY.md").read_text())
    assert named
    assert [f"{path}::{test}" for path, test in named if f"def {test}(" not in (ROOT / path).read_text()] == []
