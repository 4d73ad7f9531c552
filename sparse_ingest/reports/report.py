"""`report`: the figures of a run, of its loads and of an index as one HTML file.

In: a run; optionally an index that was loaded from it, and the folder of a plan. Out: a page that loads nothing else.
Without an index no request is sent to a cluster.
"""

from __future__ import annotations

from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from sparse_ingest.cluster.client import ConnectionLike, connect, connection_of
from sparse_ingest.cluster.index_admin import IndexReport, show_index
from sparse_ingest.cluster.indexes import need_index
from sparse_ingest.cluster.mappings import leaves
from sparse_ingest.errors import UsageError
from sparse_ingest.planning.outputs import read_plan
from sparse_ingest.reporting import Reporter, reporter_of
from sparse_ingest.reports.distributions import read_distributions
from sparse_ingest.reports.figures import ReportFigures, of_run
from sparse_ingest.reports.page import as_html
from sparse_ingest.runs.run import RunLike, open_run
from sparse_ingest.storage.durable import write_atomic
from sparse_ingest.storage.places import Place, RemotePath, place_of
from sparse_ingest.verification.verify import verify as verify_index


def report(
    run: RunLike,
    *,
    out: Place | str,
    index: str | None = None,
    plan: Path | str | None = None,
    verify: bool = False,
    url: str | None = None,
    connection: ConnectionLike | None = None,
    progress: Reporter | bool = False,
) -> ReportFigures:
    """Write the figures of a run, and of an index that was loaded from it, to an HTML file.

    Vectors are read in one pass; above 10 million documents, those of evenly spaced shards.

    Args:
        run: A run folder, or what `encode` or `open_run` returns; it may be incomplete.
        out: The HTML file to write. An existing file is not replaced.
        index: An index or alias whose size, mapping and state are shown.
        plan: The folder of a plan of this run, whose frontier is shown.
        verify: Compare the index with the run, as `verify` does with its default sample.
        url: Where the cluster is; by default the SPARSE_INGEST_* variables name it.
        connection: A `Connection` or an `opensearchpy.OpenSearch`, instead of `url`.
        progress: True for a tqdm bar, or a `Reporter`; silent by default.

    Returns:
        What the page shows; `.ok` unless the comparison found a difference.

    Raises:
        UsageError: the file exists, or the plan is of another run.
        RunError, ClusterError: the run or the index does not exist or cannot be read.
    """
    reporter, target = reporter_of(progress), place_of(out)
    _refuse_target(target)
    if verify and index is None:
        raise UsageError("--verify compares an index with the run: pass --index too.")
    opened = open_run(run)
    opened.refuse_mixed()
    planned = None if plan is None else read_plan(Path(plan))
    if planned and planned.run_id != opened.manifest.run_id:
        raise UsageError(f"{plan} is a plan of run {planned.run_id[:12]}, not of {opened.manifest.run_id[:12]}.")
    reached = connection_of(url, connection)
    shown, mapping = (None, None) if index is None else _index(index, reached)
    compared = verify_index(opened, index=index, connection=reached, progress=reporter) if verify and index else None
    found = of_run(opened)
    figures = ReportFigures(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        release=version("sparse-ingest"),
        **found,
        distributions=read_distributions(opened, {one.shard: one.documents for one in found["speeds"]}, reporter),
        index=shown,
        mapping=mapping,
        plan=planned,
        verification=compared,
    )
    if isinstance(target, Path):
        target.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(target, as_html(figures).encode(errors="backslashreplace"), exclusive=True)
    return figures


def _refuse_target(target: Place) -> None:
    """Refuse a file that exists or could not be written, before computing anything."""
    if isinstance(target, RemotePath) and not target.writable:
        raise UsageError(f"{target} is a web address, which is read-only. Pass --out a file, or an s3:// address.")
    if target.exists():
        raise UsageError(f"{target} already exists. Name another --out file, or remove it.")
    for folder in target.parents if isinstance(target, Path) else ():
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"{folder} is a file. Name a file in a folder with --out.")


def _index(index: str, connection: ConnectionLike) -> tuple[IndexReport, dict[str, str]]:
    """Return what an index contains, and the type of each mapped field."""
    shown = show_index(index, connection=connection)
    with connect(connection) as client:
        there = need_index(client, shown.index, "Another client deleted it. Load the run again.")
    return shown, {field: str(entry.get("type", "object")) for field, entry in leaves(there.mappings)}
