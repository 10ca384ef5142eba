"""The documentation site builds without a broken link, and the commands in the documentation are run, or need what is named here."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command
from typer.testing import CliRunner

from lmc.cache.parts import Group
from lmc.cache.shape import ModelShape
from lmc.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")), *sorted(ROOT.glob("examples/**/*.md"))]

NEEDS = [  # commands that no test runs here, and what they need
    (r"lmc probe model google/", "a model of the hub"),
    (r"lmc serve\b", "an engine; tests/engines runs it"),
    (r"lmc node\b", "engines; tests/cache/node and tests/engines run it"),
    (r"lmc bench (?!check|compare|report|--list)", "an engine or a server; tests/bench runs it"),
    (r"lmc bench (check|report) [A-Z]", "a file of your own; tests/bench runs it"),
    (r"lmc cache stats\b", "a running cache; tests/probe runs it"),
    (r"lmc cache inspect\b", "stored chunks; tests/probe runs it"),
    (r"lmc doctor\b", "a machine that is all right; tests/serve runs it"),
    (r"lmc data fetch\b", "the network; tests/bench runs it"),
    (r"lmc probe (codec|transfer)\b", "minutes, or a model; tests/probe and tests/cli run it"),
    (r"lmc --install-completion\b", "a shell of your own, whose settings it changes"),
    (r"lmc sim LOGS", "logs of LMCache; tests/sim reads some"),
    (r"lmc sim sweep\b", "a pool of processes; tests/sim runs it"),
    (r"lmc sim check-policy\b|lmc sim .*--policy \S+\.py:", "a policy of your own; tests/sim has some"),
]


def code(page: Path) -> list[str]:
    """The lines of blocks of code that are commands of lmc, with their continuations and without comments."""
    lines: list[str] = []
    fenced = False
    for line in page.read_text().splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            text = re.sub(r"^(\$ |LMC_\w+=\S+ )+", "", line.strip())
            if text.startswith("lmc ") or (lines and lines[-1].endswith("\\")):
                lines = [*lines[:-1], lines[-1][:-1] + text] if lines and lines[-1].endswith("\\") else [*lines, text]
    return [re.split(r"\s{2,}|\s#\s", line)[0].removesuffix(" &") for line in lines]


def inline(page: Path) -> list[str]:
    return [" ".join(found.split()) for found in re.findall(r"`(lmc [^`]*)`", page.read_text())]


COMMANDS = [(page, command) for page in PAGES for command in dict.fromkeys([*code(page), *inline(page)])]
RUN = [
    (page, command)
    for page, command in COMMANDS
    if command in code(page)
    and len(command.split()) > 2
    and not any(re.match(pattern, command) for pattern, _ in NEEDS)
]


def of(page: Path, command: str) -> str:
    return f"{page.relative_to(ROOT)}: {command}"


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=lambda value: str(getattr(value, "name", value)))
def test_a_command_and_its_options_exist(page: Path, command: str) -> None:
    words = shlex.split(re.split(r" -- | > ", command)[0])[1:]
    at: Any = get_command(app)
    while hasattr(at, "commands") and words and words[0] in at.commands:
        at = at.commands[words.pop(0)]
    if hasattr(at, "commands") and words and hasattr(at, "default"):  # a trace or a workload, for the command `run`
        at = at.commands[at.default]
    assert not hasattr(at, "commands") or all(word.startswith("-") for word in words), of(page, command)
    known = {option for parameter in at.params for option in parameter.opts + parameter.secondary_opts}
    given = {word for word in words if word.startswith("--")}
    assert given <= known | {"--help", "--version", "--install-completion", "--example"}, of(page, command)


@pytest.fixture
def sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the commands name."""
    example = (ROOT / "workloads" / "example-trace.jsonl").read_text().splitlines(keepends=True)[:300]
    for name in ("trace.jsonl", "record.jsonl", "TRACE"):
        (tmp_path / name).write_text("".join(example))
    with gzip.open(tmp_path / "mooncake_conversation_trace.jsonl.gz", "wt") as file:
        file.writelines(example)
    blocks = re.findall(r"^```yaml\n(.*?)^```", (ROOT / "docs" / "simulating.md").read_text(), re.MULTILINE | re.DOTALL)
    (tmp_path / "cost.yaml").write_text(next(block for block in blocks if "prefill:" in block))
    settings = {"host": {"capacity": "8GiB"}, "disk": {"path": "kv", "capacity": "64GiB"}}
    (tmp_path / "lmc.yaml").write_text(yaml.safe_dump(settings))
    (tmp_path / "lmcache.yaml").write_text("chunk_size: 256\n")
    groups = ModelShape((Group("full", 16), Group("window", 16, 512)), (1 << 20, 1 << 20))
    (tmp_path / "gemma.json").write_text(json.dumps(groups.to_json()))
    for name in ("a", "b"):
        shutil.copytree(ROOT / "reports" / "null", tmp_path / "reports" / name)
        shutil.copytree(ROOT / "reports" / "null", tmp_path / name.upper())
    shutil.copytree(ROOT / "reports" / "null", tmp_path / "C")
    shutil.copytree(ROOT / "reports" / "null", tmp_path / "DIR")
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("LMC_") and name != "LMC_DATA_DIR"]:
        monkeypatch.delenv(name)
    return tmp_path


@pytest.mark.parametrize(("page", "command"), RUN, ids=lambda value: str(getattr(value, "name", value)))
def test_a_command_that_needs_no_engine_runs(page: Path, command: str, sandbox: Path) -> None:
    words = shlex.split(command.split(" > ")[0])[1:]
    if words[:2] == ["sim", "replay"] and "--cost" not in words:
        words += ["--token-bytes", "128KiB"]  # the page's trace is lmc's own record, which says it
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, f"{of(page, command)}\n{result.output}\n{result.exception}"


def test_no_reason_is_left_over() -> None:
    commands = [command for page in PAGES for command in [*code(page), *inline(page)]]
    assert [reason for pattern, reason in NEEDS if not any(re.match(pattern, command) for command in commands)] == []


def test_the_site_builds_and_all_its_links_lead_somewhere(tmp_path: Path) -> None:
    if importlib.util.find_spec("material") is None:
        pytest.skip("mkdocs-material is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", ROOT / "site" / "mkdocs.yml", "--site-dir", tmp_path],
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "docs" / "guides" / "troubleshooting" / "index.html").is_file()
    assert "fonts.googleapis" not in (tmp_path / "index.html").read_text(), "nothing is loaded from other servers"


def test_every_page_is_in_the_navigation() -> None:
    config = yaml.safe_load((ROOT / "site" / "mkdocs.yml").read_text())
    listed = set(re.findall(r"[\w/.-]+\.md", str(config["nav"])))
    pages = {str(page.relative_to(ROOT)) for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]}
    assert pages == listed
