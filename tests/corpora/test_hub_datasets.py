"""Hugging Face datasets as corpora: folders, saved ones, and those of a hub on loopback, by the real library."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.loopback_hub import TOKEN, begin, ended, loopback_hub

from sparse_ingest.corpora.documents import FieldNames
from sparse_ingest.corpora.files import open_corpus
from sparse_ingest.corpora.hub import Named, finding, parse
from sparse_ingest.corpora.sources import START, Corpus, Position
from sparse_ingest.errors import CorpusError, UsageError

ROWS = [{"_id": f"d{n}", "title": "é" * (n % 2), "text": f"river\n{n}", "year": n} for n in range(60)]
README = """---
configs:
- config_name: corpus
  data_files:
  - {split: old, path: "data/*.parquet"}
  - {split: one, path: "data/1.parquet"}
- config_name: queries
  data_files: "queries.parquet"
---
"""
# Prints what each source is, and its rows; or what is wrong.
PROGRAM = """
import json, os, sys
from sparse_ingest.corpora.documents import FieldNames
from sparse_ingest.corpora.files import open_corpus
from sparse_ingest.errors import SparseIngestError
for spec, token in json.loads(sys.argv[1]):
    os.environ.pop("HF_TOKEN", None)
    if token:
        os.environ["HF_TOKEN"] = token
    try:
        corpus = open_corpus(["hf:" + spec], fields=FieldNames(keep=("year",)))
        rows = list(corpus.rows())
        middle = rows[len(rows) // 2][1]
        print(json.dumps([corpus.identity(), [row.document for row, _ in rows], middle,
                          [row.document for row, _ in corpus.rows(middle)]]))
    except SparseIngestError as error:
        print("Error:", error)
"""


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders need no hub, and the library would ask it all the same."""
    from datasets import config
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(config, "HF_HUB_OFFLINE", True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A dataset of two configs; the split `old` has three files of 10 rows in groups of 4."""
    root = tmp_path / "made"
    (root / "data").mkdir(parents=True)
    for part in range(3):
        table = pa.Table.from_pylist(ROWS[part * 10 : part * 10 + 10])
        pq.write_table(
            table, root / "data" / f"{part}.parquet", row_group_size=4, compression="none", use_dictionary=False
        )
    pq.write_table(pa.Table.from_pylist([{"_id": "q", "text": "what"}]), root / "queries.parquet")
    (root / "README.md").write_text(README)
    return root


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    """A dataset of two files of 15 rows."""
    root = tmp_path / "lines"
    root.mkdir()
    for part in range(2):
        jsonl(root / f"{part}.jsonl", ROWS[30 + part * 15 : 45 + part * 15])
    return root


def jsonl(path: Path, rows: Sequence[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def corpus_of(*specs: object, keep: tuple[str, ...] = ("year",), **names: str) -> Corpus:
    return open_corpus([str(spec) for spec in specs], fields=FieldNames(keep=keep, **names))


def documents(corpus: Corpus, start: Position = START) -> list:
    return [(row.row, row.document) for row, _ in corpus.rows(start)]


def test_a_folder_gives_the_documents_of_its_files(folder: Path, lines: Path, tmp_path: Path) -> None:
    expected = documents(corpus_of(jsonl(tmp_path / "all.jsonl", ROWS)))
    both = corpus_of(f"hf:{folder}:corpus:old", f"hf:{lines}")
    assert documents(both) == expected
    sizes = {f"data/{part}.parquet": (folder / "data" / f"{part}.parquet").stat().st_size for part in range(3)}
    assert both.identity()[0] == {"name": "made", "config": "corpus", "split": "old", "files": sizes}
    assert str(folder) not in json.dumps(both.identity())
    rows = [row for row, _ in both.rows()]
    assert (rows[11].file, rows[11].line, rows[31].file, rows[31].line) == (
        "hf:made:corpus:old", 12, "hf:lines:default:train", 2,
    )  # fmt: skip


def test_a_saved_dataset_gives_its_documents(tmp_path: Path) -> None:
    import datasets

    expected = documents(corpus_of(jsonl(tmp_path / "all.jsonl", ROWS)))
    made = datasets.Dataset.from_list(ROWS)
    made.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"a": made.select(range(40)), "b": made.select(range(59, 39, -1))}).save_to_disk(
        tmp_path / "two"
    )
    assert documents(corpus_of(f"hf:{tmp_path}/saved")) == expected
    two = corpus_of(f"hf:{tmp_path}/two:a", f"hf:{tmp_path}/two:b")
    assert [document for _, document in documents(two)] == [
        document for _, document in (*expected[:40], *reversed(expected[40:]))
    ]
    position = [position for _, position in two.rows()][24]
    assert documents(two, position) == documents(two)[25:]
    with pytest.raises(CorpusError, match="the splits there are: a, b"):
        corpus_of(f"hf:{tmp_path}/two")


def test_it_goes_on_at_every_row(folder: Path, lines: Path) -> None:
    corpus = corpus_of(f"hf:{folder}:corpus:old", f"hf:{lines}")
    rows = list(corpus.rows())
    shares = [corpus.share(position) for _, position in rows]
    for place in range(0, 60, 3):
        assert list(corpus.rows(rows[place][1])) == rows[place + 1 :]
    assert shares == sorted(shares) and 0.2 < shares[15] < 0.6


def test_going_on_reads_nothing_before_the_row_group(folder: Path) -> None:
    corpus = corpus_of(f"hf:{folder}:corpus:old")
    rows = list(corpus.rows())
    (folder / "data" / "0.parquet").unlink()
    second = (folder / "data" / "1.parquet").read_bytes()
    groups = pq.ParquetFile(folder / "data" / "1.parquet").metadata
    end = groups.row_group(1).column(0).data_page_offset
    (folder / "data" / "1.parquet").write_bytes(b"PAR1" + b"\xff" * (end - 4) + second[end:])
    following = corpus.rows(rows[14][1])  # in the second group of the second file
    assert [next(following) for _ in range(15)] == rows[15:30]
    with pytest.raises(CorpusError, match="changed while it was read"):
        next(following)


@pytest.mark.parametrize("release", ["without it", "where it does nothing"])
def test_a_library_that_cuts_no_file_loses_no_row(release: str, folder: Path, monkeypatch) -> None:
    import datasets

    if release == "without it":
        monkeypatch.delattr(datasets.IterableDataset, "reshard")
    else:
        monkeypatch.setattr(datasets.IterableDataset, "reshard", lambda self: self)
    corpus = corpus_of(f"hf:{folder}:corpus:old")
    rows = list(corpus.rows())
    for place in (1, 5, 9, 10, 29):
        assert list(corpus.rows(rows[place][1])) == rows[place + 1 :]


@pytest.mark.parametrize(
    ("spec", "fields", "said"),
    [
        ("made", {}, "has 2 configs, and none was named; the configs there are: corpus, queries"),
        ("made:nope", {}, 'has no config "nope"; the configs there are: corpus, queries'),
        ("made:corpus", {}, "has 2 splits, and none was named; the splits there are: old, one"),
        ("made:corpus:test", {}, 'has no split "test"; the splits there are: old, one'),
        ("made:corpus:old", {"text": "body"}, 'no column "body" for the text; the columns there are "_id"'),
        ("made:corpus:one", {"id": "year", "text": "year"}, 'the text in "year" is of type int64'),
        ("empty", {}, "holds no data files that can be read"),
        ("script", {}, "is made by a Python script, which is never run"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_sentence(spec: str, fields: dict, said: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "script").mkdir()
    (tmp_path / "script" / "script.py").write_text("raise SystemExit('it was run')")
    with pytest.raises(CorpusError) as raised:
        list(corpus_of(f"hf:{tmp_path}/{spec}", keep=(), **fields).rows())
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_a_broken_file_is_the_end_with_its_row(lines: Path) -> None:
    broken = lines / "1.jsonl"
    broken.write_text('{"_id": "x", "text": "good", "year": 3}\n{"_id": "y", "te')
    found = []
    with pytest.raises(CorpusError, match=r"hf:lines:default:train cannot be read after row \d+: .*Mend the file"):
        found.extend(corpus_of(f"hf:{lines}").rows())


def test_names_of_datasets(folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a:b@c").mkdir()
    for spec, expected in (
        ("hf:squad", Named("squad", None, None, None)),
        ("hf:o/n@v1.0:c", Named("o/n", "v1.0", "c", None)),
        ("hf:o/n@refs/pr/1:c:s", Named("o/n", "refs/pr/1", "c", "s")),
        ("hf:o/n::s", Named("o/n", None, None, "s")),
        ("hf:a:b@c:x", Named("a:b@c", None, "x", None)),
        (f"hf:{folder}:c:s", Named(str(folder), None, "c", "s")),
    ):
        assert parse(spec) == expected
    for spec in ("hf:", "hf:a@", "hf:a:b:c:d", "hf:/not/there", "hf:./x"):
        with pytest.raises(UsageError, match=r"names no dataset: .*expected hf:NAME"):
            parse(spec)
    with pytest.raises(UsageError, match="--format and --columns are for files"):
        open_corpus(["hf:x"], fields=FieldNames(), format="jsonl")


def test_a_hub_is_asked_and_each_refusal_is_a_sentence(folder: Path, tmp_path: Path) -> None:
    expected = [list(document) for _, document in documents(corpus_of(f"hf:{folder}:corpus:old")) if document]
    cases = [
        ("o/made:corpus:old", None, ""),
        ("o/gated@main:corpus:old", TOKEN, ""),
        ("o/made:corpus:x", None, "the splits there are: old, one"),
        ("o/made@v9:corpus", None, "has no revision 'v9'"),
        ("o/none", None, "No dataset 'o/none'"),
        ("o/gated:corpus:old", None, "is gated, and no token was sent"),
        ("o/made:corpus:old", "hf_wrong", "refuses the token that was sent"),
    ]
    asked = json.dumps([[spec, token] for spec, token, _ in cases])
    with loopback_hub() as hub:
        commits = {name: hub.add(name, folder, dataset=True, gated=name == "o/gated") for name in ("o/made", "o/gated")}
        home = tmp_path / "home"
        _, out, err = ended(begin(PROGRAM, asked, endpoint=hub.url, home=home))
    answers = out.splitlines()
    assert len(answers) == len(cases) and "hf_wrong" not in out + err and "Traceback" not in err, err
    for (spec, _, said), answer in zip(cases, answers, strict=True):
        if said:
            assert answer.startswith("Error: ") and said in answer, answer
            continue
        identity, rows, middle, rest = json.loads(answer)
        name = spec.partition("@")[0].partition(":")[0]
        assert identity == [{"name": name, "config": "corpus", "split": "old", "revision": commits[name]}]
        assert rows == expected and rest == expected[middle[3] :] and middle[3] == 16


def test_offline_no_hub_is_asked() -> None:
    with pytest.raises(
        CorpusError, match=r"No folder 'o/none' here, and the hub is not asked \(HF_HUB_OFFLINE is set\)"
    ):
        corpus_of("hf:o/none")


def test_a_hub_out_of_reach_is_named_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with pytest.raises(CorpusError, match="No folder 'o/none' here, and the hub .* cannot be reached") as found:
        with finding(parse("hf:o/none")):
            raise ConnectionError("no route to https://user:pass@proxy/x?sig=word with hf_secret")
    assert not re.search("hf_secret|pass|word", str(found.value))


def test_a_dot_is_the_folder_it_stands_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert corpus_of("hf:.:corpus:old").identity() == corpus_of(f"hf:{folder}:corpus:old").identity()
