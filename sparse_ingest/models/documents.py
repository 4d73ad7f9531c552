"""Documents to sparse vectors with a masked LM.

In: texts, or their tokens, so that one thread may tokenize while another encodes. Out: CSR arrays in the order of the
texts, or one vector after another for passages. tokenizer.py divides texts into windows, vectors.py computes the
vectors of token ids. The first windows of all texts share batches, so that a text that fits one window gets the same
bits however longer texts are read; the other windows follow in groups of bounded size.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from itertools import groupby
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from sparse_ingest.checkpoints.layouts import Checkpoint
from sparse_ingest.errors import UsageError
from sparse_ingest.models.memory import BudgetLowered, DidNotFit, DocumentTooLarge
from sparse_ingest.models.tokenizer import Cut, FirstWindow, TokenIds, Tokenizer
from sparse_ingest.models.vectors import NO_RULES, NOTHING, BatchVectors, OnBatch, Vector, VectorMaker, at_most_threads
from sparse_ingest.pipeline import ModelSettings, Pipeline, Pruning
from sparse_ingest.records import SparseRows, in_batches

# Windows that are encoded together after the first of each text, and their tokens; both bound memory.
GROUP_WINDOWS = 2048
GROUP_TOKENS = 1 << 20


def _ignore(documents: int, tokens: int) -> None:
    """Report no progress."""


class Encoded(NamedTuple):
    """Vectors of a list of texts, without ids and with float32 weights, and counts.

    `tokens` counts the tokens read, `without_token` the omitted weights on ids without a token string, which no index
    can store. `truncated_of` is 1 for each truncated text, `windows_of` the number of windows of each text.
    """

    vectors: SparseRows
    tokens: int
    without_token: int
    truncated_of: npt.NDArray[np.int64]
    windows_of: npt.NDArray[np.int64]


class EncodedPassage(NamedTuple):
    """The vector of one window, the index of its text, its number in it, and `without_token` as in `Encoded`."""

    text: int
    number: int
    row: Vector
    without_token: int


class DocumentEncoder:
    """A checkpoint's document side on one device.

    `settings` must be resolved (checkpoints/settings.py). `vocabulary` has the token string of each id; `maker`
    computes vectors from token ids. A GPU applies `rules`, if they are set, to copy fewer terms; they do not replace
    `prune`. `all_cores` is that of `VectorMaker`.
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
        all_cores: bool = False,
    ) -> None:
        self.device = torch.device(device)
        self.rules = NO_RULES
        self._folder = checkpoint.transformer
        # transformers imports its modules at first use, which two threads cannot do at the same time.
        with at_most_threads(sys.maxsize):
            self._tokenizer = Tokenizer(self._folder, settings, window_stride=window_stride)
            self.maker = VectorMaker(
                checkpoint, settings, self._tokenizer, device=self.device, dtype=dtype, all_cores=all_cores
            )
        self.batch_tokens = batch_tokens or self.maker.usual_batch_tokens
        self.vocabulary = self.maker.vocabulary

    def on_same_weights(self, settings: ModelSettings) -> DocumentEncoder:
        """Return an encoder with the weights, activation and special tokens of this one, and another tokenizer."""
        other = copy(self)
        other.rules = NO_RULES
        other._tokenizer = Tokenizer(self._folder, settings)
        return other

    def missing_packages(self) -> list[str]:
        """Return the packages of the extra `fast` that would make this encoder faster on this machine."""
        found = {"llvmlite": self.maker.lacks_llvmlite, "nanotoken": self._tokenizer.lacks_nanotoken}
        return [package for package, is_missing in found.items() if is_missing]

    def encode(self, texts: Sequence[str], progress: OnBatch = _ignore) -> Encoded:
        """Encode texts, truncated at max_length; `progress` gets the documents and tokens of each finished batch."""
        return self.encode_tokens(self.tokenize(texts), progress)

    def tokenize(self, texts: Sequence[str]) -> list[FirstWindow]:
        """Return the tokens of texts, truncated at max_length, for `encode_tokens`."""
        return self._tokenizer(texts)

    def encode_tokens(self, first: Sequence[FirstWindow], progress: OnBatch = _ignore) -> Encoded:
        """Encode the tokens of texts."""
        rows, without_token = self._rows(enumerate(window.token_ids for window in first), progress, self.rules)
        tokens, truncated = sum(len(ids) for ids, _ in first), np.array([cut for _, cut in first], dtype=np.int64)
        return Encoded(_csr(rows), tokens, without_token, truncated, np.ones_like(truncated))

    def cut(self, texts: Sequence[str], *, places: bool = False) -> list[Cut]:
        """Return the tokens of complete texts for `encode_windows`, or with `places` for `encode_passages`."""
        return self._tokenizer.cut(texts, places=places)

    def spans(self, text: str) -> npt.NDArray[np.int32]:
        """Return the first character of each token of `cut([text])` and the end; zero or less in the prompt."""
        return self._tokenizer.spans(text)

    def encode_windows(self, cuts: Sequence[Cut], progress: OnBatch = _ignore) -> Encoded:
        """Encode complete texts: each vector is the element-wise maximum over the windows of the text."""
        first = [cut.window(0) for cut in cuts]
        rows, without_token = self._rows(enumerate(first), progress, NO_RULES)
        tokens, windows = sum(map(len, first)), np.array([cut.windows for cut in cuts], dtype=np.int64)
        for group in _groups(cuts, 1):
            inputs = ((text, ids) for text, _, ids in group)
            found, dropped = self._rows(inputs, lambda _, tokens: progress(0, tokens), NO_RULES)
            for text, pairs in groupby(zip(group, found, strict=True), key=lambda pair: pair[0][0]):
                rows[text] = _maximum([rows[text], *(row for _, row in pairs)])
            without_token += dropped
            tokens += sum(len(ids) for *_, ids in group)
        return Encoded(_csr(rows), tokens, without_token, np.zeros_like(windows), windows)

    def encode_passages(self, cuts: Sequence[Cut], progress: OnBatch = _ignore) -> Iterator[EncodedPassage]:
        """Encode each window separately, text after text."""
        first, without_token = self._rows(enumerate(cut.window(0) for cut in cuts), progress, self.rules)
        for group in _groups(cuts, 0):
            inputs = ((text, ids) for text, number, ids in group if number)
            further, dropped = self._rows(inputs, lambda _, tokens: progress(0, tokens), self.rules)
            without_token += dropped
            rows = iter(further)
            for text, number, _ in group:
                yield EncodedPassage(text, number, next(rows) if number else first[text], without_token)
                without_token = 0

    def _rows(self, inputs: Iterable[tuple[int, TokenIds]], progress: OnBatch, rules: Pruning) -> BatchVectors:
        """Return the vectors of inputs in their order. An input is the index of its text, and its tokens.

        Raises:
            BudgetLowered: memory ran out; batches are smaller from now on.
            DocumentTooLarge: memory ran out for one input alone.
        """
        inputs = list(inputs)
        try:
            return self.maker.make([ids for _, ids in inputs], self.batch_tokens, progress, rules)
        except DidNotFit as error:
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            if len(error.places) > 1:
                self.batch_tokens = min(self.batch_tokens, len(error.places) * error.longest) // 2
            elif self.maker.workers > 1:
                self.maker.workers = 1
            else:
                raise DocumentTooLarge(inputs[error.places[0]][0], error.longest, str(self.device)) from error
            raise BudgetLowered(str(self.device), len(error.places), self.batch_tokens, self.maker.workers) from error


