"""`SparseEncoder`: parity with sentence-transformers, pipeline settings, and lazy building of models."""

from __future__ import annotations

import functools
import json
import pickle
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from support.checkpoints import PACKAGED, TEXTS, make_masked_lm, make_router, make_splade_card, write_idf
from support.families import DOCUMENTS, FAMILY_OF_TWIN, QUERIES, Twin, assert_same, changed, reference_of
from support.forked import command
from support.reporters import Recorder
from support.run_contents import documents, write
from support.tables import write_table

from sparse_ingest.checkpoints.layouts import read_checkpoint
from sparse_ingest.errors import CheckpointError, Interrupted, PipelineError, UsageError
from sparse_ingest.models.encoder import SparseEncoder
from sparse_ingest.models.query_encoders import query_encoder
from sparse_ingest.pipeline import EncodeSettings, ModelSettings, Pipeline, QuerySettings
from sparse_ingest.runs.run import open_run
from sparse_ingest.searching.query import query_weights

shared = functools.cache(SparseEncoder)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A masked LM with a limit of 64 tokens, used for documents and queries."""
    return str(make_masked_lm(tmp_path_factory.mktemp("encoder") / "plain"))


@pytest.fixture(scope="module")
def inference_free(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A masked LM for documents and a weight table for queries."""
    return str(write_idf(make_masked_lm(tmp_path_factory.mktemp("encoder") / "idf", "distilbert")))


@pytest.fixture(scope="module")
def families(twins: dict[str, Twin]) -> dict[str, Twin]:
    """One checkpoint of every family, and a real one from a package."""
    folder = str(read_checkpoint(PACKAGED).folder)
    return {**twins, PACKAGED: Twin(PACKAGED, folder, read_checkpoint(PACKAGED).family)}


# Parity with sentence-transformers


# `make test-all` checks all families; these differ in head, tokenizer, query side or layout.
QUICK = {"card-bert", "card-roberta", "router-static", "plain-bert", PACKAGED}
EVERY = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in [*FAMILY_OF_TWIN, PACKAGED]]


@pytest.mark.parametrize("name", EVERY)
def test_vectors_match_sentence_transformers(families: dict[str, Twin], name: str) -> None:
    encoder, reference = shared(families[name].model), reference_of(families[name].reference)
    # Queries first: the order in which the two sides are built does not matter.
    queries, expected_queries = encoder.encode_query(QUERIES), reference.encode_query(list(QUERIES))
    vectors, expected = encoder.encode_document(DOCUMENTS), reference.encode_document(list(DOCUMENTS))
    assert_same(vectors.to_scipy().toarray(), expected.to_dense().numpy())
    assert_same(queries.to_scipy().toarray(), expected_queries.to_dense().numpy())
    assert queries.vocabulary == vectors.vocabulary
    scores = reference.similarity(expected_queries, expected).numpy()
    np.testing.assert_allclose(encoder.similarity(queries, vectors), scores, rtol=1e-4, atol=1e-3)
    if FAMILY_OF_TWIN.get(name) == "autoencoder":  # its terms are features, which the library decodes as tokens
        return
    decoded, wanted = encoder.decode(vectors), reference.decode(expected)
    for found, row in zip(decoded, wanted, strict=True):
        assert [weight for _, weight in found] == sorted((weight for _, weight in found), reverse=True)
        heavy = {token: weight for token, weight in row if weight > 2e-4}
        assert {token: weight for token, weight in found if token in heavy} == pytest.approx(heavy, abs=1e-4)


@pytest.mark.parametrize("name", ["card-roberta", "router-static", "plain-bert"])
def test_one_text_gives_the_same_vector_as_a_list_of_one(twins: dict[str, Twin], name: str) -> None:
    encoder, reference = shared(twins[name].model), reference_of(twins[name].reference)
    for text in ("the river and the stone", ""):
        for encode in (encoder.encode_document, encoder.encode_query):
            assert encode(text) == encode([text])[0]
    assert list(encoder.encode_document("the river")) == [
        token for token, _ in reference.decode(reference.encode_document("the river"))
    ]


