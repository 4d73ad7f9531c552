"""The kept fields of a run: checked against the mapping of an index, or given a type if it does not map them.

In: the fields of every document that is sent, in one pass; the mapping of the index; the types that earlier loads
recorded. Out: broken rules for preflight.py; the type of each field by its dotted path; notes. Objects are mapped by
their leaves, lists by their elements. Memory grows with the number of fields, which has a limit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sparse_ingest.cluster.field_types import MAX_KEYWORD, FieldValues, fits
from sparse_ingest.errors import RunError, listed, shown
from sparse_ingest.records import MAX_LEVELS, field_path, is_within, refused_name
from sparse_ingest.runs.shards import parse_fields

MAX_FIELDS = 500  # in a run; an index maps at most 1,000 by default (index.mapping.total_fields.limit)
CARRIED = ("title", "text")
_OBJECTS = ("object", "nested")
# Types whose values are not checked; preflight.py reports documents that carry the sparse field itself.
_OPAQUE = (
    "flat_object", "flattened", "geo_point", "geo_shape", "completion", "join", "percolator", "rank_features",
    "sparse_vector",
)  # fmt: skip
NAMED = 20  # fields in a note


class FoundTypes(NamedTuple):
    """The types of a run's fields by dotted path, None where a field is not mapped; those that are new; notes."""

    types: dict[str, str | None]
    new: dict[str, str]
    notes: list[str]


class _Field:
    """A field or an object. `entry` is its mapping, None if the index has none; `values` are those of a field without.

    `refused` is content that OpenSearch accepts only while the field is not mapped; that of a `skipped` one is not
    checked.
    """

    def __init__(self, entry: Mapping[str, Any] | None, *, skipped: bool) -> None:
        kind, enabled = (None, True) if entry is None else (entry.get("type", "object"), entry.get("enabled", True))
        self.entry, self.values, self.refused = entry, FieldValues(), ""
        self.is_object = kind in _OBJECTS
        self.skipped = skipped or kind in _OPAQUE or enabled in (False, "false")


