"""A checkpoint folder whose queries use a weight table: a tiny tokenizer.json and idf.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "catch", "an", "except", "##ion", "river", "stone"]
WEIGHTS = {"catch": 2.5, "an": 0.1, "except": 4.75, "##ion": 2.5, "[CLS]": 1.0, "[UNK]": 1.0, "stone": 0.0}


def write_table(folder: Path, tokens: Sequence[str] = TOKENS, weights: Mapping[str, float] = WEIGHTS) -> Path:
    """Write the folder. `tokens` begin with the special tokens of TOKENS."""
    folder.mkdir(exist_ok=True)
    tokenizer = Tokenizer(models.WordPiece({token: place for place, token in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(TOKENS[:4])
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    # Training scripts save this truncation and padding; queries must ignore it.
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "idf.json").write_text(json.dumps(weights))
    return folder
