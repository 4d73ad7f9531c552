"""Compare query weights and ingest pipelines with a server that has the machine-learning plugin.

Downloads 390 MB unless cached. The model is a tokenizer model of OpenSearch, built from a tokenizer.json and an
idf.json; other models need a hub.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import struct
import time
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import pytest
from click.testing import CliRunner
from support.loads import into
from support.runs import make_run
from support.servers import environment, random_free_port, server_home

from sparse_ingest.cli.server import server
from sparse_ingest.cluster.client import Client, Connection, connect
from sparse_ingest.cluster.index_admin import CreateOptions, create_index, drop_index, show_index
from sparse_ingest.cluster.search_bodies import neural_sparse_body
from sparse_ingest.corpora.documents import FieldNames
from sparse_ingest.corpora.files import open_corpus
from sparse_ingest.local_server import download, process
from sparse_ingest.models.query_encoders import query_encoder
from sparse_ingest.pipeline import EncodeSettings, IndexSettings, ModelSettings, Pipeline
from sparse_ingest.queries.idf import write_idf
from sparse_ingest.reporting import SILENT
from sparse_ingest.verification.verify import verify

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
BERT, CRANFIELD = SHARED / "bert-uncased", SHARED / "cranfield"
# Special tokens of the published table: omitted from our queries, weighted 1.0 by the analyzer.
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (BERT.is_dir() and CRANFIELD.is_dir()), reason="shared/data is not there"),
]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    folder = download.ensure_distribution(SILENT, with_ml=True)
    with server_home() as home, environment(SPARSE_INGEST_HOME=str(home)):
        (home / folder.name).symlink_to(folder)
        instance = process.start(random_free_port(), heap="1g", with_ml=True, timeout_s=300)
        try:
            yield instance.url
        finally:
            process.stop(instance.port)


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[Client]:
    with closing(connect(Connection(url))) as client:
        yield client


@pytest.fixture(scope="module")
def encoder():
    return query_encoder(ModelSettings(document=str(BERT)))


@pytest.fixture(scope="module")
def model_id(client: Client) -> str:
    return tokenizer_model(client, BERT)


def tokenizer_model(client: Client, folder: Path) -> str:
    """Register and deploy a tokenizer model from two files; return its id."""
    settings = {"allow_registering_model_via_local_file": True, "native_memory_threshold": 100}
    client.call(
        "PUT",
        "/_cluster/settings",
        {"persistent": {f"plugins.ml_commons.{name}": value for name, value in settings.items()}},
    )
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in ("tokenizer.json", "idf.json"):
            archive.write(folder / name, name)
    content = buffer.getvalue()
    description = {
        "name": folder.name,
        "version": "1",
        "model_format": "TORCH_SCRIPT",
        "function_name": "SPARSE_TOKENIZE",
        "model_content_hash_value": hashlib.sha256(content).hexdigest(),
        "model_content_size_in_bytes": len(content),
        "total_chunks": 1,
    }
    model_id = str(client.call("POST", "/_plugins/_ml/models/_register_meta", description)["model_id"])
    client.call("POST", f"/_plugins/_ml/models/{model_id}/upload_chunk/0", content)
    task = client.call("POST", f"/_plugins/_ml/models/{model_id}/_deploy")["task_id"]
    deadline = time.monotonic() + 120
    while (state := client.call("GET", f"/_plugins/_ml/tasks/{task}"))["state"] != "COMPLETED":
        assert state["state"] != "FAILED", state
        assert time.monotonic() < deadline, state
        time.sleep(0.2)
    return model_id


def predicted(client: Client, model_id: str, texts: Sequence[str]) -> list[dict[str, float]]:
    answer = client.call("POST", f"/_plugins/_ml/_predict/sparse_tokenize/{model_id}", {"text_docs": list(texts)})
    return [one["output"][0]["dataAsMap"]["response"][0] for one in answer["inference_results"]]


def analyzed(client: Client, text: str) -> dict[str, float]:
    """Return the distinct tokens of the analyzer with the weights it passes to a neural_sparse query."""
    asked = {"analyzer": "bert-uncased", "text": text, "explain": True, "attributes": ["payload"]}
    tokens = client.call("POST", "/_analyze", asked)["detail"]["analyzer"]["tokens"]
    payloads = {token["token"]: bytes(int(part, 16) for part in token["payload"][1:-1].split()) for token in tokens}
    return {token: struct.unpack(">f", payload)[0] for token, payload in payloads.items()}


def float32(value: float) -> float:
    return struct.unpack("<f", struct.pack("<f", value))[0]


def texts_of_cranfield() -> list[str]:
    files = (CRANFIELD / "queries.jsonl", CRANFIELD / "corpus.jsonl")
    rows = [json.loads(line) for path in files for line in path.read_text().splitlines()]
    return [row["text"] for row in rows] + [row["title"] for row in rows if row.get("title")]


def odd_texts() -> list[str]:
    """Words of Cranfield mixed with characters of every kind, and texts of such characters only."""
    chance = random.Random(20)
    words = " ".join(texts_of_cranfield()).split()
    by_category: dict[str, list[str]] = {}
    for number in range(0x110000):
        category = unicodedata.category(chr(number))
        if category not in ("Cs", "Cn"):
            by_category.setdefault(category, []).append(chr(number))
    characters = [character for some in by_category.values() for character in chance.sample(some, min(len(some), 60))]
    odd = ["".join(chance.choices(characters, k=chance.randrange(1, 12))) for _ in range(600)]
    mixed = [
        " ".join(chance.choice((*chance.choices(words, k=2), chance.choice(odd))) for _ in range(chance.randrange(12)))
        for _ in range(600)
    ]
    glued = ["".join(chance.sample((chance.choice(words), chance.choice(characters), "é", "É"), 3)) for _ in range(300)]
    fixed = [
        "", " ", "\n\t\r", "\0", "a\0b", "\x7f", "\ufffd", "\ufeffa", "İstanbul ıI", "ß ẞ ﬁ Ǆ", "e\u0301 é",
        "가 각", "ก็", "x" * 99, "x" * 101, "don't", "a.b.c", "3.14", "#a @b", "日本語テキスト", "👩\u200d👩\u200d👧",
        "[CLS] [UNK] [MASK] cls", "##ing", "a" + "\u0300" * 40,
    ]  # fmt: skip
    return odd + mixed + glued + fixed


def long_texts() -> list[str]:
    """Texts with more tokens than any model accepts."""
    texts = texts_of_cranfield()
    return [" ".join(texts[start : start + 20]) for start in range(0, 400, 20)]


def test_the_analyzer_of_the_server_gives_our_weights_on_thousands_of_texts(client: Client, encoder) -> None:
    """Except special tokens: the analyzer gives those in a text, and [UNK], a weight of 1.0, as in its table."""
    texts = texts_of_cranfield() + odd_texts() + long_texts()
    differing, special = [], Counter()
    tokens = longest = 0
    for text, mine in zip(texts, encoder.encode(texts), strict=True):
        theirs = analyzed(client, text)
        special.update((token, weight) for token, weight in theirs.items() if token in SPECIAL)
        rest = {token: weight for token, weight in theirs.items() if token not in SPECIAL}
        tokens += len(rest)
        longest = max(longest, len(encoder._tokenizer.encode(text, add_special_tokens=False).ids))
        if rest != mine:
            differing.append((text, {key: (rest.get(key), mine.get(key)) for key in rest.keys() | mine.keys()
                                     if rest.get(key) != mine.get(key)}))  # fmt: skip
    print(f"{len(texts)} texts, {tokens} weights, longest {longest} tokens, {len(differing)} differ; {special}")
    assert differing == []
    assert len(texts) > 3000
    assert longest > 2048
    assert {weight for _, weight in special} == {1.0}


def test_queries_by_analyzer_and_by_our_weights_have_the_same_scores(client: Client, encoder) -> None:
    """Documents have no special tokens, as with the document encoders of this family."""
    index = "by-analyzer"
    client.call("PUT", f"/{index}", {"mappings": {"properties": {"sparse": {"type": "rank_features"}}}})
    texts = texts_of_cranfield()
    chance = random.Random(7)
    lines = []
    for number, weights in enumerate(encoder.encode(texts[225:525])):
        document = {"sparse": {token: round(chance.uniform(0.1, 3), 3) for token in weights}}
        lines += [{"index": {"_id": str(number)}}, document]
    body = "".join(json.dumps(line) + "\n" for line in lines).encode()
    assert client.call("POST", f"/{index}/_bulk", body, params={"refresh": "true"})["errors"] is False
    compared = 0
    for text in texts[:225]:
        asked = {"neural_sparse": {"sparse": {"query_text": text, "analyzer": "bert-uncased"}}}
        theirs = client.call("POST", f"/{index}/_search", {"size": 50, "query": asked})["hits"]["hits"]
        request = neural_sparse_body(encoder.encode([text])[0], field="sparse", size=50)
        mine = client.call("POST", f"/{index}/_search", request)["hits"]["hits"]
        assert [hit["_score"] for hit in mine] == [hit["_score"] for hit in theirs], text
        assert {hit["_id"]: hit["_score"] for hit in mine[:40]}.items() <= {
            hit["_id"]: hit["_score"] for hit in theirs
        }.items()
        compared += len(mine)
    print(f"{compared} scores compared")
    assert compared > 5000


@pytest.mark.parametrize("complete", [True, False], ids=["complete", "with tokens missing"])
def test_a_tokenizer_model_of_the_server_gives_our_weights_from_the_same_idf(
    client: Client, tmp_path: Path, complete: bool
) -> None:
    (tmp_path / "tokenizer.json").write_bytes((BERT / "tokenizer.json").read_bytes())
    corpus = open_corpus([str(CRANFIELD / "corpus.jsonl")], fields=FieldNames(carry_text=False))
    write_idf(corpus, tmp_path / "idf.json", model=ModelSettings(document=str(BERT)))
    if not complete:
        table = json.loads((tmp_path / "idf.json").read_bytes())
        (tmp_path / "idf.json").write_text(json.dumps(dict(list(table.items())[::2])))
    texts = [text for text in texts_of_cranfield()[:225] if text]
    theirs = predicted(client, tokenizer_model(client, tmp_path), texts)
    mine = query_encoder(ModelSettings(document=str(tmp_path))).encode(texts)
    assert [{token: float32(weight) for token, weight in one.items()} for one in theirs] == mine


@pytest.mark.parametrize("kind", ["rank_features", "sparse_vector"])
def test_documents_encoded_by_the_server_score_like_loaded_ones(
    client: Client, encoder, model_id: str, tmp_path: Path, kind: str
) -> None:
    index = f"meets-{kind.replace('_', '-')}"
    pipeline = Pipeline(index=IndexSettings(kind=kind))
    options = CreateOptions(ingest="sparse-encoding", model_id=model_id, default=True)
    create_index(index, pipeline=pipeline, connection=Connection(client.address), options=options)
    for doc_id, document in {
        "both": {"title": "Boundary layers", "text": "of a flat plate"},
        "text": {"text": "boundary layers of a flat plate"},
        "empty": {"title": "", "text": " "},
    }.items():
        client.call("PUT", f"/{index}/_doc/{doc_id}", document, params={"refresh": "true"})
    encoded = encoder.encode(["Boundary layers of a flat plate"])[0]
    vocabulary = list(json.loads((BERT / "tokenizer.json").read_bytes())["model"]["vocab"])
    run = make_run(tmp_path / "run", {"loaded": encoded}, vocabulary=vocabulary, weights="float32")
    report = into(client, index, run, pipeline=pipeline)
    assert report.acknowledged == 1
    asked = dict(encoded)
    if kind == "sparse_vector":
        asked = {str(vocabulary.index(token)): weight for token, weight in encoded.items()}
    body = neural_sparse_body(asked, field="sparse", size=9)
    hits = client.call("POST", f"/{index}/_search", body, params={"search_pipeline": "_none"})["hits"]["hits"]
    scores = {hit["_id"]: hit["_score"] for hit in hits}
    assert scores.keys() == {"both", "text", "loaded"}
    assert scores["both"] == scores["text"] == pytest.approx(scores["loaded"], rel=2**-7)
    found = show_index(index, connection=Connection(client.address))
    assert (found.documents, found.ingest_pipeline) == (4, f"{index}-ingest")
    assert verify(run.path, index=index, connection=Connection(client.address), sample=None).ok
    assert drop_index(index, connection=Connection(client.address), sure=lambda _: True).pipelines == [
        f"{index}-ingest"
    ]


def test_the_ingest_processor_prunes_like_encode(client: Client, encoder, model_id: str) -> None:
    index = "pruned"
    pipeline = Pipeline(encode=EncodeSettings(top_k=3), index=IndexSettings(source="keep"))
    options = CreateOptions(ingest="sparse-encoding", model_id=model_id)
    create_index(index, pipeline=pipeline, connection=Connection(client.address), options=options)
    text = "experimental study of a wing in a propeller slipstream"
    client.call("PUT", f"/{index}/_doc/a", {"text": text}, params={"pipeline": f"{index}-ingest"})
    kept = client.call("GET", f"/{index}/_doc/a")["_source"]
    assert set(kept) == {"text", "sparse"}
    assert set(kept["sparse"]) == set(list(encoder.encode([text])[0])[:3])


@pytest.mark.parametrize("kind", ["rank_features", "sparse_vector"])
def test_long_texts_are_split_into_passages_that_a_nested_query_finds(
    client: Client, encoder, model_id: str, kind: str
) -> None:
    index = f"passages-{kind.replace('_', '-')}"
    pipeline = Pipeline(index=IndexSettings(kind=kind))
    options = CreateOptions(ingest="text-chunking", model_id=model_id, default=True)
    create_index(index, pipeline=pipeline, connection=Connection(client.address), options=options)
    long = " ".join(["boundary layer flow over a plate"] * 120 + ["helicopter"])
    for doc_id, text in (("long", long), ("short", "helicopter rotors"), ("empty", "")):
        client.call("PUT", f"/{index}/_doc/{doc_id}", {"text": text}, params={"refresh": "true"})
    field = "passage_vectors.sparse_encoding"
    inner = {"neural_sparse": {field: {"query_tokens": encoder.encode(["helicopter"])[0]}}}
    query = {"nested": {"path": "passage_vectors", "score_mode": "max", "query": inner}}
    found = client.call("POST", f"/{index}/_search", {"query": query})["hits"]["hits"]
    assert {hit["_id"] for hit in found} == {"long", "short"}
    source = next(hit["_source"] for hit in found if hit["_id"] == "long")
    assert len(source["passages"]) > 1
    assert "passage_vectors" not in source
    assert show_index(index, connection=Connection(client.address)).documents == 3


def test_the_query_enricher_sets_the_model_of_a_text_query(client: Client, encoder, model_id: str) -> None:
    index = "enriched"
    options = CreateOptions(search=("neural-query-enricher", "two-phase"), model_id=model_id, default=True)
    create_index(index, pipeline=Pipeline(), connection=Connection(client.address), options=options)
    weights = encoder.encode(["wing flutter"])[0]
    client.call("PUT", f"/{index}/_doc/a", {"sparse": weights}, params={"refresh": "true"})
    by_text = {"neural_sparse": {"sparse": {"query_text": "wing flutter"}}}
    hits = client.call("POST", f"/{index}/_search", {"query": by_text})["hits"]["hits"]
    body = neural_sparse_body(weights, field="sparse", size=1)
    assert [hit["_score"] for hit in hits] == [
        hit["_score"] for hit in client.call("POST", f"/{index}/_search", body)["hits"]["hits"]
    ]


def test_start_without_ml_accepts_a_running_server_with_ml(url: str) -> None:
    [instance] = process.instances()
    again = process.start(instance.port)
    assert (again.pid, again.with_ml) == (instance.pid, True)
    [shown] = json.loads(CliRunner().invoke(server, ["status", "--json"]).stdout)
    assert shown["with_ml"] is True
    assert "with ml" in CliRunner().invoke(server, ["status"]).stdout
