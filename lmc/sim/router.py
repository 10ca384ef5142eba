"""Chooses the engine instance that gets a request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from lmc.cache.keys import ChunkKey
from lmc.errors import ConfigError

Routing = Literal["round-robin", "prefix"]
_WORTH_FOLLOWING = 2  # chunks; a shorter match may be a system prompt that all requests share


class Router:
    """With "prefix", the instance that last served the longest known prefix is chosen, else the one with the fewest prompt tokens."""

    def __init__(self, routing: Routing, instances: int) -> None:
        if instances < 1:
            raise ConfigError(f"{instances} instances cannot serve; choose at least 1")
        if routing not in get_args(Routing):
            raise ConfigError(f"unknown routing {routing!r}; there are {', '.join(get_args(Routing))}")
        self._routing = routing
        self._tokens = [0] * instances
        self._count = 0
        self._last: dict[ChunkKey, int] = {}

    def choose(self, keys: Sequence[ChunkKey], tokens: int) -> int:
        if self._routing == "round-robin":
            chosen = self._count % len(self._tokens)
            self._count += 1
            return chosen
        matched = next((index for index in range(len(keys) - 1, -1, -1) if keys[index] in self._last), -1) + 1
        if matched >= _WORTH_FOLLOWING:
            chosen = self._last[keys[matched - 1]]
        else:
            chosen = self._tokens.index(min(self._tokens))
        self._tokens[chosen] += tokens
        self._last.update(dict.fromkeys(keys, chosen))
        return chosen
