"""Models by hub id: huggingface_hub's client against a hub on loopback, in a new process each."""

from __future__ import annotations

import json
import logging
import os
import pty
import re
import socket
import termios
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
from support.checkpoints import make_splade_card
from support.loopback_hub import TOKEN, Ended, Hub, begin, ended, loopback_hub
from support.serving import AnsweringHandler, serving
from support.tables import write_table
from test_layouts import PLAIN, make

from sparse_ingest.storage.hub_session import guard_hub, without_token

# Prints the snapshot folder, its commit and its family, or the error.
READ = """
import sys
from huggingface_hub import constants
from sparse_ingest.checkpoints import hub
from sparse_ingest.checkpoints.layouts import read_checkpoint
from sparse_ingest.errors import CheckpointError
constants.DOWNLOAD_CHUNK_SIZE = 4096  # so that a broken download has complete chunks, as with a large file
hub.LINE_EVERY_S = hub.BARS_AFTER_S = 0.0
try:
    checkpoint = read_checkpoint(*sys.argv[1:])
    print(checkpoint.folder, checkpoint.revision, checkpoint.family, sep="\\n")
except CheckpointError as error:
    sys.exit(f"Error: {error}")
"""
# Prints for each list of arguments the commit, or the error: a new process takes a second of CPU time.
READ_EACH = """
import json, sys
from sparse_ingest.checkpoints.layouts import read_checkpoint
from sparse_ingest.errors import CheckpointError
for arguments in json.loads(sys.argv[1]):
    try:
        print(read_checkpoint(*arguments).revision)
    except CheckpointError as error:
        print(f"Error: {error}")
"""
LOCATE = "import sys; from sparse_ingest.checkpoints.locate import locate; print(*locate(sys.argv[1], code=True))"
RECORD = """
import json, sys
from dataclasses import asdict
from sparse_ingest.checkpoints.layouts import read_checkpoint
from sparse_ingest.checkpoints.settings import model_record, resolve_settings
from sparse_ingest.pipeline import ModelSettings
settings = ModelSettings(document=sys.argv[1], query=sys.argv[2])
checkpoint = read_checkpoint(settings.document)
print(json.dumps(model_record(checkpoint, resolve_settings(settings, checkpoint), settings)))
"""
# Prints what a search uses of such a record: the revision of the document side, and the weights of a query.
SEARCH = """
import json, sys
from sparse_ingest.pipeline import ModelSettings
from sparse_ingest.models.query_encoders import query_encoder
from sparse_ingest.searching.pipelines import remembered_model
model = remembered_model(ModelSettings(), json.loads(sys.argv[1]))
print(json.dumps([model.revision, query_encoder(model).encode(["catch"])[0]]))
"""
COMMAND = "from sparse_ingest.cli.main import main; main()"
DOWNLOADED = [
    "README.md", "config.json", "config.json", "config_sentence_transformers.json", "model.safetensors",
    "modules.json", "sentence_bert_config.json", "tokenizer.json", "tokenizer_config.json",
]  # fmt: skip
# Files of real repositories that are not read.
UNREAD = {
    "training_args.bin": b"pickle",
    "pytorch_model.bin": b"pickle",
    "modeling_made.py": b"raise SystemExit('nobody asked for code')",
    "onnx/config.json": {},
    "onnx/model.onnx": b"graph",
    "checkpoint-500/config.json": {},
    "checkpoint-500/model.safetensors": b"older weights",
    "flax_model.msgpack": b"weights",
}


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_splade_card(tmp_path_factory.mktemp("published") / "card")
    return make(folder, {**UNREAD, "README.md": b"---\nlicense: mit\n---\n"})


@pytest.fixture
def hub(card: Path) -> Iterator[Hub]:
    with loopback_hub() as running:
        running.add("made/card", card)
        yield running


def read(hub: Hub, home: Path, *arguments: str, endpoint: str | None = None, **variables: str) -> Ended:
    return ended(begin(READ, *arguments, endpoint=endpoint or hub.url, home=home, **variables))


def read_each(hub: Hub, home: Path, *models: tuple[str, ...]) -> list[str]:
    result = ended(begin(READ_EACH, json.dumps(models), endpoint=hub.url, home=home))
    assert result.code == 0, result.err
    return result.out.splitlines()


