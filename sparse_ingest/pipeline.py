"""Settings as frozen dataclasses, shared by the pipeline file, the command line and the Python API.

In: a TOML file, `--set` assignments, or keywords. Out: a frozen `Pipeline`, or the options of one stage. An unknown
name or a value of the wrong kind is an error that lists what is allowed. An omitted setting that the checkpoint decides
is None (checkpoints/settings.py). cli/options.py creates options from `option`.
"""

from __future__ import annotations

import math
import tomllib
import types
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from dataclasses import field as made_of
from functools import lru_cache
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from sparse_ingest.errors import PipelineError, UsageError, short_repr

T = TypeVar("T")
SpecialTokens = Literal["keep", "zero"]
Dtype = Literal["auto", "float32", "bfloat16", "float16", "int8", "int8-bfloat16", "int8-int8", "int16"]
EngineName = Literal["exact", "two-phase", "seismic", "pruned"]
_MAX_BYTES, _MAX_DEPTH, _MAX_NUMBER = 1 << 20, 20, 1 << 63
_hints: Callable[[Any], dict[str, Any]] = lru_cache(get_type_hints)  # 0.3 ms for the options of a search
FieldType = Literal["keyword", "text", "integer", "long", "float", "double", "boolean", "date"]


def option(
    default: T,
    help: str = "",
    *,
    range: tuple[float, float] | None = None,
    metavar: str | None = None,
    flags: str = "",
    env: str = "",
    commas: bool = False,
) -> T:
    """Declare a setting: its default, its allowed values, and its option on the command line, if it has a help text.

    `range` has the smallest and largest number allowed; integers must always be above zero. `flags` are names of the
    option, such as "-k --size", `env` its environment variable. With `commas` it may also be given as `a,b`.
    """
    metadata = {"help": help, "range": range, "metavar": metavar, "flags": flags, "env": env, "commas": commas}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class ModelSettings:
    """The checkpoint, and settings that override its files. None: as the checkpoint's own library does it."""

    document: str | None = None
    query: str | None = None
    revision: str | None = None
    query_revision: str | None = None  # of `query`
    trust_remote_code: bool = False
    activation: Literal["relu", "log1p_relu", "none"] | None = None  # log1p(relu), log1p of that again, relu alone
    pooling: Literal["max", "sum"] | None = None
    attention: Literal["bidirectional", "causal"] | None = None  # of a causal language model
    max_length: int | None = None
    document_prompt: str | None = None
    query_prompt: str | None = None
    lower_case: bool | None = None
    document_special_tokens: SpecialTokens | None = None
    query_special_tokens: SpecialTokens | None = None
    missing_idf_weight: float | None = option(None, range=(0, 64))


@dataclass(frozen=True)
class Pruning:
    """The rules for terms of a document's vector (pruning.py); None keeps all."""

    top_k: int | None = option(None, "Keep only the N heaviest terms of each document")
    max_ratio: float | None = option(None, "Drop terms below this share of the document's heaviest", range=(0, 1))
    min_weight: float | None = option(None, "Drop terms below this weight", range=(0, 65504))
    alpha_mass: float | None = option(
        None, "Keep only the heaviest terms of each document, up to this share of its sum of weights", range=(0, 1)
    )

    @property
    def rules(self) -> dict[str, Any]:
        """Every rule with its value, None where it is not applied."""
        return {name: getattr(self, name) for name in Pruning.__dataclass_fields__}


@dataclass(frozen=True)
class EncodeSettings(Pruning):
    """Settings for encoding documents. `batch_tokens` counts padded tokens of one batch."""

    batch_tokens: int | None = None
    dtype: Dtype = "auto"
    weights: Literal["float16", "float32"] = "float16"
    overflow: Literal["truncate", "windows", "passages"] = "truncate"
    window_stride: int | None = None


