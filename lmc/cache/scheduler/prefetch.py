"""Stages the chunks of an expected prompt before its request arrives. It runs on the scheduler's thread, and no request waits for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lmc.cache.directory import HOST, Directory, Ticket
from lmc.cache.keys import ChunkKey
from lmc.cache.scheduler.presence import Presence, Question


@dataclass(frozen=True)
class Wish:
    keys: tuple[ChunkKey, ...]
    tenant: str
    question: Question | None
    until: float  # when the answer is no longer waited for


class Prefetcher:
    def __init__(self, directory: Directory, presence: Presence | None, lookup_deadline: float) -> None:
        self._directory = directory
        self._presence = presence
        self._lookup_deadline = lookup_deadline
        self.wishes: list[Wish] = []  # prompts that are expected and not staged yet

    def want(self, keys: Sequence[ChunkKey], tenant: str, now: float) -> int:
        """Returns the number of leading keys that are known to be stored. Tiers that others write to are asked for the rest."""
        found = self._directory.lookup(keys, now)
        unknown = keys[found.num_chunks :]
        question = self._presence.ask(unknown) if self._presence is not None and unknown else None
        self.wishes.append(Wish(tuple(keys), tenant, question, now + self._lookup_deadline))
        return found.num_chunks

    def advance(self, now: float) -> list[Ticket]:
        """Stage tickets that are due. The directory must have learned the answers that came in."""
        tickets: list[Ticket] = []
        waiting = []
        for wish in self.wishes:
            if wish.question is not None and not wish.question.done and now < wish.until:
                waiting.append(wish)
                continue
            found = self._directory.lookup(wish.keys, now)
            if any(tier != HOST for tier in found.tiers):
                tickets += self._directory.stage(wish.keys[: found.num_chunks], now, tenant=wish.tenant)
        self.wishes = waiting
        return tickets
