"""Vocabulary of a checkpoint by token id."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.tables import TOKENS, write_table

from sparse_ingest.errors import CheckpointError
from sparse_ingest.queries.weight_table import read_vocabulary


def test_the_vocabulary_comes_from_the_tokenizer_with_the_size_of_the_model(tmp_path: Path) -> None:
    write_table(tmp_path)
    assert read_vocabulary(tmp_path) == TOKENS
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": len(TOKENS) + 2}))
    assert read_vocabulary(tmp_path) == [*TOKENS, None, None]


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer.json cannot be read"):
        read_vocabulary(tmp_path)
    write_table(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"config.json has no vocab_size"):
        read_vocabulary(tmp_path)
