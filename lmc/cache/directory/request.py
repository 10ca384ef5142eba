"""What the cache remembers of a request between its first lookup and its end."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from lmc.cache.directory.directory import Found
from lmc.cache.directory.misses import Miss
from lmc.cache.directory.places import HOST
from lmc.cache.keys import KeyChain


class Question(Protocol):
    """A question to the tiers that others write to."""

    @property
    def done(self) -> bool: ...

    failed: bool


@dataclass(slots=True)
class CachedRequest:
    chain: KeyChain
    tenant: str
    arrived: float
    answered: float | None = None  # when the first lookup had its answer
    found: Found | None = None  # at the first lookup: where the hit came from
    num_tokens: int = 0  # at the last lookup
    computed: int = 0  # tokens the engine holds itself, at the last lookup
    question: Question | None = None  # to the tiers that others write to
    ask_until: float = 0.0
    stage_until: float | None = None  # set when staging starts
    salt_differs: bool = False  # the same first chunk came before under another tenant or adapter
    short: Miss = Miss.LOAD_FAILED  # why chunks that are still below did not come into host
    cut: str | None = None  # why less is loaded than was found
    usable: int = 1 << 60  # chunks that may be offered; lowered when a load failed
    stored: int = 0  # chunks that need no store any more
    touched: bool = False
    admitted: bool = False
    sources: dict[str, int] = field(default_factory=dict)  # tokens that the first admit() promised, by tier
    loading: dict[int, int] = field(default_factory=dict)  # operation -> chunk index

    def sources_of(self, first: int, last: int, chunk_tokens: int) -> dict[str, int]:
        """Tokens of chunks first..last, less what the engine holds, by the tier that held them when the request came."""
        assert self.found is not None
        tiers = self.found.tiers
        sources: dict[str, int] = {}
        covered = self.computed
        for index in range(first, last):
            end = (index + 1) * chunk_tokens
            tier = tiers[index] if index < len(tiers) else HOST
            sources[tier] = sources.get(tier, 0) + end - covered
            covered = end
        return sources

    def miss(self) -> str | None:
        """Why the hit ended before the last chunk that may be loaded."""
        if self.cut is not None or self.found is None:
            return self.cut
        if self.found.miss == Miss.NEVER_STORED and self.found.num_chunks == 0 and self.salt_differs:
            return Miss.SALT_DIFFERS
        return self.found.miss
