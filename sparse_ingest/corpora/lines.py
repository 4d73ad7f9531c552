"""JSON lines as a source: one object a line, blank lines left out.

Not covered: what makes a row a document.
"""

from __future__ import annotations

from collections.abc import Iterator

from sparse_ingest.corpora.documents import BadRow, json_object
from sparse_ingest.corpora.sources import Record
from sparse_ingest.corpora.stored import BYTE_ORDER_MARK, Lines, StoredFile


class JsonLines:
    """A file of JSON lines. An offset is a byte of its content."""

    unit = "line"

    def __init__(self, file: StoredFile, label: str) -> None:
        self.name, self.label, self.bytes = file.name, label, file.bytes
        self.rereadable = file.bytes is not None
        self._lines = Lines(file)

    def identity(self) -> dict[str, object]:
        """The name, and the size where there is one."""
        return {"name": self.name} if self.bytes is None else {"name": self.name, "bytes": self.bytes}

    def passed(self, offset: int) -> int | None:
        """How many stored bytes lie before the row at `offset`."""
        return self._lines.passed(offset)

    def records(self, offset: int, line: int) -> Iterator[Record]:
        """Every line from `offset` on that is not blank."""
        for raw in self._lines.read(offset, line):
            content = raw.removeprefix(BYTE_ORDER_MARK) if offset == 0 else raw
            offset += len(raw)
            line += 1
            try:
                columns = json_object(content)
            except BadRow as bad:
                yield Record(None, str(bad), line - 1, offset, line)
                continue
            if columns is not None:
                # A line without a backslash holds no string that needs one: writing it again is a copy.
                yield Record(columns, None, line - 1, offset, line, b"\\" not in raw)
