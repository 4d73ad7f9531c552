"""Hugging Face datasets as corpora, read by the datasets library: folders, saved datasets, and a hub on loopback."""

from __future__ import annotations

import bz2
import errno
import gzip
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from support.loopback_hub import TOKEN, begin, ended, loopback_hub
from support.planned_starts import assert_same
from support.stores import web_server

from sparse_ingest.corpora.documents import FieldNames
from sparse_ingest.corpora.files import open_corpus
from sparse_ingest.corpora.hub_names import Named, finding, parse
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
# Prints the identity and the rows of each source, or its error.
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
    """Set HF_HUB_OFFLINE: otherwise the library calls the hub even for a local folder."""
    from datasets import config
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(config, "HF_HUB_OFFLINE", True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A dataset with two configs. The split `old` has three files of 10 rows, in row groups of 4."""
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


def test_files_of_a_format_that_the_library_skips_are_reported(tmp_path: Path) -> None:
    for name in ("a.csv", "b.csv", ".git/d.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"_id,text\n{name},a\n")
    jsonl(tmp_path / "c.json", ROWS[:2])
    corpus = corpus_of(f"hf:{tmp_path}", keep=())
    assert len(list(corpus.rows())) == 2
    assert corpus.notes == (
        f"Skipped in hf:{tmp_path.name}:default:train: c.json. The datasets library does not read them as part of it. "
        "To read them, name the files without hf:.",
    )
    readme = "---\nconfigs:\n- config_name: default\n  data_files: a.csv\n---\n"
    (tmp_path / "README.md").write_text(readme)
    assert corpus_of(f"hf:{tmp_path}", keep=()).notes == ()


def test_a_saved_dataset_gives_its_documents(tmp_path: Path) -> None:
    expected = documents(corpus_of(jsonl(tmp_path / "all.jsonl", ROWS)))
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"a": dataset.select(range(40)), "b": dataset.select(range(59, 39, -1))}).save_to_disk(
        tmp_path / "two"
    )
    assert documents(corpus_of(f"hf:{tmp_path}/saved")) == expected
    two = corpus_of(f"hf:{tmp_path}/two:a", f"hf:{tmp_path}/two:b")
    assert [document for _, document in documents(two)] == [
        document for _, document in (*expected[:40], *reversed(expected[40:]))
    ]
    position = [position for _, position in two.rows()][24]
    assert documents(two, position) == documents(two)[25:]
    with pytest.raises(CorpusError, match="available splits: a, b"):
        corpus_of(f"hf:{tmp_path}/two")


def test_reading_resumes_at_any_row(folder: Path, lines: Path) -> None:
    corpus = corpus_of(f"hf:{folder}:corpus:old", f"hf:{lines}")
    rows = list(corpus.rows())
    shares = [corpus.share(position) for _, position in rows]
    for place in range(0, 60, 3):
        assert list(corpus.rows(rows[place][1])) == rows[place + 1 :]
    assert shares == sorted(shares) and 0.2 < shares[15] < 0.6


@pytest.mark.parametrize(("shard_rows", "limit"), [(5, None), (3, 41), (10, 30)])
def test_the_starts_of_shards_are_those_of_a_walk(
    folder: Path, lines: Path, tmp_path: Path, shard_rows: int, limit: int | None
) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    assert_same(corpus_of(f"hf:{folder}:corpus:old", f"hf:{tmp_path}/saved", f"hf:{lines}"), shard_rows, limit)


def test_shards_in_a_data_file_that_is_read_from_its_start_are_one_group(folder: Path, lines: Path) -> None:
    parquet_files = assert_same(corpus_of(f"hf:{folder}:corpus:old"), 2)
    assert parquet_files and max(map(len, parquet_files.groups)) == 2  # row groups of 4 rows
    found = assert_same(corpus_of(f"hf:{lines}"), 5)
    assert found and found.groups == [range(3), range(3, 6)]


def test_resuming_reads_nothing_before_the_row_group(folder: Path) -> None:
    corpus = corpus_of(f"hf:{folder}:corpus:old")
    rows = list(corpus.rows())
    (folder / "data" / "0.parquet").unlink()
    second = (folder / "data" / "1.parquet").read_bytes()
    groups = pq.ParquetFile(folder / "data" / "1.parquet").metadata
    end = groups.row_group(1).column(0).data_page_offset
    (folder / "data" / "1.parquet").write_bytes(b"PAR1" + b"\xff" * (end - 4) + second[end:])
    following = corpus.rows(rows[14][1])  # in the second row group of the second file
    assert [next(following) for _ in range(15)] == rows[15:30]
    with pytest.raises(CorpusError, match="changed while it was read"):
        next(following)


@pytest.mark.parametrize(
    ("spec", "fields", "message"),
    [
        ("made", {}, "has 2 configs, and none was named; available configs: corpus, queries"),
        ("made:nope", {}, 'has no config "nope"; available configs: corpus, queries'),
        ("made:corpus", {}, "has 2 splits, and none was named; available splits: old, one"),
        ("made:corpus:test", {}, 'has no split "test"; available splits: old, one'),
        ("made:corpus:old", {"text": "body"}, 'no column "body" for the text; the columns are "_id"'),
        ("made:corpus:one", {"id": "year", "text": "year"}, 'the text in "year" is of type int64'),
        ("empty", {}, "has no data files that can be read"),
        ("script", {}, "is built by a Python script, which is never run"),
    ],
)  # fmt: skip
def test_each_error_is_one_message(spec: str, fields: dict, message: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "script").mkdir()
    (tmp_path / "script" / "script.py").write_text("raise SystemExit('it was run')")
    with pytest.raises(CorpusError) as raised:
        list(corpus_of(f"hf:{tmp_path}/{spec}", keep=(), **fields).rows())
    assert message in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("path", ["{}/else.jsonl", "../else.jsonl", "file://{}/else.jsonl", "{url}/else.jsonl"])
def test_data_files_outside_the_folder_are_refused(path: str, tmp_path: Path) -> None:
    (tmp_path / "else.jsonl").write_text('{"_id": "1", "text": "of another folder"}\n')
    folder = tmp_path / "dataset"
    folder.mkdir()
    with web_server(tmp_path) as url, pytest.raises(CorpusError, match="names a data file outside of it"):
        files = json.dumps([{"split": "train", "path": path.format(tmp_path, url=url)}])
        (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files: {files}\n---\n")
        open_corpus([f"hf:{folder}"], fields=FieldNames())


def test_a_broken_line_is_a_bad_row_with_its_file_name(lines: Path) -> None:
    (lines / "1.jsonl").write_text('{"_id": "x", "text": "good", "year": 3}\n{"_id": "y", "te')
    *good, bad = [row for row, _ in corpus_of(f"hf:{lines}").rows()]
    assert (len(good), bad.place) == (16, "hf:lines:default:train: row 17")
    assert bad.reason.startswith("broken JSON at column 14: ") and bad.reason.endswith(" (in 1.jsonl)")


# The same rows, read as files and with hf:

TRICKY = [
    {"id": "007", "title": "NA", "text": "null", "kept": "2020-01-02"},
    {"id": "0042", "title": "None", "text": "NA", "kept": "1.0"},
    {"id": "1e3", "title": "", "text": "", "kept": "true"},
    {"id": "x1", "title": "nan", "text": 'a "b"', "kept": ""},
]


def separated(separator: str) -> str:
    quoted = ['"' + value.replace('"', '""') + '"' for row in TRICKY for value in row.values()]
    return "\n".join([separator.join(TRICKY[0]), *(separator.join(quoted[i : i + 4]) for i in range(0, 16, 4))]) + "\n"


def parquet(path: Path, rows: list[dict]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path)


def arrow(path: Path, rows: list[dict]) -> None:
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)


WRITERS = {
    "c.csv": lambda path: path.write_text(separated(",")),
    "c.tsv": lambda path: path.write_text(separated("\t")),
    "c.csv.gz": lambda path: path.write_bytes(gzip.compress(separated(",").encode())),
    "c.jsonl": lambda path: jsonl(path, TRICKY),
    "c.json": lambda path: jsonl(path, TRICKY),
    "c.parquet": lambda path: parquet(path, TRICKY),
    "c.arrow": lambda path: arrow(path, TRICKY),
}


@pytest.mark.parametrize("name", WRITERS)
def test_files_and_hf_give_the_same_documents(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "made"
    folder.mkdir()
    WRITERS[name](folder / name)
    (folder / "README.md").write_text("---\ndataset_info:\n  features:\n  - {name: id, dtype: int64}\n---\n")
    keep = {"keep": ("kept",), "id": "id"}
    expected = documents(corpus_of(jsonl(tmp_path / "all.jsonl", TRICKY), **keep))
    corpus = corpus_of(f"hf:{folder}", **keep)
    assert documents(corpus) == expected
    assert_same(corpus, 1)
    format = "jsonl" if name == "c.json" else None
    assert documents(open_corpus([str(folder / name)], fields=FieldNames(**keep), format=format)) == expected


# Read only by the library: dataset settings, archives, and JSON that is not one object per line.


def archive(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as opened:
        opened.writestr("in/c.csv", separated(","))


@pytest.mark.parametrize(
    ("name", "write", "settings"),
    [
        ("c.csv", lambda path: path.write_text(separated(";"), "latin-1"), '  sep: ";"\n  encoding: latin-1\n'),
        ("c.zip", archive, ""),
        ("c.csv.bz2", lambda path: path.write_bytes(bz2.compress(separated(",").encode())), ""),
        ("c.json", lambda path: path.write_text(json.dumps(TRICKY, indent=1)), ""),
    ],
)
def test_values_are_not_converted_in_other_formats(tmp_path: Path, name: str, write, settings: str) -> None:
    folder = tmp_path / "made"
    folder.mkdir()
    write(folder / name)
    (folder / "README.md").write_text(f'---\nconfigs:\n- config_name: default\n  data_files: "{name}"\n{settings}---\n')
    expected = documents(corpus_of(jsonl(tmp_path / "all.jsonl", TRICKY), keep=("kept",)))
    corpus = corpus_of(f"hf:{folder}", keep=("kept",))
    assert documents(corpus) == expected
    positions = [position for _, position in corpus.rows()]
    assert documents(corpus, positions[1]) == expected[2:]
    assert_same(corpus, 1)


def test_ids_and_fields_of_mixed_types_in_json_lines_are_kept(tmp_path: Path) -> None:
    rows = [{"_id": 1, "text": "a", "kept": {"x": 1}}, {"_id": "2", "text": "b", "kept": {"y": "s"}}]
    rows += [{"_id": "3", "text": "c", "kept": "2020-01-02T00:00:00"}, {"_id": "4", "text": "d"}]
    (tmp_path / "made").mkdir()
    path = jsonl(tmp_path / "made" / "c.jsonl", rows)
    expected = documents(corpus_of(path, keep=("kept",)))
    assert documents(corpus_of(f"hf:{tmp_path / 'made'}", keep=("kept",))) == expected
    assert [document.id for _, document in expected] == ["1", "2", "3", "4"]


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
def test_files_with_different_columns_are_reported_with_their_columns(tmp_path: Path, suffix: str) -> None:
    tables = {"a": {"id": "1", "text": "x"}, "b": {"id": "2", "title": "y", "body": "z"}}
    write = {
        ".csv": lambda path, row: path.write_text(f"{','.join(row)}\n{','.join(row.values())}\n"),
        ".parquet": lambda path, row: parquet(path, [row]),
        ".jsonl": lambda path, row: jsonl(path, [row]),
    }[suffix]
    for name, row in tables.items():
        write(tmp_path / f"{name}{suffix}", row)
    corpus = corpus_of(f"hf:{tmp_path}", keep=())
    missing = 'no column "text" for the text; the columns are "id", "title", "body"; name another with --text-field'
    if suffix == ".jsonl":  # rows of JSON lines may differ in columns
        assert [row.reason for row, _ in corpus.rows()] == [None, f"{missing} (in b.jsonl)"]
        return
    assert_same(corpus_of(f"hf:{tmp_path}", keep=()), 1)
    with pytest.raises(CorpusError) as raised:
        list(corpus.rows())
    assert f"(b{suffix})" in str(raised.value)
    advice = "name files, or a config of the dataset, that have the same columns"
    assert str(raised.value).endswith(f'{missing}. In a{suffix} the columns are "id", "text": {advice}')


def test_lone_quotes_are_reported_and_quoting_none_is_only_for_csv_and_tsv(tmp_path: Path, lines: Path) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "c.tsv").write_text('id\ttext\n1\t"a\n2\tb"\n3\tc\n')
    corpus = corpus_of(f"hf:{tmp_path / 'made'}", keep=())
    assert [row.document.id for row, _ in corpus.rows()] == ["1", "3"]
    (message,) = corpus.merged()
    assert message.startswith("hf:made:default:train (c.tsv):2: a quoted value spans 2 lines")
    plain = open_corpus([f"hf:{tmp_path / 'made'}"], fields=FieldNames(), quoting="none")
    assert [row.document.id for row, _ in plain.rows()] == ["1", "2", "3"]
    assert {**plain.identity()[0], "quoting": None} == {**corpus.identity()[0], "quoting": None} != plain.identity()[0]
    with pytest.raises(UsageError, match="--quoting none is for csv and tsv; hf:lines:default:train is json"):
        open_corpus([f"hf:{lines}"], fields=FieldNames(), quoting="none")


def test_dataset_names_are_parsed(folder: Path, tmp_path: Path, monkeypatch) -> None:
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
        with pytest.raises(UsageError, match=r"is not a dataset: .*expected hf:NAME"):
            parse(spec)
    with pytest.raises(UsageError, match="--format and --columns are for files"):
        open_corpus(["hf:x"], fields=FieldNames(), format="jsonl")


def test_datasets_are_read_from_a_hub_and_each_refusal_is_one_message(folder: Path, tmp_path: Path) -> None:
    expected = [list(document) for _, document in documents(corpus_of(f"hf:{folder}:corpus:old")) if document]
    cases = [
        ("o/made:corpus:old", None, ""),
        ("o/gated@main:corpus:old", TOKEN, ""),
        ("o/made:corpus:x", None, "available splits: old, one"),
        ("o/made@v9:corpus", None, "has no revision 'v9'"),
        ("o/none", None, "No dataset 'o/none'"),
        ("o/gated:corpus:old", None, "is gated, and no token was sent"),
        ("o/made:corpus:old", "hf_wrong", "refuses the token that was sent"),
    ]
    arguments = json.dumps([[spec, token] for spec, token, _ in cases])
    with loopback_hub() as hub:
        commits = {name: hub.add(name, folder, dataset=True, gated=name == "o/gated") for name in ("o/made", "o/gated")}
        home = tmp_path / "home"
        _, out, err = ended(begin(PROGRAM, arguments, endpoint=hub.url, home=home))
    answers = out.splitlines()
    assert len(answers) == len(cases) and "hf_wrong" not in out + err and "Traceback" not in err, err
    for (spec, _, message), answer in zip(cases, answers, strict=True):
        if message:
            assert answer.startswith("Error: ") and message in answer, answer
            continue
        identity, rows, middle, rest = json.loads(answer)
        name = spec.partition("@")[0].partition(":")[0]
        assert identity == [{"name": name, "config": "corpus", "split": "old", "revision": commits[name]}]
        assert rows == expected and rest == expected[middle[3] :] and middle[3] == 16


def test_text_files_on_a_hub_give_the_documents_of_a_folder(tmp_path: Path) -> None:
    rows = [{"_id": f"00{number}", "text": "NA", "year": "null"} for number in range(20)]
    jsonl = "".join(f"{json.dumps(row)}\n" for row in rows).encode()
    csv = ("_id,text,year\n" + "".join(f"{','.join(row.values())}\n" for row in rows)).encode()
    contents = {"1.jsonl": jsonl, "1.csv": csv, "1.csv.gz": gzip.compress(csv)}
    with loopback_hub() as hub:
        for name, content in contents.items():
            folder = tmp_path / f"with-{name}"
            folder.mkdir()
            (folder / name).write_bytes(content)
            hub.add(f"o/{name}", folder, dataset=True)
        arguments = json.dumps([[f"o/{name}", None] for name in contents])
        _, out, err = ended(begin(PROGRAM, arguments, endpoint=hub.url, home=tmp_path / "home"))
    for line in out.splitlines():
        _, found, middle, rest = json.loads(line)
        assert [document[0] for document in found] == [row["_id"] for row in rows], err
        assert rest == found[middle[3] :]
    assert len(out.splitlines()) == len(contents), err


def test_offline_no_hub_is_called() -> None:
    with pytest.raises(
        CorpusError, match=r"No folder 'o/none' here, and the hub is not contacted \(HF_HUB_OFFLINE is set\)"
    ):
        corpus_of("hf:o/none")


def test_an_unreachable_hub_is_reported_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with pytest.raises(CorpusError, match="No folder 'o/none' here, and the hub .* cannot be reached") as found:
        with finding(parse("hf:o/none")):
            raise ConnectionError("no route to https://user:pass@proxy/x?sig=word with hf_secret")
    assert not re.search("hf_secret|pass|word", str(found.value))


@pytest.mark.parametrize("path", ["/made/up/file", None])
def test_a_full_disk_is_reported_with_the_path_of_the_cache(path: str | None) -> None:
    place = path or datasets.config.HF_CACHE_HOME
    with pytest.raises(CorpusError, match=f"^{place} cannot be written: No space left on device. .*HF_HOME"):
        with finding(parse("hf:o/none")):
            raise OSError(errno.ENOSPC, "No space left on device", *([path] if path else []))


def test_a_dot_is_the_current_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert corpus_of("hf:.:corpus:old").identity() == corpus_of(f"hf:{folder}:corpus:old").identity()


@pytest.mark.parametrize(
    "name", ["0.parquet", *(pytest.param(one, marks=pytest.mark.slow) for one in ("0.jsonl", "0.csv"))]
)
def test_a_dataset_is_read_without_torch(tmp_path, name):
    (tmp_path / "data").mkdir()
    table = pa.Table.from_pylist([{"id": str(number), "text": "river"} for number in range(1000)])
    if name == "0.parquet":
        pq.write_table(table, tmp_path / "data" / name)
    elif name == "0.csv":
        pa.csv.write_csv(table, tmp_path / "data" / name)
    else:
        (tmp_path / "data" / name).write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    program = """
import sys
from sparse_ingest.corpora.documents import FieldNames
from sparse_ingest.corpora.files import open_corpus
print(len(list(open_corpus([sys.argv[1]], fields=FieldNames()).rows())), "torch" in sys.modules)
"""
    command = [sys.executable, "-c", program, f"hf:{tmp_path}"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "1000 False\n"
