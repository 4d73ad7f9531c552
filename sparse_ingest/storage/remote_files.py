"""The content of a file at an address, fetched in pieces: what pyarrow, gzip and `for line in` read.

In: a way to open it with fsspec, and how a request is made (again). Out: a raw binary file. A server that gives no
ranges is read from the start, so that what lies behind must come after what lies before.

Not covered: which file (places.py).
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from sparse_ingest.errors import StorageError

_FIRST_BYTES = 256 << 10  # of the block after a jump: often a header or an index; each following one is twice as long
Asked = Callable[[str, Callable[[], bytes]], bytes]


class RemoteFile(io.RawIOBase):
    """A file that is fetched as it is read.

    Args:
        opened: opens it for ranges (False) or as one stream (True).
        asked: makes a request, and turns what goes wrong into a sentence.
        name: its address, for messages.
        block_bytes: what is fetched at a time at most, when `ahead` is not 0.
        ahead: how many blocks are fetched before they are asked for.
    """

    def __init__(self, opened: Callable[[bool], Any], asked: Asked, name: str, *, block_bytes: int, ahead: int) -> None:
        super().__init__()
        self._opened, self._asked, self._name = opened, asked, name
        self._block_bytes, self._ahead = block_bytes, ahead
        self._file: Any = None
        self._streamed: int | None = None  # bytes read of a stream; None while ranges are given
        self._position = 0
        self._block, self._block_start = b"", 0
        self._coming: deque[Future[bytes]] = deque()
        self._coming_end, self._next_bytes = 0, _FIRST_BYTES
        self._worker: ThreadPoolExecutor | None = None
        self._size: int | None = None
        asked("opened", self._reopen)
        # A stream without a length is read to its end.
        file: Any = self._file
        self._size = getattr(file, "size", None)
        if self._size is None or not file.seekable():
            self._streamed = 0

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always; on a stream, going back fails when something is read."""
        return True

    def tell(self) -> int:
        """Where the next byte comes from."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a byte; nothing is fetched yet."""
        if whence == io.SEEK_CUR:
            offset += self._position
        elif whence == io.SEEK_END:
            if self._size is None:
                raise StorageError(f"{self._name} has no known size. Download it, and name the file that it becomes.")
            offset += self._size
        self._position = offset
        return offset

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer as far as the file goes."""
        view = memoryview(buffer).cast("B")
        wanted = len(view) if self._size is None else max(0, min(len(view), self._size - self._position))
        if not wanted:
            return 0
        content = self._from_block(wanted) if self._ahead else self._fetch(self._position, wanted)
        view[: len(content)] = content
        self._position += len(content)
        return len(content)

    def close(self) -> None:
        """Close it; what is still coming is dropped."""
        if not self.closed:
            self._coming.clear()
            if self._worker:
                # Not awaited: the collector may close a file in the very thread that fetches for it.
                self._worker.shutdown(wait=False, cancel_futures=True)
            if self._file is not None:
                self._file.close()
        super().close()

    def _from_block(self, wanted: int) -> bytes:
        """Bytes of the block that the position lies in; the next blocks are on their way meanwhile."""
        end = self._block_start + len(self._block)
        if not self._block_start <= self._position < end:
            if not (self._position == end and self._coming):
                self._forget()
                self._coming_end = self._position
                # Somebody who goes on reading where the last block ended will do so again.
                self._next_bytes = self._next_bytes if self._position == end and end else _FIRST_BYTES
                self._request()
            try:
                self._block, self._block_start = self._coming.popleft().result(), self._position
            except BaseException:
                # What comes behind the gap is not what a next read asks for.
                self._forget()
                raise
        while len(self._coming) < self._ahead and self._next_bytes > 2 * _FIRST_BYTES and self._more_follows():
            self._request()
        start = self._position - self._block_start
        return self._block[start : start + wanted]

    def _more_follows(self) -> bool:
        return bool(self._block) if self._size is None else self._coming_end < self._size

    def _request(self) -> None:
        if self._worker is None:
            # One: the file below has one position.
            self._worker = ThreadPoolExecutor(1, thread_name_prefix="fetch")
        self._coming.append(self._worker.submit(self._fetch, self._coming_end, self._next_bytes))
        self._coming_end += self._next_bytes
        self._next_bytes = min(2 * self._next_bytes, self._block_bytes)

    def _forget(self) -> None:
        for one in self._coming:
            one.cancel()
        self._coming.clear()

    def _fetch(self, start: int, length: int) -> bytes:
        """These bytes, fewer only at the end of the file."""
        if self._size is not None:
            length = min(length, self._size - start)
        content = self._asked("read", lambda: self._try(start, length))
        if self._size is not None and len(content) < length:
            raise StorageError(
                f"{self._name} ended after {start + len(content)} bytes, it had {self._size} when it was opened. "
                "Did somebody replace it? Start again."
            )
        return content

    def _try(self, start: int, length: int) -> bytes:
        if self._streamed is None:
            try:
                self._file.seek(start)
                return bytes(self._file.read(length))
            except ValueError as error:
                if "range requests" not in str(error):
                    raise
                self._streamed = 0
                self._reopen()
        return self._from_stream(start, length)

    def _from_stream(self, start: int, length: int) -> bytes:
        if start < (self._streamed or 0):
            raise StorageError(
                f"{self._name} can be read only from its start: its server gives no ranges. Download it, and name the "
                "file that it becomes."
            )
        content = bytearray()
        try:
            while (passed := self._streamed or 0) < start + length:
                some = self._file.read(min(self._block_bytes, (start if passed < start else start + length) - passed))
                if not some:
                    break
                self._streamed = passed + len(some)
                if passed >= start:
                    content += some
        except Exception:
            # The next attempt reads what lies before once more.
            self._streamed = 0
            self._reopen()
            raise
        return bytes(content)

    def _reopen(self) -> bytes:
        if self._file is not None:
            self._file.close()
        self._file = self._opened(self._streamed is not None)
        return b""
