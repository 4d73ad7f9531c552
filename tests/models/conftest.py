"""Tiny checkpoints, created once per session."""

from __future__ import annotations

import pytest
from support.checkpoints import make_all
from support.families import Twin, make_twins


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Every checkpoint of `CHECKPOINTS`: name to the value of `--model`."""
    return make_all(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="session")
def twins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Twin]:
    return make_twins(tmp_path_factory.mktemp("twins"))
