# ruff: noqa: UP013 - a line for each type
"""Limits and types of a cluster's answers, and the error for malformed ones.

Sizes count after decompression.
"""

from __future__ import annotations

import os
import struct
import time
import traceback
from collections.abc import Collection
from functools import partial
from types import SimpleNamespace
from typing import Annotated, Any, TypedDict

import msgspec
import opensearchpy
from opensearchpy.exceptions import TransportError
from urllib3.exceptions import ReadTimeoutError

from sparse_ingest.cluster.failures import BUSY, GARBAGE, UnreachableError
from sparse_ingest.errors import ClusterError
from sparse_ingest.storage.foreign_json import MAX_BYTES

# 10,000 hits with 25 KB of fields each. Other answers are far below MAX_BYTES: 1,000 fields of a mapping are 60 KB.
MAX_SEARCH_BYTES = 256 << 20
REDIRECTS = frozenset({301, 302, 303, 307, 308})
_PIECE = 1 << 16
# The exceptions for a missing key, a value of another type, or values that are nested too deeply.
_MALFORMED = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError, struct.error)
_READERS = tuple(
    f"sparse_ingest.{name}" for name in ("cluster", "storage.foreign_json", "searching", "verification", "planning")
)
_NO_READERS = ("sparse_ingest.cluster.journal", "sparse_ingest.cluster.bulk_bodies")

# The used parts of the answers to `GET /index`, `_search`, and `_msearch`, where a filter may omit parts.
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
_Part = TypedDict("_Part", {"_id": str, "_score": float | str | None}, total=False)  # a string: "Infinity"
_Parts = TypedDict("_Parts", {"hits": list[_Part]}, total=False)
_Response = TypedDict("_Response", {"hits": _Parts}, total=False)
Responses = TypedDict("Responses", {"responses": list[_Response]})


class BoundedPool:
    """A pool of connections whose answers have a size limit, and a deadline for their last byte.

    The timeout of urllib3 applies to each piece of an answer.
    """

    def __init__(self, pool: Any, address: str) -> None:
        self._pool, self._address = pool, address
        self.close = pool.close
        self.product = ""  # the header of Elasticsearch's answers

    def urlopen(self, method: str, url: str, body: bytes | None, *, timeout: float, **more: Any) -> SimpleNamespace:
        """Send a request and return the parts of its answer that opensearch-py uses."""
        end = time.monotonic() + timeout
        answer = self._pool.urlopen(method, url, body, timeout=timeout, preload_content=False, **more)
        path = url.partition("?")[0]
        limit = MAX_SEARCH_BYTES if path.endswith(("/_search", "/_msearch")) else MAX_BYTES
        content = bytearray()
        # read1 returns the bytes that have arrived; urllib3 1.26 lacks it and waits for a complete piece.
        is_new = hasattr(answer, "read1")
        for piece in iter(partial(answer.read1, _PIECE), b"") if is_new else answer.stream(_PIECE):
            content += piece
            if len(content) > limit:
                answer.close()
                raise ClusterError(
                    f"{self._address} sent an answer of more than {limit >> 20} MiB to {method} {path}, the limit for "
                    "such answers. Check that --url names the cluster itself; if it does, request less."
                )
            if time.monotonic() > end:
                answer.close()
                raise ReadTimeoutError(self._pool, url, "Read timed out.")
        self.product = answer.headers.get("x-elastic-product") or self.product
        return SimpleNamespace(status=answer.status, headers=answer.headers, data=bytes(content))


class PlainConnection(opensearchpy.Urllib3HttpConnection):
    """Keeps the Retry-After and Location headers of errors, which opensearch-py drops, and limits answers."""

    def _create_urllib3_pool(self) -> None:
        # The base class would set a pool without limits first, and other threads could take it.
        pool = BoundedPool(self._urllib3_pool_factory(), self.host + self.url_prefix)  # type: ignore[no-untyped-call]
        self.pool, self._process = pool, os.getpid()

    def perform_request(self, *request: Any, ignore: Collection[int] = (), **more: Any) -> Any:
        """Send one request; return status, headers and text of the answer."""
        if self._process != os.getpid():  # forked: the connections are those of the other process
            self._create_urllib3_pool()
        kept = (BUSY | REDIRECTS) - set(ignore)
        status, answered, text = super().perform_request(*request, **more | {"ignore": kept.union(ignore)})
        if status in kept:
            try:
                self._raise_error(status, text, answered.get("content-type"))
            except TransportError as error:
                error.retry_after = answered.get("retry-after")  # type: ignore[attr-defined]
                error.location = answered.get("location")  # type: ignore[attr-defined]
                raise
        return status, answered, text


def malformed(error: BaseException | None, address: str) -> UnreachableError | None:
    """Return the error for an exception that code for reading answers raised, otherwise None.

    The message names the exception and its module, to find faults of our own too.
    """
    if not isinstance(error, _MALFORMED) or isinstance(error, UnicodeError):
        return None
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    modules = [str(frame.f_globals.get("__name__")) for frame in frames]
    module = next((one for one in reversed(modules) if one.startswith("sparse_ingest.")), "")
    if not module.startswith(_READERS) or module in _NO_READERS:
        return None
    return UnreachableError(f"{GARBAGE.format(address)} ({type(error).__name__} in {module}: {str(error)[:200]})")