class KeptFields:
    """Reads the fields of documents.

    `names` are the fields that the run keeps, None if that is not known. `mapping` is that of the index, or of the body
    that will create it, `recorded` has the types of earlier loads, and `origin` says for messages where the types of
    the mapping come from, such as "index 'articles' maps".
    """

    def __init__(
        self,
        names: Sequence[str] | None,
        mapping: Mapping[str, Any],
        recorded: Mapping[str, str | None],
        origin: str = "is declared",
    ) -> None:
        self._mapping, self._recorded, self._origin = mapping, recorded, origin
        self._fields: dict[str, _Field] = {}
        self._broken: list[tuple[str, str]] = []  # `read` starts again: a conflict needs a document that has the field
        kept = None if names is None else [name for name in names if name not in CARRIED]
        self.carried: set[str] = set()  # those of CARRIED that documents have
        self.is_needed = kept != [] or mapping.get("dynamic") == "strict"
        for name in kept or ():
            if refused_name(name) is None:
                self._walk("", name, None, "")

    def read(self, doc_ids: Sequence[str], fields: Sequence[str]) -> list[tuple[str, str]]:
        """Return the broken rules of some documents, each with an example."""
        self._broken = []
        for doc_id, text in zip(doc_ids, fields, strict=True):
            try:
                carried = parse_fields(text, doc_id)
            except RunError:
                self._break("documents whose fields are not a JSON object, or nested too deeply", shown(doc_id))
                continue
            for name, value in carried.items():
                if reason := refused_name(name):
                    self._break(f"documents with a field {shown(name)} ({reason})", shown(doc_id))
                elif name in CARRIED:
                    self.carried.add(name)
                else:
                    self._walk("", name, value, doc_id)
        return self._broken

    def found(self) -> FoundTypes:
        """Return the types of all fields that were seen."""
        types: dict[str, str | None] = {}
        new: dict[str, str] = {}
        refused: dict[str, str] = {}
        for path, field in sorted(self._fields.items()):
            if any(is_within(path, other) and other in types for other in refused):
                continue
            if field.refused or (field.entry is None and field.is_object and field.values.kinds):
                refused[path] = field.refused or "objects and other values"
                types |= {path: None} if field.entry is None else {}
            elif field.entry is None and not field.skipped and not field.is_object:
                types[path] = new[path] = field.values.type
            elif not field.is_object:
                types[path] = None if field.entry is None else field.entry["type"]
        seen = {path: self._fields[path].values for path, kind in types.items() if kind}
        return FoundTypes(types, new, _notes(new, seen, refused))

    def _walk(self, parent: str, name: str, value: object, doc_id: str) -> None:
        """Add a value under a name, in which each part before a dot names an object."""
        if parent and self._field(parent.partition(".")[0]).skipped:
            return
        path = parent
        *objects, last = field_path(name).split(".") if "." in name else (name,)
        for part in objects:
            path = f"{path}.{part}" if path else part
            field = self._field(path)
            if field.skipped:
                return
            if field.entry is not None and not field.is_object:
                self._break_type(path, field, doc_id, value)
                return
            field.is_object = True
        path = f"{path}.{last}" if path else last
        if path.count(".") < MAX_LEVELS:
            self._add(path, value, doc_id)
            return
        objects = path.split(".")
        above = (".".join(objects[:count]) for count in range(1, len(objects)))
        first = next(path for path in above if self._field(path).entry is None)
        self._refuse(first, f"fields in more than {MAX_LEVELS} levels", doc_id)

    def _add(self, path: str, value: object, doc_id: str, lists: int = 0) -> None:
        field = self._field(path)
        if isinstance(value, list):
            if lists == MAX_LEVELS:
                self._refuse(path.rpartition(".")[0], f"lists in more than {MAX_LEVELS} levels", doc_id)
                return
            for each in value:
                self._add(path, each, doc_id, lists + 1)
        elif field.skipped or value is None:
            return
        elif field.entry is not None and isinstance(value, dict) != field.is_object:
            self._break_type(path, field, doc_id, value)
        elif isinstance(value, dict):
            self._add_object(path, field, value, doc_id)
        elif field.entry is None:
            field.values.add(value)  # type: ignore[arg-type]
        elif not fits(value, field.entry):  # type: ignore[arg-type]
            self._break_type(path, field, doc_id, value)
        elif "ignore_above" in field.entry and isinstance(value, str):
            field.values.count_long(value, int(field.entry["ignore_above"]))

    def _add_object(self, path: str, field: _Field, value: dict[str, Any], doc_id: str) -> None:
        field.is_object = True
        for name, each in value.items():
            if reason := refused_name(name, inner=True):
                self._refuse(path, f"a field {shown(name)} ({reason})", doc_id)
            else:
                self._walk(path, name, each, doc_id)

    def _field(self, path: str) -> _Field:
        field = self._fields.get(path)
        if field is None:
            entry: Any = self._mapping
            for part in path.split("."):
                entry = (entry or {}).get("properties", {}).get(part)
            field = _Field(entry, skipped=entry is None and self._recorded.get(path, "") is None)
            if len(self._fields) < MAX_FIELDS or entry is not None:
                self._fields[path] = field
            else:
                first = path.partition(".")[0]
                top = self._fields.setdefault(first, field)
                top.refused, top.skipped, field.skipped = f"more than {MAX_FIELDS} fields", True, True
                for other in [other for other in self._fields if other.startswith(f"{first}.")]:
                    del self._fields[other]
        return field

    def _refuse(self, path: str, what: str, doc_id: str) -> None:
        """Note content that OpenSearch accepts only in an object that is not mapped. The path "" is the document."""
        field = self._field(path) if path else None
        if field is not None and field.entry is None:
            field.refused = what
        else:
            self._break(f"documents with {what}{f' in {path!r}' if path else ''}", shown(doc_id))

    def _break_type(self, path: str, field: _Field, doc_id: str, value: object) -> None:
        kind = (field.entry or {}).get("type", "object")
        advice = "pass another type with --map" if self._origin == "is declared" else "load into a new index"
        rule = f"documents whose field {path!r} does not fit the type {kind}, which {self._origin} (correct them, or "
        self._break(f"{rule}{advice})", f"{shown(doc_id)}: {shown(value)}")

    def _break(self, rule: str, example: str) -> None:
        self._broken.append((rule, example))


def _notes(new: Mapping[str, str], seen: Mapping[str, FieldValues], refused: Mapping[str, str]) -> list[str]:
    from_strings = {path for path, kind in new.items() if kind != "keyword" and seen[path].any_string}
    found = [f"{path} ({kind}{', from strings' if path in from_strings else ''})" for path, kind in new.items()]
    reasons = [f"{path} ({reason})" for path in new if (reason := seen[path].reason)]
    long = [f"{path} ({values.long})" for path, values in seen.items()
            if values.long and new.get(path, "keyword") == "keyword"]  # fmt: skip
    finer = [path for path, kind in new.items() if kind == "date" and seen[path].finer]
    empty = [path for path in new if not seen[path].kinds]
    unmapped = [f"{path} (it has {what})" for path, what in refused.items()]
    lines = (
        (found, "Kept fields are mapped, so searches can filter by them: {}. Pass --map for another type."),
        (reasons, "Kept as keywords: {}. If one is a number, pass --map FIELD=double."),
        (long, f"Values too long for a keyword (ignore_above; {MAX_KEYWORD} characters if a load mapped it), so no "
               "filter matches them: {}. To search their words, pass --map FIELD=text."),
        (finer, "Dates are indexed to milliseconds; finer fractions are in _source only: {}."),
        (empty, "No document has a value of: {}. Check the names given to encode --keep."),
        (unmapped, "Not mapped, so no search can filter by them: {}."),
    )  # fmt: skip
    return [line.format(listed(names, NAMED)) for names, line in lines if names]
