"""Make stub shards with Ray, as a process that a test can kill: FOLDER SHARDS SECONDS [ADDRESS]."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from sparse_ingest.errors import SparseIngestError
from sparse_ingest.executors.options import RayOptions
from sparse_ingest.executors.tasks import tasks_of_ray
from sparse_ingest.storage.waiting import left_behind
from support import stub_shards
from support.reporters import Recorder


def main(folder: str, shards: str, seconds: str, address: str | None = None) -> int:
    """Return the exit code, as the command line does."""
    reporter = Recorder()
    stub = stub_shards.Stub(Path(folder), float(seconds))
    try:
        groups = [range(number, number + 1) for number in range(int(shards))]
        options, kept = RayOptions(address=address, workers=2), "the folder keeps what is finished."
        with tasks_of_ray(options, does="makes", kept=kept, reporter=reporter) as run_on:
            run_on(stub_shards.build, (stub,), lambda: groups)
    except SparseIngestError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    finally:
        print("\n".join(reporter.notes), file=sys.stderr)
    return 0


if __name__ == "__main__":
    code = main(*sys.argv[1:])
    if left_behind.is_set():  # as the command line does: Python's exit would end threads in the middle of a call
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
