"""The parts of a shard: source rows in, row groups with their vectors out, everything counted.

Rows are read a window at a time, at most one row group or 32 MB of text, so memory grows neither with the corpus nor
with the shard. Three threads read windows, tokenize them and compute their vectors, each at most one window ahead
(stages.py); the caller's thread prunes and writes. Standard input is read, encoded and written without threads.

A document becomes one row; its vector is computed, or copied from another run (`--reuse`) or from an earlier equal text
(`--dedup-text encode-once`, equal_texts.py). With `overflow = "passages"` it becomes one row per window, DOC#0, DOC#1,
...: the field `parent` has the id of the document, title and kept fields are repeated, and the text is the piece that
the window reads. Characters between two tokens belong to the piece before, so without overlap the pieces join to the
text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from operator import call
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from sparse_ingest.checkpoints.inspect import dense_warning
from sparse_ingest.corpora.sources import Cursor, bad_document
from sparse_ingest.encoding.counts import OF_ROWS, Counts
from sparse_ingest.encoding.equal_texts import Copies, Kept
from sparse_ingest.encoding.options import EncodeOptions
from sparse_ingest.encoding.stages import Ahead, Stages, Stopped
from sparse_ingest.errors import RunError, shown
from sparse_ingest.models.memory import DocumentTooLarge
from sparse_ingest.models.tokenizer import FirstWindow
from sparse_ingest.pipeline import EncodeSettings
from sparse_ingest.pruning import prune
from sparse_ingest.records import MAX_ID_BYTES, PARENT, Document, SourceRow, SparseRows, passage_id
from sparse_ingest.reporting import Reporter
from sparse_ingest.runs.files import SkippedRow
from sparse_ingest.runs.shards import PART_ROWS, ShardPart, store_weights, text_hash

if TYPE_CHECKING:
    from sparse_ingest.models.documents import DocumentEncoder, Encoded
    from sparse_ingest.models.vectors import Vector
    from sparse_ingest.runs.reuse import OldVectors

T = TypeVar("T")
WINDOW_BYTES = 32 << 20  # of text in one row group


class Window(NamedTuple):
    """Rows that are encoded together, with their documents, text hashes and tokens.

    `tokens` has a `FirstWindow` per text if texts are truncated, otherwise a `Cut` (models/tokenizer.py).
    """

    rows: list[SourceRow]
    documents: list[Document]
    hashes: list[bytes]
    tokens: list[Any]

    def take(self, places: npt.NDArray[np.int64]) -> Window:
        """Return the rows at these places."""
        chosen = places.tolist()
        return Window(*([each[place] for place in chosen] for each in self))


class _Carried:
    """The fields of a document, for its passages."""

    def __init__(self, document: Document, *, carry_text: bool) -> None:
        self._fields = {**json.loads(document.fields), PARENT: document.id}
        self._text = self._fields["text"] if carry_text else None
        # The model reads title, blank and text.
        self._before = len(document.text) - len(self._text or "")

    def fields(self, start: int, end: int) -> str:
        """Return the fields of a passage, whose text is this range of the characters that the model reads."""
        if self._text is not None:
            self._fields["text"] = self._text[max(0, start - self._before) : max(0, end - self._before)]
        return json.dumps(self._fields, ensure_ascii=False, separators=(",", ":"))


class _Shard(NamedTuple):
    """A shard in progress; `stopped` is set when its parts are no longer needed."""

    counts: Counts
    copies: Copies | None
    stopped: Event


Finish = Callable[[], ShardPart]  # prunes the vectors of a part


@dataclass(frozen=True)
class ShardMaker:
    """Encodes the row groups of shards, one shard after another.

    `old` has the vectors of another run to reuse. `copies_folder` is for the vectors of equal texts; None: each text is
    computed.
    """

    encoder: DocumentEncoder
    settings: EncodeSettings
    options: EncodeOptions
    reporter: Reporter
    stages: Stages
    old: OldVectors | None = None
    copies_folder: Path | None = None
    _density_checked: Event = field(default_factory=Event)

    def parts(self, cursor: Cursor, shard_rows: int, counts: Counts) -> Generator[ShardPart, None, None]:
        """Yield the row groups of the shard at the cursor, which is after the shard at the end.

        The stage `write` must be busy; its clock stops while this waits. Close it before you move the cursor.
        """
        with ExitStack() as stack:
            copies = stack.enter_context(closing(Copies(self.copies_folder))) if self.copies_folder else None
            shard = _Shard(counts, copies, Event())

            def ahead(items: Iterable[T]) -> Iterable[T]:
                # Ctrl-C interrupts a read of standard input, which may block forever, in the main thread only.
                return stack.enter_context(closing(Ahead(items))) if cursor.rereadable else items

            read = ahead(self.stages.making("read", self._read(cursor, shard_rows, shard)))
            computed = ahead(self._compute(ahead(map(self._tokenize, read)), shard))
            stack.callback(shard.stopped.set)
            yield from map(counts.part, map(call, self.stages.waiting("write", computed)))

    def _read(self, cursor: Cursor, shard_rows: int, shard: _Shard) -> Iterator[list[tuple[SourceRow, Document]]]:
        """Yield the rows of a shard in windows that fit one row group. Refuse or record bad rows."""
        window: list[tuple[SourceRow, Document]] = []
        size, seen = 0, 0
        for row in cursor.take(shard_rows):
            if shard.stopped.is_set():
                raise Stopped
            seen += 1
            shard.counts.input_rows.add(row)
            if row.document is None:
                self._refuse_or_skip(row, shard.counts)
            else:
                window.append((row._replace(document=None), row.document))
                size += len(row.document.text) + len(row.document.fields)
            if seen == PART_ROWS or size >= WINDOW_BYTES:
                self._expect(cursor)
                yield window
                window, size, seen = [], 0, 0
        if seen:
            self._expect(cursor)
            yield window

    def _expect(self, cursor: Cursor) -> None:
        if rows := cursor.expected_rows:
            self.reporter.expect(rows)

    def _tokenize(self, rows: list[tuple[SourceRow, Document]]) -> Window:
        with self.stages.busy("tokenise"):
            documents = [document for _, document in rows]
            texts = [document.text for document in documents]
            if self.settings.overflow == "truncate":
                tokens: list[Any] = self.encoder.tokenize(texts)
            else:
                tokens = self.encoder.cut(texts, places=self.settings.overflow == "passages")
            return Window([row for row, _ in rows], documents, [text_hash(text) for text in texts], tokens)

    def _refuse_or_skip(self, row: SourceRow, counts: Counts) -> None:
        if self.options.on_bad_document == "fail":
            raise bad_document(row)
        counts.skipped.append(SkippedRow(row.row, row.file, row.line, row.reason or ""))

    def _compute(self, windows: Iterable[Window], shard: _Shard) -> Iterator[Finish]:
        for window in windows:
            yield from self.stages.making("encode", self._fitting(window, shard))
            del window

    def _fitting(self, window: Window, shard: _Shard) -> Iterator[Finish]:
        """Yield the parts of a window; a document that does not fit into memory even alone is a bad document."""
        while window.rows:
            yielded = False
            try:
                passages = self.settings.overflow == "passages"
                for part in self._passages(window, shard) if passages else self._documents(window, shard):
                    yielded = True
                    yield part
                return
            except _TooLarge as large:
                if yielded:
                    raise RunError(
                        f"A document does not fit: {large.reason}. Encode with a smaller --max-length."
                    ) from large
                too_large = np.array([document.text == large.text for document in window.documents])
                for row in window.take(np.flatnonzero(too_large)).rows:
                    self._refuse_or_skip(row._replace(reason=large.reason), shard.counts)
                window = window.take(np.flatnonzero(~too_large))

    def _documents(self, window: Window, shard: _Shard) -> Iterator[Finish]:
        """Yield one part, a row for each document; vectors of known texts are not computed."""
        known, old = np.zeros(len(window.rows), dtype=np.bool_), None
        if self.old:
            known, old = self.old.find(window.hashes)
        new = window.take(np.flatnonzero(~known)) if known.any() else window
        if shard.copies is None:
            computed: Encoded | Kept = self._computed(new, shard, len(window.rows))
            copied = int(known.sum())
        else:
            computed = self._once(new, shard.copies, shard, len(window.rows))
            copied = int(known.sum() + computed.of_rows["deduplicated"].sum())
        if copied:
            self.reporter.advance(copied)
        yield partial(self._part, window, known, old, computed, shard.counts)

    def _part(
        self,
        window: Window,
        known: npt.NDArray[np.bool_],
        old: SparseRows | None,
        computed: Encoded | Kept,
        counts: Counts,
    ) -> ShardPart:
        """Return the rows of a window: old vectors where `known`, computed vectors otherwise."""
        kept = computed if isinstance(computed, Kept) else self._kept(computed)
        if old is not None:
            places = np.empty(len(known), dtype=np.int64)
            places[known] = np.arange(known.sum())
            places[~known] = known.sum() + np.arange((~known).sum())
            kept = _reused(window.take(np.flatnonzero(known)), old).with_more(kept).take(places)
        numbers = np.array([row.row for row in window.rows], dtype=np.uint64)
        counts.of_rows(numbers, kept.of_rows)
        vectors = kept.vectors._replace(doc_ids=[document.id for document in window.documents])
        return ShardPart(numbers, window.hashes, vectors, [document.fields for document in window.documents])

    def _once(self, window: Window, copies: Copies, shard: _Shard, rows: int) -> Kept:
        """Return the vectors of texts; each different text is computed once per shard."""
        new: dict[bytes, int] = {}  # the first place of each new text
        for place, (one, number) in enumerate(zip(window.hashes, copies.find(window.hashes).tolist(), strict=True)):
            if number < 0:
                new.setdefault(one, place)
        first = np.fromiter(new.values(), dtype=np.int64, count=len(new))
        copies.add(list(new), self._kept(self._computed(window.take(first), shard, rows)))
        kept = copies.take(copies.find(window.hashes))
        kept.of_rows["deduplicated"] = 1
        kept.of_rows["deduplicated"][first] = 0
        return kept

    def _computed(self, window: Window, shard: _Shard, rows: int) -> Encoded:
        """Return the vectors of texts; with the copied ones they are `rows`."""
        tokens, encoded = window.tokens, partial(self._encoded, shard.stopped)
        self.reporter.plan(rows, _count(tokens))
        with _too_large(window):
            if self.settings.overflow == "truncate":
                vectors = self.encoder.encode_tokens(tokens, encoded)
            else:
                vectors = self.encoder.encode_windows(tokens, encoded)
        shard.counts.without_token += vectors.without_token
        return vectors

    def _encoded(self, stopped: Event, documents: int, tokens: int) -> None:
        """Report a batch. Raise `Stopped` if the shard is abandoned."""
        if stopped.is_set():
            raise Stopped
        self.reporter.advance(documents, tokens=tokens, detail=self.stages.slowest())

    def _kept(self, encoded: Encoded) -> Kept:
        vectors, underflow = self._stored(encoded.vectors)
        of_rows = np.zeros(len(underflow), OF_ROWS)
        of_rows["truncated"], of_rows["windows"] = encoded.truncated_of, encoded.windows_of
        of_rows["underflow"] = underflow
        return Kept(vectors, of_rows)

    def _passages(self, window: Window, shard: _Shard) -> Iterator[Finish]:
        """Yield parts with one row for each window of each document."""
        fitting = []
        for place, (row, document, cut) in enumerate(zip(window.rows, window.documents, window.tokens, strict=True)):
            if reason := _too_long(document.id, cut.windows - 1):
                self._refuse_or_skip(row._replace(reason=reason), shard.counts)
            else:
                fitting.append(place)
        window = window.take(np.array(fitting, dtype=np.int64))
        group: list[tuple[int, str, bytes, Vector, str]] = []  # row, id, hash of the text, terms, fields
        size, cuts = 0, window.tokens
        self.reporter.plan(len(cuts), _count(cuts))
        passages = self.encoder.encode_passages(cuts, partial(self._encoded, shard.stopped))
        while True:
            with _too_large(window):
                passage = next(passages, None)
            if passage is None:
                break
            row, document = window.rows[passage.text], window.documents[passage.text]
            if passage.number == 0:
                carried = _Carried(document, carry_text=not self.options.no_text)
            start, end = cuts[passage.text].span(passage.number, len(document.text))
            doc_id, hashed = passage_id(document.id, passage.number), text_hash(document.text[start:end])
            fields = carried.fields(start, end)
            group.append((row.row, doc_id, hashed, passage.row, fields))
            size += len(fields)
            shard.counts.without_token += passage.without_token
            if len(group) == PART_ROWS or size >= WINDOW_BYTES:
                yield partial(self._part_of, group, shard.counts)
                group, size = [], 0
        if group:
            yield partial(self._part_of, group, shard.counts)

    def _part_of(self, group: list[tuple[int, str, bytes, Vector, str]], counts: Counts) -> ShardPart:
        numbers, doc_ids, hashes, terms, fields = map(list, zip(*group, strict=True))
        rows = np.array(numbers, dtype=np.uint64)
        indptr = np.concatenate(([0], np.cumsum([len(token_ids) for token_ids, _ in terms])))
        token_ids, weights = (np.concatenate(arrays) for arrays in zip(*terms, strict=True))
        vectors, underflow = self._stored(SparseRows(doc_ids, indptr, token_ids, weights))
        of_rows = np.zeros(len(rows), OF_ROWS)
        of_rows["windows"], of_rows["underflow"] = 1, underflow
        counts.of_rows(rows, of_rows)
        return ShardPart(rows, hashes, vectors, fields)

    def _stored(self, vectors: SparseRows) -> tuple[SparseRows, npt.NDArray[np.int64]]:
        """Return the vectors pruned and in the run's type of weights, and the number of underflows of each."""
        settings = self.settings
        if not self._density_checked.is_set():
            self._density_checked.set()
            if warning := dense_warning(len(vectors.token_ids), len(vectors.doc_ids)):
                self.reporter.warn(warning)
        vectors = prune(vectors, **settings.rules)
        try:
            stored = store_weights(vectors, settings.weights)
        except ValueError as error:
            advice = "Encode with --weights float32, and with --dtype float32 if that is not enough."
            raise RunError(f"Weights cannot be stored: {error}. {advice}") from error
        return stored, np.diff(vectors.indptr) - np.diff(stored.indptr)


