"""Whatever fails inside lmc, at any call of SGLang's, ends at most the cache: nothing waits, results come, loads are right or failed."""

from __future__ import annotations

import os
from typing import Any

import pytest

from tests.engines.injection import ERRORS, Injection
from tests.engines.scenario import prompt
from tests.engines.sglang_pool import PAGE, Request, Start, equal, transfer
from tests.services import wait_until

pytestmark = [pytest.mark.engine, pytest.mark.sglang, pytest.mark.fault]

PAGES = [3, 9, 4]
_EVERY = int(os.environ.get("LMC_TEST_EVERY", "10"))  # 1: each function


def hooks() -> list[str]:
    """The methods that SGLang calls: those of its interface, and the hook of its queue."""
    from sglang.srt.mem_cache.unified_cache.unified_cache_linker import UnifiedCacheLinker

    return [*sorted(UnifiedCacheLinker.__abstractmethods__), "_hold"]


class Traffic:
    """A prompt that is stored, loaded, cancelled and flushed. Whatever the linker answers, SGLang's own state must stay whole."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.linker = engine.linker
        self.accepted = 0  # offloads without a result

    def run(self) -> None:
        self.engine.fill(PAGES, seed=1)
        self.right = self.engine.read(PAGES)
        self.store(prompt(1, 3 * PAGE + 5))
        self.load(prompt(1, 3 * PAGE + 5), "again", [20, 7, 11])
        self.cancel(prompt(1, 3 * PAGE + 5), "cancelled")
        self.linker.offload([transfer(self.arrive(prompt(2, 3 * PAGE + 5), "late").hashes, PAGES)])
        self.linker.reset()  # SGLang forgets the offloads that it waits for
        self.accepted = 0
        self.store(prompt(3, 3 * PAGE + 5))
        self.load(prompt(3, 3 * PAGE + 5), "third", [20, 7, 11])

    def arrive(self, tokens: list[int], rid: str) -> Request:
        request = self.engine.arrive(tokens, rid=rid)
        wait_until(lambda: not self.linker._hold([request], None), "the request is held")
        request.init_next_round_input(None, False)
        return request

    def store(self, tokens: list[int]) -> None:
        request = self.arrive(tokens, f"store {tokens[0]}")
        self.linker._hold([], None)
        self.accepted += self.linker.offload([transfer(request.hashes, PAGES)])
        wait_until(
            lambda: min(self.linker.num_completed_offloads(), self.accepted) == self.accepted, "every offload ends"
        )
        for _ in range(self.accepted):
            assert self.linker.pop_completed_offload() in (True, False)
        self.accepted = 0

    def load(self, tokens: list[int], rid: str, pages: list[int]) -> None:
        request = self.arrive(tokens, rid)
        count = max(request.hits, default=0)
        if not count or not self.linker.load(rid, [transfer(request.tail[:count], pages[:count])]):
            return
        self.linker._hold([], None)
        index = self.linker.start_layer_wise_loading()
        assert index >= 0, "a load was accepted, so its batch must say how it ended"
        for layer in range(3):
            self.linker.layer_done_counter.set_consumer(index)
            self.linker.layer_done_counter.wait_until(layer)
        if self.linker.finish_layer_wise_loading(index):
            assert count == len(pages) and equal(self.engine.read(pages), self.right), "wrong bytes were loaded"

    def cancel(self, tokens: list[int], rid: str) -> None:
        request = self.arrive(tokens, rid)
        if request.hits and self.linker.load(rid, [transfer(request.tail, [20, 7, 11])]):
            assert self.linker.cancel_queued_load(rid)
        assert self.linker.start_layer_wise_loading() == -1


def observed(start: Start) -> dict[tuple[str, str], int]:
    injection, traffic = Injection(), Traffic(start())
    with injection.armed():
        traffic.run()
        assert traffic.engine.cache is not None
        traffic.linker.close()
    return dict(injection.seen)


def assert_survives(start: Start, injection: Injection) -> None:
    traffic = Traffic(start())
    try:
        with injection.armed():
            traffic.run()
        traffic.load(prompt(3, 3 * PAGE + 5), "after", [20, 7, 11])
        traffic.store(prompt(4, 3 * PAGE + 5))
        has_ended = traffic.engine.cache is None
        with injection.armed():
            traffic.linker.close()
        if injection.function == injection.hook:
            assert injection.raised, "the fault never came"
            assert has_ended or injection.hook.endswith(".close"), "the cache has not ended"
    except Exception as error:
        raise AssertionError(f"{injection.error!r} in {injection.function} within {injection.hook}: {error}") from error


def test_every_method_that_sglang_calls_is_guarded(start: Start) -> None:
    """A new method must be guarded, or consist of guarded ones, and the traffic of this file must reach it."""
    from lmc.cache.connectors import guard
    from lmc.cache.connectors.sglang import LmcLinker

    parts = {"finish_layer_wise_loading": ("_finish_load", "_end_loading"), "_hold": ("_read_weights", "_asking")}
    reached = {hook.rpartition(".")[2] for hook, _ in observed(start)}
    for name in hooks():
        for part in parts.get(name, (name,)):
            assert vars(LmcLinker)[part].__code__.co_filename == guard.__file__, part
            assert part in reached
    assert set(hooks()) <= set(vars(LmcLinker))
    own = {name for name in vars(LmcLinker) if not name.startswith("_")} - {"end_cache"}
    assert own == set(hooks()) - {"_hold"}


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_fault_in_any_function_ends_at_most_the_cache(
    start: Start, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    caplog.set_level("CRITICAL", "lmc")
    seen = observed(start)
    assert len(seen) > 100, "the test says nothing"
    failures = []
    for turn, ((hook, function), calls) in enumerate(sorted(seen.items())):
        if hook != function and turn % (len(ERRORS) * _EVERY) != ERRORS.index(error):
            continue  # every error at the call itself, and a part of the functions inside
        number = 1 if hook == function or turn % 2 else -(-calls // 2)  # how often a hook is called depends on threads
        injection = Injection(hook, function, error, number, closing_too=turn % 3 == 0)
        try:
            assert_survives(start, injection)
        except AssertionError as failure:
            failures.append(str(failure)[:300])
    assert not failures, "\n".join(failures)
