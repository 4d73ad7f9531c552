"""An encoder without memory for texts of a number of tokens."""

from __future__ import annotations

from typing import Any

import pytest

from sparse_ingest.models.documents import DocumentEncoder
from sparse_ingest.models.memory import DocumentTooLarge


def refuse_texts_of(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every encoder raise `DocumentTooLarge` for texts of so many tokens."""
    original = DocumentEncoder._rows

    def fail_if_full(self: Any, inputs: Any, *arguments: Any) -> Any:
        inputs = list(inputs)
        for text, ids in inputs:
            if len(ids) == tokens:
                raise DocumentTooLarge(text, tokens, "cpu")
        return original(self, inputs, *arguments)

    monkeypatch.setattr(DocumentEncoder, "_rows", fail_if_full)
