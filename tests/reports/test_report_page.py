"""The page of a report: safe, complete in one file, and accessible in a browser."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from support.plans import made_plan
from support.runs import make_run

from sparse_ingest.cluster.journal import open_journal
from sparse_ingest.errors import UsageError
from sparse_ingest.pipeline import Pipeline
from sparse_ingest.planning.plan import plan
from sparse_ingest.records import Refusal
from sparse_ingest.reports.report import report
from sparse_ingest.runs.run import Run

HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(2)>'
SECRET = "https://someone:hunter2@example.org/corpus.jsonl?sig=s3cr3t"


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    """A run, and the folder of its plan."""
    folder = tmp_path_factory.mktemp("planned")
    run, queries, qrels = made_plan(folder, 300)
    plan(run, queries, pipeline=Pipeline(), qrels=qrels, loss=0.05, out=folder / "plan")
    return run, folder / "plan"


class Elements(HTMLParser):
    """The names, attributes and texts of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.values: list[tuple[str, str]] = []
        self.texts = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.values += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.texts += data


def refused(run: Run, doc_id: str, reason: str) -> None:
    """Record a load that was refused a document."""
    journal = open_journal(run, "cluster", "index")
    journal.begin({0})
    journal.record_dead([Refusal(doc_id, 0, 0, 400, reason)])
    record = run.need_done(0)
    journal.finish(0, {"rows": record["rows"], "refused": 1, "sha256": record["sha256"], "seconds": 1.5})


def page_of(run: Run, folder: Path, **settings) -> tuple[str, str]:
    """Return the page and the figures as JSON."""
    figures = report(run, out=folder / "report.html", **settings)
    return (folder / "report.html").read_text(encoding="utf-8"), json.dumps(figures.to_dict())


def test_html_in_tokens_ids_and_names_is_shown_as_text(tmp_path: Path) -> None:
    folder = tmp_path / "<b>run"
    run = make_run(folder, {HOSTILE: {HOSTILE: 1.0, "\u202e": 0.5}}, model=HOSTILE, note=HOSTILE)
    refused(run, HOSTILE, f"reason {HOSTILE}")
    found = Elements(page_of(run, tmp_path)[0])
    assert not found.names & {"script", "img", "b"}
    assert not [name for name, _ in found.values if name.startswith("on")]
    assert found.texts.count(HOSTILE) >= 5
    assert "Report of <b>run" in found.texts
    assert "\u202e" not in found.texts and "\\u202e" in found.texts


def test_passwords_and_queries_of_addresses_are_not_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", model=SECRET, corpus=[{"name": SECRET, "bytes": 3}])
    refused(run, "words", f"see {SECRET}")
    for content in page_of(run, tmp_path):
        assert "example.org/corpus.jsonl" in content
        assert "hunter2" not in content and "s3cr3t" not in content


def test_the_page_loads_nothing_and_every_chart_has_title_units_and_table(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "run"), tmp_path)[0]
    found = Elements(page)
    assert all(value[0] == "#" for name, value in found.values if name in ("href", "src"))
    assert "url(" not in page and "@import" not in page and "script" not in found.names
    assert "default-src 'none'" in page
    figures = re.findall(r"<figure>.*?</figure>", page, re.DOTALL)
    assert len(figures) == 5
    for figure in figures:
        inner = Elements(figure)
        assert {"h3", "svg", "title", "desc", "details", "table", "th"} <= inner.names
        ids = dict(value for value in inner.values if value[0] == "aria-labelledby")["aria-labelledby"].split()
        assert all(("id", one) in inner.values for one in ids)
    assert len(set(re.findall(r' id="([^"]+)"', page))) == len(re.findall(r' id="', page))


def test_a_plan_is_shown(planned: tuple[Run, Path], tmp_path: Path) -> None:
    run, folder = planned
    page, figures = page_of(run, tmp_path, plan=folder)
    choice = json.loads(figures)["plan"]["choice"]
    assert "Pruning frontier" in page and ">chosen<" in page and "loss of 5.0%" in page
    assert f"{choice['loss']:.2%}" in page
    content = json.loads((folder / "plan.json").read_text())
    (tmp_path / "plan").mkdir()
    for change, message in (
        ({"run_id": "0" * 64}, "is a plan of run 000000000000"),
        ({"frontier": [10**6]}, "names points that it lacks"),
        ({"points": "x"}, "is not a plan: Expected `array`"),
    ):
        (tmp_path / "plan" / "plan.json").write_text(json.dumps({**content, **change}))
        with pytest.raises(UsageError, match=message):
            report(run, out=tmp_path / "other.html", plan=tmp_path / "plan")
    with pytest.raises(UsageError, match="does not exist"):
        report(run, out=tmp_path / "other.html", plan=tmp_path)


@pytest.mark.parametrize(("scheme", "width"), [("dark", 390), pytest.param("light", 1440, marks=pytest.mark.slow)])
def test_the_page_is_accessible_and_fits_a_phone(
    planned: tuple[Run, Path], tmp_path: Path, scheme: str, width: int
) -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium is installed: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api")
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    refused(planned[0], "d1", "a reason")
    page_of(planned[0], tmp_path, plan=planned[1])
    with playwright.sync_playwright() as program:
        browser = program.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        shown = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        shown.goto((tmp_path / "report.html").as_uri())
        shown.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
        assert axe.run(shown).response["violations"] == []
        assert shown.evaluate("document.documentElement.scrollWidth") == width
        browser.close()
