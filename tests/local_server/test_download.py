"""Download of the OpenSearch distribution and of Java: complete, or downloaded again. Uses loopback only."""

from __future__ import annotations

import json
import pwd
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from jgo.maven import MavenContext, _core
from support.reporters import Recorder
from support.servers import server_home

from sparse_ingest.errors import LocalServerError, MissingExtraError
from sparse_ingest.local_server import download, folders
from sparse_ingest.local_server.download import ARCHIVES, OPENSEARCH_VERSION
from sparse_ingest.reporting import SILENT

KNN = ARCHIVES[1]


class Repository:
    """A Maven repository on loopback that serves one folder and records requests."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[str] = []
        repository = self

        class Handler(SimpleHTTPRequestHandler):
            def do_GET(self) -> None:
                repository.asked.append(self.path)
                super().do_GET()

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def downloads(self) -> int:
        return sum(path.endswith(".zip") for path in self.asked)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Repository]:
    """Return a repository with the real k-NN plugin, and an empty Maven cache."""
    real = Path(download._fetch(KNN, SILENT))
    served = tmp_path / "served" / real.relative_to(MavenContext().repo_cache)
    served.parent.mkdir(parents=True)
    shutil.copy(real, served)
    repository = Repository(tmp_path / "served")
    for name in list(_core.DEFAULT_REMOTE_REPOS):
        monkeypatch.setitem(_core.DEFAULT_REMOTE_REPOS, name, f"http://127.0.0.1:{repository.server.server_port}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("M2_REPO", str(tmp_path / "cache"))
    yield repository
    repository.server.shutdown()
    repository.server.server_close()


def cached_zip(tmp_path: Path) -> Path:
    return next((tmp_path / "served").rglob("*.zip"))


def test_a_zip_is_downloaded_once_and_then_read_from_the_cache(repository: Repository) -> None:
    first = download._fetch(KNN, SILENT)
    assert download._fetch(KNN, SILENT) == first
    assert repository.downloads() == 1


@pytest.mark.parametrize(
    "damage", [lambda zip: zip[: len(zip) // 2], lambda zip: b"\0" + zip[1:]], ids=["half", "changed"]
)
def test_a_damaged_zip_in_the_cache_is_downloaded_again(repository: Repository, damage) -> None:
    path = download._fetch(KNN, SILENT)
    path.write_bytes(damage(path.read_bytes()))
    recorder = Recorder()
    assert download._fetch(KNN, recorder) == path
    assert path.stat().st_size == KNN.size_bytes
    assert repository.downloads() == 2
    assert len(recorder.notes) == 1 and "damaged" in recorder.notes[0]


def test_a_wrong_checksum_is_refused_after_the_second_try(repository: Repository, tmp_path: Path) -> None:
    served = cached_zip(tmp_path)
    served.write_bytes(served.read_bytes()[:1000])
    with pytest.raises(LocalServerError, match=KNN.sha256):
        download._fetch(KNN, SILENT)
    assert repository.downloads() == 2


def test_a_missing_zip_is_reported_with_the_repository_and_advice(repository: Repository, tmp_path: Path) -> None:
    cached_zip(tmp_path).unlink()
    with pytest.raises(LocalServerError, match=r"^opensearch-knn .* cannot be downloaded: .* Check the network"):
        download._fetch(KNN, SILENT)


def test_bytes_to_download_counts_what_is_missing(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSE_INGEST_HOME", str(tmp_path / "home"))
    everything = sum(archive.size_bytes for archive in ARCHIVES)
    assert download.bytes_to_download() == everything
    download._fetch(KNN, SILENT)
    assert download.bytes_to_download() == everything - KNN.size_bytes


def test_the_ml_plugin_is_downloaded_only_on_request_into_its_own_folder(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSE_INGEST_HOME", str(tmp_path / "home"))
    more = download.bytes_to_download(with_ml=True) - download.bytes_to_download()
    assert more == sum(archive.size_bytes for archive in download.ML_ARCHIVES) > 380_000_000
    assert download.distribution_folder(with_ml=True) != download.distribution_folder()
    assert {archive.version for archive in download.ML_ARCHIVES} == {f"{OPENSEARCH_VERSION}.0"}


def test_a_half_unpacked_distribution_is_unpacked_again_and_damage_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSE_INGEST_HOME", str(tmp_path))
    folder = download.distribution_folder()
    (folder / "lib").mkdir(parents=True)
    abandoned = folder.with_name(f"{folder.name}.unfinished-1")
    abandoned.mkdir()

    recorder = Recorder()
    assert download.ensure_distribution(recorder) == folder
    assert "incomplete" in recorder.notes[0]
    assert not abandoned.exists()
    assert (folder / "plugins" / "neural-search" / "plugin-descriptor.properties").is_file()
    assert not (folder / "modules" / "analysis-common").exists()
    assert download.bytes_to_download() == 0

    recorder = Recorder()
    download.ensure_distribution(recorder)
    assert recorder.notes == []

    # An unpacking takes seconds, so only the reason for another one is checked.
    contents, jar = (folder / download.CONTENTS).read_text(), f"lib/opensearch-{OPENSEARCH_VERSION}.jar"
    assert json.loads(contents)[jar]
    (folder / download.CONTENTS).write_text('["lib"]')
    assert not download._is_intact(folder)
    (folder / download.CONTENTS).write_text(contents)
    assert download._is_intact(folder)
    (folder / jar).unlink()
    assert not download._is_intact(folder)


@pytest.mark.parametrize(
    ("version", "taken"), [("17.0.15", False), ("1.8.0_402", False), ("21", True), ("25.0.1", True)]
)
def test_an_installed_java_is_used_if_it_is_new_enough(
    version: str, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with server_home() as home:
        java = home / "jdk" / "bin" / "java"
        folders.make_folder(java.parent)
        java.write_text(f"#!/bin/sh\necho 'openjdk version \"{version}\"' >&2\n")
        java.chmod(0o755)
        monkeypatch.setenv("SPARSE_INGEST_HOME", str(home))
        monkeypatch.setenv("JAVA_HOME", str(home / "jdk"))
        monkeypatch.setenv("PATH", str(home))
        found = download.ensure_java(folders.server_account(), SILENT)
        assert (found == java) is taken
        assert found.is_file()


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSE_INGEST_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "jgo.maven", None)
    with pytest.raises(MissingExtraError, match=r"sparse-ingest\[local\]"):
        download.ensure_distribution(SILENT)


def test_a_folder_that_the_user_of_the_server_cannot_enter_is_refused(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    (closed / "data").mkdir()
    stranger = pwd.struct_passwd(("nobody", "", 4_000_000, 4_000_000, "", "", ""))
    with pytest.raises(LocalServerError, match=f"nobody, who cannot enter .* Put {closed / 'data'} elsewhere"):
        folders.require_reachable(closed / "data", stranger)
    folders.require_reachable(closed / "data", None)


def test_docker_compose_names_the_same_version() -> None:
    compose = (Path(__file__).parents[2] / "docker-compose.yml").read_text()
    assert re.findall(r"image: opensearchproject/opensearch:(\S+)", compose) == [OPENSEARCH_VERSION]
