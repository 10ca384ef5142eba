"""Commands of administrators to a running cache: pin, unpin, prefetch, clear. HTTP threads receive them; the scheduler runs them."""

from __future__ import annotations

import logging
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Annotated, Protocol

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from lmc.cache.directory import Directory
from lmc.cache.keys import ChunkKey, KeyChain, hashed_name
from lmc.cache.observe.logs import facts
from lmc.cache.scheduler.prefetch import Prefetcher
from lmc.errors import ConfigError

logger = logging.getLogger(__name__)

Result = dict[str, object]

MOST_COMMANDS = 64  # that wait for the scheduler
MOST_TOKENS = 4 << 20  # of all of them: as many as the largest body holds, 16 MiB


def _pack(tokens: Sequence[int]) -> Sequence[int]:
    return array("I", tokens)


Token = Annotated[int, Field(ge=0, lt=1 << 32)]
Tokens = Annotated[Sequence[Token], Field(min_length=1), AfterValidator(_pack)]
Name = Annotated[str, Field(max_length=256)]
Owner = Annotated[str, Field(min_length=1, max_length=256)]


class Command(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Pin(Command):
    tokens: Tokens
    """Keep the full chunks of this prompt from eviction."""
    owner: Owner
    """Who wants that; an owner has one pin, to which this adds."""
    seconds: float = Field(default=3600.0, gt=0)
    """For how long."""
    tenant: Name | None = None
    """Whose prompt it is; default: the instance's tenant."""
    salt: Name = ""
    """Cache salt of the prompt's requests."""
    lora: Name = ""
    """Adapter of the prompt."""


class Prefetch(Command):
    tokens: Tokens
    """Bring the full chunks of this prompt into host memory, as far as they are stored below."""
    tenant: Name | None = None
    salt: Name = ""
    lora: Name = ""


class Unpin(Command):
    owner: Owner


class Clear(Command):
    tokens: Tokens | None = None
    """Forget the last full chunk of this prompt and all chunks that continue it; none: see tenant."""
    tenant: Name | None = None
    """Forget this tenant's chunks, whatever their salts; without tokens and tenant: all chunks."""
    salt: Name = ""
    """Cache salt of the prompt's requests."""
    lora: Name = ""
    """Adapter of the prompt."""


class Mailbox:
    """Work for the scheduler's thread, which an idle engine leaves there. put() from one other thread, run() on the scheduler's."""

    def __init__(self) -> None:
        self.waiting: deque[tuple[Callable[[], Result], int, Future[Result]]] = deque()

    def put(self, work: Callable[[], Result], num_tokens: int = 0) -> Future[Result] | None:
        """num_tokens: that the work holds in memory. None: too much waits already."""
        waiting = list(self.waiting)
        if len(waiting) >= MOST_COMMANDS or sum(size for _, size, _ in waiting) + num_tokens > MOST_TOKENS:
            return None
        future: Future[Result] = Future()
        self.waiting.append((work, num_tokens, future))
        self.delivered()
        return future

    def delivered(self) -> None:
        """Called after each put(), on the thread that puts. The engine's scheduler looks by itself, so it needs no call."""

    def run(self) -> None:
        while self.waiting:
            work, _, future = self.waiting.popleft()
            try:
                future.set_result(work())
            except ConfigError as error:
                future.set_exception(error)


class Commands(Protocol):
    """Who carries commands out, on the scheduler's thread. Raises ConfigError for one that means nothing."""

    def run(self, command: Pin | Unpin | Prefetch | Clear) -> Result: ...


class Admin:
    """What the commands do. root maps (tenant, salt, lora) to the start of a chain; tenants and salts are hashed names."""

    def __init__(
        self,
        directory: Directory,
        prefetcher: Prefetcher,
        chunk_tokens: int,
        root: Callable[[str, str, str], ChunkKey],
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
        keys = self._keys(command.tokens, command)
        pinned = self._directory.pin(keys, _owner(command.owner), self._clock() + command.seconds)
        return {"chunks": len(keys), "pinned": pinned}

    def _prefetch(self, command: Prefetch) -> Result:
        keys = self._keys(command.tokens, command)
        return {"chunks": len(keys), "known": self._prefetcher.want(keys, self._tenant(command), self._clock())}

    def _clear(self, command: Clear) -> Result:
        if command.tokens is not None:
            remain = self._directory.clear_from(self._keys(command.tokens, command))
        elif command.salt or command.lora:
            raise ConfigError("salt and lora belong to a prompt; send its tokens, too")
        else:
            remain = self._directory.clear(None if command.tenant is None else self._tenant(command))
        return {"in_use": remain}

    def _tenant(self, command: Pin | Prefetch | Clear) -> str:
        return self._default_tenant if command.tenant is None else hashed_name(command.tenant)

    def _keys(self, tokens: Sequence[int], command: Pin | Prefetch | Clear) -> list[ChunkKey]:
        start = self._root(self._tenant(command), hashed_name(command.salt), command.lora)
        keys = KeyChain(start, self._chunk_tokens).extend(tokens)
        if not keys:
            raise ConfigError(f"{len(tokens)} tokens are no full chunk; a chunk has {self._chunk_tokens}")
        return keys


def _owner(name: str) -> str:
    """Requests have pins, too. The prefix keeps an administrator's owner names apart from theirs."""
    return f"admin {name}"
