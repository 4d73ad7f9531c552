"""Escape control characters in text for a terminal, such as \\x1b: ids and titles must not move its cursor.

JSON stays JSON. Pipes and files get every byte unchanged. Zero-width joiners and soft hyphens, which scripts need,
are kept.
"""

from __future__ import annotations

import re
import sys
from typing import Any, TextIO, cast

# All control characters but tab and line feed; bidirectional and invisible ones; separators of lines; tags.
_CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\U000e0000-\U000e007f]"
)
# Progress bars start a write with a carriage return, and write cursor movements alone.
_OF_BARS = re.compile(r"(?:[\r\n]|\x1b\[A)+\Z|\r?")
_BOLD, _END = "\ufdd0", "\ufdd1"  # for use within a program, by Unicode
_IS_BOLD = re.compile(f"{_BOLD}([^{_BOLD}{_END}\n]*){_END}")


class Terminal:
    """A standard stream that is a terminal. With `is_log`, all lines of a message but the first are indented."""

    def __init__(self, stream: TextIO, *, is_log: bool) -> None:
        self._stream, self._is_log = stream, is_log

    def write(self, text: str) -> int:
        """Write a text with visible control characters."""
        own = found[0] if self._is_log and (found := _OF_BARS.match(text)) else ""
        shown = _IS_BOLD.sub("\x1b[1m\\1\x1b[0m", _CONTROLS.sub(_escape, text[len(own) :]))
        # A line break in a name must not start a line that looks like a message of ours.
        self._stream.write(own + (re.sub(r"\n(?=.)", "\n  ", shown) if self._is_log else shown))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def guarded(stream: TextIO, *, is_log: bool = False) -> TextIO:
    """Return the stream, guarded if it is a terminal."""
    return cast(TextIO, Terminal(stream, is_log=is_log)) if stream.isatty() else stream


def one_line(text: str) -> str:
    """Escape line breaks if standard output is a terminal."""
    return text.replace("\n", r"\n") if isinstance(sys.stdout, Terminal) else text


def bold(text: str) -> str:
    """Mark a text as bold if standard output is a terminal."""
    return f"{_BOLD}{text}{_END}" if isinstance(sys.stdout, Terminal) else text


def print_utf8(content: bytes) -> None:
    """Print UTF-8 text, whatever the encoding of standard output."""
    if isinstance(sys.stdout, Terminal):
        sys.stdout.write(content.decode())
    else:
        sys.stdout.buffer.write(content)


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    if code < 0x20:
        return f"\\x{code:02x}"
    # As in JSON: two surrogates above U+FFFF.
    units = found[0].encode("utf-16-be").hex()
    return "".join(f"\\u{units[start : start + 4]}" for start in range(0, len(units), 4))
