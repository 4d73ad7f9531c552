"""Build each encoder once: a build of the packaged model takes 0.4 s, and a test module names it many times."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from sparse_ingest.models import documents
from sparse_ingest.searching import batches


def keep_models(patch: pytest.MonkeyPatch) -> None:
    """Give the same encoder again for arguments of the same `repr`, until the patch is undone."""
    for module, name in ((documents, "build_document_encoder"), (batches, "query_encoder")):
        patch.setattr(module, name, _kept(getattr(module, name)))


def _kept(build: Callable[..., Any]) -> Callable[..., Any]:
    built: dict[str, Any] = {}

    def build_once(*arguments: Any, **options: Any) -> Any:
        key = repr((arguments, options))
        if key not in built:
            built[key] = build(*arguments, **options)
        return built[key]

    return build_once
