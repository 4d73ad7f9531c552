"""The bytes and lines of a corpus file: on this machine, at an address, or on standard input.

`.gz` and `.zst` are decompressed as a stream; several members or frames are one file. Of a damaged file the lines
before the damage are read, then `CorpusError` is raised; also for a file whose content does not match its name.
"""

from __future__ import annotations

import gzip
import io
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, cast

import pyarrow as pa

from sparse_ingest.corpora.contents import EMPTY, HEAD_BYTES, TEXT, advice_for, kind_of
from sparse_ingest.errors import CorpusError, StorageError, first_line, printable
from sparse_ingest.records import place_text
from sparse_ingest.storage.places import Place, RemotePath

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
MAX_LINE = 1 << 26  # bytes; a text takes 24 times as much memory
PACKED = (".gz", ".zst")  # suffixes of a compressed stream

_BLOCK_BYTES = 1 << 18
_STEP_BYTES = 1 << 14  # small: Arrow returns nothing of the first damaged step
# UnicodeDecodeError: in the column names of an Arrow table.
DAMAGE = (EOFError, gzip.BadGzipFile, zlib.error, pa.ArrowException, UnicodeDecodeError)

# Words in Arrow's errors for what it does not support, and what to do.
_NOT_DAMAGED = {
    "too much memory": "Decompress it with zstd -d --long=31",
    "Dictionary mismatch": "Decompress it with zstd -d -D DICTIONARY",
    "crypt": "Write it without encryption",
}


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
    """A file on this machine or at an address; only some addresses have a `version`."""

    path: Place
    bytes: int
    version: str | None = None

    @classmethod
    def found(cls, path: Place) -> FoundFile:
        """Return the file as it is now. Raise `CorpusError` if there is none."""
        now = about(path)
        if now is None:
            on_the_web = isinstance(path, RemotePath) and not path.listable
            advice = "Check the address; folders on the web cannot be listed." if on_the_web else "Check the name."
            raise CorpusError(f'There is no file or folder "{path}". {advice}')
        if now["type"] != "file":
            advice = "Narrow the folder or glob to files, with a glob such as FOLDER/**/*.jsonl."
            if now["type"] == "other":
                advice = "Save its content to a file; a corpus may also be standard input (-)."
            raise CorpusError(f'"{path}" is not a file. {advice}')
        if now["size"] is None:
            raise CorpusError(f"The server of {path} does not report its size. Download it, and name the file.")
        return cls(path, now["size"], now["version"])

    @property
    def name(self) -> str:
        """The last part of its path, which gives the format and is in the identity."""
        return printable(self.path.name)

    @property
    def place(self) -> str:
        """Its path or address for messages, without credentials."""
        return printable(str(self.path))

    def open(self) -> BinaryIO:
        """Open it for reading. Raise `OSError`."""
        if isinstance(self.path, Path):
            return self.path.open("rb", buffering=_BLOCK_BYTES)
        return cast(BinaryIO, self.path.open())

    def kind(self) -> str | None:
        """Return the kind of content by its first bytes (contents.py); None if it is unknown."""
        try:
            with self.open() as stored:
                return kind_of(stored.read(HEAD_BYTES))
        except (OSError, StorageError):
            return None

    def refuse_changed(self) -> None:
        """Raise `CorpusError` if its size or version changed."""
        now = about(self.path) or {"size": 0, "version": None}
        if now["size"] != self.bytes:
            raise file_changed(self.place, f"it had {self.bytes} bytes at first and has {now['size']} now")
        if now["version"] != self.version:
            raise file_changed(self.place, "it was replaced by another of the same size")


class StandardInput:
    """Standard input, which can be read only once and from its start."""

    name = "-"
    place = "Standard input"
    bytes = None
    _taken = False

    def open(self) -> BinaryIO:
        """Return the stream. Raise `CorpusError` on a second call, since rows would be lost."""
        if self._taken:
            raise _read_once()
        if sys.stdin is None:  # closed, as by `<&-`
            raise CorpusError("Standard input is closed. Pipe the corpus into the command, or name a file.")
        self._taken = True
        # A program may have replaced it by one whose bytes cannot be peeked.
        buffer = sys.stdin.buffer
        return buffer if hasattr(buffer, "peek") else cast(BinaryIO, io.BufferedReader(cast(Any, buffer)))

    def kind(self) -> None:
        """Return None: the first bytes cannot be read twice."""

    def refuse_changed(self) -> None:
        """Do nothing."""


StoredFile: TypeAlias = FoundFile | StandardInput


def file_changed(place: str, how: str) -> CorpusError:
    """Return the error of a file that changed while it was read."""
    return CorpusError(f"{place} changed while it was read: {how}. Encode a copy that does not change, into a new run.")


def _read_once() -> CorpusError:
    return CorpusError("Standard input can be read only once and from its start. Put the corpus in a file.")


