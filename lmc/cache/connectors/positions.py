"""How a model encodes positions, as its Hugging Face configuration says it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

LONG_ROPE = frozenset({"longrope", "su"})  # one set of factors up to a length, another beyond it


def rope_kinds(config: Mapping[str, Any]) -> Iterator[str]:
    """The kinds of rotary encoding in a configuration, those of its parts and of single kinds of layers included."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            kind = value.get("rope_type", value.get("type") if "rope" in key else None)
            if kind is not None:
                yield str(kind)
            yield from rope_kinds(value)
