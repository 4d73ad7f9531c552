"""AWS SigV4, against a proxy that recomputes each signature from AWS's specification, without botocore."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import subprocess
import sys
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import quote, urlsplit

import pytest
from support.certificates import Authority, Pair
from support.runs import DOCUMENTS, make_run
from support.secure_proxy import Refusal, Request, secure_proxy

from sparse_ingest.cluster.client import Connection, ResponseError, UnreachableError, connect
from sparse_ingest.errors import ClusterError, UsageError
from sparse_ingest.loading.load import load
from sparse_ingest.pipeline import Pipeline
from sparse_ingest.verification.verify import verify

REGION, SECRET, TOKEN = "eu-west-1", "secret/of+the=load", "token//of++the==session"


@dataclass
class AwsCheck:
    """Refuses requests with a wrong signature, scope, token or date, and records the access keys."""

    service: str
    secret: str = SECRET
    token: str | None = TOKEN
    keys: list[str] = field(default_factory=list)

    def __call__(self, request: Request) -> Refusal | None:
        given = dict(part.split("=", 1) for part in request.headers["authorization"].split(" ", 1)[1].split(", "))
        key, _, scope = given["Credential"].partition("/")
        date = request.headers["x-amz-date"]
        signed = given["SignedHeaders"].split(";")
        # Path segments are URL-encoded twice for every service but S3.
        path, _, query = request.path.partition("?")
        canonical = "\n".join(
            [
                request.method,
                quote(path, safe="/-_.~"),
                "&".join(sorted(query.split("&"))) if query else "",
                *(f"{name}:{request.headers[name]}" for name in signed),
                "",
                given["SignedHeaders"],
                hashlib.sha256(request.body).hexdigest(),
            ]
        )
        to_sign = "\n".join(["AWS4-HMAC-SHA256", date, scope, hashlib.sha256(canonical.encode()).hexdigest()])
        derived = f"AWS4{self.secret}".encode()
        for part in (*self._scope(date), to_sign):
            derived = hmac.digest(derived, part.encode(), "sha256")
        age = datetime.now(UTC) - datetime.strptime(date, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
        right = {
            "signature": given["Signature"] == derived.hex(),
            "scope": scope == "/".join(self._scope(date)),
            "token": request.headers.get("x-amz-security-token") == self.token,
            "age": abs(age) < timedelta(minutes=5),
            "headers": {"host", "x-amz-date"} <= set(signed),
            "hash": request.headers.get("x-amz-content-sha256") == hashlib.sha256(request.body).hexdigest(),
        }
        self.keys.append(key)
        if wrong := [name for name, is_right in right.items() if not is_right]:
            # The format of AWS, which repeats the canonical request.
            text = f"The request signature does not match: {', '.join(wrong)}.\n\nThe Canonical String: '{canonical}'"
            return 403, {"message": text}
        if self.service == "aoss" and urlsplit(request.path).path == "/":
            return 404, ""
        return None

    def _scope(self, date: str) -> tuple[str, ...]:
        return (date[:8], REGION, self.service, "aws4_request")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Pair]:
    authority = Authority(tmp_path_factory.mktemp("certificates"), "ours")
    return authority.pair.cert, authority.sign("server")


@pytest.fixture(autouse=True)
def aws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Credentials only in environment variables. Return the path of the config file, which does not exist."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    given = {
        "AWS_ACCESS_KEY_ID": "AKIDEXAMPLE",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_SESSION_TOKEN": TOKEN,
        "AWS_CONFIG_FILE": str(tmp_path / "config"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "credentials"),
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    return tmp_path / "config"


def signed(url: str, service: str, ca: Path | None = None) -> Connection:
    return Connection(url, ca=ca and str(ca), aws_region=REGION, aws_service=service)


@pytest.mark.parametrize("service", ["es", "aoss"])
def test_load_and_verify_are_signed(
    opensearch_url: str, index_name: str, tmp_path: Path, certificate: tuple[Path, Pair], service: str, caplog
) -> None:
    run, (ca, pair) = make_run(tmp_path / "run"), certificate
    with secure_proxy(opensearch_url, certificate=pair, check=AwsCheck(service)) as proxy:
        connection = signed(proxy.url, service, ca)
        report = load(run.path, index=index_name, pipeline=Pipeline(), connection=connection)
        assert report.acknowledged == len(DOCUMENTS)
        assert verify(run.path, index=index_name, connection=connection, sample=None).ok
        with closing(connect(connection)) as client:
            odd = quote('id "with" \\ é', safe="")
            assert client.call("GET", f"/{index_name}/_doc/{odd}", params={"_source_includes": "title,a b"})["found"]
    assert [path for method, path in proxy.refused if path != "/"] == []
    notes = [record.getMessage() for record in caplog.records if record.name.startswith("sparse_ingest")]
    assert any("Serverless has no version; OpenSearch 3.6.0 is assumed" in note for note in notes) is (
        service == "aoss"
    )


def test_a_refused_signature_is_one_message_without_secrets(
    opensearch_url: str, certificate: tuple[Path, Pair], tmp_path: Path
) -> None:
    run, (ca, pair) = make_run(tmp_path / "run"), certificate
    code = (
        "import logging; logging.basicConfig(level=logging.DEBUG);"
        "from sparse_ingest.cluster.client import Connection, connect;"
        f"connect(Connection({{}}, ca={str(ca)!r}, aws_region={REGION!r}, aws_service='es'))"
    )
    words = ["load", run.path, "--index", "never", "--ca", ca, "--aws-service", "es", "--aws-region", REGION]
    program = "from sparse_ingest.cli.main import main; main()"
    with secure_proxy(opensearch_url, certificate=pair, check=AwsCheck("es", secret="another")) as proxy:
        traced = subprocess.run(
            [sys.executable, "-c", code.format(repr(proxy.url))], capture_output=True, text=True, check=False
        )
        ended = subprocess.run(
            [sys.executable, "-c", program, *map(str, words), "--url", proxy.url],
            capture_output=True,
            text=True,
            check=False,
        )
    assert ended.returncode == 1
    assert ended.stderr.strip() == (
        f"Error: {proxy.url} refuses these AWS credentials (403). Check AWS_PROFILE, --aws-region, --aws-service and "
        "the access policy. Its reason: The request signature does not match: signature."
    )
    assert "botocore" in traced.stderr
    assert "ResponseError" in traced.stderr
    for secret in (SECRET, TOKEN):
        assert secret not in traced.stderr + traced.stdout


def write_process(config: Path, script: str) -> None:
    """Configure a credential_process, as single sign-on tools do."""
    program = config.with_name("credentials.sh")
    program.write_text(f"#!/bin/sh\n{script}")
    program.chmod(0o755)
    config.write_text(f"[default]\ncredential_process = {program}\n")


def test_expiring_credentials_are_refreshed_during_a_load(
    opensearch_url: str, index_name: str, tmp_path: Path, aws: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    soon = (datetime.now(UTC) + timedelta(minutes=5)).isoformat()
    answer = {"Version": 1, "SecretAccessKey": SECRET, "SessionToken": TOKEN, "Expiration": soon}
    counter = tmp_path / "counter"
    write_process(
        aws,
        f"echo x >> {counter}\n"
        f"echo '{json.dumps(answer)[:-1]}, \"AccessKeyId\": \"KEY'$(wc -l < {counter} | tr -d ' ')'\"}}'\n",
    )
    run = make_run(tmp_path / "run", shard_rows=1)
    check = AwsCheck("es")
    with secure_proxy(opensearch_url, check=check) as proxy:
        load(run.path, index=index_name, pipeline=Pipeline(), connection=signed(proxy.url, "es"))
        assert proxy.refused == []
    assert len(set(check.keys)) > 5


def test_an_expired_session_is_an_error_and_is_not_retried(
    opensearch_url: str, aws: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    ended = (datetime.now(UTC) + timedelta(seconds=1)).isoformat()
    answer = {"Version": 1, "AccessKeyId": "K", "SecretAccessKey": SECRET, "SessionToken": TOKEN, "Expiration": ended}
    once = tmp_path / "once"
    write_process(
        aws, f"[ -e {once} ] && {{ echo 'sign in again' >&2; exit 1; }}\ntouch {once}\necho '{json.dumps(answer)}'\n"
    )
    with secure_proxy(opensearch_url, check=AwsCheck("es")) as proxy:
        with pytest.raises(ClusterError, match="boto3 cannot get AWS credentials: .*sign in again") as caught:
            connect(signed(proxy.url, "es"))
        assert not isinstance(caught.value, UnreachableError)
        assert proxy.asked == []


def test_missing_region_profile_and_credentials_are_reported(
    monkeypatch: pytest.MonkeyPatch, aws: Path, opensearch_url: str
) -> None:
    with pytest.raises(UsageError, match="--aws-service needs --aws-region"):
        connect(Connection(opensearch_url, aws_service="es"))
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(ClusterError, match=r"boto3 cannot get AWS credentials: .*\(nobody\) could not be found"):
        connect(signed(opensearch_url, "es"))
    monkeypatch.delenv("AWS_PROFILE")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(ClusterError, match="boto3 finds no AWS credentials"):
        connect(signed(opensearch_url, "es"))


def test_the_region_is_read_from_the_profile(opensearch_url: str, aws: Path) -> None:
    aws.write_text(f"[default]\nregion = {REGION}\n")
    with secure_proxy(opensearch_url, check=AwsCheck("es")) as proxy:
        connect(Connection(proxy.url, aws_service="es")).close()
        assert proxy.refused == []


def test_a_404_at_the_root_path_is_accepted_only_from_serverless(opensearch_url: str) -> None:
    with secure_proxy(opensearch_url, check=lambda request: (404, "")) as proxy:
        with pytest.raises(ResponseError):
            connect(signed(proxy.url, "es"))
        assert connect(signed(proxy.url, "aoss")).cluster_uuid == "unknown"


def test_an_index_without_uuid_is_refused(opensearch_url: str, tmp_path: Path) -> None:
    """Not yet tried on Serverless: its indexes may have no UUID."""
    answer = {"mine": {"aliases": {}, "mappings": {}, "settings": {"index": {"number_of_shards": "2"}}}}
    with secure_proxy(opensearch_url, check=lambda one: (200, answer) if one.path == "/mine" else (404, "")) as proxy:
        with pytest.raises(ClusterError, match="does not report the UUID of index 'mine'"):
            run = make_run(tmp_path / "run")
            load(run.path, index="mine", pipeline=Pipeline(), connection=signed(proxy.url, "aoss"))


def test_the_log_filter_removes_only_the_token(opensearch_url: str, caplog) -> None:
    with secure_proxy(opensearch_url, check=AwsCheck("es")) as proxy:
        connect(signed(proxy.url, "es")).close()
        with caplog.at_level(logging.DEBUG):
            logging.getLogger("opensearch").debug("< %s", "X-Amz-Security-Token: abc")
            logging.getLogger("opensearch").debug("< %s", "another answer")
    assert [record.args for record in caplog.records] == [("another answer",)]
