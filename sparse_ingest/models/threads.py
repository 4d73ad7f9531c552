"""The threads of compiled functions, which are more than one for a batch that is alone (vectors.py).

For such a batch of a model with linear layers in integers, torch computes on one thread: its other threads wait between
its operations by spinning, which takes the cores. A text of 360 words takes 0.7 of the time in int16 on two cores.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

# Operations for each thread, a fraction of a millisecond: starting a thread takes a tenth of one.
LEAST_OPERATIONS = 2e8
own = 0  # threads of compiled functions while torch has one; 0: as many as torch


def available() -> int:
    """Return the number of threads of compiled functions."""
    return own or torch.get_num_threads()


def on_threads(work: Callable[[slice], object], count: int, *, operations: float) -> None:
    """Call a function with adjacent slices of `count` parts, one for each thread that is worth its start."""
    threads = min(available(), count, int(operations / LEAST_OPERATIONS))
    if threads <= 1:
        work(slice(0, count))
        return
    inference = torch.is_inference_mode_enabled()  # of this thread only

    def worked(parts: slice) -> None:
        with torch.inference_mode(inference):
            work(parts)

    borders = [count * number // threads for number in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(worked, map(slice, borders, borders[1:])))
