"""Find the files of a corpus, and the format of each.

In: the values of `--corpus` (files, folders, globs, addresses, `-`, datasets). Out: a `Corpus` of these files in order.
Of a folder or a glob the files are in byte order of their names, without those that start with `.` or `_` and without
documentation such as README.md; of the folder of a BEIR or MTEB collection only its corpus is read.
"""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from sparse_ingest.corpora.columns import Arrow, Parquet
from sparse_ingest.corpora.contents import ARCHIVE_SUFFIXES, EMPTY, TEXT, UNPACK, advice_for, is_never_read
from sparse_ingest.corpora.documents import FieldNames, needed_columns, without_carried
from sparse_ingest.corpora.hub import hub_source
from sparse_ingest.corpora.hub_names import PREFIX
from sparse_ingest.corpora.sources import ChooseColumns, Corpus, Source
from sparse_ingest.corpora.stored import PACKED, FoundFile, StandardInput, StoredFile, about, is_packed, suffix_of
from sparse_ingest.corpora.text_formats import JsonLines, Quoting, TextTable
from sparse_ingest.errors import CorpusError, UsageError, listed
from sparse_ingest.storage.places import Place, RemotePath, place_of

FORMATS = ("jsonl", "csv", "tsv", "msmarco", "parquet", "arrow")
FORMAT_OF_SUFFIX = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".arrows": "arrow",
    ".feather": "arrow",
}

_TEXT_TABLES = ("csv", "tsv", "msmarco")
_MSMARCO = "collection.tsv"  # MS MARCO's passages: two columns, no header, no quotes
_DOCUMENTATION = re.compile(
    r"(readme|licen[cs]e|notice|copying|changelog|citation|contributing)(\.(md|txt|rst|cff|bib|html))?|.*\.md",
    re.IGNORECASE,
)
_SPREADSHEETS = (".xlsx", ".xls", ".ods")
_LISTED = 3  # names in a message
_BEIR_CORPUS = ("corpus.jsonl", *(f"corpus.jsonl{packed}" for packed in PACKED), "corpus.parquet")
_MTEB_CORPUS = "corpus"  # a folder


def open_corpus(
    specs: Sequence[str],
    *,
    fields: FieldNames,
    format: str | None = None,
    columns: Sequence[str] | None = None,
    quoting: Quoting | None = None,
) -> Corpus:
    """Find the files that `specs` name, in order. Nothing is read yet.

    Args:
        specs: files, folders, globs, `-` for standard input, or `hf:` datasets (hub.py).
        fields: which columns make a document.
        format: one of `FORMATS`, for every file; None: by the suffix of each file.
        columns: the names of the columns of csv and tsv files without a header.
        quoting: "none" if quotes are plain characters in csv and tsv files; None: "rfc4180".
    """
    _check_options(specs, format, columns)
    fields = without_carried(fields)
    notes: list[str] = []
    try:
        found = [(spec, [] if spec.startswith(PREFIX) else _files_of(spec, format, notes)) for spec in specs]
    except OSError as error:
        raise CorpusError(f"{error.filename} cannot be read: {error.strerror}. Check its permissions.") from error
    choose = partial(needed_columns, fields=fields)
    names = Counter(file.name for _, files in found for file in files)
    sources: list[Source] = []
    for spec, files in found:
        if spec.startswith(PREFIX):
            sources.append(hub_source(spec, choose, source_of, quoting, notes))
        for file in files:
            # The name if it is unique: positions are then the same on every machine and in every folder.
            label = file.name if names[file.name] == 1 else file.place
            sources.append(source_of(file, choose, label=label, format=format, columns=columns, quoting=quoting))
    return Corpus(tuple(sources), fields, tuple(notes))


