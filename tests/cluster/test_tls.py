"""TLS and passwords: load, verify and search work, each mistake is one message, and no secret is printed."""

from __future__ import annotations

import json
import logging
import os
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from support.certificates import Authority, Pair
from support.runs import make_run
from support.secure_proxy import SecureProxy, secure_proxy
from support.tables import write_table

from sparse_ingest.cli.main import main
from sparse_ingest.cluster.client import Connection, connect

USER, PASSWORD = "loader", "pä:ss wörd/€%40"  # differs if decoded as URL or Latin-1, or split at a colon
DOCUMENTS = {"one": {"catch": 1.5, "except": 0.5}, "two": {"except": 2.0, "river": 3.0}, "three": {}}


class Certificates(NamedTuple):
    """Two CAs and the certificates that they signed."""

    ca: Path
    stranger_ca: Path
    server: Pair
    elsewhere: Pair
    expired: Pair
    client: Pair
    locked_client: Pair
    stranger: Pair


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    folder = tmp_path_factory.mktemp("certificates")
    ours, stranger = Authority(folder, "ours"), Authority(folder, "stranger-ca")
    client = ours.sign("client")
    return Certificates(
        ca=ours.pair.cert,
        stranger_ca=stranger.pair.cert,
        server=ours.sign("server"),
        elsewhere=ours.sign("elsewhere", alternatives="DNS:search.example.org"),
        expired=ours.sign("expired", days=-1),
        client=client,
        locked_client=ours.with_passphrase(client, PASSWORD),
        stranger=stranger.sign("stranger"),
    )


@pytest.fixture
def run_path(tmp_path: Path) -> Path:
    model = tmp_path / "model"
    model.mkdir()
    write_table(model)
    return make_run(tmp_path / "run", DOCUMENTS, model=str(model), shard_rows=2).path


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("SPARSE_INGEST_", "AWS_"))]:
        monkeypatch.delenv(name)


@pytest.fixture
def failed_load(run_path: Path, capfd, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Return a function that runs `load`, checks its exit code, and returns its error message."""

    def run(proxy: SecureProxy, *arguments: object, url: str = "", code: int = 1) -> str:
        words = ["load", run_path, "--index", "sparse-ingest-test-never", "--url", url or proxy.url, *arguments]
        monkeypatch.setattr(sys, "argv", ["sparse-ingest", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        shown = capfd.readouterr()
        assert ended.value.code == code, shown
        assert shown.out == ""
        assert "Traceback" not in shown.err
        assert PASSWORD not in shown.err
        (message,) = [line for line in shown.err.splitlines() if line.startswith("Error: ")]
        return message

    return run


def command(variables: dict[str, str], *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run sparse-ingest in a process that logs every library at DEBUG to stderr."""
    code = (
        "import logging; logging.basicConfig(level=logging.DEBUG);"
        "logging.getLogger('opensearchpy.trace').addHandler(logging.StreamHandler());"
        "from sparse_ingest.cli.main import main; main()"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def file_contents(folder: Path) -> Iterator[bytes]:
    for path in folder.rglob("*"):
        if path.is_file():
            yield path.read_bytes()


def test_passwords_and_client_keys_work_and_are_neither_printed_nor_stored(
    opensearch_url: str, index_name: str, run_path: Path, certificates: Certificates, tmp_path: Path
) -> None:
    secrets = [PASSWORD, certificates.client.key.read_text().splitlines()[1]]
    with secure_proxy(
        opensearch_url, certificate=certificates.server, client_ca=certificates.ca, users={USER: PASSWORD}
    ) as proxy:
        variables = {
            "SPARSE_INGEST_URL": proxy.url,
            "SPARSE_INGEST_USER": USER,
            "SPARSE_INGEST_PASSWORD": PASSWORD,
            "SPARSE_INGEST_CA": str(certificates.ca),
            "SPARSE_INGEST_CLIENT_CERT": str(certificates.client.cert),
            "SPARSE_INGEST_CLIENT_KEY": str(certificates.client.key),
        }
        results = [
            command(variables, "load", run_path, "--index", index_name, "--json"),
            command(variables, "verify", run_path, "--index", index_name, "--all", "--json"),
            command(variables, "search", "--index", index_name, "an exception", "--json"),
        ]
        stored = connect(Connection(opensearch_url)).call("GET", f"/{index_name}/_mapping")
    for result in results:
        assert result.returncode == 0, result.stderr
    loaded, verified, found = (json.loads(result.stdout) for result in results)
    assert loaded["acknowledged"] == 3
    assert (verified["same"], verified["checked_documents"]) == (True, 3)
    assert [hit["id"] for hit in found["hits"]] == ["two", "one"]
    assert proxy.refused == []
    assert "urllib3" in results[0].stderr  # the libraries logged at DEBUG
    written = [*file_contents(tmp_path / "run"), json.dumps(stored, ensure_ascii=False).encode()]
    for secret in secrets:
        assert not any(secret in result.stdout + result.stderr for result in results)
        assert not any(secret.encode() in content for content in written)


def test_a_password_in_the_url_is_used_and_not_printed(opensearch_url: str, certificates: Certificates) -> None:
    with secure_proxy(opensearch_url, certificate=certificates.server, users={USER: PASSWORD}) as proxy:
        url = proxy.url.replace("//", "//loader:p%C3%A4%3Ass%20w%C3%B6rd%2F%E2%82%AC%2540@")
        given = Connection(url, ca=str(certificates.ca))
        client = connect(given)
        assert repr(given) == f"Connection(url='{proxy.url}', user='loader')"
        for shown in (repr(client), repr(client.__dict__), str(client._transport.hosts), client.address):
            assert not [part for part in ("wörd", "w%C3%B6rd", "Basic ") if part in shown]
        client.close()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((), "requires authentication (401): pass --user and --password, or a client certificate."),
        (("--user", USER, "--password", PASSWORD + "x"), "does not accept user 'loader' with this password (401)."),
        (("--user", "nobody", "--password", PASSWORD), "does not accept user 'nobody' with this password (401)."),
    ],
)
def test_wrong_credentials_are_reported(
    opensearch_url: str, certificates: Certificates, failed_load, given, message: str
) -> None:
    with secure_proxy(opensearch_url, certificate=certificates.server, users={USER: PASSWORD}) as proxy:
        assert message in failed_load(proxy, "--ca", certificates.ca, *given)
        assert proxy.asked == [("GET", "/")]


