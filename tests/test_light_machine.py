"""`pytest -m gpu` and the GPU check on a machine with torch, Triton and little else, as machines with a GPU are lent.

The other packages of this environment are hidden, in the place of an environment without them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu_check import Outcome, check, report_of, run_apart
from benchmarks.gpu_sections import SECTIONS
from lmc.report import report_markdown

ROOT = Path(__file__).parents[1]

PACKAGES = """
torch triton numpy numba llvmlite xxhash psutil hypothesis pytest
pydantic pydantic_core annotated_types typing_inspection typing_extensions blake3 orjson redis
_pytest pluggy iniconfig packaging pygments py sortedcontainers sympy mpmath networkx jinja2 markupsafe filelock fsspec setuptools
functorch torchgen attr attrs lmc tests benchmarks
"""  # in the second line lmc's light wheels, in the last two what these bring along

HIDE = f"""
import importlib.machinery, sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in {set(PACKAGES.split())!r} or top in sys.stdlib_module_names or top.startswith("_"):
            return None
        spec = importlib.machinery.PathFinder.find_spec(top)
        if spec is not None and "site-packages" in str(spec.origin or list(spec.submodule_search_locations or ())):
            raise ModuleNotFoundError("No module named " + repr(top), name=top)
        return None
sys.meta_path.insert(0, Hidden())
"""


def run_there(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python with these arguments, and every process that it starts."""
    (folder / "sitecustomize.py").write_text(HIDE)
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": f"{folder}:{ROOT}", "CI": ""}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=500)


def test_what_is_hidden_is_not_there(tmp_path: Path) -> None:
    assert "No module named 'prometheus_client'" in run_there(tmp_path, "-c", "import prometheus_client").stderr


def test_gpu_tests_need_no_plugin_and_no_engine(tmp_path: Path) -> None:
    done = run_there(tmp_path, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "tests/cache/transfer/test_gpu.py" in done.stdout or "passed" in done.stdout


def test_the_gpu_check_needs_no_more_and_leaves_a_report(tmp_path: Path) -> None:
    out = tmp_path / "gpu-dry"
    sections = ("environment", "capture", "fence", "quiesce")
    done = run_there(tmp_path, "-m", "benchmarks.gpu_check", *sections, "--dry", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr + (out / "log.txt").read_text()
    results = json.loads((out / "results.json").read_bytes())
    assert results["dry"] is True
    assert [one["section"] for one in results["sections"]] == list(sections)
    assert {finding["variant"] for finding in results["sections"][2]["findings"]} >= {"no stores", "stores, no fence"}
    assert results["sections"][1]["findings"] == [{"skipped": "needs a GPU"}]
    for name in ("report.md", "report.html"):
        assert "no figure here says anything" in (out / name).read_text()


@pytest.mark.parametrize("name", [name for name, _, _ in SECTIONS if name not in ("tests", "fence", "quiesce")])
def test_a_section_goes_through_without_a_gpu(name: str) -> None:
    section = next(function for one, _, function in SECTIONS if one == name)
    findings = list(section(True))
    assert findings and all(finding.get("ok", True) for finding in findings)


def test_a_section_that_crashes_or_hangs_is_wrong_and_says_why() -> None:
    crashed, hung = Outcome("no-such-section", "?"), Outcome("rates", "?")
    run_apart(crashed, 60, dry=True)
    run_apart(hung, 0.01, dry=True)
    assert crashed.failure.startswith("exit code 1: ")
    assert hung.failure == "killed after 0 s"
    wrong = Outcome("quiesce", "?", findings=[{"wrong": 3, "ok": False}])
    text = report_markdown(report_of([crashed, hung, wrong, Outcome("flags", "?", findings=[{"ok": True}])], dry=False))
    assert "1 of 4 sections are as they should be; not no-such-section, rates, quiesce." in text
    assert "dry" not in text


def test_a_wrong_section_is_the_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def failed(outcome: Outcome, limit: float, dry: bool) -> str:
        outcome.findings = [{"ok": outcome.section != "quiesce"}]
        return ""

    monkeypatch.setattr("benchmarks.gpu_check.run_apart", failed)
    assert check(["fence"], True, None) == 0
    assert check(["fence", "quiesce"], True, None) == 1
    assert check(["capture-not-relaxed"], True, None) == 0