def error_of(result: Ended) -> str:
    assert (result.code, result.out) == (1, "")
    (line,) = result.err.splitlines()
    assert line.startswith("Error: ") and line.endswith(".")
    return line.removeprefix("Error: ")


def test_only_needed_files_of_a_model_are_downloaded_and_only_once(hub: Hub, tmp_path: Path) -> None:
    first = read(hub, tmp_path / "home", "made/card")
    assert first.code == 0, first.err
    folder, commit, family = first.out.splitlines()
    assert commit == hub.models["made/card"].branches["main"] and Path(folder).name == commit
    assert family == "symmetric SPLADE, sentence-transformers layout"
    assert hub.downloads() == DOWNLOADED
    hub.requests.clear()
    assert read(hub, tmp_path / "home", "made/card").out == first.out
    assert hub.downloads() == []
    # A pinned commit in the cache needs no request.
    hub.requests.clear()
    assert read(hub, tmp_path / "home", "made/card", commit).out == first.out
    assert not [one for one in hub.requests if "made/card" in one.path]


@pytest.mark.slow
def test_encode_with_a_model_of_the_hub(hub: Hub, card: Path, tmp_path: Path) -> None:
    from support.checkpoints import build_encoder

    from sparse_ingest.runs.run import open_run
    from sparse_ingest.runs.shards import read_shard

    text = "the river and the stone"
    make(tmp_path, {"corpus.jsonl": {"id": "1", "text": text}})
    arguments = ["encode", "--model", "made/card", "--corpus", "corpus.jsonl", "--out", "run"]
    arguments += ["--dtype", "float32", "--weights", "float32"]
    result = ended(begin(COMMAND, *arguments, endpoint=hub.url, home=tmp_path / "home"))
    assert result.code == 0, result.err
    run = open_run(tmp_path / "run")
    model = run.manifest.identity["model"]
    assert (model["hub"], model["revision"]) == ("made/card", hub.models["made/card"].branches["main"])
    (part,) = read_shard(run.shard_path(0))
    expected = build_encoder(card).encode([text]).vectors
    assert part.vectors.token_ids.tolist() == expected.token_ids.tolist() and len(expected.token_ids) > 5
    assert part.vectors.weights.tolist() == expected.weights.tolist()


def test_query_with_a_weight_table_of_the_hub(hub: Hub, tmp_path: Path) -> None:
    (table := tmp_path / "table").mkdir()
    write_table(table)
    hub.add("made/table", table)
    result = ended(
        begin(COMMAND, "query", "--model", "made/table", "Catch exception", endpoint=hub.url, home=tmp_path / "home")
    )
    assert result.code == 0, result.err
    tokens = json.loads(result.out)["query"]["neural_sparse"]["sparse"]["query_tokens"]
    assert tokens == {"except": 4.75, "catch": 2.5, "##ion": 2.5}


def test_inspect_reads_the_card_of_a_model_of_the_hub(hub: Hub, tmp_path: Path) -> None:
    commit = hub.models["made/card"].branches["main"]
    hub.add("made/card", make(tmp_path / "newer", PLAIN))
    arguments = ["inspect", "made/card", "--json", "--set", f"model.revision={commit}"]
    result = ended(begin(COMMAND, *arguments, endpoint=hub.url, home=tmp_path / "home"))
    assert (result.code, result.err) == (0, "")
    found = json.loads(result.out)["document"]
    assert (found["revision"], found["sha256"], found["license"]) == (commit, None, "mit")


def test_a_revision_is_pinned(hub: Hub, tmp_path: Path) -> None:
    old = hub.models["made/card"].branches["main"]
    hub.models["made/card"].branches["v1"] = old
    new = hub.add("made/card", make(tmp_path / "newer", PLAIN))
    revisions = [("made/card", revision) for revision in ("main", "v1", old, "v3")]
    *found, message = read_each(hub, tmp_path / "home", *revisions)
    assert found == [new, old, old]
    assert message.startswith(
        "Error: The model made/card has no revision 'v3' on the hub: looked for a branch, a tag and a"
    )


