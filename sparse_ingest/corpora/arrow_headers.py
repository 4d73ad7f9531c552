"""The numbers of rows of an Arrow IPC file's record batches, from their headers: no column is read.

pyarrow has no function for that. The headers are flatbuffers; Arrow's format/File.fbs and Message.fbs describe them.
"""

from __future__ import annotations

import struct
from io import RawIOBase

_MAGIC = b"ARROW1"
_CONTINUATION = b"\xff\xff\xff\xff"
_BLOCK = struct.Struct("<qi4xq")  # a record batch: offset, size of its header, size of its columns
_FOOTER_BATCHES, _MESSAGE_HEADER, _BATCH_LENGTH = 3, 2, 0  # numbers of fields


def batch_rows(file: RawIOBase, size: int) -> tuple[int, ...]:
    """Return the number of rows of each record batch of a file of `size` bytes; a buffer would read what is between.

    Raises:
        ValueError: the headers are malformed.
    """
    try:
        tail = _read(file, size - len(_MAGIC) - 4, len(_MAGIC) + 4)
        length = _int32(tail, 0)
        footer = _read(file, size - len(tail) - length, length)
        place = _field(footer, _int32(footer, 0), _FOOTER_BATCHES)
        blocks = place + _int32(footer, place) if place else 0
        count = _int32(footer, blocks) if place else 0
        found = tuple(_length(file, *_BLOCK.unpack_from(footer, blocks + 4 + _BLOCK.size * n)) for n in range(count))
    except struct.error as error:
        raise ValueError(f"malformed headers: {error}") from error
    if any(rows < 0 for rows in found):
        raise ValueError("a record batch has a negative number of rows")
    return found


def _length(file: RawIOBase, offset: int, header_bytes: int, _: int) -> int:
    header = _read(file, offset, header_bytes)
    message = header[8:] if header.startswith(_CONTINUATION) else header[4:]
    place = _field(message, _int32(message, 0), _MESSAGE_HEADER)
    length = _field(message, place + _int32(message, place), _BATCH_LENGTH)
    return int(struct.unpack_from("<q", message, length)[0]) if length else 0


def _read(file: RawIOBase, offset: int, size: int) -> bytes:
    if offset < 0 or size < 0:
        raise ValueError("malformed headers: an offset outside the file")
    file.seek(offset)
    found = b""
    while len(found) < size and (block := file.read(size - len(found))):
        found += block
    return found


def _int32(buffer: bytes, place: int) -> int:
    return int(struct.unpack_from("<i", buffer, place)[0])


def _field(buffer: bytes, table: int, number: int) -> int:
    """Return the place of a field of a flatbuffer's table; 0 if it is not set."""
    index = table - _int32(buffer, table)
    size = struct.unpack_from("<H", buffer, index)[0]
    if 4 + 2 * number >= size:
        return 0
    within = int(struct.unpack_from("<H", buffer, index + 4 + 2 * number)[0])
    return table + within if within else 0
