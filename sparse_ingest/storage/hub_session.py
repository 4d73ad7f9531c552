"""Keep huggingface_hub from writing outside its cache and from logging secrets.

The library checks names of files, but not the commits and ETags that it puts into paths (2.4.0): with an ETag such as
`../../../.profile`, a hub could write there.
"""

from __future__ import annotations

import json
import logging
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from sparse_ingest.errors import StorageError
from sparse_ingest.storage.places import without_secrets


def guard_hub() -> None:
    """Check every answer that huggingface_hub gets in this process, and clean what it logs."""
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import _http

    for handler in logging.getLogger("huggingface_hub").handlers:
        handler.filters = [_without_secrets]
    factory = _http._GLOBAL_CLIENT_FACTORY  # of the library, or set by the user

    def guarded() -> Any:
        client = factory()
        hooks = client.event_hooks
        client.event_hooks = {**hooks, "response": [*hooks.get("response", ()), _check_names]}
        return client

    if factory.__name__ != guarded.__name__:
        set_client_factory(guarded)


def hub_address() -> str:
    """Return the address of the hub, for messages."""
    from huggingface_hub import constants

    return without_secrets(constants.ENDPOINT)


def hub_token() -> str | None:
    """Return the token that the library sends: HF_TOKEN, or the token of an earlier login."""
    from huggingface_hub import get_token

    with suppress(Exception):  # a failed exchange of tokens, after which the library's own request fails
        return get_token()
    return None


def token_state() -> str:
    """Return whether a token was sent, for the message of a refused request."""
    return "the token that was sent gives no access" if hub_token() else "no token was sent"


def refused_token(error: Exception) -> str | None:
    """Return the message for a token that the hub refuses (status 401), otherwise None."""
    if getattr(getattr(error, "response", None), "status_code", None) != 401:
        return None
    return f"The hub {hub_address()} refuses the token that was sent. Set HF_TOKEN to a valid token, or unset it."


def without_token(message: str) -> str:
    """Remove tokens and secrets from a message: the HTTP library quotes tokens that no header allows."""
    for token in {hub_token(), os.environ.get("HF_TOKEN"), os.environ.get("HUGGING_FACE_HUB_TOKEN")} - {None, ""}:
        message = message.replace(str(token), "(token)").replace(repr(token)[1:-1], "(token)")
    return without_secrets(message)


def hub_status(timeout_s: float) -> int | None:
    """Send the hub one request without a token. Return the HTTP status of its answer; None if HF_HUB_OFFLINE is set."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    if constants.HF_HUB_OFFLINE:
        return None
    guard_hub()
    return int(_http.get_session().get(f"{constants.ENDPOINT}/api/models?limit=1", timeout=timeout_s).status_code)


def hub_cache() -> Path:
    """Return the folder of the library's cache."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _without_secrets(record: logging.LogRecord) -> bool:
    record.msg, record.args = without_secrets(record.getMessage()), ()
    return True


def _check_names(answer: Any) -> None:
    """Raise `StorageError` if the library would make a path out of the cache from an answer."""

    def check(*names: object) -> None:
        if bad := [name for name in names if isinstance(name, str) and re.search(r"[\\/\0]|^\.+$", name)]:
            raise StorageError(
                f"The hub {answer.url.host} names a file {bad[0][:60]!r}, a path outside the cache: the file is "
                "refused. Do not use this hub."
            )

    headers = answer.headers
    if commit := headers.get("X-Repo-Commit"):
        etags = (headers.get(name, "").removeprefix("W/").strip('"') for name in ("ETag", "X-Linked-Etag"))
        check(commit, *etags)
    if answer.url.path.startswith("/api/"):
        answer.read()
        with suppress(ValueError, RecursionError):
            json.loads(answer.content, object_hook=lambda found: check(found.get("sha"), found.get("oid")))
