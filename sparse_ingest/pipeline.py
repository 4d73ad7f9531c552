"""A pipeline file: one TOML file to one frozen `Pipeline`.

Every key has one type and one place; an unknown key, table or value is an error that names what is allowed. A
setting that is left out is None where the checkpoint decides it. Not covered: what a model's own files say
(checkpoints/settings.py merges the two).
"""

from __future__ import annotations

import math
import tomllib
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from sparse_ingest.errors import PipelineError, UsageError

RANGES = {"max_ratio": (0, 1), "alpha_mass": (0, 1), "min_weight": (0, 65504), "missing_idf_weight": (0, 64)}
SpecialTokens = Literal["keep", "zero"]
Dtype = Literal["auto", "float32", "bfloat16", "float16", "int8", "int8-bfloat16"]


@dataclass(frozen=True)
class ModelSettings:
    """Which checkpoint, and what overrides its own files. None: as the checkpoint's own library does it."""

    document: str | None = None
    query: str | None = None
    revision: str | None = None
    query_revision: str | None = None  # of `query`
    trust_remote_code: bool = False
    activation: Literal["relu", "log1p_relu"] | None = None  # log1p(relu), or log1p of that again
    pooling: Literal["max", "sum"] | None = None
    max_length: int | None = None
    document_prompt: str | None = None
    query_prompt: str | None = None
    lower_case: bool | None = None
    document_special_tokens: SpecialTokens | None = None
    query_special_tokens: SpecialTokens | None = None
    missing_idf_weight: float | None = None


@dataclass(frozen=True)
class EncodeSettings:
    """How documents become vectors. `batch_tokens` counts padded tokens of one batch."""

    batch_tokens: int | None = None
    dtype: Dtype = "auto"
    weights: Literal["float16", "float32"] = "float16"
    top_k: int | None = None
    max_ratio: float | None = None
    min_weight: float | None = None
    alpha_mass: float | None = None
    overflow: Literal["truncate", "windows", "passages"] = "truncate"
    window_stride: int | None = None


@dataclass(frozen=True)
class IndexSettings:
    """What the index looks like. `body` is a packaged name or a path; None: the one that fits `kind`."""

    field: str = "sparse"
    kind: Literal["rank_features", "sparse_vector"] = "rank_features"
    body: str | None = None
    source: Literal["exclude", "keep"] = "exclude"


@dataclass(frozen=True)
class QuerySettings:
    """How queries are asked. `engine` None: that of the field, exact for rank_features, seismic for sparse_vector."""

    top_k: int | None = None
    max_ratio: float | None = None
    engine: Literal["exact", "two-phase", "seismic"] | None = None
    two_phase: dict[str, Any] = field(default_factory=dict)
    seismic: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Pipeline:
    """The four tables of a pipeline file."""

    model: ModelSettings = ModelSettings()
    encode: EncodeSettings = EncodeSettings()
    index: IndexSettings = IndexSettings()
    query: QuerySettings = QuerySettings()


def packaged_folder() -> Path:
    """Where the packaged pipelines lie: in the wheel, or in a checkout beside the package."""
    in_wheel = Path(__file__).parent / "_pipelines"
    return in_wheel if in_wheel.is_dir() else Path(__file__).parents[1] / "pipelines"


def read_pipeline(name: str) -> Pipeline:
    """Read a pipeline file by path, or a packaged one by name (`splade-mini`).

    Raises:
        PipelineError: no such file, no TOML, an unknown key, or a value of the wrong kind.
    """
    path = Path(name)
    if not path.is_file():
        packaged = packaged_folder() / f"{name}.toml"
        if not packaged.is_file():
            known = ", ".join(sorted(entry.stem for entry in packaged_folder().glob("*.toml")))
            raise PipelineError(f"No pipeline file {name!r}, and no packaged pipeline of that name; packaged: {known}.")
        path = packaged
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise PipelineError(f"{path} is no TOML: {error}.") from error
    pipeline = _build(Pipeline, tables, str(path), "")
    return _with_resolved_paths(pipeline, path.parent)


