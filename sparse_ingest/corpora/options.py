"""Options for reading a corpus: one frozen dataclass for the command line and the Python API."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sparse_ingest.pipeline import option

if TYPE_CHECKING:
    from sparse_ingest.corpora.sources import Corpus


@dataclass(frozen=True)
class CorpusOptions:
    """Options for the columns of a document and the rows to read. None: the default in the help text."""

    format: str | None = option(
        None, "Format of the corpus, whatever its suffix: jsonl, csv, tsv, msmarco, parquet or arrow", metavar="FORMAT"
    )
    columns: tuple[str, ...] | None = option(
        None, "Names of the columns of csv and tsv files that have no header", metavar="A,B,C"
    )
    quoting: Literal["rfc4180", "none"] | None = option(
        None, "Quoting of csv and tsv files; none: quotes are ordinary characters  [default: rfc4180]"
    )
    id_field: str | None = option(
        None, "Column of the id; :row numbers the rows  [default: _id, else id]", metavar="NAME"
    )
    text_field: str | None = option(None, "Column of the text  [default: text]", metavar="NAME")
    title_field: str | None = option(None, "Column of the title  [default: title, if it exists]", metavar="NAME")
    keep: tuple[str, ...] = option(
        (), "Store these columns in the run, for filters; may be repeated", metavar="FIELD,...", commas=True
    )
    no_text: bool = option(False, "Do not store title and text in the run")
    limit: int | None = option(None, "Read only the first N rows")
    on_bad_document: Literal["fail", "skip"] = option("fail", "Stop at a bad document, or omit and report it")

    def open(self, corpus: object) -> Corpus:
        """Return the corpus of a stage: files and addresses, or rows in memory. Raises like `corpus_of`."""
        from sparse_ingest.corpora.documents import FieldNames
        from sparse_ingest.corpora.memory import corpus_of

        names = FieldNames(self.id_field, self.text_field, self.title_field, self.keep, carry_text=not self.no_text)
        return corpus_of(
            corpus, fields=names, format=self.format, columns=self.columns, quoting=self.quoting, limit=self.limit
        )


@dataclass(frozen=True)
class IdfOptions(CorpusOptions):
    """Options of `idf`: how the corpus is read, and whether a file that exists is replaced."""

    force: bool = option(False, "Replace a file that exists")
