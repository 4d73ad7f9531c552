"""TREC run files: pytrec_eval reads them with the same bits."""

from __future__ import annotations

import re

import numpy as np
import pytest
import pytrec_eval

from sparse_ingest.errors import CorpusError
from sparse_ingest.evaluation.trec import read_trec_run, trec_lines
from sparse_ingest.searching.hits import Ranked


def test_scores_round_trip_bit_for_bit(tmp_path):
    scores = np.sort(np.random.default_rng(1).gamma(2.0, 9.0, 200).astype(np.float32))[::-1]
    ranked = [Ranked("q1", [f"d{place}" for place in range(200)], scores.tolist()), Ranked("q2", ["é"], [1e-9])]
    path = tmp_path / "run.txt"
    path.write_text("".join(trec_lines(one) for one in ranked), encoding="utf-8")
    assert path.read_text(encoding="utf-8").split("\n")[0] == f"q1 Q0 d0 1 {scores[0]:.9g} sparse-ingest"
    with path.open(encoding="utf-8") as file:
        expected = pytrec_eval.parse_run(file)
    found_run = read_trec_run(path, {"q1", "q2"})
    assert expected == found_run
    assert [np.float32(found_run["q1"][f"d{place}"]) for place in range(200)] == scores.tolist()


@pytest.mark.parametrize("bad_id", ["Geneva Durben", "", "a\nb", "a\r", "\u2028a", "a\tb", "a\0b", " a", "a\u00a0b"])
def test_ids_that_are_invalid_in_a_run_file_are_refused(bad_id):
    for kind, found in (
        ("document id", Ranked("q", ["a", bad_id], [2.0, 1.0])),
        ("query id", Ranked(bad_id, ["a"], [1.0])),
        ("query id", Ranked(bad_id, [], [])),
    ):
        with pytest.raises(CorpusError, match=re.escape(f"The {kind} {bad_id!r} cannot be in a TREC run file")):
            trec_lines(found)


def test_a_byte_order_mark_is_not_part_of_the_first_query(tmp_path):
    path = tmp_path / "run.txt"
    path.write_text("a Q0 x 1 1.5 t\n", encoding="utf-8-sig")
    assert read_trec_run(path, {"a"}) == {"a": {"x": 1.5}}


def test_only_requested_queries_are_read(tmp_path):
    path = tmp_path / "run.txt"
    path.write_text("a Q0 x 1 2.5 t\n\nb Q0 x 1 1.5 t\n")
    assert read_trec_run(path, {"b"}) == {"b": {"x": 1.5}}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("a Q0 x 1 2.5", "expected six columns"),
        ("a Q0 x 1 high t", "expected six columns"),
        ("a Q0 y 1 nan t", "expected six columns"),
        ("a Q0 x 2 1.5 t", "query 'a' has the document 'x' twice"),
    ],
)
def test_an_invalid_line_is_an_error_with_its_number(line, words, tmp_path):
    path = tmp_path / "run.txt"
    path.write_text(f"a Q0 x 1 2.5 t\n{line}\n")
    with pytest.raises(CorpusError, match=f"run.txt:2: {words}"):
        read_trec_run(path, {"a"})
