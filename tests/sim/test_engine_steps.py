"""The engine of a replay: batches, chunked prefill, its own KV space, preemption and decoding, against times added up by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmc.cache.config import CacheConfig
from lmc.cache.tiers.format import stored_bytes
from lmc.errors import ConfigError
from lmc.sim.build import TraceBuilder
from lmc.sim.cost import CostModel, Prefill, TierCost
from lmc.sim.cost_file import read_cost_model
from lmc.sim.device_cache import DeviceCache, Holding
from lmc.sim.engine_model import Decode, EngineModel
from lmc.sim.full_replay import Fleet, ReplayResult, replay_fleet
from lmc.sim.trace import Trace
from tests.sim.chained_traces import BLOCK_TOKENS, traces
from tests.sim.test_full_replay import full_chunks

CHUNK_BYTES = 10
HOST = TierCost("host", 20.0)  # half a second a chunk
FAST = TierCost("host", 1e12)


def model(host: TierCost = HOST, **engine: Any) -> CostModel:
    """A second a token."""
    return CostModel(Prefill(0.0, 1.0, 0.0), 1, {"host": host}, engine=EngineModel(**engine))


def requests(*rows: tuple[float, list[int], int]) -> Trace:
    """(arrival, chunks, output tokens); a prompt ends one token after its last chunk."""
    builder = TraceBuilder("made", "test", BLOCK_TOKENS)
    for number, (t, chain, output) in enumerate(rows):
        builder.add(number + 1, chain, t, len(chain) * BLOCK_TOKENS + 1, output)
    return builder.finish()


def replayed(trace: Trace, cost: CostModel | None, host: int = 1000, **more: Any) -> ReplayResult:
    config = CacheConfig.model_validate({"host": {"capacity": host * CHUNK_BYTES}, **more})
    return replay_fleet(trace, config, CHUNK_BYTES, Fleet(cost=cost))


@pytest.mark.parametrize("bursts", [(200, 8), (8, 6)])
def test_a_burst_hits_what_its_first_request_stored(bursts: tuple[int, int]) -> None:
    """Looked up at their arrival, the others of a burst once missed, all of them."""
    count, size = bursts
    rows = [(100.0 * burst, [burst * 100 + n for n in range(4)], 0) for burst in range(count) for _ in range(size)]
    trace = requests(*rows)
    cost = CostModel(Prefill(0.01, 0.02, 0.0), 1, {"host": HOST})
    timed, instant = replayed(trace, cost), replayed(trace, None)
    assert timed.hits("all") == instant.hits("all")
    assert timed.hits("all")["host"] == count * (size - 1) * 4 * BLOCK_TOKENS


def test_a_step_takes_in_what_fits_and_cuts_the_last_prompt() -> None:
    trace = requests((0.0, [1], 0), (0.0, [2], 0), (1.0, [3], 0))  # five tokens each
    whole = replayed(trace, model(FAST, max_num_seqs=2, background_copies=True))
    assert whole.ttft_s == pytest.approx([5.0, 15.0, 14.0])  # the first was alone in its step
    cut = replayed(trace, model(FAST, max_num_seqs=3, max_num_batched_tokens=4))
    # Steps of four tokens: [1: 4], then [1: 1, 2: 3], [2: 2, 3: 2], [3: 3].
    assert cut.ttft_s == pytest.approx([8.0, 12.0, 14.0])
    alone = replayed(trace, model(FAST, max_num_seqs=3, max_num_batched_tokens=7, chunked_prefill=False))
    assert alone.ttft_s == pytest.approx([5.0, 10.0, 14.0])  # two of them do not fit into one step


def test_tokens_that_come_out_delay_those_behind_them() -> None:
    trace = requests((0.0, [1], 3), (1.0, [2], 1))
    decode = Decode(fixed_s=10.0, sequence_s=1.0, context_s=0.5)
    result = replayed(trace, model(FAST, max_num_seqs=2, decode=decode))
    # Prompt 1 until 5; prompt 2 with the second token of 1: 5 + max(0, 10) + 1 + 0.5 * 6.
    assert result.ttft_s == pytest.approx([5.0, 5.0 + 5.0 + 10.0 + 1.0 + 3.0 - 1.0])
    assert replayed(trace, model(FAST, max_num_seqs=2)).ttft_s == pytest.approx([5.0, 9.0])


def test_the_engines_own_prefixes_are_device_hits() -> None:
    trace = requests((0.0, [1, 2], 0), (50.0, [1, 2], 0), (100.0, [3, 4], 0), (150.0, [1, 5], 0))
    result = replayed(trace, model(kv_tokens=3 * BLOCK_TOKENS))
    assert result.hit_tokens["device"].tolist() == [0, 8, 0, 0]  # 3 and 4 took the place of 2 and 1
    assert result.hit_tokens["host"].tolist() == [0, 0, 0, 4]
    assert result.ttft_s[1] == pytest.approx(1.0) and result.ttft_s[3] == pytest.approx(0.5 + 5.0)
    none = replayed(trace, model(kv_tokens=3 * BLOCK_TOKENS, prefix_cache=False))
    assert "device" not in none.hit_tokens and none.hit_tokens["host"].tolist() == [0, 8, 0, 4]


def test_a_full_kv_space_makes_requests_wait_or_preempts_the_last() -> None:
    trace = requests((0.0, [1], 9), (0.0, [2], 9))
    decode = Decode(fixed_s=1.0)
    roomy = replayed(trace, model(FAST, max_num_seqs=2, kv_tokens=100, decode=decode))
    tight = replayed(trace, model(FAST, max_num_seqs=2, kv_tokens=5 * BLOCK_TOKENS, decode=decode))
    assert roomy.counts["preempted"] == 0 and tight.counts["preempted"] >= 1
    assert tight.ttft_s.tolist() == roomy.ttft_s.tolist()  # what came out stays out
    waits = replayed(trace, model(FAST, max_num_seqs=2, kv_tokens=4 * BLOCK_TOKENS, prefix_cache=False, decode=decode))
    assert waits.ttft_s[1] >= roomy.ttft_s[1]
    with pytest.raises(ConfigError, match="do not hold request 0"):
        replayed(trace, model(kv_tokens=4))


@settings(max_examples=150, deadline=None)
@given(
    traces(),
    st.integers(1, 5),
    st.sampled_from([None, 1, 3, 16]),
    st.booleans(),
    st.sampled_from([None, 0, 1, 7]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 9),
    st.integers(1, 12),
)
def test_every_request_ends_and_hits_no_more_than_there_is(
    trace: Trace,
    seqs: int,
    batched: int | None,
    chunked: bool,
    spare: int | None,
    beside: bool,
    decodes: bool,
    output: int,
    host: int,
) -> None:
    trace = full_chunks(trace)
    trace = replace(trace, output_tokens=np.full(trace.num_requests, output))
    if not chunked and batched is not None:
        batched = max(batched, int(trace.input_tokens.max()) + output)
    kv = None if spare is None else int(trace.input_tokens.max()) + output + BLOCK_TOKENS * (spare + 1)
    engine = EngineModel(seqs, batched, chunked, kv, True, beside, Decode(0.1, 0.1, 0.0) if decodes else None)
    cost = CostModel(Prefill(0.1, 0.2, 0.0), 1, {"host": HOST, "disk": TierCost("disk", 5.0, 1.0)}, engine=engine)
    disk = {"disk": {"path": "/nowhere", "capacity": 20 * stored_bytes(CHUNK_BYTES)}}
    result = replayed(trace, cost, host, write="back", **disk)
    assert (result.ttft_s > 0).all()
    hits = sum(result.hit_tokens.values())
    assert (hits < trace.input_tokens).all() and (hits % BLOCK_TOKENS == 0).all()


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 8), st.data())
def test_the_kv_space_is_never_overfull_and_finds_what_it_kept(capacity: int, data: st.DataObject) -> None:
    device = DeviceCache(capacity, keeps_prefixes=True)
    holdings: list[tuple[Holding, list[bytes]]] = []
    for _ in range(data.draw(st.integers(1, 20))):
        if holdings and data.draw(st.booleans()):
            holding, keys = holdings.pop(data.draw(st.integers(0, len(holdings) - 1)))
            device.free(holding)
            assert device.match(keys[:1]) in (0, 1)
            continue
        chat = data.draw(st.integers(0, 2))
        keys = [bytes([chat, index]) for index in range(data.draw(st.integers(1, 5)))]
        found = device.match(keys)
        taken = device.take(keys[:found], len(keys) - found)
        held = sum(one.slots for one, _ in holdings)
        if taken is None:
            assert held + len(keys) > capacity - 0
            continue
        device.name(taken, keys)
        assert taken.slots == len(keys)
        assert device.match(keys) == len(keys) or len(taken.named) < len(keys)
        holdings.append((taken, keys))
        distinct = {key for one, _ in holdings for key in one.named}
        assert len(distinct) + sum(one.others for one, _ in holdings) <= capacity
        assert len(device._holders) + device._others + len(device._idle) <= capacity
    for holding, _ in holdings:
        device.free(holding)
    assert not device._holders and device._others == 0


def test_a_cost_file_describes_the_engine(tmp_path: Path) -> None:
    path = tmp_path / "cost.yaml"
    path.write_text(
        "prefill: {token: 1ms}\ntiers: {host: {bandwidth: 1GB/s}}\n"
        "engine: {max_num_seqs: 16, max_num_batched_tokens: 2k, kv_tokens: 100k, prefix_cache: false,\n"
        "  background_copies: true, decode: {fixed: 20ms, sequence: 1ms, context: 1us}}\n"
    )
    expected = EngineModel(16, 2000, True, 100_000, False, True, Decode(0.02, 1e-3, 1e-6))
    assert read_cost_model(path).engine == expected
    for engine, message in (
        ("{max_seqs: 3}", "unknown key 'max_seqs' in engine"),
        ("{max_num_seqs: 0}", "max_num_seqs"),
        ("{prefix_cache: 1}", "true or false"),
        ("{decode: {tokens: 1ms}}", "unknown key 'tokens'"),
    ):
        path.write_text(f"prefill: {{token: 1ms}}\nengine: {engine}\n")
        with pytest.raises(ConfigError, match=message):
            read_cost_model(path)
