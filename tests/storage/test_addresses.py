"""Parsing of addresses with credentials: a password ends at the last @ and is never shown."""

from __future__ import annotations

import traceback
from base64 import b64decode
from contextlib import closing
from http.server import ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote, unquote

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support.serving import AnsweringHandler, serving
from support.stores import web_server
from yarl import URL

from sparse_ingest.cluster.client import Connection, connect
from sparse_ingest.cluster.connection import parse_url
from sparse_ingest.errors import StorageError, UsageError
from sparse_ingest.storage.addresses import split_address, without_secrets
from sparse_ingest.storage.places import RemotePath

SECRET = "hid/den@3f?9c#"
HOST = "search.invalid:9201"
AWKWARD = [
    "pa/ss",
    "a?b",
    "a#b",
    "a@b",
    "a:b",
    "100%",
    "12/34",
    "/",
    "@",
    "p@s/s",
    "a b",
    "it's",
    'a"b',
    "a://b",
    "%zz%41",
]
PASSWORDS = st.one_of(
    st.sampled_from(AWKWARD), st.text(st.characters(exclude_categories=["Cs"])), st.text("/?#@:%a1", min_size=1)
)


def shown_of(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


@given(PASSWORDS)
@example("hidden-3f9c/x@y?z#1:%41%")
def test_the_password_of_a_cluster_ends_at_the_last_at_sign(password: str) -> None:
    # Without a scheme, `me:` before `//` would be parsed as one.
    for url in (f"http://me:{password}@{HOST}/base", f"me:{password}@{HOST}/base")[: 1 + (password[:2] != "//")]:
        address, user, found = parse_url(url)
        assert (str(address), user) == (f"http://{HOST}/base", "me")
        # Percent-encoded passwords are decoded; a raw password may not contain characters that need encoding.
        assert found == password or (found == unquote(password) and not set(password) & set("/?#@ "))
        assert repr(Connection(url)) == f"Connection(url='http://{HOST}/base', user='me')"
        assert parse_url(f"http://me:{quote(password, safe='')}@{HOST}") == (
            address._replace(prefix=""),
            "me",
            password,
        )


@given(PASSWORDS)
def test_the_password_of_a_web_address_is_passed_only_to_the_library(password: str) -> None:
    address = f"https://me:{password}@{HOST}/file.jsonl"
    parts = split_address(address)
    assert URL(parts.encoded).password == (parts.password or "") and URL(parts.encoded).host == "search.invalid"
    for text in (address, parts.encoded):
        assert str(split_address(text)) == f"https://{HOST}/file.jsonl"
    assert without_secrets(f"Cannot open '{parts.encoded}'") == f"Cannot open 'https://{HOST}/file.jsonl'"
    if parts.is_clear:
        place = RemotePath.at(address)
        assert (str(place), str(place / "x@y")) == (f"https://{HOST}/file.jsonl", f"https://{HOST}/file.jsonl/x@y")
    else:
        with pytest.raises(UsageError, match="is ambiguous") as refused:
            RemotePath.at(address)
        assert HOST not in shown_of(refused.value)


@pytest.mark.parametrize(
    ("address", "user", "rest"),
    [
        ("http://host/path@x", None, "host/path@x"),
        ("https://host/f?time=1:2&by=a@b", None, "host/f?time=1:2&by=a@b"),
        ("http://me@host", "me", "host"),
        ("s3://bucket/key:1@x", None, "bucket/key:1@x"),
        ("http://me@corp:pw@host", "me@corp", "host"),
    ],
)
def test_credentials_end_at_the_last_at_sign_of_the_host_part(address: str, user: str | None, rest: str) -> None:
    parts = split_address(address)
    assert (parts.user, parts.rest) == (user, rest)


@pytest.mark.parametrize(
    "rest",
    ["ho st", "host:port", "host:99999", "host/a b", "host/?q=hidden", "host/#hidden", "[::1", "", ":9200", "h\x1bost"],
)
def test_an_invalid_host_is_refused_without_repeating_it(rest: str) -> None:
    for url in (f"http://me:hidden/3f9c@{rest}", f"http://{rest}"):
        with pytest.raises(UsageError) as refused:
            connect(Connection(url))
        assert "hidden" not in shown_of(refused.value) and "--url is invalid" in str(refused.value)


def test_an_at_sign_after_the_path_of_a_cluster_must_be_encoded() -> None:
    with pytest.raises(UsageError, match="--url is invalid"):
        parse_url("http://host/path@x")
    assert str(parse_url("http://host/path%40x")[0]) == "http://host:9200/path%40x"


@pytest.mark.parametrize("password", [*AWKWARD, "p\udcffq", "пароль"])
def test_a_cluster_gets_the_password_unchanged(password: str) -> None:
    seen: list[str] = []

    class Handler(AnsweringHandler):
        def do_GET(self) -> None:
            login = b64decode(self.headers["authorization"].removeprefix("Basic "))
            seen.append(login.decode(errors="surrogateescape"))
            version = {"number": "3.6.0", "distribution": "opensearch"}
            self.answer(200, {"version": version, "cluster_uuid": "x"})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    with serving(server):
        port = server.server_address[1]
        with closing(connect(Connection(f"http://me:{password}@127.0.0.1:{port}"))) as client:
            assert client.address == f"http://127.0.0.1:{port}"
    assert seen == [f"me:{password}"]


def test_invalid_unicode_is_refused_without_repeating_it() -> None:
    with pytest.raises(UsageError, match="not Unicode") as refused:
        connect(Connection(f"http://me:{SECRET}\ud800@host"))
    assert SECRET not in shown_of(refused.value)


def test_a_web_server_gets_the_password_and_errors_do_not_show_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparse_ingest.storage.places._PAUSES_S", (0.01,))
    (tmp_path / "file").write_bytes(b"content")
    with web_server(tmp_path) as url:
        place = RemotePath.at(f"{url.replace('//', f'//me:{SECRET}@')}/file")
        assert place.read_bytes() == b"content"
        with pytest.raises(FileNotFoundError) as missing:
            (place.parent / "none").read_bytes()
    with pytest.raises(StorageError) as gone:
        RemotePath.at(f"http://me:{SECRET}@127.0.0.1:9/file").read_bytes()
    for text in (str(place), repr(place), shown_of(missing.value), shown_of(gone.value)):
        assert SECRET not in text and quote(SECRET, safe="") not in text and "den@" not in text
