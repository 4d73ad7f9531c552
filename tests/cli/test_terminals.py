"""On a terminal, control characters in data are escaped by every command; elsewhere data is unchanged."""

from __future__ import annotations

import io
import json
import os
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
from support.forked import command
from support.indexes import fill
from support.plans import made_plan
from support.runs import make_run
from support.serving import AnsweringHandler, serving
from support.tables import write_table
from support.terminals import EVIL, NAMED, on_terminal, refuse_controls

from sparse_ingest.cli.main import _escaping
from sparse_ingest.cluster.client import Client
from sparse_ingest.runs.run import Run

FIELDS = {"title": f"{NAMED} title", "text": f"how to catch {EVIL} fish"}
DOCUMENTS = {NAMED: {"catch": 1.5, EVIL: 0.5}, "second": {"catch": 1.0}}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    model = write_table(tmp_path / "model")
    return make_run(tmp_path / "run", DOCUMENTS, fields=dict.fromkeys(DOCUMENTS, FIELDS), model=str(model))


@pytest.fixture
def queries(tmp_path: Path) -> tuple[object, ...]:
    rows = [{"_id": NAMED, "text": "catch"}, {"_id": "q2", "text": "catch"}]
    (tmp_path / "queries.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    judged = [{"query-id": row["_id"], "corpus-id": "second", "score": 1} for row in rows]
    (tmp_path / "qrels.jsonl").write_text("\n".join(map(json.dumps, judged)), encoding="utf-8")
    return "--queries", tmp_path / "queries.jsonl", "--qrels", tmp_path / "qrels.jsonl"


def test_hits_are_escaped_and_matched_words_are_bold(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for options in ((), ("--explain",)):
        code, out, err = on_terminal(monkeypatch, "search", "--run", run.path, "catch", *options)
        assert code == 0, err
        refuse_controls(out.replace("\x1b[1mcatch\x1b[0m", "catch"), err)
        assert out.count("\x1b[1mcatch\x1b[0m") == 2
        assert r"a\x1b]0;PWN\x07" in out and r"\u202eb" in out and r"\nFORGED" in out and r"\udb40\udc41" in out


def test_json_on_a_terminal_has_the_same_values(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = on_terminal(monkeypatch, "search", "--run", run.path, "--json", "catch")
    assert code == 0, err
    refuse_controls(out, err)
    piped = command("search", "--run", run.path, "--json", "catch").out
    assert json.loads(out) == json.loads(piped) and "\x9b2J" in piped and "\u202e" in piped


def test_output_to_a_pipe_is_unchanged(run: Run) -> None:
    shown = command("search", "--run", run.path, "catch").out
    assert "\x9b2J\x90\u202eb\u2066c\u200bd\u200f" in shown and f"{NAMED[-10:]}  " in shown


def test_commands_that_read_an_index_escape_its_values(
    run: Run, client: Client, index_name: str, queries: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = ("--index", index_name, "--url", client.address)
    for arguments in (
        ("load", run.path),
        ("search", "catch"),
        ("search", "catch", "--hybrid"),
        ("search", "--json", *queries[:2]),
        ("evaluate", *queries, "--per-query"),
        ("query", *queries[:2]),
    ):
        code, out, err = on_terminal(monkeypatch, *arguments, *target)
        assert code == 0, err
        refuse_controls(out.replace("\x1b[1mcatch\x1b[0m", "catch"), err)
        assert "PWN" in out or arguments[0] in ("load", "query"), out
    client.call("DELETE", f"/{index_name}/_doc/second", params={"refresh": "true"})
    client.call("PUT", f"/{index_name}/_doc/x{NAMED[-40:].encode().hex()}", {})
    bad = json.dumps({"index": {"_id": f"{NAMED} too many"}}) + "\n{}\n"
    client.call("POST", f"/{index_name}/_bulk", bad.encode(), params={"refresh": "true"})
    code, out, err = on_terminal(monkeypatch, "verify", run.path, *target)
    assert code == 1
    refuse_controls(out, err)
    assert "extra: 'a" in out and "/2 documents [" in err, "the bar of tqdm works"
    stamp = client.call("GET", f"/{index_name}/_mapping")[index_name]["mappings"]["_meta"]
    stamp["sparse_ingest"]["model"]["document"] = NAMED
    client.call("PUT", f"/{index_name}/_mapping", {"_meta": stamp})
    for arguments in (("index", "show"), ("search", "catch")):
        _, out, err = on_terminal(monkeypatch, *arguments, *target)
        refuse_controls(out, err)
        assert "PWN" in out + err


def test_values_of_a_foreign_index_are_escaped(client: Client, index_name: str, run: Run,
                                             monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    fill(client, index_name, run, {"sparse_ingest": {"model": {"document": NAMED}}})
    for arguments in (("index", "show"), ("verify", run.path), ("search", "x"), ("index", "drop", "--yes")):
        _, out, err = on_terminal(monkeypatch, *arguments, "--index", index_name, "--url", client.address)
        refuse_controls(out, err)


def test_error_reasons_of_a_server_are_escaped(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    class Handler(AnsweringHandler):
        def do_GET(self) -> None:
            root = {"version": {"number": "3.6.0", "distribution": "opensearch"}, "cluster_uuid": "x"}
            error = {"error": {"type": NAMED, "reason": NAMED}}
            self.answer(*((200, root) if self.path == "/" else (400, error)))

        do_POST = do_GET

    with serving(server := ThreadingHTTPServer(("127.0.0.1", 0), Handler)):
        url = f"http://127.0.0.1:{server.server_address[1]}"
        for arguments in (("index", "show"), ("search", "catch"), ("verify", run.path), ("load", run.path)):
            code, out, err = on_terminal(monkeypatch, *arguments, "--index", "any", "--url", url)
            refuse_controls(out, err)
            assert code == 1 and "PWN" in err


def test_a_bar_ends_its_line_before_the_report() -> None:
    """Python's stderr on a terminal is not line-buffered: it passes every write on."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    with io.TextIOWrapper(io.FileIO(writer, "w"), "utf-8", write_through=True) as stream:
        _escaping(stream, lenient=True).write("100% done\n")
        assert os.read(reader, 100) == b"100% done\n"
    os.close(reader)


def test_names_of_files_models_and_columns_are_escaped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / NAMED
    folder.mkdir()
    model = write_table(folder / "model")
    corpus = folder / "corpus.jsonl"
    corpus.write_text(json.dumps({"_id": NAMED, "text": "x"}) + "\n" + json.dumps({"_id": "b", NAMED: 1}) + "\n")
    indexed_run = make_run(folder / "run", model=str(model))
    for arguments in (
        ("encode", "--dry-run", "--corpus", corpus),
        ("encode", "--dry-run", "--corpus", corpus, "--text-field", "none"),
        ("encode", "--dry-run", "--corpus", folder / "none.jsonl"),
        ("idf", "--corpus", corpus, "--model", model, "--out", folder / "idf.json"),
        ("inspect", model),
        ("status", indexed_run.path),
        ("status", folder),
        ("search", "--run", indexed_run.path, "catch"),
    ):
        code, out, err = on_terminal(monkeypatch, *arguments)
        refuse_controls(out, err)
        assert code != 2 and ("PWN" in out + err or arguments[0] == "search"), (arguments, out, err)


def test_the_page_of_a_plan_escapes_html(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / f"{EVIL}\nFORGED <script>alert(1)<"
    folder.mkdir()
    run, queries, _ = made_plan(folder, 300)
    path = folder / "queries.tsv"
    path.write_text("".join(f"{query.id}\t{query.text}\n" for query in queries))
    out_folder = tmp_path / "plan"
    code, out, err = on_terminal(monkeypatch, "plan", run.path, "--queries", path, "--loss", 0.5, "--out", out_folder)
    assert code == 0, err
    refuse_controls(out, err)
    page = (out_folder / "plan.html").read_text(encoding="utf-8")
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page
