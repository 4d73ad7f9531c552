"""The options of a connection to a cluster, and a URL in parts.

The command line declares its options from `Connection`, so nothing heavy is imported here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from sparse_ingest.errors import UsageError
from sparse_ingest.pipeline import option
from sparse_ingest.storage.addresses import ADDRESS, HOST_AND_PATH, split_address


@dataclass(frozen=True)
class Connection:
    """How to reach a cluster. `url` may contain a user and password; `user` and `password` take precedence."""

    url: str = option("http://127.0.0.1:9200", "URL of OpenSearch or Elasticsearch", env="SPARSE_INGEST_URL")
    user: str | None = option(None, "User name; may be in --url", env="SPARSE_INGEST_USER")
    password: str | None = option(None, "Password; safer in its environment variable", env="SPARSE_INGEST_PASSWORD")
    api_key: str | None = option(
        None, "API key of Elasticsearch, encoded; safer in its environment variable", env="SPARSE_INGEST_API_KEY"
    )
    ca: str | None = option(None, "CA certificates to trust instead of the system's", env="SPARSE_INGEST_CA")
    client_cert: str | None = option(None, "Client certificate", env="SPARSE_INGEST_CLIENT_CERT")
    client_key: str | None = option(
        None, "Key of the client certificate, unless that file has both", env="SPARSE_INGEST_CLIENT_KEY"
    )
    aws_region: str | None = option(None, "AWS region  [default: that of the AWS profile]", env="AWS_REGION")
    aws_service: Literal["es", "aoss"] | None = option(
        None, "Sign requests with AWS SigV4 and boto3's credentials; aoss: Serverless", env="SPARSE_INGEST_AWS_SERVICE"
    )

    timeout_s: float = option(
        600.0,
        "Give up on a request after this long without success, retries included",
        range=(0, math.inf),
        metavar="SECONDS",
        flags="--timeout",
        env="SPARSE_INGEST_TIMEOUT",
    )

    def __repr__(self) -> str:
        try:
            address, user, _ = parse_url(self.url)
        except UsageError:
            return "Connection(url=unreadable)"
        return f"Connection(url={str(address)!r}, user={self.user or user!r})"


class Address(NamedTuple):
    """A URL in parts, without user and password."""

    scheme: str
    host: str
    port: int
    prefix: str

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}{self.prefix}"


def parse_url(url: str) -> tuple[Address, str | None, str | None]:
    """Return the address, user and password of a URL. The default port is 443 for https, otherwise 9200.

    The `UsageError` for another URL omits it, because it may contain a password.
    """
    if not isinstance(url, str):
        raise UsageError(f"url is {type(url).__name__}; expected a string such as https://search.example.org:9200.")
    url = url.strip()
    parts = split_address(url if ADDRESS.match(url) else f"http://{url}")
    scheme, found = parts.scheme.lower(), HOST_AND_PATH.fullmatch(parts.rest)
    if scheme not in ("http", "https") or found is None or int(found[2] or 0) > 65535:
        raise UsageError("--url is invalid: expected a URL such as https://search.example.org:9200.")
    port = int(found[2] or 0) or (443 if scheme == "https" else 9200)
    address = Address(scheme, found[1].strip("[]").lower(), port, found[3].rstrip("/"))
    return address, parts.user or None, parts.password
