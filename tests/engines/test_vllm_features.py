"""What vLLM's requests carry beside tokens, on the real engine: adapters, embeddings, priorities; and the KV events that routers read.

One engine with all of it, blocks of 96 tokens, chunks of two blocks, its own prefix cache on. The reference of a request is the same
request past both caches.
"""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import zmq
from safetensors.torch import save_file
from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KVEventBatch

from tests.engines.scenario import assert_same, driver, prompt, wish
from tests.engines.vllm_driver import VllmDriver

pytestmark = pytest.mark.engine

BLOCK, CHUNK, CONTEXT = 96, 192, 1000
PAST_LMC = {"kv_transfer_params": {"lmc": {"bypass": True}}}


def make_adapter(folder: Path, seed: int) -> Path:
    """A LoRA adapter of the tiny Llama that changes every key and value."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(4):
        for name, size in (("k_proj", 128), ("v_proj", 128)):
            where = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{where}.lora_A.weight"] = torch.randn(8, 256, generator=generator) * 0.1
            weights[f"{where}.lora_B.weight"] = torch.randn(size, 8, generator=generator) * 0.1
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["k_proj", "v_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


class Events:
    """What the engine published: which block hashes are where, as a router would keep them."""

    def __init__(self, port: int) -> None:
        self._socket = zmq.Context.instance().socket(zmq.SUB)
        self._socket.setsockopt(zmq.SUBSCRIBE, b"")
        self._socket.connect(f"tcp://127.0.0.1:{port}")
        self._decoder = msgspec.msgpack.Decoder(KVEventBatch)
        self.held: dict[tuple[str, str | None], dict[Any, BlockStored]] = {}

    def read(self) -> None:
        """Until nothing has come for a second."""
        while self._socket.poll(1000):
            for event in self._decoder.decode(self._socket.recv_multipart()[-1]).events:
                if isinstance(event, BlockStored):
                    place = self.held.setdefault((event.medium or "", event.ownership), {})
                    for one in event.block_hashes:
                        assert event.medium == "GPU" or one not in place, "stored twice"
                        place[one] = event
                elif isinstance(event, BlockRemoved):
                    for one in event.block_hashes:
                        del self.held[event.medium or "", event.ownership][one]
                elif isinstance(event, AllBlocksCleared):  # vLLM's own cache was reset
                    self.held.pop(("GPU", None), None)

    def close(self) -> None:
        self._socket.close(0)


@pytest.fixture(scope="module")
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture(scope="module")
def engine(tiny_llama: Path, port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmDriver]:
    chunk_bytes = CHUNK * 4 * 2 * 4 * 32 * 4  # layers, K and V, heads, head size, bytes
    settings = {
        "chunk_tokens": CHUNK,
        "host.capacity": 12 * chunk_bytes,
        "disk.path": str(tmp_path_factory.mktemp("features")),
        "disk.capacity": 20 * (chunk_bytes + 4096),
    }
    options = {
        "block_size": BLOCK,
        "max_model_len": CONTEXT,
        "enable_prefix_caching": True,
        "enable_lora": True,
        "max_loras": 3,
        "max_lora_rank": 8,
        "enable_prompt_embeds": True,
        "kv_events_config": {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": f"tcp://*:{port}"},
    }
    with driver(tiny_llama, options=options, **settings) as started:
        yield started


@pytest.fixture(scope="module")
def events(engine: VllmDriver, port: int) -> Iterator[Events]:
    found = Events(port)
    yield found
    found.close()


_salts = iter(range(1_000_000))


def past_both(engine: VllmDriver, text: list[int], **parameters: Any) -> list[dict[str, Any]]:
    """The reference: everything is computed."""
    got = engine.generate([text], extra_args=PAST_LMC, cache_salts=[f"reference {next(_salts)}"], **parameters)
    assert got[0]["cached"] == 0
    return got


def test_events_say_which_blocks_can_be_loaded(engine: VllmDriver, events: Events) -> None:
    events.read()
    texts = [prompt(100 + number, 450) for number in range(8)]
    for text in texts:
        engine.generate([text])
        engine.call("settle")
    engine.generate([texts[-1][:100]])  # a step, which publishes what has ended
    events.read()
    usage = engine.call("state")["usage"]
    host, disk = events.held["CPU", None], events.held["STORAGE", "disk"]
    assert (len(host), len(disk)) == (2 * usage["host"][0], 2 * usage["disk"][0]) == (24, 32)
    device = events.held["GPU", None]
    for text in texts[-3:]:
        for start in (0, CHUNK):
            stored = next(one for one in host.values() if list(one.token_ids) == text[start : start + CHUNK])
            assert stored.block_size == BLOCK and stored.block_hashes[0] in device  # the hashes are vLLM's own
            assert (stored.parent_block_hash is None) == (start == 0)
            assert start == 0 or stored.parent_block_hash in host
    engine.call("reset")
    engine.generate([texts[-1][:100]])
    events.read()
    assert len(events.held["CPU", None]) == len(events.held["STORAGE", "disk"]) == 0


def test_a_chunk_of_which_the_device_holds_a_part_is_loaded_around_it(engine: VllmDriver) -> None:
    text = prompt(1, 500)
    reference = past_both(engine, text)
    engine.generate([text])
    engine.call("reset_device")
    assert engine.generate([text[: BLOCK + 5]])[0]["cached"] == 0  # a chunk is longer
    ask = wish(explain=True)
    got = engine.generate([text], extra_args=ask)
    assert got[0]["explanation"]["lmc"]["hit_tokens"] == {"device": BLOCK, "host": 2 * CHUNK - BLOCK}
    assert_same(got, reference)
    assert engine.generate([text])[0]["cached"] == 480  # now the device holds everything
    assert_same(engine.generate([text]), reference)


def test_adapters_share_nothing_and_each_loads_its_own(engine: VllmDriver, tmp_path: Path) -> None:
    text = prompt(2, 500)
    folders = [make_adapter(tmp_path / "one", 1), make_adapter(tmp_path / "two", 2)]
    adapters = [None, ["one", 1, str(folders[0])], ["two", 2, str(folders[1])]]
    references = [past_both(engine, text, adapters=[adapter]) for adapter in adapters]
    assert len({str(reference[0]["logprobs"]) for reference in references}) == 3  # they do change the output
    for adapter, reference in zip(adapters, references, strict=True):
        cold = engine.generate([text], adapters=[adapter])
        assert cold[0]["cached"] == 0
        assert_same(cold, reference)
    engine.call("reset_device")
    for adapter, reference in zip(adapters, references, strict=True):
        warm = engine.generate([text], adapters=[adapter])
        assert warm[0]["cached"] == 2 * CHUNK
        assert_same(warm, reference)


def test_an_adapter_is_known_by_its_weights(engine: VllmDriver, tmp_path: Path) -> None:
    """The same adapter elsewhere is the same; another one at the same place is not."""
    text = prompt(3, 500)
    here = make_adapter(tmp_path / "here", 3)
    engine.call("add_adapter", adapter=["here", 11, str(here)])
    engine.generate([text], adapters=[["here", 11, str(here)]])
    engine.call("reset_device")
    there = shutil.copytree(here, tmp_path / "there")
    engine.call("add_adapter", adapter=["there", 12, str(there)])
    assert engine.generate([text], adapters=[["there", 12, str(there)]])[0]["cached"] == 2 * CHUNK
    shutil.rmtree(here)
    make_adapter(here, 4)
    changed = ["here", 13, str(here)]
    engine.call("reset_device")  # which knows adapters by name
    engine.call("add_adapter", adapter=changed)
    got = engine.generate([text], adapters=[changed])
    assert got[0]["cached"] == 0
    assert_same(got, past_both(engine, text, adapters=[changed]))


def test_what_the_engine_has_loaded_of_an_adapter_counts_and_not_its_files(engine: VllmDriver, tmp_path: Path) -> None:
    """Its files are replaced between loading and the first request: what is stored must not be the new adapter's."""
    text = prompt(5, 500)
    loaded = ["swapped", 21, str(make_adapter(tmp_path / "swapped", 5))]
    engine.call("add_adapter", adapter=loaded)
    shutil.rmtree(tmp_path / "swapped")
    make_adapter(tmp_path / "swapped", 6)
    engine.generate([text], adapters=[loaded])
    engine.call("reset_device")
    assert engine.generate([text], adapters=[loaded])[0]["cached"] == 2 * CHUNK
    other = ["new", 22, str(tmp_path / "swapped")]
    engine.call("add_adapter", adapter=other)
    engine.call("reset_device")
    got = engine.generate([text], adapters=[other])
    assert got[0]["cached"] == 0
    assert_same(got, past_both(engine, text, adapters=[other]))


