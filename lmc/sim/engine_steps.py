"""An engine that takes waiting requests in and computes them step by step, on the replay's clock.

A step first continues the requests in the batch, then takes waiting ones in, first come first served: only then is a request looked up, as
vLLM does. Where the KV space is full, the request that was taken in last is preempted and computed again later.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from lmc.cache.directory import Ticket
from lmc.cache.keys import ChunkKey
from lmc.errors import ConfigError
from lmc.sim.cost import Prefill
from lmc.sim.device_cache import DeviceCache, Holding
from lmc.sim.engine_model import EngineModel

_BOUNDLESS = 1 << 60


class Cache(Protocol):
    """The cache below the engine, and the replay's clock."""

    def now(self) -> float: ...

    def at(self, time: float, action: Callable[[], None]) -> None: ...

    def at_computed(self, time: float, action: Callable[[], None]) -> None:
        """The same, for the end of a pass."""
        ...

    def step_soon(self) -> None:
        """Call step(), launch() and stored() in this order, when all that ends at this time has ended."""
        ...

    def look_up(self, run: Run, computed: int) -> int | None:
        """Tokens beyond `computed` that can be loaded; None: ask again when ready() was called for the request."""
        ...

    def load(self, run: Run, tokens: int) -> Sequence[Ticket]:
        """The engine takes the request in and will load them."""
        ...

    def send_loads(self, tickets: Sequence[Ticket]) -> float:
        """Start to load. Returns when that is done."""
        ...

    def loaded(self, run: Run, tickets: Sequence[Ticket]) -> None: ...

    def computed(self, parts: Sequence[tuple[int, int]], seconds: float) -> None:
        """A pass that computed a prompt is over. parts: for each request the position of its first token, and the number of its tokens."""
        ...

    def store(self, run: Run, num_before: int, num_valid: int) -> None:
        """So many tokens of the prompt are computed; num_before of them were so before the pass."""
        ...

    def first_token(self, run: Run) -> None: ...

    def end(self, run: Run) -> None: ...


@dataclass
class Run:
    """A request in the engine."""

    index: int
    keys: list[ChunkKey]  # of its full chunks
    num_tokens: int  # of its prompt
    num_output: int
    computed: int = 0  # tokens of the prompt whose KV the engine has
    output: int = 0  # tokens that came out
    answered: bool = False  # the first token is out
    held: bool = False  # waits for chunks on their way into host memory
    holding: Holding = field(default_factory=Holding)


