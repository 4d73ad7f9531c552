"""Reports of runs in a store and on the web, and a report that is written into a store."""

from __future__ import annotations

from pathlib import Path

from support.runs import make_run
from support.stores import put_folder, web_server

from sparse_ingest.reports.report import report
from sparse_ingest.storage.places import RemotePath


def test_a_report_of_a_run_in_a_store_is_that_of_the_folder(tmp_path: Path, bucket: str) -> None:
    run = make_run(tmp_path / "run")
    put_folder(tmp_path / "run", RemotePath.at(f"{bucket}/run"))
    here = report(run, out=tmp_path / "report.html")
    there = report(f"{bucket}/run", out=f"{bucket}/report.html")
    assert there.distributions == here.distributions
    page = RemotePath.at(f"{bucket}/report.html").read_bytes().decode()
    assert f"{bucket}/run" in page and "Longest posting lists" in page


def test_a_report_of_a_run_behind_a_signed_link_has_no_signature(tmp_path: Path) -> None:
    make_run(tmp_path / "served" / "run")
    with web_server(tmp_path / "served", token="sig=hidden") as url:
        figures = report(f"{url}/run?sig=hidden", out=tmp_path / "report.html")
    assert figures.distributions.documents == 5
    page = (tmp_path / "report.html").read_text()
    assert f"{url}/run" in page and "hidden" not in page
