"""Shared code of the encoders in benchmarks/encoders.py: types, timing, memory, calls of few documents."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

Job = dict[str, Any]
HEAVY = 0.1  # only terms above this weight are compared
LEAST_S = 0.5  # minimum duration of a measurement


class Failed(Exception):
    """A process exited without a result; its errors are on stderr."""


class Took(NamedTuple):
    """Wall seconds and CPU seconds of a piece of work."""

    seconds: float
    cpu_seconds: float


class Contender(NamedTuple):
    """Functions that encode texts and return terms, and a description of the settings."""

    encode: Callable[[Sequence[str]], object]
    terms: Callable[[Sequence[str]], list[list[int]]]
    settings: str
    facts: Job = {}  # noqa: RUF012


def in_calls(encode: Callable[[Sequence[str]], object], texts: Sequence[str], documents: int | None) -> object:
    """Encode texts, this many in each call, or all in one."""
    if not documents:
        return encode(texts)
    return [encode(texts[first : first + documents]) for first in range(0, len(texts), documents)]


def timed(work: Callable[[], object]) -> Took:
    """Return the cost of a piece of work, measured or as it reports it."""
    began, used = time.perf_counter(), time.process_time()
    result = work()
    took = Took(time.perf_counter() - began, time.process_time() - used)
    return result if isinstance(result, Took) else took


def mean_cost(work: Callable[[], object]) -> Took:
    """Return the mean time of `work`, repeated for at least LEAST_S."""
    ends, took = time.perf_counter() + LEAST_S, [timed(work)]
    while time.perf_counter() < ends:
        took.append(timed(work))
    return Took(fmean(one.seconds for one in took), fmean(one.cpu_seconds for one in took))


def peak_bytes(device: str) -> int:
    """Return the peak memory of this process, on a GPU, of torch's allocator."""
    import resource

    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")
    if status.exists():
        # getrusage would include the memory of the parent process.
        return int(next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM"))) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def heavy_terms(rows: Iterable[Any]) -> list[list[int]]:
    """Return the token ids of dense rows that are compared; rows are tensors."""
    return [(row > HEAVY).nonzero().flatten().tolist() for row in rows]


def agreement(expected: list[list[int]], found: list[list[int]]) -> str:
    """Return the share of terms of either result that both have."""
    pairs = [(set(one), set(other)) for one, other in zip(expected, found, strict=True)]
    either = sum(len(one | other) for one, other in pairs)
    return f"{sum(len(one & other) for one, other in pairs) / either:.4f}" if either else ""
