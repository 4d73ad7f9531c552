"""Authentication: the TLS context, the header of a user, the signature of AWS.

No password, key or session token is printed or logged. Keys with a passphrase are not supported.
"""

from __future__ import annotations

import logging
import os
import re
import ssl
import time
from base64 import b64encode
from collections.abc import Callable
from typing import Any, cast

import opensearchpy

from sparse_ingest.errors import ClusterError, UsageError, first_line, needs_extra


def tls_context(ca: str | None, client_cert: str | None, client_key: str | None) -> ssl.SSLContext:
    """Return the TLS context, or raise `ClusterError`. `ca` replaces the system's list, as curl's --cacert."""
    files, expected = f"--ca {ca}", "a PEM file of CA certificates"
    try:
        context = ssl.create_default_context(cafile=ca)
        # As curl does, on every Python: 3.13 rejects CAs that lack extensions, 3.12 a server's own certificate in --ca.
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        if not (ca or os.environ.get("SSL_CERT_FILE") or os.environ.get("SSL_CERT_DIR")):
            # Python from python.org does not use the system's list on macOS.
            context.load_verify_locations(opensearchpy.Connection.default_ca_certs())
        if client_cert:
            files = f"--client-cert {client_cert}" + (f" with --client-key {client_key}" if client_key else "")
            expected = "PEM files, a certificate and its key"
            # Without the callback OpenSSL would prompt on the terminal, and a load in the background would hang.
            context.load_cert_chain(client_cert, client_key, password=_refuse_passphrase)
    except OSError as error:
        raise ClusterError(f"{files} cannot be used ({_short(error)}): expected {expected}.") from error
    return context


def expired_in(ca: str) -> list[str]:
    """Return the names of the expired CA certificates in a file."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(ca)
    subjects = (
        dict(part for (part, *_) in cast(Any, found["subject"]))
        for found in context.get_ca_certs()
        if ssl.cert_time_to_seconds(str(found["notAfter"])) < time.time()
    )
    return [str(subject.get("commonName", "unnamed")) for subject in subjects]


def basic_header(user: str, password: str) -> dict[str, str]:
    """Return the header of HTTP basic authentication, in UTF-8 as OpenSearch reads it; urllib3 would use Latin-1."""
    return {"authorization": f"Basic {b64encode(f'{user}:{password}'.encode(errors='surrogateescape')).decode()}"}


def aws_signer(region: str | None, service: str) -> Callable[[str, str, bytes | None], dict[str, str]]:
    """Return a function that returns the AWS SigV4 headers of a request. boto3 renews credentials that expire."""
    with needs_extra("aws", "--aws-service"):
        import boto3  # type: ignore[import-untyped, import-not-found, unused-ignore]
        from botocore.exceptions import BotoCoreError  # type: ignore[import-untyped, import-not-found, unused-ignore]
    # At DEBUG botocore logs what it signs, and opensearch-py the answer of AWS, which repeats it.
    for name in ("botocore.auth", "opensearch"):
        logging.getLogger(name).addFilter(lambda record: "x-amz-security-token" not in record.getMessage().lower())
    try:
        session = boto3.Session()
        credentials, region = session.get_credentials(), region or session.region_name
    except BotoCoreError as error:
        raise ClusterError(_no_credentials(error)) from error
    if not region:
        raise UsageError("--aws-service needs --aws-region, or the variable AWS_REGION.")
    if credentials is None:
        raise ClusterError("boto3 finds no AWS credentials; set AWS_PROFILE or the AWS_ACCESS_KEY_ID variables.")
    signer = opensearchpy.Urllib3AWSV4SignerAuth(credentials, region, service)

    def sign(method: str, url: str, body: bytes | None) -> dict[str, str]:
        try:
            return dict(signer(method, url, body))
        except BotoCoreError as error:
            raise ClusterError(_no_credentials(error)) from error

    return sign


def _refuse_passphrase() -> str:
    raise ClusterError(
        "--client-key is protected by a passphrase. Write a copy without one that only you can read: "
        "openssl pkey -in KEY -out PLAIN"
    )


def _no_credentials(error: Exception) -> str:
    return (
        f"boto3 cannot get AWS credentials: {first_line(error)}. Check AWS_PROFILE, sign in again if it is a "
        "session, and start the same command again."
    )


def _short(error: OSError) -> str:
    """Return the reason of OpenSSL or the system, without OpenSSL's source location."""
    return re.sub(r"^\[.*?\]\s*|\s*\(_ssl\.c.*$", "", error.strerror or str(error))
