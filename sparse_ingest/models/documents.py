"""Documents to sparse vectors with a masked LM.

In: texts. Out: CSR arrays in the order of the texts. Batches run longest first on a few single-threaded workers on
the CPU (two workers of one thread beat one of two), on one on a GPU; results do not depend on how many there are.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from sparse_ingest.checkpoints.layouts import Checkpoint
from sparse_ingest.errors import UsageError
from sparse_ingest.models.batches import plan_batches
from sparse_ingest.models.body import Body
from sparse_ingest.models.heads.tiles import TiledHead
from sparse_ingest.models.tokenizer import TokenIds, Tokenizer
from sparse_ingest.pipeline import ModelSettings

# Padded tokens of a batch. On the CPU larger ones fall out of the cache; for GPUs it is a careful start, not measured.
BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
# Documents of a batch: each has a dense row of the whole vocabulary until it is compacted.
BATCH_DOCUMENTS = {"cpu": 64, "cuda": 1024}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Encoded(NamedTuple):
    """Vectors of a list of texts as CSR (float32 weights), and what happened on the way.

    `tokens` counts the tokens read; `truncated` the texts that were cut; `without_token` the weights on ids that have
    no token string, which no index can hold and which are left out.
    """

    indptr: npt.NDArray[np.int64]
    token_ids: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]
    tokens: int
    truncated: int
    without_token: int


class DocumentEncoder:
    """A checkpoint's document side on one device.

    `settings` must be resolved (checkpoints/settings.py). `vocabulary` gives the token string of each id.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        settings: ModelSettings,
        *,
        device: str,
        dtype: str,
        batch_tokens: int | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.batch_tokens = batch_tokens or BATCH_TOKENS[self.device.type]
        self._prompt = settings.document_prompt or ""
        self._tokenizer = Tokenizer(checkpoint.transformer, settings)
        self._body = Body(checkpoint, device=self.device, dtype=DTYPES[dtype])
        self._head = TiledHead(
            self._body.weight,
            self._body.bias,
            activation=settings.activation or "relu",
            device=self.device,
            dtype=DTYPES[dtype],
        )
        self.vocabulary = self._tokenizer.vocabulary(len(self._body.bias))
        tokenless = [token_id for token_id, token in enumerate(self.vocabulary) if token is None]
        self._tokenless = torch.tensor(tokenless, dtype=torch.int64, device=self.device)
        zeroed = self._tokenizer.special_ids if settings.document_special_tokens == "zero" else []
        self._zeroed = torch.tensor(zeroed, dtype=torch.int64, device=self.device)
        self._workers = len(os.sched_getaffinity(0)) if self.device.type == "cpu" else 1

    def encode(
        self, texts: Sequence[str], progress: Callable[[int, int], None] = lambda documents, tokens: None
    ) -> Encoded:
        """Encode texts; `progress` is told the documents and tokens of each finished batch."""
        tokenized = self._tokenizer([self._prompt + text for text in texts])
        lengths = tokenized.lengths
        # An empty text has no token at all where the tokenizer adds none of its own.
        filled = np.flatnonzero(lengths)
        plan = plan_batches(lengths[filled], self.batch_tokens, BATCH_DOCUMENTS[self.device.type])
        batches = [filled[batch] for batch in plan]
        rows: list[tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]] = [_NOTHING] * len(texts)
        without_token = 0
        threads = torch.get_num_threads()
        # One thread a worker also fixes the order of every sum, whatever the machine.
        torch.set_num_threads(1)
        pool = ThreadPoolExecutor(self._workers)
        try:
            results = pool.map(lambda batch: self._encode_batch([tokenized.token_ids[i] for i in batch]), batches)
            for batch, (vectors, dropped) in zip(batches, results, strict=True):
                for index, vector in zip(batch, vectors, strict=True):
                    rows[index] = vector
                without_token += dropped
                progress(len(batch), int(lengths[batch].sum()))
        finally:
            # After Ctrl-C the batches that have not begun are not waited for.
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)
        return _as_csr(rows, int(lengths.sum()), int(tokenized.truncated.sum()), without_token)

    def _encode_batch(
        self, token_ids: list[TokenIds]
    ) -> tuple[list[tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]], int]:
        """Token ids and weights above zero of each document of a batch, and how many were on ids without a token."""
        with torch.inference_mode():
            weights = self._head(self._body.hidden(token_ids, self._tokenizer.padding_id))
            weights[:, self._zeroed] = 0
            without_token = int(torch.count_nonzero(weights[:, self._tokenless]))
            weights[:, self._tokenless] = 0
            documents, columns = torch.nonzero(weights, as_tuple=True)
            values = self._head.logarithm(weights[documents, columns]).cpu().numpy()
        counts = torch.bincount(documents, minlength=len(token_ids)).cpu().numpy()
        ends = np.cumsum(counts)[:-1]
        return list(
            zip(np.split(columns.to(torch.int32).cpu().numpy(), ends), np.split(values, ends), strict=True)
        ), without_token


_NOTHING = (np.empty(0, dtype=np.int32), np.empty(0, dtype=np.float32))


def choose_device(asked: str) -> str:
    """`auto` is a GPU when torch sees one.

    Raises:
        UsageError: the device has no such form, or is a GPU that is not there.
    """
    gpus = torch.cuda.device_count()
    if asked == "auto":
        return "cuda" if gpus else "cpu"
    form = re.fullmatch(r"cpu|cuda(?::(\d+))?", asked)
    if form is None:
        raise UsageError(f"--device {asked!r}: expected auto, cpu, cuda or cuda:N; this release uses one device.")
    if asked != "cpu" and int(form[1] or 0) >= gpus:
        raise UsageError(
            f"--device {asked}: torch sees {gpus} GPUs here. Use another one, or --device cpu, or a torch with CUDA."
        )
    return asked


def _as_csr(
    rows: list[tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]], tokens: int, truncated: int, without_token: int
) -> Encoded:
    indptr = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum([len(ids) for ids, _ in rows], out=indptr[1:])
    token_ids, weights = (np.concatenate(arrays) for arrays in zip(_NOTHING, *rows, strict=True))
    return Encoded(indptr, token_ids, weights, tokens, truncated, without_token)
