"""The GPU code path on torch's meta tensors, which have device, shape and dtype but no values.

On these torch raises where a value is needed on the host, so the tests prove that no batch waits for the device.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from support.checkpoints import TEXTS, build_encoder, make_masked_lm
from support.language_models import make_language_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_ingest.models import packing
from sparse_ingest.models.heads import compaction
from sparse_ingest.models.heads.compaction import ROOM, Transfer
from sparse_ingest.models.heads.tiles import TiledHead, logarithm
from sparse_ingest.models.linear import gelu_of, product_of, sum_of
from sparse_ingest.models.vectors import VectorMaker
from sparse_ingest.pipeline import Pruning

GPU = torch.device("cuda:0")
if torch.cuda.is_available():
    pytest.skip("there is a GPU", allow_module_level=True)


make_modern_bert = partial(make_masked_lm, architecture="modernbert")


@pytest.fixture
def maker(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[VectorMaker]:
    """Return a model in half precision on a GPU that does not exist: ModernBERT, or the model of the parameter."""
    make = getattr(request, "param", make_modern_bert)
    maker = build_encoder(make(tmp_path / "model"), dtype="float16").maker
    assert maker.body.packs
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        monkeypatch.setattr(  # pinned memory needs a driver
            packing, "to_device", lambda array, device: mode.from_tensor(torch.from_numpy(array)).to(device)
        )
        maker.body._model.to(device=GPU)
        maker.device = maker.body.device = GPU
        maker._zeroed, maker._tokenless = maker._zeroed.to(GPU), torch.tensor([7, 9]).to(GPU)
        weight, bias = torch.zeros(maker.body.outputs, maker.body.width), torch.zeros(maker.body.outputs)
        maker._head = TiledHead(weight.to(GPU), bias.to(GPU), device=GPU, dtype=torch.float16)
        with torch.inference_mode():
            yield maker
    torch.__future__.set_overwrite_module_params_on_conversion(overwrite)


@pytest.mark.parametrize("maker", [make_modern_bert, make_language_model], indirect=True)
def test_packed_documents_go_through_body_and_head_without_waiting(maker: VectorMaker) -> None:
    token_ids = [np.arange(1, 1 + length) for length in (9, 9, 5, 3)]
    rows, where = maker.body.hidden(token_ids, 0)
    assert rows.device == GPU and rows.dtype == torch.float16 and len(rows) == sum(where.lengths) == 26
    weights, dropped = maker._weights(token_ids)
    assert weights.device == dropped.device == GPU and weights.shape == (4, len(maker.vocabulary))


class Called(TorchDispatchMode):
    """Count the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[object] = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.counts[operator] += 1
        return operator(*args, **(kwargs or {}))


def test_attention_is_one_call_for_each_layer(maker: VectorMaker) -> None:
    with Called() as called:
        maker.body.hidden([np.arange(1, 1 + length, dtype=np.int32) for length in (9, 5, 3)], 0)
    attend = torch.ops.aten._flash_attention_forward.default
    assert called.counts[attend] == maker.body._model.config.num_hidden_layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_linear_layers_of_other_devices_do_not_use_onednn(dtype: torch.dtype) -> None:
    weight, bias = (torch.empty(shape, dtype=dtype, device="meta") for shape in ((8, 8), (8,)))
    assert gelu_of(product_of(weight, bias))(weight).device == weight.device
    assert sum_of(weight, bias)(weight, weight).device == weight.device


@pytest.mark.parametrize("rules", [Pruning(), Pruning(top_k=5, max_ratio=0.1, min_weight=0.05)])
def test_terms_are_compacted_without_waiting(
    maker: VectorMaker, rules: Pruning, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[torch.Tensor] = []
    monkeypatch.setattr(compaction, "_copied", lambda tensor: copied.append(tensor) or (tensor, None))
    weights, dropped = maker._weights([np.arange(1, 1 + len(text), dtype=np.int32) % 20 for text in TEXTS if text])
    Transfer(logarithm(weights, "relu"), rules, dropped)
    [tensor] = copied
    documents = len(weights)
    room = min(ROOM * documents, weights.numel())
    assert tensor.device == GPU and tensor.dtype == torch.int32 and len(tensor) == 1 + documents + 2 * room
