"""The connection: where OpenSearch is, who asks, and one sentence for everything that can go wrong on the way.

In: a `Connection`. Out: a `Client`, whose `call` sends one request and gives the parsed answer. Nothing is retried
here (sending.py knows what may be sent again), and no proxy of the environment is used: urllib3 pools connect
directly, so a request for loopback stays on the machine. A password never reaches a message, a log or a `repr`.
Who may not ask for the version, and Amazon OpenSearch Serverless which has none, get the rules of NEWEST_TRIED.
Not covered: Serverless was tried through a stand-in only; what it lacks, it says by itself.
"""

from __future__ import annotations

import copy
import logging
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import fields, replace
from typing import Any, TypeAlias
from urllib.parse import quote

import opensearchpy
from opensearchpy import OpenSearch
from opensearchpy.exceptions import SerializationError, TransportError
from urllib3.exceptions import InvalidHeader
from urllib3.util import Retry

from sparse_ingest.cluster.access import aws_signer, basic_header, tls_context
from sparse_ingest.cluster.connection import Address, parse_url
from sparse_ingest.cluster.connection import Connection as Connection  # which most modules need beside `connect`
from sparse_ingest.cluster.failures import BLOCKED, BUSY, error_of, unreachable_message
from sparse_ingest.errors import ClusterError, SparseIngestError, UsageError

logger = logging.getLogger(__name__)

OLDEST_VERSION = (2, 11)  # the first with neural_sparse
# The version of the tests. An older server refuses by itself what it does not know.
NEWEST_TRIED = (3, 6, 0)
CONNECTIONS = 32  # kept open at most, as many as a search with --concurrency has requests in flight


ConnectionLike: TypeAlias = Connection | OpenSearch


