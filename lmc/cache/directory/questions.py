"""What a request asks the tiers that others write to: which of its missing chunks they hold and, when that is known, which leaves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lmc.cache.directory.misses import Miss
from lmc.cache.keys import ChunkKey


@dataclass(slots=True)
class Question:
    keys: Sequence[ChunkKey]
    until: float  # when the answer is no longer waited for
    taken: bool = False  # the keys were handed out
    answered: bool = False
    failed: bool = False  # a tier could not say

    def waits(self, now: float) -> bool:
        return not self.answered and now < self.until

    @property
    def miss(self) -> Miss | None:
        """Once it does not wait any more: why it is not known what the tiers hold."""
        if not self.answered:
            return Miss.REMOTE_DEADLINE
        return Miss.REMOTE_FAILED if self.failed else None


@dataclass(slots=True)
class Questions:
    """One about chunks and one about leaves at most. The last one is the one to be taken and answered."""

    deadline: float  # seconds
    chunks: Question | None = None
    leaves: Question | None = None

    def take(self) -> Sequence[ChunkKey]:
        """The keys of the last question, once."""
        last = self.leaves or self.chunks
        if last is None or last.taken:
            return ()
        last.taken = True
        return last.keys

    def answer(self, *, failed: bool) -> None:
        last = self.leaves or self.chunks
        assert last is not None
        last.answered = True
        last.failed = failed

    def ask_for_chunks(self, keys: Sequence[ChunkKey], now: float) -> None:
        self.chunks = Question(keys, now + self.deadline)

    def ask_for_leaves(self, keys: Sequence[ChunkKey], now: float) -> None:
        self.leaves = Question(keys, now + self.deadline)
