"""Rows of csv and tsv, split by numpy in blocks of about a megabyte.

In: bytes that start with a row. Out: the values of their complete rows, which are those of the csv module, and where
each row ends; or None if a row needs that module: quotes that RFC 4180 does not allow, another number of columns, a
blank line, a NUL, bytes that are not UTF-8.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

_QUOTE, _LINE_FEED, _RETURN = b'"\n\r'

Bools: TypeAlias = npt.NDArray[np.bool_]
Places: TypeAlias = npt.NDArray[np.int64]


class Block(NamedTuple):
    """Complete rows. `values` are by column; `ends` and `lines` are the bytes and lines up to the end of each row.

    `merged` are the numbers of the rows that have a value with a separator and a line feed.
    """

    values: list[list[str]]
    ends: list[int]
    lines: list[int]
    merged: list[int]


def split_block(content: bytes, separator: str, columns: int, chosen: Sequence[int], *, quotes: bool) -> Block | None:
    """Return the complete rows at the start of a block; None if there is none, or if one needs the csv module.

    Args:
        content: the block.
        separator: the character between values.
        columns: the number of values in a row.
        chosen: the numbers of the columns to return.
        quotes: whether quotes have a meaning.
    """
    block = np.frombuffer(content, np.uint8)
    is_sign = (block == _LINE_FEED) | (block == ord(separator))
    if quotes:
        is_sign |= (block == _QUOTE) | (block == _RETURN)
    places = np.flatnonzero(is_sign)
    kinds = block[places]
    is_quote = kinds == _QUOTE
    is_open = np.logical_xor.accumulate(is_quote)  # after each sign
    is_end = ~is_open & ~is_quote & (kinds != _RETURN)  # of a value
    row_ends = np.flatnonzero(is_end & (kinds == _LINE_FEED))
    if not len(row_ends) or b"\0" in content:
        return None
    count = int(row_ends[-1]) + 1
    places, kinds = places[:count], kinds[:count]
    value_ends = np.flatnonzero(is_end[:count])
    if len(value_ends) != columns * len(row_ends) or (value_ends[columns - 1 :: columns] != row_ends).any():
        return None
    if quotes and not _is_regular(places, kinds, is_open[:count]):
        return None
    ends = places[row_ends] + 1
    starts, stops = np.concatenate(([0], places[value_ends[:-1]] + 1)), places[value_ends]
    stops[columns - 1 :: columns] -= block[ends - 2] == _RETURN
    if columns == 1 and (starts >= stops).any():
        return None
    is_quoted = (block[starts] == _QUOTE) & quotes
    cuts = np.stack((starts + is_quoted, stops - is_quoted, is_quoted))
    try:
        content[: ends[-1]].decode()
    except UnicodeDecodeError:
        return None
    content = _without_doubled(block, places, is_quote[:count], is_open[:count]) if quotes else content
    values = [_texts(content, cuts[:, place::columns].tolist()) for place in chosen]
    lines = np.cumsum(kinds == _LINE_FEED)
    merged = np.empty(0, np.int64)
    if lines[-1] > len(row_ends):
        has_feeds = np.diff(lines[value_ends], prepend=0) > (kinds[value_ends] == _LINE_FEED)
        separators = np.cumsum(kinds == ord(separator))[value_ends]
        has_separators = np.diff(separators, prepend=0) > (kinds[value_ends] != _LINE_FEED)
        merged = np.flatnonzero((has_feeds & has_separators).reshape(-1, columns).any(axis=1))
    return Block(values, ends.tolist(), lines[row_ends].tolist(), merged.tolist())


def _is_regular(places: Places, kinds: npt.NDArray[np.uint8], is_open: Bools) -> bool:
    """Return whether a quote opens only at the start of a value and closes at its end; returns are in line ends."""
    follows = np.diff(places, prepend=-1) == 1  # directly after the sign before, or at the start of the block
    is_quote = kinds == _QUOTE
    is_return = (kinds == _RETURN) & ~is_open
    closes = is_quote & ~is_open  # a doubled quote closes and opens
    return bool(
        (follows | ~(is_quote & is_open)).all()
        and (follows[1:] | ~(closes | is_return)[:-1]).all()
        and (kinds[1:] == _LINE_FEED)[is_return[:-1]].all()
    )


def _without_doubled(block: npt.NDArray[np.uint8], places: Places, is_quote: Bools, is_open: Bools) -> bytes:
    """Return the block with a NUL for the first quote of each doubled one."""
    content = block.copy()
    content[places[:-1][(is_quote & ~is_open)[:-1] & is_quote[1:]]] = 0
    return content.tobytes()


def _texts(content: bytes, cuts: list[list[int]]) -> list[str]:
    """Return the values between the starts and stops; the third number is 1 for a quoted one."""
    return [
        (content[start:stop].replace(b"\0", b"") if is_quoted else content[start:stop]).decode()
        for start, stop, is_quoted in zip(*cuts, strict=True)
    ]
