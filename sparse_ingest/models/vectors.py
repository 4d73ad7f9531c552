"""Token ids to sparse vectors: body, head and compaction, over the workers of one device.

In: token ids of any number of inputs. Out: token ids and weights above zero of each, in their order. Batches run
longest first on a few single-threaded workers on the CPU (two workers of one thread beat one of two); on a GPU the next
batch is begun before the terms of the one before are read. Results do not depend on how many workers there are.
Calls from several threads run one after another.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager

import numpy as np
import numpy.typing as npt
import torch

from sparse_ingest.checkpoints.layouts import Checkpoint
from sparse_ingest.errors import SparseIngestError
from sparse_ingest.models.batches import BATCH_DOCUMENTS, plan_batches
from sparse_ingest.models.body import Body
from sparse_ingest.models.heads.compaction import Rules, Terms, Transfer
from sparse_ingest.models.heads.selection import build_head
from sparse_ingest.models.heads.tiles import logarithm
from sparse_ingest.models.memory import DidNotFit, is_out_of_memory
from sparse_ingest.models.tokenizer import TokenIds, Tokenizer
from sparse_ingest.pipeline import ModelSettings

# The dtype of the body; with the int8 ones the head computes in whole numbers.
DTYPES = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
    "int8": torch.float32, "int8-bfloat16": torch.bfloat16,
}  # fmt: skip
NO_RULES = Rules()
# Held while a model is read or computes: torch keeps the number of threads, and transformers while it reads a model the
# default dtype, for the complete process. One that calls back from within a batch may enter again.
TORCH_STATE = threading.RLock()

Row = tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]  # token ids ascending, weights above zero
NOTHING: Row = (np.empty(0, dtype=np.int32), np.empty(0, dtype=np.float32))
Places = npt.NDArray[np.int64]  # of inputs, in one batch
Answer = tuple[list[Row], int]  # the vectors of a batch, and how many weights were on ids without a token
Answers = Generator[Answer, None, None]  # of batches in their order
Progress = Callable[[int, int], None]


class NotFinite(SparseIngestError):
    """A model gave hidden states that are no finite numbers; weights made of them would be missing or wrong."""

    def __init__(self, dtype: str) -> None:
        super().__init__(
            f"The model computes numbers that are infinite or undefined in {dtype}. "
            + ("Its weights are damaged; fetch it again." if dtype == "float32" else "Encode with --dtype float32.")
        )


class VectorMaker:
    """A masked LM with its head on one device. `vocabulary` gives the token string of each id."""

    def __init__(
        self, checkpoint: Checkpoint, settings: ModelSettings, tokenizer: Tokenizer, *, device: torch.device, dtype: str
    ) -> None:
        self.device = device
        self.workers = len(os.sched_getaffinity(0)) if device.type == "cpu" else 1
        trusted, in_body = settings.trust_remote_code, DTYPES[dtype]
        self._dtype = str(in_body).removeprefix("torch.")
        self.body = Body(checkpoint, device=device, dtype=in_body, trust_remote_code=trusted)
        weight, bias = self.body.weight, self.body.bias
        self._head = build_head(weight, bias, device=device, dtype=in_body, int8=dtype.startswith("int8"))
        self._activation = settings.activation or "relu"
        self._padding_id = tokenizer.padding_id
        self.vocabulary = tokenizer.vocabulary(len(bias))
        tokenless = [token_id for token_id, token in enumerate(self.vocabulary) if token is None]
        self._tokenless = torch.tensor(tokenless, dtype=torch.int64, device=device)
        zeroed = tokenizer.special_ids if settings.document_special_tokens == "zero" else []
        self._zeroed = torch.tensor(zeroed, dtype=torch.int64, device=device)

    def make(
        self, token_ids: Sequence[TokenIds], batch_tokens: int, progress: Progress, rules: Rules = NO_RULES
    ) -> Answer:
        """The vectors of these inputs in their order, and how many weights were on ids without a token.

        Raises:
            DidNotFit: the memory did not suffice for a batch.
        """
        with TORCH_STATE:
            return self._made(token_ids, batch_tokens, progress, rules)

    def _made(self, token_ids: Sequence[TokenIds], batch_tokens: int, progress: Progress, rules: Rules) -> Answer:
        lengths = np.fromiter(map(len, token_ids), dtype=np.int64, count=len(token_ids))
        # An empty text has no token at all where the tokenizer adds none of its own.
        filled = np.flatnonzero(lengths)
        plan = plan_batches(lengths[filled], batch_tokens, BATCH_DOCUMENTS[self.device.type])
        batches = [filled[batch] for batch in plan]
        rows: list[Row] = [NOTHING] * len(token_ids)
        without_token = 0
        # One thread a worker also fixes the order of every sum, whatever the machine.
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        results = self._on_workers if self.device.type == "cpu" else self._ahead
        try:
            # Closed at once where `progress` stops it: the batches that have not begun are then not computed.
            with closing(results(token_ids, batches, rules)) as answers:
                for batch, (vectors, dropped) in zip(batches, answers, strict=True):
                    for place, vector in zip(batch, vectors, strict=True):
                        rows[place] = vector
                    without_token += dropped
                    progress(len(batch), int(lengths[batch].sum()))
        finally:
            torch.set_num_threads(threads)
        return rows, without_token

    def _on_workers(self, token_ids: Sequence[TokenIds], batches: list[Places], _: Rules) -> Answers:
        """The batches in their order, computed by the workers of a CPU. Rules are left to the host, which is here."""
        pool = ThreadPoolExecutor(self.workers)
        try:
            yield from pool.map(lambda batch: self._compute([token_ids[place] for place in batch], batch), batches)
        finally:
            # After Ctrl-C, or a batch that failed, the batches that have not begun are not waited for.
            pool.shutdown(cancel_futures=True)

    def _ahead(self, token_ids: Sequence[TokenIds], batches: list[Places], rules: Rules) -> Answers:
        """The batches in their order; each is begun before the terms of the one before are waited for."""
        before: tuple[Places, Transfer] | None = None
        for batch in [*batches, None]:
            begun = None
            if batch is not None:
                with self._fitting(batch, token_ids):
                    begun = batch, self._begin([token_ids[place] for place in batch], rules)
            if before is not None:
                places, transfer = before
                with self._fitting(places, token_ids):
                    yield self._split(transfer.arrive())
            before = begun

    def _compute(self, token_ids: Sequence[TokenIds], places: Places) -> Answer:
        with self._fitting(places, token_ids), torch.inference_mode():
            weights, dropped = self._weights(token_ids)
            # numpy finds these few places 6 times as fast as torch.
            documents, columns = np.divmod(np.flatnonzero(weights.numpy() != 0), weights.shape[1])
            found = weights[torch.from_numpy(documents), torch.from_numpy(columns)]
            counts = np.bincount(documents, minlength=len(token_ids)).astype(np.int32)
            values = logarithm(found, self._activation).numpy()
            return self._split(Terms(counts, columns.astype(np.int32), values, int(dropped)))

    def _begin(self, token_ids: Sequence[TokenIds], rules: Rules) -> Transfer:
        with torch.inference_mode():
            weights, dropped = self._weights(token_ids)
            return Transfer(logarithm(weights, self._activation), rules, dropped)

    def _weights(self, token_ids: Sequence[TokenIds]) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights before the logarithm, `[documents, vocabulary]`, and how many were on ids without a token.

        That number is -1 where hidden states are not finite. A maximum over them may look as if there were no term,
        and a GPU is not asked here, which would make the host wait.
        """
        rows, packing = self.body.hidden(token_ids, self._padding_id)
        weights = self._head(rows, packing)
        weights[:, self._zeroed] = 0
        dropped = torch.count_nonzero(weights[:, self._tokenless])
        weights[:, self._tokenless] = 0
        # The sum of numbers is finite where each of them is, and much faster than to look at each.
        return weights, torch.where(rows.sum(dtype=torch.float32).isfinite(), dropped, -1)

    def _split(self, terms: Terms) -> Answer:
        """The terms of each document."""
        if terms.dropped < 0:
            raise NotFinite(self._dtype)
        ends = np.cumsum(terms.counts)[:-1]
        rows = zip(np.split(terms.token_ids, ends), np.split(terms.weights, ends), strict=True)
        return list(rows), terms.dropped

    @contextmanager
    def _fitting(self, places: Places, token_ids: Sequence[TokenIds]) -> Iterator[None]:
        """Say of memory that ran out which inputs it was for."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise DidNotFit(places.tolist(), max(map(len, token_ids))) from error