def test_an_adapter_that_the_engine_has_yet_to_load_is_not_cached_at_first(engine: VllmDriver, tmp_path: Path) -> None:
    """Nobody can say before that what it will be."""
    text = prompt(6, 500)
    late = ["late", 31, str(make_adapter(tmp_path / "late", 7))]
    cached = []
    for _ in range(3):
        engine.call("reset_device")
        cached.append(engine.generate([text], adapters=[late])[0]["cached"])
    assert cached == [0, 0, 2 * CHUNK]


def test_prompts_given_as_embeddings_share_with_their_equals_only(engine: VllmDriver) -> None:
    def embedded(seed: int, **parameters: Any) -> list[dict[str, Any]]:
        return [engine.call("generate_embedded", seed=seed, length=500, parameters=parameters)]

    references = [embedded(seed, extra_args=PAST_LMC) for seed in (1, 2)]
    for seed, reference in zip((1, 2), references, strict=True):
        engine.call("reset_device")
        cold = embedded(seed)
        assert cold[0]["cached"] == 0
        assert_same(cold, reference)
    for seed, reference in zip((1, 2), references, strict=True):
        engine.call("reset_device")
        warm = embedded(seed)
        assert warm[0]["cached"] == 2 * CHUNK
        assert_same(warm, reference)


