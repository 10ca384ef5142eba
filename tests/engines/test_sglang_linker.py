"""The linker alone: pages, promises, results and faults."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Callable

import pytest

from lmc.cache.transfer.backends.host import HostBackend
from lmc.cache.transfer.planner import Descriptors
from lmc.cache.transfer.runtimes import ThreadRuntime
from lmc.cache.transfer.streams import TransferStreams
from lmc.cache.worker.block_copies import BlockCopier
from lmc.errors import ConfigError, TransferError
from tests.engines.scenario import prompt
from tests.engines.sglang_pool import CHUNK_BYTES, PAGE, Request, Start, equal, transfer
from tests.services import wait_until

pytestmark = [pytest.mark.engine, pytest.mark.sglang]


def test_pages_come_back_as_they_were_into_other_places(start: Start) -> None:
    engine = start()
    engine.fill([3, 9, 4], seed=1)
    stored = engine.read([3, 9, 4])
    engine.serve(prompt(1, 3 * PAGE + 5), [3, 9, 4])
    request = engine.arrive(prompt(1, 3 * PAGE + 5), rid="again")
    assert request.hits == [1, 2, 3]
    assert engine.load(request, [20, 7, 11])
    assert equal(engine.read([20, 7, 11]), stored)
    engine.check_idle()


def test_the_tail_beyond_the_device_hit_is_loaded(start: Start) -> None:
    engine = start()
    engine.fill([3, 9, 4, 5], seed=2)
    engine.serve(prompt(2, 4 * PAGE + 5), [3, 9, 4, 5])
    request = engine.arrive(prompt(2, 4 * PAGE + 5), rid="again", device_pages=2)
    assert request.hits == [1, 2]
    assert engine.load(request, [30, 31])
    assert equal(engine.read([30, 31]), engine.read([4, 5]))
    engine.check_idle()


def test_a_prompt_that_ends_with_a_page_keeps_its_last_page_to_compute(start: Start) -> None:
    engine = start()
    engine.serve(prompt(3, 4 * PAGE), [3, 9, 4, 5])
    assert engine.arrive(prompt(3, 4 * PAGE), rid="again").hits == [1, 2, 3]


def test_nodes_of_one_prompt_are_found_as_one_prefix(start: Start) -> None:
    engine = start()
    engine.fill([3, 9, 4, 5], seed=4)
    request = engine.arrive(prompt(4, 4 * PAGE + 5))
    assert engine.offload(request, [3, 9])
    assert engine.offload(request, [4, 5], first=2)
    engine.leave()
    again = engine.arrive(prompt(4, 4 * PAGE + 5), rid="again")
    assert again.hits == [1, 2, 3, 4]
    assert engine.load(again, [20, 21, 22, 23])
    assert equal(engine.read([20, 21, 22, 23]), engine.read([3, 9, 4, 5]))


def test_unknown_pages_are_not_accepted_and_known_ones_before_them_are_kept(start: Start) -> None:
    engine = start()
    request = engine.arrive(prompt(5, 2 * PAGE + 5))
    generated = Request("other", array("q", prompt(6, 3 * PAGE)), engine.linker).hashes
    assert not engine.linker.offload([transfer(generated, [7, 8, 9])])
    assert engine.linker.offload([transfer(request.hashes + generated[:1], [3, 9, 7])])
    wait_until(lambda: engine.linker.num_completed_offloads() > 0, "the offload ends")
    assert not engine.linker.pop_completed_offload()  # so that SGLang offers the node again
    assert engine.arrive(prompt(5, 2 * PAGE + 5), rid="again").hits == [1, 2]


def test_results_come_in_the_order_of_acceptance(start: Start) -> None:
    engine = start()
    one, two = engine.arrive(prompt(7, PAGE + 1)), engine.arrive(prompt(8, PAGE + 1))
    blocked: list[Callable[[], None]] = []
    execute = engine.cache.worker.copier.backend.execute
    engine.cache.worker.copier.backend.execute = lambda *a: (wait_until(lambda: bool(blocked), "go"), execute(*a))
    assert engine.linker.offload([transfer(one.hashes, [3])])
    assert engine.linker.offload([transfer(two.hashes, [4])])
    assert engine.linker.num_completed_offloads() == 0
    blocked.append(lambda: None)
    wait_until(lambda: engine.linker.num_completed_offloads() == 2, "both end")
    assert engine.linker.pop_completed_offload() and engine.linker.pop_completed_offload()


def test_what_is_promised_stays_until_it_is_loaded(start: Start) -> None:
    engine = start(host__capacity=8 * 4096 * -(-CHUNK_BYTES // 4096))
    slots = engine.cache.scheduler.directory.usage()["host"][1]
    engine.fill([3, 9, 4], seed=9)
    stored = engine.read([3, 9, 4])
    engine.serve(prompt(9, 3 * PAGE + 5), [3, 9, 4])
    request = engine.arrive(prompt(9, 3 * PAGE + 5), rid="promised")
    assert request.hits == [1, 2, 3]
    for seed in range(100, 100 + 2 * slots):  # as much again as fits, while the promise holds
        other = Request(f"x{seed}", array("q", prompt(seed, PAGE + 1)), engine.linker)
        engine.linker._hold([request, other], None)
        engine.offload(other, [50])
    assert engine.load(request, [20, 21, 22])
    assert equal(engine.read([20, 21, 22]), stored)
    engine.check_idle()


def test_a_failed_copy_fails_the_load_and_the_chunk(start: Start) -> None:
    engine = start()
    engine.serve(prompt(10, 3 * PAGE + 5), [3, 9, 4])
    request = engine.arrive(prompt(10, 3 * PAGE + 5), rid="again")

    def broken(*_: object) -> None:
        raise TransferError("injected")

    engine.cache.worker.copier.backend.execute = broken
    assert not engine.load(request, [20, 21, 22])
    assert engine.arrive(prompt(10, 3 * PAGE + 5), rid="third").hits == []
    engine.check_idle()


def test_a_crash_while_loading_never_blocks_the_forward_pass(start: Start) -> None:
    engine = start()
    engine.serve(prompt(11, 3 * PAGE + 5), [3, 9, 4])
    request = engine.arrive(prompt(11, 3 * PAGE + 5), rid="again")

    def broken(*_: object) -> None:
        raise ZeroDivisionError("injected")

    engine.cache.worker.copier.backend.execute = broken
    assert not engine.load(request, [20, 21, 22])
    engine.check_idle()


def test_a_cancelled_load_leaves_no_trace(start: Start) -> None:
    engine = start()
    engine.serve(prompt(12, 3 * PAGE + 5), [3, 9, 4])
    request = engine.arrive(prompt(12, 3 * PAGE + 5), rid="again")
    assert engine.linker.load("again", [transfer(request.tail, [20, 21, 22])])
    assert engine.linker.cancel_queued_load("again")
    assert not engine.linker.cancel_queued_load("again")
    assert engine.linker.start_layer_wise_loading() == -1
    engine.check_idle()
    assert engine.arrive(prompt(12, 3 * PAGE + 5), rid="third").hits == [1, 2, 3]


def test_a_reset_keeps_chunks_and_drops_results(start: Start) -> None:
    engine = start()
    request = engine.arrive(prompt(13, 3 * PAGE + 5))
    assert engine.linker.offload([transfer(request.hashes, [3, 9, 4])])
    engine.linker.reset()
    assert engine.linker.num_completed_offloads() == 0
    assert engine.arrive(prompt(13, 3 * PAGE + 5), rid="again").hits == [1, 2, 3]


class Watched(ThreadRuntime):
    """A device's streams, in threads, and who told them that it is a thread of lmc's."""

    def __init__(self) -> None:
        super().__init__()
        self.own: list[str] = []

    def own_thread(self) -> None:
        self.own.append(threading.current_thread().name)


def test_a_reset_waits_for_stores_that_a_device_is_still_copying(start: Start) -> None:
    """SGLang frees every page then: the next request's pass would be in the slot."""
    engine = start()
    worker, runtime, gate = engine.cache.worker, Watched(), threading.Event()

    class Slow(HostBackend):
        def execute(self, descriptors: Descriptors, stream: int = 0) -> None:
            gate.wait(10)
            super().execute(descriptors, stream)

    old, slow = worker.copier, Slow()
    worker.copier = BlockCopier(old.layout, old._slab, slow, TransferStreams(runtime, slow))
    from lmc.cache.connectors.sglang.copies import Copies  # imports SGLang

    engine.linker._copies = Copies(worker, engine.linker.layer_done_counter)
    engine.fill([3, 9, 4], seed=1)
    stored = engine.read([3, 9, 4])
    request = engine.arrive(prompt(13, 3 * PAGE + 5))
    assert engine.linker.offload([transfer(request.hashes, [3, 9, 4])])
    threading.Timer(0.2, gate.set).start()
    engine.linker.reset()
    engine.fill([3, 9, 4], seed=2)
    assert runtime.own and all(name.startswith("lmc-") for name in runtime.own)
    again = engine.arrive(prompt(13, 3 * PAGE + 5), rid="again")
    assert again.hits == [1, 2, 3]
    assert engine.load(again, [20, 7, 11])
    assert equal(engine.read([20, 7, 11]), stored)


