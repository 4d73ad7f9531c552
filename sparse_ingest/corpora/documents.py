"""Rows to documents, for every format: columns in, a `Document` or a `BadRow` out.

The text is title and text joined by one space; empty parts are omitted, nothing is stripped. An id is a non-empty
string or an integer, which is written in decimal. A kept field that a row does not have is omitted; a title of null is
empty. Duplicate ids are not detected.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from json.encoder import encode_basestring
from typing import NoReturn

import orjson

from sparse_ingest.errors import UsageError, listed, shown
from sparse_ingest.records import MAX_ID_BYTES, MAX_LEVELS, Document, refused_name
from sparse_ingest.storage.foreign_json import MAX_DEPTH, is_deep

ROW_NUMBER = ":row"

_INT64 = 1 << 63
JSON_BLANKS = " \t\r\n"
_FLAT = frozenset({str, int, bool, type(None)})  # types of values that orjson reads exactly
_MAX_LISTED = 60  # columns of a row in a message


@dataclass(frozen=True)
class FieldNames:
    """The columns of a document; None: the default name."""

    id: str | None = None
    text: str | None = None
    title: str | None = None
    keep: tuple[str, ...] = ()
    carry_text: bool = True


class BadRow(Exception):
    """A row that is not a document. The text is the reason."""


# Lines to columns


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def utf8(raw: bytes) -> str:
    """Return the text of a line. Raise `BadRow`."""
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise BadRow(not_utf8(error)) from error


def not_utf8(error: UnicodeDecodeError) -> str:
    """Return the reason of a line that is not UTF-8."""
    return f"not UTF-8: byte 0x{error.object[error.start]:02x} at byte {error.start + 1} of the line"


def json_object(raw: bytes) -> dict[str, object] | None:
    """Return the JSON object in a line; None for a blank line. Raise `BadRow`."""
    value = None
    try:
        found = orjson.loads(raw)
        if type(found) is dict:
            if _FLAT.issuperset(map(type, found.values())):
                return found
            value = found if _exact(found.values()) else None
    except (orjson.JSONDecodeError, RecursionError):
        pass
    if value is None:
        value = _json_object(raw)
    if raw.count(b"[") + raw.count(b"{") > MAX_DEPTH and is_deep(value):
        raise BadRow(f"nested more than {MAX_DEPTH} levels deep")
    return value


def _exact(values: Iterable[object]) -> bool:
    """Return whether orjson's numbers are exact: it reads integers of more than 64 bits as floats."""
    for value in values:
        kind = type(value)
        if kind is str:
            continue
        if kind is float and not -_INT64 < value < _INT64:  # type: ignore[operator]
            return False
        if kind is dict and not _exact(value.values()):  # type: ignore[attr-defined]
            return False
        if kind is list and not _exact(value):  # type: ignore[arg-type]
            return False
    return True


def _json_object(raw: bytes) -> dict[str, object] | None:
    """Do the same with Python's parser, at a third of the speed, for exact numbers and messages."""
    # Decoded here: json.loads of bytes accepts surrogates.
    text = utf8(raw).strip(JSON_BLANKS)
    if not text:
        return None
    try:
        value, end = _DECODER.raw_decode(text)
    except json.JSONDecodeError as error:
        column = error.pos + 1 + len(raw) - len(raw.lstrip(JSON_BLANKS.encode()))
        raise BadRow(f"broken JSON at column {column}: {error.msg}") from error
    except RecursionError as error:
        raise BadRow(f"nested more than {MAX_DEPTH} levels deep") from error
    except ValueError as error:  # NaN, or an integer with too many digits
        raise BadRow(f"broken JSON: {str(error).partition(';')[0]}") from error
    if end != len(text):
        raise BadRow(f"broken JSON: something follows the first value, {shown(text[end:].lstrip(JSON_BLANKS))}")
    if not isinstance(value, dict):
        raise BadRow(f"expected a JSON object, found {shown(value)}")
    return value


# Columns to documents: the same for every format

encode_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def document_of(columns: Mapping[str, object], fields: FieldNames, row: int, *, plain: bool = False) -> Document:
    """Return the document of a row. Raise `BadRow`.

    `plain`: no string of the row needs an escape in JSON (quote, backslash, control character, half a surrogate pair).
    """
    # Fast checks; the functions find out what is wrong.
    doc_id = str(row) if fields.id == ROW_NUMBER else columns.get(fields.id or "_id")
    if type(doc_id) is not str or not 0 < len(doc_id) <= MAX_ID_BYTES or not doc_id.isascii():
        doc_id = id_in(columns, fields.id)
    text = columns.get(fields.text or "text")
    if type(text) is not str:
        text = text_in(columns, fields.text)
    title = columns.get(fields.title or "title")
    if type(title) is not str:
        title = _title_in(columns, fields.title)
    joined = f"{title} {text}" if title and text else title or text
    if not fields.carry_text:
        carried = "{}"
        if not plain and not joined.isascii():
            _check_unicode(joined)
    elif plain:
        carried = f'{{"title":"{title}","text":"{text}"}}' if title else f'{{"text":"{text}"}}'
    else:
        try:
            carried = orjson.dumps({"title": title, "text": text} if title else {"text": text}).decode()
        except orjson.JSONEncodeError:  # which a string has for one reason
            _check_unicode(joined)
            raise
    if fields.keep and (kept := [_kept(name, columns[name]) for name in fields.keep if name in columns]):
        carried = f"{carried[:-1]}{',' if fields.carry_text else ''}{','.join(kept)}}}"
    return tuple.__new__(Document, (doc_id, joined, carried))  # takes half the time of Document(...)


