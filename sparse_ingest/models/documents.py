"""Documents to sparse vectors with a masked LM.

In: texts, or their tokens: one thread may tokenise while another one encodes. Out: CSR arrays in the order of the
texts, or one vector after the other for passages. Where memory runs out, batches are smaller from then on, and the
caller is asked to begin its shard again (memory.py).

A text longer than max_length is cut, or read in overlapping windows. The first windows of all texts are batched by
themselves, so that a text which fits gets the same bits however long ones are read; the windows behind them follow in
groups of bounded size. Not covered: where windows lie in a text (tokenizer.py), and how token ids become vectors
(vectors.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from itertools import groupby
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from sparse_ingest.checkpoints.layouts import Checkpoint
from sparse_ingest.errors import UsageError
from sparse_ingest.models.batches import usual_batch_tokens
from sparse_ingest.models.heads.compaction import Rules
from sparse_ingest.models.memory import BudgetLowered, DidNotFit, DocumentTooLarge
from sparse_ingest.models.tokenizer import Cut, TokenIds, Tokenized, Tokenizer
from sparse_ingest.models.vectors import NO_RULES, NOTHING, TORCH_STATE, Answer, Progress, Row, VectorMaker
from sparse_ingest.pipeline import ModelSettings

# Windows encoded together beyond the first of each text, and their tokens: what they hold in memory is bounded by it.
GROUP_WINDOWS = 2048
GROUP_TOKENS = 1 << 20

_NO_COUNTS = np.empty(0, dtype=np.int64)


class Encoded(NamedTuple):
    """Vectors of a list of texts as CSR (float32 weights), and what happened on the way.

    `tokens` counts the tokens read; `truncated` the texts that were cut; `without_token` the weights on ids that have
    no token string, which no index can hold and which are left out; `windows` the windows that were read.
    `truncated_of` and `windows_of` say both of each text.
    """

    indptr: npt.NDArray[np.int64]
    token_ids: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]
    tokens: int
    truncated: int
    without_token: int
    windows: int
    truncated_of: npt.NDArray[np.int64] = _NO_COUNTS
    windows_of: npt.NDArray[np.int64] = _NO_COUNTS


class Passage(NamedTuple):
    """The vector of one window: of which text, which of its windows, and the weights left out as in `Encoded`."""

    text: int
    number: int
    row: Row
    without_token: int


class DocumentEncoder:
    """A checkpoint's document side on one device.

    `settings` must be resolved (checkpoints/settings.py). `vocabulary` gives the token string of each id. `rules`
    may be set; they are applied where the device would otherwise copy what they drop, and `prune` follows all the same.
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
        self.rules: Rules = NO_RULES
        self._folder = checkpoint.transformer
        self._tokenizer = Tokenizer(self._folder, settings, window_stride=window_stride)
        with TORCH_STATE, _on(self.device):
            self._maker = VectorMaker(checkpoint, settings, self._tokenizer, device=self.device, dtype=dtype)
        width = self._maker.body.weight.shape[1]
        self.batch_tokens = batch_tokens or usual_batch_tokens(self.device.type, width)
        self.vocabulary = self._maker.vocabulary

    def on_same_weights(self, settings: ModelSettings) -> DocumentEncoder:
        """Return an encoder with another prompt, length limit or case that computes with the weights of this one.

        Activation and special tokens stay those of this encoder, whatever `settings` says.
        """
        other = copy(self)
        other.rules = NO_RULES
        other._tokenizer = Tokenizer(self._folder, settings)
        return other

    def encode(self, texts: Sequence[str], progress: Progress = lambda documents, tokens: None) -> Encoded:
        """Encode texts, cut at max_length; `progress` is told the documents and tokens of each finished batch."""
        return self.encode_tokens(self.tokenize(texts), progress)

    def tokenize(self, texts: Sequence[str]) -> Tokenized:
        """The tokens of texts, cut at max_length, for `encode_tokens`."""
        return self._tokenizer(texts)

    def encode_tokens(self, tokens: Tokenized, progress: Progress = lambda documents, tokens: None) -> Encoded:
        """Encode texts, given as their tokens."""
        rows, without_token = self._rows(tokens.token_ids, range(len(tokens.token_ids)), progress, self.rules)
        truncated = tokens.truncated.astype(np.int64)
        return _as_csr(rows, int(tokens.lengths.sum()), truncated, without_token, np.ones_like(truncated))

    def cut(self, texts: Sequence[str], *, places: bool = False) -> list[Cut]:
        """Whole texts as tokens, for `encode_windows`, or with `places` for `encode_passages`."""
        return self._tokenizer.cut(texts, places=places)

    def encode_windows(self, cuts: Sequence[Cut], progress: Progress = lambda documents, tokens: None) -> Encoded:
        """Encode whole texts: of each the element-wise maximum over its windows."""
        first = [cut.window(0) for cut in cuts]
        rows, without_token = self._rows(first, range(len(cuts)), progress, NO_RULES)
        tokens, windows = sum(map(len, first)), np.array([cut.windows for cut in cuts], dtype=np.int64)
        highest = np.zeros(len(self.vocabulary), dtype=np.float32)
        further = ((text, number) for text, cut in enumerate(cuts) for number in range(1, cut.windows))
        for group in _groups(further, cuts):
            token_ids = [cuts[text].window(number) for text, number in group]
            of = [text for text, _ in group]
            found, dropped = self._rows(token_ids, of, lambda _, tokens: progress(0, tokens), NO_RULES)
            for text, pairs in groupby(zip(group, found, strict=True), key=lambda pair: pair[0][0]):
                rows[text] = _maximum([rows[text], *(row for _, row in pairs)], highest)
            without_token += dropped
            tokens += sum(map(len, token_ids))
        return _as_csr(rows, tokens, np.zeros_like(windows), without_token, windows)

    def encode_passages(
        self, cuts: Sequence[Cut], progress: Progress = lambda documents, tokens: None
    ) -> Iterator[Passage]:
        """Encode each window for itself, text after text."""
        first, without_token = self._rows([cut.window(0) for cut in cuts], range(len(cuts)), progress, self.rules)
        every = ((text, number) for text, cut in enumerate(cuts) for number in range(cut.windows))
        for group in _groups(every, cuts):
            token_ids = [cuts[text].window(number) for text, number in group if number]
            of = [text for text, number in group if number]
            further, dropped = self._rows(token_ids, of, lambda _, tokens: progress(0, tokens), self.rules)
            without_token += dropped
            rows = iter(further)
            for text, number in group:
                yield Passage(text, number, next(rows) if number else first[text], without_token)
                without_token = 0

    def lengths(self, texts: Sequence[str]) -> npt.NDArray[np.int64]:
        """How many tokens of each text `encode` reads."""
        return self._tokenizer(texts).lengths

    def _rows(self, token_ids: Sequence[TokenIds], texts: Sequence[int], progress: Progress, rules: Rules) -> Answer:
        """The vectors of these inputs in their order; `texts` says of which text each is.

        Raises:
            BudgetLowered: memory ran out; from now on batches are smaller.
            DocumentTooLarge: it ran out for one input alone.
        """
        try:
            with _on(self.device):
                return self._maker.make(token_ids, self.batch_tokens, progress, rules)
        except DidNotFit as error:
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            if len(error.places) > 1:
                self.batch_tokens = min(self.batch_tokens, len(error.places) * error.longest) // 2
            elif self._maker.workers > 1:
                self._maker.workers = 1
            else:
                raise DocumentTooLarge(texts[error.places[0]], error.longest, str(self.device)) from error
            documents, workers = len(error.places), self._maker.workers
            raise BudgetLowered(str(self.device), documents, self.batch_tokens, workers) from error