def _check_options(specs: Sequence[str], format: str | None, columns: Sequence[str] | None) -> None:
    if format is not None and format not in FORMATS:
        raise UsageError(f'The format "{format}" is unknown; expected one of {", ".join(FORMATS)}.')
    if not all(specs):
        raise UsageError("--corpus is an empty string. Is a shell variable unset? Name a file, a folder, or -")
    if (format or columns) and (hub := [spec for spec in specs if spec.startswith(PREFIX)]):
        raise UsageError(f"--format and --columns are for files; {hub[0]} has its own. Omit them.")
    if specs.count("-") > 1:
        raise UsageError("Standard input (-) is given more than once, but can be read only once. Give it once.")
    if columns is not None and (not all(columns) or len(set(columns)) < len(columns)):
        raise UsageError(f'The columns "{",".join(columns)}" have an empty or a duplicate name.')


def source_of(
    file: StoredFile,
    choose: ChooseColumns,
    *,
    label: str,
    format: str | None = None,
    columns: Sequence[str] | None = None,
    quoting: Quoting | None = None,
) -> Source:
    """Return a file as a source. The default format follows from the suffix; standard input is JSON lines."""
    format = format or ("jsonl" if file.bytes is None else _format_of(file.name))
    if format is None:
        raise _unclear(file)
    if columns is not None and format not in _TEXT_TABLES:
        raise UsageError(f"--columns is for {', '.join(_TEXT_TABLES)}; {file.place} is {format}. Omit --columns.")
    if quoting is not None and format not in ("csv", "tsv"):
        raise UsageError(f"--quoting {quoting} is for csv and tsv; {file.place} is {format}. Omit --quoting.")
    if format == "jsonl":
        return JsonLines(file, label)
    if format in _TEXT_TABLES:
        return TextTable(file, label, choose, format=format, columns=columns, quoting=quoting)
    if format == "arrow":
        return Arrow(file, label, choose)
    if file.bytes is None or is_packed(file.name):
        raise CorpusError(
            f"{file.place} cannot be read as Parquet from a pipe or a compressed file. Unpack it to a file."
        )
    return Parquet(file, label, choose)


def _format_of(name: str) -> str | None:
    """Return the format of a file by its name; None if that is unknown."""
    if name.lower() in (_MSMARCO, *(f"{_MSMARCO}{packed}" for packed in PACKED)):
        return "msmarco"
    return FORMAT_OF_SUFFIX.get(suffix_of(name))


def _unclear(file: StoredFile, advice: str | None = None) -> CorpusError:
    """Return the error for a file of unknown format; the default advice depends on its content."""
    kind, suffix = file.kind(), suffix_of(file.name)
    if suffix in _SPREADSHEETS:
        advice = advice or "Export it as csv."
    if file.name.lower().endswith(ARCHIVE_SUFFIXES) or is_never_read(kind):
        what = kind if is_never_read(kind) else "an archive by its name"
        advice = advice or f"{advice_for(kind) if kind and is_never_read(kind) else UNPACK}."
        return CorpusError(f'"{file.place}" is not read: it is {what}, which is not a corpus format. {advice}')
    found = f'unknown suffix "{suffix}"' if suffix else "no suffix"
    known = f"{', '.join(FORMAT_OF_SUFFIX)}, each but .parquet also {' or '.join(PACKED)}"
    advice = advice or _advice(file.name, kind, suffix)
    return CorpusError(f'The format of "{file.place}" is unclear: {found}; expected {known}. {advice}')


def _advice(name: str, kind: str | None, suffix: str) -> str:
    if suffix == ".json":
        return "If it has one JSON object per line, pass --format jsonl."
    if _DOCUMENTATION.fullmatch(name):
        return "It seems to be documentation: omit it."
    if is_packed(name) or kind == TEXT:
        return "Pass --format."
    if kind == EMPTY:
        return "It is empty: omit it."
    return f"It is {kind}. {advice_for(kind)}." if kind else "It is neither text, Parquet nor Arrow: omit it."


# Which files


