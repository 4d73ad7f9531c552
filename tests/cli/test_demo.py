"""The demo: its passages, and a complete run with the real model and its own server."""

from __future__ import annotations

import json
import re
from pathlib import Path
from pydoc_data.topics import topics
from urllib.request import urlopen

import pytest
from click.testing import CliRunner
from support.deadlines import until
from support.forked import start
from support.json_page import check

from sparse_ingest.cli.demo import PASSAGE_WORDS, QUESTIONS, passages, run_demo
from sparse_ingest.cli.main import cli
from sparse_ingest.errors import UsageError
from sparse_ingest.local_server import process
from sparse_ingest.reporting import SILENT


def test_passages_contain_every_line_of_the_topics():
    found = list(passages(topics))
    text = "\n".join(passage.text for passage in found)
    titles = " ".join(passage.title for passage in found)
    for topic in topics.values():
        for block in topic.split("\n\n"):
            lines = [line for line in block.strip("\n").splitlines() if line.strip()]
            for line in lines:
                mark = line.strip()
                heading = line.replace('"', "") in titles or set(mark) <= set('*=-~^"')
                assert heading or line in text, line


def test_passages_have_unique_ids_titles_and_a_bounded_length():
    found = list(passages(topics))
    assert len({passage.id for passage in found}) == len(found) > 300
    assert len({passage.text for passage in found}) == len(found)
    assert all(passage.title for passage in found)
    # Paragraphs are never split, so a passage of one paragraph may be longer.
    assert all(len(passage.text.split()) <= PASSAGE_WORDS or "\n\n" not in passage.text for passage in found)


def test_a_folder_that_the_demo_did_not_create_is_refused(tmp_path: Path):
    (tmp_path / "corpus.jsonl").write_text("mine")
    with pytest.raises(UsageError, match="was not created by the demo"):
        run_demo(tmp_path, reporter=SILENT, keep_server=False)
    assert (tmp_path / "corpus.jsonl").read_text() == "mine"


@pytest.mark.slow
def test_the_demo_answers_its_questions_and_stops_its_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    before = [one.port for one in process.instances()]
    done = CliRunner().invoke(cli, ["demo", "--folder", str(tmp_path), "--json"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    check("demo", report)
    assert report["loaded"] == report["documents"] > 300
    assert report["refused"] == report["weights_differing"] == 0
    assert report["weights_checked"] == report["terms"]
    expected = {QUESTIONS[0]: "exceptions#", QUESTIONS[1]: "break#", QUESTIONS[3]: "del#"}
    for answers in report["answers"]:
        found = [hit["id"] for hit in answers["sparse"]]
        assert any(doc_id.startswith(expected.get(answers["question"], "")) for doc_id in found), answers
    assert [one.port for one in process.instances()] == before


@pytest.mark.slow
def test_a_kept_demo_ends_with_the_address_of_its_search_page(tmp_path: Path):
    before = {one.port for one in process.instances()}
    log = tmp_path / "log"
    log.touch()
    demo = start("demo", "--keep-server", "--folder", tmp_path / "demo", log=log)

    def printed(pattern: str) -> str:
        def found() -> re.Match[str] | None:
            assert demo.is_alive(), log.read_text()
            return re.search(pattern, log.read_text())

        return until(found, log.read_text)[1]

    try:
        for step in "345":
            printed(f"({step}/5)")
        with urlopen(printed(r"Serving sparse-ingest-demo and bm25 at (\S+)")) as page:
            assert b"Skip to the results" in page.read()
    finally:
        demo.terminate()
        demo.join()
        for port in {one.port for one in process.instances()} - before:
            process.stop(port)
    assert demo.exitcode == 0