def choose_devices(asked: str) -> list[str]:
    """The devices that one name or several with commas stand for; `auto` and `cuda` are every GPU that torch sees.

    One may be named twice, for two processes on it.

    Raises:
        UsageError: as `choose_device`, or CPU and GPUs are named together.
    """
    if asked in ("auto", "cuda") and (gpus := torch.cuda.device_count()) > 1:
        return [f"cuda:{number}" for number in range(gpus)]
    devices = [choose_device(one) for one in asked.split(",")]
    if len(devices) > 1 and (len({device.partition(":")[0] for device in devices}) > 1 or "cuda" in devices):
        raise UsageError(
            f"--device {asked}: vectors of a CPU and of a GPU differ in their last bits, so a run is made by one kind. "
            "Name GPUs by number, as cuda:0,cuda:1, or the CPU alone."
        )
    return devices


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
        raise UsageError(f"--device {asked!r}: expected auto, cpu, cuda or cuda:N, or several as cuda:0,cuda:1.")
    if asked != "cpu" and int(form[1] or 0) >= gpus:
        raise UsageError(
            f"--device {asked}: torch sees {gpus} GPUs here. Use another one, or --device cpu, or a torch with CUDA."
        )
    return asked


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Make a GPU the current one of this thread; else pinned memory would take 500 MB of the first one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


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


def _as_csr(
    rows: list[Row],
    tokens: int,
    truncated_of: npt.NDArray[np.int64],
    without_token: int,
    windows_of: npt.NDArray[np.int64],
) -> Encoded:
    indptr = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum([len(ids) for ids, _ in rows], out=indptr[1:])
    token_ids, weights = (np.concatenate(arrays) for arrays in zip(NOTHING, *rows, strict=True))
    truncated, windows = int(truncated_of.sum()), int(windows_of.sum())
    return Encoded(indptr, token_ids, weights, tokens, truncated, without_token, windows, truncated_of, windows_of)
