"""A request of an engine that is attached to a node, as the engine's half keeps it, and what the next plan shall do for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import lmc.cache.node.wire as wire
from lmc.cache.directory import Told
from lmc.cache.keys import ChunkKey, KeyChain


@dataclass(slots=True)
class Tracked:
    """A request between its first lookup and its end. Accounting reads it like a Request."""

    number: int
    id: str  # the engine's
    name: str
    chain: KeyChain
    tenant: str
    salt_differs: bool
    arrived: float
    told: Told
    answered: float | None = None
    num_tokens: int = 0
    computed: int = 0
    sources: dict[str, int] = field(default_factory=dict)  # of the last lookup's answer, then of the first admit()
    why: str | None = None
    admitted: bool = False
    stored: int = 0  # leading chunks that need no store any more
    retired: bool = False
    finished: bool = False
    session: int = 0  # that knows the request
    sent: int = 0  # keys that this session has

    @property
    def keys(self) -> Sequence[ChunkKey]:
        return self.chain.keys

    def miss(self) -> str | None:
        return self.why


class Wish(NamedTuple):
    """What the next plan shall do for a request."""

    tracked: Tracked
    blocks: tuple[int, ...]
    event: wire.Admit | wire.Store