def _kept(name: str, value: object) -> str:
    try:
        kept = f"{encode_basestring(name)}:{encode_json(value)}"
        levels = _list_levels(value) if kept.count("[") > MAX_LEVELS else 0
    except (ValueError, RecursionError) as error:  # beyond float64
        raise BadRow(f"the kept field {shown(name)} cannot be written as JSON again: {shown(value)}") from error
    if not kept.isascii():
        _check_unicode(kept, f"the kept field {shown(name)}")
    if levels > MAX_LEVELS:
        raise BadRow(f"the kept field {shown(name)} has lists in more than {MAX_LEVELS} levels, which clusters refuse")
    return kept


def _list_levels(value: object) -> int:
    return 1 + max(map(_list_levels, value), default=0) if isinstance(value, list) else 0


def require(name: str, columns: Mapping[str, object], purpose: str = "", advice: str = "") -> None:
    """Raise `BadRow`, which lists the columns, if one is missing."""
    if name not in columns:
        raise BadRow(f"no column {shown(name)}{purpose}; {columns_text(columns)}{advice}")


def id_in(columns: Mapping[str, object], name: str | None) -> str:
    """Return the id in the column `name`; None: in `_id`, else in `id`. Raise `BadRow`."""
    if name is None:
        name = "_id" if "_id" in columns else "id"
        if name not in columns:
            raise BadRow(f'no column "_id" or "id"; {columns_text(columns)}; name another with --id-field')
    require(name, columns, " for the id")
    value = columns[name]
    if type(value) is int:  # not isinstance: True is an int there
        value = str(value)
    if not isinstance(value, str) or not value:
        expected = "expected a non-empty string or an integer"
        raise BadRow(f"the id in {shown(name)} is {shown(value)}; {expected}")
    if not value.isascii():
        _check_unicode(value, f"the id {shown(value)}")
    if len(value) > MAX_ID_BYTES // 4 and (size := len(value.encode())) > MAX_ID_BYTES:
        raise BadRow(f"the id {shown(value)} has {size} bytes; expected at most {MAX_ID_BYTES}")
    return value


def text_in(columns: Mapping[str, object], name: str | None, role: str = "text") -> str:
    """Return the string in the column `name`; None: in the column of its role. Raise `BadRow`."""
    value = columns.get(name or role)
    if isinstance(value, str):
        return value
    require(name or role, columns, f" for the {role}", f"; name another with --{role}-field" if name is None else "")
    raise BadRow(f"the {role} in {shown(name or role)} is {shown(value)}; a string was expected")


def _title_in(columns: Mapping[str, object], name: str | None) -> str:
    if columns.get(name or "title") is None and (name is None or name in columns):
        return ""
    return text_in(columns, name, "title")


def needed_columns(names: Sequence[str], fields: FieldNames) -> dict[str, str]:
    """Return the columns of a table that documents need, each with its role: id, text, title or kept field.

    Raise `BadRow` if one is missing, also a kept field, or repeated.
    """
    # Values that pass every check.
    columns = dict.fromkeys(names, "1")
    for name in fields.keep:
        require(name, columns, " to keep")
    roles = dict.fromkeys(fields.keep, "kept field")
    _title_in(columns, fields.title)
    if (title := fields.title or "title") in columns:
        roles[title] = "title"
    if fields.id != ROW_NUMBER:
        id_in(columns, fields.id)
        roles[fields.id or ("_id" if "_id" in columns else "id")] = "id"
    text_in(columns, fields.text)
    roles[fields.text or "text"] = "text"
    refuse_repeated(names, roles)
    return {name: roles[name] for name in names if name in roles}


def refuse_repeated(names: Sequence[str], chosen: Iterable[str]) -> None:
    """Raise `BadRow` if the table has one of these columns more than once."""
    for name in chosen:
        if (times := names.count(name)) > 1:
            raise BadRow(f"{times} columns are named {shown(name)}; expected one")


def without_carried(fields: FieldNames) -> FieldNames:
    """Return the names without kept columns that are carried anyway. Raise UsageError if clusters refuse one."""
    kept = dict.fromkeys(fields.keep)
    if refused := [f"{shown(name)} ({reason})" for name in kept if (reason := refused_name(name)) is not None]:
        raise UsageError(
            f"--keep: clusters refuse documents with a field {', '.join(refused)}. Omit it, or rename the column."
        )
    sources = {"title": fields.title or "title", "text": fields.text or "text"} if fields.carry_text else {}
    for name, source in sources.items():
        if name in kept and source != name:
            raise UsageError(
                f'--keep {name}: the {name} is read from "{source}" and stored as "{name}". '
                f"Omit --keep {name}, or pass --no-text to store neither title nor text."
            )
        kept.pop(name, None)
    return replace(fields, keep=tuple(kept))


# Messages


def _check_unicode(text: str, what: str = "the title or text") -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise BadRow(f"{what} has {half}, half of a surrogate pair, which is not a character") from error


def columns_text(columns: Mapping[str, object]) -> str:
    """Return the names of columns for a message."""
    if not columns:
        return "the row has no columns"
    return f"the columns are {listed(list(map(shown, columns)), _MAX_LISTED)}"
