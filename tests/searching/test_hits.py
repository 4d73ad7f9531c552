"""Snippets and marked words of a hit."""

from __future__ import annotations

from sparse_ingest.records import TermShare
from sparse_ingest.searching.hits import Hit, marked, snippet


def hit_of(text: str, *tokens: str) -> Hit:
    return Hit(1, 1.0, "a", {"text": text}, [TermShare(token, 1.0, 1.0, 1.0) for token in tokens])


def test_a_snippet_collapses_whitespace_and_shows_the_heaviest_term_in_the_text() -> None:
    text = "filler words " * 40 + "the\n\n  Exception   is caught " + "more words " * 40
    shown = snippet(hit_of(text, "absent", "##ing", "except", "filler"))
    assert "the Exception is caught" in shown
    assert shown.startswith("…") and shown.endswith("…")
    assert 150 <= len(shown) <= 185


def test_a_snippet_prefers_complete_words_and_otherwise_starts_at_the_beginning() -> None:
    text = "anchor " * 60 + "an end"
    assert snippet(hit_of(text, "an")).endswith("an end")
    assert snippet(hit_of(text, "zebra")).startswith("anchor anchor")
    assert snippet(hit_of("short  text", "zebra")) == "short text"
    assert snippet(Hit(1, 1.0, "a", {}, [])) == ""


def test_a_snippet_of_a_text_without_spaces_shows_the_term() -> None:
    shown = snippet(hit_of("、".join(["長い文"] * 100) + "、川、" + "、".join(["長い文"] * 100), "川"))
    assert "川" in shown and len(shown) <= 185


def test_matched_words_and_prefixes_are_marked_and_other_pieces_are_not() -> None:
    hit = hit_of("", "except", "catch", "##ion", ".", "Ġriver")
    shown = marked("Catch the exception. A river, a driver.", hit, lambda word: f"<{word}>")
    assert shown == "<Catch> the <except>ion. A <river>, a driver."
    assert marked("nothing", hit_of("", "."), str.upper) == "nothing"