class ContentStream:
    """The content of a file as a stream, decompressed by its suffix."""

    def __init__(self, file: StoredFile) -> None:
        self.file = file
        self.packed = is_packed(file.name)
        if self.packed and file.bytes == 0:  # which the libraries accept
            raise EOFError("it has no bytes")
        self.stored = file.open()
        self.content = cast(io.BufferedReader, self.stored)
        if self.packed:
            read_into: Callable[[memoryview], int] = gzip.GzipFile(fileobj=self.stored).readinto1
            if file.name.lower().endswith(".zst"):
                read_into = pa.CompressedInputStream(pa.PythonFile(self.stored, mode="r"), "zstd").readinto
            # BufferedReader finds lines in C.
            self.content = io.BufferedReader(_Blocks(read_into), _BLOCK_BYTES)

    def skip(self, offset: int) -> None:
        """Skip to a byte of the content; compressed content is read up to there."""
        if not self.packed:
            if offset:
                self.stored.seek(offset)
            return
        while offset and (block := self.content.read(min(offset, _BLOCK_BYTES))):
            offset -= len(block)

    @property
    def is_stream(self) -> bool:
        """Whether a server sends the file only from its start. Reads after the first byte, which shows it."""
        self.stored.seek(1)
        self.stored.read(1)
        return bool(getattr(getattr(self.stored, "raw", None), "is_stream", False))

    @property
    def taken(self) -> int | None:
        """The number of stored bytes that were read, some of them ahead; all of them if it is closed."""
        return self.file.bytes if self.stored.closed else self.stored.tell()


def is_packed(name: str) -> bool:
    """Return whether a file of this name is a compressed stream."""
    return name.lower().endswith(PACKED)


def suffix_of(name: str) -> str:
    """Return the suffix of a file's format in lower case, such as .jsonl for a.JSONL.gz."""
    path = Path(name.lower())
    return (path.with_suffix("") if is_packed(path.name) else path).suffix


class _Blocks(io.RawIOBase):
    """Full blocks of decompressed content. The content before an error is returned, then the error is raised."""

    def __init__(self, read_into: Callable[[memoryview], int]) -> None:
        self._read_into = read_into
        self._error: Exception | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        block, size, step = memoryview(buffer), 0, 1
        try:
            while step and size < len(block) and self._error is None:
                step = self._read_into(block[size : size + _STEP_BYTES])
                size += step
        except Exception as error:
            self._error = error
        if self._error is not None and not size:
            raise self._error
        return size


class FileSource:
    """Base class of sources that are files."""

    unit = "row"
    content: str | None = None  # the expected kind of an uncompressed file; None: lines of text

    def __init__(self, file: StoredFile, label: str) -> None:
        self.file, self.label = file, label
        self.name, self.bytes = file.name, file.bytes
        self.rereadable = file.bytes is not None
        self._opened: ContentStream | None = None  # the latest

    @property
    def seekable(self) -> bool:
        """Whether reading can begin at an offset: by default not."""
        return False

    def identity(self) -> dict[str, object]:
        """Return the name, and the size if it is known."""
        return {"name": self.name} if self.bytes is None else {"name": self.name, "bytes": self.bytes}

    def merged(self) -> list[str]:
        """Return nothing: only quotes merge rows."""
        return []

    @contextmanager
    def opened(self, reached: list[int]) -> Iterator[ContentStream]:
        """Open the file for the block, whose errors become `CorpusError`. `reached` has the line of the next row."""
        if self.file.bytes is None and reached[0] > 1:
            raise _read_once()
        opened = None
        try:
            self._opened = opened = ContentStream(self.file)
            yield opened
        except (*DAMAGE, OSError) as error:
            after = f"after {self.unit} {reached[0] - 1}"
            # Arrow raises OSError without a number for malformed bytes.
            if isinstance(error, DAMAGE) or (type(error) is OSError and error.errno is None):
                expected, kind = self._expected(), self.file.kind()
                if expected is not None and kind not in (None, EMPTY, expected):
                    raise self._not_as_named(kind, expected) from error
                what, advice = "is damaged or cut off", "Download or copy it again"
                for words, other in _NOT_DAMAGED.items():
                    if words in str(error):
                        what, advice = "cannot be read", other
                raise CorpusError(f"{self.file.place} {what} {after}: {first_line(error)}. {advice}.") from error
            raise CorpusError(
                f"{self.file.place} cannot be read {after}: {error.strerror or first_line(error)}. Check the disk."
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
            place, advice = f"{place}, decompressed,", "Decompress it, and rename it by its content"
        return CorpusError(f"{place} is {kind}, not {expected}. {advice}.")


class LineSource(FileSource):
    """Base class of sources of lines. An offset is a byte of the content."""

    unit = "line"

    @cached_property
    def seekable(self) -> bool:
        """Whether content can be read from an offset: not if it is compressed, or the server has no range requests."""
        if is_packed(self.name) or self.file.bytes is None:
            return False
        if not isinstance(self.file.path, RemotePath) or self.file.path.listable:
            return True
        with self.opened([1]) as opened:
            return not opened.is_stream

    def lines(self, offset: int = 0, line: int = 1) -> Iterator[bytes]:
        r"""Yield the lines from a byte of the content on, each with its `\n`; the first is line `line`."""
        reached = [line]
        with self.opened(reached) as opened:
            opened.skip(offset)
            yield from self.lines_of(opened, reached)

    def lines_of(self, opened: ContentStream, reached: list[int]) -> Iterator[bytes]:
        """Yield the lines of an opened file from where it is, the first one being line `reached[0]`."""
        for raw in iter(partial(opened.content.readline, MAX_LINE), b""):
            if reached[0] == 1 and (kind := kind_of(raw[:HEAD_BYTES])) not in (None, EMPTY, TEXT):
                raise self._not_as_named(kind, TEXT)
            if len(raw) == MAX_LINE:
                raise CorpusError(
                    f"{place_text(self.file.place, reached[0])}: longer than {MAX_LINE:,} bytes; expected one row "
                    "per line. Shorten the row, or pass the format with --format."
                )
            reached[0] += 1
            yield raw

    def passed(self, offset: int) -> int | None:
        """Return the number of stored bytes before a byte of the content; of a compressed file, the number read."""
        if not is_packed(self.name):
            return offset
        return self._opened.taken if self._opened else None
