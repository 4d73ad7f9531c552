"""The transformer of a model without its output.

In: token ids of a batch. Out: the last hidden states, one row per token. Of a language model also its vocabulary
projection as weight and bias (projection.py), for a head that never computes batch x length x vocabulary logits.
Documents are packed if each then has the hidden states that it has alone; otherwise they are padded, or computed
one length at a time if padding changes them. All of this is checked when the model is built.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.utils.rnn import pad_sequence

from sparse_ingest.checkpoints.layouts import Checkpoint
from sparse_ingest.checkpoints.modules import damaged
from sparse_ingest.checkpoints.sides import LanguageModelSide
from sparse_ingest.errors import first_line
from sparse_ingest.models.linear import pack_linear_layers
from sparse_ingest.models.masked_lms import build_model, refuse_other_attention, without_report
from sparse_ingest.models.packing import Packing, ordinal_positions, positions_behind, register
from sparse_ingest.models.projection import forward, split_projection
from sparse_ingest.models.tokenizer import TokenIds

# Maximum difference of packed and unpacked hidden states, relative to the largest one.
CLOSE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}
LONGEST_SAMPLE = 1 << 14  # tokens
Positions = Callable[[Sequence[TokenIds]], npt.NDArray[np.int64]]
logger = logging.getLogger(__name__)


class Body:
    """A model up to its output, on one device in one dtype.

    `projection` is the weight and bias of a masked LM's vocabulary projection, None for a model that has none.
    `outputs` is the number of token ids that the model has a projection, or embeddings, for; `ids` the number of those
    with embeddings; `hidden_size` is the width of hidden states. With `integers` the linear layers multiply in int8 or
    int16.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: torch.device,
        dtype: torch.dtype,
        integers: torch.dtype | None = None,
        attention: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        # Packing is tried in float32 on the CPU, where the model is read.
        self.device = torch.device("cpu")
        self._model = build_model(checkpoint, attention=attention, trust_remote_code=trust_remote_code)
        projects = checkpoint.document.has_projection
        self._result = "logits" if projects else "last_hidden_state"
        try:
            if isinstance(checkpoint.document, LanguageModelSide):
                refuse_other_attention(self._model, checkpoint.name, attention)
            embeddings = self._model.get_input_embeddings().weight
            self.projection = split_projection(self._model, checkpoint.name) if projects else None
            self.ids = int(embeddings.shape[0])
            self.outputs, self.width = map(int, (self.projection.weight if self.projection else embeddings).shape)
            documents = _samples(self._model.config, self.ids)
            with torch.inference_mode():
                expected = torch.cat([self._forward(torch.from_numpy(ids).long().unsqueeze(0))[0] for ids in documents])
            self.hidden_size = expected.shape[1]
        except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RuntimeError) as error:
            raise damaged(
                f"{checkpoint.name} cannot compute: {first_line(error)}. A value in its config.json is wrong"
            ) from error
        # Returns the position ids of packed documents; None if documents cannot be packed.
        self._positions = self._pack(documents, expected)
        # Whether padding is masked: FNet and ConvBERT mix it with the text.
        self._masks = True
        self._masks = self.packs or self._agrees(documents, expected)
        if not self._masks:
            logger.info("%s computes documents of one length at a time.", type(self._model).__name__)
        # Rotary frequencies stay float32, as transformers itself loads them: bfloat16 moves position 8,000 by up to 16.
        rotary = {name: buffer for name, buffer in self._model.named_buffers() if name.endswith("inv_freq")}
        self.device = device
        self._model.to(device=device, dtype=dtype)
        for name, frequencies in rotary.items():
            module, _, buffer = name.rpartition(".")
            setattr(self._model.get_submodule(module), buffer, frequencies.to(device))
        if device.type == "cpu":
            if integers:  # but not the layers between the model and its projection, as in bert.py
                pack_linear_layers(self._model.base_model, integers=integers)
            pack_linear_layers(self._model)
        elif self._positions and not self._agrees(documents, expected):
            self._pad(f"on {device} its hidden states would differ")

    @property
    def packs(self) -> bool:
        """Whether documents are computed without padding."""
        return self._positions is not None

    def hidden(self, token_ids: Sequence[TokenIds], padding_id: int) -> tuple[torch.Tensor, Packing]:
        """Return the hidden states `[rows, hidden]` of a batch, and the rows of each document."""
        packing = Packing(tuple(map(len, token_ids)), self.device, tuple(token_ids))
        if self._positions is None:
            return self._padded(token_ids, packing, padding_id), packing
        positions = packing.of_rows(self._positions(token_ids)).unsqueeze(0)
        padded = self._forward(packing.ids.unsqueeze(0), position_ids=positions, packing=packing)[0]
        return packing.without_padding(padded), packing

    def _padded(self, token_ids: Sequence[TokenIds], packing: Packing, padding_id: int) -> torch.Tensor:
        if len(packing.runs) > 1 and not self._masks:
            of_runs = (token_ids[run.document : run.document + run.documents] for run in packing.runs)
            return torch.cat([self.hidden(same, padding_id)[0] for same in of_runs])
        rows = [torch.from_numpy(ids).long() for ids in token_ids]
        inputs = pad_sequence(rows, batch_first=True, padding_value=padding_id).to(self.device)
        if len(packing.runs) == 1:
            return self._forward(inputs).flatten(0, 1)
        inside = torch.arange(inputs.shape[1]) < torch.tensor(packing.lengths).unsqueeze(1)
        hidden = self._forward(inputs, attention_mask=inside.to(self.device, torch.int64))
        return hidden.flatten(0, 1)[torch.nonzero(inside.flatten()).squeeze(1).to(self.device)]

    def _forward(self, inputs: torch.Tensor, **given: Any) -> torch.Tensor:
        return forward(self._model, self._result, input_ids=inputs, **given)

    def _pack(self, documents: Sequence[TokenIds], expected: torch.Tensor) -> Positions | None:
        """Set the model to packed documents if one kind of position ids gives the expected hidden states."""
        self._usual = self._model.config._attn_implementation
        self._set_attention(register())
        padding_id = getattr(self._model.config, "pad_token_id", None) or 0
        for positions in (ordinal_positions, partial(positions_behind, padding_id)):
            self._positions = positions
            if self._agrees(documents, expected):
                return positions
        self._pad("its hidden states would differ")
        return None

    def _agrees(self, documents: Sequence[TokenIds], expected: torch.Tensor) -> bool:
        try:
            with torch.inference_mode():
                found = self.hidden(documents, 0)[0].to(device=expected.device, dtype=expected.dtype)
        except Exception as error:  # models, also those with remote code, may raise any type
            logger.debug("Packed documents: %s.", first_line(error))
            return False
        if found.shape != expected.shape or not torch.isfinite(found).all():
            return False
        share = CLOSE[next(self._model.parameters()).dtype]
        return bool((found - expected).abs().amax() <= share * expected.abs().amax())

    def _set_attention(self, name: str | None) -> None:
        with without_report(), contextlib.suppress(Exception):  # not supported by some remote code
            self._model.set_attn_implementation(name)

    def _pad(self, reason: str) -> None:
        self._positions = None
        self._set_attention(self._usual)
        logger.info("%s computes padded documents, not packed ones: %s.", type(self._model).__name__, reason)


def _samples(config: Any, vocabulary: int) -> list[TokenIds]:
    """Return documents to try packing on: two of one length, a shorter one, and one longer than a sliding window."""
    window = int(getattr(config, "sliding_window", None) or 0)
    positions = int(getattr(config, "max_position_embeddings", None) or 512)
    longest = max(5, min(window + 5, LONGEST_SAMPLE, positions - 3))
    # No padding: some models give it no position.
    ids = np.arange(vocabulary, dtype=np.int32)
    ids = ids[ids != (getattr(config, "pad_token_id", None) or 0)]
    # An odd number of rows, so that rows are padded.
    lengths = (4, 4, 1 + longest % 2, longest)
    return [np.resize(np.roll(ids, 3 * place), length) for place, length in enumerate(lengths)]
