"""`sparse-ingest load` in a forked process that kills itself at a given moment.

The moment: `after:N` (after the response to the Nth modifying request, before the load sees it), `during:N:SECONDS`
(SECONDS after the Nth request of any kind was started), or `never`, which prints one line per modifying request on
stderr.
"""

from __future__ import annotations

import os
import secrets
import signal
import sys
import time
from functools import partial
from itertools import count
from pathlib import Path
from threading import Thread
from typing import Any

from sparse_ingest.cluster.client import Client
from support.forked import start

_CHANGING = ("_aliases", "_bulk", "_refresh", "_forcemerge", "_flush")


class KilledLoad:
    """A load with these arguments, whose output is a file in `folder`."""

    def __init__(self, moment: str, folder: Path, *arguments: object) -> None:
        self._log = folder / f"log-{secrets.token_hex(4)}"
        self._process = start("load", *arguments, log=self._log, prepare=partial(_arm, moment))

    def ended(self, timeout_s: float = 120) -> tuple[int | None, str]:
        """Wait until the process has ended; return its exit code and its output."""
        self._process.join(timeout_s)
        if self._process.exitcode is None:  # at the end of the tests it would be waited for
            self._process.kill()
        return self._process.exitcode, self._log.read_text()


def changes_something(method: str, path: str) -> bool:
    return (method in ("PUT", "DELETE") or path.endswith(_CHANGING)) and not path.endswith(("/point_in_time", "/_pit"))


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _arm(moment: str) -> None:
    kind, *numbers = moment.split(":")
    call = Client.call
    asked, changed = count(1), count(1)

    def die_soon(delay_s: float) -> None:
        time.sleep(delay_s)
        _die()

    def watched(self: Client, method: str, path: str, *arguments: Any, **keywords: Any) -> Any:
        if next(asked) == int(numbers[0] if kind == "during" else 0):
            Thread(target=die_soon, args=(float(numbers[1]),), daemon=True).start()
        answer = call(self, method, path, *arguments, **keywords)
        if changes_something(method, path):
            number = next(changed)
            if kind == "after" and number == int(numbers[0]):
                _die()
            if kind == "never":
                print(method, path, file=sys.stderr, flush=True)
        return answer

    Client.call = watched  # type: ignore[method-assign]
