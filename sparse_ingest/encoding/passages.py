"""One row of a run for each window of each document: `overflow = "passages"`.

Ids are DOC#0, DOC#1, ... (also where there is one only); a field `parent` holds the id of the document, title and kept
fields are repeated, and of the text the piece that the window reads, so that storage does not multiply. The title is
read as the beginning of the text, by the windows that reach it. Characters between two tokens belong to the piece
before: without overlap (`window_stride` as large as a window) the pieces put together are the text.

Not covered: where the windows of a text are (models/tokenizer.py).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from sparse_ingest.corpora.documents import MAX_ID_BYTES, shown
from sparse_ingest.records import PARENT, Document, SparseRows, passage_id
from sparse_ingest.runs.shards import text_hash


@dataclass
class PassageGroup:
    """Rows of a row group that is being filled; `size` counts the characters of their fields."""

    rows: list[int] = field(default_factory=list)
    doc_ids: list[str] = field(default_factory=list)
    text_hashes: list[bytes] = field(default_factory=list)
    terms: list[tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]] = field(default_factory=list)
    fields: list[str] = field(default_factory=list)
    size: int = 0

    def add(self, row: int, doc_id: str, text: str, terms: tuple[npt.NDArray[np.int32], Any], fields: str) -> None:
        """Add one passage."""
        self.rows.append(row)
        self.doc_ids.append(doc_id)
        self.text_hashes.append(text_hash(text))
        self.terms.append(terms)
        self.fields.append(fields)
        self.size += len(fields)

    def vectors(self) -> SparseRows:
        """The vectors of the group."""
        indptr = np.concatenate(([0], np.cumsum([len(ids) for ids, _ in self.terms])))
        token_ids, weights = (np.concatenate(arrays) for arrays in zip(*self.terms, strict=True))
        return SparseRows(self.doc_ids, indptr, token_ids, weights)


class Carried:
    """The fields of a document, for its passages."""

    def __init__(self, document: Document, *, carry_text: bool) -> None:
        self._fields = {**json.loads(document.fields), PARENT: document.id}
        self._text = self._fields["text"] if carry_text else None
        # What the model reads ends with the text; title and blank come before it.
        self._before = len(document.text) - len(self._text or "")

    def fields(self, start: int, end: int) -> str:
        """The fields of the passage that reads these characters of what the model reads."""
        if self._text is not None:
            self._fields["text"] = self._text[max(0, start - self._before) : max(0, end - self._before)]
        return json.dumps(self._fields, ensure_ascii=False, separators=(",", ":"))


def too_long(doc_id: str, last: int) -> str | None:
    """What is wrong with the id of a document's last passage, if it is longer than OpenSearch takes."""
    size = len(passage_id(doc_id, last).encode())
    if size <= MAX_ID_BYTES:
        return None
    return (
        f"the id {shown(doc_id)} has {size} bytes with the suffix #{last} of its last passage; "
        f"at most {MAX_ID_BYTES} were expected"
    )
