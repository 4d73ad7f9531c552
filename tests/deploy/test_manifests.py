"""The files of deploy/: Kubernetes manifests and the Dockerfile agree with the program and with Kubernetes' schemas.

encode-job.yaml was validated with kubernetes-validate for Kubernetes 1.33 and 1.37; its schemas of 110 MB are too large
to install for one test.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from support.checkpoints import make_masked_lm
from support.forked import command
from support.run_contents import ROWS, contents, write
from support.shells import shell, warm_command

from sparse_ingest.cli.main import cli

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
# Of batch/v1 and core/v1, those that a Job for `encode` may need.
JOB_FIELDS = {"backoffLimit", "backoffLimitPerIndex", "completionMode", "completions", "maxFailedIndexes",
              "parallelism", "podFailurePolicy", "template", "ttlSecondsAfterFinished"}  # fmt: skip
POD_FIELDS = {"automountServiceAccountToken", "containers", "restartPolicy", "securityContext", "serviceAccountName",
              "terminationGracePeriodSeconds", "volumes"}  # fmt: skip
CONTAINER_FIELDS = {"command", "env", "envFrom", "image", "name", "resources", "securityContext", "volumeMounts"}


def documents(name: str) -> list[dict]:
    return list(yaml.safe_load_all((DEPLOY / "kubernetes" / name).read_text()))


SETTINGS, *JOBS = documents("encode-job.yaml")
[RAYJOB] = documents("rayjob.yaml")


def pod(job: dict) -> dict:
    return job["spec"]["template"]["spec"]


def container(job: dict) -> dict:
    [found] = pod(job)["containers"]
    return found


def options_of(arguments: str) -> None:
    """Parse the arguments of `encode` as the command does; it raises an error for a wrong one."""
    encode = cli.commands["encode"]
    encode.make_context("encode", shlex.split(arguments))


def test_the_jobs_have_fields_and_values_of_their_schema() -> None:
    assert [job["metadata"]["name"] for job in JOBS] == ["encode-plan", "encode-parts", "encode-finish"]
    assert SETTINGS["kind"] == "ConfigMap" and all(isinstance(value, str) for value in SETTINGS["data"].values())
    for job in JOBS:
        assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
        assert job["spec"].keys() <= JOB_FIELDS and pod(job).keys() <= POD_FIELDS
        assert container(job).keys() <= CONTAINER_FIELDS
        assert pod(job)["restartPolicy"] == "Never", "podFailurePolicy and backoffLimitPerIndex need it"
        assert pod(job)["securityContext"]["runAsNonRoot"] is True
        assert not container(job)["securityContext"]["allowPrivilegeEscalation"]
        assert container(job)["envFrom"] == [{"configMapRef": {"name": SETTINGS["metadata"]["name"]}}]
    selected = re.findall(r"for step in (.*); do", (DEPLOY / "kubernetes" / "encode-job.yaml").read_text())
    assert selected == [" ".join(job["metadata"]["labels"]["step"] for job in JOBS)]


def test_the_parts_are_an_indexed_job() -> None:
    parts = JOBS[1]["spec"]
    assert parts["completionMode"] == "Indexed"
    assert str(parts["completions"]) == SETTINGS["data"]["PARTS"]
    assert 0 < parts["parallelism"] <= parts["completions"]
    assert parts["backoffLimitPerIndex"] > 0 and parts["maxFailedIndexes"] == 0
    ignored, failed = parts["podFailurePolicy"]["rules"]
    assert ignored == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    assert failed == {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [2]}}
    assert "s3://" in SETTINGS["data"]["ENCODE"]


def test_the_pods_differ_only_in_their_command() -> None:
    assert all({**container(job), "command": []} == {**container(JOBS[0]), "command": []} for job in JOBS)
    assert all({**pod(job), "containers": []} == {**pod(JOBS[0]), "containers": []} for job in JOBS)


def test_the_commands_of_the_jobs_make_the_run_of_one_process(tmp_path: Path) -> None:
    model, corpus = make_masked_lm(tmp_path / "model"), write(tmp_path / "corpus.jsonl", [*ROWS, {"_id": "no text"}])
    common = f"--model {model} --corpus {corpus} --shard-rows 8 --device cpu --dtype float32 --on-bad-document skip"
    assert command("encode", *common.split(), "--out", tmp_path / "expected").code == 3
    settings = f"export PARTS=2 ENCODE='{common} --out {tmp_path / 'run'}'\n"
    with warm_command(tmp_path) as server:
        for job, indexes in zip(JOBS, ((0,), (1, 0), (0,)), strict=True):
            for index in indexes:
                script = f"{settings} export JOB_COMPLETION_INDEX={index}\n{shlex.join(container(job)['command'])}"
                shell(script, tmp_path, tmp_path, "", server)
    found, expected = contents(tmp_path / "run"), contents(tmp_path / "expected")
    same = [name for name in expected if not name.startswith(("done/", "locks/"))]
    assert [name for name in same if found.get(name) != expected[name]] == []


def test_the_rayjob_runs_encode_with_the_tested_release_of_ray() -> None:
    assert (RAYJOB["apiVersion"], RAYJOB["kind"]) == ("ray.io/v1", "RayJob")
    spec = RAYJOB["spec"]
    program, verb, *arguments = shlex.split(spec["entrypoint"])
    assert (program, verb) == ("sparse-ingest", "encode")
    options_of(shlex.join(arguments))
    cluster = spec["rayClusterSpec"]
    assert f"ray=={cluster['rayVersion']}\n" in (ROOT / "constraints.txt").read_text()
    [workers] = cluster["workerGroupSpecs"]
    assert f"--workers {workers['replicas']}" in spec["entrypoint"]
    [head], [worker] = (group["template"]["spec"]["containers"] for group in (cluster["headGroupSpec"], workers))
    assert head["image"] == worker["image"]
    assert worker["resources"]["limits"]["cpu"] == workers["rayStartParams"]["num-cpus"]


def test_the_options_of_the_jobs_exist() -> None:
    options_of(SETTINGS["data"]["ENCODE"])


def test_the_skypilot_example_of_the_guide_is_yaml_with_existing_options() -> None:
    guide = (ROOT / "docs" / "guides" / "past-one-machine.md").read_text()
    task = yaml.safe_load(guide.partition("```yaml\n")[2].partition("```")[0])
    assert task.keys() == {"name", "resources", "envs", "run"}
    assert task["envs"].keys() == {"PART"}
    options_of(task["run"].strip().removeprefix("sparse-ingest encode ").replace("$PART", task["envs"]["PART"]))


def instructions(name: str) -> list[str]:
    lines = re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE).replace("\\\n", " ")
    return re.findall(rf"^{name} +(.*)$", lines, re.MULTILINE)


def test_the_dockerfile_installs_existing_extras_of_the_wheel_with_constraints() -> None:
    extras = re.findall(r"EXTRAS=([\w,]+)", DOCKERFILE)
    assert len(extras) == 2
    for listed in extras:
        assert set(listed.split(",")) <= PROJECT["optional-dependencies"].keys()
    assert Requirement(f"sparse-ingest[{extras[-1]}]").name == PROJECT["name"]
    [copied] = instructions("COPY")
    constraints, wheel, _ = copied.split()
    assert (ROOT / constraints).is_file()
    assert wheel == f"dist/{PROJECT['name'].replace('-', '_')}-*.whl"
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().split()
    assert ignored == ["*", f"!{constraints}", f"!{wheel}"]
    for install in re.findall(r"pip install (.*?)(?:;|&&)", " ".join(instructions("RUN"))):
        assert "--constraint /tmp/install/constraints.txt" in install


def test_the_dockerfile_runs_existing_commands_without_root() -> None:
    assert yaml.safe_load(instructions("ENTRYPOINT")[0]) == list(PROJECT["scripts"])
    assert pod(JOBS[0])["securityContext"]["runAsUser"] == int(instructions("USER")[-1].split(":")[0]) > 0
    stages = [line.partition(" AS ")[2] for line in instructions("FROM")]
    assert stages == ["cpu", "cuda", ""] and instructions("FROM")[-1] == "${VARIANT}"
    for run in instructions("RUN"):
        assert subprocess.run(["bash", "-n", "-c", run], check=False).returncode == 0, run
        programs = {line.split()[0] for line in re.split(r"&& |; (?:then|fi)? *", run) if line.split()}
        assert programs <= {"apt-get", "fi", "if", "pip", "rm", "useradd"}, programs
    assert not re.search(r"^(ARG|ENV) .*(TOKEN|SECRET|PASSWORD|KEY)", DOCKERFILE, re.MULTILINE | re.IGNORECASE)


@pytest.mark.parametrize("pattern", ["Dockerfile", "kubernetes/*.yaml", "slurm/*.sh"])
def test_images_and_paths_in_comments_exist(pattern: str) -> None:
    for path in DEPLOY.glob(pattern):
        for named in re.findall(r"\b(?:deploy|docs)/[\w./-]+\w", path.read_text()):
            assert (ROOT / named).exists(), f"{path}: {named}"
