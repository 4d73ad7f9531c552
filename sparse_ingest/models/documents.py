"""Documents to sparse vectors with a masked LM.

In: texts. Out: CSR arrays in the order of the texts, or one vector after the other for passages. Batches run longest
first on a few single-threaded workers on the CPU (two workers of one thread beat one of two), on one on a GPU; results
do not depend on how many there are.

A text longer than max_length is cut, or read in overlapping windows. The first windows of all texts are batched by
themselves, so that a text which fits gets the same bits however long ones are read; the windows behind them follow in
groups of bounded size. Not covered: where windows lie in a text (tokenizer.py).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from sparse_ingest.checkpoints.layouts import Checkpoint
from sparse_ingest.errors import UsageError
from sparse_ingest.models.batches import plan_batches
from sparse_ingest.models.body import Body
from sparse_ingest.models.heads.tiles import TiledHead
from sparse_ingest.models.tokenizer import Cut, TokenIds, Tokenizer
from sparse_ingest.pipeline import ModelSettings

# Padded tokens of a batch. On the CPU larger ones fall out of the cache; for GPUs it is a careful start, not measured.
BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
# Documents of a batch: each has a dense row of the whole vocabulary until it is compacted.
BATCH_DOCUMENTS = {"cpu": 64, "cuda": 1024}
# Windows encoded together beyond the first of each text, and their tokens: what they hold in memory is bounded by it.
GROUP_WINDOWS = 2048
GROUP_TOKENS = 1 << 20
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Row = tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]  # token ids ascending, weights above zero
Progress = Callable[[int, int], None]


class Encoded(NamedTuple):
    """Vectors of a list of texts as CSR (float32 weights), and what happened on the way.

    `tokens` counts the tokens read; `truncated` the texts that were cut; `without_token` the weights on ids that have
    no token string, which no index can hold and which are left out; `windows` the windows that were read.
    """

    indptr: npt.NDArray[np.int64]
    token_ids: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]
    tokens: int
    truncated: int
    without_token: int
    windows: int


class Passage(NamedTuple):
    """The vector of one window: of which text, which of its windows, and the weights left out as in `Encoded`."""

    text: int
    number: int
    row: Row
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
        window_stride: int | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.batch_tokens = batch_tokens or BATCH_TOKENS[self.device.type]
        self._tokenizer = Tokenizer(checkpoint.transformer, settings, window_stride=window_stride)
        trusted = settings.trust_remote_code
        self._body = Body(checkpoint, device=self.device, dtype=DTYPES[dtype], trust_remote_code=trusted)
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

    def encode(self, texts: Sequence[str], progress: Progress = lambda documents, tokens: None) -> Encoded:
        """Encode texts, cut at max_length; `progress` is told the documents and tokens of each finished batch."""
        tokenized = self._tokenizer(texts)
        rows, without_token = self._rows(tokenized.token_ids, progress)
        tokens, truncated = int(tokenized.lengths.sum()), int(tokenized.truncated.sum())
        return _as_csr(rows, tokens, truncated, without_token, len(texts))

    def encode_windows(self, texts: Sequence[str], progress: Progress = lambda documents, tokens: None) -> Encoded:
        """Encode whole texts: of each the element-wise maximum over its windows."""
        cuts = self._tokenizer.cut(texts)
        first = [cut.window(0) for cut in cuts]
        rows, without_token = self._rows(first, progress)
        tokens, windows = sum(map(len, first)), len(texts)
        highest = np.zeros(len(self.vocabulary), dtype=np.float32)
        further = ((text, number) for text, cut in enumerate(cuts) for number in range(1, cut.windows))
        for group in _groups(further, cuts):
            token_ids = [cuts[text].window(number) for text, number in group]
            found, dropped = self._rows(token_ids, lambda _, tokens: progress(0, tokens))
            for text, pairs in groupby(zip(group, found, strict=True), key=lambda pair: pair[0][0]):
                rows[text] = _maximum([rows[text], *(row for _, row in pairs)], highest)
            without_token += dropped
            tokens, windows = tokens + sum(map(len, token_ids)), windows + len(group)
        return _as_csr(rows, tokens, 0, without_token, windows)

    def cut(self, texts: Sequence[str]) -> list[Cut]:
        """Where the windows of each text lie, for `encode_passages`."""
        return self._tokenizer.cut(texts, places=True)

    def encode_passages(
        self, cuts: Sequence[Cut], progress: Progress = lambda documents, tokens: None
    ) -> Iterator[Passage]:
        """Encode each window for itself, text after text."""
        first, without_token = self._rows([cut.window(0) for cut in cuts], progress)
        every = ((text, number) for text, cut in enumerate(cuts) for number in range(cut.windows))
        for group in _groups(every, cuts):
            token_ids = [cuts[text].window(number) for text, number in group if number]
            further, dropped = self._rows(token_ids, lambda _, tokens: progress(0, tokens))
            without_token += dropped
            rows = iter(further)
            for text, number in group:
                yield Passage(text, number, next(rows) if number else first[text], without_token)
                without_token = 0

    def count(self, texts: Sequence[str], *, whole: bool) -> tuple[int, int]:
        """How many texts are longer than one window, and (when they are read `whole`) how many windows all have."""
        windows = [cut.windows for cut in self._tokenizer.cut(texts, whole=whole)]
        return sum(count > 1 for count in windows), sum(windows) if whole else len(windows)

    def _rows(self, token_ids: Sequence[TokenIds], progress: Progress) -> tuple[list[Row], int]:
        """The vectors of these inputs in their order, and how many weights were on ids without a token."""
        lengths = np.fromiter(map(len, token_ids), dtype=np.int64, count=len(token_ids))
        # An empty text has no token at all where the tokenizer adds none of its own.
        filled = np.flatnonzero(lengths)
        plan = plan_batches(lengths[filled], self.batch_tokens, BATCH_DOCUMENTS[self.device.type])
        batches = [filled[batch] for batch in plan]
        rows: list[Row] = [_NOTHING] * len(token_ids)
        without_token = 0
        threads = torch.get_num_threads()
        # One thread a worker also fixes the order of every sum, whatever the machine.
        torch.set_num_threads(1)
        pool = ThreadPoolExecutor(self._workers)
        try:
            results = pool.map(lambda batch: self._encode_batch([token_ids[i] for i in batch]), batches)
            for batch, (vectors, dropped) in zip(batches, results, strict=True):
                for index, vector in zip(batch, vectors, strict=True):
                    rows[index] = vector
                without_token += dropped
                progress(len(batch), int(lengths[batch].sum()))
        finally:
            # After Ctrl-C the batches that have not begun are not waited for.
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)
        return rows, without_token

    def _encode_batch(self, token_ids: list[TokenIds]) -> tuple[list[Row], int]:
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


_NOTHING: Row = (np.empty(0, dtype=np.int32), np.empty(0, dtype=np.float32))


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


def _groups(windows: Iterable[tuple[int, int]], cuts: Sequence[Cut]) -> Iterator[list[tuple[int, int]]]:
    """Windows (text, number) in groups of bounded size."""
    group: list[tuple[int, int]] = []
    tokens = 0
    for text, number in windows:
        length = cuts[text].length(number)
        if group and (len(group) == GROUP_WINDOWS or tokens + length > GROUP_TOKENS):
            yield group
            group, tokens = [], 0
        group.append((text, number))
        tokens += length
    if group:
        yield group


def _maximum(rows: Iterable[Row], highest: npt.NDArray[np.float32]) -> Row:
    """The element-wise maximum of vectors; `highest` is a dense row of zeros, and left as one."""
    for token_ids, weights in rows:
        highest[token_ids] = np.maximum(highest[token_ids], weights)
    found = np.flatnonzero(highest).astype(np.int32)
    maxima = highest[found]
    highest[found] = 0
    return found, maxima


def _as_csr(rows: list[Row], tokens: int, truncated: int, without_token: int, windows: int) -> Encoded:
    indptr = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum([len(ids) for ids, _ in rows], out=indptr[1:])
    token_ids, weights = (np.concatenate(arrays) for arrays in zip(_NOTHING, *rows, strict=True))
    return Encoded(indptr, token_ids, weights, tokens, truncated, without_token, windows)
