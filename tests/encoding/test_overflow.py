"""Documents longer than max_length: windows, passages, and search for the best passage of each document."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.checkpoints import PACKAGED, WORDS, build_encoder, make_masked_lm
from support.forked import Answer, command
from support.run_contents import contents, documents, lasting, write
from support.runs import make_run

from sparse_ingest.checkpoints.layouts import read_checkpoint
from sparse_ingest.cluster.client import Connection, connect
from sparse_ingest.cluster.search_bodies import neural_sparse_body, rank_feature_body
from sparse_ingest.errors import PipelineError, UsageError
from sparse_ingest.loading.load import load
from sparse_ingest.models.tokenizer import Cut, Tokenizer, WindowLayout, _Reading
from sparse_ingest.pipeline import ModelSettings, Pipeline
from sparse_ingest.runs.run import open_run
from sparse_ingest.runs.shards import PART_ROWS, read_shard, text_hash
from sparse_ingest.searching.index_search import search_index
from sparse_ingest.searching.run_search import search_run

LONG = " ".join(WORDS[place * 7 % len(WORDS)] for place in range(150))
TEXTS = ["the river stone", LONG, "", "bird " * 62, "bird " * 63, LONG[::-1], "lamp"]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("overflow")
    folders = {kind: str(make_masked_lm(root / kind, kind)) for kind in ("bert", "roberta")}
    return {**folders, "packaged": PACKAGED}


shared_encoder = functools.cache(build_encoder)


def tokenizer_of(model: str, *, window_stride: int | None = None, **settings) -> Tokenizer:
    return Tokenizer(read_checkpoint(model).transformer, ModelSettings(**settings), window_stride=window_stride)


def rows_of(encoded) -> list[tuple[bytes, bytes]]:
    """Return token ids and weights of each text as bytes."""
    rows = (encoded.vectors.row(place) for place in range(len(encoded.vectors.doc_ids)))
    return [(token_ids.tobytes(), weights.tobytes()) for token_ids, weights in rows]


# Tokens of a window


@given(st.integers(0, 60), st.integers(0, 3), st.integers(1, 12), st.data())
def test_windows_cover_every_token_and_only_the_last_ends_with_the_text(
    text: int, prompt: int, inner: int, data
) -> None:
    stride = data.draw(st.integers(1, inner))
    layout = WindowLayout(np.array([-1], np.int32), np.array([-2], np.int32), prompt + inner, stride)
    ids = np.arange(prompt + text, dtype=np.int32)
    cut = Cut(layout, ids, prompt, ids)
    windows = [cut.window(number).tolist() for number in range(cut.windows)]
    inside = []
    for window in windows:
        assert window[: prompt + 1] == [-1, *range(prompt)] and window[-1] == -2
        inside.append(window[prompt + 1 : -1])
    assert windows[0] == [-1, *ids[: prompt + inner].tolist(), -2], "the first window has the tokens of truncation"
    assert sorted({token for window in inside for token in window}) == list(range(prompt, prompt + text))
    assert all(window == list(range(window[0], window[0] + inner)) for window in inside[:-1])
    assert [window[0] - inside[0][0] for window in inside[1:]] == [stride * n for n in range(1, len(inside))]
    assert all(window[-1] != prompt + text - 1 for window in inside[:-1]), "only the last window ends with the text"


def record_piece_lengths(tokenizer: Tokenizer) -> list[int]:
    """Return a list that gets the length of each piece of text read from now on."""
    seen: list[int] = []
    next_piece = tokenizer._next_piece

    def record(reading: _Reading) -> str:
        seen.append(len(piece := next_piece(reading)))
        return piece

    tokenizer._next_piece = record  # type: ignore[method-assign]
    return seen


@pytest.mark.parametrize("name", ["bert", "roberta", "packaged"])
def test_a_text_read_in_pieces_has_the_same_tokens(name: str, models: dict[str, str]) -> None:
    tokenizer = tokenizer_of(models[name], document_prompt="Fire: ", max_length=64)
    texts = [LONG, "", "water  and\n\nfire\nstone [MASK] <mask> bird " * 20, "日本。Ωmega，é ü。river " * 20, "x" * 400,
             "don't stop! (really), 'tis the bird's… " * 12, " \n " * 100, "it's  a <s> b </s>\t c " * 20]  # fmt: skip
    complete = tokenizer.cut(texts, places=True)
    tokenizer.PIECE_CHARACTERS = 40
    seen = record_piece_lengths(tokenizer)
    for one, other in zip(complete, tokenizer.cut(texts, places=True), strict=True):
        assert one.token_ids.tolist() == other.token_ids.tolist()
        assert (one.prompt, one.windows) == (other.prompt, other.windows)
        if one.windows > 1:
            assert one.starts.tolist() == other.starts.tolist()
    assert len(seen) > 5 * len(texts), "no text was split"


def test_truncation_reads_only_the_start_of_a_long_text(models: dict[str, str]) -> None:
    tokenizer = tokenizer_of(models["bert"], max_length=64)
    tokenizer.PIECE_CHARACTERS = 200
    read = record_piece_lengths(tokenizer)
    [expected] = tokenizer([LONG])
    read.clear()
    [found] = tokenizer([LONG * 1000])
    assert found.truncated and found.token_ids.tolist() == expected.token_ids.tolist()
    assert sum(read) < 2000
    # Spaces give no tokens.
    blank = tokenizer(["bird" + " " * 1000, "bird" + " " * 1000 + "bird " * 62])
    assert [window.truncated for window in blank] == [False, True]


def test_a_token_across_prompt_and_text_belongs_to_the_text(models: dict[str, str]) -> None:
    """If the prompt ends within a word, the token of that word belongs to the text."""
    tokenizer = tokenizer_of(models["bert"], document_prompt="fire riv", max_length=8)
    [cut] = tokenizer.cut(["er stone cloud lamp bird water"])
    words = [tokenizer._tokenizer.id_to_token(token) for token in cut.token_ids]
    assert words == ["fire", "river", "stone", "cloud", "lamp", "bird", "water"]
    assert (cut.prompt, cut.windows) == (1, 2)


def test_spans_of_windows_cover_the_text(models: dict[str, str]) -> None:
    text = "  river, stone…\n\ncloud (日本) ü  lamp! " * 9
    for name in ("bert", "roberta"):
        for stride, overlap in ((6, False), (2, True)):
            tokenizer = tokenizer_of(models[name], max_length=8, window_stride=stride)
            [cut] = tokenizer.cut([text], places=True)
            spans = [cut.span(number, len(text)) for number in range(cut.windows)]
            assert spans[0][0] == 0 and spans[-1][1] == len(text) and len(spans) > 10
            assert any(start < end for (_, end), (start, _) in zip(spans, spans[1:], strict=False)) == overlap
            if not overlap:
                assert "".join(text[start:end] for start, end in spans) == text


# Vectors of windows


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("bert", {}),
        ("roberta", {"document_prompt": "the fire: ", "max_length": 60}),
        ("bert", {"document_prompt": "fire ", "max_length": 16, "window_stride": 13}),
        ("packaged", {"max_length": 64, "window_stride": 40}),
    ],
)
def test_the_vector_of_a_document_is_the_maximum_over_its_windows(
    name: str, settings: dict, models: dict[str, str]
) -> None:
    import torch
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    folder = read_checkpoint(models[name]).transformer
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForMaskedLM.from_pretrained(folder).eval()
    begin, end = [tokenizer.cls_token_id], [tokenizer.sep_token_id]
    before = settings.get("document_prompt", "")
    alone = tokenizer(before, add_special_tokens=False)["input_ids"]
    stride = settings.get("window_stride", (settings.get("max_length", 64) - 2 - len(alone)) // 2)
    encoder = shared_encoder(models[name], **settings)
    encoded = encoder.encode_windows(encoder.cut(TEXTS))
    windows = 0
    for place, text in enumerate(TEXTS):
        given = tokenizer(before + text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        # RoBERTa often makes the space at the end of the prompt part of the first word.
        places = sum(after <= len(before) for _, after in given["offset_mapping"])
        prompt, ids = given["input_ids"][:places], given["input_ids"][places:]
        inner = settings.get("max_length", 64) - 2 - len(prompt)
        expected = None
        for first in range(0, max(1, len(ids)), stride):
            windows += 1
            inputs = torch.tensor([begin + prompt + ids[first : first + inner] + end])
            with torch.inference_mode():
                row = torch.log1p(torch.relu(model(input_ids=inputs).logits)).amax(1)[0].numpy()
            expected = row if expected is None else np.maximum(expected, row)
            if first + inner >= len(ids):
                break
        found = np.zeros_like(expected)
        token_ids, weights = encoded.vectors.row(place)
        found[token_ids] = weights
        np.testing.assert_allclose(found, expected, atol=1e-4)
    assert (encoded.windows_of.sum(), encoded.truncated_of.sum()) == (windows, 0) and windows > len(TEXTS) + 5


def test_short_texts_and_first_windows_equal_truncation_bit_for_bit(models: dict[str, str]) -> None:
    encoder = shared_encoder(models["bert"])
    truncated, windowed = rows_of(encoder.encode(TEXTS)), rows_of(encoder.encode_windows(encoder.cut(TEXTS)))
    fits = [place for place, text in enumerate(TEXTS) if encoder.cut([text])[0].windows == 1]
    assert fits == [0, 2, 3, 6]
    assert [windowed[place] for place in fits] == [truncated[place] for place in fits]
    assert windowed[1] != truncated[1]
    passages = list(encoder.encode_passages(encoder.cut(TEXTS)))
    first = [tuple(array.tobytes() for array in passage.row) for passage in passages if passage.number == 0]
    assert first == truncated


@pytest.mark.parametrize("group", ["GROUP_WINDOWS", "GROUP_TOKENS"])
def test_a_document_may_be_in_several_groups(group: str, models: dict[str, str], monkeypatch) -> None:
    encoder = shared_encoder(models["bert"], max_length=16)
    expected = encoder.encode_windows(encoder.cut(TEXTS))
    passages = list(encoder.encode_passages(encoder.cut(TEXTS)))
    monkeypatch.setattr(f"sparse_ingest.models.documents.{group}", 3 if group == "GROUP_WINDOWS" else 50)
    found = encoder.encode_windows(encoder.cut(TEXTS))
    assert found.vectors.token_ids.tolist() == expected.vectors.token_ids.tolist()
    np.testing.assert_allclose(found.vectors.weights, expected.vectors.weights, atol=1e-4)
    assert (found.tokens, found.windows_of.tolist()) == (expected.tokens, expected.windows_of.tolist())
    again = list(encoder.encode_passages(encoder.cut(TEXTS)))
    assert [passage[:2] for passage in again] == [passage[:2] for passage in passages]
    assert [passage.row[0].tolist() for passage in again] == [passage.row[0].tolist() for passage in passages]


def test_a_stride_or_prompt_that_would_skip_text_is_refused(models: dict[str, str]) -> None:
    with pytest.raises(PipelineError, match="window_stride = 62, but a window of max_length = 64 has 61 tokens"):
        tokenizer_of(models["bert"], max_length=64, window_stride=62, document_prompt="fire ")
    assert tokenizer_of(models["bert"], max_length=64, window_stride=61, document_prompt="fire ")
    with pytest.raises(PipelineError, match="2 special tokens and 3 of the prompt 'the fire: ' leave no room .* 6,"):
        tokenizer_of(models["bert"], max_length=5, document_prompt="the fire: ")
    assert tokenizer_of(models["bert"], max_length=6, document_prompt="the fire: ")


# Runs

ROWS: list[dict[str, Any]] = [
    {"_id": "short", "title": "The river", "text": "stone 'x' \"é\"", "year": 7},
    {"_id": "long", "title": "Water (fire)", "text": LONG, "year": 8},
    {"_id": "empty", "text": ""},
    {"_id": "title", "title": LONG, "text": "bird"},
    *({"_id": f"d{place}", "text": " ".join(WORDS[: 3 + place]) * (place % 7)} for place in range(20)),
]


@pytest.fixture
def encode(models: dict[str, str], tmp_path: Path) -> Callable[..., Answer]:
    """Return a function that encodes rows with 16 tokens per window into `out`."""

    def run(overflow: str, *options: object, rows: list = ROWS, out: str = "run") -> Answer:
        corpus = write(tmp_path / f"{out}.jsonl", rows)
        default = [] if "--shard-rows" in options else ["--shard-rows", 5]
        return command("encode", "--model", models["bert"], "--corpus", corpus, "--out", tmp_path / out, *default,
                       "--dtype", "float32", "--device", "cpu", "--max-length", 16,
                       "--set", f"encode.overflow={overflow}", *options)  # fmt: skip

    return run


def test_windows_are_counted_and_part_of_the_identity(encode, tmp_path: Path) -> None:
    answer = encode("windows", "--json")
    report = json.loads(answer.out)
    assert (answer.code, report["rows"], report["truncated"]) == (0, 24, 0)
    run = open_run(tmp_path / "run")
    assert report["windows"] == sum(record["windows"] for record in lasting(run)) > 60
    identity = run.manifest.identity
    assert (identity["overflow"], identity["window_stride"]) == ("windows", None)
    assert f"read in {report['windows']} windows" in encode("windows").out
    assert encode("truncate", out="cut").code == 0
    cut = open_run(tmp_path / "cut")
    assert "window_stride" not in cut.manifest.identity
    assert lasting(cut)[0]["truncated"] == 2 and lasting(cut)[0]["windows"] == 5
    found, expected = documents(run), documents(cut)
    assert found["short"] == expected["short"] and found["long"][2] != expected["long"][2]
    answer = encode("windows", "--set", "encode.window_stride=5")
    assert answer.code == 1 and "window_stride: the run has none, requested: 5" in answer.err
    assert "overflow: the run has 'windows', requested: 'truncate'" in encode("truncate").err


def test_each_window_is_stored_as_a_passage(encode, tmp_path: Path, models: dict[str, str]) -> None:
    answer = encode("passages", "--keep", "year", "--set", "encode.window_stride=14", "--json")
    assert answer.code == 0, answer.err
    report = json.loads(answer.out)
    run = open_run(tmp_path / "run")
    found = documents(run)
    assert (report["rows"], report["windows"], report["truncated"]) == (len(found), len(found), 0)
    assert (run.complete() or {})["rows"] == len(found) > 50
    encoder = shared_encoder(models["bert"], max_length=16, window_stride=14)
    for row, source in enumerate(ROWS):
        title, text = source.get("title", ""), source["text"]
        keys = [key for key in found if key.rpartition("#")[0] == source["_id"]]
        [cut] = encoder.cut([f"{title} {text}" if title else text])
        assert keys == [f"{source['_id']}#{number}" for number in range(cut.windows)]
        assert {found[key][0] for key in keys} == {row}
        carried = [found[key][1] for key in keys]
        assert "".join(fields.pop("text") for fields in carried) == text
        kept: dict[str, Any] = {key: source[key] for key in ("title", "year") if key in source}
        assert all(fields == {**kept, "parent": source["_id"]} for fields in carried)
    assert list(found) == [key for row in range(len(ROWS)) for key in found if found[key][0] == row]
    vectors = encoder.encode([ROWS[1]["title"] + " " + LONG]).vectors
    assert list(found["long#0"][2]) == vectors.token_ids.tolist()
    for shard in run.done_shards():
        for part in read_shard(run.shard_path(shard)):
            for fields, doc_id, digest in zip(part.fields, part.vectors.doc_ids, part.text_hashes, strict=True):
                if doc_id.startswith("d"):
                    assert digest == text_hash(json.loads(fields)["text"])


def test_passages_without_text_have_their_parent(encode, tmp_path: Path) -> None:
    assert encode("passages", "--no-text", "--keep", "text").code == 0
    found = documents(open_run(tmp_path / "run"))
    assert found["long#1"][1] == {"text": LONG, "parent": "long"}
    bare = encode("passages", "--no-text", out="bare")
    assert bare.code == 0 and f" {len(found)} passages, " in bare.out
    assert documents(open_run(tmp_path / "bare"))["long#1"][1] == {"parent": "long"}


def test_options_that_conflict_with_passages_are_refused(encode, tmp_path: Path) -> None:
    for options, message in (
        (["--keep", "parent"], "--keep parent: with overflow"),
        (["--reuse", tmp_path], "--reuse copies the vector of a document"),
        (["--set", "encode.window_stride=15"], "window_stride = 15, but a window of max_length = 16 has 14 tokens"),
    ):
        answer = encode("passages", *options)
        assert answer.code == 2 and message in answer.err and not (tmp_path / "run").exists()


def test_an_id_that_is_too_long_with_its_suffix_is_a_bad_document(encode, tmp_path: Path) -> None:
    rows = [{"_id": "a" * 510, "text": "bird"}, {"_id": "b" * 510, "text": LONG}, {"_id": "c" * 511, "text": ""}, *ROWS]
    answer = encode("passages", rows=rows)
    assert answer.code == 1 and "run.jsonl:2: the id" in answer.err and "has 513 bytes with the suffix" in answer.err
    answer = encode("passages", "--on-bad-document", "skip", rows=[*rows[:3], {"_id": "no text"}, *ROWS], out="skip")
    assert answer.code == 3
    run = open_run(tmp_path / "skip")
    assert [row.row for row in run.skipped(0)] == [1, 2, 3]
    assert (run.done(0) or {})["skipped"] == 3 and "a" * 510 + "#0" in documents(run)
    before = contents(run.path)
    assert (
        encode("passages", "--on-bad-document", "skip", rows=[*rows[:3], {"_id": "no text"}, *ROWS], out="skip").code
        == 3
    )
    assert contents(run.path) == before


def test_all_passages_of_a_duplicate_document_are_removed(encode, tmp_path: Path) -> None:
    rows = [*ROWS, {"_id": "long", "text": LONG + LONG}, {"_id": "last", "text": LONG}]
    answer = encode("passages", rows=rows)
    assert answer.code == 1 and 'run.jsonl:25: duplicate id "long" (first seen at run.jsonl:2).' in answer.err
    assert encode("passages", "--on-bad-document", "skip", rows=rows).code == 3
    run = open_run(tmp_path / "run")
    assert [(row.row, row.reason) for row in run.skipped(4)] == [(24, 'duplicate id "long": first at run.jsonl line 2')]
    found = documents(run)
    assert not [key for key in found if found[key][0] == 24] and [key for key in found if found[key][0] == 25]
    record = run.done(4) or {}
    assert record["rows"] == sum(len(part.rows) for part in read_shard(run.shard_path(4)))


def test_row_groups_of_passages_have_limited_size(encode, tmp_path: Path, monkeypatch) -> None:
    assert encode("passages").code == 0
    before = documents(open_run(tmp_path / "run"))
    for name, limit in (("PART_ROWS", 7), ("WINDOW_BYTES", 2000)):
        monkeypatch.setattr(f"sparse_ingest.encoding.shard_maker.{name}", limit)
        assert encode("passages", "--shard-rows", 30, out=name).code == 0
        run = open_run(tmp_path / name)
        parts = list(read_shard(run.shard_path(0)))
        assert documents(run).keys() == before.keys()
        if name == "PART_ROWS":
            assert {len(part.rows) for part in parts[:-1]} <= set(range(1, 8)) and len(parts) >= len(before) / 7
        else:
            assert all(sum(map(len, part.fields[:-1])) < limit for part in parts) and len(parts) > 3
        monkeypatch.undo()
    assert PART_ROWS == 8192


# Searching


def test_collapse_finds_the_best_passage_of_each_document(
    encode, tmp_path: Path, opensearch_url: str, index_name: str
) -> None:
    assert encode("passages").code == 0
    run, connection = open_run(tmp_path / "run"), Connection(url=opensearch_url)
    load(run.path, index=index_name, pipeline=Pipeline(), connection=connection)
    client = connect(connection)
    for weights in ({"river": 1.0, "bird": 2.0}, {"lamp": 3.0, "stone": 0.5, "fire": 1.5}, {"ü": 1.0, "the": 1.0}):
        every = search_run(run, weights, size=1000, stored=True)
        best: dict[str, float] = {}
        for hit in every:
            best.setdefault(hit.fields["parent"], hit.score)
        assert len(best) < len(every)
        for size in (3, 500):
            expected = list(best.values())[:size]
            for hits in (
                search_index(client, index_name, weights, size=size, collapse="parent"),
                search_run(run, weights, size=size, stored=True, collapse="parent"),
            ):
                parents = [hit.fields["parent"] for hit in hits]
                assert len(set(parents)) == len(hits) == min(size, len(best))
                assert [hit.score for hit in hits] == expected == [best[parent] for parent in parents]
                assert [hit.rank for hit in hits] == list(range(1, len(hits) + 1))


def test_documents_without_the_collapse_field_are_one_group(
    tmp_path: Path, opensearch_url: str, index_name: str
) -> None:
    run = make_run(
        tmp_path / "run", {name: {"river": weight} for name, weight in zip("abc", (1.0, 3.0, 2.0), strict=True)}
    )
    connection = Connection(url=opensearch_url)
    load(run.path, index=index_name, pipeline=Pipeline(), connection=connection)
    client = connect(connection)
    for hits in (
        search_index(client, index_name, {"river": 1.0}, size=5, collapse="parent"),
        search_run(run, {"river": 1.0}, size=5, collapse="parent"),
    ):
        assert [hit.doc_id for hit in hits] == ["b"]
    with pytest.raises(UsageError, match="does not map the field 'nothing' of collapse"):
        search_index(client, index_name, {"river": 1.0}, size=5, collapse="nothing")


def test_collapse_is_in_both_bodies_if_requested() -> None:
    for body in (neural_sparse_body, rank_feature_body):
        assert body({"river": 1.0}, field="sparse", size=2, collapse="parent")["collapse"] == {"field": "parent"}
        assert "collapse" not in body({"river": 1.0}, field="sparse", size=2)


def test_collapse_on_the_command_line(encode, tmp_path: Path, models: dict[str, str]) -> None:
    assert encode("passages").code == 0
    answer = command("search", "--run", tmp_path / "run", "river bird", "--collapse", "parent", "-k", 50, "--json")
    parents = [hit["fields"]["parent"] for hit in json.loads(answer.out)["hits"]]
    assert len(parents) == len(set(parents)) > 10
    answer = command("query", "--model", models["bert"], "river", "--collapse", "parent")
    assert json.loads(answer.out)["collapse"] == {"field": "parent"}
