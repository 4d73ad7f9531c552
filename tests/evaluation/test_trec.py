"""Run files: what is written, trec_eval's own reader reads with the same bits."""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np
import pytest
import pytrec_eval

from sparse_ingest.errors import CorpusError
from sparse_ingest.evaluation.trec import read_trec_run, trec_lines


class Found(NamedTuple):
    query_id: str
    doc_ids: list[str]
    scores: list[float]


def test_scores_survive_the_file_bit_for_bit(tmp_path):
    scores = np.sort(np.random.default_rng(1).gamma(2.0, 9.0, 200).astype(np.float32))[::-1]
    ranked = [Found("q1", [f"d{place}" for place in range(200)], scores.tolist()), Found("q2", ["é"], [1e-9])]
    path = tmp_path / "run.txt"
    path.write_text("".join(trec_lines(one) for one in ranked), encoding="utf-8")
    assert path.read_text(encoding="utf-8").split("\n")[0] == f"q1 Q0 d0 1 {scores[0]:.9g} sparse-ingest"
    with path.open(encoding="utf-8") as file:
        theirs = pytrec_eval.parse_run(file)
    ours = read_trec_run(path, {"q1", "q2"})
    assert theirs == ours
    assert [np.float32(ours["q1"][f"d{place}"]) for place in range(200)] == scores.tolist()


@pytest.mark.parametrize("wrong", ["Geneva Durben", "", "a\nb", "a\r", "\u2028a", "a\tb", "a\0b", " a", "a\u00a0b"])
def test_what_such_a_file_cannot_hold_is_refused_and_named(wrong):
    for kind, found in (
        ("document id", Found("q", ["a", wrong], [2.0, 1.0])),
        ("query id", Found(wrong, ["a"], [1.0])),
        ("query id", Found(wrong, [], [])),
    ):
        with pytest.raises(CorpusError, match=re.escape(f"The {kind} {wrong!r} cannot be in a TREC run file")):
            trec_lines(found)


def test_only_the_wanted_queries_are_kept(tmp_path):
    path = tmp_path / "run.txt"
    path.write_text("a Q0 x 1 2.5 t\n\nb Q0 x 1 1.5 t\n")
    assert read_trec_run(path, {"b"}) == {"b": {"x": 1.5}}


@pytest.mark.parametrize("line", ["a Q0 x 1 2.5", "a Q0 x 1 high t"])
def test_a_line_that_is_none_is_named_with_its_number(line, tmp_path):
    path = tmp_path / "run.txt"
    path.write_text(f"a Q0 x 1 2.5 t\n{line}\n")
    with pytest.raises(CorpusError, match=r"run.txt:2: expected six columns"):
        read_trec_run(path, {"a"})
