"""What the encoders of benchmarks/encoders.py have in common: their type, timing, and calls of few documents."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

Job = dict[str, Any]
HEAVY = 0.1  # only terms above this weight are compared


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


def heavy_terms(rows: Iterable[Any]) -> list[list[int]]:
    """Return the token ids of dense rows that are compared; rows are tensors."""
    return [(row > HEAVY).nonzero().flatten().tolist() for row in rows]
