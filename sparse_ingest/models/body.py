"""The transformer of a masked LM without its vocabulary projection, and the tokenizer in front of it.

In: token ids of a batch. Out: the hidden states that the projection would read, `[batch, length, hidden]`. The
projection itself is given as its weight and bias, for a head that never makes batch x length x vocabulary logits.
Works for every architecture of transformers whose masked LM ends in one linear layer; that is checked when it is built.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from sparse_ingest.checkpoints.layouts import Checkpoint
from sparse_ingest.errors import CheckpointError, PipelineError, first_line
from sparse_ingest.pipeline import ModelSettings

TokenIds = npt.NDArray[np.int32]


class Tokenized(NamedTuple):
    """Token ids of each text with special tokens, cut at max_length, and which texts were cut."""

    token_ids: list[TokenIds]
    truncated: npt.NDArray[np.bool_]

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Number of tokens of each text."""
        return np.fromiter((len(ids) for ids in self.token_ids), dtype=np.int64, count=len(self.token_ids))


class Tokenizer:
    """The checkpoint's own tokenizer, called in batches without padding."""

    # Tokenised at a time: bounds what the tokenizer returns, which includes all that it cuts off.
    CHUNK_TEXTS = 512
    CHUNK_CHARACTERS = 1 << 20

    def __init__(self, folder: Path, settings: ModelSettings) -> None:
        from transformers import AutoTokenizer

        try:
            loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            self._tokenizer: Any = loaded.backend_tokenizer
        except (OSError, ValueError, AttributeError, ImportError) as error:
            raise CheckpointError(
                f"The tokenizer in {folder} cannot be built: {first_line(error)}. Expected tokenizer.json."
            ) from error
        self.padding_id = int(loaded.pad_token_id or 0)
        self.special_ids = sorted(set(loaded.all_special_ids))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        if settings.max_length is not None:
            special = self._tokenizer.num_special_tokens_to_add(False)
            if settings.max_length <= special:
                # Below that number the tokenizer would cut nothing at all.
                raise PipelineError(
                    f"max_length = {settings.max_length}, but every text gets {special} special tokens; "
                    f"expected at least {special + 1}."
                )
            self._tokenizer.enable_truncation(settings.max_length)
        if settings.lower_case:
            _lower_case_first(self._tokenizer)

    def __call__(self, texts: Sequence[str]) -> Tokenized:
        """Tokenise texts; the prompt is already in front of them."""
        token_ids: list[TokenIds] = []
        truncated: list[bool] = []
        for chunk in self._chunks(texts):
            for encoding in self._tokenizer.encode_batch(chunk):
                token_ids.append(np.array(encoding.ids, dtype=np.int32))
                truncated.append(bool(encoding.overflowing))
        return Tokenized(token_ids, np.array(truncated, dtype=bool))

    def _chunks(self, texts: Sequence[str]) -> Iterator[list[str]]:
        chunk: list[str] = []
        characters = 0
        for text in texts:
            if chunk and (len(chunk) == self.CHUNK_TEXTS or characters + len(text) > self.CHUNK_CHARACTERS):
                yield chunk
                chunk, characters = [], 0
            chunk.append(text)
            characters += len(text)
        if chunk:
            yield chunk

    def vocabulary(self, size: int) -> list[str | None]:
        """The token string of each id below `size`; None where an id has none.

        Raises:
            CheckpointError: two ids have the same string, so an index could not tell them apart.
        """
        tokens: list[str | None] = [self._tokenizer.id_to_token(token_id) for token_id in range(size)]
        first: dict[str, int] = {}
        for token_id, token in enumerate(tokens):
            if token is not None and first.setdefault(token, token_id) != token_id:
                raise CheckpointError(
                    f"The vocabulary gives the token {token!r} to two ids, {first[token]} and {token_id}; "
                    "an index keys weights by token, so each id needs a string of its own. Mend tokenizer.json."
                )
        return tokens


class Body:
    """A masked LM up to its vocabulary projection, on one device in one dtype."""

    def __init__(self, checkpoint: Checkpoint, *, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.dtype = dtype
        self._model = _build_masked_lm(checkpoint)
        decoder = self._model.get_output_embeddings()
        if not isinstance(decoder, torch.nn.Linear):
            raise CheckpointError(
                f"{checkpoint.name} ({type(self._model).__name__}) does not end in a linear vocabulary projection."
            )
        sample = torch.arange(1, 6).unsqueeze(0) % decoder.out_features
        with torch.inference_mode():
            expected = self._model(input_ids=sample).logits
        self.weight = decoder.weight.detach()
        self.bias = torch.zeros(decoder.out_features) if decoder.bias is None else decoder.bias.detach().clone()
        # From here on the model's "logits" are what the projection would have read.
        decoder.forward = lambda input: input  # type: ignore[method-assign]
        with torch.inference_mode():
            hidden = self._model(input_ids=sample).logits
            found = hidden @ self.weight.T + self.bias
        if found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-3, atol=1e-3):
            raise CheckpointError(
                f"{checkpoint.name} ({type(self._model).__name__}) computes something after its vocabulary projection; "
                "its weights would be wrong here."
            )
        self._model.to(device=device, dtype=dtype)

    def hidden(self, token_ids: Sequence[TokenIds], padding_id: int) -> torch.Tensor:
        """Hidden states `[batch, length, hidden]` of a batch; rows past a document's end repeat its first row.

        The maximum over a document's rows is idempotent, so a repeated row needs no mask later.
        """
        lengths = torch.tensor([len(ids) for ids in token_ids])
        longest = int(lengths.max())
        padded = np.full((len(token_ids), longest), padding_id, dtype=np.int64)
        for row, ids in enumerate(token_ids):
            padded[row, : len(ids)] = ids
        inputs = torch.from_numpy(padded).to(self.device)
        if int(lengths.min()) == longest:
            return self._forward(inputs, None)
        inside = (torch.arange(longest) < lengths.unsqueeze(1)).to(self.device)
        hidden = self._forward(inputs, inside.to(torch.int64))
        return torch.where(inside.unsqueeze(2), hidden, hidden[:, :1])

    def _forward(self, inputs: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        hidden: torch.Tensor = self._model(input_ids=inputs, attention_mask=attention_mask).logits
        return hidden


def _build_masked_lm(checkpoint: Checkpoint) -> Any:
    from safetensors import SafetensorError
    from transformers import AutoModelForMaskedLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # a bar for a second of reading weights
    try:
        model, report = AutoModelForMaskedLM.from_pretrained(
            checkpoint.transformer,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise CheckpointError(f"{checkpoint.name} cannot be built: {first_line(error)}.") from error
    missing = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if missing:
        # transformers would fill these with random numbers and go on.
        raise CheckpointError(
            f"{checkpoint.name} lacks {len(missing)} of the weights that {type(model).__name__} needs, such as "
            f"{missing[0]}. Fetch the model again, or name a checkpoint with its masked-LM head."
        )
    return model.eval()


def _lower_case_first(tokenizer: Any) -> None:
    """Lower-case before everything else, as sentence-transformers does for `do_lower_case`."""
    from tokenizers import normalizers

    steps = [normalizers.Lowercase()]
    if tokenizer.normalizer is not None:
        steps.append(tokenizer.normalizer)
    tokenizer.normalizer = normalizers.Sequence(steps)
