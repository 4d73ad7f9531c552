"""Checkpoints with other vocabulary projections than BERT's: untied, without bias, or not a linear layer.

Each has the layout of transformers, or of sentence-transformers. In `bert-cut` the model has more ids than the
tokenizer, as after the vocabulary of a multilingual BERT was cut and its embeddings were padded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support.checkpoints import (
    HEADS,
    LAYERS,
    POSITIONS,
    WIDTH,
    WORDPIECE,
    as_splade_card,
    byte_level_bpe,
    make_tokenizer,
    sizes,
)

SPARE_IDS = 19
XLM_R_TOKENS = 250_002
UNTIED = {"tie_word_embeddings": False}
ROBERTA = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "type_vocab_size": 1}
MODERNBERT = {
    "pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3,
    "local_attention": 8, "initializer_cutoff_factor": 2.0,
}  # fmt: skip
DEBERTA = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False}
DEBERTA_V3 = {**DEBERTA, "position_buckets": 8, "norm_rel_ebd": "layer_norm", "share_att_key": True}
DISTILBERT = {"dim": WIDTH, "hidden_dim": 2 * WIDTH, "n_layers": LAYERS, "n_heads": HEADS}
# Name -> class without `ForMaskedLM`, settings, and whether it has the sentence-transformers layout.
HEADS_OF: dict[str, tuple[str, dict[str, Any], bool]] = {
    "bert-untied": ("Bert", UNTIED, True),
    "bert-cut": ("Bert", {"vocab_size": len(WORDPIECE) + SPARE_IDS}, False),
    "distilbert-untied": ("DistilBert", {**DISTILBERT, **UNTIED}, False),
    "roberta-untied": ("Roberta", {**ROBERTA, **UNTIED}, True),
    "xlm-roberta": ("XLMRoberta", ROBERTA, False),
    "modernbert-untied": ("ModernBert", {**MODERNBERT, **UNTIED}, True),
    "modernbert-no-bias": ("ModernBert", {**MODERNBERT, "decoder_bias": False}, False),
    "electra": ("Electra", {"embedding_size": 16}, True),
    "electra-untied": ("Electra", {"embedding_size": 16, **UNTIED}, False),
    "albert": ("Albert", {"embedding_size": 16}, False),
    "mobilebert": ("MobileBert", {"embedding_size": 16, "intra_bottleneck_size": 32}, False),
    "deberta": ("Deberta", {**DEBERTA, "max_relative_positions": -1}, True),
    "deberta-new-head": ("Deberta", {**DEBERTA, "legacy": False}, False),
    "deberta-v3": ("DebertaV2", DEBERTA_V3, True),
    "deberta-v3-new-head": ("DebertaV2", {**DEBERTA_V3, "legacy": False}, True),
}


def make_head(folder: Path, name: str) -> Path:
    """Write a checkpoint of `HEADS_OF`."""
    import torch
    import transformers

    kind, settings, is_card = HEADS_OF[name]
    is_bpe = "Roberta" in kind or kind == "XLMRoberta"
    usual = sizes(byte_level_bpe().get_vocab_size() if is_bpe else len(WORDPIECE))
    if is_bpe:
        usual["max_position_embeddings"] = POSITIONS + 2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        config = getattr(transformers, f"{kind}Config")(**{**usual, **settings})
        model = getattr(transformers, f"{kind}ForMaskedLM")(config)
        # The bias of a projection that is not a linear layer has no name that they share.
        for key, parameter in model.named_parameters():
            if key.endswith("bias") and len(parameter) == config.vocab_size:
                parameter.data.normal_(-1.5, 0.7)
    model.save_pretrained(folder)
    make_tokenizer("roberta" if is_bpe else "bert", model_max_length=POSITIONS).save_pretrained(folder)
    return as_splade_card(folder, prompts={"query": "find: ", "document": "text: "}) if is_card else folder


def make_large_vocabulary(folder: Path) -> Path:
    """Write an XLM-R with its 250,002 tokens, most of which are numbered words."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    ends, words = ("<s>", "<pad>", "</s>", "<unk>"), ("▁the", "▁river", "▁stone", "s")
    numbered = [f"▁word{place}" for place in range(XLM_R_TOKENS - len(ends) - len(words) - 1)]
    tokens = [*ends, *words, *numbered, "<mask>"]
    tokenizer = Tokenizer(models.Unigram([(token, -float(place % 9)) for place, token in enumerate(tokens)], 3))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    special = dict(zip(("bos_token", "pad_token", "eos_token", "unk_token"), ends, strict=True))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, cls_token="<s>", sep_token="</s>", mask_token="<mask>", **special
    ).save_pretrained(folder)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        config = transformers.XLMRobertaConfig(**{**sizes(XLM_R_TOKENS), **ROBERTA, **small})
        model = transformers.XLMRobertaForMaskedLM(config)
        model.get_output_embeddings().bias.data.normal_(-4.0, 0.7)
    model.save_pretrained(folder)
    return folder
