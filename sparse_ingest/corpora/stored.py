r"""The bytes of a corpus file, wherever it is stored: opened, decompressed by its suffix, cut into lines.

In: a file of this machine, at an address, or standard input. Out: streams and lines, through the base classes of the
sources that read files. `.gz` is read with zlib and `.zst` with Arrow's codec, both as a stream; several members or
frames are one file. A file that is damaged or cut off gives its good lines first and then a `CorpusError`. A file whose
content does not match its name raises a `CorpusError` that names the kind of content.

Not covered: which files make a corpus (files.py), and what lines mean.
"""

from __future__ import annotations

import gzip
import io
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, cast

import pyarrow as pa

from sparse_ingest.corpora.contents import EMPTY, HEAD_BYTES, TEXT, advice_for, is_special, kind_of
from sparse_ingest.corpora.documents import printable
from sparse_ingest.errors import CorpusError, StorageError, first_line
from sparse_ingest.storage.places import Place, RemotePath

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
MAX_LINE = 1 << 28  # bytes; OpenSearch takes no document of half of it, and a file without line feeds is no line
PACKED = (".gz", ".zst")  # suffixes of a compressed stream

_BLOCK_BYTES = 1 << 20
_ZSTD_BYTES = 1 << 14
# UnicodeDecodeError: of the names of an Arrow table's columns.
_DAMAGE = (EOFError, gzip.BadGzipFile, zlib.error, pa.ArrowException, UnicodeDecodeError)


def about(path: Place) -> dict[str, Any] | None:
    """Return the type, size in bytes and version of a file or folder, as `RemotePath.about` does; None if missing."""
    if isinstance(path, RemotePath):
        return path.about()
    if not path.exists():
        return None
    kind = "directory" if path.is_dir() else "file" if path.is_file() else "other"
    return {"type": kind, "size": path.stat().st_size, "version": None}


@dataclass(frozen=True)
class FoundFile:
    """A file of this machine or at an address as it was when it was found; `version` only at some addresses."""

    path: Place
    bytes: int
    version: str | None = None

    @classmethod
    def found(cls, path: Place) -> FoundFile:
        """Return the file as it is now. Raises `CorpusError`."""
        now = about(path)
        if now is None:
            advice = "Check the name."
            if isinstance(path, RemotePath) and not path.listable:
                advice = "Check it; on the web each file is named by itself."
            raise CorpusError(f'There is no file or folder "{path}". {advice}')
        if now["type"] != "file":
            advice = "A folder or glob stands for files only: narrow it to a glob such as FOLDER/*.jsonl."
            if now["type"] == "other":
                advice = "Give a stream on standard input, as -."
            raise CorpusError(f'"{path}" is not a file. {advice}')
        if now["size"] is None:
            raise CorpusError(f"{path} has no known size: its server does not tell. Download it, and name the file.")
        return cls(path, now["size"], now["version"])

    @property
    def name(self) -> str:
        """The last part of its path: it decides the format and is in the identity."""
        return printable(self.path.name)

    @property
    def place(self) -> str:
        """Its path or address for messages, without credentials."""
        return printable(str(self.path))

    def open(self) -> BinaryIO:
        """Open it for reading. What fails raises `OSError`."""
        if isinstance(self.path, Path):
            return self.path.open("rb", buffering=_BLOCK_BYTES)
        return cast(BinaryIO, self.path.open())

    def kind(self) -> str | None:
        """Return the kind of content by its first bytes (contents.py), or None if it is not known."""
        try:
            with self.open() as stored:
                return kind_of(stored.read(HEAD_BYTES))
        except (OSError, StorageError):
            return None

    def refuse_changed(self) -> None:
        """Raises `CorpusError` if its size or version is not what it was."""
        now = about(self.path) or {"size": 0, "version": None}
        if now["size"] != self.bytes:
            raise changed(self.place, f"it had {self.bytes} bytes at first and has {now['size']} now")
        if now["version"] != self.version:
            raise changed(self.place, "it was replaced by another of the same size")


class StandardInput:
    """Standard input, which is read once and from its start."""

    name = "-"
    place = "Standard input"
    bytes = None
    _taken = False

    def open(self) -> BinaryIO:
        """Return it; a second time is refused."""
        # What was taken from a pipe is gone; going on with the rest would lose rows without a word.
        if self._taken:
            raise _read_once()
        if sys.stdin is None:
            raise CorpusError("Standard input is closed. Pipe the corpus into it, or name a file.")
        self._taken = True
        return sys.stdin.buffer

    def kind(self) -> None:
        """Return None: the first bytes cannot be read again."""

    def refuse_changed(self) -> None:
        """Do nothing: a stream cannot be looked at again."""


StoredFile: TypeAlias = FoundFile | StandardInput


def changed(place: str, how: str) -> CorpusError:
    """Return the error of a file that became another while it was read."""
    return CorpusError(
        f"{place} changed while it was read: {how}. Encode a copy that stays as it is, into a new run folder."
    )


def _read_once() -> CorpusError:
    return CorpusError("Standard input can be read only once and from its start. Put the corpus in a file.")