@pytest.mark.parametrize("name", ["card-bert", "router-static"])
def test_max_active_dims_keeps_the_heaviest_terms_as_in_sentence_transformers(
    twins: dict[str, Twin], name: str
) -> None:
    encoder, reference = shared(twins[name].model), reference_of(twins[name].reference)
    texts = ["the river and the stone", "a lamp of water"]
    for side in ("encode_document", "encode_query"):
        expected = getattr(reference, side)(texts, max_active_dims=2, convert_to_sparse_tensor=False).numpy()
        found = getattr(encoder, side)(texts, max_active_dims=2)
        assert_same(found.to_scipy().toarray(), expected)
        assert np.diff(found.indptr).tolist() == [2, 2]


@pytest.mark.parametrize("name", ["card-bert", "router-static"])
def test_max_active_dims_overrides_that_of_the_checkpoint(twins: dict[str, Twin], tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(twins[name].model, tmp_path / "declared"))
    changed(folder, "config_sentence_transformers.json", {"max_active_dims": 2})
    encoder, reference = SparseEncoder(folder), reference_of(str(folder))
    for side in ("encode_document", "encode_query"):
        for options, most in (({}, 2), ({"max_active_dims": 3}, 3)):
            expected = getattr(reference, side)(list(TEXTS), convert_to_sparse_tensor=False, **options).numpy()
            found = getattr(encoder, side)(TEXTS, **options)
            assert_same(found.to_scipy().toarray(), expected)
            assert np.diff(found.indptr).max() == most


def test_decode_returns_the_shapes_of_sentence_transformers(plain: str) -> None:
    encoder, reference = shared(plain), reference_of(plain)
    one = encoder.decode(encoder.encode_document("the river"), top_k=3)
    assert dict(one) == pytest.approx(dict(reference.decode(reference.encode_document("the river"), top_k=3)), abs=1e-4)
    for texts in (["the river"], ["the river", "", "a lamp"]):
        found = encoder.decode(encoder.encode_document(texts), top_k=3)
        expected = reference.decode(reference.encode_document(texts), top_k=3)
        assert [dict(row) for row in found] == [pytest.approx(dict(row), abs=1e-4) for row in expected]
    assert encoder.decode(encoder.encode_document([])) == []
    assert encoder.decode([{"stone": 1.0, "river": 2.0}], top_k=1) == [[("river", 2.0)]]


def test_an_opensearch_checkpoint_gives_the_vectors_of_its_two_encoders(inference_free: str) -> None:
    """sentence-transformers does not read idf.json; test_parity.py checks both sides with the formula of the cards."""
    encoder = SparseEncoder(ModelSettings(document=inference_free, activation="relu"))
    table = query_encoder(ModelSettings(document=inference_free))
    assert encoder.encode_query(QUERIES).to_dicts() == table.encode(QUERIES)
    vectors = encoder.encode_document(TEXTS)
    special = {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"}
    assert len(vectors.weights) and not any(special & row.keys() for row in vectors)


# What counts as texts


def test_no_texts_give_no_rows(plain: str, inference_free: str) -> None:
    for vectors in (shared(plain).encode_document([]), shared(inference_free).encode_query([])):
        assert len(vectors) == 0 and vectors.to_scipy().shape == (0, len(vectors.vocabulary))


def test_any_sequence_of_strings_is_accepted(plain: str) -> None:
    encoder, expected = shared(plain), shared(plain).encode_document(["the river", "a lamp"]).to_dicts()
    given = ["the river", "a lamp"]
    for texts in (tuple(given), np.array(given), iter(given), pd.Series(given), pa.chunked_array([given])):
        assert encoder.encode_document(texts).to_dicts() == expected


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["river", 7], "Text 1 is int; expected a string"),
        (["river", None], "Text 1 is NoneType; expected a string"),
        (["ok", "half \ud83d"], r"Text 1 has \\ud83d, half of a surrogate pair"),
        (b"river", "The texts are bytes; expected a string, or a sequence of strings"),
        ({"river": 1}, "The texts are dict"),
        ({"river"}, "The texts are set"),
        (None, "The texts are NoneType"),
        (pd.DataFrame({"text": ["river"]}), "The texts are DataFrame"),
    ],
)
def test_a_value_that_is_not_a_text_is_refused_with_its_position(plain: str, texts: Any, message: str) -> None:
    for encode in (shared(plain).encode_document, shared(plain).encode_query):
        with pytest.raises(UsageError, match=message):
            encode(texts)


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, "2"])
def test_max_active_dims_must_be_a_positive_integer(plain: str, wrong: Any) -> None:
    for encode in (shared(plain).encode_document, shared(plain).encode_query):
        with pytest.raises(UsageError, match="max_active_dims is"):
            encode(["river"], max_active_dims=wrong)


