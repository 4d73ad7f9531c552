"""Wait for a condition that another thread or process makes true."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

# Only a guard against hanging: no test depends on how long anything takes.
HANGING_S = 120.0
T = TypeVar("T")


def until(there: Callable[[], T], why: Callable[[], object] = lambda: "") -> T:
    """Poll `there` until it returns something true, and return that. After the deadline fail with `why`."""
    end, pause_s = time.monotonic() + HANGING_S, 0.001
    while not (found := there()):
        assert time.monotonic() < end, why()
        time.sleep(pause_s := min(2 * pause_s, 0.016))
    return found
