"""Imports point one way, and light commands stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Which modules of lmc a module may import: the rule is that of the longest prefix that matches. A room may always import itself.
ALLOWED = {
    "lmc": set(),
    "lmc.errors": set(),
    "lmc.arguments": set(),
    "lmc.compiled": set(),
    "lmc.memory": set(),
    "lmc.units": {"lmc.errors"},
    "lmc.model": {"lmc.errors"},
    "lmc.weights": {"lmc.errors", "lmc.model"},
    "lmc.report": {"lmc.errors", "lmc.units"},
    "lmc.cache": set(),
    "lmc.cache.keys": {"lmc.errors"},
    "lmc.cache.parts": {"lmc.cache.keys", "lmc.errors"},
    "lmc.cache.shape": {"lmc.cache.parts", "lmc.errors"},
    "lmc.cache.policy": {"lmc.errors"},
    "lmc.cache.directory": {"lmc.cache.keys", "lmc.cache.parts", "lmc.cache.policy", "lmc.errors"},
    "lmc.cache.sections": {"lmc.errors", "lmc.units"},
    "lmc.cache.config": {"lmc.cache.policy", "lmc.cache.sections", "lmc.errors"},
    "lmc.cache.settings": {"lmc.cache.config", "lmc.cache.sections", "lmc.errors"},
    "lmc.cache.from_lmcache": {"lmc.cache.settings", "lmc.errors"},
    "lmc.cache.plan": {"lmc.cache.keys", "lmc.cache.parts", "lmc.cache.directory.holds"},
    "lmc.cache.tiers": {
        "lmc.cache.config",
        "lmc.cache.sections",
        "lmc.cache.keys",
        "lmc.compiled",
        "lmc.errors",
        "lmc.memory",
        "lmc.units",
    },
    "lmc.cache.transfer": {"lmc.cache.plan", "lmc.compiled", "lmc.errors", "lmc.units"},
    "lmc.cache.observe": {
        "lmc.cache.config",
        "lmc.cache.directory",
        "lmc.cache.keys",
        "lmc.cache.plan",
        "lmc.errors",
        "lmc.units",
    },
    "lmc.cache.observe.logs": set(),
    "lmc.cache.scheduler": {
        "lmc.cache.config",
        "lmc.cache.directory",
        "lmc.cache.keys",
        "lmc.cache.observe",
        "lmc.cache.parts",
        "lmc.cache.plan",
        "lmc.cache.policy",
        "lmc.cache.sections",
        "lmc.cache.shape",
        "lmc.cache.tiers",
        "lmc.errors",
        "lmc.units",
    },
    "lmc.cache.worker": {
        "lmc.cache.config",
        "lmc.cache.keys",
        "lmc.cache.observe.logs",
        "lmc.cache.plan",
        "lmc.cache.tiers",
        "lmc.cache.transfer",
        "lmc.errors",
        "lmc.memory",
        "lmc.units",
    },
    # The node's process drives a directory and the threads of the tiers, so it imports parts of both halves. What an engine's halves need
    # to attach keeps them apart, as they are elsewhere.
    "lmc.cache.node": {
        "lmc.cache.config",
        "lmc.cache.directory",
        "lmc.cache.keys",
        "lmc.cache.observe",
        "lmc.cache.parts",
        "lmc.cache.plan",
        "lmc.cache.scheduler",
        "lmc.cache.tiers",
        "lmc.cache.transfer",
        "lmc.cache.worker",
        "lmc.errors",
        "lmc.memory",
        "lmc.units",
    },
    "lmc.cache.node.wire": {"lmc.cache.keys", "lmc.errors"},
    "lmc.cache.node.channel": {"lmc.cache.node.wire", "lmc.errors"},
    "lmc.cache.node.memory": {"lmc.cache.transfer.pinned", "lmc.errors", "lmc.units"},
    "lmc.cache.node.link": {"lmc.cache.node.channel", "lmc.cache.node.wire", "lmc.errors"},
    "lmc.cache.node.slab": {"lmc.cache.node.memory", "lmc.cache.transfer", "lmc.errors", "lmc.units"},
    "lmc.cache.node.tracked": {"lmc.cache.directory", "lmc.cache.keys", "lmc.cache.node.wire"},
    "lmc.cache.node.ordered": {
        "lmc.cache.keys",
        "lmc.cache.node.link",
        "lmc.cache.node.tracked",
        "lmc.cache.node.wire",
    },
    "lmc.cache.node.scheduler": {
        "lmc.cache.config",
        "lmc.cache.directory",
        "lmc.cache.keys",
        "lmc.cache.node.link",
        "lmc.cache.node.mirror",
        "lmc.cache.node.ordered",
        "lmc.cache.node.tracked",
        "lmc.cache.node.wire",
        "lmc.cache.observe",
        "lmc.cache.parts",
        "lmc.cache.plan",
        "lmc.cache.scheduler",
        "lmc.errors",
    },
    "lmc.cache.node.worker": {
        "lmc.cache.config",
        "lmc.cache.keys",
        "lmc.cache.node.channel",
        "lmc.cache.node.link",
        "lmc.cache.node.memory",
        "lmc.cache.node.slab",
        "lmc.cache.node.wire",
        "lmc.cache.plan",
        "lmc.cache.tiers.codec",
        "lmc.cache.transfer",
        "lmc.cache.worker",
        "lmc.errors",
    },
    "lmc.cache.share": {"lmc.cache.config", "lmc.errors"},
    "lmc.cache.connectors": {"lmc.arguments", "lmc.cache", "lmc.errors", "lmc.units", "lmc.weights"},
    "lmc.probe": {"lmc.cache", "lmc.errors", "lmc.report", "lmc.units"},
    "lmc.sim": {
        "lmc.cache.keys",
        "lmc.cache.policy",
        "lmc.cache.directory",
        "lmc.cache.config",
        "lmc.cache.settings",
        "lmc.cache.observe.record",
        "lmc.cache.parts",
        "lmc.cache.shape",
        "lmc.cache.tiers.format",
        "lmc.compiled",
        "lmc.errors",
        "lmc.units",
        "lmc.report",
    },
    "lmc.bench": {
        "lmc.sim",
        "lmc.cache",
        "lmc.serve",
        "lmc.memory",
        "lmc.model",
        "lmc.errors",
        "lmc.shipped",
        "lmc.units",
        "lmc.report",
    },
    "lmc.serve": {"lmc.arguments", "lmc.cache", "lmc.memory", "lmc.model", "lmc.errors", "lmc.report", "lmc.units"},
    "lmc.cli": {"lmc"},
    "lmc.__main__": {"lmc.cli"},
}
# The directory does no I/O, starts no thread and reads no clock: these are all the libraries that it may use.
DIRECTORY_LIBRARIES = {
    "__future__",
    "array",
    "collections",
    "dataclasses",
    "enum",
    "itertools",
    "numpy",
    "sys",
    "typing",
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


def forbidden(module: str, name: str) -> bool:
    """Whether the architecture forbids the module to import name."""
    library = name.split(".")[0]
    if library == "lmc":
        room = max((prefix for prefix in ALLOWED if within(module, {prefix})), key=len)
        return name not in ("lmc", "lmc.__version__") and not within(name, ALLOWED[room] | {room})
    if library in ENGINES:
        return not within(module, set(MAY_IMPORT_ENGINES))
    return within(module, {"lmc.cache.directory"}) and library not in DIRECTORY_LIBRARIES


@pytest.mark.parametrize(("module", "path"), list(modules()), ids=lambda value: value if isinstance(value, str) else "")
def test_imports_follow_the_architecture(module: str, path: Path) -> None:
    broken = [name for name in imports(path) if forbidden(module, name)]
    assert not broken, f"{module} must not import {broken}"


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("lmc.cache.directory.places", "time"),
        ("lmc.cache.directory.places", "threading"),
        ("lmc.cache.directory.request", "lmc.cache.plan"),
        ("lmc.cache.directory.build", "lmc.cache.config"),
        ("lmc.cache.scheduler.cache", "lmc.cache.transfer.planner"),
        ("lmc.cache.scheduler.cache", "lmc.cache.worker.worker"),
        ("lmc.cache.worker.worker", "lmc.cache.directory"),
        ("lmc.cache.worker.worker", "lmc.cache.policy.base"),
        ("lmc.cache.worker.worker", "lmc.cache.scheduler.cache"),
        ("lmc.cache.worker.worker", "lmc.cache.observe.metrics"),
        ("lmc.cache.tiers.disk", "lmc.cache.plan"),
        ("lmc.cache.transfer.planner", "lmc.cache.directory"),
        ("lmc.cache.scheduler.cache", "lmc.probe.watch"),
        ("lmc.cache.worker.worker", "vllm"),
        ("lmc.cache.node.worker", "lmc.cache.directory"),
        ("lmc.cache.node.scheduler", "lmc.cache.worker.worker"),
        ("lmc.sim.full_replay", "lmc.cache.scheduler.cache"),
        ("lmc.sim.full_replay", "lmc.bench.run"),
    ],
)
def test_a_broken_rule_is_noticed(module: str, name: str) -> None:
    assert forbidden(module, name)


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
