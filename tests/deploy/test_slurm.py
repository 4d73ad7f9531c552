"""deploy/slurm/encode.sh, with a stand-in for sbatch that runs each job immediately."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.checkpoints import make_masked_lm
from support.forked import command
from support.run_contents import ROWS, contents, write
from support.shells import shell, warm_command

SCRIPT = Path(__file__).parents[2] / "deploy" / "slurm" / "encode.sh"
# The order of an array's tasks is reversed. As sbatch does, it runs a copy of the script.
SBATCH = """#!/bin/bash
set -euo pipefail
id=$(($(cat "$JOBS/last" 2>/dev/null || echo 0) + 1))
echo $id > "$JOBS/last"
echo "$@" >> "$JOBS/arguments"
array=
while [[ $1 == -* ]]; do
    case $1 in
    --array=*) array=${1#--array=} ;;
    --dependency=*) [[ -e $JOBS/ok-${1#--dependency=afterok:} ]] || exit 1 ;;
    esac
    shift
done
cp "$1" "$JOBS/slurm_script"
shift
run() { bash "$JOBS/slurm_script" "$@" >> "$JOBS/log" 2>&1; }
export SLURM_JOB_ID=$id
code=0
if [[ $array ]]; then
    for ((task = ${array#*-}; task >= ${array%-*}; task--)); do
        SLURM_ARRAY_TASK_ID=$task SLURM_ARRAY_TASK_COUNT=$((${array#*-} - ${array%-*} + 1)) run "$@" || code=$?
    done
else
    run "$@" || code=$?
fi
[[ $code != 0 ]] || touch "$JOBS/ok-$id"
echo "$id;cluster"
"""


def test_three_jobs_make_the_run_of_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, corpus = make_masked_lm(tmp_path / "model"), write(tmp_path / "a corpus.jsonl", ROWS)
    common = ["--model", model, "--corpus", corpus, "--shard-rows", 4, "--device", "cpu", "--dtype", "float32"]
    assert command("encode", *common, "--out", tmp_path / "expected").code == 0
    folder, jobs = tmp_path / "bin", tmp_path / "jobs"
    folder.mkdir()
    jobs.mkdir()
    (folder / "sbatch").write_text(SBATCH)
    (folder / "sbatch").chmod(0o755)
    monkeypatch.setenv("JOBS", str(jobs))
    monkeypatch.setenv("SBATCH_OPTIONS", "--partition=gpu --time=1:00:00")
    quoted = " ".join(f"'{each}'" for each in common)
    with warm_command(folder) as server:
        run = [tmp_path, folder, "", server]
        printed = shell(f"{SCRIPT} 3 {quoted} --out {tmp_path}/run", *run)
        assert "Submitted: plan 1, 3 parts 2, finish 3." in printed, (jobs / "log").read_text()
        submitted = (jobs / "arguments").read_text().splitlines()
        assert all("--partition=gpu --time=1:00:00" in line for line in submitted)
        assert ["--array=1-3" in line for line in submitted] == [False, True, False]
        # Again, and again only one part.
        shell(f"{SCRIPT} 3 {quoted} --out {tmp_path}/run", *run)
        shell(f"sbatch --array=2-2 {SCRIPT} part 3 {quoted} --out {tmp_path}/run", *run)
    found, expected = contents(tmp_path / "run"), contents(tmp_path / "expected")
    same = [name for name in expected if not name.startswith(("done/", "locks/"))]
    assert [name for name in same if found.get(name) != expected[name]] == []
    assert "part 2/3 is done (shards 2 to 3); " in (jobs / "log").read_text()
    assert json.loads(found["complete.json"])["rows"] == len(ROWS)


@pytest.mark.parametrize("arguments", ["", "3", "0 --out run", "plans --out run"])
def test_wrong_arguments_are_refused(tmp_path: Path, arguments: str) -> None:
    with warm_command(tmp_path) as server, pytest.raises(AssertionError, match="Usage: .*encode.sh PARTS"):
        shell(f"{SCRIPT} {arguments}", tmp_path, tmp_path, "", server)
