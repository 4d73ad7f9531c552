"""What a failed request means: the error of an answer, and why no answer came.

In: the JSON of an error, or the exception of opensearch-py. Out: type and reason, or one message with what to do.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from opensearchpy.exceptions import SSLError, TransportError

BUSY = frozenset({429, 502, 503, 504})  # statuses that may pass, and come with Retry-After
# A node that runs out of disk answers 429 too, and does so until space is freed.
BLOCKED = "cluster_block_exception"
# What OpenSSL says, and what it means.
_TLS_FAILURES = (
    ("certificate is not valid for", "{}. Write the name that its certificate is for in --url."),
    ("has expired|not yet valid", "{}. Its certificate must be renewed, or the clock of this machine be set right."),
    ("verify failed", "{}. Give the file of the CA that signed its certificate with --ca."),
    (
        "(?i)certificate.required|handshake.failure",
        "it asks for a client certificate ({}). Give --client-cert and --client-key.",
    ),
    (
        "EOF occurred",
        "it broke off the TLS handshake. It may ask for a client certificate: --client-cert and --client-key.",
    ),
    ("(?i)alert", "it does not accept the client certificate ({}). Check --client-cert and who signed it."),
    ("", "the TLS connection failed ({}). Check --ca, --client-cert and --client-key."),
)


def error_of(answer: Mapping[str, Any], fallback: str = "no reason given") -> tuple[str, str]:
    """Return type and reason of an error that OpenSearch reports, the deepest cause included."""
    error = answer.get("error", answer)
    if not isinstance(error, dict):
        return "error", str(error or fallback)
    if isinstance(error.get("message"), str):
        # The proxy in front of OpenSearch at AWS repeats the request that it saw, a session token included.
        return "error", error["message"].partition("\n")[0]
    kind, reason = str(error.get("type", "error")), str(error.get("reason") or fallback)
    cause = error.get("caused_by")
    while isinstance(cause, dict):
        if cause.get("reason") and str(cause["reason"]) not in reason:
            reason = f"{reason}: {cause['reason']}"
        cause = cause.get("caused_by")
    return kind, reason


def unreachable_message(error: TransportError, address: str, timeout_s: float) -> str:
    """Return why no usable answer came from an address."""
    cause = str(error.info)
    if isinstance(error, SSLError) or "SSL" in cause:
        if "WRONG_VERSION_NUMBER" in cause or "record layer" in cause:
            return f"{address} does not speak TLS. If it is meant so, write http:// in --url."
        return f"{address}: {_tls_failure(cause)}"
    if "timed out" in cause or type(error).__name__ == "ConnectionTimeout":
        return (
            f"{address} did not answer within {timeout_s:g} s. Check that it is up and not overloaded, and try again."
        )
    if "refused" in cause:
        return (
            f"Nothing listens at {address} (connection refused). Start OpenSearch, "
            "for a local one `sparse-ingest server start`, or give its address with --url."
        )
    if "resolve" in cause or "getaddrinfo" in cause:
        return f"{address}: the host name is unknown. Check --url."
    hint = " If it speaks TLS, write https:// in --url." if address.startswith("http:") else ""
    return f"{address} closed the connection before it answered.{hint} Check that it is up, and try again."


def _tls_failure(cause: str) -> str:
    """What went wrong between the two ends of TLS, by what OpenSSL says."""
    short = re.sub(r"^.*?\]\s*|\s*\(_ssl\.c.*$", "", cause).rstrip(".")
    return next(says for pattern, says in _TLS_FAILURES if re.search(pattern, cause)).format(short)
