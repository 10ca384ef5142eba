"""Models with windows on the real engine: outputs are those without lmc, log-probabilities too, since tokens alone may hide a missing part.

That the comparison would find one is tested for each KV group: without its bytes it fails. The Gemma has three window groups.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lmc.cache.keys import ChunkKey, KeyChain, Namespace, root
from lmc.cache.parts import leaf_key
from lmc.cache.settings import load_settings
from lmc.probe.model_shape import probe_shape
from lmc.sim.formats import read_trace
from lmc.sim.formats.base import ReadOptions
from lmc.sim.replay_show import replay_settings
from tests.engines.equality import Scenario, run_scenario
from tests.engines.scenario import assert_same, driver, prompt
from tests.engines.tiny_model import make_tiny_gemma, make_tiny_gpt_oss, make_tiny_llama4, make_tiny_mistral
from tests.engines.vllm_driver import VllmDriver

pytestmark = pytest.mark.engine

PAST_LMC = {"kv_transfer_params": {"lmc": {"bypass": True}}}
CHUNK = WINDOW = 64
TEXT, MORE = prompt(1, 500), prompt(2, 150)
SEVERAL = [prompt(60, 400), TEXT, prompt(61, 130), (TEXT + MORE)[:420], prompt(62, 300)]


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_gemma(tmp_path_factory.mktemp("gemma"), window=WINDOW)


def engine_on(model: Path, disk: Path, *, settings: dict[str, Any] | None = None, **options: Any) -> VllmDriver:
    """Prompts take several steps, which end inside windows and chunks."""
    of_lmc = {"disk.path": str(disk), "disk.fsync": False, "checkpoint_tokens": 128, **(settings or {})}
    return driver(model, options={"max_num_batched_tokens": 240, **options}, **of_lmc)


def compared(engine: VllmDriver, *texts: list[int]) -> list[int]:
    """Tokens that each prompt got from the cache, the outputs being those without it. The engine's own cache is empty before and after."""
    reference = engine.generate(list(texts), extra_args=PAST_LMC)
    engine.call("settle")
    engine.call("reset_device")
    got = engine.generate(list(texts))
    assert_same(got, reference)
    assert all(one["cached"] == 0 for one in reference)
    engine.call("settle")
    engine.call("reset_device")
    return [one["cached"] for one in got]


def assert_every_part_counts(engine: VllmDriver, text: list[int], groups: int) -> None:
    """Without the bytes of any one group the outputs are others."""
    reference = engine.generate([text], extra_args=PAST_LMC)
    for group in range(groups):
        engine.call("reset_device")
        engine.call("leave_out", group=group)
        got = engine.generate([text])
        assert got[0]["cached"] > 0
        with pytest.raises(AssertionError):
            assert_same(got, reference)
    engine.call("leave_out", group=None)
    engine.call("reset_device")


def assert_nothing_is_left(engine: VllmDriver) -> None:
    assert {name: number for name, number in engine.call("leftovers").items() if number} == {}


