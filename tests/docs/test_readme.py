"""The README's commands do what it says, in its order."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def test_the_make_targets_of_the_readme_exist():
    targets = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    named = re.findall(r"(?:^|`)make ([a-z-]+)", README, flags=re.MULTILINE)
    assert named
    assert set(named) <= set(targets)


def test_every_command_is_in_the_readme():
    from sparse_ingest.cli.main import cli

    for name, command in cli.commands.items():
        assert command.help, name
        assert name in README, name


def test_the_readme_commands_run(opensearch_url: str, index_name: str, tmp_path: Path):
    """As printed, but for the index's name, the server's address, and a model that needs no hub."""
    script = "set -euo pipefail\n" + "".join(blocks("sh"))
    script = re.sub(r"^pip install.*$|^export .*$", "", script, flags=re.MULTILINE)
    script = re.sub(r"(--index |/)articles(?=[ /\n]|$)(?!\.)", rf"\1{index_name}", script.replace("runs/articles", "R"))
    script = script.replace("--pipeline splade-mini", "--pipeline demo")
    script = script.replace("--index drafts", f"--index {index_name}-drafts")
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SPARSE_INGEST_URL": opensearch_url,
    }
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "The index holds what the run says." in done.stdout
    assert done.stdout.count("Sourdough") >= 3
    stages, with_client = blocks("python")
    assert "Sourdough" in ran_code(with_client, index_name, opensearch_url, tmp_path, environment).splitlines()[0]
    shown = ran_code(stages, index_name, opensearch_url, tmp_path, environment).splitlines()
    assert shown[0].startswith("{'")
    assert shown[2] == "True"
    assert shown[3].startswith("1 ")


def ran_code(code: str, index: str, url: str, folder: Path, environment: dict[str, str]) -> str:
    """What a block of Python prints, with another index, address and model."""
    changes = [("http://127.0.0.1:9200", url), ('"articles"', f'"{index}"')]
    changes += [("rasyosef/splade-mini", "package:cognition/model"), ("splade-mini", "demo")]
    for before, after in changes:
        code = code.replace(before, after)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
