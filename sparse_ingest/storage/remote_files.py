"""A binary file at an address, fetched in ranges as it is read; without range requests, from its start only."""

from __future__ import annotations

import contextlib
import io
from collections import deque
from collections.abc import Callable
from threading import Lock
from typing import Any

from sparse_ingest.errors import StorageError

# Sends a request, retries it if that may help, and returns the answer. The first argument is a participle for messages,
# such as "read"; keywords go to `waiting.call_with_timeout`.
Request = Callable[..., Any]
_BLOCK_BYTES = 4 << 20  # at 50 ms a request, blocks of 2 MB are read half as fast


class RemoteFile(io.RawIOBase):
    """A file that is fetched as it is read. Blocks are kept and fetched ahead by fsspec's `BackgroundBlockCache`.

    The fetch below the cache is ours: fsspec's web files do not retry failed requests, and the cache fails every later
    read after a failed fetch ahead. fsspec's `AdaptiveReadaheadCache` needs 2026.9, and logs the traceback of every
    error. fsspec's S3 file (If-Match) and the corpus detect a replaced object. `open_file` opens the file with fsspec,
    `kept_blocks` is the number of blocks besides one that is fetched ahead; with 0, nothing else is fetched.
    """

    _position = 0
    _file: Any = None
    _cache: Any = None

    def __init__(self, open_file: Callable[..., Any], request: Request, name: str, *, kept_blocks: int) -> None:
        super().__init__()
        self._open_file, self._request, self._name = open_file, request, name
        self._file = request("opened", lambda: open_file(cache_type="none"))
        if getattr(self._file, "size", None) is None:
            raise StorageError(f"The server of {name} does not report its size. Download it, and pass the file.")
        self._size: int = self._file.size
        self._streamed = None if self._file.seekable() else 0  # bytes read of a stream; None for ranges
        self._one_fetch = Lock()  # the threads of the reader and of the cache share the position of `_file`
        self._recent: deque[tuple[int, int]] = deque(maxlen=kept_blocks)  # starts and ends of the last reads
        if kept_blocks and self._streamed is None:
            from fsspec.caching import BackgroundBlockCache

            self._cache = BackgroundBlockCache(_BLOCK_BYTES, self._fetch, self._size, kept_blocks)

    @property
    def is_stream(self) -> bool:
        """Whether the server sends the file only from its start; known after the first read of later bytes."""
        return self._streamed is not None

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True. On a stream, the read after a seek backwards fails."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Set the position of the next byte; nothing is fetched yet."""
        if whence == io.SEEK_CUR:
            offset += self._position
        elif whence == io.SEEK_END:
            offset += self._size
        self._position = offset
        return offset

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer with the bytes at the position, at most one block if blocks are kept."""
        view = memoryview(buffer).cast("B")
        start = self._position
        wanted = max(0, min(len(view), self._size - start))
        if self._cache:
            # A read over more blocks than are kept would make the cache fetch each of them twice.
            wanted = min(wanted, _BLOCK_BYTES - start % _BLOCK_BYTES)
        if not wanted:
            return 0
        content = self._read(start, wanted)
        if len(content) < wanted:
            raise StorageError(
                f"{self._name} ended after {start + len(content)} bytes, but had {self._size} when it was opened. "
                "It may have been replaced. Start again."
            )
        view[: len(content)] = content
        self._position += len(content)
        return len(content)

    def close(self) -> None:
        """Close the file, after the fetch that is running."""
        self._release()
        super().close()

    def _read(self, start: int, length: int) -> bytes:
        if self._streamed is None:
            try:
                return self._read_ranges(start, length)
            except StorageError as error:
                if "range requests" not in str(error):  # fsspec: the server answers with the complete file
                    raise
                self._streamed = 0
                self._release()
        # A restarted stream first skips the bytes that were read before.
        passed = lambda: self._streamed or 0  # noqa: E731
        return bytes(self._request("read", lambda: self._read_stream(start, length), received=passed))

    def _read_ranges(self, start: int, length: int) -> bytes:
        # The cache would fetch two blocks for a header, an index or the first read after a jump, so it is used when the
        # reader continues from there. Columns of a table are read alternately.
        goes_on = any(first < start <= last for first, last in self._recent)
        self._recent.append((start, start + length))
        read = self._cache._fetch if self._cache and goes_on else self._fetch
        return bytes(read(start, start + length))

    def _fetch(self, start: int, end: int) -> bytes:
        def read() -> bytes:
            self._file.seek(start)
            return bytes(self._file.read(min(end, self._size) - start))  # the cache's last block goes beyond the end

        with self._one_fetch:
            return bytes(self._request("read", read))

    def _read_stream(self, start: int, length: int) -> bytes:
        if start < (self._streamed or 0):
            raise StorageError(
                f"{self._name} can be read only from its start: its server has no range requests. Download it, and "
                "pass the file."
            )
        content = bytearray()
        try:
            self._file = self._file or self._open_file(block_size=0)
            while (passed := self._streamed or 0) < start + length:
                some = self._file.read(min(_BLOCK_BYTES, (start if passed < start else start + length) - passed))
                if not some:
                    break
                self._streamed = passed + len(some)
                if passed >= start:
                    content += some
            return bytes(content)
        except Exception:
            # The next attempt starts a new stream, and skips the bytes before `start`.
            self._streamed = 0
            self._release()
            raise

    def _release(self) -> None:
        cache, self._cache = self._cache, None
        if cache is not None:
            # The garbage collector may close a file in the very thread that fetches for it.
            with contextlib.suppress(RuntimeError):
                cache.close()
        file, self._file = self._file, None
        if file is not None:
            file.close()
