"""Reads chunk files: which chunk each one holds, and whether its bytes are those that were stored."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lmc.cache.tiers.format import FOOTER_BYTES, ChunkFooter, TierScope, decode, is_sealed
from lmc.cache.tiers.namespaces import LEASE
from lmc.cache.tiers.stored import unpack
from lmc.errors import ConfigError, Corrupt


@dataclass(frozen=True)
class Inspection:
    path: Path
    file_bytes: int
    footer: ChunkFooter | None  # None when it cannot be read
    problem: str | None  # None when all is well
    unchecked: bool = False  # it is sealed with an auth_key that is not known here, so only its footer was checked


def find_files(paths: Iterable[Path]) -> Iterator[Path]:
    """Return all files at and below the paths. Links and the leases of namespaces are left out.

    Raises ConfigError for a path that is neither a file nor a folder.
    """
    for path in paths:
        if path.is_dir():
            files = (found for found in path.rglob("*") if found.is_file() and not found.is_symlink())
            yield from sorted(found for found in files if found.name != LEASE)
        elif path.is_file():
            yield path
        else:
            raise ConfigError(f"{path}: no such file or folder")


def inspect_file(path: Path, auth_key: bytes = b"") -> Inspection:
    """Check footer, length and checksums, that of the decoded chunk too, and with an auth_key the seal.

    Raises ConfigError when the file cannot be read.
    """
    footer = None
    unchecked = False
    problem: str | None = None
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            payload_bytes = max(size - FOOTER_BYTES, 0)
            file.seek(payload_bytes)
            page = memoryview(file.read(FOOTER_BYTES))
            footer = decode(page)
            if payload_bytes != footer.payload_bytes:
                raise Corrupt(f"the payload has {payload_bytes} bytes instead of {footer.payload_bytes}")
            file.seek(0)
            payload = memoryview(file.read(payload_bytes))
            if is_sealed(page) and not auth_key:
                unchecked = True
            else:
                scope = TierScope(footer.namespace, footer.rank, footer.layout, footer.raw_bytes, auth_key)
                raw = memoryview(bytearray(footer.raw_bytes)) if footer.coding else payload
                unpack(scope, footer.key, payload, page, scope.checksum(payload), raw)
    except Corrupt as error:
        problem = str(error)
    except (MemoryError, OverflowError):
        problem = "its footer claims a raw chunk that is larger than memory"
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    return Inspection(path, size, footer, problem, unchecked)
