"""Commands of administrators to a running cache: pin, unpin, prefetch, clear. HTTP threads receive them; the scheduler runs them."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

from pydantic import BaseModel, ConfigDict, Field

from lmc.cache.directory import Directory
from lmc.cache.keys import ChunkKey, KeyChain
from lmc.cache.observe.logs import facts
from lmc.cache.scheduler.prefetch import Prefetcher
from lmc.errors import ConfigError

logger = logging.getLogger(__name__)

Result = dict[str, object]


class Command(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Pin(Command):
    tokens: list[int] = Field(min_length=1)
    """Keep the full chunks of this prompt from eviction."""
    owner: str = Field(min_length=1)
    """Who wants that; an owner has one pin, to which this adds."""
    seconds: float = Field(default=3600.0, gt=0)
    """For how long."""
    tenant: str | None = None
    """Whose prompt it is; default: the instance's tenant."""
    lora: str = ""
    """Adapter of the prompt."""


class Prefetch(Command):
    tokens: list[int] = Field(min_length=1)
    """Bring the full chunks of this prompt into host memory, as far as they are stored below."""
    tenant: str | None = None
    lora: str = ""


class Unpin(Command):
    owner: str = Field(min_length=1)


class Clear(Command):
    tokens: list[int] | None = Field(default=None, min_length=1)
    """Forget the last full chunk of this prompt and all chunks that continue it; none: see tenant."""
    tenant: str | None = None
    """Forget this tenant's chunks; without tokens and tenant: all chunks."""
    lora: str = ""
    """Adapter of the prompt."""


class Mailbox:
    """Work for the scheduler's thread. put() from any thread, run() on the scheduler's."""

    def __init__(self) -> None:
        self.waiting: deque[tuple[Callable[[], Result], Future[Result]]] = deque()

    def put(self, work: Callable[[], Result]) -> Future[Result]:
        future: Future[Result] = Future()
        self.waiting.append((work, future))
        return future

    def run(self) -> None:
        while self.waiting:
            work, future = self.waiting.popleft()
            try:
                future.set_result(work())
            except ConfigError as error:
                future.set_exception(error)


class Admin:
    """What the commands do. root maps (tenant, lora) to the start of a chain."""

    def __init__(
        self,
        directory: Directory,
        prefetcher: Prefetcher,
        chunk_tokens: int,
        root: Callable[[str, str], ChunkKey],
        clock: Callable[[], float],
        default_tenant: str,
    ) -> None:
        self._directory = directory
        self._prefetcher = prefetcher
        self._default_tenant = default_tenant
        self._chunk_tokens = chunk_tokens
        self._root = root
        self._clock = clock

    def run(self, command: Pin | Unpin | Prefetch | Clear) -> Result:
        """On the scheduler's thread. Raises ConfigError for a prompt without a full chunk."""
        if isinstance(command, Pin):
            result = self._pin(command)
        elif isinstance(command, Unpin):
            result = {"unpinned": self._directory.unpin(_owner(command.owner))}
        elif isinstance(command, Prefetch):
            result = self._prefetch(command)
        else:
            result = self._clear(command)
        name = type(command).__name__.lower()
        logger.info("lmc: admin %s: %s", name, result, extra=facts(command=name, **result))
        return result

    def _pin(self, command: Pin) -> Result:
        keys = self._keys(command.tokens, command.tenant, command.lora)
        pinned = self._directory.pin(keys, _owner(command.owner), self._clock() + command.seconds)
        return {"chunks": len(keys), "pinned": pinned}

    def _prefetch(self, command: Prefetch) -> Result:
        keys = self._keys(command.tokens, command.tenant, command.lora)
        tenant = self._default_tenant if command.tenant is None else command.tenant
        return {"chunks": len(keys), "known": self._prefetcher.want(keys, tenant, self._clock())}

    def _clear(self, command: Clear) -> Result:
        if command.tokens is not None:
            remain = self._directory.clear_from(self._keys(command.tokens, command.tenant, command.lora))
        else:
            remain = self._directory.clear(command.tenant)
        return {"in_use": remain}

    def _keys(self, tokens: list[int], tenant: str | None, lora: str) -> list[ChunkKey]:
        start = self._root(self._default_tenant if tenant is None else tenant, lora)
        keys = KeyChain(start, self._chunk_tokens).extend(tokens)
        if not keys:
            raise ConfigError(f"{len(tokens)} tokens are no full chunk; a chunk has {self._chunk_tokens}")
        return keys


def _owner(name: str) -> str:
    """Requests have pins, too. The prefix keeps an administrator's owner names apart from theirs."""
    return f"admin {name}"
