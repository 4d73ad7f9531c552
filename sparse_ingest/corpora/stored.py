r"""The bytes of a corpus file, wherever it lies: opened, decompressed by its suffix, cut into lines.

In: a `StoredFile`: a local one or standard input here, any other that keeps to the protocol. Out: streams and lines.
`.gz` is read with zlib and `.zst` with Arrow's codec, both as a stream; several members or frames are one file.
A file that is damaged or cut off gives its good lines first and then a `CorpusError`.

Not covered: which files make a corpus (files.py), and what lines mean.
"""

from __future__ import annotations

import gzip
import io
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, Protocol, cast

from sparse_ingest.corpora.documents import printable
from sparse_ingest.errors import CorpusError, first_line

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
MAX_LINE = 1 << 28  # bytes; OpenSearch takes no document of half of it, and a file without line feeds is no line
PACKED = (".gz", ".zst")  # suffixes of a compressed stream

_BLOCK_BYTES = 1 << 20
_ZSTD_BYTES = 1 << 14
_DAMAGE = (EOFError, gzip.BadGzipFile, zlib.error)


class StoredFile(Protocol):
    """A file of a corpus as it was when it was found."""

    @property
    def name(self) -> str:
        """The last part of its path: it tells the format, and stands in the identity."""

    @property
    def place(self) -> str:
        """Its whole path or address as messages give it, without credentials."""

    @property
    def bytes(self) -> int | None:
        """Its size when it was found; None for a stream, which can be read only once."""

    def open(self) -> BinaryIO:
        """Its bytes from the start; they can be sought in unless `bytes` is None. What fails raises `OSError`."""

    def refuse_changed(self) -> None:
        """Raises `CorpusError` if it is not what it was when it was found."""


@dataclass(frozen=True)
class LocalFile:
    """A file on this machine."""

    path: Path
    bytes: int

    @classmethod
    def found(cls, path: Path) -> LocalFile:
        """The file as it is now."""
        return cls(path, path.stat().st_size)

    @property
    def name(self) -> str:
        """The last part of its path."""
        return printable(self.path.name)

    @property
    def place(self) -> str:
        """Its path."""
        return printable(str(self.path))

    def open(self) -> BinaryIO:
        """Its bytes from the start."""
        return self.path.open("rb", buffering=_BLOCK_BYTES)

    def refuse_changed(self) -> None:
        """Raises `CorpusError` if its size is not what it was."""
        size = self.path.stat().st_size if self.path.exists() else 0
        if size != self.bytes:
            raise changed(self.place, f"it had {self.bytes} bytes at first and has {size} now")


def changed(place: str, how: str) -> CorpusError:
    """The error of a file that became another while it was read."""
    return CorpusError(
        f"{place} changed while it was read: {how}. Encode a copy that stays as it is, into a new run folder."
    )


class StandardInput:
    """Standard input, which is read once and from its start."""

    name = "-"
    place = "Standard input"
    bytes = None

    def __init__(self) -> None:
        self._taken = False

    def open(self) -> BinaryIO:
        """Its bytes; a second time is refused."""
        # What was taken from a pipe is gone; going on with the rest would lose rows without a word.
        if self._taken:
            raise read_once()
        self._taken = True
        return sys.stdin.buffer

    def refuse_changed(self) -> None:
        """A stream cannot be looked at again."""


def read_once() -> CorpusError:
    """The error of a stream that would have to be read again."""
    return CorpusError("Standard input can be read only once and from its start. Put the corpus in a file.")


class Opened:
    """A file's content as a stream, its compression undone by the file's suffix."""

    def __init__(self, file: StoredFile) -> None:
        self.file = file
        self.packed = is_packed(file.name)
        if self.packed and file.bytes == 0:  # which the libraries take for nothing packed
            raise EOFError("it has no bytes")
        self.stored = file.open()
        self.content = self.stored
        if self.packed:
            zstd = file.name.lower().endswith(".zst")
            blocks = _ZstdBlocks(self.stored) if zstd else _GzipBlocks(fileobj=self.stored)
            # Neither finds lines in C; BufferedReader does.
            self.content = io.BufferedReader(cast(io.RawIOBase, blocks), _BLOCK_BYTES)

    def skip(self, offset: int) -> None:
        """Go to a byte of the content: at once, or by reading what is compressed."""
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

    def close(self) -> None:
        """Close it, unless it is standard input."""
        if self.file.bytes is not None:
            self.stored.close()


def is_packed(name: str) -> bool:
    """Whether a file of this name is a compressed stream."""
    return name.lower().endswith(PACKED)


class _GzipBlocks(gzip.GzipFile):
    """Hands over each block as it is decompressed: a damaged file then gives all lines before the damage."""

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        return self.readinto1(buffer)


class _ZstdBlocks(io.RawIOBase):
    """Hands over small blocks: Arrow gives nothing of a block in which the damage begins."""

    def __init__(self, stored: BinaryIO) -> None:
        import pyarrow as pa

        self._stream = pa.CompressedInputStream(pa.PythonFile(stored, mode="r"), "zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        return self._stream.readinto(buffer[:_ZSTD_BYTES])  # type: ignore[no-any-return]


@contextmanager
def open_stored(file: StoredFile, progress: Callable[[], str]) -> Iterator[Opened]:
    """A file's content; what is wrong with its bytes is a `CorpusError` that names the file and its `progress`."""
    each: Opened | None = None
    try:
        each = Opened(file)
        yield each
    except _DAMAGE as error:
        raise damaged(file, progress(), error) from error
    except OSError as error:
        if type(error) is OSError and error.errno is None:  # what Arrow raises for bytes that do not fit the format
            raise damaged(file, progress(), error) from error
        reason = error.strerror or first_line(error)
        raise CorpusError(
            f"{file.place} cannot be read {progress()}: {reason}. Check the file and its disk."
        ) from error
    finally:
        if each:
            each.close()


def damaged(file: StoredFile, progress: str, error: Exception) -> CorpusError:
    """The error of a file whose bytes are not what its format says."""
    return CorpusError(f"{file.place} is damaged or cut off {progress}: {first_line(error)}. Get the file again.")


class Lines:
    r"""The lines of a file, each with its `\n`; `passed` says how many stored bytes they took."""

    def __init__(self, file: StoredFile) -> None:
        self._file = file
        self._opened: Opened | None = None

    def read(self, offset: int = 0, line: int = 1) -> Iterator[bytes]:
        """The lines from a byte of the content on, of which the first is line `line`."""
        # Standard input is refused in its middle before anything is taken from it.
        if offset and self._file.bytes is None:
            raise read_once()
        with open_stored(self._file, lambda: f"after line {line - 1}") as self._opened:
            self._opened.skip(offset)
            for raw in iter(partial(self._opened.content.readline, MAX_LINE), b""):
                if len(raw) == MAX_LINE:
                    raise CorpusError(
                        f"{self._file.place} line {line} is longer than {MAX_LINE:,} bytes; one row a line was "
                        "expected. Cut it into lines, or name its true format with --format."
                    )
                yield raw
                line += 1
        self._file.refuse_changed()

    def passed(self, offset: int) -> int | None:
        """How many stored bytes lie before a byte of the content; of compressed ones, how many are read."""
        if not is_packed(self._file.name):
            return offset
        return self._opened.taken if self._opened else None


def read_lines(file: StoredFile) -> Iterator[bytes]:
    r"""The lines of a file from its start, each with its `\n`."""
    return Lines(file).read()
