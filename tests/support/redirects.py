"""A program for its own network namespace that simulates hosts of the internet and of private networks.

Run it in `unshare --net`. Every address listens on port 8080; `/to/URL` redirects. It reads addresses from its
arguments, and prints for each, as JSON, the content or error and the addresses that got requests.
"""

from __future__ import annotations

import fcntl
import json
import socket
import struct
import sys
from contextlib import ExitStack
from http.server import ThreadingHTTPServer
from urllib.parse import unquote

from sparse_ingest.errors import StorageError
from sparse_ingest.storage.places import place_of
from support.serving import AnsweringHandler, serving

PUBLIC, OTHER_PUBLIC, PRIVATE, METADATA = "93.184.216.34", "8.8.8.8", "10.1.2.3", "169.254.169.254"
_SET_FLAGS, _SET_ADDRESS = 0x8914, 0x8916  # Linux ioctls
asked: list[str] = []


class Handler(AnsweringHandler):
    def do_GET(self) -> None:
        asked.append(self.connection.getsockname()[0])
        if self.path.startswith("/to/"):
            self.answer(302, b"", Location=unquote(self.path.removeprefix("/to/")))
        else:
            self.answer(200, b"content")


class OverIPv6(ThreadingHTTPServer):
    address_family = socket.AF_INET6


def main() -> None:
    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, _SET_FLAGS, struct.pack("16sH", b"lo", 0x49))  # up, loopback, running
        for number, address in enumerate((PUBLIC, OTHER_PUBLIC, PRIVATE, METADATA)):
            name = f"lo:{number}".encode()
            request = struct.pack("16sH2s4s8x", name, socket.AF_INET, b"\0\0", socket.inet_aton(address))
            fcntl.ioctl(any_socket, _SET_ADDRESS, request)
    with ExitStack() as servers:
        servers.enter_context(serving(ThreadingHTTPServer(("0.0.0.0", 8080), Handler)))
        servers.enter_context(serving(OverIPv6(("::1", 8080), Handler)))
        for address in sys.argv[1:]:
            asked.clear()
            try:
                found = place_of(address).read_bytes().decode()
            except StorageError as error:
                found = str(error)
            print(json.dumps([found, asked]), flush=True)


if __name__ == "__main__":
    main()
