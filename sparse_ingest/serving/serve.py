"""`serve`: answer searches over HTTP, with the search page, until SIGTERM."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sparse_ingest.errors import UsageError, first_line, needs_extra
from sparse_ingest.pipeline import options_from
from sparse_ingest.reporting import Reporter, reporter_of
from sparse_ingest.runs.run import RunLike
from sparse_ingest.searching.search import SearchableIndex, SearchableRun, open_run
from sparse_ingest.serving.options import TOKEN_VARIABLE, ServeOptions, is_loopback
from sparse_ingest.serving.targets import Target, targets_of

if TYPE_CHECKING:
    from sparse_ingest.serving.judgments import Judgments

logger = logging.getLogger(__name__)


def serve(
    target: SearchableIndex | RunLike,
    compare: SearchableIndex | SearchableRun | str | None = None,
    *,
    queries: Path | str | None = None,
    qrels: Path | str | None = None,
    options: ServeOptions | None = None,
    progress: Reporter | bool = False,
    **settings: object,
) -> None:
    """Answer searches over HTTP, with a page for people, until SIGTERM or SIGINT.

    Call it in the main thread of a process: in another thread it is not stopped by signals, and it cannot run inside of
    another event loop, such as that of a notebook.

    Args:
        target: What `open_index` or `open_run` return, or a run folder.
        compare: Another index or run, or an engine of the same index, such as "bm25".
        queries: Judged queries to choose from, as for `evaluate`: a file, or the folder of a collection.
        qrels: Relevance judgments of these queries, by default from `queries`.
        options: All options in one object, instead of single keywords.
        progress: True, or a `Reporter`, for a note with the address.
        **settings: Fields of `ServeOptions`, such as `port=8080`.

    Raises:
        UsageError: an option is invalid, or the address cannot be used.
        CorpusError: queries or qrels cannot be read.
        MissingExtraError: starlette or uvicorn is not installed.
    """
    chosen = options_from(ServeOptions, options, settings, "serve")
    token = token_of(chosen)
    with needs_extra("serve", "`serve`"):
        from sparse_ingest.serving import running
        from sparse_ingest.serving.service import Service
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(running.bound(chosen))
        opened = target if isinstance(target, SearchableIndex | SearchableRun) else open_run(target)
        targets = targets_of(opened, compare, chosen.time_limit_s)
        service = Service(targets, judgments_of(targets, queries, qrels, chosen))
        stack.callback(service.close)
        service.warm()
        if not is_loopback(chosen.host) and token is None:
            logger.warning(
                "The service listens on %s without a token: everyone who reaches this machine can search and read all "
                "documents. Pass --token-file, or set %s.", chosen.host, TOKEN_VARIABLE,
            )  # fmt: skip
        running.run(service, listener, chosen, token, reporter_of(progress))


def judgments_of(
    targets: Sequence[Target], queries: Path | str | None, qrels: Path | str | None, options: ServeOptions
) -> Judgments | None:
    """Return the relevance judgments, if files are given."""
    if queries is None and qrels is None:
        if options.quoting is not None:
            raise UsageError("quoting is for queries and qrels. Pass them, or omit quoting.")
        return None
    from sparse_ingest.serving.judgments import Judgments

    return Judgments(targets, queries, qrels, options.quoting)


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
