"""Check that a causal language model attends as its settings say.

transformers lets `is_causal` in the config of a model switch its causal mask off (from version 5.2), but only where the
architecture uses its masks, and recurrent layers have none. So the model is tried.
"""

from __future__ import annotations

from typing import Any

import torch

from sparse_ingest.errors import CheckpointError
from sparse_ingest.models.projection import forward


def refuse_other_attention(model: Any, name: str, attention: str | None) -> None:
    """Raise CheckpointError if tokens of a model see later ones and should not, or the other way round.

    `name` is that of the checkpoint, for messages. The model returns one row for each token.
    """
    texts = torch.tensor([[1, 2, 3, 4, 5], [1, 2, 3, 4, 6]])
    with torch.inference_mode():
        first, second = forward(model, "logits", input_ids=texts)[:, -2]
    sees_ahead = not torch.allclose(first, second, rtol=1e-5, atol=1e-6)
    # Each attention of transformers has this attribute; layers without attention read a text in one direction.
    layers = sum(hasattr(module, "is_causal") for module in model.modules())
    if sees_ahead != (attention == "bidirectional") or (sees_ahead and layers < model.config.num_hidden_layers):
        raise CheckpointError(
            f"{name} cannot be computed with {attention} attention: transformers' {type(model).__name__} does not "
            "switch the causal mask of all layers. Upgrade transformers with pip install -U transformers, or use "
            "another model."
        )
