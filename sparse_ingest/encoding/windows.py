"""Windows of a shard: rows that are encoded together, with their documents, text hashes and tokens.

Also the passages that a window's documents are divided into (`overflow = "passages"`), and texts that do not fit into
memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from sparse_ingest.encoding.counts import OF_ROWS
from sparse_ingest.encoding.equal_texts import Kept
from sparse_ingest.errors import shown
from sparse_ingest.models.memory import DocumentTooLarge
from sparse_ingest.models.tokenizer import FirstWindow
from sparse_ingest.records import MAX_ID_BYTES, PARENT, Document, SourceRow, SparseRows, passage_id
from sparse_ingest.runs.shards import ShardPart, text_hash

if TYPE_CHECKING:
    from sparse_ingest.models.documents import EncodedPassage
    from sparse_ingest.models.vectors import Vector

Passage: TypeAlias = "tuple[int, str, bytes, Vector, str]"  # source row, id, hash of the text, terms, fields


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


def count_tokens(tokens: Sequence[Any]) -> int:
    """Return the number of tokens that the model reads for texts."""
    return sum(len(text.token_ids) if isinstance(text, FirstWindow) else text.tokens for text in tokens)


def reused(window: Window, vectors: SparseRows) -> Kept:
    """Return the vectors of another run with the counts of these texts."""
    of_rows = np.zeros(len(window.rows), OF_ROWS)
    of_rows["reused"] = 1
    if isinstance(window.tokens[0], FirstWindow):
        of_rows["truncated"], of_rows["windows"] = [text.truncated for text in window.tokens], 1
    else:
        of_rows["windows"] = [cut.windows for cut in window.tokens]
    return Kept(vectors, of_rows)


class TooLarge(Exception):
    """A text does not fit into memory."""

    def __init__(self, text: str, reason: str) -> None:
        super().__init__(reason)
        self.text, self.reason = text, reason


@contextmanager
def too_large(window: Window) -> Iterator[None]:
    """Replace the place of a text that does not fit by the text itself."""
    try:
        yield
    except DocumentTooLarge as large:
        raise TooLarge(window.documents[large.text].text, large.reason) from large


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


def passage_groups(
    window: Window, passages: Iterable[EncodedPassage], *, carry_text: bool, max_rows: int, max_bytes: int
) -> Iterator[list[Passage]]:
    """Yield the rows of passages in groups of limited size."""
    group: list[Passage] = []
    size = 0
    for passage in passages:
        row, document = window.rows[passage.text], window.documents[passage.text]
        if passage.number == 0:
            carried = _Carried(document, carry_text=carry_text)
        start, end = window.tokens[passage.text].span(passage.number, len(document.text))
        doc_id, hashed = passage_id(document.id, passage.number), text_hash(document.text[start:end])
        fields = carried.fields(start, end)
        group.append((row.row, doc_id, hashed, passage.row, fields))
        size += len(fields)
        if len(group) == max_rows or size >= max_bytes:
            yield group
            group, size = [], 0
    if group:
        yield group


def passage_part(group: list[Passage]) -> ShardPart:
    """Return the rows of passages as one part; weights are as computed."""
    numbers, doc_ids, hashes, terms, fields = map(list, zip(*group, strict=True))
    indptr = np.concatenate(([0], np.cumsum([len(token_ids) for token_ids, _ in terms])))
    token_ids, weights = (np.concatenate(arrays) for arrays in zip(*terms, strict=True))
    rows = np.array(numbers, dtype=np.uint64)
    return ShardPart(rows, hashes, SparseRows(doc_ids, indptr, token_ids, weights), fields)


def too_long_id(doc_id: str, last: int) -> str | None:
    """Return a reason if the id of a document's last passage is longer than clusters accept, otherwise None."""
    size = len(passage_id(doc_id, last).encode())
    if size <= MAX_ID_BYTES:
        return None
    passage = f"with the suffix #{last} of its last passage"
    return f"the id {shown(doc_id)} has {size} bytes {passage}; expected at most {MAX_ID_BYTES}"
