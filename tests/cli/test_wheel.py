"""The wheel works without the checkout. Only lmc itself is installed anew; the packages that it needs are those of this environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from benchmarks.example_trace import lines

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but the wheel's content."""
    folder = tmp_path_factory.mktemp("wheel")
    build = "import sys; from hatchling.builders.wheel import WheelBuilder; print(*WheelBuilder(sys.argv[1]).build(directory=sys.argv[2]))"
    subprocess.run([sys.executable, "-c", build, str(ROOT), str(folder)], check=True, timeout=300)
    [wheel] = folder.glob("*.whl")
    assert wheel.name.startswith("lmc_kv-")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def lmc(installed: Path, *arguments: str, code: str = "") -> subprocess.CompletedProcess[str]:
    environment = {name: text for name, text in os.environ.items() if not name.startswith("LMC_")}
    environment |= {"PYTHONPATH": str(installed), "COLUMNS": "200"}
    command = [sys.executable, "-c", code, *arguments] if code else [sys.executable, "-m", "lmc", *arguments]
    return subprocess.run(
        command, cwd=installed.parent, env=environment, capture_output=True, text=True, check=False, timeout=300
    )


def test_its_files_are_those_of_the_wheel(installed: Path) -> None:
    done = lmc(
        installed,
        code="import lmc, lmc.shipped as s; print(lmc.__file__, s.shipped('workloads'), s.shipped('dashboards'))",
    )
    found = done.stdout.split()
    assert len(found) == 3, done.stdout + done.stderr
    assert all(Path(path).is_relative_to(installed) and Path(path).exists() for path in found), done.stdout
    assert (installed / "lmc" / "py.typed").is_file()
    metadata = next(installed.glob("lmc_kv-*.dist-info")) / "METADATA"
    assert "Name: lmc-kv\n" in metadata.read_text()


def test_shipped_workloads_are_listed_and_found_by_name(installed: Path) -> None:
    listed = lmc(installed, "bench", "--list")
    assert listed.returncode == 0, listed.stderr
    for file in (ROOT / "workloads").glob("*.yaml"):
        assert file.stem in listed.stdout
    assert "a data file (lmc data list)" in listed.stdout and "package bfcl_eval" in listed.stdout
    checked = lmc(installed, "bench", "check", "quickstart")
    assert checked.returncode == 0 and "tools" in checked.stdout, checked.stderr
    unknown = lmc(installed, "bench", "quickstrat")
    assert unknown.returncode == 2
    assert "no file and no shipped workload is called 'quickstrat'; did you mean 'quickstart'?" in unknown.stderr


def test_dashboard_and_rules_are_printed(installed: Path) -> None:
    dashboard, rules = lmc(installed, "metrics", "dashboard"), lmc(installed, "metrics", "rules")
    assert json.loads(dashboard.stdout) == json.loads((ROOT / "dashboards" / "lmc.json").read_text())
    assert yaml.safe_load(rules.stdout) == yaml.safe_load((ROOT / "dashboards" / "rules.yaml").read_text())


def test_the_example_trace_is_replayed(installed: Path) -> None:
    done = lmc(installed, "sim", "--example", "--capacity-blocks", "10%,inf", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["trace"]["source"], found["trace"]["requests"]) == ("example-trace.jsonl", len(list(lines())))
    tenth, unbounded = found["rows"]
    assert (tenth["capacity_blocks"], unbounded["capacity_blocks"]) == (found["trace"]["unique_blocks"] // 10, "inf")
    assert 0 < tenth["hit_tokens"] < unbounded["hit_tokens"] < unbounded["total_tokens"]
    made = "\n".join(lines()) + "\n"
    assert (ROOT / "workloads" / "example-trace.jsonl").read_text() == made, (
        "python -m benchmarks.example_trace writes it"
    )


def test_another_package_of_the_same_name_is_said(installed: Path, tmp_path: Path) -> None:
    """PyPI's lmc has overwritten lmc/__init__.py."""
    code = "import lmc, sys; del lmc.DISTRIBUTION; import lmc.cli; sys.argv = ['lmc', '--version']; lmc.cli.main()"
    done = lmc(installed, code=code)
    assert done.returncode == 1
    assert "another project called lmc is installed over this one; pip uninstall lmc" in done.stderr
