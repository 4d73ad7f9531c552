"""The JSON files of a run: their keys, and how they are written and read.

A file that cannot be read, or has a value of an unexpected type, is a `RunError` that names it. What the files mean
together is checked in run.py.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from msgspec import Meta, defstruct

from sparse_ingest.errors import RunError, first_line
from sparse_ingest.runs.manifest import Count
from sparse_ingest.storage.durable import write_atomic
from sparse_ingest.storage.foreign_json import checked, read_json
from sparse_ingest.storage.places import Place, RemotePath

COUNTS = "rows nnz empty truncated skipped underflow windows reused deduplicated without_token".split()

# Counts whose label differs from their key.
COUNT_LABELS = {
    "rows": "documents or passages",
    "nnz": "non-zero weights",
    "empty": "without terms",
    "truncated": "truncated to the limit",
    "skipped": "bad documents skipped",
    "underflow": "weights below float16 range",
    "windows": "windows read",
    "reused": "copied from another run",
    "deduplicated": "copied from an equal text",
    "without_token": "weights without a token",
}
STAGE_LABELS = {"tokenise": "tokenize"}  # the key is frozen


class SkippedRow(NamedTuple):
    """A source row that `--on-bad-document skip` skipped. `line` counts from 1 within `file`."""

    row: int
    file: str
    line: int
    reason: str


# The keys of a record in done/ and of complete.json that are read; earlier releases lack some.
DoneRecord = defstruct(
    "DoneRecord",
    [(name, Count, 0) for name in ("first_row", *COUNTS)]
    + [(name, str, "") for name in ("sha256", "input_sha256", "run_id")]
    + [("next", tuple[Count, Count, Count, Count], (0, 0, 0, 0)), ("of_rows", dict[str, str], {})]
    + [("seconds", dict[str, float], {})],
)
_Shards = Annotated[int, Meta(ge=0, le=10_000_000)]
CompleteRecord = defstruct("CompleteRecord", [("shards", _Shards), ("rows", Count), ("terms", Count, 0)])


@dataclass(frozen=True)
class RunReport:
    """Counts of a complete run, summed over its shards; `--json` prints these keys (`without_token` if above 0)."""

    run: str
    run_id: str
    shards: int
    rows: int
    terms: int
    empty: int
    truncated: int
    skipped: int
    underflow: int
    windows: int = 0
    reused: int = 0
    deduplicated: int = 0
    without_token: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a JSON object."""
        return without_zero(asdict(self))


def without_zero(counts: dict[str, Any]) -> dict[str, Any]:
    """Drop `without_token` if it is 0: few runs have it, and files of earlier releases lack it."""
    return {name: count for name, count in counts.items() if count or name != "without_token"}


def summed(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a record in done/ that complete.json sums up; a record is much larger."""
    return {name: record[name] for name in ("sha256", *COUNTS) if name in record}


def totals_of(records: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Return the number of records and the sums of their counts; records of earlier releases lack the last ones."""
    sums = {name: sum(record.get(name, 0) for record in records) for name in COUNTS}
    return without_zero({"shards": len(records), **sums})


def sha256_of(records: Iterable[Mapping[str, Any]]) -> str:
    """Return a hash over the hashes of all shards, so that no shard can be replaced together with its record."""
    return hashlib.sha256("\n".join(str(record.get("sha256")) for record in records).encode()).hexdigest()


def part_name(shard: int) -> str:
    """Return the stem of a shard's files, such as `part-00000`."""
    return f"part-{shard:05d}"


def has_manifest(path: Place) -> bool:
    """Return whether this folder contains a run, finished or not."""
    return (path / "manifest.json").exists()


def refuse_other_content(path: Place) -> None:
    """Raise `RunError` if a path is a file, a web address, or a folder with other files and no manifest."""
    if isinstance(path, RemotePath) and not path.writable:
        raise RunError(f"{path} is a web address, which is read-only. Pass --out a folder, or an s3:// address.")
    for place in (path, *path.parents) if isinstance(path, Path) else (path,):
        if place.exists() and not place.is_dir():
            raise RunError(f"{place} is a file; a run is a folder. Pass --out an empty or new folder.")
    if isinstance(path, RemotePath) or path.is_dir():
        # Listed first: another process writes the manifest before everything else.
        others = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith(".new-"))
        if others and not has_manifest(path):
            raise RunError(
                f"{path} is not empty and is not a run (found {others[0]}). Pass --out an empty or new folder."
            )


def write_json(path: Place, value: object, *, exclusive: bool = False) -> None:
    """Write JSON with `write_atomic`."""
    write_atomic(path, json_bytes(value), exclusive=exclusive)


def json_bytes(value: object) -> bytes:
    """Return JSON as `write_json` writes it; bytes of a path that are not UTF-8 are escaped, as `\\udcff`."""
    text = json.dumps(value, ensure_ascii=False, indent=None if isinstance(value, list) else 1)
    return text.encode(errors="backslashreplace") + b"\n"


def read_record(path: Place, kind: type[Any]) -> dict[str, Any] | None:
    """Return a JSON object after a check of its known keys, or None if the file does not exist."""
    with reading(path):
        try:
            record = read_json(path, dict[str, Any])
        except FileNotFoundError:
            return None
        checked(record, kind)
        return record


@contextlib.contextmanager
def reading(path: Place) -> Iterator[None]:
    """Turn an error of reading a file of a run into a `RunError` that names the file."""
    try:
        yield
    except ValueError as error:
        raise RunError(
            f"{path} cannot be read: {first_line(error)}. It is damaged, or belongs to another run: copy it again, or "
            "encode into a new folder."
        ) from error
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror or error}. Check its disk and permissions.") from error