class Opened:
    """A file's content as a stream, its compression undone by the file's suffix."""

    def __init__(self, file: StoredFile) -> None:
        self.file = file
        self.packed = is_packed(file.name)
        if self.packed and file.bytes == 0:  # which the libraries take for nothing packed
            raise EOFError("it has no bytes")
        self.stored = file.open()
        self.content = cast(io.BufferedReader, self.stored)
        if self.packed:
            # Neither library finds lines in C; BufferedReader does.
            if file.name.lower().endswith(".zst"):
                # In small blocks: Arrow gives nothing of a block in which the damage begins.
                zstd = pa.CompressedInputStream(pa.PythonFile(self.stored, mode="r"), "zstd")
                self.content = io.BufferedReader(zstd, _ZSTD_BYTES)
            else:
                self.content = io.BufferedReader(cast(io.RawIOBase, _GzipBlocks(fileobj=self.stored)), _BLOCK_BYTES)

    def skip(self, offset: int) -> None:
        """Go to a byte of the content; compressed content is read up to there."""
        if not self.packed:
            if offset:
                self.stored.seek(offset)
            return
        while offset and (block := self.content.read(min(offset, _BLOCK_BYTES))):
            offset -= len(block)

    @property
    def taken(self) -> int | None:
        """How many of the stored bytes were taken so far, some ahead; all of them once it is closed."""
        return self.file.bytes if self.stored.closed else self.stored.tell()


def is_packed(name: str) -> bool:
    """Return whether a file of this name is a compressed stream."""
    return name.lower().endswith(PACKED)


class _GzipBlocks(gzip.GzipFile):
    """Hands over each block as it is decompressed: a damaged file then gives all lines before the damage."""

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        return self.readinto1(buffer)


class FileSource:
    """What the sources of every file format have in common."""

    unit = "row"
    content: str | None = None  # the expected kind if the file is not compressed; None: lines of text

    def __init__(self, file: StoredFile, label: str) -> None:
        self.file, self.label = file, label
        self.name, self.bytes = file.name, file.bytes
        self.rereadable = file.bytes is not None
        self._opened: Opened | None = None  # the latest

    def identity(self) -> dict[str, object]:
        """Return the name, and the size if it is known."""
        return {"name": self.name} if self.bytes is None else {"name": self.name, "bytes": self.bytes}

    def merged(self) -> list[str]:
        """Return nothing: only quotes merge rows."""
        return []

    @contextmanager
    def opened(self, reached: list[int]) -> Iterator[Opened]:
        """Open the file; what is wrong with its bytes is a `CorpusError`. `reached` holds the line of the next row."""
        # Standard input is refused in its middle before anything is taken from it.
        if self.file.bytes is None and reached[0] > 1:
            raise _read_once()
        opened = None
        try:
            self._opened = opened = Opened(self.file)
            yield opened
        except (*_DAMAGE, OSError) as error:
            after = f"after {self.unit} {reached[0] - 1}"
            # An OSError without a number is what Arrow raises for bytes that do not fit the format.
            if isinstance(error, _DAMAGE) or (type(error) is OSError and error.errno is None):
                expected, kind = self._expected(), self.file.kind()
                if expected is not None and kind not in (None, EMPTY, expected):
                    raise self._not_as_named(kind, expected) from error
                raise CorpusError(
                    f"{self.file.place} is damaged or cut off {after}: {first_line(error)}. Get the file again."
                ) from error
            raise CorpusError(
                f"{self.file.place} cannot be read {after}: {error.strerror or first_line(error)}. Check the file and "
                "its disk."
            ) from error
        finally:
            if opened and self.file.bytes is not None:
                opened.stored.close()
        self.file.refuse_changed()

    def _expected(self) -> str | None:
        if is_packed(self.name):
            return "zstd" if self.name.lower().endswith(".zst") else "gzip"
        return self.content

    def _not_as_named(self, kind: str, expected: str) -> CorpusError:
        place, advice = self.file.place, advice_for(kind)
        if isinstance(self.file, StandardInput):
            advice = "Decompress it first, or name the file instead"
        elif kind == TEXT and is_packed(self.name):
            advice = f"Rename it without {Path(self.name).suffix}, or compress it"
        elif is_packed(self.name) and expected == TEXT:
            place, advice = f"{place}, decompressed,", "Decompress it, and name it by what it holds"
        return CorpusError(f"{place} is {kind}, not {expected}. {advice}.")


class LineSource(FileSource):
    """What the sources of lines have in common. An offset is a byte of the content."""

    unit = "line"

    def lines(self, offset: int = 0, line: int = 1) -> Iterator[bytes]:
        r"""Yield the lines from a byte of the content on, each with its `\n`; the first is line `line`."""
        reached = [line]
        with self.opened(reached) as opened:
            opened.skip(offset)
            for raw in iter(partial(opened.content.readline, MAX_LINE), b""):
                if offset == 0 and reached[0] == 1 and (kind := kind_of(raw[:HEAD_BYTES])) and is_special(kind):
                    raise self._not_as_named(kind, TEXT)
                if len(raw) == MAX_LINE:
                    raise CorpusError(
                        f"{self.file.place} line {reached[0]} is longer than {MAX_LINE:,} bytes; one row a line was "
                        "expected. Cut it into lines, or name its true format with --format."
                    )
                yield raw
                reached[0] += 1

    def passed(self, offset: int) -> int | None:
        """Return how many stored bytes are before a byte of the content; of compressed ones, how many are read."""
        if not is_packed(self.name):
            return offset
        return self._opened.taken if self._opened else None
