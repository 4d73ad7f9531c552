"""The client of a cluster: one request, its parsed answer, and one message for each failure.

In: a `Connection`. Out: a `Client`. Nothing is retried here (see sending.py), and proxies of the environment are not
used. A password never reaches a message, a log or a `repr`. Amazon OpenSearch Serverless, which has no version, and
clusters that do not report theirs are treated as the newest tried release. Tests only simulate Serverless.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
from collections.abc import Collection, Mapping
from dataclasses import fields, replace
from functools import partial
from typing import Any, Self, TypeAlias
from urllib.parse import quote

import opensearchpy
from opensearchpy import OpenSearch
from opensearchpy.exceptions import SerializationError, TransportError
from urllib3.exceptions import InvalidHeader
from urllib3.util import Retry

from sparse_ingest.cluster.access import aws_signer, basic_header, tls_context
from sparse_ingest.cluster.answers import REDIRECTS, PlainConnection, Uuid, malformed
from sparse_ingest.cluster.connection import Address, parse_url
from sparse_ingest.cluster.connection import Connection as Connection
from sparse_ingest.cluster.dialects import Dialect, OpenSearchDialect, Version
from sparse_ingest.cluster.failures import (
    BUSY,
    GARBAGE,
    NO_JSON,
    PAGE,
    blocked_message,
    error_of,
    is_block,
    missing_part,
    redirect_message,
    refused_message,
    unreachable_message,
    who_asks,
)
from sparse_ingest.cluster.failures import UnreachableError as UnreachableError
from sparse_ingest.cluster.versions import dialect_of
from sparse_ingest.cluster.waiting import Waiting
from sparse_ingest.errors import ClusterError, SparseIngestError, UsageError, first_line
from sparse_ingest.reporting import Reporter
from sparse_ingest.storage.addresses import without_headers
from sparse_ingest.storage.foreign_json import checked

logger = logging.getLogger(__name__)

_CONNECT_S = 30.0
_NO_SOURCE = "_source is disabled"  # in the reason of a search for `_source` of an index that stores none
_CONNECTIONS = 32  # kept open at most: the maximum of --concurrency
ConnectionLike: TypeAlias = Connection | OpenSearch


class ResponseError(ClusterError):
    """An error of a cluster: `status`, `kind` (the exception's type), `reason`, and Retry-After in seconds."""

    def __init__(
        self, message: str, *, status: int, kind: str, reason: str, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.reason, self.retry_after_s = status, kind, reason, retry_after_s

    @property
    def may_pass(self) -> bool:
        """True if the same request may succeed later."""
        return self.status in BUSY and not is_block(self.status, self.kind)


class PartialAnswerError(ClusterError):
    """The answer lacks the documents of some shards, or those after a timeout."""


class TimedOutError(UnreachableError):
    """No answer came in time; the cluster may still carry out the request."""


def _retry_after_s(header: str | None) -> float | None:
    """Return the seconds of a Retry-After header, which may contain a date; None if it is invalid."""
    try:
        return Retry().parse_retry_after(header or "")
    except (InvalidHeader, ValueError):
        return None


class Client:
    """A cluster. Safe to use from several threads.

    The context manager closes it, and raises an `UnreachableError` for an exception that a malformed answer caused.
    """

    def __init__(
        self,
        transport: opensearchpy.Transport,
        address: Address,
        connection: Connection,
        *,
        owned: bool = True,
        reporter: Reporter | None = None,
    ) -> None:
        self._transport, self._connection, self._owned = transport, connection, owned
        self.address = str(address)
        self.waiting = Waiting(self.address, reporter, connection.timeout_s)
        self.allow_partial: bool | None = None  # None: the command has no such option
        self._partial: dict[str, object] = {}  # warnings given; clients of `allowing` share it
        self.dialect, self.cluster_uuid = self._asked_product()

    def call(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | bytes | None = None,
        *,
        params: Mapping[str, str] | None = None,
        timeout_s: float = 60,
        expected: Any = None,
    ) -> Any:
        """Send one request, once, and return the parsed JSON of the answer, an object (an array from `/_cat`).

        Args:
            timeout_s: for the complete answer, at most that of the connection.
            expected: the type of the answer, see foreign_json.

        Raises:
            ResponseError: the cluster answered with an error.
            PartialAnswerError: shards failed or time ran out, unless partial answers are allowed.
            UnreachableError: no usable answer arrived.
        """
        timeout_s = min(timeout_s, self.waiting.patience_s)
        # A copy of params: opensearch-py takes keys out of the one it is given.
        given: dict[str, Any] = {"params": dict(params or {}), "body": body, "timeout": timeout_s}
        if self.allow_partial and path.endswith("/_search"):
            given["params"]["allow_partial_search_results"] = "true"  # a cluster may refuse them by default
        ask = partial(self._transport.perform_request, method, path, **given)
        try:
            answer = self.waiting.answer(f"{method} {path}", ask, timeout_s)
        except TimeoutError:
            why = f"{self.address} did not answer {method} {path} completely within {timeout_s:g} s."
            raise TimedOutError(f"{why} Check that it is up and not overloaded, or raise --timeout.") from None
        except TransportError as error:
            # AWS sends back the refused request, with its session token, which must not reach a traceback.
            raise self._translated(error, path, timeout_s) from (None if self._connection.aws_service else error)
        except (SerializationError, AttributeError, RecursionError) as error:  # AttributeError: no JSON object
            if isinstance(error, SerializationError) and error.args[0] is body:
                raise UsageError(NO_JSON.format(first_line(error.args[1]))) from None
            raise UnreachableError(GARBAGE.format(self.address)) from error
        try:
            checked(answer, list if path.startswith("/_cat/") else expected or dict)
        except ValueError as error:
            raise UnreachableError(f"{GARBAGE.format(self.address)} ({method} {path}: {error})") from error
        if isinstance(answer, dict) and (missing := missing_part(path, answer)):
            # Only shards with hits fail without `_source`; `search` asks again.
            again = _NO_SOURCE in missing and isinstance(body, Mapping) and body.get("_source")
            self._refuse_partial(missing, allowed=self.allow_partial and not again)
        return answer

    @property
    def version(self) -> Version:
        """The version of the cluster, the lowest of its nodes during an upgrade."""
        return self.dialect.version

    def search(self, path: str, body: Mapping[str, Any], *, expected: Any = None, **params: str) -> Any:
        """Send a `_search` of an index or alias without its default search pipeline, unless the body names one."""
        params |= {} if "search_pipeline" in body else self.dialect.no_pipeline
        try:
            return self.call("POST", f"{path}/_search", body, params=params, expected=expected)
        except (ResponseError, PartialAnswerError) as error:
            if _NO_SOURCE not in str(error) or not body.get("_source"):
                raise
            return self.call("POST", f"{path}/_search", {**body, "_source": False}, params=params, expected=expected)

    def allowing(self, partial: bool) -> Client:
        """Return a client for a command with --allow-partial: if `partial`, partial answers cause one warning."""
        client = copy.copy(self)
        client.allow_partial = partial
        return client

    def within(self, timeout_s: float) -> Client:
        """Return a client whose requests end after `timeout_s`; its waits end without those of this one."""
        client = copy.copy(self)
        client.waiting = Waiting(self.address, self.waiting.reporter, min(timeout_s, self.waiting.patience_s))
        return client

    def _refuse_partial(self, missing: str, allowed: bool | None) -> None:
        if not allowed:
            option = "" if self.allow_partial is None else ", or pass --allow-partial (allow_partial=True)"
            raise PartialAnswerError(
                f"{self.address} gave a partial answer: {missing}. Wait until the index is green or yellow and not "
                f"overloaded (GET /_cluster/allocation/explain explains a missing shard){option}."
            )
        mine = object()
        if self._partial.setdefault(missing.partition(" (")[0], mine) is mine:  # also among threads
            logger.warning("The results are incomplete: %s.", missing)

    def find(self, path: str, *, absent: Collection[int] = (404,), **how: Any) -> Any:
        """Return the answer to a GET, or None if its status is one of `absent`."""
        try:
            return self.call("GET", path, **how)
        except ResponseError as error:
            if error.status in absent:
                return None
            raise

    def close(self) -> None:
        """End all waits, and close the connections unless they belong to the caller's `OpenSearch`."""
        self.waiting.end()
        if self._owned:
            self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.close()
        if found := malformed(error, self.address):
            raise found from error

    def _asked_product(self) -> tuple[Dialect, str]:
        """Return the dialect and the UUID of the cluster, or defaults where it does not report them."""
        # A busy cluster (429) is no cluster without an answer: its journals would be those of another UUID.
        allowed, root = partial(self.find, absent=set(range(400, 500)) - BUSY), None
        try:
            root = self.call("GET", "/", timeout_s=_CONNECT_S)
        except ResponseError as error:
            if error.status == 404 and self._connection.aws_service == "aoss":
                why = "Amazon OpenSearch Serverless has no version"
            elif error.status == 403 and "cluster:monitor/main" in error.reason:
                why = (
                    f"{self.address} does not report its version to {who_asks(self._connection)} (cluster:monitor/main)"
                )
            elif error.status == 405:  # a distribution of Elasticsearch without the module for `GET /`
                why = ""
            else:
                raise
            if why and not self._product_header():
                newest = OpenSearchDialect.newest_tried
                logger.warning("%s; OpenSearch %d.%d.%d is assumed.", why, *newest)
                return OpenSearchDialect(newest), "unknown"  # journals differ by the UUIDs of their indexes
        try:
            # Without `GET /`, the state of the cluster has its UUID.
            state = root or allowed("/_cluster/state/version?filter_path=cluster_uuid") or {}
            cluster_uuid = checked(state.get("cluster_uuid", "unknown"), Uuid)
            who = who_asks(self._connection)
            return dialect_of(root, self._product_header(), self.address, who, allowed), cluster_uuid
        except Exception as error:
            if found := malformed(error, self.address):
                raise found from error
            raise

    def _product_header(self) -> str:
        """Return the X-elastic-product header of an answer; "" without it, or for the caller's own transport."""
        pool = getattr(self._transport.get_connection(), "pool", None)
        return str(getattr(pool, "product", ""))

    def _translated(self, error: TransportError, path: str, timeout_s: float) -> SparseIngestError:
        if isinstance(error.info, SparseIngestError):
            return error.info  # of the signer; opensearch-py wraps it as if the connection had failed
        if not isinstance(error.status_code, int):
            ca = self._connection.ca
            message = unreachable_message(error, self.address, timeout_s, ca=ca, first=path == "/")
            timed_out = isinstance(error, opensearchpy.exceptions.ConnectionTimeout)
            return TimedOutError(message) if timed_out else UnreachableError(message)
        kind, reason = error_of(error.info if isinstance(error.info, dict) else {}, str(error.error))
        message = f"{self.address} answered {error.status_code} {kind}: {reason}"
        if kind == PAGE:
            title = f" ({reason})" if reason else ""
            message = (
                f"{self.address} answered {error.status_code} with a web page{title}, not with JSON. A proxy may "
                "have sent it: check --url, and that the cluster behind the proxy is up."
            )
        if error.status_code in REDIRECTS:
            message = redirect_message(error.status_code, self.address, path, getattr(error, "location", None))
        elif is_block(error.status_code, kind):
            message = blocked_message(self.address, path, reason)
        elif refused := refused_message(error.status_code, self.address, self._connection):
            message = f"{refused} Its reason: {without_headers(reason)[:200]}" if reason else refused
        after_s = _retry_after_s(getattr(error, "retry_after", None))
        return ResponseError(message, status=error.status_code, kind=kind, reason=reason, retry_after_s=after_s)


def connection_of(url: str | None, connection: ConnectionLike | None) -> ConnectionLike:
    """Return the connection of `url=` or `connection=`, or of the SPARSE_INGEST_* variables. Not both arguments."""
    if url is not None and connection is not None:
        raise UsageError("Give url= or connection=, not both.")
    if isinstance(connection, Connection | OpenSearch):
        return connection
    if connection is not None:
        raise UsageError(
            f"connection= is {type(connection).__name__}; expected a Connection or an opensearchpy.OpenSearch."
        )
    variables = {entry.name: os.environ.get(entry.metadata["env"]) for entry in fields(Connection)}
    given: dict[str, Any] = {name: value for name, value in variables.items() if value}
    with contextlib.suppress(ValueError, KeyError):  # `connect` refuses what is not a number
        given["timeout_s"] = float(given["timeout_s"])
    return Connection(**given | ({"url": url} if url is not None else {}))


def for_other_processes(connection: ConnectionLike) -> Connection:
    """Return a connection that can be pickled. Raise `UsageError` for a client."""
    if not isinstance(connection, Connection):
        raise UsageError("Other processes cannot use a client. Pass url= or connection=Connection(...).")
    return connection


def connect(
    connection: ConnectionLike | None = None, *, url: str | None = None, reporter: Reporter | None = None
) -> Client:
    """Connect and check that an OpenSearch or Elasticsearch of a known version answers.

    Args:
        connection: How to reach the cluster. The transport of an `opensearchpy.OpenSearch` is used without its
            retries.
        url: Its address, instead of `connection`. Without either, the SPARSE_INGEST_* variables.
        reporter: Gets notes on what the client waits for; its stop requests end the wait.

    Raises:
        UsageError: the URL or a combination of options is invalid.
        ClusterError: the cluster cannot be reached, refuses, or is neither OpenSearch 2.11 or newer nor Elasticsearch
            8.16 or newer.
    """
    connection = connection_of(url, connection)
    if isinstance(connection, OpenSearch):
        return _client_of(connection, reporter)
    address, user, password = parse_url(connection.url)
    user, password = connection.user or user, connection.password or password
    connection = replace(connection, user=user, password=password)
    _check_options(connection, address)
    # Without a handler Python prints the library's warnings, with tracebacks.
    logging.getLogger("opensearch").addHandler(logging.NullHandler())
    options: dict[str, Any] = {"scheme": address.scheme}
    if address.scheme == "https":
        context = tls_context(connection.ca, connection.client_cert, connection.client_key)
        options |= {"use_ssl": True, "ssl_context": context}
    if user and password is not None:
        options["headers"] = basic_header(user, password)
    if connection.api_key:
        options["headers"] = {"authorization": f"ApiKey {connection.api_key}"}
    if connection.aws_service:
        options["http_auth"] = aws_signer(connection.aws_region, connection.aws_service)
    opensearch = OpenSearch(
        hosts=[{"host": address.host, "port": address.port, "url_prefix": address.prefix.strip("/")}],
        connection_class=PlainConnection,
        pool_maxsize=_CONNECTIONS,
        max_retries=0,
        **options,
    )
    return Client(opensearch.transport, address, connection, reporter=reporter)


def _client_of(opensearch: OpenSearch, reporter: Reporter | None) -> Client:
    """Return a client with the connections of the caller, which stay open when it is closed."""
    host = opensearch.transport.hosts[0] if opensearch.transport.hosts else {}
    scheme = "https" if host.get("use_ssl") or host.get("scheme") == "https" else "http"
    prefix = str(host.get("url_prefix") or "").strip("/")
    address = Address(scheme, host.get("host", "localhost"), int(host.get("port", 9200)), prefix and f"/{prefix}")
    transport = copy.copy(opensearch.transport)
    transport.max_retries = 0
    return Client(transport, address, Connection(), owned=False, reporter=reporter)


def _check_options(connection: Connection, address: Address) -> None:
    """Raise `UsageError` if an option is invalid or has no effect."""
    user, password = connection.user, connection.password
    if not isinstance(connection.timeout_s, int | float) or not connection.timeout_s > 0:
        raise UsageError("--timeout (or SPARSE_INGEST_TIMEOUT): expected seconds above zero, such as 600.")
    if user and password is None:
        raise UsageError(f"User {user!r} has no password: pass --password or set SPARSE_INGEST_PASSWORD.")
    if user and connection.aws_service:
        raise UsageError(
            f"--aws-service signs requests, so user {user!r} has no effect. Omit --user and --password, or "
            "--aws-service (and their variables)."
        )
    if connection.api_key and (user or connection.aws_service):
        other = f"user {user!r}" if user else "--aws-service"
        raise UsageError(f"--api-key and {other} cannot be combined. Omit one (and its variables).")
    if password is not None and not user:
        raise UsageError("A password needs a user: pass --user, or omit --password (or SPARSE_INGEST_PASSWORD).")
    if connection.client_key and not connection.client_cert:
        raise UsageError("--client-key needs --client-cert. Pass both, or omit --client-key.")
    if address.scheme == "http":
        files = {"--ca": connection.ca, "--client-cert": connection.client_cert}
        for name in (name for name, path in files.items() if path):
            raise UsageError(f"{name} is for TLS, but --url begins with http://. Write https://, or omit {name}.")


def path_of(name: str) -> str:
    """Return the path of an index or alias."""
    return f"/{quote(name, safe='')}"
