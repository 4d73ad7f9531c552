"""The HTTP session that fsspec uses: limits on redirects and on the size of answers.

An address of the user, and redirects from it, may be private. Redirects from a public address to another kind, to a
link-local one (where clouds serve credentials), and from https to http are refused. The address of the open connection
is checked before anything is sent, because a name may resolve to another address each time.
"""

from __future__ import annotations

import re
from contextvars import ContextVar
from ipaddress import IPv4Address, IPv6Network, ip_address
from typing import Any
from urllib.parse import urlsplit

from sparse_ingest.errors import StorageError

_CONNECT_S, _SILENCE_S = 15, 30  # for one attempt; waiting.py has the deadline of all
_LARGEST = 64 << 20  # bytes of an answer without a range
_NAT64 = IPv6Network("64:ff9b::/96")
_met: ContextVar[set[str]] = ContextVar("_met")  # the kinds of addresses that the request of this task connected to


def network_of(address: str) -> str:
    """Return "public", "link-local" or, for all other IP addresses, "private"."""
    found = ip_address(address.partition("%")[0])
    if found.version == 6:
        last = IPv4Address(int(found) & 0xFFFFFFFF) if found in _NAT64 else None
        found = found.ipv4_mapped or found.sixtofour or last or found
    if found.is_link_local:
        return "link-local"
    # `is_reserved` covers old IPv6 forms of IPv4 addresses; `is_global` is true for site-local addresses.
    is_old = found.version == 6 and (found.is_reserved or found.is_site_local)
    return "public" if found.is_global and not found.is_multicast and not is_old else "private"


async def guarded_session(**options: Any) -> Any:
    """Return a session, for fsspec's `get_client`."""
    import aiohttp

    class Connector(aiohttp.TCPConnector):
        async def connect(self, req: Any, traces: Any, timeout: Any) -> Any:
            met = _met.get()
            connection = await super().connect(req, traces, timeout)
            peer = connection.transport and connection.transport.get_extra_info("peername")
            if not peer:
                raise aiohttp.ServerDisconnectedError
            kind = network_of(peer[0])
            if (kind == "link-local" and met - {kind}) or (kind != "public" and "public" in met):
                connection.close()
                raise _refused(req.url, f"to a {kind} address")
            met.add(kind)
            return connection

    class Answer(aiohttp.ClientResponse):
        async def read(self) -> bytes:
            range_of = re.fullmatch(r"bytes=(\d+)-(\d+)", self.request_info.headers.get("Range", ""))
            most = int(range_of[2]) - int(range_of[1]) + 1 if range_of else _LARGEST
            content = bytearray()
            async for block in self.content.iter_any():
                content += block
                if len(content) > most:
                    self.close()
                    raise StorageError(
                        f"{self.url.origin()}{self.url.path} sent more than the expected {most:,} bytes. Check the "
                        "server, or download the file."
                    )
            return bytes(content)

    async def begin(*_: Any) -> None:
        _met.set(set())

    async def check_scheme(_session: Any, _context: Any, redirect: Any) -> None:
        answer = redirect.response
        to = answer.headers.get("Location") or answer.headers.get("URI", "")
        scheme = urlsplit(to).scheme.lower() or answer.url.scheme
        if scheme not in ("http", "https") or (answer.url.scheme, scheme) == ("https", "http"):
            answer.close()
            raise _refused(to, f"from {answer.url.scheme} to {scheme}")

    trace = aiohttp.TraceConfig()
    trace.on_request_start.append(begin)
    trace.on_request_redirect.append(check_scheme)
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S, sock_read=_SILENCE_S)
    return aiohttp.ClientSession(
        connector=Connector(), response_class=Answer, trace_configs=[trace], timeout=timeout, **options
    )


def _refused(address: Any, how: str) -> StorageError:
    parts = urlsplit(str(address))
    where = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
    return StorageError(f"A redirect to {where} is refused: it leads {how}. If you trust it, pass that address.")