def test_a_search_uses_the_recorded_revisions_of_both_models(hub: Hub, tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    for folder in (old, new):
        folder.mkdir()
        write_table(folder)
    (new / "idf.json").write_text(json.dumps({"catch": 1.0}))
    commits = {"revision": hub.models["made/card"].branches["main"], "query_revision": hub.add("made/table", old)}
    home = tmp_path / "home"
    record = ended(begin(RECORD, "made/card", "made/table", endpoint=hub.url, home=home))
    assert record.code == 0, record.err
    assert commits.items() <= json.loads(record.out).items()
    hub.add("made/card", make(tmp_path / "newer", PLAIN))
    hub.add("made/table", new)
    result = ended(begin(SEARCH, record.out, endpoint=hub.url, home=home))
    assert (result.code, json.loads(result.out)) == (0, [commits["revision"], {"catch": 2.5}]), result.err


def test_a_broken_download_continues_where_it_stopped(hub: Hub, card: Path, tmp_path: Path) -> None:
    hub.cut.add("model.safetensors")
    result = read(hub, tmp_path / "home", "made/card")
    assert result.code == 0, result.err
    stored = [one for one in hub.requests if one.path.startswith("/storage/")]
    size = (card / "model.safetensors").stat().st_size
    begins = [int(one.range.removeprefix("bytes=").rstrip("-") or 0) for one in stored]
    assert begins[0] == 0 and size // 4 < begins[1] <= size // 2 and len(begins) == 2
    fetched = Path(result.out.splitlines()[0]) / "model.safetensors"
    assert fetched.read_bytes() == (card / "model.safetensors").read_bytes()
    # Without a terminal, progress is printed as lines.
    assert "Downloading made/card: " in result.err and "\r" not in result.err and "\n\n" not in result.err


def test_on_a_terminal_progress_is_a_bar(hub: Hub, tmp_path: Path) -> None:
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 100))
    process = begin(READ, "made/card", endpoint=hub.url, home=tmp_path / "home", stderr=slave)
    assert ended(process).code == 0
    os.close(slave)
    shown = os.read(master, 1 << 16).decode()
    os.close(master)
    assert "%|" in shown and "\r" in shown and "Downloading made/card: " not in shown


def test_complete_files_of_a_failed_download_are_kept(hub: Hub, tmp_path: Path) -> None:
    hub.broken.add("model.safetensors")
    failed = read(hub, tmp_path / "home", "made/card")
    assert (failed.code, failed.out) == (1, "")
    assert "The model made/card cannot be fetched from the hub" in failed.err and "500" in failed.err
    hub.broken.clear()
    hub.requests.clear()
    assert read(hub, tmp_path / "home", "made/card").code == 0
    assert "model.safetensors" in hub.downloads() and len(hub.downloads()) < len(DOWNLOADED)


@pytest.mark.parametrize("state", ["offline", pytest.param("unreachable", marks=pytest.mark.slow)])
def test_without_a_hub_the_cache_is_used_or_the_message_names_what_is_missing(
    hub: Hub, tmp_path: Path, state: str
) -> None:
    online = read(hub, tmp_path / "full", "made/card")
    # Nothing listens on port 9.
    options = {"HF_HUB_OFFLINE": "1"} if state == "offline" else {"endpoint": "http://127.0.0.1:9"}
    hub.requests.clear()
    assert read(hub, tmp_path / "full", "made/card", **options).out == online.out
    empty = error_of(read(hub, tmp_path / "empty", "made/card", **options))
    (Path(online.out.splitlines()[0]) / "tokenizer.json").unlink()
    part = error_of(read(hub, tmp_path / "full", "made/card", **options))
    unreachable = "127.0.0.1:9 cannot be reached ([Errno 111]"
    why = "is not contacted (HF_HUB_OFFLINE is set)" if state == "offline" else unreachable
    assert why in empty and why in part
    assert f"the cache {tmp_path / 'empty' / 'hub'} has no model of that name" in empty
    assert "has only a part of it" in part
    if state == "offline":
        pipeline = error_of(read(hub, tmp_path / "empty", "splade-mini", **options))
        assert pipeline.endswith("'splade-mini' is a packaged pipeline: pass --pipeline splade-mini.")
    assert hub.requests == []


