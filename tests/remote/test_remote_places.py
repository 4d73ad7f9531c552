"""Remote addresses: parsing, reading, writing, and no secrets in messages."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.stores import SECRET, FaultyStore, web_server

from sparse_ingest.errors import MissingExtraError, StorageError, UsageError
from sparse_ingest.storage.places import RemotePath, place_of, without_secrets

CONTENT = bytes(range(256)) * 40_000  # 3 blocks


@pytest.fixture(params=["s3", "memory"])
def folder(request: pytest.FixtureRequest) -> RemotePath:
    if request.param == "memory":
        return RemotePath.at(f"memory://{time.monotonic_ns()}")
    return RemotePath.at(f"{request.getfixturevalue('bucket')}/folder")


@pytest.fixture(params=[True, False], ids=["ranges", "no ranges"])
def served(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RemotePath]:
    (tmp_path / "file ä.bin").write_bytes(CONTENT)
    with web_server(tmp_path, ranges=request.param) as url:
        yield RemotePath.at(f"{url}/file%20%C3%A4.bin")


def test_a_path_with_a_scheme_is_an_address() -> None:
    assert str(place_of("memory://bucket/x")) == "memory://bucket/x" and str(place_of("HTTP://h/x")) == "http://h/x"
    for spec in ("a/b", "/a/b", "a:b", "C:/x", "hf:name", "-", "./s3:/x"):
        assert place_of(spec) == Path(spec)
    assert place_of("file:///a/b%20c") == Path("/a/b c")


def test_parts_of_an_address() -> None:
    place = RemotePath.at("memory://bucket/a/part-00001.parquet/")
    assert place.name == "part-00001.parquet"
    assert str(place.parent / "b") == "memory://bucket/a/b"
    assert place == RemotePath.at("memory://bucket/a/part-00001.parquet")
    assert len({place, place.parent / place.name}) == 1


def test_a_file_is_written_once_and_read(folder: RemotePath) -> None:
    place = folder / "file"
    assert not folder.exists() and not place.exists() and list(folder.iterdir()) == []
    with pytest.raises(FileNotFoundError):
        place.read_bytes()
    place.write_whole(b"one", exclusive=True)
    with pytest.raises(FileExistsError):
        place.write_whole(b"two", exclusive=True)
    assert place.read_bytes() == b"one"
    first = place.about()
    place.write_whole(b"two")
    assert place.read_bytes() == b"two" and place.about() != first
    assert folder.is_dir() and place.exists() and not place.is_dir()
    place.unlink()
    place.unlink(missing_ok=True)
    assert not place.exists()


def test_a_folder_is_listed_in_byte_order(folder: RemotePath) -> None:
    for name in ("b", "a.json", "é", "B", "inner/x"):
        place = folder
        for part in name.split("/"):
            place = place / part
        place.write_whole(b"")
    assert [place.name for place in folder.iterdir()] == ["B", "a.json", "b", "inner", "é"]
    assert [place.name for place in folder.glob("*.json")] == ["a.json"]


def test_an_upload_is_read_in_ranges(folder: RemotePath, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(CONTENT)
    place = folder / "file"
    place.upload(tmp_path / "file")
    with place.open() as file:
        assert file.read() == CONTENT
        file.seek(5_000_000)
        assert file.read(300) == CONTENT[5_000_000:5_000_300]
    with place.open_ranges() as ranges:
        ranges.seek(-300, io.SEEK_END)
        assert ranges.read(1000) == CONTENT[-300:] and ranges.read(1) == b""


def test_a_web_file_is_read(served: RemotePath) -> None:
    assert served.name == "file ä.bin"
    assert served.about()["size"] == len(CONTENT)
    with served.open() as file:
        assert file.read() == CONTENT


def test_a_web_file_can_be_opened_at_an_offset(served: RemotePath) -> None:
    with served.open() as file:
        file.seek(6_000_000)
        assert file.read(1000) == CONTENT[6_000_000:6_001_000]
        assert file.read() == CONTENT[6_001_000:]


def test_a_truncated_web_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(CONTENT)
    with web_server(tmp_path) as url, RemotePath.at(f"{url}/file").open() as file:
        (tmp_path / "file").write_bytes(CONTENT[:5_000_000])
        with pytest.raises(StorageError, match="ended after 5000000 bytes, but had 10240000 when it was opened"):
            file.read()


def test_without_range_requests_seeking_back_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(CONTENT)
    with web_server(tmp_path, ranges=False) as url, RemotePath.at(f"{url}/file").open_ranges() as file:
        file.seek(6_000_000)
        file.read(10)
        file.seek(0)
        with pytest.raises(StorageError, match="can be read only from its start"):
            file.read(10)


def test_a_signed_link_and_a_password_are_sent_and_never_shown(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    with web_server(tmp_path, token=f"sig={SECRET}") as url:
        place = RemotePath.at(f"{url.replace('//', f'//user:{SECRET}@')}/file?a=1&sig={SECRET}")
        assert place.read_bytes() == b"content"
        assert (place.parent / "file").read_bytes() == b"content"
        with pytest.raises(FileNotFoundError) as missing:
            (place.parent / "none").read_bytes()
        refused = RemotePath.at(f"{url}/file?sig=wrong{SECRET[:4]}")
        with pytest.raises(StorageError, match="Check the credentials") as error:
            refused.read_bytes()
    for text in (str(place), repr(place), place.name, str(missing.value), str(error.value)):
        assert SECRET[:4] not in text and "sig" not in text and "user" not in text


def test_secrets_are_removed_from_texts() -> None:
    message = "404, url='https://me:pass@host/a?sig=1&x=2' and https://b/c?d s3://k:v@bucket/e?f"
    assert without_secrets(message) == "404, url='https://host/a' and https://b/c s3://bucket/e?f"
    assert without_secrets("HTTPS://me:p@s/s@host/a?sig=1") == "HTTPS://host/a"
    assert without_secrets("ftp://me:pa/s?s@host/a at http://host:80/a@b") == "ftp://host/a at http://host:80/a@b"


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (f"s3://key:{SECRET}@bucket/x", "s3://bucket/x has credentials in the address"),
        (f"gs://key:{SECRET}@bucket/x", "GOOGLE_APPLICATION_CREDENTIALS"),
        ("xyz://a/b", "The scheme of xyz://a/b is unknown"),
        (f"https://me:{SECRET}@[::1/x?sig={SECRET}", "https://[::1/x is not an address: "),
    ],
)
def test_invalid_addresses_are_refused(address: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        RemotePath.at(address)
    assert message in str(error.value) and SECRET not in str(error.value)


@pytest.mark.parametrize(("address", "library"), [("s3://bucket/x", "s3fs"), ("https://host/x", "fsspec.core")])
def test_a_missing_extra_gives_one_message(address: str, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec.core  # noqa: F401 - also loads its registry

    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingExtraError, match=r"needs the extra \"remote\": pip install"):
        RemotePath.at(address)


@pytest.mark.slow  # Google's library probes for a cloud environment
def test_google_cloud_storage_addresses_are_accepted() -> None:
    place = RemotePath.at("gs://bucket/folder/run") / "done"
    assert (str(place), place.writable, place.listable) == ("gs://bucket/folder/run/done", True, True)


def test_web_addresses_are_read_only(tmp_path: Path) -> None:
    with web_server(tmp_path) as url:
        place = RemotePath.at(f"{url}/x")
        for act in (lambda: place.write_whole(b""), place.unlink, lambda: place.upload(tmp_path / "x")):
            with pytest.raises(StorageError, match="for reading"):
                act()
        with pytest.raises(StorageError, match="cannot be listed"):
            list(place.iterdir())


@pytest.mark.parametrize("fault", [503, *(pytest.param(one, marks=pytest.mark.slow) for one in (500, "drop"))])
def test_requests_are_retried_after_a_transient_store_fault(faulty: FaultyStore, bucket: str, fault: int | str) -> None:
    place = RemotePath.at(f"{bucket}/file")
    faulty.inject("PUT", fault)
    place.write_whole(b"content")
    faulty.inject("GET", fault)
    assert place.read_bytes() == b"content"
    faulty.inject("HEAD", fault, fault)
    assert place.exists()
    assert faulty.done == [fault, fault]


def test_a_truncated_response_is_requested_again(faulty: FaultyStore, bucket: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(CONTENT)
    place = RemotePath.at(f"{bucket}/file")
    place.upload(tmp_path / "file")
    faulty.inject("GET", "cut", "cut", "drop")
    with place.open() as file:
        assert file.read() == CONTENT
    assert faulty.done == ["cut", "cut", "drop"]


def test_an_exclusive_file_exists_even_if_the_response_was_lost(faulty: FaultyStore, bucket: str) -> None:
    place = RemotePath.at(f"{bucket}/file")
    faulty.inject("PUT", "lost answer")
    with pytest.raises(FileExistsError):
        place.write_whole(b"content", exclusive=True)
    assert place.read_bytes() == b"content"


def test_a_refusal_is_reported_without_retries(faulty: FaultyStore, bucket: str) -> None:
    faulty.inject("", always=403)
    with pytest.raises(StorageError, match="Check the credentials") as error:
        (RemotePath.at(bucket) / "file").read_bytes()
    assert SECRET not in str(error.value)
    assert len(faulty.seen) < 3


@pytest.mark.slow
def test_a_store_that_keeps_failing_gives_one_message(faulty: FaultyStore, bucket: str) -> None:
    faulty.inject("", always=503)
    for act in (lambda: (RemotePath.at(bucket) / "file").read_bytes(), RemotePath.at(bucket).exists):
        with pytest.raises(StorageError, match="start again: what is finished is kept"):
            act()


def test_a_web_server_error_is_not_reported_as_a_missing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparse_ingest.storage.places._PAUSES_S", (0.01, 0.01))
    (tmp_path / "file").write_bytes(b"x")
    with web_server(tmp_path) as url:
        place = RemotePath.at(f"{url}/file")
        assert place.exists()
        assert not (place.parent / "none").exists()
    with pytest.raises(StorageError, match="cannot be inspected"):
        place.exists()
