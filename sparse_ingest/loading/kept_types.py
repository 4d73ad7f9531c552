"""Choose the type of each kept field of a run in the index that it is loaded into.

The type comes from the index's mapping, else from `--map`, else from an earlier load, else it is one that fits all
documents. A document that does not fit is refused. A load that continues changes no type. Fields are also
added to the mapping of another client's index: without it, no filter would match them. An index that an earlier release
loaded is not changed: its documents may already have the fields, and filters would silently miss those.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sparse_ingest.cluster import indexes, mappings
from sparse_ingest.cluster.kept_fields import CARRIED, NAMED, KeptFields
from sparse_ingest.cluster.stamps import META_KEY, Stamp
from sparse_ingest.errors import ClusterError, listed
from sparse_ingest.loading.options import LoadOptions
from sparse_ingest.records import PARENT, field_path
from sparse_ingest.runs.run import Run


class KeptTypes:
    """The types of a run's kept fields.

    `there` is the index to load into; None if `body`, which has the declared types, will create it. Raise
    `ClusterError` if the index maps a field as another type than the declared one.
    """

    def __init__(self, run: Run, there: indexes.Index | None, body: dict[str, Any], options: LoadOptions) -> None:
        self._there, self._body, self._sparse = there, body, options.field or "sparse"
        declared = {} if options.update else options.fields or {}  # an update sends no fields
        self._declared = {field_path(name): str(kind) for name, kind in declared.items()}
        mapping = body["mappings"]
        if there:
            new = {path: kind for path, kind in self._declared.items() if not _is_mapped(there, path, kind)}
            self._declared = new
            mapping = copy.deepcopy(there.mappings)
            mappings.add_types(mapping, self._declared, self._sparse)
        stamp = there.stamp if there else None
        self._is_older = stamp is not None and stamp.fields is None
        self._recorded = (stamp.fields if stamp else None) or {}
        names = run.manifest.identity.get("fields", {}).get("keep")
        if names is not None and run.manifest.identity.get("overflow") == "passages":
            names = [*names, PARENT]
        origin = f"index {there.name!r} maps" if there else "is declared"
        self.kept = None if options.update else KeptFields(names, mapping, self._recorded, origin)

    def decided(self, stamp: Stamp) -> tuple[Stamp, dict[str, Any], list[str]]:
        """Return the stamp with all types, the mapping to add to an existing index, and notes.

        The body of a new index is completed in place.
        """
        if self.kept is None:
            return stamp, {}, []
        types, new, notes = self.kept.found()
        if self._there is None:
            stamp = replace(stamp, fields=types)
            content = self._body["mappings"]
            mappings.add_types(content, new, self._sparse)
            content["_meta"][META_KEY] = stamp.as_meta()
            if unseen := sorted(self._declared.keys() - types.keys() - set(CARRIED)):
                kept = listed(sorted(types), NAMED) or "none"
                notes.append(f"No document has a declared field: {', '.join(unseen)}. The run keeps: {kept}.")
            return stamp, {}, notes
        if self._is_older and new:
            types, notes = types | dict.fromkeys(new), [
                f"Index {self._there.name!r} was loaded by a release that did not map kept fields, so these are not "
                f"mapped: {', '.join(new)}. Load into a new index (--alias, or --replace --from-scratch) to filter "
                "by them."
            ]  # fmt: skip
            new = {}
        content = self._there.mappings
        # It refuses documents with a field that is not mapped; strict_allow_templates may map it by a template.
        if content.get("dynamic") == "strict" and not self._is_older:
            new |= dict.fromkeys(sorted(self.kept.carried - content.get("properties", {}).keys()), "text")
        added: dict[str, Any] = {}
        if more := new | self._declared:
            mappings.add_types(added, more, self._sparse)
            _add_nested(added, self._there.mappings)
            notes.append(
                f"Adding to the mapping of index {self._there.name!r}: {', '.join(more)}. Filters by them find "
                "earlier documents only after these are loaded again."
            )
        return replace(stamp, fields=self._recorded | types), added, notes


def _add_nested(added: dict[str, Any], there: Mapping[str, Any]) -> None:
    """Mark nested objects in place: OpenSearch refuses an added field without their type."""
    for name, entry in added.get("properties", {}).items():
        mapped = there.get("properties", {}).get(name, {})
        if mapped.get("type") == "nested":
            entry["type"] = "nested"
        _add_nested(entry, mapped)


def _is_mapped(there: indexes.Index, path: str, kind: str) -> bool:
    entry = mappings.field_mapping(there.mappings, path)
    if entry is None or entry.get("type") == kind:
        return entry is not None
    raise ClusterError(
        f"Index {there.name!r} maps {path!r} as {entry.get('type', 'object')}, but {kind} is declared. Declare the "
        "mapped type, or load into a new index."
    )
