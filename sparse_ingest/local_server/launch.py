"""Start the server process: JVM options and OpenSearch configuration.

Its command line contains `TOKEN` with a random value, by which process.py recognizes its own servers.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from sparse_ingest.errors import LocalServerError, UsageError
from sparse_ingest.local_server.folders import Account, as_account, make_folder

CLUSTER_NAME = "sparse-ingest"
TOKEN = "-Dsparse.ingest.token="
_FOLDER = Path(__file__).parent  # with files in the server's own formats
_JVM_OPTIONS = tuple(line for line in (_FOLDER / "jvm.options").read_text().splitlines() if not line.startswith("#"))


def heap_bytes(heap: str) -> int:
    """Return a heap size such as 512m or 2g in bytes."""
    found = re.fullmatch(r"(\d+)([kmgKMG])", heap)
    if not found:
        raise UsageError(f"{heap!r} is not a heap size: expected an integer with k, m or g, such as 512m or 2g.")
    unit_bytes = {"k": 1024, "m": 1024**2, "g": 1024**3}[found.group(2).lower()]
    return int(found.group(1)) * unit_bytes


def write_configuration(home: Path, port: int, data: Path, *, with_ml: bool = False) -> None:
    """Write the server's configuration to `home`/config, and create an empty `home`/tmp."""
    settings: dict[str, Any] = {
        "cluster.name": CLUSTER_NAME,
        "node.name": f"{CLUSTER_NAME}-{port}",
        "discovery.type": "single-node",
        "network.host": "127.0.0.1",
        "http.port": port,
        # Refuses requests with an Origin header, which browsers send with each POST, PUT and DELETE of a page. Without
        # cors OpenSearch ignores the header, and any page could send _delete_by_query?q=* without a preflight.
        "http.cors.enabled": True,
        "http.cors.allow-origin": "",
        # Any free port: nothing joins a single node.
        "transport.port": 0,
        "path.data": str(data),
        "path.logs": str(make_folder(home / "logs")),
        "path.repo": [str(data / "snapshots")],
        # The watermarks make every index read-only on a disk 95% full, which on a large disk still has much space.
        "cluster.routing.allocation.disk.threshold_enabled": False,
    }
    if with_ml:
        # By default models run only on nodes with the role `ml`.
        settings["plugins.ml_commons.only_run_on_ml_node"] = False
    for folder in (home / "config", home / "tmp"):
        # Deleted first: in a folder of the server's user, root would follow links of that user.
        if folder.exists():
            shutil.rmtree(folder)
        make_folder(folder)
    # JSON values are valid YAML.
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in settings.items()]
    (home / "config" / "opensearch.yml").write_text("".join(lines))
    shutil.copyfile(_FOLDER / "log4j2.properties", home / "config" / "log4j2.properties")
    for path in (home / "config").iterdir():
        path.chmod(0o644)


def java_command(java: Path, home: Path, distribution: Path, *, heap: str, token: str) -> list[str]:
    """Return the command that runs OpenSearch with the configuration in `home`, in the folder `distribution`."""
    return [
        str(java),
        f"-Xms{heap}",
        f"-Xmx{heap}",
        f"-XX:MaxDirectMemorySize={heap_bytes(heap) // 2}",
        *_JVM_OPTIONS,
        f"-Djava.io.tmpdir={home / 'tmp'}",
        f"-Djna.tmpdir={home / 'tmp'}",
        f"-XX:ErrorFile={home / 'tmp' / 'hs_err_pid%p.log'}",
        f"-Dopensearch.path.home={distribution}",
        f"-Dopensearch.path.conf={home / 'config'}",
        TOKEN + token,
        "-cp",
        "lib/*",
        "org.opensearch.bootstrap.OpenSearch",
    ]


def spawn(command: list[str], distribution: Path, account: Account | None, log: Path) -> subprocess.Popen[bytes]:
    """Start the command as `account`, with its output in `log`."""
    try:
        # A clean environment: variables such as JAVA_TOOL_OPTIONS would change the server. Java needs a locale to open
        # paths that are not ASCII. With its own session and no pipe, the server survives our exit and Ctrl-C.
        with log.open("wb") as output:
            return subprocess.Popen(
                command,
                cwd=distribution,
                env={"PATH": os.defpath, "LC_ALL": "C.UTF-8"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                **as_account(account),
            )
    except OSError as error:
        raise LocalServerError(
            f"{command[0]} cannot be run with its log in {log}: {error.strerror}. Name another Java with "
            "OPENSEARCH_JAVA_HOME, or another folder with SPARSE_INGEST_HOME."
        ) from error