def test_a_private_model_needs_the_token_which_is_never_printed(hub: Hub, tmp_path: Path) -> None:
    hub.models["made/card"].private = True
    without = error_of(read(hub, tmp_path / "home", "made/card"))
    assert without.startswith("No model 'made/card': looked for a folder of that name here, and for a model of that")
    assert "where no token was sent" in without and "set HF_TOKEN" in without
    wrong = error_of(read(hub, tmp_path / "home", "made/card", HF_TOKEN="hf_another"))
    assert "refuses the token that was sent" in wrong and "hf_another" not in wrong
    make(tmp_path / "home", {"token": TOKEN.encode()})  # the file that `hf auth login` writes
    hub.requests.clear()
    assert read(hub, tmp_path / "home", "made/card").code == 0
    # The storage is another host, so huggingface_hub sends it no token.
    assert {(one.host, one.token) for one in hub.requests if "harness" not in one.path} == {
        ("127.0.0.1", TOKEN), ("localhost", ""),
    }  # fmt: skip
    assert read(hub, tmp_path / "another", "made/card", HF_TOKEN=TOKEN).code == 0


def test_a_gated_model_without_a_token_is_reported(hub: Hub, tmp_path: Path) -> None:
    hub.models["made/card"].gated = True
    message = error_of(read(hub, tmp_path / "home", "made/card"))
    assert message.startswith("The model made/card is gated, and no token was sent: accept its conditions")
    assert read(hub, tmp_path / "home", "made/card", HF_TOKEN=TOKEN).code == 0


def test_a_missing_or_unknown_model_is_one_message(hub: Hub, tmp_path: Path) -> None:
    hub.add("made/pickle", make(tmp_path / "pickle", {"heads.pt": b"pickle"}))
    hub.add("made/bert", make(tmp_path / "bert", {"config.json": {"architectures": ["BertModel"]}}))
    found = read_each(hub, tmp_path / "home", ("made/none",), ("made/pickle",), ("made/bert",))
    messages = (
        "No model 'made/none': looked for a folder of that name here, and for a model",
        "has no file of a checkpoint: looked for *.json, *.txt",
        "made/bert is not a checkpoint of a known family. Looked",
    )
    for line, message in zip(found, messages, strict=True):
        assert line.startswith("Error: ") and message in line


def test_a_pickle_is_downloaded_only_if_there_are_no_safetensors(hub: Hub, tmp_path: Path) -> None:
    bare = {name: content for name, content in PLAIN.items() if name != "model.safetensors"}
    files = {**bare, "pytorch_model.bin": b"pickle", "training_args.bin": b"pickle", "heads.pt": b"pickle"}
    inner = {f"inner/{name}": content for name, content in files.items()}
    # Of BGE-M3: the output of lexical weights, but not the one of ColBERT.
    m3 = {"sparse_linear.pt": b"pickle", "colbert_linear.pt": b"pickle", "extra.safetensors": b"weights"}
    safe = {"safe/config.json": {}, "safe/model.safetensors": b"weights", "safe/pytorch_model.bin": b"pickle"}
    hub.add("made/pickled", make(tmp_path / "pickled", {**files, **inner, **safe, **m3, "modeling.py": b"code"}))
    result = ended(begin(LOCATE, "made/pickled", endpoint=hub.url, home=tmp_path / "home"))
    assert result.code == 0, result.err
    folder = Path(result.out.split()[0])
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()) == [
        "config.json", "extra.safetensors", "inner/config.json", "inner/pytorch_model.bin",
        "inner/tokenizer_config.json", "modeling.py", "pytorch_model.bin", "safe/config.json",
        "safe/model.safetensors", "sparse_linear.pt", "tokenizer_config.json",
    ]  # fmt: skip


def test_two_processes_can_download_the_same_model(hub: Hub, tmp_path: Path) -> None:
    both = [begin(READ, "made/card", endpoint=hub.url, home=tmp_path / "home") for _ in range(2)]
    one, two = (ended(process) for process in both)
    assert (one.code, two.code) == (0, 0), one.err + two.err
    assert one.out == two.out
    # Each file is downloaded once: the second process waits for the first, or finds the file.
    assert hub.downloads().count("model.safetensors") == 1


def test_a_token_in_an_error_of_the_library_is_not_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert without_token(f"Illegal header value b'Bearer {TOKEN}'") == "Illegal header value b'Bearer (token)'"


