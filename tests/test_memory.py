"""Free memory is what the tightest limit leaves: the machine's, or that of a cgroup of either version, at any depth."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmc.memory import MACHINE, Memory, available_memory

GIB = 1 << 30
V1_ROOT = Path("/sys/fs/cgroup/memory")


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of 512 GiB, 400 GiB of which are free."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=400 * GIB, total=512 * GIB))


class Imitation:
    """Files as the kernel shows them; no control group is made."""

    def __init__(self, folder: Path, version: int, path: str, root: str = "/", point: str = "cgroup") -> None:
        self.process = folder / "proc"
        self.process.mkdir()
        self.mount = folder / point
        self.mount.mkdir()
        self.version = version
        shown = str(self.mount).replace(" ", "\\040")
        kind = "cgroup2 cgroup2 rw" if version == 2 else "cgroup cgroup rw,memory"
        lines = [
            "22 1 0:21 / /proc rw,nosuid shared:5 - proc proc rw",
            "30 22 0:25 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu",
            f"31 22 0:26 {root} {shown} rw,relatime shared:9 - {kind}",
        ]
        (self.process / "mountinfo").write_text("\n".join(lines) + "\n")
        own = f"0::{path}" if version == 2 else f"5:memory:{path}"
        (self.process / "cgroup").write_text(f"12:cpu,cpuacct:/elsewhere\n{own}\n1:name=systemd:/x\n")

    def group(self, below: str, limit: int | None, used: int, file_pages: int = 0, high: int | None = None) -> None:
        folder = self.mount / below
        folder.mkdir(parents=True, exist_ok=True)
        if self.version == 2:
            (folder / "memory.max").write_text(f"{'max' if limit is None else limit}\n")
            (folder / "memory.high").write_text(f"{'max' if high is None else high}\n")
            (folder / "memory.current").write_text(f"{used}\n")
        else:
            (folder / "memory.limit_in_bytes").write_text(f"{9223372036854771712 if limit is None else limit}\n")
            (folder / "memory.usage_in_bytes").write_text(f"{used}\n")
        prefix = "" if self.version == 2 else "total_"
        half, rest = file_pages // 2, file_pages - file_pages // 2
        stat = f"anon {used}\n{prefix}inactive_file {half}\n{prefix}active_file {rest}\nshmem 77\n"
        (folder / "memory.stat").write_text(stat)

    def read(self) -> Memory:
        return available_memory(self.process)


@pytest.mark.parametrize("version", [1, 2])
def test_a_pods_limit_counts_and_not_the_machines(tmp_path: Path, version: int) -> None:
    imitation = Imitation(tmp_path, version, "/pod")
    imitation.group("pod", 64 * GIB, 10 * GIB, file_pages=4 * GIB)
    memory = imitation.read()
    assert (memory.free, memory.limit) == (58 * GIB, 64 * GIB)
    assert memory.by == str(tmp_path / "cgroup/pod" / ("memory.max" if version == 2 else "memory.limit_in_bytes"))


@pytest.mark.parametrize("version", [1, 2])
def test_the_tightest_group_above_counts(tmp_path: Path, version: int) -> None:
    imitation = Imitation(tmp_path, version, "/slice/pod/container")
    imitation.group("slice", 100 * GIB, 97 * GIB)
    imitation.group("slice/pod", 64 * GIB, 10 * GIB)
    imitation.group("slice/pod/container", None, 5 * GIB)
    assert imitation.read().free == 3 * GIB
    assert "/slice/memory." in imitation.read().by


@pytest.mark.parametrize("version", [1, 2])
def test_without_a_limit_the_machine_counts(tmp_path: Path, version: int) -> None:
    imitation = Imitation(tmp_path, version, "/pod")
    imitation.group("pod", None, 10 * GIB)
    assert imitation.read() == Memory(400 * GIB, 512 * GIB, MACHINE)


def test_memory_high_counts_where_it_is_lower(tmp_path: Path) -> None:
    imitation = Imitation(tmp_path, 2, "/pod")
    imitation.group("pod", 64 * GIB, 10 * GIB, high=32 * GIB)
    assert imitation.read().free == 22 * GIB
    assert imitation.read().by.endswith("memory.high")
    imitation.group("pod", 16 * GIB, 10 * GIB, high=32 * GIB)
    assert imitation.read().free == 6 * GIB


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("path", "root"),
    [
        ("/docker/abc", "/docker/abc"),  # a container that sees its own group only
        ("/", "/"),  # the same with a namespace of its own
        ("/../other", "/"),  # a group outside of the namespace
        ("/kubepods/x", "/docker/abc"),
    ],
)
def test_what_is_mounted_is_the_group_in_a_container(tmp_path: Path, version: int, path: str, root: str) -> None:
    imitation = Imitation(tmp_path, version, path, root, point="with space")
    imitation.group("", 8 * GIB, 1 * GIB)
    assert imitation.read().free == 7 * GIB


def test_a_group_that_is_full_leaves_nothing(tmp_path: Path) -> None:
    imitation = Imitation(tmp_path, 2, "/pod")
    imitation.group("pod", 1 * GIB, 2 * GIB)
    assert imitation.read().free == 0


def test_files_that_are_missing_or_odd_are_passed_over(tmp_path: Path) -> None:
    assert available_memory(tmp_path / "nowhere").by == MACHINE
    imitation = Imitation(tmp_path, 2, "/pod")
    assert imitation.read().by == MACHINE
    (imitation.process / "mountinfo").write_text("odd\n\n1 2 3 - cgroup2\n")
    assert imitation.read().by == MACHINE


@given(
    st.lists(st.tuples(st.integers(1, 600), st.integers(0, 600), st.integers(0, 600)), min_size=1, max_size=5),
    st.sampled_from([1, 2]),
)
def test_free_is_the_smallest_of_all(
    tmp_path_factory: pytest.TempPathFactory, groups: list[tuple[int, int, int]], version: int
) -> None:
    names = [f"g{index}" for index in range(len(groups))]
    imitation = Imitation(tmp_path_factory.mktemp("groups"), version, "/" + "/".join(names))
    expected = [400 * GIB]
    for index, (limit, used, file_pages) in enumerate(groups):
        imitation.group("/".join(names[: index + 1]), limit * GIB, used * GIB, min(file_pages, used) * GIB)
        if limit < 512:
            expected.append(max(0, limit - (used - min(file_pages, used))) * GIB)
    assert imitation.read().free == min(expected)


@pytest.fixture
def real_group() -> Iterator[Path | None]:
    """A real control group of version 1 or 2; None where this machine lets none be made, and only the imitations above stand for it."""
    for root, limit in ((V1_ROOT, "memory.limit_in_bytes"), (Path("/sys/fs/cgroup"), "memory.max")):
        group = root / f"lmc-test-{os.getpid()}"
        try:
            group.mkdir()
            (group / limit).write_text(str(300 << 20))
        except OSError:
            if group.is_dir():
                group.rmdir()
            continue
        yield group
        group.rmdir()
        return
    yield None


def test_a_real_group(real_group: Path | None) -> None:
    code = "from lmc.memory import available_memory as a; m = a(); print(m.free, m.limit, m.by)"
    join = f"echo $$ > {real_group}/cgroup.procs; " if real_group is not None else ""
    result = subprocess.run(
        ["sh", "-c", f'{join}exec {sys.executable} -c "{code}"'], capture_output=True, text=True, check=True
    )
    free, limit, by = result.stdout.split(maxsplit=2)
    assert 0 < int(free) <= int(limit)
    if real_group is not None:
        assert int(limit) == 300 << 20 and by.startswith(str(real_group))
        assert 200 << 20 < int(free) < 300 << 20
