"""Split addresses of clusters, stores and web servers, and remove the secrets of addresses from texts.

A password ends at the last @ of the address and may contain characters that should be encoded (/ ? # @ : %). An @ after
a path, without a colon before the path, as in http://host/path@x, is part of the path.
"""

from __future__ import annotations

import re
from typing import NamedTuple
from urllib.parse import quote, unquote

from sparse_ingest.errors import UsageError

ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://(.*)", re.DOTALL)
_HOST = r"(\[[0-9A-Fa-f:.]+(?:%\w+)?\]|[\w.-]+)(?::(\d+))?"
HOST_AND_PATH = re.compile(rf"{_HOST}((?:/[^?#@\s\x00-\x20]*)?)")
# In a text, addresses end at a space. A colon and digits before a path are a port.
_CREDENTIALS = re.compile(r"(?<=://)(?:[^/:\s]+:(?!\d+(?:[/?#]|$))\S*|[^/\s'\"]*)@")
_QUERY = re.compile(r"(https?://[^\s?'\"]*)\?[^\s'\"]*", re.IGNORECASE)

# A header or parameter with its value, as in a repr, in JSON, in an address or as sent.
_SECRET = re.compile(
    r"""((?:authorization|[\w-]*(?:password|passwd|secret|token(?!s)|signature|api[_-]?key|credential)[\w-]*)\\?["']?\s*[:=]\s*)"""
    r"""(?:\\?["'][^"'\\]*(?:\\?["'])?|(?:(?:basic|bearer|aws4-hmac-sha256)\s+)?[^\s"',;&}]+)""",
    re.IGNORECASE,
)
_SCHEME = re.compile(r"\b(basic|bearer)\s+[A-Za-z0-9+/=._~-]{8,}|\bAWS4-HMAC-SHA256\s+Credential=.*", re.IGNORECASE)


class Parts(NamedTuple):
    """An address in parts; `rest` begins with the host. `is_clear` is false if an @ may be part of the path."""

    scheme: str
    user: str | None
    password: str | None
    rest: str
    is_clear: bool

    def __str__(self) -> str:
        return _QUERY.sub(r"\1", f"{self.scheme}://{self.rest}")

    @property
    def encoded(self) -> str:
        """The address with encoded user and password, as libraries expect it."""
        login = [quote(part, safe="", errors="surrogateescape") for part in self[1:3] if part is not None]
        return f"{self.scheme}://{':'.join(login)}{'@' if login else ''}{self.rest}"


def split_address(address: str) -> Parts:
    """Split an address with a scheme. Raise `UsageError` if its password cannot be encoded; the message omits it."""
    scheme, _, rest = address.partition("://")
    login, at, host = rest.rpartition("@")
    user, colon, password = login.partition(":")
    if not at or re.search("[/?#]", user):
        return Parts(scheme, None, None, rest, True)
    try:
        login.encode(errors="surrogateescape")
    except UnicodeEncodeError:
        raise UsageError("The user or password in an address contains characters that are not Unicode.") from None

    before_path = re.split("[/?#]", login, maxsplit=1)[0]
    is_clear = before_path == login or re.fullmatch(_HOST, before_path.rpartition("@")[2]) is None
    return Parts(scheme, _decoded(user), _decoded(password) if colon else None, host, is_clear)


def without_secrets(text: str) -> str:
    """Return a text without the users, passwords and queries of the addresses in it."""
    return _QUERY.sub(r"\1", _CREDENTIALS.sub("", text))


def without_headers(text: str) -> str:
    """Return a text without the values of headers, parameters and keys that are secret, as servers repeat them."""
    return _SCHEME.sub("***", _SECRET.sub(r"\1***", text))


def _decoded(text: str) -> str:
    """Decode percent escapes, unless a character shows that nothing in the text is encoded."""
    if re.search(r"[/?#@\s]|%(?![0-9A-Fa-f]{2})", text):
        return text
    try:
        return unquote(text, errors="strict")
    except UnicodeDecodeError:
        return text
