"""More than 200 broken files in all formats: each gives one message with its place, and no row is lost silently."""

import base64
import bz2
import gzip
import io
import json
import lzma
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pyarrow.parquet.encryption
import pytest
from support.forms import PACKED, STREAMED, content_of, packed

from sparse_ingest.corpora.documents import FieldNames
from sparse_ingest.corpora.files import open_corpus
from sparse_ingest.corpora.sources import bad_document
from sparse_ingest.errors import CorpusError

ROWS = [{"_id": f"d{number}", "text": f"the text {number}, {number * 7919 % 1000}"} for number in range(40)]
BAD = 25  # index of the broken row
ANY = -1


class Case(NamedTuple):
    """A broken file.

    `line` is the line in the message: None if it names only the file, ANY for any line. `good` is the number of good
    rows beside one bad row, or None if the file itself is an error.
    """

    name: str
    content: bytes
    line: int | None
    good: int | None = None


JSON_LINES = {
    "cut": b'{"_id": "d25", "text": "the te',
    "no-brace": b'{"_id": "d25", "text": "a"',
    "comma": b'{"_id": "d25", "text": "a",}',
    "single-quotes": b"{'_id': 'd25', 'text': 'a'}",
    "nan": b'{"_id": "d25", "text": "a", "x": NaN}',
    "two": b'{"_id": "d25", "text": "a"}{"_id": "e", "text": "b"}',
    "array": b'["d25", "a"]',
    "latin-1": b'{"_id": "d25", "text": "caf\xe9"}',
    "nul": b'{"_id": "d25", "text": "a\0b"}',
    "tab": b'{"_id": "d25", "text": "a\tb"}',
    "null-id": b'{"_id": null, "text": "a"}',
    "empty-id": b'{"_id": "", "text": "a"}',
    "float-id": b'{"_id": 2.5, "text": "a"}',
    "long-id": b'{"_id": "' + b"d" * 600 + b'", "text": "a"}',
    "no-text": b'{"_id": "d25"}',
    "null-text": b'{"_id": "d25", "text": null}',
    "list-text": b'{"_id": "d25", "text": ["a"]}',
    "surrogate": b'{"_id": "d25", "text": "\\ud800"}',
    "deep": b"[" * 60_000,
    "csv": b"d25,the text",
}
SEPARATED = {
    "few": b'"d25"',
    "many": b'"d25","a","b"',
    "after-quote": b'"d25","a" b',
    "return": b'"d25",a\rb',
    "nul": b'"d25","a\0b"',
    "latin-1": b'"d25","caf\xe9"',
    "empty-id": b'"","a"',
    "long-id": b'"' + b"d" * 600 + b'","a"',
    "other-separator": b'"d25";"a"',
}


def lines_with(content: bytes, line: int, broken: bytes) -> bytes:
    lines = content.splitlines(keepends=True)
    lines[line - 1] = broken + b"\n"
    return b"".join(lines)


def text_cases() -> Iterator[Case]:
    for packing in ("", ".gz", ".zst"):
        plain = content_of(".jsonl", ROWS)
        for what, line in JSON_LINES.items():
            form = f".jsonl{packing}"
            yield Case(f"{what}{form}", packed(form, lines_with(plain, BAD + 1, line)), BAD + 1, len(ROWS) - 1)
        for suffix, separator in ((".csv", b","), (".tsv", b"\t")):
            form, plain = f"{suffix}{packing}", content_of(suffix, ROWS)
            for what, line in SEPARATED.items():
                content = lines_with(plain, BAD + 2, line.replace(b",", separator))
                yield Case(f"{what}{form}", packed(form, content), BAD + 2, len(ROWS) - 1)
            open_quote = lines_with(plain, BAD + 2, b'"d25"' + separator + b'"a')
            # The quote of the next row closes it, so that row is lost too.
            yield Case(f"open-quote{form}", packed(form, open_quote), BAD + 2, len(ROWS) - 2)
            last = lines_with(plain, len(ROWS) + 1, b'"d39"' + separator + b'"a')
            yield Case(f"open-quote-last{form}", packed(form, last), len(ROWS) + 1)
            yield Case(f"cut{form}", packed(form, plain[:-8]), len(ROWS) + 1)
            for what, header in {
                "twice": b'"_id","text","_id"',
                "no-text": b'"_id","body"',
                "no-id": b'"x","text"',
                "latin-1": b'"_id","text","\xe9"',
            }.items():
                content = lines_with(plain, 1, header.replace(b",", separator))
                yield Case(f"header-{what}{form}", packed(form, content), 1)
            yield Case(f"utf-16{form}", packed(form, plain.decode().encode("utf-16")), 1)


