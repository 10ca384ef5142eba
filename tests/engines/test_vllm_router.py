"""A plain index that is fed by KV events alone holds what the directory holds: after evictions, clears, resets and new starts.

No engine runs: the scheduler's half is driven with vLLM's own requests, and its worker does all at once.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.distributed.kv_events import EventBatch
from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash

from lmc.cache.keys import ChunkKey
from lmc.cache.tiers.format import stored_bytes
from tests.engines.scenario import prompt
from tests.engines.scheduler_side import DrivenSide

pytestmark = pytest.mark.engine

BLOCK, CHUNK = 16, 32
PLACES = {"host": ("CPU", ""), "disk": ("STORAGE", "disk")}
ROUTER = Path(__file__).parents[2] / "examples" / "prefix_router.py"


def router_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prefix_router", ROUTER)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


router = router_module()


class Starts:
    """One engine after the other over the same disk, and the index of a router that lives on."""

    def __init__(self) -> None:
        self.index = router.Index()
        self.time = 0.0
        self.start({})

    def start(self, stored: dict[ChunkKey, int]) -> None:
        sizes = {"disk.capacity": 9 * stored_bytes(4096)}
        self.driven = DrivenSide(BLOCK, slots=6, chunk_tokens=CHUNK, announces=True, stored={"disk": stored}, **sizes)
        self.number = 0
        self.blocks: dict[ChunkKey, list[Any]] = {}  # of chunks whose tokens this start has seen

    def restart(self) -> None:
        """As after a kill -9: what is on disk stays, and nobody says farewell."""
        directory = self.driven.scheduler.directory
        keys = [key for key in self.known if "disk" in directory.tiers_of(key)]
        self.start({key: stored_bytes(4096) for key in keys})

    @property
    def known(self) -> list[ChunkKey]:
        directory = self.driven.scheduler.directory
        return [directory._places.nodes.key(node) for node in directory._places.nodes]

    def serve(self, tokens: list[int]) -> None:
        driven = self.driven
        request = driven.request(tokens)
        driven.admit(request)
        hashes = [maybe_convert_block_hash(one) for one in request.block_hashes]
        for index, key in enumerate(driven.scheduler.keys_of(request.request_id)):
            self.blocks[key] = hashes[index * CHUNK // BLOCK : (index + 1) * CHUNK // BLOCK]
        driven.side.finish(request)

    def publish(self) -> None:
        """As vLLM's publisher: in a batch with a number, through its wire format."""
        events = self.driven.side.take_events()
        self.time += 1.0
        payload = msgspec.msgpack.encode(EventBatch(ts=self.time, events=events))
        assert self.index.take(self.number, *router.decoded(payload))
        self.number += 1

    def held(self) -> dict[Any, set[tuple[str, str]]]:
        """By the directory."""
        directory = self.driven.scheduler.directory
        places = {key: {PLACES[tier] for tier in directory.tiers_of(key)} for key in self.blocks}
        return {block: places[key] for key, blocks in self.blocks.items() for block in blocks if places[key]}


STEPS = st.lists(
    st.tuples(st.integers(0, 5), st.integers(1, 5), st.sampled_from(["serve"] * 6 + ["clear", "reset", "restart"])),
    max_size=40,
)


@given(STEPS)
@settings(deadline=None, max_examples=60)
def test_an_index_fed_by_events_alone_equals_the_directory(steps: list[tuple[int, int, str]]) -> None:
    starts = Starts()
    served: list[list[int]] = []
    for number, chunks, what in steps:
        if what == "serve":
            served.append([number, *prompt(5, chunks * CHUNK)])
            starts.serve(served[-1])
        elif what == "clear":
            starts.driven.scheduler.directory.clear()
        elif what == "reset":
            starts.driven.side.reset()
        else:
            starts.restart()
            starts.publish()
        starts.driven.drain()
        starts.publish()
        assert starts.index.places == starts.held()
        for tokens in served:
            found = starts.index.held(tokens)
            assert found % CHUNK == 0 and found <= len(tokens)
        if what == "serve":
            keys = list(starts.blocks)
            assert all(
                key in keys for key in starts.known if starts.driven.scheduler.directory.tiers_of(key) == ["host"]
            )


def test_a_batch_that_is_missing_or_of_a_new_start_is_noticed() -> None:
    index = router.Index()
    stored = {
        "type": "BlockStored",
        "block_hashes": [7],
        "parent_block_hash": None,
        "block_size": 2,
        "token_ids": [1, 2],
    }
    assert index.take(0, 1.0, [stored])
    assert index.held([1, 2, 3]) == 2
    assert index.take(0, 1.0, [stored])  # it came before
    assert not index.take(2, 2.0, [])  # 1 is missing
    assert index.held([1, 2, 3]) == 2
    assert index.take(1, 2.0, [])
    assert not index.take(1, 3.0, [stored])  # of a new start, whose first one is missing
    assert index.places == {} and index.next == 0
    assert index.take(0, 2.5, [])


def test_a_salted_block_is_no_block_of_other_prompts() -> None:
    index = router.Index()
    stored = {
        "type": "BlockStored",
        "block_hashes": [7],
        "parent_block_hash": None,
        "block_size": 2,
        "token_ids": [1, 2],
    }
    removed = {"type": "BlockRemoved", "block_hashes": [7], "medium": "GPU"}
    assert index.take(0, 1.0, [stored | {"extra_keys": [("salt",)]}, removed])
    assert index.held([1, 2]) == 0
