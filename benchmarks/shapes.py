"""Models with random weights in the layout of named ones, and texts for them, created without network access."""

from __future__ import annotations

import re
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": ("Bert", {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 512}),
    "mini": ("Bert", {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024}),
    "distilbert": ("DistilBert", {}),
    "gte-base": ("Gte", {"vocab_size": 30522, "type_vocab_size": 0}),
    "xlm-r": ("XLMRoberta", {"vocab_size": 250_002, "max_position_embeddings": 514, "type_vocab_size": 1}),
}
TERMS = 200  # of a document, about as many as those of a trained model
# Replaces gte-base if transformers does not have Gte.
MODERN_BERT = {
    "vocab_size": 30522, "pad_token_id": 0, "bos_token_id": 101, "cls_token_id": 101, "eos_token_id": 102,
    "sep_token_id": 102,
}  # fmt: skip


def make_shape(shape: str, folder: Path) -> Path:
    """Write random weights of a shape with the tokenizer of the demo's model, which has BERT's vocabulary.

    If that model is not installed, or the shape has another vocabulary, the tokenizer has as many words as the shape,
    those of Python's documentation and invented ones.
    """
    import shutil

    import torch
    import transformers

    family, sizes = SHAPES[shape]
    if shape == "gte-base" and not hasattr(transformers, "GteForMaskedLM"):
        family, sizes = "ModernBert", MODERN_BERT
        print("This transformers has no Gte: measuring ModernBERT-base in place of gte-base.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, f"{family}ForMaskedLM")(getattr(transformers, f"{family}Config")(**sizes))
        with torch.inference_mode():
            largest = model.eval()(torch.randint(model.config.vocab_size, (4, 100))).logits.amax(1).mean(0)
        bias = model.get_output_embeddings().bias.data.normal_(0, 0.4)
        bias -= (largest + bias).topk(TERMS).values.min()
    model.save_pretrained(folder)
    if find_spec("cognition") and model.config.vocab_size == 30522:
        from sparse_ingest.checkpoints.layouts import read_checkpoint

        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(read_checkpoint("package:cognition/model").folder / name, folder)
    else:
        (folder / "vocab.txt").write_text("\n".join(vocabulary(model.config.vocab_size)))
        transformers.BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=512).save_pretrained(folder)
    return folder


def vocabulary(size: int) -> list[str]:
    """Return special tokens, letters, the most frequent words of Python's documentation, and invented words."""
    from pydoc_data.topics import topics

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [chr(code) for code in range(33, 127)]
    words = Counter(re.findall(r"[a-z]{2,}", " ".join(topics.values()).lower()))
    known = [*special, *letters, *(f"##{letter}" for letter in letters), *(word for word, _ in words.most_common())]
    return [*known, *(f"##invented{number}" for number in range(size))][:size]


def read_texts(corpus: str | None, count: int, join: int = 1) -> list[str]:
    """Return the texts to encode, each of `join` texts of the corpus, repeated if there are too few."""
    if corpus is None:
        from pydoc_data.topics import topics

        from sparse_ingest.cli.demo import passages

        texts = [f"{passage.title} {passage.text}" for passage in passages(topics)]
    else:
        from sparse_ingest.corpora.documents import FieldNames
        from sparse_ingest.corpora.files import open_corpus

        rows = open_corpus([corpus], fields=FieldNames()).rows()
        texts = [row.document.text for row, _ in rows if row.document]
    return [" ".join(texts[(place * join + more) % len(texts)] for more in range(join)) for place in range(count)]
