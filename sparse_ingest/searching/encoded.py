"""The public `encode`, which returns a `SearchableRun`. Separate, because encoding/ is a layer below searching/."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec

from sparse_ingest.encoding.encode import encode as encode_corpus
from sparse_ingest.runs.run import Run
from sparse_ingest.searching.search import SearchableRun

P = ParamSpec("P")


def _searchable(stage: Callable[P, Run]) -> Callable[P, SearchableRun]:
    @functools.wraps(stage)
    def searchable(*args: P.args, **kwargs: P.kwargs) -> SearchableRun:
        return SearchableRun(stage(*args, **kwargs))

    return searchable


encode = _searchable(encode_corpus)
