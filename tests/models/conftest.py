"""The tiny checkpoints, made once a session: architecture and layout to folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_checkpoints import ARCHITECTURES, make_masked_lm, make_splade_card, save_sparse_encoder

PACKAGED = "package:cognition/model"
# RoBERTa's plain checkpoint says its limit in the tokenizer: sentence-transformers knows no offset of positions.
PLAIN = {architecture: f"plain-{architecture}" for architecture in ARCHITECTURES}
CHECKPOINTS = (
    *PLAIN.values(),
    "card-bert", "card-distilbert", "card-roberta", "card-log1p_relu",
    "saved-bert", "saved-roberta",
    PACKAGED,
)  # fmt: skip


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Every checkpoint of `CHECKPOINTS` by name."""
    root: Path = tmp_path_factory.mktemp("checkpoints")
    made = {name: make_masked_lm(root / name, kind, model_max_length=64) for kind, name in PLAIN.items()}
    for kind in ARCHITECTURES:
        made[f"card-{kind}"] = make_splade_card(
            root / f"card-{kind}", kind, max_seq_length=40, lower_case=True, cased=True, prompts={"document": "fire: "}
        )
    made["card-log1p_relu"] = make_splade_card(root / "card-log1p_relu", activation="log1p_relu")
    for kind in ("bert", "roberta"):
        made[f"saved-{kind}"] = save_sparse_encoder(
            root / f"saved-{kind}",
            make_masked_lm(root / f"source-{kind}", kind, cased=True, seed=2),
            prompts={"query": "search ", "document": "Stone: "},
            max_seq_length=30,
            lower_case=True,
        )
    return {**{name: str(folder) for name, folder in made.items()}, PACKAGED: PACKAGED}