class Engine:
    def __init__(
        self,
        model: EngineModel,
        prefill: Prefill | None,
        chunk_tokens: int,
        cache: Cache,
    ) -> None:
        self._model = model
        self._prefill = prefill
        self._chunk_tokens = chunk_tokens
        self._cache = cache
        capacity = _BOUNDLESS if model.kv_tokens is None else model.kv_tokens // chunk_tokens
        self._device = DeviceCache(capacity, model.prefix_cache and model.kv_tokens is not None)
        self._waiting: list[Run] = []
        self._running: list[Run] = []
        self._parts: list[tuple[Run, int]] = []  # of the pass that this step begins: requests with their tokens
        self._loads: list[tuple[Run, Sequence[Ticket]]] = []  # before that pass
        self._loads_beside: list[tuple[Run, Sequence[Ticket]]] = []  # that begin in this step, in the background
        self._busy = False
        self._storing = False  # the pass is over, and the engine waits for what is stored of it
        self._loading = 0  # requests with a load in the background
        self.preempted = 0

    def add(self, run: Run) -> None:
        most = run.num_tokens + (run.num_output if self._model.decode else 0)
        if self._slots(most) > self._device.capacity:
            raise ConfigError(
                f"engine.kv_tokens {self._model.kv_tokens} do not hold request {run.index} of {most} tokens; raise it"
            )
        self._waiting.append(run)
        self._cache.step_soon()

    def ready(self, run: Run) -> None:
        """What the request waited for is there, or it shall wait no longer."""
        run.held = False
        self._cache.step_soon()

    def step(self) -> None:
        """Choose what the next pass computes: continue, then take in. Does nothing while a pass is running."""
        if self._busy:
            return
        budget = self._model.max_num_batched_tokens or _BOUNDLESS
        preempted = self.preempted
        parts: list[tuple[Run, int]] = []
        for run in list(self._running):
            if run not in self._running:
                continue  # preempted for one before it
            tokens = min(run.num_tokens - run.computed or 1, budget)
            if tokens and self._grow(run, run.computed + run.output + tokens):
                parts.append((run, tokens))
                budget -= tokens
        self._parts = [part for part in parts if part[0] in self._running]
        if preempted == self.preempted:
            self._take_in(budget)
        if self._parts:
            self._busy = True
        elif not self._running and not self._loading:
            self._break_up()

    def launch(self) -> None:
        """Begin the loads, and the pass when those before it are done."""
        beside, self._loads_beside = self._loads_beside, []
        for run, tickets in beside:
            self._cache.at(self._cache.send_loads(tickets), partial(self._loaded_beside, run, tickets))
        parts, self._parts = self._parts, []
        loads, self._loads = self._loads, []
        if parts:
            begin = max((self._cache.send_loads(tickets) for _, tickets in loads), default=self._cache.now())
            self._cache.at(begin, lambda: self._compute(parts, loads))

    def stored(self, done: float) -> None:
        """What the last pass stored is in host memory then."""
        if self._storing:
            self._storing = False
            self._cache.at(done, self._go_on)

    def _go_on(self) -> None:
        self._busy = False
        self._cache.step_soon()

    def _break_up(self) -> None:
        """Requests whose loads are done may hold the room of each other, while none computes: the last one gives up its own."""
        holding = [run for run in self._waiting if run.holding.slots]
        if holding:
            self._give_up(holding[-1])
            self._cache.step_soon()

    def _take_in(self, budget: int) -> None:
        """Add waiting requests to the pass, with the loads that come before it."""
        for run in list(self._waiting):
            if budget <= 0 or len(self._running) >= self._model.max_num_seqs:
                break
            if run.held:
                continue
            if run.computed:  # its background load is done
                gain, computed = 0, run.computed
            else:
                matched = self._device.match(run.keys[: (run.num_tokens - 1) // self._chunk_tokens])
                computed = matched * self._chunk_tokens
                found = self._cache.look_up(run, computed)
                if found is None:
                    run.held = True
                    continue
                gain = found
            have = computed + gain
            tokens = min(run.num_tokens - have, budget)
            if tokens < run.num_tokens - have and not self._model.chunked_prefill:
                break
            later = gain > 0 and self._model.background_copies
            if not self._hold(run, computed, have if later else have + tokens):
                break
            self._waiting.remove(run)
            tickets = self._cache.load(run, gain) if not run.computed else ()
            run.computed = have
            self._device.name(run.holding, run.keys[: have // self._chunk_tokens])
            if later:
                self._loading += 1
                self._loads_beside.append((run, tickets))
                continue
            if tickets:
                self._loads.append((run, tickets))
            self._running.append(run)
            self._parts.append((run, tokens))
            budget -= tokens
            self._device.name(run.holding, run.keys[: (have + tokens) // self._chunk_tokens])

    def _loaded_beside(self, run: Run, tickets: Sequence[Ticket]) -> None:
        """A load in the background is done; the request goes on in the next step, before those that came later."""
        self._cache.loaded(run, tickets)
        self._loading -= 1
        self._wait_again(run)
        self._cache.step_soon()

    def _compute(self, parts: list[tuple[Run, int]], loads: list[tuple[Run, Sequence[Ticket]]]) -> None:
        for run, tickets in loads:
            self._cache.loaded(run, tickets)
        prompts = [(run.computed, tokens) for run, tokens in parts if run.computed < run.num_tokens]
        decoding = [run.computed + run.output for run, _ in parts if run.computed >= run.num_tokens]
        seconds = self._model.step_s(self._prefill, prompts, decoding)
        measured = [*prompts, *((position, 1) for position in decoding)] if prompts else []
        self._cache.at_computed(self._cache.now() + seconds, lambda: self._computed(parts, measured, seconds))

    def _computed(self, parts: list[tuple[Run, int]], measured: Sequence[tuple[int, int]], seconds: float) -> None:
        if measured:
            self._cache.computed(measured, seconds)
        for run, tokens in parts:
            if run.computed < run.num_tokens:
                run.computed += tokens
                self._cache.store(run, run.computed - tokens, run.computed)
            if run.computed >= run.num_tokens:
                run.output += 1
                if not run.answered:
                    run.answered = True
                    self._cache.first_token(run)
                if self._model.decode is None or run.output >= run.num_output:
                    self._cache.end(run)
                    self._device.free(run.holding)
                    self._running.remove(run)
        if self._model.background_copies:
            self._busy = False
        else:
            self._storing = True
        self._cache.step_soon()

    def _hold(self, run: Run, computed: int, tokens: int) -> bool:
        """Hold the chunks that the engine has itself, and slots for all these tokens."""
        if run.holding.slots:
            return self._device.grow(run.holding, self._slots(tokens))
        keys = run.keys[: computed // self._chunk_tokens]
        holding = self._device.take(keys, self._slots(tokens) - len(keys))
        if holding is not None:
            run.holding = holding
        return holding is not None

    def _grow(self, run: Run, tokens: int) -> bool:
        """Get slots for all these tokens; preempt requests that came later. False if it was preempted itself."""
        while not self._device.grow(run.holding, self._slots(tokens)):
            last = self._running.pop()
            self._give_up(last)
            self._wait_again(last)
            if last is run:
                return False
        end = min(tokens, run.num_tokens)
        self._device.name(run.holding, run.keys[: end // self._chunk_tokens])
        return True

    def _give_up(self, run: Run) -> None:
        """Free its KV. What it has put out stays put out, and is computed again with the prompt."""
        self._device.free(run.holding)
        run.computed = 0
        run.num_tokens += run.output
        run.num_output -= run.output
        run.output = 0
        self.preempted += 1

    def _wait_again(self, run: Run) -> None:
        self._waiting.append(run)
        self._waiting.sort(key=lambda waiting: waiting.index)

    def _slots(self, tokens: int) -> int:
        return -(-tokens // self._chunk_tokens)
