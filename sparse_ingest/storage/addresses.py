"""Addresses of clusters, stores and web servers in parts, and texts without the secrets of the addresses in them.

In: an address as a user gave it. Out: scheme, user, password and the rest. A password ends at the last @ of the address
and may hold characters that should be encoded (/ ? # @ : %). An @ behind a path with no colon before the path, as in
http://host/path@x, belongs to the path.
"""

from __future__ import annotations

import re
from typing import NamedTuple
from urllib.parse import quote, unquote

from sparse_ingest.errors import UsageError

_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://(.*)", re.DOTALL)
_HOST = r"(\[[0-9A-Fa-f:.]+(?:%\w+)?\]|[\w.-]+)(?::(\d+))?"
_PLACE = re.compile(rf"{_HOST}((?:/[^?#@\s\x00-\x20]*)?)")
_PATH_OF_IPV6 = re.compile(r"\[[0-9A-Fa-f:.]+\](:\d+)?[/?#]")
# In a text, whose addresses end at a space. A colon and digits before a path are a port.
_CREDENTIALS = re.compile(r"(?<=://)(?:[^/:\s]+:(?!\d+(?:[/?#]|$))\S*|[^/\s'\"]*)@")
_QUERY = re.compile(r"(https?://[^\s?'\"]*)\?[^\s'\"]*", re.IGNORECASE)


class Parts(NamedTuple):
    """An address in parts; `rest` begins with the host. `is_clear`: no @ stands behind what may be host and path."""

    scheme: str
    user: str | None
    password: str | None
    rest: str
    is_clear: bool

    @property
    def encoded(self) -> str:
        """The address with encoded user and password, as libraries take it."""
        if self.user is None:
            return f"{self.scheme}://{self.rest}"
        login = [
            quote(part, safe="", errors="surrogateescape") for part in (self.user, self.password) if part is not None
        ]
        return f"{self.scheme}://{':'.join(login)}@{self.rest}"


def is_address(text: str) -> bool:
    """Return whether a text begins with a scheme, such as s3://."""
    return _ADDRESS.match(text) is not None


def split_address(address: str) -> Parts:
    """Return an address in parts.

    Raises:
        UsageError: it has no scheme, or its password cannot be sent; the message does not repeat it.
    """
    if (found := _ADDRESS.match(address)) is None:
        raise UsageError("An address without a scheme was given; expected one such as https://example.org/file.")
    scheme, rest = found[1], found[2]
    login, at, host = rest.rpartition("@")
    user, colon, password = login.partition(":")
    if not at or re.search("[/?#]", user) or _PATH_OF_IPV6.match(login):
        return Parts(scheme, None, None, rest, True)
    try:
        login.encode(errors="surrogateescape")
    except UnicodeEncodeError:
        raise UsageError("The user or password in an address holds characters that are not Unicode.") from None
    before_path, path = (re.split("(?=[/?#])", login, maxsplit=1) + [""])[:2]
    is_clear = not path or re.fullmatch(_HOST, before_path.rpartition("@")[2]) is None
    return Parts(scheme, _decoded(user), _decoded(password) if colon else None, host, is_clear)


def host_and_path(rest: str) -> tuple[str, int | None, str] | None:
    """Return host (lower case, IPv6 without brackets), port and path of a rest; None if it cannot be these."""
    found = _PLACE.fullmatch(rest)
    if found is None or int(found[2] or 0) > 65535:
        return None
    return found[1].strip("[]").lower(), int(found[2] or 0) or None, found[3]


def without_credentials(address: str) -> str:
    """Return one address, such as a user gave, without user, password and, on the web, query."""
    parts = split_address(address)
    return _QUERY.sub(r"\1", f"{parts.scheme}://{parts.rest}")


def without_secrets(text: str) -> str:
    """Return a text without the users, passwords and queries of the addresses in it."""
    return _QUERY.sub(r"\1", _CREDENTIALS.sub("", text))


def _decoded(text: str) -> str:
    """Decode percent escapes, unless a character shows that nothing in the text is encoded."""
    if re.search(r"[/?#@\s]|%(?![0-9A-Fa-f]{2})", text):
        return text
    try:
        return unquote(text, errors="strict")
    except UnicodeDecodeError:
        return text