class ResponseError(ClusterError):
    """OpenSearch answered with an error: `status`, its `kind` (the exception's type) and `reason`.

    `retry_after_s` is how long it wants to be left alone, if it says so.
    """

    def __init__(
        self, message: str, *, status: int, kind: str, reason: str, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.reason = reason
        self.retry_after_s = retry_after_s

    @property
    def may_pass(self) -> bool:
        """Whether the same request may succeed later."""
        return self.status in BUSY and self.kind != BLOCKED


class UnreachableError(ClusterError):
    """No usable answer came: refused, timed out, cut off or not understood."""


class _PlainConnection(opensearchpy.Urllib3HttpConnection):
    """Keeps the Retry-After of an answer, which opensearch-py drops together with the other headers of an error."""

    def perform_request(self, *request: Any, ignore: Collection[int] = (), **more: Any) -> Any:
        """Send one request; status, headers and text of the answer."""
        status, answered, text = super().perform_request(*request, **more | {"ignore": BUSY.union(ignore)})
        if status in BUSY and status not in ignore:
            try:
                self._raise_error(status, text, answered.get("content-type"))
            except TransportError as error:
                error.retry_after = answered.get("retry-after")  # type: ignore[attr-defined]
                raise
        return status, answered, text


def _retry_after_s(header: str | None) -> float | None:
    """The seconds in a Retry-After header, which holds them or a date; None when it cannot be read."""
    try:
        return Retry().parse_retry_after(header or "")
    except (InvalidHeader, ValueError):
        return None


class Client:
    """One cluster, asked once for its version. Safe to use from several threads."""

    def __init__(
        self, transport: opensearchpy.Transport, address: Address, connection: Connection, *, owned: bool = True
    ) -> None:
        self._transport, self._connection, self._owned = transport, connection, owned
        self.address = str(address)
        self.version, self.cluster_uuid = self._asked_version()

    def call(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | bytes | None = None,
        *,
        params: Mapping[str, str] | None = None,
        timeout_s: float = 60,
    ) -> Any:
        """Send one request, once, and give the parsed JSON of the answer.

        Raises:
            ResponseError: OpenSearch answered with an error.
            UnreachableError: no usable answer came.
        """
        try:
            # A copy of params: opensearch-py takes keys out of the one it is given.
            return self._transport.perform_request(
                method, path, params=dict(params or {}), body=body, timeout=timeout_s
            )
        except TransportError as error:
            # AWS repeats the request that it refuses, a session token included: nothing for a traceback.
            raise self._translated(error, timeout_s) from (None if self._connection.aws_service else error)
        except (SerializationError, AttributeError) as error:
            # AttributeError: opensearch-py takes it for granted that an error's JSON is an object.
            raise UnreachableError(
                f"{self.address} answered with something that is no JSON of OpenSearch's. "
                "Check that --url names OpenSearch itself."
            ) from error

    def find(
        self, path: str, *, params: Mapping[str, str] | None = None, absent: Collection[int] = (404,)
    ) -> dict[str, Any] | None:
        """The answer to a GET; None where nothing is, or who asks may not see it: the `absent` statuses."""
        try:
            return dict(self.call("GET", path, params=params))
        except ResponseError as error:
            if error.status in absent:
                return None
            raise

    def close(self) -> None:
        """Close the open connections, unless they are those of an `OpenSearch` of the caller's."""
        if self._owned:
            self._transport.close()

    def _asked_version(self) -> tuple[tuple[int, int, int], str]:
        """Version and UUID of the cluster, or what stands for them where they are not told."""
        try:
            root = self.call("GET", "/")
        except ResponseError as error:
            if error.status == 404 and self._connection.aws_service == "aoss":
                why = "Amazon OpenSearch Serverless has no version"
            elif error.status == 403 and "cluster:monitor/main" in error.reason:
                why = f"{self.address} does not tell its version to {_who(self._connection)} (cluster:monitor/main)"
            else:
                raise
            logger.warning("%s; it is taken for OpenSearch %d.%d.%d.", why, *NEWEST_TRIED)
            # The UUID of an index is enough to tell journals apart.
            return NEWEST_TRIED, "unknown"
        return _checked_version(root, self.address), str(root.get("cluster_uuid", "unknown"))

    def _translated(self, error: TransportError, timeout_s: float) -> SparseIngestError:
        if isinstance(error.info, SparseIngestError):
            # The signer's own sentence, which opensearch-py wraps as if the connection had failed.
            return error.info
        if not isinstance(error.status_code, int):
            return UnreachableError(unreachable_message(error, self.address, timeout_s))
        kind, reason = error_of(error.info if isinstance(error.info, dict) else {}, str(error.error))
        message = f"{self.address} answered {error.status_code} {kind}: {reason}"
        if refused := _refused(error.status_code, self.address, self._connection):
            message = f"{refused} It said: {reason[:200]}"
        after_s = _retry_after_s(getattr(error, "retry_after", None))
        return ResponseError(message, status=error.status_code, kind=kind, reason=reason, retry_after_s=after_s)


def connection_of(url: str | None, connection: ConnectionLike | None) -> ConnectionLike:
    """Return what `url=` and `connection=` of the Python API mean: one of them, or the SPARSE_INGEST_* variables.

    Raises:
        UsageError: both are given.
    """
    if url is not None and connection is not None:
        raise UsageError("Give url= or connection=, not both.")
    if connection is not None:
        return connection
    variables = {entry.name: os.environ.get(entry.metadata["env"]) for entry in fields(Connection)}
    given: dict[str, Any] = {name: value for name, value in variables.items() if value}
    return Connection(**given | ({"url": url} if url is not None else {}))


def connect(connection: ConnectionLike | None = None, *, url: str | None = None) -> Client:
    """Connect and check that an OpenSearch of a known version answers.

    Args:
        connection: How to reach the cluster. The transport of an `opensearchpy.OpenSearch` is used as it is, except
            that it does not retry: what may be sent again is decided by the stage.
        url: Its address, instead of `connection`. Without either, the SPARSE_INGEST_* variables.

    Raises:
        UsageError: the URL or a combination of options cannot be used.
        ClusterError: it cannot be reached, refuses, or is no OpenSearch of 2.11 or newer.
    """
    connection = connection_of(url, connection)
    if isinstance(connection, OpenSearch):
        return _client_of(connection)
    address, user, password = parse_url(connection.url)
    user, password = connection.user or user, connection.password or password
    connection = replace(connection, user=user, password=password)
    _refuse_conflicts(connection, address)
    # Without a handler Python prints the library's warnings, tracebacks included, over our own messages.
    logging.getLogger("opensearch").addHandler(logging.NullHandler())
    options: dict[str, Any] = {"scheme": address.scheme}
    if address.scheme == "https":
        context = tls_context(connection.ca, connection.client_cert, connection.client_key)
        options |= {"use_ssl": True, "ssl_context": context}
    if user and password is not None:
        options["headers"] = basic_header(user, password)
    if connection.aws_service:
        options["http_auth"] = aws_signer(connection.aws_region, connection.aws_service)
    opensearch = OpenSearch(
        hosts=[{"host": address.host, "port": address.port, "url_prefix": address.prefix.strip("/")}],
        connection_class=_PlainConnection,
        pool_maxsize=CONNECTIONS,
        max_retries=0,
        **options,
    )
    return Client(opensearch.transport, address, connection)


def _client_of(opensearch: OpenSearch) -> Client:
    """A client over the connections of the caller's own, which stay open when it is closed."""
    host = opensearch.transport.hosts[0] if opensearch.transport.hosts else {}
    scheme = "https" if host.get("use_ssl") or host.get("scheme") == "https" else "http"
    prefix = str(host.get("url_prefix") or "").strip("/")
    address = Address(scheme, host.get("host", "localhost"), int(host.get("port", 9200)), prefix and f"/{prefix}")
    transport = copy.copy(opensearch.transport)
    transport.max_retries = 0
    return Client(transport, address, Connection(), owned=False)


def _refuse_conflicts(connection: Connection, address: Address) -> None:
    """Refuse options of which one would silently have no effect."""
    user, password = connection.user, connection.password
    if user and password is None:
        raise UsageError(f"User {user!r} has no password: give --password or set SPARSE_INGEST_PASSWORD.")
    if user and connection.aws_service:
        raise UsageError(
            f"--aws-service signs requests, so user {user!r} would not be asked for: leave out --user and --password, "
            "or --aws-service (and their variables)."
        )
    if password is not None and not user:
        raise UsageError("--password (or SPARSE_INGEST_PASSWORD) needs --user, whose password it is.")
    if connection.client_key and not connection.client_cert:
        raise UsageError("--client-key needs --client-cert, the certificate that it belongs to.")
    if address.scheme == "http":
        files = {"--ca": connection.ca, "--client-cert": connection.client_cert}
        for name in (name for name, path in files.items() if path):
            raise UsageError(f"{name} is for TLS, but --url begins with http://. Write https://, or leave out {name}.")


def path_of(name: str) -> str:
    """The path of an index or alias."""
    return f"/{quote(name, safe='')}"


def _checked_version(root: Any, address: str) -> tuple[int, int, int]:
    version = root.get("version") if isinstance(root, dict) else None
    if not isinstance(version, dict) or version.get("distribution") != "opensearch":
        found = version.get("number", "?") if isinstance(version, dict) else None
        what = f"no OpenSearch (it says version {found})" if found else "no OpenSearch"
        raise ClusterError(f"{address} is {what}; sparse-ingest needs OpenSearch 2.11 or newer. Check --url.")
    numbers = [int(number) for number in re.findall(r"\d+", str(version.get("number", "")))[:3]]
    major, minor, patch = (*numbers, 0, 0, 0)[:3]
    if (major, minor) < OLDEST_VERSION:
        raise ClusterError(
            f"{address} is OpenSearch {version.get('number')}; sparse-ingest needs 2.11 or newer, "
            "the first with neural_sparse. Upgrade the cluster."
        )
    return major, minor, patch


def _who(connection: Connection) -> str:
    if connection.aws_service:
        return "these AWS credentials"
    if connection.user:
        return f"user {connection.user!r}"
    return "this client certificate" if connection.client_cert else "a client without a user name"


def _refused(status: int, address: str, connection: Connection) -> str | None:
    if status not in (401, 403):
        return None
    who = _who(connection)
    if connection.aws_service:
        return (
            f"{address} refuses {who} ({status}). Check AWS_PROFILE, --aws-region, --aws-service and the access policy."
        )
    if status == 403:
        return f"{address} forbids this to {who} (403): grant the right, or give another --user."
    if connection.user:
        return f"{address} does not accept {who} with this password (401). Check both."
    if connection.client_cert:
        return f"{address} does not know {who} (401): give --user and --password as well."
    return f"{address} asks who you are (401): give --user and --password, or a client certificate."
