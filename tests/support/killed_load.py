"""A program that runs `sparse-ingest load` and kills itself at a given moment, its first argument.

The moment: `after:N` (after the response to the Nth modifying request, before the load sees it), `during:N:SECONDS`
(SECONDS after the Nth request of any kind was started), or `never`, which prints one line per modifying request on
stderr.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from itertools import count
from threading import Thread
from typing import Any

from sparse_ingest.cli.main import main
from sparse_ingest.cluster.client import Client

_CHANGING = ("_aliases", "_bulk", "_refresh", "_forcemerge", "_flush")


def changes_something(method: str, path: str) -> bool:
    return (method in ("PUT", "DELETE") or path.endswith(_CHANGING)) and not path.endswith(("/point_in_time", "/_pit"))


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(moment: str) -> None:
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


if __name__ == "__main__":
    moment = sys.argv.pop(1)
    arm(moment)
    main()
