"""Texts in memory to pruned vectors, a window of texts at a time, with progress and stop requests.

In: texts, and a document encoder. Out: `SparseVectors`. If memory runs out, the window is encoded again in smaller
batches.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from sparse_ingest.checkpoints.card import lost_weights
from sparse_ingest.errors import Interrupted, UsageError
from sparse_ingest.models.memory import BudgetLowered, DocumentTooLarge
from sparse_ingest.models.origins import Origin, origins
from sparse_ingest.models.sparse_vectors import SparseVectors
from sparse_ingest.pipeline import ModelSettings, Pipeline
from sparse_ingest.pruning import prune
from sparse_ingest.records import SparseRows, in_batches
from sparse_ingest.reporting import Reporter, TqdmReporter, reporter_of

if TYPE_CHECKING:
    from sparse_ingest.models.documents import DocumentEncoder, Encoded

logger = logging.getLogger(__name__)

# The same windows as in a run, so that the same texts share batches; a batch that is not alone then has the same bits.
WINDOW_TEXTS = 8192
WINDOW_CHARACTERS = 32 << 20


class DocumentSide:
    """A document encoder with the pruning of its resolved pipeline. Threads take turns, a window of texts each."""

    def __init__(self, encoder: DocumentEncoder, pipeline: Pipeline) -> None:
        self.encoder = encoder
        self._model, self._settings = pipeline.model, pipeline.encode
        self._lock = threading.Lock()
        self._warned = False

    def computes_as(self, settings: ModelSettings) -> bool:
        """Return whether these settings have this encoder's activation, pooling and special tokens."""
        names = ("activation", "pooling", "document_special_tokens")
        return all(getattr(self._model, name) == getattr(settings, name) for name in names)

    def encode(self, texts: Sequence[str], max_active_dims: int | None, reporter: Reporter) -> SparseVectors:
        """Return the vectors of texts in their order; `max_active_dims` replaces the pipeline's `top_k`.

        Raises:
            DocumentTooLarge: one text does not fit into memory.
            Interrupted: the reporter requested a stop.
        """
        reporter.begin("documents", len(texts))
        rules = self._settings.rules | {"top_k": max_active_dims or self._settings.top_k}
        parts: list[SparseRows] = []
        first = without_token = 0
        for window in list(in_batches(texts, WINDOW_TEXTS, WINDOW_CHARACTERS)) or [[]]:
            try:
                with self._lock:
                    encoded = self._encode(window, reporter)
            except DocumentTooLarge as large:
                raise DocumentTooLarge(first + large.text, large.tokens, str(self.encoder.device)) from large
            parts.append(prune(encoded.vectors, **rules))
            first += len(window)
            without_token += encoded.without_token
        if without_token:
            message = lost_weights(without_token, self.encoder.vocabulary)
            reporter.note(message)
            if not self._warned:
                self._warned = True
                logger.warning(message)
        return replace(SparseVectors.from_rows(SparseRows.joined(parts), self.encoder.vocabulary), doc_ids=None)

    def origins(self, text: str, tokens: Sequence[str]) -> list[Origin]:
        """Return the origins of terms of a text (origins.py)."""
        with self._lock:
            return origins(self.encoder, text, tokens, windows=self._settings.overflow == "windows")

    def _encode(self, texts: Sequence[str], reporter: Reporter) -> Encoded:
        """Encode a window. Documents that are encoded again, in smaller batches, are reported once."""
        done = reported = 0

        def progress(documents: int, tokens: int) -> None:
            nonlocal done, reported
            refuse_if_stopped(reporter)
            done += documents
            new = max(0, done - reported)
            reported += new
            if new or not documents:
                reporter.advance(new, tokens=tokens)

        while True:
            try:
                if self._settings.overflow == "windows":
                    return self.encoder.encode_windows(self.encoder.cut(texts), progress)
                return self.encoder.encode(texts, progress)
            except BudgetLowered as lowered:
                reporter.note(str(lowered))
                done = 0


def checked_texts(texts: str | Iterable[str]) -> list[str]:
    """Return texts as a list; a single string is one text. Raise `UsageError` for a text that is not Unicode text."""
    if isinstance(texts, str):
        texts = [texts]
    # A DataFrame iterates over the names of its columns.
    is_other = isinstance(texts, bytes | bytearray | Mapping | AbstractSet) or hasattr(texts, "columns")
    if not isinstance(texts, Iterable) or is_other:
        raise UsageError(f"The texts are {type(texts).__name__}; expected a string, or a sequence of strings.")
    # An Arrow array iterates over its own scalars.
    chosen = texts.to_pylist() if hasattr(texts, "to_pylist") else list(texts)
    for place, text in enumerate(chosen):
        if not isinstance(text, str):
            raise UsageError(f"Text {place} is {type(text).__name__}; expected a string.")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(text[error.start]):04x}"
            raise UsageError(f"Text {place} has {half}, half of a surrogate pair. Fix its encoding.") from error
    return chosen


def refuse_if_stopped(reporter: Reporter) -> None:
    """Raise Interrupted if the reporter asks to stop."""
    if reporter.stop_requested():
        raise Interrupted("Stopped on request; the vectors so far are discarded.")


@contextmanager
def reporting(progress: bool | Reporter) -> Iterator[Reporter]:
    """Yield the reporter of a `progress=` argument, and finish its bar if it was created here."""
    reporter = reporter_of(progress)
    try:
        yield reporter
    finally:
        if progress is True and isinstance(reporter, TqdmReporter):
            reporter.close()
