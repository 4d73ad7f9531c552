"""Search and ingest pipelines on the server: built from the packaged bodies, installed for one index, removed with it.

In: names of packaged bodies (pipelines/opensearch/search and ingest), the field of the index, the id of a model that
the server runs. Out: bodies, and pipelines whose description marks them as ours. A pipeline of another client with the
same name is never replaced and never removed. `_meta` of the index lists its pipelines, under a key that loads keep.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from typing import Any, Literal, NamedTuple

from sparse_ingest.cluster.client import Client, ResponseError, path_of
from sparse_ingest.cluster.indexes import Index
from sparse_ingest.errors import ClusterError, PipelineError, UsageError
from sparse_ingest.pipeline import EncodeSettings, packaged_folder

PipelineKind = Literal["search", "ingest"]

MADE_KEY = "sparse_ingest_made"  # in _meta, beside the stamp of loads
SEARCH = ("two-phase", "neural-query-enricher", "hybrid", "rrf")
INGEST = ("sparse-encoding", "text-chunking")
PASSAGES = "passage_vectors"  # the field of text-chunking, with an object for the vector of each passage
_PATHS = {"search": "/_search/pipeline", "ingest": "/_ingest/pipeline"}
DEFAULT_PIPELINE_SETTINGS = {"search": "search.default_pipeline", "ingest": "default_pipeline"}


class Installed(NamedTuple):
    """A pipeline of one index."""

    kind: PipelineKind
    name: str

    @property
    def setting(self) -> str:
        """The index setting, without `index.`, that names the default."""
        return DEFAULT_PIPELINE_SETTINGS[self.kind]


def search_body(names: Sequence[str], field: str, model_id: str | None) -> dict[str, Any]:
    """Return one search pipeline with the processors of all the named ones. Only one may combine scores."""
    bodies = [_packaged("search", name, field, model_id) for name in dict.fromkeys(names)]
    merged: dict[str, Any] = {"description": " ".join(body.pop("description") for body in bodies)}
    for body in bodies:
        for key, processors in body.items():
            merged[key] = [*merged.get(key, []), *processors]
    if len(merged.get("phase_results_processors", [])) > 1:
        raise UsageError("--search-pipeline hybrid and rrf both combine the scores of a hybrid query. Pass one.")
    return merged


def ingest_body(name: str, field: str, model_id: str | None, encode: EncodeSettings) -> dict[str, Any]:
    """Return the body of an ingest pipeline, which prunes by the only rule of `[encode]`."""
    rules = {name: value for name, value in encode.rules.items() if value is not None}
    if len(rules) > 1:
        raise PipelineError(
            "[encode] prunes by more than one of max_ratio, top_k, min_weight and alpha_mass, but an ingest pipeline "
            "takes one. Keep one, so that the server prunes the documents it encodes like those that are loaded."
        )
    body = _packaged("ingest", name, field, model_id)
    for processor in body["processors"]:
        if encoding := processor.get("sparse_encoding"):
            del encoding["prune_type"], encoding["prune_ratio"]
            for rule, value in rules.items():
                encoding |= {"prune_type": "abs_value" if rule == "min_weight" else rule, "prune_ratio": value}
    return body


def install(client: Client, pipeline: Installed, body: dict[str, Any], index: str) -> bool:
    """Install a pipeline for an index. Return False if the same one is installed for it.

    Raise `ClusterError` if another one has its name, or the server does not know a processor.
    """
    client.dialect.refuse("pipelines")
    body = {**body, "description": f"{_mark(index)} {body['description']}"}
    there = _found(client, pipeline)
    if there == body:
        return False
    if there is not None:
        raise ClusterError(
            f"Another {pipeline.kind} pipeline {pipeline.name!r} exists. Look at it with GET {_path(pipeline)}, then "
            "delete it, or give the index another name."
        )
    try:
        client.call("PUT", _path(pipeline), body)
    except ResponseError as error:
        if error.status != 400 or "processor" not in error.reason.lower():
            raise
        raise ClusterError(
            f"{client.address} refuses the {pipeline.kind} pipeline {pipeline.name!r}: {error.reason}. It needs the "
            "neural-search plugin, since 2.15 for two-phase and since 2.19 for rrf and pruning."
        ) from error
    return True


def remove(client: Client, pipeline: Installed, index: str) -> str | None:
    """Remove a pipeline that was installed for an index. Return None, or a message why it was kept."""
    there = _found(client, pipeline)
    if there is None:
        return None
    what = f"The {pipeline.kind} pipeline {pipeline.name!r} was kept"
    if not str(there.get("description", "")).startswith(_mark(index)):
        return f"{what}: another client replaced the one that was created for {index!r}."
    try:
        if users := _users(client, pipeline, index):
            return f"{what}: {', '.join(users)} use it too."
        client.call("DELETE", _path(pipeline))
    except ResponseError as error:
        if error.status != 403:
            raise
        return f"{what}: {error}"
    return None


def final_pipeline(index: Index) -> str | None:
    """Return the pipeline that every document goes through, which no request can bypass, or None."""
    name = index.setting("final_pipeline")
    return None if name == "_none" else name


def refuse_encoding_final_pipeline(client: Client, index: Index, field: str) -> None:
    """Raise `ClusterError` if the final pipeline of an index encodes into the field that a load writes."""
    name = final_pipeline(index)
    if name is None:
        return
    # A role without the right to read pipelines can still load.
    body = _found(client, Installed("ingest", name), absent=(403, 404)) or {}
    for processor in body.get("processors", ()):
        if field in processor.get("sparse_encoding", {}).get("field_map", {}).values():
            raise ClusterError(
                f"Index {index.name!r} has the final pipeline {name!r}, which encodes into {field!r} and would replace "
                "the vectors. Make it the default pipeline (index.default_pipeline), which a load bypasses."
            )


def equipped(
    body: dict[str, Any], pipelines: Sequence[Installed], *, passages: bool, defaults: Sequence[Installed]
) -> dict[str, Any]:
    """Return an index body whose `_meta` lists the pipelines that `index create` installed.

    With `passages` it maps their vectors, outside `_source`: the server writes each into an object with
    `sparse_encoding`. `defaults` are the pipelines of every search and document that name none.
    """
    content = dict(body["mappings"])
    made = {"format": 1, "pipelines": [pipeline._asdict() for pipeline in pipelines]}
    content["_meta"] = {**content.get("_meta", {}), MADE_KEY: made}
    if passages:
        if PASSAGES in content["properties"]:
            raise PipelineError(f"The index body maps {PASSAGES!r}, the field of text-chunking. Rename that field.")
        nested = {"type": "nested", "properties": {"sparse_encoding": {"type": "rank_features"}}}
        source = content.get("_source", {})
        content["properties"] = {**content["properties"], PASSAGES: nested}
        content["_source"] = {**source, "excludes": [*source.get("excludes", []), PASSAGES]}
    named = {f"index.{one.setting}": one.name for one in defaults}
    return {**body, "settings": {**body.get("settings", {}), **named}, "mappings": content}


def made_of(index: Index) -> list[Installed] | None:
    """Return the pipelines that were installed with an index, or None if `index create` did not create it."""
    made = index.mappings.get("_meta", {}).get(MADE_KEY)
    if not isinstance(made, dict):
        return None
    entries = made.get("pipelines")
    named = [one for one in entries if isinstance(one, dict)] if isinstance(entries, list) else []
    return [
        Installed(one["kind"], str(one["name"])) for one in named if str(one.get("kind")) in _PATHS and one.get("name")
    ]


def is_ours(index: Index) -> bool:
    """Return whether a load or `index create` created the index, or a load has written into it."""
    return index.stamp is not None or made_of(index) is not None


def carried_over(old: Index, body: dict[str, Any]) -> dict[str, Any]:
    """Return the body of an index that replaces `old`, with the pipelines that `index create` gave to `old`."""
    pipelines = made_of(old)
    if pipelines is None:
        return body
    passages = PASSAGES in old.mappings.get("properties", {}) and PASSAGES not in body["mappings"]["properties"]
    own = body.get("settings", {})
    defaults = [one for one in pipelines if old.setting(one.setting) == one.name and f"index.{one.setting}" not in own]
    return equipped(body, pipelines, passages=passages, defaults=defaults)


def lost_default_pipelines(old: Index, new: Index) -> dict[str, str]:
    """Return the settings of `old` that name default pipelines, where `new` names none."""
    named = {name: old.setting(name) for name in DEFAULT_PIPELINE_SETTINGS.values() if new.setting(name) is None}
    return {f"index.{name}": pipeline for name, pipeline in named.items() if pipeline not in (None, "_none")}


def _packaged(kind: PipelineKind, name: str, field: str, model_id: str | None) -> dict[str, Any]:
    path = packaged_folder() / "opensearch" / kind / f"{name.replace('-', '_')}.json"
    if not path.is_file():
        known = ", ".join(SEARCH if kind == "search" else INGEST)
        raise PipelineError(f"Unknown packaged {kind} pipeline {name!r}. Expected one of {known}.")
    body: dict[str, Any] = _filled(json.loads(path.read_bytes()), {"sparse": field, "MODEL_ID": model_id})
    return body


def _filled(value: Any, words: dict[str, str | None]) -> Any:
    """Replace these words where they are a complete string or key."""
    if isinstance(value, dict):
        return {words.get(key) or key: _filled(inner, words) for key, inner in value.items()}
    if isinstance(value, list):
        return [_filled(inner, words) for inner in value]
    return (words.get(value) or value) if isinstance(value, str) else value


def _mark(index: str) -> str:
    return f"Made by sparse-ingest for index {index}."


def _path(pipeline: Installed) -> str:
    return _PATHS[pipeline.kind] + path_of(pipeline.name)


def _found(client: Client, pipeline: Installed, *, absent: Collection[int] = (404,)) -> dict[str, Any] | None:
    entry = (client.find(_path(pipeline), absent=absent) or {}).get(pipeline.name)
    return dict(entry) if isinstance(entry, dict) else None


def _users(client: Client, pipeline: Installed, index: str) -> list[str]:
    """Return the other indexes that name a pipeline in their settings."""
    names = ["search.default_pipeline"] if pipeline.kind == "search" else ["default_pipeline", "final_pipeline"]
    path = "/_all/_settings/" + ",".join(f"index.{name}" for name in names)
    answer = client.call("GET", path, params={"flat_settings": "true", "expand_wildcards": "all"})
    return sorted(
        other
        for other, entry in answer.items()
        if other != index and pipeline.name in entry.get("settings", {}).values()
    )
