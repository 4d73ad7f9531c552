"""Splits of Hugging Face datasets: the base class, and those that `save_to_disk` wrote."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparse_ingest.corpora.columns import chosen_columns, records_of, rows_of
from sparse_ingest.corpora.hub_names import Named, reading_rows
from sparse_ingest.corpora.pieces import RowUnits, Search, Task
from sparse_ingest.corpora.sources import ChooseColumns, Record
from sparse_ingest.corpora.text_formats import Quoting

BATCH_ROWS = 512  # Python objects at one time


class Split:
    """Base class of splits. An unknown size of a file is 0."""

    rereadable = True
    seekable = False
    unit = "row"
    quoting: Quoting | None = None

    def __init__(self, named: Named, choose: ChooseColumns, sizes: dict[str, int], commit: str | None = None) -> None:
        self.name, self.label = named.name, named.label
        self.bytes = sum(sizes.values()) if all(sizes.values()) else None
        self._named, self._choose, self._sizes, self._commit = named, choose, sizes, commit

    def identity(self) -> dict[str, object]:
        """Return config, split and commit; of a folder the names and sizes of the data files."""
        content: dict[str, object] = {"revision": self._commit} if self._commit else {"files": dict(self._sizes)}
        quoting = {"quoting": "none"} if self.quoting == "none" else {}
        return {"name": self.name, "config": self._named.config, "split": self._named.split, **content, **quoting}

    def merged(self) -> list[str]:
        """Return []: rows of a dataset are not checked for merged rows."""
        return []


class SavedDataset(Split):
    """One split that `save_to_disk` wrote. An offset is a row."""

    def __init__(self, named: Named, dataset: Any, choose: ChooseColumns) -> None:
        files = [os.path.relpath(file["filename"], named.path) for file in dataset.cache_files]
        super().__init__(named, choose, sizes_of(named.path, files))
        self._table = dataset.with_format("arrow")

    def passed(self, offset: int) -> int | None:
        """Return the bytes before a row as if rows had equal sizes."""
        return sum(self._sizes.values()) * offset // max(1, len(self._table))

    def records(self, offset: int, line: int) -> Iterator[Record]:
        """Yield every row from `offset` on."""
        reached = [line]
        with reading_rows(self.label, reached):
            schema = self._table.features.arrow_schema
            names = chosen_columns(schema, self._choose, self.label)
            starts = range(offset, len(self._table), BATCH_ROWS)
            batches = (batch for start in starts for batch in self._table[start : start + BATCH_ROWS].to_batches())
            yield from records_of(rows_of(batches, names), reached, offset)

    def pieces(self, search: Search) -> Iterator[Task]:
        """Yield a task that returns the number of rows, which is known."""
        yield lambda: RowUnits((len(self._table),), "nothing")


def sizes_of(folder: str, files: list[str]) -> dict[str, int]:
    """Return the sizes of files in a folder; 0 for a missing one."""
    return {file: path.stat().st_size if (path := Path(folder, file)).is_file() else 0 for file in files}