@dataclass(frozen=True)
class IndexSettings:
    """The index. `body` is a packaged name or a path; None: the packaged one for `kind`.

    `fields` has types of kept fields by dotted path; other types are found when a run is loaded.
    """

    field: str = "sparse"
    kind: Literal["rank_features", "sparse_vector"] = "rank_features"
    body: str | None = None
    source: Literal["exclude", "keep"] = "exclude"
    fields: dict[str, FieldType] = made_of(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class HybridSettings:
    """Settings of hybrid search, in which the server combines BM25 on title and text with learned-sparse search.

    None: not set. `hybrid_weights` has the weight of BM25 first.
    """

    hybrid: bool | None = option(None, "Combine with BM25 on title and text", flags="--hybrid/--no-hybrid")
    hybrid_weights: tuple[float, float] | None = option(
        None, "Weights of BM25 and of learned-sparse search, such as 0.3,0.7  [default: 0.5,0.5]", metavar="B,S"
    )
    hybrid_normalization: Literal["min_max", "l2", "z_score"] | None = option(
        None, "How to normalize both scores  [default: min_max]"
    )
    hybrid_combination: Literal["arithmetic_mean", "geometric_mean", "harmonic_mean", "rrf"] | None = option(
        None, "How to combine both scores; rrf combines ranks instead  [default: arithmetic_mean]"
    )


@dataclass(frozen=True)
class QuerySettings(HybridSettings):
    """Settings of queries. `engine` None: exact for rank_features, seismic for sparse_vector."""

    top_k: int | None = None
    max_ratio: float | None = option(None, range=(0, 1))
    engine: EngineName | None = None
    two_phase: dict[str, Any] = field(default_factory=dict)
    seismic: dict[str, Any] = field(default_factory=dict)
    pruned: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class QueryChanges(QuerySettings):
    """Query settings given without a pipeline file; the settings stored with the index apply for the rest."""


@dataclass(frozen=True)
class Pipeline:
    """The five tables of a pipeline file. `load` prunes documents when they are loaded into an index."""

    model: ModelSettings = ModelSettings()
    encode: EncodeSettings = EncodeSettings()
    index: IndexSettings = IndexSettings()
    query: QuerySettings = QuerySettings()
    load: Pruning = Pruning()


def packaged_folder() -> Path:
    """Return the folder of the packaged pipelines: in the wheel, or next to the package in a checkout."""
    in_wheel = Path(__file__).parent / "_pipelines"
    return in_wheel if in_wheel.is_dir() else Path(__file__).parents[1] / "pipelines"


def packaged_names() -> list[str]:
    """Return the names of the packaged pipelines."""
    return sorted(path.stem for path in packaged_folder().glob("*.toml"))


def read_pipeline(name: str | Path) -> Pipeline:
    """Read a pipeline file by path, or a packaged one by name (`splade-mini`).

    Raises:
        PipelineError: a missing file, invalid TOML, an unknown key, or a value of the wrong kind.
    """
    path = Path(name)
    if not path.is_file():
        packaged = packaged_folder() / f"{name}.toml"
        if not packaged.is_file():
            known = ", ".join(packaged_names())
            raise PipelineError(f"No pipeline file {str(name)!r}, and no packaged one of that name; packaged: {known}.")
        path = packaged
    if path.stat().st_size > _MAX_BYTES:
        raise PipelineError(f"{path} has {path.stat().st_size:,} bytes; expected at most 1 MB.")
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise PipelineError(f"{path} is not valid TOML: {error}.") from error
    pipeline = _build(Pipeline, tables, str(path), "")
    return with_resolved_paths(pipeline, path.parent)


def pipeline_of(model: str | Path | ModelSettings | None, pipeline: Pipeline | str | Path | None) -> Pipeline:
    """Return the pipeline that `pipeline=` names; `model` replaces its complete [model] table.

    Without a pipeline, `query` has the type `QueryChanges`. Raise `PipelineError` as `read_pipeline` does.
    """
    if isinstance(pipeline, str | Path):
        pipeline = read_pipeline(pipeline)
    elif not isinstance(pipeline, Pipeline | None):
        raise UsageError(f"pipeline is {short_repr(pipeline)}; expected a file, a packaged name, or Pipeline.")
    found = _rebuilt(pipeline or Pipeline(query=QueryChanges()))
    return found if model is None else replace(found, model=_model_settings(model))


def pipeline_named(model: str | Path | ModelSettings | Pipeline) -> Pipeline:
    """Return the pipeline that `model` names, or a pipeline of that model without other settings.

    A path that ends in `.toml` or the name of a packaged pipeline is read as a pipeline file, unless a folder has that
    name. Every other name is a model.
    """
    if isinstance(model, Pipeline):
        return _rebuilt(model)
    if isinstance(model, str | Path) and not Path(model).is_dir():
        if str(model) in packaged_names() or str(model).endswith(".toml"):
            return read_pipeline(model)
    return Pipeline(_model_settings(model, ", a pipeline"))


def _model_settings(model: str | Path | ModelSettings, also: str = "") -> ModelSettings:
    if not isinstance(model, str | Path | ModelSettings):
        expected = f"a hub id, a folder, package:NAME/PATH{also} or ModelSettings"
        raise UsageError(f"model is {type(model).__name__}; expected {expected}.")
    return _rebuilt(model) if isinstance(model, ModelSettings) else ModelSettings(document=str(model))


def query_settings(given: QuerySettings, remembered: Mapping[str, object], source: str) -> QuerySettings:
    """Return the query settings for an index: a pipeline's, otherwise the remembered ones changed by `given`.

    Raise `PipelineError` if a setting in `source` is unknown to this release, or has a value of the wrong kind.
    """
    if not isinstance(given, QueryChanges):
        return given
    return _build(QuerySettings, {**remembered, **changed(given)}, source, "")


def in_words(settings: Mapping[str, Any], joint: str = ", ") -> str:
    """Return settings for messages and tables, such as `top_k 8, engine two-phase`; "" for none."""
    return joint.join(
        f"{name} ({in_words(value, joint)})" if isinstance(value, Mapping)
        else f"{name} {'on' if value else 'off'}" if isinstance(value, bool)
        else f"{name} {value:g}" if isinstance(value, int | float) else f"{name} {value}"
        for name, value in settings.items() if value is not None
    )  # fmt: skip


def override(pipeline: Pipeline, assignments: Sequence[str], tables: Collection[str] = ()) -> Pipeline:
    """Apply `--set table.key=value` assignments; the value is TOML, or a string without quotes.

    `tables` are those that the command reads, () for all. Raise `PipelineError` for other tables, keys and values.
    """
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        table, dot, key = name.strip().partition(".")
        if not (equals and dot):
            raise PipelineError(f"--set {assignment!r}: expected TABLE.KEY=VALUE, such as encode.top_k=200.")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except (ValueError, RecursionError):
            value = text
        known = {entry.name for entry in fields(Pipeline)}
        if table not in known:
            raise PipelineError(f"--set {assignment!r}: no table {table!r}; known: {', '.join(sorted(known))}.")
        if tables and table not in tables:
            own = ", ".join(f"[{name}]" for name in tables)
            raise PipelineError(f"--set {assignment!r}: this command reads {own}, not [{table}]. Omit it.")
        settings = getattr(pipeline, table)
        checked = _build(type(settings), {key: value}, f"--set {assignment!r}", f"{table}.")
        pipeline = replace(pipeline, **{table: replace(settings, **{key: getattr(checked, key)})})
    return pipeline


def options_from(kind: type[T], options: T | None, given: Mapping[str, object], stage: str) -> T:
    """Return the checked options of a stage. Raise `UsageError` for both at once, or a wrong name or value."""
    if options is not None and given:
        raise UsageError(f"{stage}(): pass options= or keywords such as {min(given)}=, not both.")
    if options is not None and not isinstance(options, kind):
        raise UsageError(f"{stage}(): options= is of type {type(options).__name__}; expected {kind.__name__}.")
    try:
        return _build(kind, given, f"{stage}()", "") if options is None else _rebuilt(options)
    except PipelineError as error:
        raise UsageError(str(error)) from None


def refuse_options(options: object, names: Iterable[str], why: str) -> None:
    """Raise `UsageError` if one of these options is set."""
    for name in names:
        if getattr(options, name):
            raise UsageError(f"{name} {why}. Omit it.")


def changed(settings: Any) -> dict[str, Any]:
    """Return the settings that are not at their defaults, with lists for tuples, as JSON has them."""
    found = {name: value for name, value in vars(settings).items() if value != getattr(type(settings)(), name)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


def _rebuilt(settings: T) -> T:
    """Return a dataclass of settings with each value checked, also in inner ones."""
    return _build(type(settings), vars(settings), type(settings).__name__, "")


def _build(kind: type[T], table: Mapping[str, object], source: str, prefix: str) -> T:
    """Return a settings dataclass from a TOML table, each value checked against the type of its field."""
    hints = _hints(kind)
    if unknown := sorted(table.keys() - hints.keys()):
        raise PipelineError(f"{source}: unknown key {prefix}{unknown[0]}; known here: {', '.join(sorted(hints))}.")
    values: dict[str, Any] = {}
    for key, value in table.items():
        hint, name = hints[key], prefix + key
        if not (isinstance(hint, type) and is_dataclass(hint)):
            values[key] = _checked(value, hint, source, name)
        elif isinstance(value, dict | hint):
            inner, given = (hint, value) if isinstance(value, dict) else (type(value), vars(value))
            values[key] = _build(inner, given, source, f"{name}.")
        else:
            raise PipelineError(f"{source}: {name} is {short_repr(value)}; expected a table or {hint.__name__}.")
    for entry in fields(kind):  # type: ignore[arg-type]  # a dataclass
        limits, value = entry.metadata.get("range"), values.get(entry.name)
        if limits is None or value is None:
            continue
        low, high = limits
        wanted = f"above {low}" if high == math.inf else f"from {low} to {high}"
        if not low <= value <= high or (high == math.inf and value == low):
            raise PipelineError(f"{source}: {prefix}{entry.name} = {value}; expected a number {wanted}.")
    return kind(**values)


def _checked(value: object, hint: Any, source: str, name: str) -> object:
    """Return the value if it has one of the types of the hint. Raise `PipelineError` otherwise."""
    alternatives = get_args(hint) if get_origin(hint) in (types.UnionType, Union) else (hint,)
    if value is None and type(None) in alternatives:
        return None
    if _is_deep(value):
        raise PipelineError(f"{source}: {name} is nested more than {_MAX_DEPTH} levels deep.")
    choices = [choice for choice in alternatives if choice is not type(None)]
    if found := [one for choice in choices if (one := _as_kind(value, choice)) is not None]:
        return found[0]
    if int in choices and type(value) is int:
        raise PipelineError(f"{source}: {name} = {value}; expected an integer above zero.")
    raise PipelineError(f"{source}: {name} = {short_repr(value)}; expected {' or '.join(map(_described, choices))}.")


def _is_deep(value: object, left: int = _MAX_DEPTH) -> bool:
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return not left or any(_is_deep(each, left - 1) for each in inner)


def _as_kind(value: object, kind: Any) -> object:
    """Return the value converted to a type of a hint, or None if it does not fit."""
    if get_origin(kind) is Literal:
        fits = type(value) in (str, int) and value in get_args(kind)
    elif kind is float:
        fits = isinstance(value, Real) and not isinstance(value, bool) and abs(value) < _MAX_NUMBER  # type: ignore[operator]
        return float(value) if fits else None  # type: ignore[arg-type]
    elif kind is int:  # also of numpy
        number = int(value) if isinstance(value, Integral) and not isinstance(value, bool) else 0
        return number if 0 < number < _MAX_NUMBER else None
    elif get_origin(kind) is tuple:
        each, count = get_args(kind)[0], len(get_args(kind))
        found = [_as_kind(one, each) for one in value] if isinstance(value, list | tuple) else [None]
        return tuple(found) if None not in found and (get_args(kind)[-1] is ... or len(found) == count) else None
    elif get_args(kind) == (str, FieldType):
        value = _dotted(value) if isinstance(value, dict) else {"": value}
        fits = all(name and each in get_args(FieldType) for name, each in value.items())
    else:
        value = str(value) if kind is str and isinstance(value, Path) else value
        fits = isinstance(value, get_origin(kind) or kind)
    return value if fits else None


def _dotted(table: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Return a table with dotted keys instead of inner tables: TOML reads `a.b = 1` as a table in a table."""
    flat: dict[str, object] = {}
    for name, value in table.items():
        flat |= _dotted(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _described(choice: Any) -> str:
    if get_origin(choice) is Literal:
        return " or ".join(repr(word) for word in get_args(choice))
    if get_args(choice) == (str, FieldType):
        return f"a table from names to {', '.join(get_args(FieldType))}"
    words = {str: "a string", int: "an integer", float: "a number", bool: "true or false", dict: "a table",
             tuple: "a list of strings"}  # fmt: skip
    kind = get_origin(choice) or choice
    return "two numbers" if choice == tuple[float, float] else words.get(kind, f"a {kind.__name__}")


def with_resolved_paths(pipeline: Pipeline, folder: Path) -> Pipeline:
    """Return the pipeline with absolute paths for names that are files or folders relative to `folder`."""

    def resolved(name: str | None) -> str | None:
        return str((folder / name).resolve()) if name and (folder / name).exists() else name

    model = replace(pipeline.model, document=resolved(pipeline.model.document), query=resolved(pipeline.model.query))
    return replace(pipeline, model=model, index=replace(pipeline.index, body=resolved(pipeline.index.body)))
