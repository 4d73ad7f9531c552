"""The spool file of rows in memory: written once, read by any process, deleted with its corpus."""

from __future__ import annotations

import gc
import itertools
import json
import pickle
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from support.forms import rows_of

from sparse_ingest.corpora.documents import FieldNames
from sparse_ingest.corpora.memory import memory_corpus
from sparse_ingest.corpora.options import CorpusOptions
from sparse_ingest.corpora.sources import Cursor, Position
from sparse_ingest.errors import CorpusError

FIELDS = FieldNames(keep=("year",))
ROWS = [{"_id": f"d{number}", "text": f"text é {number}", "year": 1900 + number} for number in range(1200)]


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    return tmp_path


def test_the_spool_is_removed_with_the_corpus(temporary: Path) -> None:
    corpus = memory_corpus(ROWS, fields=FIELDS)
    assert len(list(temporary.glob("*/rows.jsonl"))) == 1
    assert len(rows_of(corpus)) == len(ROWS)
    del corpus
    gc.collect()
    assert list(temporary.iterdir()) == []


def test_a_failed_iteration_leaves_no_spool(temporary: Path) -> None:
    with pytest.raises(ZeroDivisionError) as raised:
        memory_corpus((1 / 0 for _ in range(1)), fields=FIELDS)
    assert list(temporary.iterdir()) == [], raised


PROGRAM = """
import os, sys, resource
from sparse_ingest.corpora.documents import FieldNames
from sparse_ingest.corpora.memory import memory_corpus
from sparse_ingest.errors import SparseIngestError
rows = ({"_id": str(number), "text": "a" * 1000} for number in range(5000))
if sys.argv[1] == "full":
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))
try:
    corpus = memory_corpus(rows, fields=FieldNames())
except SparseIngestError as error:
    sys.exit(f"{type(error).__name__}: {error}")
if sys.argv[1] == "fork":
    if not (child := os.fork()):
        del corpus
        os._exit(0)
    os.waitpid(child, 0)
    assert len(list(corpus.rows())) == 5000
"""


def run_program(mode: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, timeout=60)


def test_the_spool_is_removed_at_the_end_of_the_process(temporary: Path) -> None:
    assert run_program("plain").returncode == 0
    assert list(temporary.iterdir()) == []


def test_a_forked_child_leaves_the_spool_to_its_parent(temporary: Path) -> None:
    done = run_program("fork")
    assert done.returncode == 0, done.stderr
    assert list(temporary.iterdir()) == []


def test_a_full_disk_is_reported_with_the_variable_to_set(temporary: Path) -> None:
    done = run_program("full")
    assert done.stderr.startswith("CorpusError: ") and "rows.jsonl cannot be written: File too large" in done.stderr
    assert "TMPDIR" in done.stderr
    assert list(temporary.iterdir()) == []


def test_a_generator_is_consumed_once_in_flat_memory(temporary: Path) -> None:
    produced = 0

    def rows() -> Iterator[dict]:
        nonlocal produced
        for produced in range(1, 20_001):  # noqa: B007
            yield {"_id": str(produced), "text": "word " * 200}

    tracemalloc.start()
    corpus = memory_corpus(rows(), fields=FieldNames())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert produced == 20_000
    assert corpus.sources[0].bytes > 20_000_000
    assert peak < 8_000_000


def test_a_data_frame_is_converted_in_batches() -> None:
    frame = pd.DataFrame({"_id": range(50_000), "text": "word"})
    tracemalloc.start()
    corpus = memory_corpus(frame, fields=FieldNames())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert corpus.identity()[0]["rows"] == 50_000
    assert peak < 4_000_000


def test_reading_resumes_at_any_row() -> None:
    corpus = memory_corpus([*ROWS, "bad", *ROWS[:5]], fields=FIELDS)
    rows = list(corpus.rows())
    for place in (0, 1, 500, 1198, 1199, 1200, 1201):
        again = Position(*json.loads(json.dumps(rows[place][1])))
        assert list(corpus.rows(again)) == rows[place + 1 :]
    cursor = Cursor(corpus, limit=None)
    list(cursor.take(1000))
    position = cursor.position
    expected = [row.place for row in cursor.rows()]
    cursor.jump(position)
    assert [row.place for row in cursor.rows()] == expected
    assert expected[0] == "memory: row 1001"
    assert corpus.share(cursor.position) == 1
    assert cursor.rereadable


@pytest.mark.parametrize(("limit", "expected"), [(None, 1201), (700, 700), (5000, 1201)])
def test_the_expected_rows_end_at_the_limit(limit: int | None, expected: int) -> None:
    cursor = Cursor(memory_corpus([*ROWS, "bad"], fields=FIELDS), limit)
    list(cursor.take(600))
    assert cursor.expected_rows == pytest.approx(expected, rel=0.05)


def test_another_process_reads_a_pickled_corpus() -> None:
    corpus = memory_corpus(ROWS, fields=FIELDS)
    expected = rows_of(corpus)
    program = (
        "import pickle, sys\n"
        "corpus = pickle.load(sys.stdin.buffer)\n"
        "found = [(row.row, row.document, row.reason) for row, _ in corpus.rows()]\n"
        "pickle.dump((found, corpus.identity()), sys.stdout.buffer)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], input=pickle.dumps(corpus), capture_output=True, check=True)
    assert pickle.loads(done.stdout) == (expected, corpus.identity())
    assert rows_of(corpus) == expected  # the spool was not deleted by the other process


def test_a_spool_that_its_owner_deleted_is_an_error() -> None:
    copy = pickle.loads(pickle.dumps(memory_corpus(ROWS, fields=FIELDS)))
    with pytest.raises(CorpusError, match="rows.jsonl cannot be read"):
        rows_of(copy)


def test_an_endless_stream_is_read_up_to_the_limit() -> None:
    rows = ({"_id": str(number), "text": "a"} for number in itertools.count())
    assert len(list(CorpusOptions(limit=3).open(rows).rows())) == 3
    assert next(rows)["_id"] == "3"