def test_an_untrusted_ca_is_reported(opensearch_url: str, certificates: Certificates, failed_load) -> None:
    with secure_proxy(opensearch_url, certificate=certificates.server) as proxy:
        for arguments in ((), ("--ca", certificates.stranger_ca)):
            message = failed_load(proxy, *arguments)
            assert "certificate verify failed" in message
            if arguments:
                assert f"Its certificate was signed by a CA that is not in {certificates.stranger_ca}" in message
                assert "--ca" not in message
            else:
                assert "Pass the file of the CA that signed its certificate with --ca." in message


@pytest.mark.parametrize("trusted", ["plain_ca", "pinned", "pinned_of_expired_ca"])
def test_ca_accepts_what_curl_accepts_on_every_python(
    opensearch_url: str, certificates: Certificates, tmp_path: Path, trusted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python 3.13 refuses a CA without key usage; older ones a certificate whose CA is not in the file."""
    if trusted == "plain_ca":
        older = ssl.create_default_context

        def of_python_3_13(*given, **more) -> ssl.SSLContext:
            context = older(*given, **more)
            context.verify_flags |= ssl.VERIFY_X509_STRICT
            return context

        monkeypatch.setattr(ssl, "create_default_context", of_python_3_13)
        plain = Authority(tmp_path, "plain", extension="")
        server, ca = plain.sign("of-plain"), plain.pair.cert
    else:
        server = certificates.server
        if trusted == "pinned_of_expired_ca":
            server = Authority(tmp_path, "long-gone", days=-1).sign("still-valid")
        ca = server.cert
    with secure_proxy(opensearch_url, certificate=server) as proxy:
        connect(Connection(proxy.url, ca=str(ca))).close()


def test_a_ca_of_the_same_name_with_another_key_is_reported(
    opensearch_url: str, certificates: Certificates, tmp_path: Path, failed_load
) -> None:
    twin = Authority(tmp_path, "ours")
    with secure_proxy(opensearch_url, certificate=certificates.server) as proxy:
        message = failed_load(proxy, "--ca", twin.pair.cert)
        assert f"Its certificate was signed by a CA that is not in {twin.pair.cert}" in message


def test_an_expired_ca_is_reported(opensearch_url: str, tmp_path: Path, failed_load) -> None:
    gone = Authority(tmp_path, "long-gone", days=-1)
    with secure_proxy(opensearch_url, certificate=gone.sign("still-valid")) as proxy:
        message = failed_load(proxy, "--ca", gone.pair.cert)
        assert f"{gone.pair.cert} contains a CA that has expired (long-gone)" in message
        assert "--ca" not in message


def test_a_certificate_for_another_name_is_reported(
    opensearch_url: str, certificates: Certificates, failed_load
) -> None:
    with secure_proxy(opensearch_url, certificate=certificates.elsewhere) as proxy:
        message = failed_load(proxy, "--ca", certificates.ca)
        assert "certificate is not valid for 'localhost'. Write the name that its certificate is for" in message
        message = failed_load(proxy, "--ca", certificates.ca, url=proxy.url.replace("localhost", "127.0.0.1"))
        assert "certificate is not valid for '127.0.0.1'" in message


def test_an_expired_certificate_is_reported(opensearch_url: str, certificates: Certificates, failed_load) -> None:
    with secure_proxy(opensearch_url, certificate=certificates.expired) as proxy:
        message = failed_load(proxy, "--ca", certificates.ca)
        assert "certificate has expired. Renew its certificate" in message
        assert "--ca" not in message


def test_a_missing_or_unknown_client_certificate_is_reported(
    opensearch_url: str, certificates: Certificates, failed_load
) -> None:
    with secure_proxy(opensearch_url, certificate=certificates.server, client_ca=certificates.ca) as proxy:
        assert "it asks for a client certificate" in failed_load(proxy, "--ca", certificates.ca)
        cert, key = certificates.stranger
        message = failed_load(proxy, "--ca", certificates.ca, "--client-cert", cert, "--client-key", key)
        assert "it does not accept the client certificate" in message
        assert proxy.asked == []


def test_unusable_certificate_files_are_reported(opensearch_url: str, certificates: Certificates, failed_load) -> None:
    cert, key = certificates.client
    with secure_proxy(opensearch_url, certificate=certificates.server) as proxy:
        message = failed_load(proxy, "--ca", key)
        assert f"--ca {key} cannot be used" in message
        assert "expected a PEM file of CA certificates" in message
        for arguments in (("--client-cert", cert), ("--client-cert", cert, "--client-key", certificates.server.key)):
            assert f"--client-cert {cert}" in failed_load(proxy, *arguments)
        message = failed_load(proxy, "--client-cert", cert, "--client-key", certificates.locked_client.key)
        assert "--client-key is protected by a passphrase" in message
        assert proxy.asked == []


def test_http_to_a_tls_server_is_reported(opensearch_url: str, certificates: Certificates, failed_load) -> None:
    with secure_proxy(opensearch_url, certificate=certificates.server) as proxy:
        assert "write https:// in --url" in failed_load(proxy, url=proxy.url.replace("https", "http"))


def test_conflicting_options_are_reported(opensearch_url: str, certificates: Certificates, failed_load) -> None:
    user = ("--user", USER, "--password", PASSWORD)
    signed = ("--aws-service", "es", "--aws-region", "eu-west-1")
    with secure_proxy(opensearch_url) as proxy:
        assert "A password needs a user: pass --user" in failed_load(proxy, *user[2:], code=2)
        assert "User 'loader' has no password" in failed_load(proxy, *user[:2], code=2)
        assert "--aws-service signs requests, so user 'loader'" in failed_load(proxy, *user, *signed, code=2)
        assert "--ca is for TLS, but --url begins with http://" in failed_load(proxy, "--ca", certificates.ca, code=2)
        cert, key = certificates.client
        assert "--client-cert is for TLS" in failed_load(proxy, "--client-cert", cert, code=2)
        assert "--client-key needs --client-cert" in failed_load(proxy, "--client-key", key, code=2)
        assert proxy.asked == []


def test_help_shows_the_names_of_variables_and_not_their_values() -> None:
    variables = {
        "SPARSE_INGEST_URL": f"https://me:{PASSWORD}@host",
        "SPARSE_INGEST_USER": USER,
        "SPARSE_INGEST_PASSWORD": PASSWORD,
    }
    for name in ("load", "verify", "search"):
        shown = command(variables, name, "--help")
        assert shown.returncode == 0
        assert "SPARSE_INGEST_PASSWORD" in shown.stdout
        assert PASSWORD not in shown.stdout + shown.stderr


def test_a_traceback_with_all_its_causes_has_no_password(
    opensearch_url: str, certificates: Certificates, caplog: pytest.LogCaptureFixture
) -> None:
    with secure_proxy(opensearch_url, certificate=certificates.server, users={}) as proxy:
        code = (
            "import sys; from sparse_ingest.cluster.client import Connection, connect\n"
            f"connect(Connection(sys.argv[1], user={USER!r}, password={PASSWORD!r}, ca=sys.argv[2]))"
        )
        words = [sys.executable, "-c", code, proxy.url, str(certificates.ca)]
        ended = subprocess.run(words, capture_output=True, text=True, check=False)
    assert "The above exception was the direct cause" in ended.stderr
    assert "ResponseError" in ended.stderr
    assert PASSWORD not in ended.stderr
    assert logging.getLogger("opensearch").handlers