def pipeline_of(model: str | Path | ModelSettings | Pipeline) -> Pipeline:
    """Return the pipeline that `model` names, or one of that model with no other setting.

    A path that ends in `.toml`, and the name of a packaged pipeline, are read as pipeline files; a folder of that name
    is a model all the same. Every other name is that of a model.

    Raises:
        PipelineError: the pipeline file cannot be read.
        UsageError: `model` is of another type.
    """
    if isinstance(model, Pipeline):
        return model
    if isinstance(model, ModelSettings):
        return Pipeline(model)
    if not isinstance(model, str | Path):
        raise UsageError(
            f"model is {type(model).__name__}; expected a hub id, a folder, package:NAME/PATH, a pipeline file, the "
            "name of a packaged pipeline, ModelSettings or Pipeline."
        )
    name = str(model)
    is_packaged = "/" not in name and (packaged_folder() / f"{name}.toml").is_file()
    if not Path(name).is_dir() and (is_packaged or name.endswith(".toml")):
        return read_pipeline(name)
    return Pipeline(ModelSettings(document=name))


def refuse_lone_stride(settings: EncodeSettings) -> None:
    """Refuse a `window_stride` where texts are not read in windows.

    Raises:
        PipelineError: it is given, and `overflow` is "truncate".
    """
    if settings.overflow == "truncate" and settings.window_stride is not None:
        raise PipelineError('window_stride is for overflow = "windows" or "passages"; overflow is "truncate".')


def override(pipeline: Pipeline, assignments: Sequence[str]) -> Pipeline:
    """Apply `--set table.key=value` assignments; the value is TOML, a bare word counts as a string.

    Raises:
        PipelineError: the assignment has no `=`, an unknown key, or a value of the wrong kind.
    """
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        table, dot, key = name.strip().partition(".")
        if not (equals and dot):
            raise PipelineError(f"--set {assignment!r}: expected TABLE.KEY=VALUE, such as encode.top_k=200.")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        known = {entry.name for entry in fields(Pipeline)}
        if table not in known:
            raise PipelineError(f"--set {assignment!r}: no table {table!r}; known: {', '.join(sorted(known))}.")
        settings = getattr(pipeline, table)
        checked = _build(type(settings), {key: value}, f"--set {assignment!r}", f"{table}.")
        pipeline = replace(pipeline, **{table: replace(settings, **{key: getattr(checked, key)})})
    return pipeline


def _build(kind: Any, table: Mapping[str, object], source: str, prefix: str) -> Any:
    """A settings dataclass from a TOML table, each value checked against the type of its field."""
    hints = get_type_hints(kind)
    unknown = sorted(table.keys() - hints.keys())
    if unknown:
        raise PipelineError(f"{source}: unknown key {prefix}{unknown[0]}; known here: {', '.join(sorted(hints))}.")
    values: dict[str, Any] = {}
    for key, value in table.items():
        if is_dataclass(hints[key]):
            if not isinstance(value, dict):
                raise PipelineError(f"{source}: {key} must be a table, [{key}].")
            values[key] = _build(hints[key], value, source, f"{prefix}{key}.")
        else:
            values[key] = _checked(value, hints[key], source, prefix + key)
    for key, (low, high) in RANGES.items():
        if values.get(key) is not None and not low <= values[key] <= high:
            raise PipelineError(f"{source}: {prefix}{key} = {values[key]}; expected a number from {low} to {high}.")
    return kind(**values)


def _checked(value: object, hint: Any, source: str, name: str) -> object:
    """The value, when its type is one of those of the hint."""
    choices = [choice for choice in _alternatives(hint) if choice is not type(None)]
    for choice in choices:
        if get_origin(choice) is Literal:
            if value in get_args(choice):
                return value
        elif choice is float:
            if isinstance(value, int | float) and type(value) is not bool and math.isfinite(value):
                return float(value)
        elif choice is int and type(value) is int and value <= 0:
            raise PipelineError(f"{source}: {name} = {value}; expected a whole number above zero.")
        elif type(value) is (get_origin(choice) or choice):
            return value
    raise PipelineError(f"{source}: {name} = {value!r}; expected {' or '.join(map(_in_words, choices))}.")


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (types.UnionType, Union) else (hint,)


def _in_words(choice: Any) -> str:
    if get_origin(choice) is Literal:
        return " or ".join(repr(word) for word in get_args(choice))
    words = {str: "a string", int: "a whole number", float: "a number", bool: "true or false", dict: "a table"}
    return words[get_origin(choice) or choice]


def _with_resolved_paths(pipeline: Pipeline, folder: Path) -> Pipeline:
    """Paths in a pipeline file are relative to the file: a name that is a file or folder there becomes absolute."""

    def resolved(name: str | None) -> str | None:
        return str((folder / name).resolve()) if name and (folder / name).exists() else name

    model = replace(pipeline.model, document=resolved(pipeline.model.document), query=resolved(pipeline.model.query))
    return replace(pipeline, model=model, index=replace(pipeline.index, body=resolved(pipeline.index.body)))
