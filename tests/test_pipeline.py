"""Pipeline files: every key has a type, and each error names what is allowed."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sparse_ingest as si
from sparse_ingest.corpora.options import IdfOptions
from sparse_ingest.errors import PipelineError, UsageError
from sparse_ingest.pipeline import Pipeline, options_from, override, packaged_folder, pipeline_of, read_pipeline

COMPLETE = """
[model]
document = "naver/efficient-splade-VI-BT-large-doc"
query = "naver/efficient-splade-VI-BT-large-query"
revision = "abc"
query_revision = "def"
trust_remote_code = true
activation = "log1p_relu"
pooling = "max"
attention = "bidirectional"
max_length = 256
document_prompt = "d: "
query_prompt = ""
lower_case = true
document_special_tokens = "zero"
query_special_tokens = "keep"
missing_idf_weight = 1
[encode]
batch_tokens = 4096
dtype = "bfloat16"
weights = "float32"
top_k = 200
max_ratio = 0.1
min_weight = 0.05
alpha_mass = 0.9
overflow = "truncate"
window_stride = 64
[index]
field = "vector"
kind = "sparse_vector"
body = "body.json"
source = "keep"
fields = {price = "float", author.born = "date"}
[query]
top_k = 10
max_ratio = 0.4
engine = "seismic"
hybrid = true
hybrid_weights = [0.25, 1]
hybrid_normalization = "l2"
hybrid_combination = "geometric_mean"
two_phase = {expansion_rate = 5.0}
seismic = {top_n = 10, heap_factor = 1.2}
pruned = {tokens_weight_threshold = 0.4}
[load]
top_k = 100
max_ratio = 0.2
min_weight = 0.1
alpha_mass = 0.8
"""


def read(folder: Path, text: str) -> Pipeline:
    (folder / "p.toml").write_text(text)
    return read_pipeline(folder / "p.toml")


def test_every_key_is_read(tmp_path: Path) -> None:
    pipeline = read(tmp_path, COMPLETE)
    for table in fields(Pipeline):
        settings = getattr(pipeline, table.name)
        unset = [entry.name for entry in fields(settings) if f"\n{entry.name} = " not in COMPLETE]
        assert unset == [], f"[{table.name}] has keys that this test does not know"
    assert pipeline.model.missing_idf_weight == 1.0 and type(pipeline.model.missing_idf_weight) is float
    assert pipeline.query.seismic == {"top_n": 10, "heap_factor": 1.2}
    assert pipeline.query.hybrid_weights == (0.25, 1.0)
    assert pipeline.index.fields == {"price": "float", "author.born": "date"}


def test_an_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    assert read(tmp_path, "") == Pipeline()
    assert Pipeline().encode.weights == "float16" and Pipeline().index.field == "sparse"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[modle]", "unknown key modle; known here: encode, index, load, model, query"),
        ("[load]\ntopk = 3", "unknown key load.topk; known here: alpha_mass, max_ratio, min_weight, top_k"),
        ("[query]\nhybrid_weights = [0.5]", "query.hybrid_weights = [0.5]; expected two numbers"),
        ("[query]\nhybrid_combination = 'sum'", "expected 'arithmetic_mean' or 'geometric_mean' or"),
        ("[load]\nmax_ratio = 2", "load.max_ratio = 2.0; expected a number from 0 to 1"),
        ("[encode]\ntopk = 3", "unknown key encode.topk; known here: alpha_mass, batch_tokens"),
        ("model = 3", "model is 3; expected a table"),
        (
            "[index.fields]\nprice = 'flaot'",
            "index.fields = {'price': 'flaot'}; expected a table from names to keyword",
        ),
        ("[index]\nfields = 3", "index.fields = 3; expected a table from names to keyword, text"),
        ("[encode]\ntop_k = 0", "encode.top_k = 0; expected an integer above zero"),
        ("[encode]\ntop_k = -5", "expected an integer above zero"),
        ("[encode]\ntop_k = 3.0", "encode.top_k = 3.0; expected an integer"),
        ("[encode]\ntop_k = true", "encode.top_k = True; expected an integer"),
        ("[encode]\ntop_k = '3'", "encode.top_k = '3'; expected an integer"),
        ("[encode]\nmax_ratio = 'a'", "expected a number"),
        ("[encode]\nmax_ratio = nan", "encode.max_ratio = nan; expected a number"),
        ("[encode]\nmin_weight = inf", "encode.min_weight = inf; expected a number"),
        ("[encode]\nmax_ratio = true", "expected a number"),
        ("[encode]\ndtype = 'half'", "encode.dtype = 'half'; expected 'auto' or 'float32' or 'bfloat16'"),
        ("[encode]\ndtype = [1]", "encode.dtype = [1]; expected"),
        ("[model]\nlower_case = 1", "model.lower_case = 1; expected true or false"),
        ("[model]\ndocument = 3", "model.document = 3; expected a string"),
        ("[query]\nseismic = 3", "query.seismic = 3; expected a table"),
        ("[encode]\ntop_k = 3\ntop_k = 4", "is not valid TOML"),
        ("not toml", "is not valid TOML"),
        ("[query]\nseismic = " + "[" * 50_000, "is not valid TOML"),
        ("[query.seismic]\n" + "a." * 900 + "a = 1", "query.seismic is nested more than 20 levels deep"),
        ("[index.fields]\n" + "a." * 30 + "a = 'long'", "index.fields is nested more than 20 levels deep"),
        ("[encode]\ntop_k = " + "9" * 5_000, "is not valid TOML"),
        ("[encode]\ntop_k = " + "9" * 400, "expected an integer"),
        ("[encode]\nmin_weight = " + "9" * 400, "expected a number"),
        ("[encode]\ndtype = '" + "x" * 5_000 + "'", "xxx…; expected 'auto'"),
        ("#" * (1 << 21), "has 2,097,152 bytes; expected at most 1 MB"),
    ],
    ids=lambda value: value[:60],
)
def test_each_error_is_reported_with_the_file(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(PipelineError) as caught:
        read(tmp_path, text)
    assert message in str(caught.value) and str(tmp_path / "p.toml") in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_file_that_is_not_utf_8_is_not_valid_toml(tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_bytes(b"# \xff")
    with pytest.raises(PipelineError, match="is not valid TOML"):
        read_pipeline(str(tmp_path / "p.toml"))


def test_packaged_pipelines_are_read_by_name() -> None:
    names = sorted(path.stem for path in packaged_folder().glob("*.toml"))
    for name in names:
        assert read_pipeline(name).model.document, f"{name}.toml names no model"
    with pytest.raises(PipelineError, match="packaged: " + ", ".join(names)):
        read_pipeline("no-such-pipeline")


def test_paths_are_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deep" / "model").mkdir(parents=True)
    (tmp_path / "deep" / "body.json").write_text("{}")
    text = '[model]\ndocument = "model"\nquery = "owner/name"\n[index]\nbody = "body.json"'
    pipeline = read(tmp_path / "deep", text)
    assert pipeline.model.document == str(tmp_path / "deep" / "model")
    assert pipeline.index.body == str(tmp_path / "deep" / "body.json")
    assert pipeline.model.query == "owner/name"
    monkeypatch.chdir(tmp_path)
    assert read_pipeline("deep/p.toml") == pipeline


def test_assignments_override_the_file() -> None:
    pipeline = override(
        Pipeline(),
        ["encode.top_k=200", "encode.max_ratio=0.1", "model.document=owner/name", "model.document_prompt=search: ",
         "index.kind='sparse_vector'", "query.seismic={top_n = 3}", "model.lower_case=true", "encode.top_k=100"],
    )  # fmt: skip
    assert (pipeline.encode.top_k, pipeline.encode.max_ratio) == (100, 0.1)
    assert (pipeline.model.document, pipeline.model.document_prompt) == ("owner/name", "search: ")
    assert (pipeline.index.kind, pipeline.query.seismic, pipeline.model.lower_case) == (
        "sparse_vector",
        {"top_n": 3},
        True,
    )
    assert override(Pipeline(), []) == Pipeline()


@pytest.mark.parametrize("assignment", ["encode.min_weight=1", "encode.max_ratio=0"])
def test_an_integer_is_accepted_for_a_float_in_files_and_assignments(tmp_path: Path, assignment: str) -> None:
    name, _, value = assignment.partition("=")
    table, _, key = name.partition(".")
    assert override(Pipeline(), [assignment]) == read(tmp_path, f"[{table}]\n{key} = {value}")
    assert type(getattr(override(Pipeline(), [assignment]).encode, key)) is float


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("encode.top_k", "expected TABLE.KEY=VALUE"),
        ("top_k=3", "expected TABLE.KEY=VALUE"),
        ("", "expected TABLE.KEY=VALUE"),
        ("encoding.top_k=3", "no table 'encoding'; known: encode, index, load, model, query"),
        ("encode.topk=3", "unknown key encode.topk"),
        ("encode.top_k=many", "encode.top_k = 'many'; expected an integer"),
        ("encode.top_k=", "encode.top_k = ''; expected an integer"),
        ("encode.min_weight=nan", "encode.min_weight = nan; expected a number"),
        ("query.seismic.top_n=3", "unknown key query.seismic.top_n"),
        ("query.seismic=" + "[" * 50_000, "expected a table"),
        ("query.seismic={a=" + "[" * 30 + "]" * 30 + "}", "query.seismic is nested more than 20 levels deep"),
    ],
    ids=lambda value: value[:60],
)
def test_a_wrong_assignment_is_reported(assignment: str, message: str) -> None:
    with pytest.raises(PipelineError) as caught:
        override(Pipeline(), [assignment])
    assert message in str(caught.value)


@pytest.mark.parametrize("assignment", ["encode.max_ratio=5", "encode.max_ratio=-0.1", "encode.min_weight=-1"])
def test_a_number_out_of_range_is_refused(assignment: str) -> None:
    with pytest.raises(PipelineError, match="expected a number from 0 to"):
        override(Pipeline(), [assignment])


def test_an_assignment_to_a_table_that_the_command_does_not_read_is_refused() -> None:
    assert override(Pipeline(), ["load.top_k=3"], ("index", "load")).load.top_k == 3
    with pytest.raises(PipelineError, match=r"'query.top_k=3': this command reads \[index\], \[load\], not \[query\]"):
        override(Pipeline(), ["query.top_k=3"], ("index", "load"))


# Settings of the Python API


@pytest.mark.parametrize(
    "kind",
    [si.CreateOptions, si.EncodeOptions, si.EvaluateOptions, si.LoadOptions, si.PlanOptions, si.PublishOptions,
     si.SearchOptions, si.ServeOptions, si.VerifyOptions, IdfOptions],
)  # fmt: skip
def test_an_options_object_is_checked_as_keywords_are(kind: Any) -> None:
    assert options_from(kind, kind(), {}, "stage") == kind()
    for entry in fields(kind):
        for wrong in (object(), np.array([1, 2])):
            with pytest.raises(UsageError, match=entry.name):
                options_from(kind, replace(kind(), **{entry.name: wrong}), {}, "stage")


def test_settings_in_a_pipeline_object_are_checked() -> None:
    given: Any = si.EncodeSettings(max_ratio=np.float32(0.25))  # type: ignore[arg-type]
    assert pipeline_of(None, Pipeline(encode=given)).encode.max_ratio == 0.25
    path: Any = Path("a/model")
    assert pipeline_of(si.ModelSettings(document=path), None).model.document == "a/model"
    with pytest.raises(PipelineError, match="model is 'any'; expected a table or ModelSettings"):
        pipeline_of(None, Pipeline(model="any"))  # type: ignore[arg-type]
    wrong: Any = si.ModelSettings(document="any", max_length="9")  # type: ignore[arg-type]
    for call in (lambda: pipeline_of(wrong, None), lambda: pipeline_of(None, Pipeline(wrong))):
        with pytest.raises(PipelineError, match="max_length = '9'; expected an integer"):
            call()
