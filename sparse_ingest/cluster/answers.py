# ruff: noqa: UP013 - a line for each type
"""Answers of a cluster: read up to a size and a deadline, and what a malformed one is reported as.

In: the connection pool of opensearch-py, or an exception. Out: answers that are complete and small enough, or a
`ClusterError` that names the address. An answer may be compressed; its size counts after decompression.
"""

from __future__ import annotations

import struct
import time
import traceback
from functools import partial
from types import SimpleNamespace
from typing import Annotated, Any, TypedDict

import msgspec
from urllib3.exceptions import ReadTimeoutError

from sparse_ingest.cluster.failures import GARBAGE, UnreachableError
from sparse_ingest.errors import ClusterError
from sparse_ingest.storage.foreign_json import MAX_BYTES

# 10,000 hits with 25 KB of fields each. Other answers stay far below MAX_BYTES: 1,000 fields of a mapping are 60 KB.
MAX_SEARCH_BYTES = 256 << 20
_PIECE = 1 << 16
# What reading raises where a key is missing, a value has another type, or values are nested too deeply.
_MALFORMED = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError, struct.error)
_READERS = tuple(
    f"sparse_ingest.{name}" for name in ("cluster", "storage.foreign_json", "searching", "verification", "planning")
)
_NO_READERS = ("sparse_ingest.cluster.journal", "sparse_ingest.cluster.bulk_bodies")

# What is read of the answers to `GET /index`, to a search, and to several, where a filter may leave parts out.
Uuid = Annotated[str, msgspec.Meta(pattern=r"^[\w-]{1,64}\Z")]  # names a folder of journals
_Names = dict[str, "_Field"]
_Field = TypedDict(
    "_Field", {"type": str, "properties": _Names, "fields": _Names, "_meta": dict[str, Any]}, total=False
)
_IndexSettings = TypedDict("_IndexSettings", {"uuid": Uuid}, total=False)
_Settings = TypedDict("_Settings", {"index": _IndexSettings})
_Entry = TypedDict("_Entry", {"aliases": dict[str, dict[str, Any]], "mappings": _Field, "settings": _Settings})
Indexes = dict[str, _Entry]
_Hit = TypedDict("_Hit", {"_id": str, "_score": float})
_Hits = TypedDict("_Hits", {"hits": list[_Hit]})
Found = TypedDict("Found", {"took": int, "hits": _Hits})
_Part = TypedDict("_Part", {"_id": str, "_score": float | None}, total=False)
_Parts = TypedDict("_Parts", {"hits": list[_Part]}, total=False)
_Response = TypedDict("_Response", {"hits": _Parts}, total=False)
Responses = TypedDict("Responses", {"responses": list[_Response]})


class BoundedPool:
    """A pool of connections whose answers have a size limit, and a deadline for their last byte.

    The pool of urllib3 reads an answer to its end, however long that is, as long as each piece comes in time.
    """

    def __init__(self, pool: Any, address: str) -> None:
        self._pool, self._address = pool, address
        self.close = pool.close

    def urlopen(self, method: str, url: str, body: bytes | None, *, timeout: float, **more: Any) -> SimpleNamespace:
        """Send a request and return what opensearch-py uses of its answer.

        Raises:
            ClusterError: the answer is too large.
            ReadTimeoutError: its last byte did not come in time.
        """
        end = time.monotonic() + timeout
        answer = self._pool.urlopen(method, url, body, timeout=timeout, preload_content=False, **more)
        path = url.partition("?")[0]
        limit = MAX_SEARCH_BYTES if path.endswith(("/_search", "/_msearch")) else MAX_BYTES
        content = bytearray()
        # read1 returns what has come; urllib3 1.26 lacks it and waits for a complete piece.
        is_new = hasattr(answer, "read1")
        for piece in iter(partial(answer.read1, _PIECE), b"") if is_new else answer.stream(_PIECE):
            content += piece
            if len(content) > limit:
                answer.close()
                raise ClusterError(
                    f"{self._address} sent an answer of more than {limit >> 20} MiB to {method} {path}, the limit for "
                    "such answers. Check that --url names OpenSearch itself; if it does, ask for less."
                )
            if time.monotonic() > end:
                answer.close()
                raise ReadTimeoutError(self._pool, url, "Read timed out.")
        return SimpleNamespace(status=answer.status, headers=answer.headers, data=bytes(content))


def malformed(error: BaseException | None, address: str) -> UnreachableError | None:
    """Return what to raise for an exception if code that reads answers raised it, otherwise None.

    The message names the exception and its place, so that a fault of our own can be found too.
    """
    if not isinstance(error, _MALFORMED) or isinstance(error, UnicodeError):
        return None
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    modules = [str(frame.f_globals.get("__name__")) for frame in frames]
    module = next((one for one in reversed(modules) if one.startswith("sparse_ingest.")), "")
    if not module.startswith(_READERS) or module in _NO_READERS:
        return None
    return UnreachableError(f"{GARBAGE.format(address)} ({type(error).__name__} in {module}: {str(error)[:200]})")
