"""TLS certificates created with openssl for one test session: two authorities and their certificates."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import NamedTuple

_NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


class Pair(NamedTuple):
    cert: Path
    key: Path


class Authority:
    """Signs certificates; pass `pair.cert` as --ca."""

    def __init__(
        self, folder: Path, name: str, extension: str = "keyUsage=critical,keyCertSign,cRLSign", days: int = 2
    ) -> None:
        self.folder = folder
        self.pair = Pair(folder / f"{name}.pem", folder / f"{name}.key")
        request, extensions = folder / f"{name}.csr", folder / f"{name}.ext"
        extensions.write_text(f"basicConstraints=critical,CA:TRUE\n{extension}\n")
        _openssl("req", "-new", *_NEW_KEY, "-keyout", self.pair.key, "-out", request, "-subj", f"/CN={name}")
        _openssl(
            *("x509", "-req", "-in", request, "-signkey", self.pair.key, "-out", self.pair.cert),
            *("-days", days, "-extfile", extensions),
        )

    def sign(self, name: str, *, alternatives: str = "DNS:localhost,IP:127.0.0.1", days: int = 2) -> Pair:
        """Return a certificate for `alternatives`; negative `days` means it has expired."""
        pair = Pair(self.folder / f"{name}.pem", self.folder / f"{name}.key")
        request, extensions = self.folder / f"{name}.csr", self.folder / f"{name}.ext"
        extensions.write_text(f"subjectAltName={alternatives}\n")
        _openssl("req", "-new", *_NEW_KEY, "-keyout", pair.key, "-out", request, "-subj", f"/CN={name}")
        _openssl(
            *("x509", "-req", "-in", request, "-out", pair.cert, "-days", days, "-extfile", extensions),
            *("-CA", self.pair.cert, "-CAkey", self.pair.key, "-CAcreateserial"),
        )
        return pair

    def with_passphrase(self, pair: Pair, passphrase: str) -> Pair:
        """Return the same certificate with an encrypted key."""
        key = pair.key.with_suffix(".locked")
        _openssl("pkey", "-in", pair.key, "-out", key, "-aes256", "-passout", f"pass:{passphrase}")
        return Pair(pair.cert, key)


def _openssl(*arguments: object) -> None:
    done = subprocess.run(["openssl", *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
