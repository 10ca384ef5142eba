"""How much memory this process may still take: the smaller of what the machine has free and what its control groups leave.

A container sees the whole machine's memory and is killed at the limit of its cgroup. Limits are read for the group and for every group
above it that can be seen, in version 1 and 2. Of what a group has used, the page cache of files counts as free, as it does for the machine.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

MACHINE = "the machine"
_OCTAL = re.compile(r"\\([0-7]{3})")  # how mountinfo writes spaces


@dataclass(frozen=True)
class Memory:
    """Bytes, and who sets them: MACHINE, or the file with a cgroup's limit."""

    free: int
    limit: int
    by: str


def available_memory(process: Path = Path("/proc/self")) -> Memory:
    """What this process can take now without being killed."""
    machine = psutil.virtual_memory()
    found = [Memory(machine.available, machine.total, MACHINE)]
    for folder, version in _groups(process):
        group = _version_2(folder) if version == 2 else _version_1(folder)
        if group is not None and group.limit < machine.total:
            found.append(group)
    limit = min(memory.limit for memory in found)
    tightest = min(found, key=lambda memory: memory.free)
    return Memory(tightest.free, limit, tightest.by)


def _version_2(folder: Path) -> Memory | None:
    """Beyond memory.high a group is not killed, but slowed down until it is of no use."""
    limits = [(limit, name) for name in ("memory.max", "memory.high") if (limit := _number(folder / name)) is not None]
    used = _number(folder / "memory.current")
    if not limits or used is None:
        return None
    limit, name = min(limits)
    return _memory(limit, used, _file_pages(folder / "memory.stat", ""), folder / name)


def _version_1(folder: Path) -> Memory | None:
    limit, used = _number(folder / "memory.limit_in_bytes"), _number(folder / "memory.usage_in_bytes")
    if limit is None or used is None:
        return None
    return _memory(limit, used, _file_pages(folder / "memory.stat", "total_"), folder / "memory.limit_in_bytes")


def _memory(limit: int, used: int, file_pages: int, by: Path) -> Memory:
    return Memory(max(0, limit - max(0, used - file_pages)), limit, str(by))


def _number(file: Path) -> int | None:
    """None for a file that is not there, and for "max"."""
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _file_pages(file: Path, prefix: str) -> int:
    """Bytes of page cache, which the kernel gives up before it kills; memory that processes share is not among them."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return 0
    values = dict(line.split(" ", 1) for line in lines if " " in line)
    return sum(int(values.get(f"{prefix}{kind}_file", "0")) for kind in ("active", "inactive"))


def _groups(process: Path) -> Iterator[tuple[Path, int]]:
    """The process's own memory groups and those above them, each with its version."""
    try:
        membership = (process / "cgroup").read_text().splitlines()
        mounts = (process / "mountinfo").read_text().splitlines()
    except OSError:
        return
    for line in membership:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        version = 2 if number == "0" and not controllers else 1
        if version == 1 and "memory" not in controllers.split(","):
            continue
        for mount in mounts:
            where = _mounted(mount, version)
            if where is not None:
                root, point = where
                yield from ((folder, version) for folder in _upwards(point, root, path))
                break


def _mounted(line: str, version: int) -> tuple[str, Path] | None:
    """(the group that is mounted, where it is mounted) for a mount of the memory controller."""
    left, _, right = line.partition(" - ")
    fields, kind = left.split(), right.split()
    if len(fields) < 5 or len(kind) < 3:
        return None
    if version == 2 and kind[0] != "cgroup2":
        return None
    if version == 1 and (kind[0] != "cgroup" or "memory" not in kind[2].split(",")):
        return None
    root, point = (_OCTAL.sub(lambda match: chr(int(match[1], 8)), field) for field in fields[3:5])
    return root, Path(point)


def _upwards(point: Path, root: str, path: str) -> Iterator[Path]:
    """From the group at path to the one that is mounted; a path outside of it, as some containers have, stands for the mounted one."""
    below: tuple[str, ...] = ()
    if root == "/" or path == root or path.startswith(root + "/"):
        below = Path(path).parts[1:] if root == "/" else Path(path[len(root) :]).parts[1:]
    if ".." in below:
        below = ()
    for end in range(len(below), -1, -1):
        yield point.joinpath(*below[:end])
