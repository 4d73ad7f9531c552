"""The connection: where OpenSearch is, who asks, and one sentence for everything that can go wrong on the way.

In: a `Connection`. Out: a `Client`, whose `call` sends one request and gives the parsed answer. Nothing is retried
here (sending.py knows what may be sent again), and no proxy of the environment is used: urllib3 pools connect
directly, so a request for loopback stays on the machine. A user name or a password never reaches a message.
Not covered: Amazon OpenSearch Serverless has no index UUID, which a load needs.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import opensearchpy
from opensearchpy import OpenSearch
from opensearchpy.exceptions import SerializationError, SSLError, TransportError

from sparse_ingest.errors import ClusterError, UsageError

OLDEST_VERSION = (2, 11)  # the first with neural_sparse
CONNECTIONS = 8  # kept open at most; a load has a few requests in flight


@dataclass(frozen=True)
class Connection:
    """How to reach a cluster. `url` may hold a user and password; `user` and `password` take precedence."""

    url: str = "http://127.0.0.1:9200"
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    ca: str | None = None
    client_cert: str | None = None
    client_key: str | None = None
    aws_region: str | None = None
    aws_service: str | None = None


class Address(NamedTuple):
    """A URL in parts, without the user and password that stood in it."""

    scheme: str
    host: str
    port: int
    prefix: str

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}{self.prefix}"


class ResponseError(ClusterError):
    """OpenSearch answered with an error: `status`, its `kind` (the exception's type) and `reason`."""

    def __init__(self, message: str, *, status: int, kind: str, reason: str) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.reason = reason


class UnreachableError(ClusterError):
    """No usable answer came: refused, timed out, cut off or not understood."""


class Client:
    """One cluster, asked once for its version. Safe to use from several threads."""

    def __init__(self, opensearch: OpenSearch, address: Address, user: str | None) -> None:
        self._opensearch = opensearch
        self._user = user
        self.address = str(address)
        root = self.call("GET", "/")
        self.version = _checked_version(root, self.address)
        self.cluster_uuid = str(root.get("cluster_uuid", "unknown"))

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
            return self._opensearch.transport.perform_request(
                method, path, params=dict(params or {}), body=body, timeout=timeout_s
            )
        except TransportError as error:
            raise self._translated(error, timeout_s) from error
        except SerializationError as error:
            raise UnreachableError(
                f"{self.address} answered with something that is no JSON. Check that --url names OpenSearch itself."
            ) from error

    def close(self) -> None:
        """Close the open connections."""
        self._opensearch.transport.close()

    def _translated(self, error: TransportError, timeout_s: float) -> ClusterError:
        if not isinstance(error.status_code, int):
            return UnreachableError(_unreachable(error, self.address, timeout_s))
        kind, reason = error_of(error.info if isinstance(error.info, dict) else {}, str(error.error))
        message = _refused(error.status_code, self.address, self._user)
        if message is None:
            message = f"{self.address} answered {error.status_code} {kind}: {reason}"
        else:
            message = f"{message} It said: {reason[:200]}"
        return ResponseError(message, status=error.status_code, kind=kind, reason=reason)


def connect(connection: Connection) -> Client:
    """Connect and check that an OpenSearch of a known version answers.

    Raises:
        UsageError: the URL or a combination of options cannot be used.
        ClusterError: it cannot be reached, refuses, or is no OpenSearch of 2.11 or newer.
    """
    address, user, password = parse_url(connection.url)
    user, password = connection.user or user, connection.password or password
    if user and password is None:
        raise UsageError(f"User {user!r} has no password: give --password or set SPARSE_INGEST_PASSWORD.")
    if connection.client_key and not connection.client_cert:
        raise UsageError("--client-key needs --client-cert, the certificate that it belongs to.")
    # Without a handler Python prints the library's warnings, tracebacks included, over our own messages.
    logging.getLogger("opensearch").addHandler(logging.NullHandler())
    try:
        opensearch = OpenSearch(
            hosts=[{"host": address.host, "port": address.port, "url_prefix": address.prefix.strip("/")}],
            http_auth=_signer(connection, connection.aws_service)
            if connection.aws_service
            else (user, password)
            if user
            else None,
            pool_maxsize=CONNECTIONS,
            max_retries=0,
            **_tls_options(address, connection),
        )
    except (OSError, opensearchpy.ImproperlyConfigured) as error:
        raise ClusterError(f"The certificates for {address} cannot be used: {error}.") from error
    return Client(opensearch, address, user)


def parse_url(url: str) -> tuple[Address, str | None, str | None]:
    """The address, user and password of a URL. The port is 443 for https, else 9200, when left out.

    Raises:
        UsageError: it is no http or https URL; the message does not repeat it, it may hold a password.
    """
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise UsageError("--url is no address such as https://search.example.org:9200 or http://127.0.0.1:9200.")
    default_port = 443 if parts.scheme == "https" else 9200
    address = Address(parts.scheme, parts.hostname, port or default_port, parts.path.rstrip("/"))
    user, password = parts.username, parts.password
    return address, unquote(user) if user else None, unquote(password) if password is not None else None


def error_of(answer: Mapping[str, Any], fallback: str = "no reason given") -> tuple[str, str]:
    """Type and reason of an error that OpenSearch reports, the deepest cause included."""
    error = answer.get("error", answer)
    if not isinstance(error, dict):
        return "error", str(error or fallback)
    kind, reason = str(error.get("type", "error")), str(error.get("reason") or fallback)
    cause = error.get("caused_by")
    while isinstance(cause, dict):
        if cause.get("reason") and str(cause["reason"]) not in reason:
            reason = f"{reason}: {cause['reason']}"
        cause = cause.get("caused_by")
    return kind, reason


def _tls_options(address: Address, connection: Connection) -> dict[str, Any]:
    if address.scheme != "https":
        return {"scheme": "http"}
    # A file of its own for the CA replaces the system's list, as curl's --cacert does.
    given = {
        "ca_certs": connection.ca,
        "client_cert": connection.client_cert,
        "client_key": connection.client_key,
    }
    return {"use_ssl": True, "verify_certs": True, **{name: path for name, path in given.items() if path}}


def _signer(connection: Connection, service: str) -> Any:
    try:
        import boto3  # type: ignore[import-untyped, import-not-found, unused-ignore]
    except ImportError as error:
        raise ClusterError(
            "--aws-service signs requests with boto3, which is not installed: pip install boto3"
        ) from error
    if not connection.aws_region:
        raise UsageError("--aws-service needs --aws-region, or the variable AWS_REGION.")
    credentials = boto3.Session().get_credentials()
    if credentials is None:
        raise ClusterError("boto3 finds no AWS credentials; set AWS_PROFILE or the AWS_ACCESS_KEY_ID variables.")
    return opensearchpy.Urllib3AWSV4SignerAuth(credentials, connection.aws_region, service)


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


def _unreachable(error: TransportError, address: str, timeout_s: float) -> str:
    cause = str(error.info)
    if isinstance(error, SSLError) or "SSL" in cause:
        if "WRONG_VERSION_NUMBER" in cause or "record layer" in cause:
            return f"{address} does not speak TLS. If it is meant so, write http:// in --url."
        short = re.sub(r"^.*?\]\s*|\s*\(_ssl\.c.*$", "", cause)
        if "certificate is not valid for" in cause:
            return f"{address}: {short} Write the name that its certificate is for in --url."
        if "verify failed" in cause:
            return f"{address}: {short}. Give the file of the CA that signed its certificate with --ca."
        return f"{address}: the TLS connection failed ({short}). Check --ca, --client-cert and --client-key."
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


def _refused(status: int, address: str, user: str | None) -> str | None:
    if status == 401:
        if user:
            return f"{address} does not accept user {user!r} with this password (401). Check both."
        return f"{address} asks who you are (401): give --user and --password, or a client certificate."
    if status == 403:
        who = f"user {user!r}" if user else "a client without a user name"
        return f"{address} forbids this to {who} (403): grant the right, or give another --user."
    return None