def packed_cases() -> Iterator[Case]:
    for form in PACKED:
        complete = content_of(form, ROWS)
        yield Case(f"empty{form}", b"", ANY)
        yield Case(f"half{form}", complete[: len(complete) // 2], ANY)
        yield Case(f"end{form}", complete[:-1], ANY)
        yield Case(f"magic{form}", b"\0\0" + complete[2:], ANY)
        yield Case(f"more{form}", complete + b"more", ANY)
        if form.endswith(".gz"):
            yield Case(f"checksum{form}", complete[:-8] + b"\1\2\3\4" + complete[-4:], ANY)


def _parquet(table: pa.Table) -> bytes:
    stream = io.BytesIO()
    pq.write_table(table, stream, row_group_size=10)
    return stream.getvalue()


def _ipc(new: Callable) -> Callable[[pa.Table], bytes]:
    def write(table: pa.Table) -> bytes:
        stream = io.BytesIO()
        with new(stream, table.schema) as writer:
            writer.write_table(table, max_chunksize=10)
        return stream.getvalue()

    return write


COLUMN_FORMS = {".parquet": _parquet, ".feather": _ipc(pa.ipc.new_file), ".arrows": _ipc(pa.ipc.new_stream)}


def column_cases() -> Iterator[Case]:
    ids, texts = [row["_id"] for row in ROWS], [row["text"] for row in ROWS]

    def with_bad(values: list, bad: object) -> pa.Array:
        return pa.array([*values[:BAD], bad, *values[BAD + 1 :]])

    raw = with_bad([text.encode() for text in texts], b"caf\xe9")
    not_utf8 = pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())
    good_ids, good_texts = pa.array(ids), pa.array(texts)
    bad_rows = {
        "null-id": (with_bad(ids, None), good_texts),
        "empty-id": (with_bad(ids, ""), good_texts),
        "long-id": (with_bad(ids, "é" * 300), good_texts),
        "null-text": (good_ids, with_bad(texts, None)),
        "latin-1": (good_ids, not_utf8),
    }
    bad_files = {
        "list-text": (good_ids, pa.array([[text] for text in texts])),
        "binary-text": (good_ids, raw),
        "number-text": (good_ids, pa.array(range(40))),
        "float-id": (pa.array([0.5] * 40), good_texts),
        "bool-id": (pa.array([True] * 40), good_texts),
    }
    for form, write in COLUMN_FORMS.items():
        for what, columns in bad_rows.items():
            yield Case(f"{what}{form}", write(pa.table(columns, names=["_id", "text"])), BAD + 1, len(ROWS) - 1)
        for what, columns in bad_files.items():
            yield Case(f"{what}{form}", write(pa.table(columns, names=["_id", "text"])), None)
        yield Case(f"no-text{form}", write(pa.table([good_ids, good_texts], names=["_id", "body"])), None)
        yield Case(f"no-id{form}", write(pa.table([good_ids, good_texts], names=["x", "text"])), None)
        complete = write(pa.table([good_ids, good_texts], names=["_id", "text"]))
        yield Case(f"empty{form}", b"", ANY)
        yield Case(f"half{form}", complete[: len(complete) // 2], ANY)
        # The end marker of a stream, 8 bytes, is optional. Cut more than that.
        yield Case(f"end{form}", complete[:-13], ANY)
        yield Case(f"zeros{form}", bytes(len(complete)), ANY)


CASES = {case.name: case for case in (*text_cases(), *packed_cases(), *column_cases())}


def test_there_are_more_than_200_cases_and_some_of_every_format() -> None:
    assert len(CASES) > 200
    for suffix in STREAMED:
        assert sum(suffix in name for name in CASES) > 15


@pytest.mark.parametrize("name", CASES)
def test_a_broken_file_gives_one_message_with_its_place(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    (tmp_path / name).write_bytes(case.content)
    rows, message = [], None
    try:
        for row, _ in open_corpus([str(tmp_path / name)], fields=FieldNames()).rows():
            rows.append(row)
    except CorpusError as error:
        message = str(error)
    bad = [row for row in rows if row.document is None]
    if case.good is None:
        assert message is not None and not bad
    else:
        assert message is None and (len(bad), len(rows) - len(bad)) == (1, case.good)
        message = str(bad_document(bad[0]))
    assert "\n" not in message and 20 < len(message) < 500, message
    assert not re.search(r"Traceback|Exception|<class|object at 0x", message), message
    if case.line is None:
        assert message.startswith(f"{name}: "), message
    elif case.line == ANY:
        assert re.match(rf"{re.escape(str(tmp_path / name))} is damaged or cut off after (line|row) \d+: .", message), (
            message
        )
    else:
        number = f" row {case.line}" if name.endswith((".parquet", ".feather", ".arrows")) else case.line
        assert message.startswith(f"{name}:{number}: "), message


def test_the_rows_before_the_damage_are_read(tmp_path: Path) -> None:
    for form in (".jsonl.gz", ".csv.zst", ".arrows"):
        rows = [{"_id": str(number), "text": json.dumps(number * 7919)} for number in range(30_000)]
        path = tmp_path / f"c{form}"
        complete = content_of(form, rows)
        path.write_bytes(complete[: len(complete) * 3 // 4])
        found = []
        with pytest.raises(CorpusError, match=r"after (line|row) \d+"):
            for row, _ in open_corpus([str(path)], fields=FieldNames()).rows():
                found.append(row.document.id)
        assert len(found) > 10_000
        assert found == [row["_id"] for row in rows[: len(found)]]


@pytest.mark.parametrize(("damaged", "message"), [(slice(0, -3), "ended before"), (slice(0, -8), "CRC")])
def test_damage_right_behind_the_only_row_is_reported(damaged: slice, message: str, tmp_path: Path) -> None:
    content = gzip.compress(b"id,text\n1,a\n")
    rest = b"" if message != "CRC" else b"\0" * 8
    (tmp_path / "c.csv.gz").write_bytes(content[damaged] + rest)
    with pytest.raises(CorpusError, match=f"damaged or cut off after line 2: .*{message}"):
        list(open_corpus([str(tmp_path / "c.csv.gz")], fields=FieldNames()).rows())


LINES = content_of(".jsonl", ROWS)
TABLE = _parquet(pa.table({"_id": ["1"], "text": ["a"]}))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.jsonl.gz", LINES, "is plain text, not gzip. Rename it without .gz, or compress it."),
        ("c.csv.zst", b"id,text\n1,caf\xe9\n", "is plain text, not zstd. Rename it without .zst, or compress it."),
        ("c.jsonl.gz", packed(".zst", LINES), "is zstd, not gzip. Rename it to end in .zst after"),
        ("c.jsonl.zst", packed(".gz", LINES), "is gzip, not zstd. Rename it to end in .gz after"),
        ("c.jsonl.gz", bz2.compress(LINES), "is bzip2, not gzip. Unpack it"),
        ("c.jsonl", packed(".gz", LINES), "is gzip, not plain text. Rename it to end in .gz after"),
        ("c.csv", packed(".zst", LINES), "is zstd, not plain text. Rename it to end in .zst after"),
        ("c.tsv", lzma.compress(LINES), "is xz, not plain text. Unpack it"),
        ("c.jsonl", TABLE, "is Parquet, not plain text. Pass --format parquet, or rename it to end in .parquet."),
        ("c.jsonl.gz", packed(".gz", TABLE), "c.jsonl.gz, decompressed, is Parquet, not plain text. Decompress it"),
        ("c.parquet", LINES, "is plain text, not Parquet. Rename it to end in the suffix of its format"),
        ("c.feather", TABLE, "is Parquet, not Arrow. Pass --format parquet"),
        ("c.arrows", LINES, "is plain text, not Arrow. Rename it"),
        ("c.parquet", b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer, not Parquet. Get the"),
        ("c.jsonl", b"<!DOCTYPE html>\n<p>", "is a web page, not plain text. Download the file itself."),
    ],
)
def test_a_file_whose_content_does_not_match_its_name_is_reported(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=re.escape(message)) as raised:
        list(open_corpus([str(tmp_path / name)], fields=FieldNames()).rows())
    assert "damaged" not in str(raised.value)


def zstd_frame(content: bytes, window: bytes, dictionary: bytes = b"") -> bytes:
    """Return one block in a frame with this byte for the size of its window, and the id of a dictionary."""
    block = (len(content) << 3 | 1).to_bytes(3, "little")
    return b"\x28\xb5\x2f\xfd" + bytes([len(dictionary)]) + window + dictionary + block + content


def encrypted() -> bytes:
    class Keys(pq.encryption.KmsClient):  # type: ignore[misc]
        def wrap_key(self, key_bytes, master_key_identifier):
            return base64.b64encode(key_bytes)

    configuration = pq.encryption.EncryptionConfiguration(footer_key="key", column_keys={"key": ["text"]})
    factory = pq.encryption.CryptoFactory(lambda _: Keys())
    properties = factory.file_encryption_properties(pq.encryption.KmsConnectionConfig(), configuration)
    table, stream = pa.table({"_id": ["1"], "text": ["a"]}), io.BytesIO()
    with pq.ParquetWriter(stream, table.schema, encryption_properties=properties) as writer:
        writer.write_table(table)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "advice"),
    [
        ("c.jsonl.zst", zstd_frame(LINES, b"\xa8"), "Decompress it with zstd -d --long=31."),
        ("c.jsonl.zst", zstd_frame(LINES, b"\x38", b"\7"), "Decompress it with zstd -d -D DICTIONARY."),
        ("c.parquet", encrypted(), "Write it without encryption."),
    ],
)
def test_what_arrow_does_not_read_is_not_called_damaged(tmp_path: Path, name: str, content: bytes, advice: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=rf"{name} cannot be read after (line|row) 0: .*\. {re.escape(advice)}$"):
        list(open_corpus([str(tmp_path / name)], fields=FieldNames()).rows())


def test_compressed_standard_input_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(packed(".gz", LINES)))))
    with pytest.raises(CorpusError, match="Standard input is gzip, not plain text. Decompress it first"):
        list(open_corpus(["-"], fields=FieldNames()).rows())