@pytest.mark.parametrize(("length", "output"), [(CONTEXT - 1, 1), (CONTEXT - 8, 8), (5 * CHUNK, 8), (5 * CHUNK + 1, 8)])
def test_the_longest_requests_of_the_context(engine: VllmDriver, length: int, output: int) -> None:
    text = prompt(length, length)
    reference = past_both(engine, text, max_tokens=output)
    engine.generate([text], max_tokens=output)
    engine.call("reset_device")
    got = engine.generate([text], max_tokens=output)
    assert got[0]["cached"] == (length - 1) // CHUNK * CHUNK
    assert len(got[0]["tokens"]) == output
    assert_same(got, reference)


def test_a_tenant_and_a_salt_differ_from_each_other_and_from_none(engine: VllmDriver) -> None:
    text = prompt(4, 500)
    as_tenant = wish(tenant="a")
    ways: list[dict[str, Any]] = [{}, {"extra_args": as_tenant}, {"cache_salts": ["a"]}]
    ways.append({"extra_args": as_tenant, "cache_salts": ["a"]})
    reference = past_both(engine, text)
    for way in ways:
        engine.call("reset_device")
        got = engine.generate([text], **way)
        assert got[0]["cached"] == 0
        assert_same(got, reference)
    for way in ways:
        engine.call("reset_device")
        got = engine.generate([text], **way)
        assert got[0]["cached"] == 2 * CHUNK
        assert_same(got, reference)


def test_nothing_is_left_over(engine: VllmDriver) -> None:
    assert {name: number for name, number in engine.call("leftovers").items() if number} == {}
