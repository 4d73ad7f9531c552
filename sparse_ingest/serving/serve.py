"""`serve`: answer searches over HTTP, with the search page, until SIGTERM."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
from pathlib import Path

from sparse_ingest.errors import UsageError, first_line, needs_extra
from sparse_ingest.pipeline import options_from
from sparse_ingest.reporting import Reporter, reporter_of
from sparse_ingest.runs.run import RunLike
from sparse_ingest.searching.search import SearchableIndex, SearchableRun, open_run
from sparse_ingest.serving.options import TOKEN_VARIABLE, ServeOptions
from sparse_ingest.serving.service import Service
from sparse_ingest.serving.targets import targets_of

logger = logging.getLogger(__name__)


def serve(
    target: SearchableIndex | RunLike,
    compare: SearchableIndex | SearchableRun | str | None = None,
    *,
    options: ServeOptions | None = None,
    progress: Reporter | bool = False,
    **settings: object,
) -> None:
    """Answer searches over HTTP, with a page for people, until SIGTERM or SIGINT.

    Args:
        target: What `open_index` or `open_run` return, or a run folder.
        compare: Another index or run, or an engine of the same index, such as "bm25".
        options: All options in one object, instead of single keywords.
        progress: True, or a `Reporter`, for a note with the address.
        **settings: Fields of `ServeOptions`, such as `port=8080`.

    Raises:
        UsageError: an option is invalid, or the address cannot be used.
        MissingExtraError: starlette or uvicorn is not installed.
    """
    chosen = options_from(ServeOptions, options, settings, "serve")
    token = token_of(chosen)
    with needs_extra("serve", "`serve`"):
        from sparse_ingest.serving import running
    opened = target if isinstance(target, SearchableIndex | SearchableRun) else open_run(target)
    service = Service(targets_of(opened, compare))
    with contextlib.closing(service):
        service.warm()
        if not is_loopback(chosen.host) and token is None:
            logger.warning(
                "The service listens on %s without a token: everyone who reaches this machine can search and read all "
                "documents. Pass --token-file, or set %s.", chosen.host, TOKEN_VARIABLE,
            )  # fmt: skip
        running.run(service, chosen, token, reporter_of(progress))


def token_of(options: ServeOptions) -> str | None:
    """Return the token that requests need. Raise `UsageError` if it cannot be read, or is not printable ASCII."""
    place, token = TOKEN_VARIABLE, os.environ.get(TOKEN_VARIABLE)
    if options.token_file is not None:
        place = f"--token-file {options.token_file}"
        try:
            token = Path(options.token_file).read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as error:
            raise UsageError(f"{place} cannot be read: {first_line(error)}.") from error
    elif token is None:
        return None
    if not (token and token.isascii() and token.isprintable() and " " not in token):
        raise UsageError(f"{place} has no token; expected printable ASCII characters without spaces.")
    return token


def is_loopback(host: str) -> bool:
    """Return whether an address is reached from this machine only."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
