"""Model names: a folder, a package folder or a hub id; and the fingerprint of a folder."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from test_layouts import PLAIN, SYMMETRIC, make

from sparse_ingest.checkpoints.locate import fingerprint, locate
from sparse_ingest.errors import CheckpointError


def test_relative_and_absolute_paths_give_the_same_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "model", PLAIN)
    monkeypatch.chdir(tmp_path)
    assert locate("model") == locate(str(tmp_path / "model")) == locate("./model") == (tmp_path / "model", None)


def test_a_folder_in_a_package_is_found_without_importing_it() -> None:
    before = set(sys.modules)
    folder, revision = locate("package:cognition/model")
    assert (folder / "model.safetensors").exists() and revision is None
    assert not {name for name in set(sys.modules) - before if name.startswith("cognition")}


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("package:no_such_package/model", "No installed Python package 'no_such_package'"),
        ("package:cognition/nothing", "has no folder 'nothing'"),
        ("package:", "No installed Python package"),
        ("./nothing", "No model folder './nothing'"),
        ("/nothing/here", "No model folder '/nothing/here'"),
        ("a/b/c", "No model folder 'a/b/c'"),
        ("~nobody-of-this-name/model", "No model folder"),
        ("two words", "No model folder 'two words'"),
        ("owner/name@main", "or a hub id (owner/name). Pin a revision with [model] revision."),
        ("", "No model folder"),
    ],
)
def test_a_missing_model_is_one_message(name: str, part: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        locate(name)
    message = str(caught.value)
    assert part in message and "\n" not in message and message.endswith(".")


@pytest.mark.parametrize("named", ["folder", "package:cognition/model"])
def test_a_folder_has_no_revision(tmp_path: Path, named: str) -> None:
    name = str(make(tmp_path, PLAIN)) if named == "folder" else named
    with pytest.raises(CheckpointError, match="is a folder, which has no revision 'v2'"):
        locate(name, "v2")


def test_the_fingerprint_depends_on_contents_and_names_and_not_on_the_folder(tmp_path: Path) -> None:
    first = fingerprint(make(tmp_path / "a", SYMMETRIC))
    assert fingerprint(make(tmp_path / "another name", SYMMETRIC)) == first
    seen = {first}
    for change in (
        {"model.safetensors": b"weighty"},
        {"tokenizer_config.json": {"model_max_length": 49}},
        {"1_SpladePooling/config.json": {}},
        {"vocab.txt": b""},
        {"model-2.safetensors": b"weights"},
    ):
        folder = tmp_path / f"changed-{len(seen)}"
        seen.add(fingerprint(make(folder, {**SYMMETRIC, **change})))
    assert len(seen) == 6


def test_the_fingerprint_ignores_files_that_are_never_read(tmp_path: Path) -> None:
    folder = make(tmp_path, PLAIN)
    before = fingerprint(folder)
    make(folder, {"README.md": b"words", "heads.pt": b"pickle", "training_args.bin": b"pickle", "modeling.py": b"code"})
    # Weights are read from safetensors if both are there.
    assert fingerprint(make(folder, {"pytorch_model.bin": b"pickle"})) == before


def test_the_fingerprint_includes_a_pickle_that_has_the_weights(tmp_path: Path) -> None:
    bare = {name: content for name, content in PLAIN.items() if name != "model.safetensors"}
    seen = {
        fingerprint(make(tmp_path / str(n), {**bare, **more}))
        for n, more in enumerate([{}, {"pytorch_model.bin": b"one"}, {"pytorch_model.bin": b"two"}])
    }
    assert len(seen) == 3