def test_a_fault_in_lmc_ends_the_cache_and_not_the_engine(start: Start) -> None:
    engine = start()
    engine.serve(prompt(14, 3 * PAGE + 5), [3, 9, 4])
    other = engine.arrive(prompt(15, PAGE + 5))
    assert engine.linker.offload([transfer(other.hashes, [5])])

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("injected")

    engine.cache.scheduler.directory.lookup = broken
    request = engine.arrive(prompt(14, 3 * PAGE + 5), rid="again")
    assert request.hits == []
    assert engine.cache is None
    assert engine.linker.num_completed_offloads() == 1
    assert not engine.linker.pop_completed_offload()
    assert not engine.linker.offload([transfer(request.hashes, [3, 9, 4])])
    assert not engine.linker.load("again", [transfer(request.tail, [3, 9, 4])])
    assert engine.linker.start_layer_wise_loading() == -1
    engine.linker.reset()


def test_requests_with_more_than_tokens_stay_outside(start: Start) -> None:
    engine = start()
    request = engine.arrive(prompt(20, 3 * PAGE + 5), multimodal_inputs=object())
    assert not engine.linker.offload([transfer(request.hashes, [3, 9, 4])])
    assert engine.linker.lookup(request.rid, [transfer(request.tail)]) == []


@pytest.mark.parametrize(
    ("params", "settings", "reason"),
    [
        ({"is_eagle": True}, {}, "draft"),
        ({"pp_size": 2}, {}, "pipeline"),
        ({}, {"chunk_tokens": 32}, "page-size 32"),
        ({"page_size": 1}, {}, "a chunk of every token; start it with --page-size 64"),
    ],
)
def test_what_cannot_be_cached_is_refused_in_words(
    start: Start, params: dict[str, object], settings: dict[str, object], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        start(params=params, **settings)
    engine = start(params=params, **settings, strict=False)
    assert engine.cache is None
    assert engine.arrive(prompt(21, 40)).hits == []
