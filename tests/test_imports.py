"""Imports point one way, and light commands stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Who may import whom, by the longest prefix that matches.
ALLOWED = {
    "lmc": set(),
    "lmc.errors": set(),
    "lmc.compiled": set(),
    "lmc.units": {"lmc.errors"},
    "lmc.model": {"lmc.errors"},
    "lmc.report": {"lmc.errors", "lmc.units"},
    "lmc.cache": {"lmc.cache", "lmc.compiled", "lmc.errors", "lmc.units", "lmc.model", "lmc.report"},
    "lmc.cache.policy": {"lmc.cache.policy", "lmc.errors"},
    "lmc.sim": {
        "lmc.sim",
        "lmc.cache.keys",
        "lmc.cache.policy",
        "lmc.cache.directory",
        "lmc.cache.config",
        "lmc.cache.settings",
        "lmc.cache.record",
        "lmc.cache.tiers.format",
        "lmc.compiled",
        "lmc.errors",
        "lmc.units",
        "lmc.report",
    },
    "lmc.bench": {
        "lmc.bench",
        "lmc.sim",
        "lmc.cache",
        "lmc.serve",
        "lmc.model",
        "lmc.errors",
        "lmc.units",
        "lmc.report",
    },
    "lmc.serve": {"lmc.serve", "lmc.cache", "lmc.model", "lmc.errors", "lmc.units"},
    "lmc.cli": {"lmc"},
    "lmc.__main__": {"lmc.cli"},
}
ENGINES = {"vllm", "sglang"}
MAY_IMPORT_ENGINES = ("lmc.cache.connectors",)


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted((ROOT / "lmc").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "lmc":
                yield from (f"lmc.{alias.name}" for alias in node.names)
            else:
                yield node.module


def within(name: str, prefixes: set[str]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


@pytest.mark.parametrize(("module", "path"), list(modules()), ids=lambda value: value if isinstance(value, str) else "")
def test_imports_follow_the_architecture(module: str, path: Path) -> None:
    rule = max((prefix for prefix in ALLOWED if within(module, {prefix})), key=len)
    for name in imports(path):
        if name.startswith("lmc."):
            assert within(name, ALLOWED[rule]), f"{module} must not import {name}"
        elif name.split(".")[0] in ENGINES:
            assert within(module, set(MAY_IMPORT_ENGINES)), f"{module} must not import {name}"


@pytest.mark.parametrize("arguments", [["--help"], ["sim", "--help"], ["bench", "--help"], ["serve", "--help"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        f"import sys\nsys.argv = ['lmc', *{arguments!r}]\nfrom lmc.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'vllm', 'sglang', 'numba', 'pandas', 'matplotlib', 'datasets', 'numpy', 'redis'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_simulator_needs_neither_torch_nor_an_engine() -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'triton', 'vllm', 'sglang', 'redis', 'obstore'):\n    sys.modules[name] = None\n"
        "import lmc.sim.trace, lmc.sim.stack, lmc.cache.policy, lmc.cache.directory, lmc.cache.config"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
