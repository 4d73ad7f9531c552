"""Errors as HTTP: the status and the JSON of each."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from sparse_ingest.errors import (
    ClusterError,
    DocumentNotFoundError,
    Interrupted,
    MissingExtraError,
    SparseIngestError,
    StorageError,
    UsageError,
)
from sparse_ingest.serving.inputs import RefusedError

if TYPE_CHECKING:
    from sparse_ingest.cluster.client import ResponseError

logger = logging.getLogger(__name__)
_BUSY = (429, 503)  # come with Retry-After


class Failure(NamedTuple):
    """A status, and an error for users."""

    status: int
    kind: str
    message: str

    def content(self) -> dict[str, Any]:
        """Return the JSON."""
        return {"error": {"type": self.kind, "message": self.message}}

    @property
    def headers(self) -> dict[str, str]:
        """The headers that belong to the status."""
        if self.status == 401:
            return {"www-authenticate": "Bearer"}
        return {"retry-after": "1"} if self.status in _BUSY else {}


def failure_of(error: Exception, shown: Callable[[str], str]) -> Failure:
    """Return the failure of an error; `shown` changes its message for clients.

    An error that is not for users is logged with its traceback.
    """
    if not isinstance(error, SparseIngestError):
        logger.error("Internal error", exc_info=error)
        return Failure(500, "InternalError", "Internal error. The log of the service has its traceback.")
    message = shown(str(error))
    if replacement := _replacement(error):
        logger.warning("%s", error)
        message = f"{replacement}. See the service log."
    return Failure(_status_of(error), type(error).__name__, message)


def _replacement(error: SparseIngestError) -> str | None:
    """Return the text that replaces a reason that may name hosts, users or roles."""
    from sparse_ingest.cluster.client import PartialAnswerError, ResponseError, TimedOutError, UnreachableError
    from sparse_ingest.cluster.failures import is_block

    if isinstance(error, ResponseError):
        is_shown = _is_of_request(error) or is_block(error.status, error.kind)
        return None if is_shown else f"The cluster answered with status {error.status}"
    if isinstance(error, PartialAnswerError):
        return "The cluster gave a partial answer, which allow_partial accepts"
    is_silent = isinstance(error, UnreachableError) and not isinstance(error, TimedOutError)
    return "The cluster gave no usable answer" if is_silent else None


def _is_of_request(error: ResponseError) -> bool:
    """Return whether the client can correct the request, such as a filter with an unknown clause."""
    from sparse_ingest.cluster.failures import CLOSED

    return error.status == 400 and error.kind not in ("security_exception", CLOSED)


def _status_of(error: SparseIngestError) -> int:
    from sparse_ingest.cluster.client import PartialAnswerError, ResponseError, TimedOutError, UnreachableError

    if isinstance(error, RefusedError):
        return error.status
    if isinstance(error, UsageError):
        return 400
    if isinstance(error, MissingExtraError):
        return 501
    if isinstance(error, DocumentNotFoundError):
        return 404
    if isinstance(error, TimedOutError):
        return 504
    if isinstance(error, UnreachableError | PartialAnswerError | StorageError | Interrupted):
        return 503
    if isinstance(error, ClusterError):
        response = error if isinstance(error, ResponseError) else error.__cause__
        if isinstance(response, ResponseError) and _is_of_request(response):
            return 400
        return 503 if isinstance(response, ResponseError) and response.may_pass else 502
    return 500