OUTSIDE = ("../../../../outside", "..", "/tmp/outside-of-the-cache", "..\\outside")
INSPECT = """
import sys
from click.testing import CliRunner
from sparse_ingest.cli.main import cli
from sparse_ingest.errors import SparseIngestError
for model in sys.argv[1:]:
    answer = CliRunner().invoke(cli, ["inspect", model])
    print(isinstance(answer.exception, SparseIngestError), ascii(str(answer.exception)))
"""


class HostileHub(AnsweringHandler):
    """A hub of models with one file. The model made/card-N sends OUTSIDE[N] as its `what`."""

    what: str

    def do_GET(self) -> None:
        found = re.search(r"made/card-(\d)", self.path)
        assert found is not None
        names = {self.what: OUTSIDE[int(found[1])]}
        commit = names.get("commit", "c" * 40)
        if "/tree/" in self.path:
            lfs = {"lfs": {"oid": names["hash"], "size": 2}} if "hash" in names else {}
            name = f"{names['file']}/x.json" if "file" in names else "config.json"
            self.answer(200, [{"type": "file", "path": name, "size": 2, "oid": "a" * 40, **lfs}])
        elif self.path.startswith("/api/"):
            self.answer(200, {"id": found[0], "sha": names.get("listed commit", commit), "siblings": []})
        else:
            etag = {"ETag": f'"{names.get("etag", "e" * 40)}"'}
            self.answer(200, {}, X_Repo_Commit=commit, **etag)

    do_HEAD = do_GET


@pytest.mark.parametrize(
    "what",
    ["etag", "file", *(pytest.param(one, marks=pytest.mark.slow) for one in ("commit", "listed commit", "hash"))],
)
def test_names_from_a_hub_never_lead_out_of_the_cache(what: str, tmp_path: Path) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Hub", (HostileHub,), {"what": what}))
    home = tmp_path / "a" / "b" / "home"
    home.mkdir(parents=True)
    models = [f"made/card-{number}" for number in range(len(OUTSIDE))]
    with serving(server):
        url = f"http://127.0.0.1:{server.server_address[1]}"
        result = ended(begin(INSPECT, *models, endpoint=url, home=home))
    assert result.code == 0, result.err
    caches = [home / "hub" / f"models--made--card-{number}" for number in range(len(OUTSIDE))]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    written = [path for path in files if not any(path.is_relative_to(cache) for cache in caches)]
    assert not [path for path in written if "outside" in path.name] and not Path("/tmp/outside-of-the-cache").exists()
    for name, line in zip(OUTSIDE, result.out.splitlines(), strict=True):
        assert line.startswith("True ")
        if what != "file":
            assert ascii(f"names a file {name!r}, a path outside the cache")[1:-1] in line


def test_a_password_in_the_address_of_a_hub_is_not_printed(tmp_path: Path) -> None:
    with socket.socket() as silent:  # it keeps the port and does not listen
        silent.bind(("127.0.0.1", 0))
        address = "127.0.0.1:{}".format(*silent.getsockname()[1:])
        begun = begin(COMMAND, "inspect", "made/card", endpoint=f"http://me:{TOKEN}@{address}", home=tmp_path / "h")
        result = ended(begun)
    assert result.code == 1 and address in result.err  # `ended` asserts that the token is not printed


def test_log_records_of_the_library_contain_no_password() -> None:
    guard_hub()
    (handler,) = logging.getLogger("huggingface_hub").handlers
    record = logging.LogRecord(
        "huggingface_hub", 30, "", 1, "Retrying %s", (f"http://me:{TOKEN}@hub/x?sig={TOKEN}",), None
    )
    assert handler.filter(record) and record.getMessage() == "Retrying http://hub/x"


def test_the_loopback_hub_answers_like_the_real_one(hub: Hub) -> None:
    """Checked with urllib, not with huggingface_hub."""
    import urllib.error
    import urllib.request

    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"{hub.url}/api/models/made/card/revision/main") as answer:
        assert json.loads(answer.read())["sha"] == hub.models["made/card"].branches["main"]
    with pytest.raises(urllib.error.HTTPError) as caught:
        opener.open(f"{hub.url}/api/models/made/none/revision/main")
    assert (caught.value.code, caught.value.headers["X-Error-Code"]) == (401, "RepoNotFound")
