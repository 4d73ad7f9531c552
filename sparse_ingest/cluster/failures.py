"""Messages for failed requests, from the JSON of an error or the exception of opensearch-py."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, unquote, urljoin

from opensearchpy.exceptions import ConnectionTimeout, SSLError, TransportError

from sparse_ingest.cluster.access import expired_in
from sparse_ingest.cluster.connection import Connection
from sparse_ingest.errors import ClusterError
from sparse_ingest.storage.places import without_secrets

BUSY = frozenset({429, 502, 503, 504})  # statuses that may pass, and come with Retry-After
BLOCKED = "cluster_block_exception"
CLOSED = "index_closed_exception"
GARBAGE = "{} did not answer with the JSON of OpenSearch or Elasticsearch. Check that --url names the cluster itself."
PAGE = "web page"  # the kind of an error that no cluster sends; its reason is the title
NO_JSON = "The request cannot be written as JSON: {}. Use only lists, objects, strings, numbers and booleans."
# Patterns of OpenSSL's messages, and ours; {0} is OpenSSL's message, {1} advice about an unknown CA.
_TLS_FAILURES = (
    ("certificate is not valid for", "{0}. Write the name that its certificate is for in --url."),
    ("not yet valid", "{0}. Correct the clock of this machine, or renew the certificate."),
    ("has expired", "{0}. Renew its certificate, or correct the clock of this machine."),
    ("issuer certificate|self.signed|verify the first|signature failure", "{0}. {1}"),
    ("verify failed", "{0}. Replace its certificate, or the certificate of the CA that signed it."),
    (
        "(?i)certificate.required|handshake.failure",
        "it asks for a client certificate ({0}). Pass --client-cert and --client-key.",
    ),
    ("EOF occurred", "the TLS handshake was cut off. A client certificate may help: --client-cert and --client-key."),
    ("(?i)alert", "it does not accept the client certificate ({0}). Check --client-cert and who signed it."),
    ("", "the TLS connection failed ({0}). Check --url and the TLS settings of the server."),
)
# Patterns of urllib3's messages, and ours; {0} is the address, {1} the system's reason, {2} advice about https.
_NO_ANSWER = (
    (
        "refused",
        "Nothing listens at {0} (connection refused). Start the cluster (a local OpenSearch: `sparse-ingest server "
        "start`), or pass its URL with --url.",
    ),
    ("resolve|getaddrinfo", "{0}: the host name is unknown. Check --url."),
    ("Failed to establish", "{0} cannot be reached ({1}). Check --url and the network."),
    ("codec can't decode|failed to decode", GARBAGE),
    ("BadStatusLine|HeaderParsing", "{0} does not answer in HTTP. Check --url."),
    ("IncompleteRead", "{0} broke off its answer. Check that it is up, and try again."),
    ("", "{0} closed the connection before it answered.{2} Check that it is up, and try again."),
)


class UnreachableError(ClusterError):
    """No usable answer arrived: refused, timed out, cut off or malformed."""


def error_of(answer: Mapping[str, Any], fallback: str = "no reason given") -> tuple[str, str]:
    """Return type and reason of an error that a cluster reports, including the deepest cause."""
    error = answer.get("error", answer)
    if not answer and fallback.lstrip().startswith("<"):
        return PAGE, _title(fallback)
    if not isinstance(error, dict):
        return "error", str(error or fallback)
    if isinstance(error.get("message"), str):
        # The proxy of AWS sends back the request with its session token.
        return "error", error["message"].partition("\n")[0]
    kind, reason = str(error.get("type", "error")), _one_line(error.get("reason") or fallback)
    cause = error.get("caused_by") or _of_shard(error)
    while isinstance(cause, dict):
        deeper = _one_line(cause.get("reason") or "")
        reason = reason if deeper in reason else f"{reason}: {deeper}"
        cause = cause.get("caused_by")
    return kind, reason


def _of_shard(error: Mapping[str, Any]) -> Any:
    """Return the error of the first failed shard of a search, which Elasticsearch does not repeat as its cause."""
    match error.get("failed_shards"):
        case [{"reason": dict(reason)}, *_]:
            return reason
    return None


def _title(page: str) -> str:
    """Return the title of an HTML page, which may be long; without one, the start of its text, which may be empty."""
    page, flags = page[:10_000], re.DOTALL | re.IGNORECASE
    found = re.search(r"<title[^<>]*>([^<]*[^<\s])", page, flags)
    text = found[1] if found else re.sub(r"<(style|script)\b.*?(</\1>|\Z)|<[^<>]*>", " ", page, flags=flags)
    return " ".join(text.split())[:200]


def _one_line(reason: object) -> str:
    """Return the lines of a reason as one, without the request that the JSON parser quotes after its message."""
    return " ".join(line.strip() for line in str(reason).partition("\n at [Source")[0].splitlines())


def missing_part(path: str, answer: Mapping[str, Any]) -> str | None:
    """Return what the answer to a search, a count or statistics lacks, or None if it is complete.

    A shard without a node counts in `total`, but neither in `successful` nor in `failed` (3.6.0); in statistics it may
    be a replica. `_count` does not report a timeout (3.6.0), so documents are counted with `_search`.
    """
    endpoint = path.partition("/_")[2].partition("/")[0]
    if endpoint not in ("search", "msearch", "count", "stats", "segments"):
        return None
    name = unquote(path.split("/")[1])
    of = "" if name.startswith("_") else f" of {name!r}"
    for part in answer.get("responses", [answer]):
        shards = part.get("_shards") or {}
        total, missing = int(shards.get("total", 0)), int(shards.get("failed", 0))
        if endpoint not in ("stats", "segments"):
            missing = max(missing, total - int(shards.get("successful", total)))
        if missing:
            failures = shards.get("failures") or [{"reason": {"reason": "no node has started them"}}]
            kind, reason = error_of({"error": failures[0].get("reason")})
            reason = reason if kind == "error" else f"{kind}: {reason}"
            return f"{missing} of {total} shards{of} failed ({reason})"
        if part.get("timed_out") or part.get("terminated_early"):
            return f"a search{of} ended early, by a timeout or terminate_after, on any of its {total} shards"
    return None


def is_block(status: int, kind: str) -> bool:
    """Return whether an error is a block that stays until its cause is removed: 403, or 429 where a disk is full.

    A block with 503 ends when the cluster has started. A closed index counts as a block, with status 400.
    """
    return kind in (BLOCKED, "index_create_block_exception", CLOSED) and status != 503


def unreachable_message(
    error: TransportError, address: str, timeout_s: float, *, ca: str | None = None, first: bool = False
) -> str:
    """Return why no usable answer came. `ca` is the file of --ca; `first` is true for the first request of a client."""
    cause = str(error.info)
    if isinstance(error, SSLError) or "SSL" in cause:
        if "WRONG_VERSION_NUMBER" in cause or "record layer" in cause:
            return f"{address} does not speak TLS. If that is intended, write http:// in --url."
        return f"{address}: {_tls_failure(cause, ca)}"
    if "timed out" in cause or isinstance(error, ConnectionTimeout):
        return f"{address} did not answer within {timeout_s:g} s. Check that it is up and not overloaded."
    hint = " If it speaks TLS, write https:// in --url." if first and address.startswith("http:") else ""
    system = cause.rpartition("] ")[2].strip(" ')\"")
    return next(text for pattern, text in _NO_ANSWER if re.search(pattern, cause)).format(address, system, hint)


def blocked_message(address: str, path: str, reason: str) -> str:
    """Return the message for a block. Clusters answer some with 403, as for a missing right."""
    named = re.search(r"index \[([^]]+)\] blocked by", reason)  # the path may have an alias or several indexes
    name = named[1] if named else unquote(path.split("/")[1])
    at = f"/{quote(name, safe='')}"
    if reason == "closed" and name.startswith("_"):
        return f"{address}: an index is closed ({CLOSED}). Open it."
    if reason == "closed":
        return f"{address}: index {name!r} is closed ({CLOSED}). Open it: POST {at}/_open."
    for number, refused, block in (("/7/", "search", "read"), ("/9/", "read or change the mapping of", "metadata")):
        if number in reason:
            settings = f'{{"index.blocks.{block}": null}}'
            return f"{address} refuses to {refused} {name!r}: {reason} Remove the block: PUT {at}/_settings {settings}."
    if "/10/" in reason:
        return (
            f"{address} creates no indexes now: {reason} This is not a permission problem: the cluster sets this block "
            "when every node is above the high disk watermark, or an administrator set it. Free disk space, or remove "
            'the block: PUT /_cluster/settings {"persistent": {"cluster.blocks.create_index": null}}. Then start the '
            "same command again."
        )
    return (
        f"{address} accepts no changes: {reason} Remove the block (a full disk, or one that an administrator set in "
        "the settings of the index or cluster), then start the same command again: it continues where this one stopped."
    )


def redirect_message(status: int, address: str, path: str, location: str | None) -> str:
    """Return the message for a redirect. None is followed: the user did not name its target."""
    if not location:
        return f"{address} sent a redirect ({status}) without a target. Check --url."
    target = without_secrets(urljoin(f"{address}/", location))
    base = target.removesuffix(path).rstrip("/")
    return f"{address} redirects to {target} ({status}). If that is the cluster, write --url {base}."


def _tls_failure(cause: str, ca: str | None) -> str:
    """Return the message for a failed TLS connection, given OpenSSL's message."""
    short = re.sub(r"^.*?\]\s*|\s*\(_ssl\.c.*$", "", cause).rstrip(".")
    if ca and "has expired" in cause and (names := expired_in(ca)):
        return f"{short}. {ca} contains a CA that has expired ({', '.join(names)}). Get the renewed one."
    unknown = "Pass the file of the CA that signed its certificate with --ca."
    if ca:
        unknown = f"Its certificate was signed by a CA that is not in {ca}. Get the certificate of that CA."
    return next(text for pattern, text in _TLS_FAILURES if re.search(pattern, cause)).format(short, unknown)


def who_asks(connection: Connection) -> str:
    """Return what a cluster knows the client by, for a message."""
    if connection.aws_service:
        return "these AWS credentials"
    if connection.api_key:
        return "this API key"
    if connection.user:
        return f"user {connection.user!r}"
    return "this client certificate" if connection.client_cert else "a client without a user name"


def refused_message(status: int, address: str, connection: Connection) -> str | None:
    """Return the message of a missing right or sign-in; None for other statuses."""
    if status not in (401, 403):
        return None
    who = who_asks(connection)
    if connection.aws_service:
        return (
            f"{address} refuses {who} ({status}). Check AWS_PROFILE, --aws-region, --aws-service and the access policy."
        )
    if status == 403:
        return f"{address} forbids this to {who} (403): grant the right, or pass another --user."
    if connection.api_key:
        return f"{address} does not accept {who} (401): check that it is complete, encoded and not expired."
    if connection.user:
        return f"{address} does not accept {who} with this password (401). Check both."
    if connection.client_cert:
        return f"{address} does not know {who} (401): pass --user and --password as well."
    return f"{address} requires authentication (401): pass --user and --password, or a client certificate."
