"""Corpora in files: JSON lines, plain or gzip, and BEIR or MTEB folders, as one stream of `SourceRow`s.

In: what `--corpus` named (files, folders, globs, `-`) and which columns are the id, the text, the title and the
kept fields. Out: every row in order, each with a document or the reason why there is none, and the position where
the next row starts, from which a later `rows` goes on.

A row is a line that is not blank; rows count from 0 over all files and bad ones count too. A file that breaks off
is no bad row but the end: `CorpusError`. What makes a row a document is said in documents.py.

Not covered: what becomes of bad rows, and duplicates over more rows than `refuse_repeated_ids` is given.
"""

from __future__ import annotations

import glob
import gzip
import io
import os
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

from sparse_ingest.corpora.documents import BadRow, document_of, json_object, printable, shown, without_carried
from sparse_ingest.corpora.documents import FieldNames as FieldNames
from sparse_ingest.errors import CorpusError, UsageError
from sparse_ingest.records import SourceRow

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
FORMATS = ("jsonl",)
FORMAT_OF_SUFFIX = {".jsonl": "jsonl", ".ndjson": "jsonl"}

_BEIR_CORPUS = ("corpus.jsonl", "corpus.jsonl.gz")
_BLOCK_BYTES = 1 << 20
_STDIN = Path("-")  # compared by identity: ./- is a file, and Path drops the ./


class Position(NamedTuple):
    """Where a row starts: file, byte offset (decompressed) and line within it, row within the corpus."""

    file: int
    offset: int
    line: int
    row: int


START = Position(0, 0, 1, 0)


@dataclass(frozen=True)
class CorpusFile:
    """One file. `bytes` is None for standard input; `label` is the name that rows of this file bear."""

    path: Path
    name: str
    label: str
    bytes: int | None


@dataclass
class Corpus:
    """The files of a corpus in order, and how their rows become documents."""

    files: tuple[CorpusFile, ...]
    fields: FieldNames
    _stdin_taken: bool = field(default=False, init=False, repr=False, compare=False)

    def identity(self) -> list[dict[str, str | int]]:
        """Names in order, and sizes where there are any: what a resumed run must find again."""
        return [
            {"name": file.name} if file.bytes is None else {"name": file.name, "bytes": file.bytes}
            for file in self.files
        ]

    def rows(self, start: Position = START) -> Iterator[tuple[SourceRow, Position]]:
        """Every row from `start` on, each with the position where the next one starts."""
        fields = self.fields
        _, offset, line, row = start
        for index, file in enumerate(self.files[start.file :], start.file):
            label = file.label
            for raw in self._lines(file, offset, line):
                content = raw.removeprefix(BYTE_ORDER_MARK) if offset == 0 else raw
                offset += len(raw)
                line += 1
                try:
                    columns = json_object(content)
                    if columns is None:
                        continue
                    # A line without a backslash holds no string that needs one: writing it again is a copy.
                    document = document_of(columns, fields, row, plain=b"\\" not in raw)
                    source = SourceRow(row, label, line - 1, document, None)
                except BadRow as bad:
                    source = SourceRow(row, label, line - 1, None, str(bad))
                row += 1
                yield source, Position(index, offset, line, row)
            offset, line = 0, 1

    def _lines(self, file: CorpusFile, offset: int, line: int) -> Iterator[bytes]:
        if file.bytes is not None:
            yield from read_lines(file.path, offset=offset, line=line)
            size = file.path.stat().st_size if file.path.exists() else 0
            if size != file.bytes:
                raise CorpusError(
                    f"{file.path} changed while it was read: it had {file.bytes} bytes at first and has {size} now. "
                    "Encode a copy that stays as it is, into a new run folder."
                )
            return
        # What was taken from a pipe is gone; going on with the rest would lose rows without a word.
        if self._stdin_taken or offset:
            raise CorpusError("Standard input can be read only once and from its start. Put the corpus in a file.")
        self._stdin_taken = True
        yield from read_lines(None, offset=0, line=1)


def open_corpus(specs: Sequence[str], *, fields: FieldNames, format: str | None = None) -> Corpus:
    """Find the files that `specs` stand for, in order; nothing is read yet.

    Args:
        specs: files, folders, globs, or `-` for standard input.
        fields: which columns make a document.
        format: one of `FORMATS`, for every file; None goes by each file's suffix.
    """
    if format is not None and format not in FORMATS:
        raise UsageError(f'The format "{format}" is unknown; known are: {", ".join(FORMATS)}.')
    if not all(specs):
        raise UsageError("A corpus is named by an empty string; is a variable unset? Name a file, a folder, or -")
    if specs.count("-") > 1:
        raise UsageError("Standard input (-) is named twice, and can be read only once. Name it once.")
    fields = without_carried(fields)
    try:
        paths = [path for spec in specs for path in _paths_of(spec, known_only=format is None)]
    except OSError as error:
        raise CorpusError(
            f"{error.filename} cannot be read: {error.strerror}. Check that it is there and yours to read."
        ) from error
    names = Counter(path.name for path in paths)
    return Corpus(tuple(_corpus_file(path, unique=names[path.name] == 1) for path in paths), fields)