def build_document_encoder(
    checkpoint: Checkpoint, pipeline: Pipeline, *, device: str, dtype: str, all_cores: bool = False
) -> DocumentEncoder:
    """Build the encoder of a resolved pipeline (checkpoints/settings.py); `device` and errors as in `choose_device`."""
    return DocumentEncoder(
        checkpoint,
        pipeline.model,
        device=choose_device(device),
        dtype=dtype,
        batch_tokens=pipeline.encode.batch_tokens,
        window_stride=pipeline.encode.window_stride,
        all_cores=all_cores,
    )


def choose_devices(requested: str) -> list[str]:
    """Return the devices of a comma-separated list; `auto` and `cuda` mean every GPU that torch sees.

    A device may be repeated, for two processes on it. CPU and GPUs together are a `UsageError`; see `choose_device`.
    """
    if requested in ("auto", "cuda") and (gpus := torch.cuda.device_count()) > 1:
        return [f"cuda:{number}" for number in range(gpus)]
    devices = [choose_device(one) for one in requested.split(",")]
    if len(devices) > 1 and (len({device.partition(":")[0] for device in devices}) > 1 or "cuda" in devices):
        raise UsageError(
            f"--device {requested}: vectors of a CPU and of a GPU differ in their last bits, so a run needs devices of "
            "one kind. Name GPUs by number, such as cuda:0,cuda:1, or the CPU alone."
        )
    return devices


def choose_device(requested: str) -> str:
    """Return the name of one device; `auto` is a GPU if torch sees one. Raise `UsageError` for an unknown device."""
    gpus = torch.cuda.device_count()
    if requested == "auto":
        return "cuda" if gpus else "cpu"
    form = re.fullmatch(r"cpu|cuda(?::(\d+))?", requested)
    if form is None:
        raise UsageError(f"--device {requested!r}: expected auto, cpu, cuda or cuda:N, or several as cuda:0,cuda:1.")
    if requested != "cpu" and int(form[1] or 0) >= gpus:
        raise UsageError(
            f"--device {requested}: torch sees {gpus} GPUs. Name another one, pass --device cpu, or install torch with "
            "CUDA."
        )
    return requested


def _groups(cuts: Sequence[Cut], first: int) -> Iterator[list[tuple[int, int, TokenIds]]]:
    """Yield groups of bounded size of the windows of texts from number `first` on, as (text, number, token ids)."""
    places = ((text, number) for text, cut in enumerate(cuts) for number in range(first, cut.windows))
    windows = (cut.window(number) for cut in cuts for number in range(first, cut.windows))
    for group in in_batches(windows, GROUP_WINDOWS, GROUP_TOKENS):
        yield [(text, number, ids) for ids, (text, number) in zip(group, places, strict=False)]


def _maximum(vectors: Iterable[Vector]) -> Vector:
    """Return the element-wise maximum of vectors."""
    token_ids, weights = (np.concatenate(arrays) for arrays in zip(*vectors, strict=True))
    order = np.argsort(token_ids, kind="stable")
    found, starts = np.unique(token_ids[order], return_index=True)
    return found, np.maximum.reduceat(weights[order], starts)


def _csr(rows: list[Vector]) -> SparseRows:
    indptr = np.cumsum([0, *(len(ids) for ids, _ in rows)], dtype=np.int64)
    token_ids, weights = (np.concatenate(arrays) for arrays in zip(NOTHING, *rows, strict=True))
    return SparseRows([""] * len(rows), indptr, token_ids, weights)