# Which model


def test_a_packaged_pipeline_is_found_by_name_unless_a_folder_has_it(
    plain: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert SparseEncoder("demo").encode_query("bread") == shared(PACKAGED).encode_query("bread")
    shutil.copytree(plain, "demo")
    assert SparseEncoder("demo").encode_query("bread") == shared(plain).encode_query("bread")


def test_a_pipeline_file_is_found_by_its_path(plain: str, tmp_path: Path) -> None:
    shutil.copytree(plain, tmp_path / "model")
    file = tmp_path / "mine.toml"
    file.write_text('[model]\ndocument = "model"\n[encode]\ntop_k = 3\n')
    for given in (file, str(file)):
        assert np.diff(SparseEncoder(given).encode_document(["the river and the stone"]).indptr) == [3]
    with pytest.raises(PipelineError, match="No pipeline file"):
        SparseEncoder("nowhere.toml")


def test_model_settings_and_pipelines_are_accepted(plain: str) -> None:
    expected = shared(plain).encode_document("the river and the stone", max_active_dims=3)
    given = Pipeline(ModelSettings(document=plain), EncodeSettings(top_k=3))
    assert SparseEncoder(given).encode_document("the river and the stone") == expected
    cut = SparseEncoder(ModelSettings(document=plain, max_length=4)).encode_document("the river and the stone")
    assert cut == SparseEncoder(plain, max_length=4).encode_document("the river and the stone")
    assert cut == pytest.approx(shared(plain).encode_document("the river"), abs=1e-4)


def test_a_missing_model_is_reported_at_the_first_call(tmp_path: Path) -> None:
    encoder = SparseEncoder(tmp_path / "nowhere")
    for encode in (encoder.encode_document, encoder.encode_query):
        with pytest.raises(CheckpointError, match="No model folder"):
            encode("river")


def test_a_separate_query_model_encodes_queries_only(plain: str, tmp_path: Path) -> None:
    """The two vocabularies have different token ids; similarity compares strings."""
    table = write_table(tmp_path / "table")
    encoder = SparseEncoder(ModelSettings(document=plain, query=str(table)))
    queries, vectors = encoder.encode_query(["catch a river", "stone"]), encoder.encode_document(["the river"])
    assert queries.to_dicts()[0]["river"] == 1.0 and queries.vocabulary != vectors.vocabulary
    assert encoder.similarity(queries, vectors)[0, 0] == np.float32(vectors[0]["river"])
    alone = SparseEncoder(ModelSettings(query=str(table)))
    assert alone.encode_query(["catch a river"]).to_dicts() == queries[:1].to_dicts()
    with pytest.raises(UsageError, match="is a model for queries only"):
        alone.encode_document("the river")


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("any", {"dtype": "float64"}, "dtype is 'float64'; expected one of auto, float32"),
        ("any", {"max_length": 0}, "max_length is 0"),
        ("any", {"batch_tokens": -5}, "batch_tokens is -5"),
        (7, {}, "model is int; expected a hub id"),
        (Pipeline(), {}, "names no model"),
        (ModelSettings(query="any"), {"revision": "main"}, r"Set \[model\] query_revision"),
        (Pipeline(ModelSettings(document="any"), EncodeSettings(overflow="passages")), {}, r"Use encode\(\)"),
        (Pipeline(ModelSettings(document="any"), EncodeSettings(window_stride=3)), {}, "window_stride is for"),
    ],
)
def test_options_are_checked_before_anything_is_read(model: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        SparseEncoder(model, **options)


def test_a_missing_device_is_refused(plain: str) -> None:
    import torch

    other: Any = None
    for device in ("tpu", other, torch.device("meta")):
        with pytest.raises(UsageError, match="expected auto, cpu, cuda"):
            SparseEncoder(plain, device=device).encode_document("river")
    expected = shared(plain).encode_document("river")
    assert SparseEncoder(plain, device=torch.device("cpu")).encode_document("river") == expected


def test_repr_shows_model_device_and_dtype() -> None:
    assert repr(SparseEncoder("owner/name")) == "<SparseEncoder: 'owner/name', device='auto', float32>"


# Settings of a pipeline

RULES = {
    "none": {},
    "pruned": {"top_k": 5, "max_ratio": 0.2, "min_weight": 0.3},
    "alpha-mass": {"alpha_mass": 0.7},
    "windows": {"overflow": "windows", "window_stride": 20, "top_k": 30},
}


@pytest.mark.parametrize(
    "rules", [rules if rules == "pruned" else pytest.param(rules, marks=pytest.mark.slow) for rules in RULES]
)
def test_documents_are_bit_identical_to_a_run_of_the_same_pipeline(plain: str, tmp_path: Path, rules: str) -> None:
    settings = {"dtype": "float32", "weights": "float32", **RULES[rules]}
    pipeline = tmp_path / "pipeline.toml"
    lines = (f"{name} = {json.dumps(value)}" for name, value in settings.items())
    pipeline.write_text("\n".join([f"[model]\ndocument = {json.dumps(plain)}", "[encode]", *lines]))
    texts = [*TEXTS, "the river and the stone " * 40]
    corpus = write(tmp_path / "corpus.jsonl", [{"_id": str(row), "text": text} for row, text in enumerate(texts)])
    answer = command("encode", "--corpus", corpus, "--out", tmp_path / "run", "--pipeline", pipeline, "--device", "cpu")
    assert answer.code == 0, answer.err
    stored = documents(open_run(tmp_path / "run"))
    vectors = SparseEncoder(pipeline, device="cpu").encode_document(texts).to_rows()
    for row in range(len(texts)):
        assert dict(zip(*(array.tolist() for array in vectors.row(row)), strict=True)) == stored[str(row)][2]


def test_queries_are_pruned_as_in_search(plain: str, inference_free: str) -> None:
    for model in (plain, inference_free):
        pipeline = Pipeline(ModelSettings(document=model), query=QuerySettings(top_k=3, max_ratio=0.1))
        text = "the river and the stone of water"
        encoder = SparseEncoder(pipeline)
        assert encoder.encode_query(text) == query_weights(text, pipeline) and len(encoder.encode_query(text)) <= 3
        assert len(encoder.encode_query(text, max_active_dims=4)) == 4


def test_auto_is_float32_unless_the_pipeline_names_a_dtype(plain: str) -> None:
    exact = shared(plain).encode_document(TEXTS)
    assert SparseEncoder(plain, dtype="float32").encode_document(TEXTS).weights.tobytes() == exact.weights.tobytes()
    pipeline = Pipeline(ModelSettings(document=plain), EncodeSettings(dtype="bfloat16"))
    for short in (SparseEncoder(pipeline), SparseEncoder(plain, dtype="bfloat16")):
        rounded = short.encode_document(["the river"])
        assert rounded[0] != exact[0] and rounded[0] == pytest.approx(
            shared(plain).encode_document("the river"), abs=0.2
        )
        assert short.encode_query("the river") == shared(plain).encode_query("the river")
    assert SparseEncoder(pipeline, dtype="float32").encode_document(TEXTS).weights.tobytes() == exact.weights.tobytes()


def test_smaller_batches_give_the_same_vectors(plain: str) -> None:
    small = SparseEncoder(plain, batch_tokens=64).encode_document(TEXTS).to_scipy().toarray()
    np.testing.assert_allclose(small, shared(plain).encode_document(TEXTS).to_scipy().toarray(), atol=1e-4)


# What is built, and when


def test_queries_of_an_inference_free_model_import_neither_torch_nor_transformers(
    inference_free: str, twins: dict[str, Twin]
) -> None:
    code = (
        "import sys\n"
        "from sparse_ingest.models.encoder import SparseEncoder\n"
        "for model in sys.argv[1:]:\n"
        "    encoder = SparseEncoder(model)\n"
        "    query, queries = encoder.encode_query('the river'), encoder.encode_query(['the river', 'stone'])\n"
        "    assert queries[0] == query and len(queries.vocabulary) > 50\n"
        "    assert encoder.similarity(query, queries).shape == (1, 2)\n"
        "print([name for name in ('torch', 'transformers', 'scipy', 'pyarrow') if name in sys.modules])\n"
    )
    arguments = [sys.executable, "-c", code, inference_free, twins["router-static"].model]
    answer = subprocess.run(arguments, capture_output=True, text=True, timeout=60)
    assert (answer.stdout, answer.stderr) == ("[]\n", "")


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that gets an entry for each BERT model that is built."""
    from sparse_ingest.models.bert import PackedBert

    found: list[str] = []
    build = PackedBert.__init__

    @functools.wraps(build)
    def counted(self: Any, *arguments: Any, **options: Any) -> None:
        found.append(type(self).__name__)
        build(self, *arguments, **options)

    monkeypatch.setattr(PackedBert, "__init__", counted)
    return found


@pytest.mark.parametrize("first", ["encode_query", "encode_document"])
def test_a_masked_lm_used_for_both_sides_is_built_once(tmp_path: Path, built: list[str], first: str) -> None:
    """Also if the prompts differ."""
    folder = make_splade_card(tmp_path / "card", prompts={"query": "find: ", "document": "text: "})
    built.clear()
    encoder = SparseEncoder(folder)
    getattr(encoder, first)("the river")
    query, document = encoder.encode_query("the river"), encoder.encode_document("the river")
    assert len(built) == 1 and query != document


def test_queries_alone_need_no_document_model(tmp_path: Path) -> None:
    router = make_router(tmp_path / "router", make_masked_lm(tmp_path / "bert"))
    for weights in (router / "document_0_MLMTransformer").glob("*.safetensors"):
        weights.unlink()
    encoder = SparseEncoder(router)
    assert encoder.encode_query("the river")
    with pytest.raises(CheckpointError, match="has no weights"):
        encoder.encode_document("the river")


# Threads


@pytest.mark.parametrize("kind", ["plain", "inference_free"])
def test_sixteen_threads_get_the_same_results_as_one(
    kind: str, built: list[str], request: pytest.FixtureRequest
) -> None:
    import torch

    model, threads = request.getfixturevalue(kind), torch.get_num_threads()
    texts = [f"{first} {second}" for first in ("river", "stone", "lamp", "bird") for second in ("water", "run", "the")]
    expected = [shared(model).encode_query(text) for text in texts]
    encoder, start = SparseEncoder(model), threading.Barrier(16)
    built.clear()

    def ask(number: int) -> list[dict[str, float]]:
        start.wait()
        order = [*range(number, len(texts)), *range(number)][: len(texts)]
        found = {place: encoder.encode_query(texts[place]) for place in order}
        return [found[place] for place in range(len(texts))]

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, [number % len(texts) for number in range(16)]))
    assert all(answer == expected for answer in answers)
    assert len(built) == (kind == "plain")
    with ThreadPoolExecutor(1) as pool:  # a new thread gets the last setting
        assert pool.submit(torch.get_num_threads).result() == threads


def test_documents_and_queries_may_be_encoded_concurrently(plain: str) -> None:
    encoder = SparseEncoder(plain)
    expected_query, expected = shared(plain).encode_query("the river"), shared(plain).encode_document(TEXTS)
    calls: list[Callable[[], Any]] = [lambda: encoder.encode_query("the river"), lambda: encoder.encode_document(TEXTS)]
    with ThreadPoolExecutor(8) as pool:
        found = [future.result() for future in [pool.submit(call) for call in calls * 8]]
    assert all(query == expected_query for query in found[::2])
    assert all(vectors.weights.tobytes() == expected.weights.tobytes() for vectors in found[1::2])


# Progress


class Recorded(Recorder):
    """Records the totals and the size of each step."""

    def __init__(self, *, stop_at: int | None = None) -> None:
        super().__init__(self._add, stop_at=stop_at)
        self.begun: list[tuple[str, int | None]] = []
        self.steps: list[int] = []

    def begin(self, unit: str, total: int | None = None) -> None:
        self.begun.append((unit, total))

    def _add(self, done: int) -> None:
        self.steps.append(done)


def test_a_reporter_gets_every_text(plain: str) -> None:
    encoder, heard = SparseEncoder(plain, batch_tokens=64), Recorded()
    encoder.encode_document(TEXTS, progress=heard)
    assert heard.begun == [("documents", len(TEXTS))] and heard.notes == []
    assert heard.done == len(TEXTS) and len(heard.steps) > 2
    encoder.encode_query(TEXTS, progress=heard)
    assert heard.begun[1] == ("queries", len(TEXTS)) and heard.done == 2 * len(TEXTS)


def test_a_reporter_may_request_a_stop(plain: str) -> None:
    encoder, heard = SparseEncoder(plain, batch_tokens=64), Recorded(stop_at=1)
    with pytest.raises(Interrupted, match="Stopped on request"):
        encoder.encode_document(TEXTS, progress=heard)
    assert len(heard.steps) == 1
    with pytest.raises(Interrupted, match="Stopped on request"):
        encoder.encode_query(TEXTS, progress=heard)


def test_nothing_is_shown_unless_progress_is_requested(plain: str, capfd: pytest.CaptureFixture[str]) -> None:
    shared(plain).encode_document(TEXTS)
    assert capfd.readouterr() == ("", "")
    shared(plain).encode_document(TEXTS, progress=True)
    shown = capfd.readouterr()
    assert shown.out == "" and f"{len(TEXTS)}/{len(TEXTS)}" in shown.err and "documents" in shown.err


def test_weights_of_ids_without_a_token_are_warned_about_once(
    plain: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = shutil.copytree(plain, tmp_path / "own")
    content = json.loads((own / "tokenizer.json").read_text())
    content["model"]["vocab"].pop("lamp")
    (own / "tokenizer.json").write_text(json.dumps(content))
    encoder = SparseEncoder(own)
    for _ in range(2):
        encoder.encode_document(TEXTS)
    assert [record.getMessage().partition(":")[0].split(" ", 1)[1] for record in caplog.records] == [
        "weights were omitted"
    ]


# Other code in the process


@pytest.mark.parametrize(("dtype", "name"), [("float64", PACKAGED), ("bfloat16", PACKAGED), ("float16", "plain-new")])
def test_the_default_dtype_of_the_process_changes_nothing(families: dict[str, Twin], dtype: str, name: str) -> None:
    """transformers sets it while another thread loads a model; a kernel would write beyond shorter numbers."""
    import torch

    model = families[name].model
    expected, encoder = shared(model).encode_document(TEXTS), SparseEncoder(model)
    encoder.encode_document("the river")
    try:
        torch.set_default_dtype(getattr(torch, dtype))
        for one in (encoder, SparseEncoder(model)):
            assert one.encode_document(TEXTS).weights.tobytes() == expected.weights.tobytes()
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", [PACKAGED, "saved-modernbert"])
def test_autocast_and_the_default_device_of_the_calling_thread_change_nothing(
    families: dict[str, Twin], name: str
) -> None:
    """A compiled function would read the address of a tensor on another device; one text is computed in this thread."""
    import torch

    model, text = families[name].model, "the river and the stone"
    used = shared(model)
    calls: list[Callable[[SparseEncoder], Any]] = [
        lambda encoder: encoder.encode_document(text),
        lambda encoder: encoder.encode_query(text),
        lambda encoder: encoder.origins(text, list(used.encode_document(text))),
    ]
    expected = [call(used) for call in calls]
    for setting in (torch.autocast("cpu", torch.bfloat16), torch.device("meta")):
        for encoder in (used, SparseEncoder(model)):
            with setting:
                assert [call(encoder) for call in calls] == expected


def test_a_pickled_encoder_builds_its_model_again(plain: str, built: list[str]) -> None:
    encoder = SparseEncoder(plain, max_length=9, dtype="bfloat16", device="cpu")
    expected = encoder.encode_document(TEXTS)
    built.clear()
    found = pickle.loads(pickle.dumps(encoder))
    assert repr(found) == repr(encoder) and not built
    assert found.encode_document(TEXTS).weights.tobytes() == expected.weights.tobytes() and len(built) == 1
