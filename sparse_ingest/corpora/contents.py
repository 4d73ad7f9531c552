"""The kind of content of a file by its first bytes, such as "gzip" or "plain text", for messages about wrong names."""

from __future__ import annotations

import re
from typing import NamedTuple

HEAD_BYTES = 512
TEXT = "plain text"
EMPTY = "empty"
UNPACK = "Unpack it; text may be compressed as .gz or .zst"
ARCHIVE_SUFFIXES = tuple(".bz2 .xz .lzma .lz4 .br .z .7z .zip .rar .tar .tgz .tar.gz .tar.zst".split())

_CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]")
_RENAME = "Rename it to end in {0} after the suffix of its format, such as .jsonl{0}"
_FORMAT = "Pass --format {0}, or rename it to end in .{0}"


class _Kind(NamedTuple):
    magic: re.Pattern[bytes]
    advice: str
    is_read: bool = False  # under the right name


_KINDS = {
    "gzip": _Kind(re.compile(rb"\x1f\x8b"), _RENAME.format(".gz"), is_read=True),
    "zstd": _Kind(re.compile(rb"\x28\xb5\x2f\xfd"), _RENAME.format(".zst"), is_read=True),
    "Parquet": _Kind(re.compile(rb"PAR1(?=.{0,60}[\x00-\x08])", re.DOTALL), _FORMAT.format("parquet"), is_read=True),
    "Arrow": _Kind(re.compile(rb"ARROW1\x00\x00"), _FORMAT.format("arrow"), is_read=True),
    "bzip2": _Kind(re.compile(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)"), UNPACK),
    "xz": _Kind(re.compile(rb"\xfd7zXZ\x00"), UNPACK),
    "7-Zip": _Kind(re.compile(rb"7z\xbc\xaf\x27\x1c"), UNPACK),
    "zip": _Kind(re.compile(rb"PK(?:\x03\x04|\x05\x06)"), UNPACK),
    "RAR": _Kind(re.compile(rb"Rar!\x1a\x07"), UNPACK),
    "lz4": _Kind(re.compile(rb"\x04\x22\x4d\x18"), UNPACK),
    "a Git LFS pointer": _Kind(re.compile(rb"version https://git-lfs\."), "Get the file itself with git lfs pull"),
    "a web page": _Kind(re.compile(rb"\s*<(?:!doctype )?html", re.IGNORECASE), "Download the file itself"),
}


def kind_of(head: bytes) -> str | None:
    """Return the kind of content that starts with `head`; None if it is unknown."""
    if not head:
        return EMPTY
    for name, kind in _KINDS.items():
        if kind.magic.match(head):
            return name
    return None if _CONTROL.search(head) else TEXT


def is_never_read(kind: str | None) -> bool:
    """Return whether a kind is known and is not a format of a corpus."""
    return kind in _KINDS and not _KINDS[kind].is_read


def advice_for(kind: str) -> str:
    """Return what to do with a file of a kind that does not match its name."""
    if kind in _KINDS:
        return _KINDS[kind].advice
    return "Rename it to end in the suffix of its format, such as .jsonl or .csv, or pass --format"
