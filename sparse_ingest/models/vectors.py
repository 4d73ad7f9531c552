"""Token ids to sparse vectors: batches, body, head and compaction, over the workers of one device.

In: token ids of inputs. Out: token ids and weights above zero of each, in their order. Batches run longest first, on a
CPU in single-threaded workers (two workers of one thread are faster than one of two), or on all cores if there is only
one batch and it is not part of a run; on a GPU the next batch starts before the terms of the previous one are read.
Batches depend only on lengths and the budget, so a run that is resumed elsewhere has the same ones. Calls from several
threads run one after another.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from sparse_ingest.checkpoints.layouts import Checkpoint
from sparse_ingest.errors import CheckpointError, SparseIngestError, UsageError
from sparse_ingest.models import cpu_attention, forked, threads
from sparse_ingest.models.bert import packed_bert
from sparse_ingest.models.body import Body
from sparse_ingest.models.heads.compaction import Terms, Transfer
from sparse_ingest.models.heads.cpu_kernel import instructions_for
from sparse_ingest.models.heads.selection import refuse_integers
from sparse_ingest.models.heads.tiles import logarithm
from sparse_ingest.models.heads.without_projection import LexicalHead
from sparse_ingest.models.memory import DidNotFit, is_out_of_memory
from sparse_ingest.models.outputs import AnyBody, build_output
from sparse_ingest.models.tokenizer import TokenIds, Tokenizer
from sparse_ingest.pipeline import ModelSettings, Pruning


class Precision(NamedTuple):
    """The dtype of a body, and the integers that linear layers and the head multiply, if any."""

    body: torch.dtype
    head: torch.dtype | None = None
    linear: torch.dtype | None = None


PRECISIONS = {
    "float32": Precision(torch.float32),
    "bfloat16": Precision(torch.bfloat16),
    "float16": Precision(torch.float16),
    "int8": Precision(torch.float32, torch.int8),
    "int8-bfloat16": Precision(torch.bfloat16, torch.int8),
    "int8-int8": Precision(torch.float32, torch.int8, torch.int8),
    "int16": Precision(torch.float32, torch.int16, torch.int16),
}
NO_RULES = Pruning()
CPU_TOKENS = 2048  # of a batch: larger batches do not fit into the cache
# On a CPU a batch has at most an eighth of the tokens that are left, so that all cores finish at about the same time;
# rounded down to two significant bits, as oneDNN compiles products for each number of rows (packing.py). But it has at
# least 256: then a token costs 1.18 times as much as in a batch of 2,048 in BERT-tiny, 1.03 times in DistilBERT
# (128: 1.37 and 1.10 times, 64: 1.95 and 1.32 times). For inputs of less than 1,024 tokens the minimum is 8 times the
# root of their number: 8 documents of 93 tokens are 4 batches, 2 documents are 2.
SHARES = 8
LEAST_TOKENS = 256
LEAST_PER_ROOT = 8
# Numbers in the hidden states of a batch on a GPU. Computing it must take longer than launching it, which takes about
# 0.3 ms per layer and 0.6 ms for the rest: on an H200 at 40% of its peak, 3 ms (BERT-tiny) to 24 ms (gte-base) against
# 1.2 to 4.2 ms. The largest tensor has 268 MB. Estimated from the models' arithmetic, not measured.
GPU_NUMBERS = 1 << 25
# Operations of one layer for each thread of a lone batch, half a millisecond on one core: BERT-tiny is no faster with
# two threads for 127 tokens, nor BERT-mini for 32. A layer has about 12 weights for each pair of its width.
LEAST_OF_THREAD = 5e7
LAYER_OPERATIONS = 2 * 12
# Documents of a batch: each has a dense row of the vocabulary until it is compacted.
BATCH_DOCUMENTS = {"cpu": 64, "cuda": 1024}
# Held while a model is loaded or computes: the number of torch's threads, and the default dtype that transformers sets
# while it loads a model, are process-wide. Reentrant for calls from within a batch.
TORCH_STATE = threading.RLock()

Vector = tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]  # token ids ascending, weights above zero
NOTHING: Vector = (np.empty(0, dtype=np.int32), np.empty(0, dtype=np.float32))
Batch = npt.NDArray[np.int64]  # indices of inputs that share a forward pass
BatchVectors = tuple[list[Vector], int]  # the vectors of a batch, and the number of weights on ids without a token
Batches = Generator[BatchVectors, None, None]
OnBatch = Callable[[int, int], None]  # called with the documents and tokens of each finished batch


class NotFinite(SparseIngestError):
    """Hidden states of a model are not finite; weights computed from them would be missing or wrong."""

    def __init__(self, dtype: str) -> None:
        super().__init__(
            f"The model computes numbers that are infinite or undefined in {dtype}. "
            + ("Its weights are damaged; download it again." if dtype == "float32" else "Encode with --dtype float32.")
        )


class VectorMaker:
    """A model with its output on one device. `vocabulary` has the string of each column, such as a token.

    With `all_cores` a batch that is alone uses all cores of a CPU; its last bits may then depend on their number.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        settings: ModelSettings,
        tokenizer: Tokenizer,
        *,
        device: torch.device,
        dtype: str,
        all_cores: bool = False,
    ) -> None:
        self.device = device
        self._all_cores = all_cores and device.type == "cpu"
        self.workers = len(os.sched_getaffinity(0)) if device.type == "cpu" else 1
        trusted, (in_body, in_head, in_linear) = settings.trust_remote_code, PRECISIONS[dtype]
        self._dtype, self._in_integers = dtype, in_linear is not None
        self._activation = settings.activation or "relu"
        self._name = checkpoint.name
        if in_head:
            refuse_integers(in_head, device)
        with _on(device):
            self.body: AnyBody = packed_bert(checkpoint, device=device, dtype=in_body, integers=in_linear) or Body(
                checkpoint, device=device, dtype=in_body, integers=in_linear, attention=settings.attention,
                trust_remote_code=trusted,
            )  # fmt: skip
            output = build_output(
                checkpoint.document, self.body, tokenizer, device=device, dtype=in_body, integers=in_head
            )
            self._head, self.vocabulary = output.head, output.vocabulary
            self.head_name = self._head.name
            projected = self.body.projection[0].shape[1] if self.body.projection else None
            self.lacks_llvmlite = not find_spec("llvmlite") and _would_compile(device, PRECISIONS[dtype], projected)
            if in_body != torch.float32:  # the head has its own copy
                self.body.projection = None
            # Padding is masked: a token that was added to the tokenizer alone does no harm there.
            self._padding_id = tokenizer.padding_id if tokenizer.padding_id < self.body.ids else 0
            tokenless = [token_id for token_id, token in enumerate(self.vocabulary) if token is None]
            self._tokenless = torch.tensor(tokenless, dtype=torch.int64, device=device)
            special = tokenizer.special_ids if settings.document_special_tokens == "zero" else []
            self._zeroed = torch.tensor([*output.dropped, *special], dtype=torch.int64, device=device)
        self.usual_batch_tokens = usual_batch_tokens(device.type, self.body.width)

    def make(
        self, token_ids: Sequence[TokenIds], batch_tokens: int, progress: OnBatch, rules: Pruning = NO_RULES
    ) -> BatchVectors:
        """Return the vectors of inputs, and the number of weights on ids without a token.

        Raises:
            DidNotFit: memory ran out.
            CheckpointError: the tokenizer gives an id for which the model has no embedding.
        """
        if (largest := max((int(ids.max()) for ids in token_ids if len(ids)), default=0)) >= self.body.ids:
            raise CheckpointError(
                f"A text has a token with the id {largest}, but {self._name} has embeddings for ids below "
                f"{self.body.ids:,}: the tokenizer has more tokens than the model. Use the tokenizer that the model "
                "was trained with."
            )
        lengths = np.fromiter(map(len, token_ids), dtype=np.int64, count=len(token_ids))
        # An empty text has no tokens if the tokenizer adds no special ones.
        filled = np.flatnonzero(lengths)
        is_cpu = self.device.type == "cpu"
        plan = plan_batches(lengths[filled], batch_tokens, BATCH_DOCUMENTS[self.device.type], for_cores=is_cpu)
        batches = [filled[batch] for batch in plan]
        rows: list[Vector] = [NOTHING] * len(token_ids)
        without_token = 0
        results = self.on_workers if is_cpu else self.ahead
        most = self._threads_of_lone(int(lengths.sum())) if len(batches) == 1 else 1
        with (
            _on(self.device),
            at_most_threads(most, torch_on_one=self._in_integers),
            # Closed as soon as `progress` raises: batches that have not started are then not computed.
            closing(results(token_ids, batches, rules)) as answers,
        ):
            for batch, (vectors, dropped) in zip(batches, answers, strict=True):
                for place, vector in zip(batch, vectors, strict=True):
                    rows[place] = vector
                without_token += dropped
                progress(len(batch), int(lengths[batch].sum()))
        return rows, without_token

    def strongest(self, token_ids: TokenIds, columns: Sequence[int]) -> tuple[npt.NDArray[np.int64], list[float]]:
        """Return the token of an input with the largest logit of each column, and the weight that follows from it.

        Only these columns are computed, in float32. Weights that documents never have are 0. Raise `UsageError` if the
        projection is not in float32, or terms are not from single tokens.
        """
        with _on(self.device), at_most_threads(1), torch.inference_mode():
            hidden = self.body.hidden([token_ids], self._padding_id)[0].float()
            ids, chosen = torch.from_numpy(token_ids), torch.tensor(columns, dtype=torch.int64)
            if self.body.projection:
                projection, bias = (part[chosen].to(hidden) for part in self.body.projection)
                scores = hidden @ projection.T + bias
            elif isinstance(self._head, LexicalHead):
                scores = self._head.of_tokens(hidden, *(part.to(self.device) for part in (ids, chosen)))
            else:
                raise UsageError(
                    f"Origins need a model in float32 whose terms are tokens; this one computes in {self._dtype}, or "
                    'its terms are features. Pass dtype="float32", or use another model.'
                )
            logits, places = scores.max(dim=0)
            if not hidden.isfinite().all():
                raise NotFinite(self._dtype)
            weights = logarithm(logits.relu_(), self._activation).cpu()
            weights[torch.isin(chosen, torch.cat([self._zeroed, self._tokenless]).cpu())] = 0
            return places.cpu().numpy(), weights.tolist()

    def on_workers(self, token_ids: Sequence[TokenIds], batches: list[Batch], _: Pruning) -> Batches:
        """Yield the batches in their order, computed by the workers of a CPU. The caller applies the rules."""

        def compute(batch: Batch) -> tuple[list[Vector], int]:
            return self.compute([token_ids[place] for place in batch], batch)

        if len(batches) == 1:  # a query: starting threads would take longer than a small model
            yield compute(batches[0])
            return
        pool = ThreadPoolExecutor(self.workers)
        try:
            yield from pool.map(compute, batches)
        finally:
            # After Ctrl-C or a failed batch, do not wait for batches that have not started.
            pool.shutdown(cancel_futures=True)

    def ahead(self, token_ids: Sequence[TokenIds], batches: list[Batch], rules: Pruning) -> Batches:
        """Yield the batches in order; each is started before the terms of the previous one arrive."""
        before: tuple[Batch, Transfer] | None = None
        for batch in [*batches, None]:
            started = None
            if batch is not None:
                with self._fitting(batch, token_ids):
                    started = batch, self._start([token_ids[place] for place in batch], rules)
            if before is not None:
                places, transfer = before
                with self._fitting(places, token_ids):
                    yield self._split(transfer.arrive())
            before = started

    def compute(self, token_ids: Sequence[TokenIds], places: Batch) -> BatchVectors:
        """Return the vectors of one batch, computed on a CPU."""
        with self._fitting(places, token_ids), torch.inference_mode():
            weights, dropped = self._weights(token_ids)
            # numpy finds the few non-zero weights 6 times as fast as torch.
            documents, columns = np.divmod(np.flatnonzero(weights.numpy() != 0), weights.shape[1])
            found = weights[torch.from_numpy(documents), torch.from_numpy(columns)]
            counts = np.bincount(documents, minlength=len(token_ids)).astype(np.int32)
            values = logarithm(found, self._activation).numpy()
            return self._split(Terms(counts, columns.astype(np.int32), values, int(dropped)))

    def _threads_of_lone(self, tokens: int) -> int:
        """Return the number of threads for a batch that is alone."""
        if not self._all_cores:
            return 1
        operations = LAYER_OPERATIONS * tokens * self.body.width**2
        return min(self.workers, max(1, int(operations / LEAST_OF_THREAD)))

    def _start(self, token_ids: Sequence[TokenIds], rules: Pruning) -> Transfer:
        with torch.inference_mode():
            weights, dropped = self._weights(token_ids)
            return Transfer(logarithm(weights, self._activation), rules, dropped)

    def _weights(self, token_ids: Sequence[TokenIds]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return weights before the logarithm, `[documents, columns]`, and how many were on ids without a token.

        The number is -1 if hidden states are not finite, which a maximum can hide; a flag would make the host wait for
        the GPU.
        """
        rows, packing = self.body.hidden(token_ids, self._padding_id)
        weights = self._head(rows, packing)
        weights[:, self._zeroed] = 0
        dropped = torch.count_nonzero(weights[:, self._tokenless])
        weights[:, self._tokenless] = 0
        # The sum is finite if each number is, and much faster to compute than a test of each.
        return weights, torch.where(rows.sum(dtype=torch.float32).isfinite(), dropped, -1)

    def _split(self, terms: Terms) -> BatchVectors:
        if terms.dropped < 0 or not np.isfinite(terms.weights).all():
            raise NotFinite(self._dtype)
        ends = np.cumsum(terms.counts)[:-1]
        rows = zip(np.split(terms.token_ids, ends), np.split(terms.weights, ends), strict=True)
        return list(rows), terms.dropped

    @contextmanager
    def _fitting(self, places: Batch, token_ids: Sequence[TokenIds]) -> Iterator[None]:
        """Raise `DidNotFit` with the inputs of the batch if memory runs out in the block."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise DidNotFit(places.tolist(), max(map(len, token_ids))) from error


@contextmanager
def _on(device: torch.device) -> Iterator[None]:
    """Compute without the autocast and the default device that the caller may have set for its thread.

    A compiled function would read the address of a tensor on another device. A GPU is made the current one of this
    thread: otherwise pinned memory would take 500 MB of the first GPU.
    """
    with ExitStack() as stack:
        for kind in {"cpu", device.type}:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        yield


@contextmanager
def at_most_threads(most: int, *, torch_on_one: bool = False) -> Iterator[None]:
    """Let each worker compute on at most this number of threads, and torch's own; on one in a forked process.

    One fixes the order of every sum on any machine. `torch_on_one`: it is for compiled functions, and torch has one.
    """
    with TORCH_STATE:
        usual, own = torch.get_num_threads(), threads.own
        allowed = 1 if forked.is_set() else min(most, usual)
        torch.set_num_threads(1 if torch_on_one else allowed)
        threads.own = allowed if torch_on_one else 0
        try:
            yield
        finally:
            torch.set_num_threads(usual)
            threads.own = own


def _would_compile(device: torch.device, precision: Precision, projected: int | None) -> bool:
    """Return whether llvmlite makes a model faster on this device.

    `projected` is the width of its vocabulary projection, if it has one.
    """
    if device.type != "cpu":
        return False
    # In float32 attention is a small part of the time.
    attention = cpu_attention.instructions_for(precision.body, cpu_attention.WIDTHS[0])
    in_attention = precision.body != torch.float32 and attention
    in_head = projected and instructions_for(precision.head or precision.body, projected)
    return bool(precision.linear or in_attention or in_head)


def usual_batch_tokens(device: str, width: int) -> int:
    """Return the default token budget of a batch on a type of device, for hidden states of this width."""
    return CPU_TOKENS if device == "cpu" else GPU_NUMBERS // width


def plan_batches(
    lengths: npt.NDArray[np.integer], batch_tokens: int, batch_documents: int, *, for_cores: bool
) -> list[Batch]:
    """Split documents into batches of at most `batch_tokens` padded tokens and `batch_documents` documents.

    Documents are sorted longest first, so that similar lengths share a batch; equal lengths keep corpus order.
    A document longer than the budget gets its own batch. Every index occurs once. `for_cores` makes the last batches
    smaller, so that the cores of any CPU end at about the same time.
    """
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    left = total = int(lengths.sum())
    least = min(LEAST_TOKENS, LEAST_PER_ROOT * math.isqrt(total))
    batches: list[Batch] = []
    start = 0
    while start < len(order):
        share = left // SHARES
        share -= share % (1 << max(0, share.bit_length() - 2))
        budget = min(batch_tokens, max(least, share)) if for_cores else batch_tokens
        longest = max(1, int(lengths[order[start]]))
        count = min(batch_documents, max(1, budget // longest))
        batches.append(order[start : start + count])
        left -= int(lengths[batches[-1]].sum())
        start += count
    return batches
