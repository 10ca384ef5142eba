"""Names the weights in a folder by all of their bytes. A file's digest is kept under cache_home() until the file changes."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tempfile
import time
from pathlib import Path

from blake3 import blake3

from lmc.errors import ModelError
from lmc.model import cache_home

logger = logging.getLogger(__name__)

_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".tensors", ".npz")
_DESCRIPTIONS = (  # files that say how an engine shall read the weights
    "hf_quant_config.json",
    "params.json",
    "quantization_config.json",
    "quantize_config.json",
)
_PIECE_BYTES = 32 * 1024 * 1024
_PROGRESS_SECONDS = 5.0
_SETTLED_SECONDS = (
    2.0  # a file that changed later than this before it was read may change again within one tick of its clock
)


def weights_digest(folder: Path) -> str:
    """A name for what decides a model's KV: its configuration and every byte of its weight files. The same on every machine.

    Raises ModelError if the folder holds no weights, or if they change while they are read.
    """
    hasher = blake3()
    if (folder / "config.json").is_file():
        config = json.loads((folder / "config.json").read_text())
        config.pop("transformers_version", None)
        config.pop("_name_or_path", None)
        hasher.update(json.dumps(config, sort_keys=True).encode())
    _hash_files(hasher, folder)
    return hasher.hexdigest()[:32]


def weight_files(folder: Path) -> list[Path]:
    """The files of a folder, or the one file, that hold weights; by name."""
    if folder.is_file():
        return [folder]
    return sorted(file for file in folder.glob("*") if file.suffix in _SUFFIXES and file.is_file())


def unchanged_since_start(folder: Path) -> bool:
    """Whether the weights in a folder are older than this process, so that it can have read no others."""
    started = _process_start()
    return all(max(file.stat().st_ctime, file.lstat().st_ctime) < started for file in (folder, *weight_files(folder)))


def _hash_files(hasher: blake3, folder: Path) -> None:
    files = weight_files(folder)
    if not files:
        raise ModelError(f"{folder} holds no weights: no file that ends in {', '.join(_SUFFIXES)}")
    for name in _DESCRIPTIONS:
        if (folder / name).is_file():
            content = (folder / name).read_bytes()
            hasher.update(f"{name}:{len(content)}:".encode() + content)
    progress = _Progress(sum(file.stat().st_size for file in files))
    for file in files:
        try:
            digest = _file_digest(file, progress)
        except OSError as error:
            raise ModelError(f"cannot read the weights in {file}: {error.strerror}") from error
        hasher.update(f"{file.name}:{file.stat().st_size}:{digest}".encode())
    progress.end()


class _Progress:
    """A line in the log now and then while many bytes are hashed."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._done = 0
        self._started = self._told = time.monotonic()

    def add(self, count: int) -> None:
        self._done += count
        if time.monotonic() - self._told > _PROGRESS_SECONDS:
            self._told = time.monotonic()
            logger.info("lmc: hashing the weights: %.1f of %.1f GB", self._done / 1e9, self._total / 1e9)

    def end(self) -> None:
        seconds = time.monotonic() - self._started
        if seconds > _PROGRESS_SECONDS:
            logger.info("lmc: hashed %.1f GB of weights in %.0f s", self._total / 1e9, seconds)


def _file_digest(file: Path, progress: _Progress) -> str:
    """Raises ModelError if the file is written to meanwhile."""
    before = _version(file)
    kept = cache_home() / "weights" / blake3(str(file.resolve()).encode()).hexdigest()[:32]
    if (digest := _read_kept(kept, before)) is not None:
        progress.add(file.stat().st_size)
        return digest
    now, size, done = time.time(), file.stat().st_size, 0
    hasher = blake3(max_threads=blake3.AUTO)
    buffer = bytearray(_PIECE_BYTES)
    view = memoryview(buffer)
    with file.open("rb", buffering=0) as stream:
        while done <= size and (count := stream.readinto(buffer)):
            hasher.update(view[:count])
            done += count
            progress.add(count)
    if _version(file) != before:
        raise ModelError(f"{file} was written to while it was read; start again when it is complete")
    digest = hasher.hexdigest()
    if now - file.stat().st_ctime > _SETTLED_SECONDS:
        _keep(kept, before, digest)
    return digest


def _version(file: Path) -> list[int]:
    """What changes whenever a file's content does."""
    stat = file.stat()
    return [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _read_kept(kept: Path, version: list[int]) -> str | None:
    try:
        found = json.loads(kept.read_text())
    except (OSError, ValueError):
        return None  # nobody has hashed it yet, or the entry is damaged
    if not isinstance(found, dict) or found.get("version") != version:
        return None
    digest = found.get("digest")
    return digest if isinstance(digest, str) and len(digest) == blake3.digest_size * 2 else None


def _keep(kept: Path, version: list[int], digest: str) -> None:
    """Where nothing can be written, the file is hashed again at the next start."""
    with contextlib.suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=kept.parent, delete=False) as unfinished:
            json.dump({"version": version, "digest": digest}, unfinished)
        Path(unfinished.name).replace(kept)


def _process_start() -> float:
    """When this process began, at the latest, on the clock of file times.

    psutil's answer may be a second early, as the time of boot is rounded. The kernel rounds down to a tick of 10 ms, so the end of the tick
    counts: a process that has just begun reads no weights before it.
    """
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - (ticks + 1) / os.sysconf("SC_CLK_TCK")
    return time.time() - age