def refuse_repeated_ids(rows: Iterable[tuple[SourceRow, Position]]) -> Iterator[tuple[SourceRow, Position]]:
    """The same rows, but one whose id came before has no document: its reason says where the first one is.

    Every id given is kept in memory: give it a shard, not a corpus.
    """
    first: dict[str, tuple[int, str, int]] = {}
    for source, position in rows:
        if source.document is not None:
            here = (source.row, source.file, source.line)
            row, file, line = first.setdefault(source.document.id, here)
            if row != source.row:
                reason = f"duplicate id {shown(source.document.id)}: first at {file} line {line}"
                source = source._replace(document=None, reason=reason)
        yield source, position


def bad_document(source: SourceRow) -> CorpusError:
    """The error of a row without a document, for `--on-bad-document fail`."""
    return CorpusError(f"{source.file} line {source.line}: {source.reason}")


# Which files


def _paths_of(spec: str, *, known_only: bool) -> list[Path]:
    path = Path(spec)
    if spec == "-":
        return [_STDIN]
    if path.is_dir():
        paths = _paths_in_folder(path)
    elif not path.exists() and any(sign in spec for sign in "*?["):
        # Not Path.glob: that one gives hidden files too, and takes no absolute pattern.
        paths = [Path(match) for match in sorted(glob.glob(spec, recursive=True), key=os.fsencode)]  # noqa: PTH207
        if not paths:
            raise CorpusError(f'No file matches the glob "{spec}". Check the folder and the suffix.')
    else:
        paths = [path]
    for each in paths:
        if not each.exists():
            raise CorpusError(f'There is no file or folder "{each}". Check the name.')
        if not each.is_file():
            advice = "A folder or glob stands for files only: narrow it to a glob such as FOLDER/*.jsonl."
            if len(paths) == 1:
                advice = "Give a stream on standard input, as -."
            raise CorpusError(f'"{each}" is not a file. {advice}')
        if known_only:
            _check_suffix(each)
    return paths


def _paths_in_folder(folder: Path) -> list[Path]:
    beir = [folder / name for name in _BEIR_CORPUS if (folder / name).exists()]
    if len(beir) > 1:
        raise CorpusError(f'"{folder}" holds both {" and ".join(_BEIR_CORPUS)}. Name the one that is meant.')
    if beir:
        return beir
    paths = [path for path in folder.iterdir() if not path.name.startswith(".")]
    if not paths:
        raise CorpusError(f'The folder "{folder}" holds no file. Name the files, or the folder that holds them.')
    return sorted(paths, key=os.fsencode)


def _check_suffix(path: Path) -> None:
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    if suffix in FORMAT_OF_SUFFIX:
        return
    found = f'the suffix "{suffix}" is unknown' if suffix else "there is no suffix"
    known = ", ".join(FORMAT_OF_SUFFIX)
    advice = "Say it with --format, whatever the name."
    if suffix == ".json":
        advice = "If it holds one JSON object a line, say --format jsonl."
    raise CorpusError(f'The format of "{path}" is unclear: {found}; known are {known}, each also .gz. {advice}')


def _corpus_file(path: Path, *, unique: bool) -> CorpusFile:
    if path is _STDIN:
        return CorpusFile(path, "-", "-", None)
    name = printable(path.name)
    # The bare name where that is enough: positions then read the same from every machine and folder.
    return CorpusFile(path, name, name if unique else printable(str(path)), path.stat().st_size)


# Bytes to lines


class _GzipBlocks(gzip.GzipFile):
    """Hands over each block as it is decompressed: a damaged file then gives all lines before the damage."""

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        return self.readinto1(buffer)


def read_lines(path: Path | None, *, offset: int = 0, line: int = 1) -> Iterator[bytes]:
    r"""The lines of a file from a byte offset on, each with its `\n`; gzip by the suffix .gz; None is stdin.

    `line` is the number of the first one: an error says after which line the file broke off.
    """
    try:
        with _open(path, offset) as stream:
            for raw in stream:
                yield raw
                line += 1
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise CorpusError(
            f"{path} is damaged or cut off after line {line - 1}: {error}. Get the file again."
        ) from error
    except OSError as error:
        reason = error.strerror or error
        raise CorpusError(
            f"{path or 'Standard input'} cannot be read after line {line - 1}: {reason}. Check the file and its disk."
        ) from error


def _open(path: Path | None, offset: int) -> AbstractContextManager[BinaryIO]:
    if path is None:
        return nullcontext(sys.stdin.buffer)
    if not path.name.lower().endswith(".gz"):
        plain = path.open("rb", buffering=_BLOCK_BYTES)
        plain.seek(offset)
        return plain
    blocks = _GzipBlocks(path)
    blocks.seek(offset)
    # GzipFile finds lines in Python; BufferedReader does it in C.
    return io.BufferedReader(cast(io.RawIOBase, blocks), _BLOCK_BYTES)
