"""The shape of a model with several kinds of KV: its groups, and the bytes of a block of each.

`lmc probe model` writes it, the header of a record has it, and `lmc sim replay` reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lmc.cache.parts import Group, Parts, chunk_tokens_for, parts_of
from lmc.errors import ConfigError

SHAPE_FORMAT = "lmc-shape"
SHAPE_VERSION = 1
_KINDS = ("full", "window", "local", "state")


@dataclass(frozen=True)
class ModelShape:
    """groups: the spine, then the others. block_bytes: of each group's block, over all ranks."""

    groups: tuple[Group, ...]
    block_bytes: tuple[int, ...]

    def parts(self, chunk_tokens: int | None, default: int, checkpoint_tokens: int | None) -> Parts:
        """As the live cache makes them from its settings; chunks have at least `default` tokens if the settings do not say how many.

        Raises ConfigError when chunk_tokens does not fit.
        """
        size = chunk_tokens or chunk_tokens_for(self.groups, default)
        return parts_of(self.groups, size, self.part_bytes(Parts(size, self.groups)), checkpoint_tokens)

    def part_bytes(self, parts: Parts) -> tuple[int, ...]:
        """By group; a host slot holds the largest."""
        return tuple(blocks * size for blocks, size in zip(parts.blocks, self.block_bytes, strict=True))

    def to_json(self) -> dict[str, Any]:
        groups = [
            asdict(group) | {"block_bytes": size} for group, size in zip(self.groups, self.block_bytes, strict=True)
        ]
        return {"format": SHAPE_FORMAT, "version": SHAPE_VERSION, "groups": groups}


def shape_of(parts: Parts, part_bytes: tuple[int, ...], num_ranks: int) -> ModelShape:
    """part_bytes: by group, on one rank."""
    sizes = [num_ranks * size // blocks for size, blocks in zip(part_bytes, parts.blocks, strict=True)]
    return ModelShape(parts.groups, tuple(sizes))


def read_shape(value: object, source: str) -> ModelShape:
    """From JSON. Raises ConfigError, which names the source, for what is not the shape of a model."""
    if not isinstance(value, Mapping) or value.get("format") != SHAPE_FORMAT:
        raise ConfigError(f"{source}: this is not a model's shape; write one with: lmc probe model MODEL --output FILE")
    if value.get("version") != SHAPE_VERSION:
        raise ConfigError(f"{source}: the shape has version {value.get('version')!r}; this lmc reads {SHAPE_VERSION}")
    found = value.get("groups")
    if not isinstance(found, list) or not found:
        raise ConfigError(f"{source}: the shape has no groups; write it anew with: lmc probe model MODEL")
    groups, sizes = zip(
        *(_read_group(one, f"{source}: group {number}") for number, one in enumerate(found)), strict=True
    )
    if groups[0].kind != "full" and len(groups) > 1:
        raise ConfigError(f"{source}: the first group must keep all tokens (kind full), not {groups[0].kind}")
    return ModelShape(groups, sizes)


def _read_group(value: object, where: str) -> tuple[Group, int]:
    wanted = {"kind", "block_tokens", "span", "block_bytes"}
    if not isinstance(value, Mapping) or set(value) != wanted:
        raise ConfigError(f"{where} must have {', '.join(sorted(wanted))}, and nothing else")
    numbers = [value["block_tokens"], value["span"], value["block_bytes"]]
    least = [1, 1 if value["kind"] in ("window", "local") else 0, 1]
    if value["kind"] not in _KINDS or not all(isinstance(number, int) for number in numbers):
        raise ConfigError(f"{where}: kind must be one of {', '.join(_KINDS)}, and the others must be whole numbers")
    if any(number < low for number, low in zip(numbers, least, strict=True)):
        raise ConfigError(f"{where}: block_tokens, block_bytes, and the span of a window must be positive")
    return Group(value["kind"], numbers[0], numbers[1]), numbers[2]
