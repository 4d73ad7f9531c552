"""Run `sparse-ingest` in this process with pseudo-terminals as stdout and stderr."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import struct
import sys
import termios
from collections.abc import Iterator
from threading import Thread

import pytest

from sparse_ingest.cli.main import main

# Title, clipboard, link, clear, color, C1, bidirectional controls, invisible marks, separators, backspace, return.
EVIL = (
    "a\x1b]0;PWN\x07\x1b]52;c;ZXZpbA==\x07\x1b]8;;http:evil\x07\x1b[2J\x1b[31m\x1b[A\x9b2J\x90"
    "\u202eb\u2066c\u200bd\u200f\u2028e\u2029f\x08\x08g\rh\x7fij\U000e0041k\ufdd0l"
)
NAMED = f"{EVIL}\nFORGED"
_HARMFUL = set(EVIL) - set("\ufdd0") - set(map(chr, range(0x20, 0x7F)))


@contextlib.contextmanager
def _terminal(shown: list[bytes]) -> Iterator[object]:
    """Open a pseudo-terminal; append its output to `shown` at the end."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 50, 120, 0, 0))

    def read() -> None:
        with contextlib.suppress(OSError):  # every descriptor of the terminal is closed
            while content := os.read(master, 65536):
                shown.append(content)

    reader = Thread(target=read)
    reader.start()
    try:
        with open(slave, "w", encoding="utf-8") as stream:  # noqa: PTH123 - a descriptor
            yield stream
    finally:
        reader.join()
        os.close(master)


def on_terminal(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> tuple[int, str, str]:
    """Return exit code, stdout and stderr of a command, with line feeds as line ends."""
    monkeypatch.setattr(sys, "argv", ["sparse-ingest", *map(str, arguments)])
    shown: tuple[list[bytes], list[bytes]] = ([], [])
    with _terminal(shown[0]) as out, _terminal(shown[1]) as err:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as end:
            main()
    first, second = (b"".join(one).decode().replace("\r\n", "\n") for one in shown)
    return int(end.value.code or 0), first, second


def refuse_controls(out: str, err: str) -> None:
    """Fail if the output has a control character, except carriage returns of progress bars, or a forged line."""
    for harmful in _HARMFUL:
        assert harmful not in out, ascii(out)
        assert harmful == "\r" or harmful not in err, ascii(err)
    assert "\nFORGED" not in f"\n{out}" and "\nFORGED" not in f"\n{err}"
