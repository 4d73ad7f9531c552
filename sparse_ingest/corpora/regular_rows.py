"""The regular rows at the start of a block of csv or tsv, found by numpy, 64 bytes at a time.

In: bytes that start with a row, and the number of its columns. Out: the values of the rows, and where each row ends.
The first row that is incomplete, blank or bad, or that has a quote within a value without quotes, ends them: it needs
the csv module.

A set of bytes of the block is an array of uint64 with one bit per byte, the first byte in the lowest bit, as in
https://arxiv.org/abs/1902.08318 (simdjson): a position in a list takes longer than all operations on 64 bits.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

_BLANK_BYTES = len(b'""\r\n')  # of the longest blank row, in a table of one column
# Bytes that regular rows do not contain: a NUL is an error, and 0xFF is not UTF-8.
_BORDER, _REMOVED = b"\0", b"\xff"

_Set: TypeAlias = npt.NDArray[np.uint64]


class RegularRows(NamedTuple):
    """The values of each column, and for each row the number of bytes and of lines up to its end."""

    columns: list[list[str]]
    ends: list[int]
    lines: list[int]


def regular_rows(block: bytes, separator: str, columns: int, *, quotes: bool) -> RegularRows:
    """Return the regular rows at the start of a block. Without `quotes`, a quote is an ordinary character."""
    for absent in (_BORDER, _REMOVED):
        block = block.partition(absent)[0]
    content = np.frombuffer(block, np.uint8)
    line_feed, return_ = _set(content, b"\n"), _set(content, b"\r")
    border = line_feed | _set(content, separator.encode())
    removed, first_irregular = np.zeros_like(border), len(block)
    if quotes:
        quote = _set(content, b'"')
        inside = _prefix_xor(quote)
        border &= ~inside
        beside = border | quote
        # Of a doubled quote the first one closes, and the second one opens.
        irregular = quote & inside & ~_after(beside, first=1)
        irregular |= quote & ~inside & ~_before(beside | return_)
        irregular |= return_ & ~inside & ~_before(line_feed)
        removed = quote & ~(inside & _after(quote))
        if irregular.any():
            first_irregular = int(_flags(irregular, len(block)).argmax())
    removed |= return_ & _before(line_feed & border)

    is_border = _flags(border, len(block))
    borders = np.flatnonzero(is_border)  # of values
    last = np.flatnonzero(content[borders] == ord("\n"))  # the index in `borders` of the end of each row
    ends = borders[last]
    needs_csv = (np.diff(last, prepend=-1) != columns) | (ends >= first_irregular)
    if columns == 1:
        needs_csv |= np.diff(ends, prepend=-1) <= _BLANK_BYTES
    ends = ends[: needs_csv.argmax()] if needs_csv.any() else ends
    size = int(ends[-1]) + 1 if len(ends) else 0
    # 0x00 in place of the borders, 0xFF in place of what is removed.
    marked = content * ~is_border | np.negative(_flags(removed, len(block)).view(np.uint8))
    values = marked[:size].tobytes().replace(_REMOVED, b"").split(_BORDER)[:-1]
    try:
        texts = [value.decode() for value in values]
    except UnicodeDecodeError:
        return regular_rows(_utf8_start(block), separator, columns, quotes=quotes)
    lines = np.searchsorted(np.flatnonzero(content == ord("\n")), ends, "right")
    return RegularRows([texts[column::columns] for column in range(columns)], (ends + 1).tolist(), lines.tolist())


def _set(content: npt.NDArray[np.uint8], byte: bytes) -> _Set:
    """Return the set of the bytes equal to `byte`."""
    words = np.zeros(-(-len(content) // 64), "<u8")
    packed = np.packbits(content == ord(byte), bitorder="little")
    words.view(np.uint8)[: len(packed)] = packed
    return words


def _flags(words: _Set, size: int) -> npt.NDArray[np.bool_]:
    """Return for each byte whether it is in a set."""
    return np.unpackbits(words.view(np.uint8), count=size, bitorder="little").view(bool)


def _after(words: _Set, first: int = 0) -> _Set:
    """Return the set of the bytes after those in a set, and the first byte if `first` is 1."""
    found = words << np.uint64(1)
    found[1:] |= words[:-1] >> np.uint64(63)
    found[:1] |= np.uint64(first)
    return found


def _before(words: _Set) -> _Set:
    """Return the set of the bytes before those in a set."""
    found = words >> np.uint64(1)
    found[:-1] |= words[1:] << np.uint64(63)
    return found


def _prefix_xor(words: _Set) -> _Set:
    """Return the set of the bytes up to which, themselves included, an odd number of bytes is in a set."""
    words = words.copy()
    for shift in (1, 2, 4, 8, 16, 32):
        words ^= words << np.uint64(shift)
    words[1:] ^= np.negative(np.bitwise_xor.accumulate(words >> np.uint64(63))[:-1])
    return words


def _utf8_start(block: bytes) -> bytes:
    try:
        block.decode()
    except UnicodeDecodeError as error:
        return block[: error.start]
    return block
