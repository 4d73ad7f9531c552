"""The tiny checkpoints, made once a session."""

from __future__ import annotations

import pytest
from support.checkpoints import make_all


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Every checkpoint of `CHECKPOINTS`: name to what `--model` is given."""
    return make_all(tmp_path_factory.mktemp("checkpoints"))