def _files_of(spec: str, format: str | None, notes: list[str]) -> list[StoredFile]:
    """Return the files that a spec names; add a message about skipped files of a folder to `notes`."""
    if spec == "-":
        return [StandardInput()]
    place = place_of(spec)
    found = about(place)
    if found and found["type"] == "directory":
        return _data_among(_corpus_in(place), format, notes, root=place)
    listable = isinstance(place, Path) or place.listable
    if found is None and listable and any(sign in str(place) for sign in "*?["):
        matching = _matching(place)
        if not matching:
            raise CorpusError(f'No file matches the glob "{place}". Check the folder and the suffix.')
        parts = str(place).split("/")
        fixed = next(number for number, part in enumerate(parts) if any(sign in part for sign in "*?["))
        return _data_among(matching, format, notes, root=place_of("/".join(parts[:fixed]) or "."), fixed=fixed)
    return [FoundFile.found(place)]


def _data_among(
    places: Sequence[Place], format: str | None, notes: list[str], *, root: Place, fixed: int = -1
) -> list[StoredFile]:
    """Return the data files of a folder or a glob below `root`, in order.

    Markers of other programs (`_SUCCESS`, `_temporary/`, `.crc`) and documentation (README.md, LICENSE) are skipped if
    other files exist. A file of unknown format among known ones may have data: it is an error. The first `fixed` parts
    of each path are those of the glob; of a folder's files only the name counts.
    """

    def is_marker(place: Place) -> bool:
        return place.name.endswith(".crc") or any(part.startswith("_") for part in str(place).split("/")[fixed:])

    plain = [place for place in places if not is_marker(place)] or places
    data = [place for place in plain if not _DOCUMENTATION.fullmatch(place.name)] or plain
    read = set(map(str, data))
    left = [place.name for place in places if str(place) not in read and not place.name.endswith(".crc")]
    if missed := [name for name in left if not name.startswith("_") or _format_of(name)]:
        names = [place.name for place in data]
        notes.append(
            f"Skipped: {listed(missed, _LISTED)}. Read: {listed(names, _LISTED)}. To read a skipped file, name it."
        )
    if (root / "_delta_log").is_dir():
        notes.append(
            f"{root} is a Delta Lake table: rows that were changed or deleted are read too, from files of earlier "
            "versions. If there are any, export the current version."
        )
    files: list[StoredFile] = [FoundFile.found(place) for place in data]
    unknown = [] if format else [file for file in files if _format_of(file.name) is None]
    archives = [file for file in unknown if file.name.lower().endswith(ARCHIVE_SUFFIXES)]
    if archives or 0 < len(unknown) < len(files):
        known = next((file for file in files if _format_of(file.name)), None)
        advice = UNPACK
        if known:
            such = f"{data[0].parent}/*{Path(known.name).suffix}"
            advice = f"{'Unpack it, or name' if archives else 'Name'} the files to read, as with the glob {such}"
        raise _unclear([*archives, *unknown][0], f"{advice}.")
    return files


def _corpus_in(folder: Place) -> list[Place]:
    """Return the corpus of a folder: a file named corpus, the files of a folder named corpus, or all files."""
    names = _shown_names(folder)
    beir = [name for name in names if name.lower() in _BEIR_CORPUS]
    mteb = []
    if _MTEB_CORPUS in names and (folder / _MTEB_CORPUS).is_dir():
        mteb = [f"{_MTEB_CORPUS}/{name}" for name in _shown_names(folder / _MTEB_CORPUS)]
    if len(beir) + bool(mteb) > 1:
        found = " and ".join([*beir, *([_MTEB_CORPUS] if mteb else [])])
        raise CorpusError(f'"{folder}" has both {found}. Name one of them.')
    if not names:
        raise CorpusError(f'The folder "{folder}" has no files. Name the files, or another folder.')
    return [folder / name for name in sorted(beir or mteb or names, key=os.fsencode)]


def _shown_names(folder: Place) -> list[str]:
    return [path.name for path in folder.iterdir() if not path.name.startswith(".")]


def _matching(place: Place) -> list[Place]:
    if isinstance(place, RemotePath):
        return [path for path in place.matching() if not path.name.startswith(".")]
    # Path.glob gives hidden files, and refuses an absolute pattern.
    return [Path(match) for match in sorted(glob.glob(str(place), recursive=True), key=os.fsencode)]  # noqa: PTH207
