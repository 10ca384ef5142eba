"""The linker alone, on a real pool of SGLang's, called as SGLang's wrapper calls it."""

from __future__ import annotations

import time
import warnings
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lmc.cache.keys import KeyChain, root
from lmc.cache.tiers.format import TierScope
from lmc.cache.tiers.redis import RedisTier
from lmc.errors import ConfigError, TierError, TransferError
from tests.engines.scenario import prompt
from tests.engines.test_sglang import damage
from tests.services import redis_server, wait_until

pytestmark = [pytest.mark.engine, pytest.mark.sglang]

PAGE = 16
LAYERS, HEADS, SIZE = 3, 2, 8
CHUNK_BYTES = PAGE * LAYERS * 2 * HEADS * SIZE * 4


@dataclass
class Request:
    """As much of SGLang's request as the linker looks at."""

    rid: str
    origin_input_ids: array[int]
    linker: Any
    device_pages: int = 0
    output_ids: array[int] = field(default_factory=lambda: array("q"))
    extra_key: str | None = None
    cache_salt: str | None = None
    multimodal_inputs: object = None
    input_embeds: object = None
    positional_embed_overrides: object = None
    hits: list[int] = field(default_factory=list)

    @property
    def prefix_len(self) -> int:
        return self.device_pages * PAGE

    @property
    def hashes(self) -> list[str]:
        from sglang.srt.mem_cache.radix_cache import RadixKey
        from sglang.srt.mem_cache.utils import get_storage_hash_str

        full = len(self.origin_input_ids) // PAGE * PAGE
        key = RadixKey(self.origin_input_ids[:full], self.extra_key, cache_salt=self.cache_salt)
        return list(get_storage_hash_str(key, None, page_size=PAGE))

    @property
    def tail(self) -> list[str]:
        """Pages beyond the device hit; the last token is never matched."""
        return self.hashes[self.device_pages : (len(self.origin_input_ids) - 1) // PAGE]

    def init_next_round_input(self, tree_cache: object, cow_mamba: bool) -> None:
        self.hits = self.linker.lookup(self.rid, [transfer(self.tail)]) if self.tail else []


def transfer(hashes: list[str], pages: list[int] | None = None) -> Any:
    import torch
    from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer

    slots = None
    if pages is not None:
        slots = torch.tensor([page * PAGE + offset for page in pages for offset in range(PAGE)], dtype=torch.int64)
    return PoolTransfer(name=PoolName.KV, keys=hashes, device_indices=slots)


class Engine:
    """One SGLang process: a pool and its linker."""

    def __init__(self, settings: dict[str, object], model: str = "one", **params: object) -> None:
        import torch

        from lmc.cache.connectors.sglang import LmcLinker

        defaults = {"host.capacity": "16MiB", "disk.capacity": "64MiB", "metrics.enabled": False, "strict": True}
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
        from sglang.srt.mem_cache.unified_cache.component_type import ComponentType

        self.pool = MHATokenToKVPool(4096, PAGE, torch.float32, HEADS, SIZE, LAYERS, "cpu", False)
        self.linker = LmcLinker(
            SimpleNamespace(
                disaggregation_mode="null",
                dcp_size=1,
                revision=None,
                dtype="float32",
                model_path=model,
                json_model_override_args="{}",
                quantization=None,
            ),
            SimpleNamespace(
                token_to_kv_pool_allocator=SimpleNamespace(get_kvcache=lambda: self.pool),
                page_size=PAGE,
                attn_tp_cache_group=None,
                tp_cache_group=None,
                attn_cp_size=1,
                **{
                    "pp_size": 1,
                    "is_eagle": False,
                    "mtp_draft_device_pools": (),
                    "sidecar_draft_device_pools": (),
                    **params,
                },
            ),
            components={ComponentType.FULL},
            extra_config={"settings": {**defaults, **settings}},
            forward_stream=None,
        )

    @property
    def cache(self) -> Any:
        return self.linker._cache

    def arrive(self, tokens: list[int], rid: str = "", **more: Any) -> Request:
        request = Request(rid or f"r{tokens[0]}-{len(tokens)}", array("q", tokens), self.linker, **more)
        self.linker._hold([request], None)
        return request

    def wait(self, request: Request, seconds: float = 10.0) -> None:
        """Rounds of the scheduler until the request may join a batch; then SGLang matches once more."""
        wait_until(lambda: not self.linker._hold([request], None), "the request is held", seconds)
        request.init_next_round_input(None, False)

    def leave(self) -> None:
        """A round with an empty queue."""
        self.linker._hold([], None)

    def load(self, request: Request, pages: list[int]) -> bool:
        """Admission, forward pass and its end."""
        hashes = request.tail[: len(pages)]
        if not self.linker.load(request.rid, [transfer(hashes, pages)]):
            return False
        index = self.linker.start_layer_wise_loading()
        assert index >= 0
        return bool(self.linker.finish_layer_wise_loading(index))

    def offload(self, request: Request, pages: list[int], first: int = 0) -> bool:
        """Insertion of a node with these pages, and the end of its offload."""
        if not self.linker.offload([transfer(request.hashes[first : first + len(pages)], pages)]):
            return False
        wait_until(lambda: self.linker.num_completed_offloads() > 0, "the offload ends")
        return bool(self.linker.pop_completed_offload())

    def serve(self, tokens: list[int], pages: list[int]) -> Request:
        """A prompt that is computed and inserted."""
        request = self.arrive(tokens)
        self.leave()
        assert self.offload(request, pages)
        return request

    def fill(self, pages: list[int], seed: int) -> None:
        import torch

        torch.manual_seed(seed)
        for buffer in (*self.pool.k_buffer, *self.pool.v_buffer):
            for page in pages:
                buffer[page * PAGE : (page + 1) * PAGE] = torch.randn(PAGE, HEADS, SIZE)

    def read(self, pages: list[int]) -> Any:
        import torch

        buffers = (*self.pool.k_buffer, *self.pool.v_buffer)
        return torch.stack([buffer[page * PAGE : (page + 1) * PAGE] for buffer in buffers for page in pages])

    def settle(self) -> None:
        assert self.cache.settle()

    def check_idle(self) -> None:
        """Nothing is pinned, open or remembered."""
        self.leave()
        self.settle()
        directory = self.cache.engine.directory
        directory.check()
        assert (directory.num_open, directory.num_pins, self.linker._prompts, self.cache.engine._requests) == (
            0,
            0,
            {},
            {},
        )


Start = Callable[..., Engine]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SGLang warns about what a CPU lacks while it is imported
        from lmc.cache.connectors.sglang import linker

    monkeypatch.setattr(linker, "watch_queue", lambda hold: None)  # there is no scheduler here
    engines: list[Engine] = []

    def one(model: str = "one", params: dict[str, object] | None = None, **settings: object) -> Engine:
        engines.append(
            Engine({key.replace("__", "."): value for key, value in settings.items()}, model, **params or {})
        )
        return engines[-1]

    yield one
    for engine in engines:
        engine.linker.close()


def equal(one: Any, other: Any) -> bool:
    import torch

    return bool(torch.equal(one, other))


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
    slots = engine.cache.engine.directory.usage()["host"][1]
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


def test_a_fault_in_lmc_ends_the_cache_and_not_the_engine(start: Start) -> None:
    engine = start()
    engine.serve(prompt(14, 3 * PAGE + 5), [3, 9, 4])
    other = engine.arrive(prompt(15, PAGE + 5))
    assert engine.linker.offload([transfer(other.hashes, [5])])

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("injected")

    engine.cache.engine.directory.lookup = broken
    request = engine.arrive(prompt(14, 3 * PAGE + 5), rid="again")
    assert request.hits == []
    assert engine.cache is None
    assert engine.linker.num_completed_offloads() == 1
    assert not engine.linker.pop_completed_offload()
    assert not engine.linker.offload([transfer(request.hashes, [3, 9, 4])])
    assert not engine.linker.load("again", [transfer(request.tail, [3, 9, 4])])
    assert engine.linker.start_layer_wise_loading() == -1
    engine.linker.reset()


def test_a_request_is_held_while_its_chunks_come_from_disk(start: Start, disk: Path) -> None:
    first = start(disk__path=str(disk))
    first.fill([3, 9, 4], seed=16)
    first.serve(prompt(16, 3 * PAGE + 5), [3, 9, 4])
    first.settle()
    second = start(disk__path=str(disk))
    request = second.arrive(prompt(16, 3 * PAGE + 5))
    assert request.hits == []  # nothing is promised yet
    second.wait(request)
    assert request.hits == [1, 2, 3]
    assert second.load(request, [20, 21, 22])
    assert equal(second.read([20, 21, 22]), first.read([3, 9, 4]))
    second.check_idle()


def test_a_damaged_file_is_never_promised(start: Start, disk: Path) -> None:
    first = start(disk__path=str(disk))
    request = first.serve(prompt(17, 3 * PAGE + 5), [3, 9, 4])
    first.settle()
    from lmc.cache.connectors.sglang.prompts import Prompt

    key = Prompt(request, first.cache.engine.namespace, "").keys[1]
    (file,) = [file for file in disk.rglob("*") if file.name == key.hex()]
    file.write_bytes(file.read_bytes()[:-1])
    second = start(disk__path=str(disk))
    again = second.arrive(prompt(17, 3 * PAGE + 5))
    second.wait(again)
    assert again.hits == [1]
    assert second.load(again, [20])


def test_damaged_files_are_replaced_as_they_are_found(start: Start, disk: Path) -> None:
    """What is on disk counts as good until it is read; the requests that run into it put good copies in its place."""
    first = start(disk__path=str(disk))
    pages = list(range(3, 13))
    request = first.serve(prompt(24, 10 * PAGE + 5), pages)
    first.settle()
    from lmc.cache.connectors.sglang.prompts import Prompt

    keys = Prompt(request, first.cache.engine.namespace, "").keys
    files = {file.name: file for file in disk.rglob("*")}
    damage([files[key.hex()] for key in keys[2:]])
    second = start(disk__path=str(disk))
    found = []
    for number in range(4):
        again = second.arrive(prompt(24, 10 * PAGE + 5), rid=f"try {number}")
        second.wait(again)
        found.append(len(again.hits))
        assert second.load(again, pages[: found[-1]])
        assert second.offload(again, pages)  # SGLang inserts what was loaded and what was computed
        second.settle()
    assert found[:2] == [2, 5]  # pages 2, 5 and 8 have flipped bits; a scan sees the short and the missing files
    assert found == sorted(found)
    assert found[-1] == 10


def test_a_tier_that_hangs_holds_a_request_no_longer_than_the_deadline(start: Start, disk: Path) -> None:
    first = start(disk__path=str(disk))
    first.serve(prompt(18, 3 * PAGE + 5), [3, 9, 4])
    first.settle()
    second = start(disk__path=str(disk), load_deadline=0.5)
    go: list[bool] = []

    def stuck(*_: object) -> None:
        wait_until(lambda: bool(go), "the test lets go")
        raise TierError("disk tier: injected")

    second.cache.worker._tiers["disk"].get = stuck
    started = time.monotonic()
    request = second.arrive(prompt(18, 3 * PAGE + 5))
    second.wait(request)
    assert 0.4 < time.monotonic() - started < 5
    assert request.hits == []
    go.append(True)
    second.check_idle()


def test_the_tokens_decide_and_so_do_model_salt_and_adapter(start: Start, disk: Path) -> None:
    one = start(disk__path=str(disk))
    tokens = prompt(19, 3 * PAGE + 5)
    one.serve(tokens, [3, 9, 4])
    one.settle()
    assert one.arrive(tokens, rid="salt", cache_salt="s").hits == []
    assert one.arrive(tokens, rid="adapter", extra_key="lora").hits == []
    assert one.arrive([tokens[0] + 1, *tokens[1:]], rid="token").hits == []
    other = start(disk__path=str(disk), model="two")
    request = other.arrive(tokens)
    other.wait(request)
    assert request.hits == []


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


@pytest.mark.service
def test_instances_share_through_redis_and_a_dead_redis_breaks_no_promise(start: Start, tmp_path: Path) -> None:
    with redis_server(tmp_path) as server:
        one, two = start(redis__url=server.url), start(redis__url=server.url)
        one.fill([3, 9, 4], seed=22)
        one.serve(prompt(22, 3 * PAGE + 5), [3, 9, 4])
        one.settle()
        request = two.arrive(prompt(22, 3 * PAGE + 5))
        two.wait(request)
        assert request.hits == [1, 2, 3]
        server.kill()
        assert two.load(request, [20, 21, 22])
        assert equal(two.read([20, 21, 22]), one.read([3, 9, 4]))
        later = two.arrive(prompt(23, 3 * PAGE + 5))
        two.wait(later)
        assert later.hits == []


@pytest.mark.service
def test_vllm_on_the_same_redis_is_another_world(start: Start, tmp_path: Path) -> None:
    """Same model, dtype, page and tokens: the engines' pages differ inside, so their chunks must never meet."""
    with redis_server(tmp_path) as server, server.client() as client:
        engine = start(redis__url=server.url)
        tokens = prompt(25, 3 * PAGE + 5)
        ours = engine.cache.engine.namespace
        theirs = replace(ours, engine="vllm")
        config = engine.cache.engine.config
        tier = RedisTier(config.redis, TierScope(theirs.label(), 0, ours.layout, CHUNK_BYTES))
        for key in KeyChain(root(theirs), PAGE).extend(tokens):
            tier.put(key, memoryview(bytes(CHUNK_BYTES)))
        tier.close()
        before = set(client.keys())
        assert len(before) == 3
        request = engine.arrive(tokens)
        engine.wait(request)
        assert request.hits == []
        engine.leave()
        assert engine.offload(request, [3, 9, 4])
        engine.settle()
        after = set(client.keys())
        assert before < after and len(after) == 6
