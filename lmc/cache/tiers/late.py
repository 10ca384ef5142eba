"""A medium that hangs while its tier is opened or scanned must not hang the engine's start: the start waits for a bounded time.

What then is not open is opened by the first call that finds the medium answering again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

from lmc.cache.keys import ChunkKey
from lmc.cache.tiers.base import BoundedTier
from lmc.cache.tiers.stored import Moved
from lmc.errors import TierError

Result = TypeVar("Result")


class TierHangs(TierError):
    """No answer in time; whoever was asked may still be waiting for it."""


class _Call(Generic[Result]):
    def __init__(self, work: Callable[[], Result]) -> None:
        self._work = work
        self.result: list[Result] = []
        self.error: Exception | None = None
        self.thread = threading.Thread(target=self._run, name="lmc-start", daemon=True)

    def _run(self) -> None:
        try:
            self.result.append(self._work())
        except Exception as error:  # noqa: BLE001  it is raised where it is waited for
            self.error = error


def wait_for(work: Callable[[], Result], patience: float, what: str, progress: Callable[[], int] = lambda: 0) -> Result:
    """The result of work(), which runs on a thread of its own and may take long as long as progress() changes.

    Raises TierHangs when it did not for patience seconds, TierError when there is no thread, and what work() raises.
    """
    call = _Call(work)
    try:
        call.thread.start()
    except (RuntimeError, MemoryError):
        raise TierError(f"{what}: cannot start a thread; raise the limit of processes") from None
    before = progress()
    while True:
        call.thread.join(patience)
        if not call.thread.is_alive():
            break
        now = progress()
        if now == before:
            raise TierHangs(f"{what}: no answer for {patience:g} s")
        before = now
    if call.error is not None:
        raise call.error
    return call.result[0]


class LateTier:
    """A bounded tier that is opened by open_tier(), on the thread of whoever calls first. Until then every call raises TierError.

    A call that hangs in it holds its thread, as one that hangs in the tier does; other calls fail at once meanwhile.
    """

    def __init__(self, name: str, open_tier: Callable[[], BoundedTier]) -> None:
        self.name = name
        self._open_tier = open_tier
        self._opening = threading.Lock()
        self._tier: BoundedTier | None = None
        self._closed = False

    def open(self) -> BoundedTier:
        """Raises TierError when it cannot be opened, or is being opened by another thread."""
        if self._tier is not None:
            return self._tier
        if not self._opening.acquire(blocking=False):
            raise TierError(f"{self.name} tier: it is still being opened")
        try:
            if self._tier is None:
                self._tier = self._open_tier()
                if self._closed:
                    self._tier.close()
            return self._tier
        finally:
            self._opening.release()

    @property
    def is_open(self) -> bool:
        return self._tier is not None

    @property
    def progress(self) -> int:
        """Changes while scan() gets on."""
        return self._tier.progress if self._tier is not None else 0

    def put(self, key: ChunkKey, data: memoryview, parent: ChunkKey | None = None) -> Moved:
        return self.open().put(key, data, parent)

    def get(self, key: ChunkKey, out: memoryview) -> Moved:
        return self.open().get(key, out)

    def contains(self, keys: Sequence[ChunkKey]) -> list[bool]:
        return self.open().contains(keys)

    def delete(self, key: ChunkKey) -> None:
        self.open().delete(key)

    def scan(self) -> Iterator[tuple[ChunkKey, int]]:
        return self.open().scan()

    def parents(self, keys: Sequence[ChunkKey]) -> dict[ChunkKey, ChunkKey]:
        return self.open().parents(keys)

    def close(self) -> None:
        self._closed = True
        if self._tier is not None:
            self._tier.close()
