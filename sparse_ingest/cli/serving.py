"""`serve`: the HTTP service of an index or a run folder, with its search page."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, cast, get_args

import click

from sparse_ingest.cli.help import command
from sparse_ingest.cli.options import stage_options
from sparse_ingest.cli.progress import TerminalReporter
from sparse_ingest.cli.searching import Target, target_options
from sparse_ingest.pipeline import EngineName, ModelSettings, Pipeline, QueryChanges
from sparse_ingest.serving.options import ServeOptions
from sparse_ingest.storage.places import place_of

if TYPE_CHECKING:
    from sparse_ingest.searching.search import SearchableIndex, SearchableRun

FILE = click.Path(exists=True, dir_okay=False)
EXISTING = click.Path(exists=True)
ENGINES = ("bm25", *get_args(EngineName))


@command()
@click.option("--compare", metavar="NAME",
              help="Compare with another index or run folder, or an engine of the index, such as bm25")  # fmt: skip
@click.option(
    "--queries", type=EXISTING, metavar="F", help="Judged queries: file, or folder of a BEIR or MTEB collection"
)
@click.option("--qrels", type=EXISTING, metavar="F",
              help="Relevance judgments: file or folder  [default: from --queries]")  # fmt: skip
@stage_options(ServeOptions, port=click.IntRange(0, 65535), token_file=FILE)
@target_options("Allow a model that differs from the model of the index or run")
def serve(target: Target, compare: str | None, options: ServeOptions, **judged: str | None) -> None:
    """Serve an index or a run folder over HTTP, with a search page at /.

    \b
    sparse-ingest serve --index NAME
    sparse-ingest serve --index NAME --compare bm25
    sparse-ingest serve --run RUN --port 8081

    SIGTERM and Ctrl-C finish open requests and exit with 0.
    """
    from sparse_ingest.serving.serve import serve as serve_target

    with contextlib.ExitStack() as stack:
        names_another = compare is not None and compare not in ENGINES
        is_index = names_another and not _is_run(str(compare))
        opened = stack.enter_context(target.opened(connects=is_index))
        reporter = stack.enter_context(TerminalReporter())
        other = _opened(target, str(compare)) if names_another else compare
        if is_index:
            stack.enter_context(cast("SearchableIndex", other))
        serve_target(opened, other, options=options, progress=reporter, **judged)


def _is_run(name: str) -> bool:
    from sparse_ingest.runs.files import has_manifest

    return "/" in name or has_manifest(place_of(name))


def _opened(target: Target, name: str) -> SearchableIndex | SearchableRun:
    """Open what is compared with its own model and settings: those that were given are of the first target."""
    from sparse_ingest.searching.search import open_index, open_run

    own = Pipeline(ModelSettings(trust_remote_code=target.pipeline.model.trust_remote_code), query=QueryChanges())
    if _is_run(name):
        return open_run(place_of(name), pipeline=own)
    return open_index(name, connection=target.connection, pipeline=own)
