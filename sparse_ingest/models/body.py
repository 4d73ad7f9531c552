"""The transformer of a masked LM without its vocabulary projection.

In: token ids of a batch. Out: the hidden states that the projection would read, `[batch, length, hidden]`. The
projection itself is given as its weight and bias, for a head that never makes batch x length x vocabulary logits.
Works for every architecture of transformers whose masked LM ends in one linear layer; that is checked when it is built.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from sparse_ingest.checkpoints.layouts import Checkpoint
from sparse_ingest.errors import CheckpointError
from sparse_ingest.models.masked_lms import build_masked_lm
from sparse_ingest.models.tokenizer import TokenIds


class Body:
    """A masked LM up to its vocabulary projection, on one device in one dtype."""

    def __init__(
        self, checkpoint: Checkpoint, *, device: torch.device, dtype: torch.dtype, trust_remote_code: bool = False
    ) -> None:
        self.device = device
        self.dtype = dtype
        self._model = build_masked_lm(checkpoint, trust_remote_code=trust_remote_code)
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
        # Rotary frequencies stay float32, as transformers itself loads them: bfloat16 moves position 8,000 by up to 16.
        rotary = {name: buffer for name, buffer in self._model.named_buffers() if name.endswith("inv_freq")}
        self._model.to(device=device, dtype=dtype)
        for name, frequencies in rotary.items():
            module, _, buffer = name.rpartition(".")
            setattr(self._model.get_submodule(module), buffer, frequencies.to(device))

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