def _count(tokens: Sequence[Any]) -> int:
    """Return the number of tokens that the model reads for texts."""
    return sum(len(text.token_ids) if isinstance(text, FirstWindow) else text.tokens for text in tokens)


def _reused(window: Window, vectors: SparseRows) -> Kept:
    """Return the vectors of another run with the counts of these texts."""
    of_rows = np.zeros(len(window.rows), OF_ROWS)
    of_rows["reused"] = 1
    if isinstance(window.tokens[0], FirstWindow):
        of_rows["truncated"], of_rows["windows"] = [text.truncated for text in window.tokens], 1
    else:
        of_rows["windows"] = [cut.windows for cut in window.tokens]
    return Kept(vectors, of_rows)


def _too_long(doc_id: str, last: int) -> str | None:
    """Return a reason if the id of a document's last passage is longer than OpenSearch accepts, otherwise None."""
    size = len(passage_id(doc_id, last).encode())
    if size <= MAX_ID_BYTES:
        return None
    passage = f"with the suffix #{last} of its last passage"
    return f"the id {shown(doc_id)} has {size} bytes {passage}; expected at most {MAX_ID_BYTES}"


class _TooLarge(Exception):
    """A text does not fit into memory."""

    def __init__(self, text: str, reason: str) -> None:
        super().__init__(reason)
        self.text, self.reason = text, reason


@contextmanager
def _too_large(window: Window) -> Iterator[None]:
    """Replace the place of a text that does not fit by the text itself."""
    try:
        yield
    except DocumentTooLarge as large:
        raise _TooLarge(window.documents[large.text].text, large.reason) from large
