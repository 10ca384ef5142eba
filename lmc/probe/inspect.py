"""Say what a chunk file is and whether its bytes are what was put."""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lmc.cache.tiers.format import FOOTER_BYTES, ChunkFooter, checksum, decode
from lmc.errors import ConfigError, Corrupt


@dataclass(frozen=True)
class Inspection:
    path: Path
    file_bytes: int
    footer: ChunkFooter | None  # None when it cannot be read
    problem: str | None  # None when all is well


def find_files(paths: Iterable[Path]) -> Iterator[Path]:
    """The paths that are files, and all files below those that are folders. Raises ConfigError for a path that is neither."""
    for path in paths:
        if path.is_dir():
            yield from sorted(found for found in path.rglob("*") if found.is_file())
        elif path.is_file():
            yield path
        else:
            raise ConfigError(f"{path}: no such file or folder")


def inspect_file(path: Path) -> Inspection:
    """Check footer, length and checksum. Raises ConfigError when the file cannot be read."""
    footer = None
    problem: str | None = None
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            payload_bytes = max(size - FOOTER_BYTES, 0)
            file.seek(payload_bytes)
            footer = decode(file.read(FOOTER_BYTES))
            if payload_bytes != footer.payload_bytes:
                raise Corrupt(f"the payload has {payload_bytes} bytes instead of {footer.payload_bytes}")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content, memoryview(content) as view:
                if checksum(view[:payload_bytes]) != footer.checksum:
                    raise Corrupt("the payload does not match its checksum")
    except Corrupt as error:
        problem = str(error)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    return Inspection(path, size, footer, problem)