def test_hits_end_where_a_prompt_ended_or_parted_or_at_a_checkpoint(gemma: Path, tmp_path: Path) -> None:
    with engine_on(gemma, tmp_path / "disk") as engine:
        assert compared(engine, TEXT) == [0]
        assert compared(engine, TEXT) == [448]
        assert compared(engine, TEXT + MORE) == [448]
        assert compared(engine, TEXT + MORE) == [640]
        # The second of those that share a prefix: to the last checkpoint in it.
        assert compared(engine, TEXT[:300] + prompt(3, 150)) == [256]
        # Where a prompt parts between checkpoints, it leaves one for the next.
        assert compared(engine, TEXT[:230] + prompt(4, 150)) == [128]
        assert engine.call("by_label", name="lmc_misses_total", label="reason")["no checkpoint"] > 0
        assert compared(engine, TEXT[:230] + prompt(5, 150)) == [192]
        assert compared(engine, *SEVERAL) == [0, 448, 0, 384, 0]
        assert compared(engine, *SEVERAL) == [384, 448, 128, 384, 256]
        assert_every_part_counts(engine, TEXT, groups=4)
        reference = engine.generate([TEXT], extra_args=PAST_LMC)
        engine.call("fail_loads", count=1)
        assert_same(engine.generate([TEXT]), reference)
        assert engine.call("metric", name="lmc_failures_total", labels={"operation": "load"}) > 0
        assert compared(engine, TEXT) == [448]
        assert_nothing_is_left(engine)
        namespace = Namespace(**engine.call("namespace"))
    damage_checkpoints(namespace, tmp_path / "disk")
    # Another start, with vLLM's own prefix cache.
    with engine_on(gemma, tmp_path / "disk", enable_prefix_caching=True) as engine:
        assert compared(engine, TEXT) == [448]
        assert engine.call("metric", name="lmc_hit_tokens_total", labels={"tier": "disk"}) > 0
        engine.generate([TEXT[:200]], extra_args=PAST_LMC)  # now the device holds a start itself
        beside = engine.generate([TEXT])
        assert beside[0]["cached"] == 448
        engine.call("reset_device")
        assert_same(beside, engine.generate([TEXT], extra_args=PAST_LMC))
        engine.call("reset_device")
        engine.call("abort_while_loading", prompt=TEXT)
        assert compared(engine, TEXT) == [448]
        # One of its last checkpoint's parts is damaged, and is stored anew. A flipped bit, or a file that was cut, shows when all have been
        # brought up, so there is no hit; of a file that is missing a start learns, and a hit ends at the checkpoint before.
        for text, found in zip(SEVERAL[::2], (0, 0, 128), strict=True):
            assert compared(engine, text) == [found]
            assert compared(engine, text) == [len(text) // CHUNK * CHUNK]
        assert_nothing_is_left(engine)


def damage_checkpoints(namespace: Namespace, disk: Path) -> None:
    """A part of the last checkpoint of each of three prompts: a flipped bit, a file that was cut, no file."""
    for text, group in zip(SEVERAL[::2], (1, 2, 3), strict=True):
        keys: list[ChunkKey] = KeyChain(root(namespace), CHUNK).extend(text)
        (file,) = disk.glob(f"v*/*/r0/??/{leaf_key(keys[-1], group).hex()}")
        content = bytearray(file.read_bytes())
        content[1000] ^= 1
        file.unlink()
        if group != 3:
            file.write_bytes(content[: None if group == 1 else 5000])


def test_windows_beside_attention_sinks(tmp_path: Path) -> None:
    """gpt-oss: as many layers with windows as without, and windows of two chunks."""
    model = make_tiny_gpt_oss(tmp_path / "model", window=128)
    several = [prompt(60, 400), TEXT, prompt(61, 130)]
    with engine_on(model, tmp_path / "disk", enable_prefix_caching=True) as engine:
        assert compared(engine, TEXT) == [0]
        assert compared(engine, TEXT) == [448]
        assert compared(engine, TEXT[:300] + MORE) == [256]
        assert compared(engine, *several) == [0, 448, 0]
        assert compared(engine, *several) == [384, 448, 128]
        assert_every_part_counts(engine, TEXT, groups=2)
        assert_nothing_is_left(engine)


@pytest.mark.parametrize(
    ("make", "groups"),
    [
        (partial(make_tiny_mistral, window=64), 1),
        (partial(make_tiny_llama4, span=128), 4),
        (partial(make_tiny_gemma, window=64, pattern="wffwff"), 3),
    ],
    ids=["only windows", "spans of tokens", "several groups that keep all tokens"],
)
def test_other_kinds_of_layers(tmp_path: Path, make: Callable[[Path], Path], groups: int) -> None:
    """benchmarks.families compares more, and more families. A hit of five chunks ends inside a span."""
    text = prompt(1, 5 * CHUNK + 2)
    with engine_on(make(tmp_path / "model"), tmp_path / "disk", enable_prefix_caching=True) as engine:
        assert compared(engine, text) == [0]
        assert compared(engine, text) == [320]
        assert compared(engine, text[:300] + prompt(3, 50)) == [256]
        assert compared(engine, text) == [320]
        assert_every_part_counts(engine, text, groups=groups)
        engine.generate([text[:200]], extra_args=PAST_LMC)  # now the device holds a start itself
        beside = engine.generate([text])
        assert beside[0]["cached"] == 320
        engine.call("reset_device")
        reference = engine.generate([text], extra_args=PAST_LMC)
        assert_same(beside, reference)
        engine.call("reset_device")
        engine.call("fail_loads", count=1)
        assert_same(engine.generate([text]), reference)
        assert engine.call("metric", name="lmc_failures_total", labels={"operation": "load"}) > 0
        assert_nothing_is_left(engine)


def test_the_simulator_says_to_the_token_what_the_engine_hits(gemma: Path, tmp_path: Path) -> None:
    """Requests come one at a time, and host memory holds a part of what they store."""
    shape = probe_shape(gemma, block_tokens=32)
    slots, record = 50, tmp_path / "record.jsonl"
    flags = {
        "chunk_tokens": CHUNK,
        "checkpoint_tokens": 192,
        "host.capacity": slots * CHUNK // 32 * max(shape.block_bytes),
    }
    generator = random.Random(7)
    documents = [prompt(100 + number, generator.randrange(150, 500)) for number in range(5)]
    measured = []
    with driver(gemma, options={"max_num_batched_tokens": 1024}, record=str(record), **flags) as engine:
        for number in range(40):
            start = generator.choice(documents)
            text = start[: generator.randrange(70, len(start))] + prompt(200 + number, generator.randrange(1, 130))
            (got,) = engine.generate([text])
            measured.append(got["cached"])
            engine.call("settle")
            engine.call("reset_device")
        assert engine.call("metric", name="lmc_evicted_chunks_total", labels={"tier": "host"}) > 0
        assert engine.call("by_label", name="lmc_misses_total", label="reason")["no checkpoint"] > 0
    trace = read_trace(record, ReadOptions())
    assert trace.shape == shape
    simulated = replay_settings(trace, load_settings(flags=flags).config)
    assert simulated.hit_tokens["host"].tolist() == measured
    assert sum(measured) > 0


WINDOWS = Scenario(
    "windows",
    "vLLM's prefix cache on; a disk whose files rot",
    True,
    1,
    ("disk",),
    {"store_decode": True, "checkpoint_tokens": 128, "load_deadline": 0.5},
)


@pytest.mark.fault
def test_random_traffic_with_aborts_preemptions_and_faults(gemma: Path, tmp_path: Path) -> None:
    generator = random.Random(1)
    documents = [prompt(100 + number, generator.randrange(150, 400)) for number in range(6)]
    requests = []
    for number in range(60):
        start = generator.choice(documents)
        text = start[: generator.randrange(80, len(start))] + prompt(200 + number, generator.randrange(1, 100))
        requests.append({"id": f"r{number}", "prompt": text, "output": generator.randrange(8, 48)})
    with VllmDriver(gemma, settings=None) as plain:
        wanted = plain.call("traffic", requests=requests, seed=1, concurrency=12, chances={})["outcomes"]
    verdict = run_scenario(
        WINDOWS, gemma, requests, wanted, tmp_path, seed=2, host_chunks=16, disk_chunks=40, blocks=110, context=768
    )
    print(verdict)  # noqa: T201  what a failed run went through
    assert verdict.comparison.differences == []
    assert len(verdict.comparison.ties) < 5
    assert verdict.comparison.requests + verdict.tally["aborted"] == len(requests)
    assert {name: number for name, number in verdict.leftovers.items() if number} == {}
    assert verdict.preemptions > 0 and verdict.tally["aborted"] > 0
    assert verdict.loaded.get("host", 0) > 0 and verdict.loaded.get("disk", 0) > 0
