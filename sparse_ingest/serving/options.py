"""Options of `serve`: one frozen dataclass for the command line and the Python API."""

from __future__ import annotations

import ipaddress
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sparse_ingest.pipeline import option

TOKEN_VARIABLE = "SPARSE_INGEST_SERVE_TOKEN"


@dataclass(frozen=True)
class ServeOptions:
    """Options of the service. Without `token_file`, the variable SPARSE_INGEST_SERVE_TOKEN may have the token.

    A request that takes longer than `time_limit_s` seconds is answered with 504. While `max_requests` are in progress,
    others are answered with 503.
    """

    host: str = option("127.0.0.1", "Address to listen on; 0.0.0.0 is every address of this machine", metavar="ADDRESS")
    # 0 is named because integers of settings are above zero.
    port: int | Literal[0] = option(8080, "Port to listen on; 0: a free one", range=(0, 65535))
    token_file: Path | str | None = option(
        None, f"File with a bearer token that requests must have; or set {TOKEN_VARIABLE}", metavar="FILE"
    )
    time_limit_s: float = option(
        30.0, "Answer a request that takes longer with 504", range=(0, math.inf), metavar="SECONDS",
        flags="--time-limit",
    )  # fmt: skip
    quoting: Literal["rfc4180", "none"] | None = option(
        None, "Quoting of csv queries and qrels; none: quotes are ordinary characters  [default: rfc4180]"
    )
    max_requests: int = option(128, "Answer further requests with 503 while N are in progress")


def is_loopback(host: str) -> bool:
    """Return whether an address is reached from this machine only."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
