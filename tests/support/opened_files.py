"""Count how often files are opened by any process, with inotify."""

from __future__ import annotations

import ctypes
import os
import struct
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

_OPEN = 0x20
# The kernel merges identical consecutive events, so also watch reads and closes.
_WATCHED = _OPEN | 0x1 | 0x8 | 0x10
_EVENT = struct.Struct("iIII")


@contextmanager
def counted_opens(paths: Iterable[Path]) -> Iterator[Counter[Path]]:
    """Yield counts of opens by file, filled in at the end of the block."""
    libc = ctypes.CDLL(None, use_errno=True)
    opens: Counter[Path] = Counter()
    queue = libc.inotify_init1(os.O_NONBLOCK)
    try:
        watched = {libc.inotify_add_watch(queue, os.fsencode(path), _WATCHED): path for path in paths}
        assert -1 not in watched, os.strerror(ctypes.get_errno())
        yield opens
        for number, mask in _events(queue):
            assert number in watched, "the event queue overflowed"
            opens[watched[number]] += bool(mask & _OPEN)
    finally:
        os.close(queue)


def _events(queue: int) -> Iterator[tuple[int, int]]:
    while True:
        try:
            content = os.read(queue, 1 << 16)
        except BlockingIOError:
            return
        # Events of watched files carry no name.
        for number, mask, _, _ in _EVENT.iter_unpack(content):
            yield number, mask
