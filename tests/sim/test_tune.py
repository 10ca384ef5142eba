from __future__ import annotations

import json
import random
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmc.cache.config import CacheConfig
from lmc.cache.settings import load_settings
from lmc.cache.tiers.format import stored_bytes
from lmc.errors import ConfigError
from lmc.sim import tune_show
from lmc.sim.build import TraceBuilder
from lmc.sim.cost import CostModel, Prefill, TierCost, known_token_bytes
from lmc.sim.full_replay import Fleet, replay_fleet
from lmc.sim.trace import Trace, coarsen
from lmc.sim.tune import ASSUMED_TOKEN_BYTES, Tuned, make_budget, tune
from lmc.sim.tune_search import Budget
from tests.sim.chained_traces import naive_lru, tokens_of

TOKEN_BYTES = 100
BLOCK = 16
CHUNK_BYTES = BLOCK * TOKEN_BYTES
FILE_BYTES = stored_bytes(CHUNK_BYTES)
FEW = ("lru", "fifo", "sieve")


def chats(num_requests: int = 400, num_chats: int = 30, seed: int = 5) -> Trace:
    """Chats that grow by three blocks a turn, each turn from a random chat, two seconds apart."""
    generator = random.Random(seed)
    builder = TraceBuilder("chats", "test", BLOCK)
    chains: dict[int, list[int]] = {}
    fresh = 1
    for number in range(num_requests):
        chat = generator.randrange(num_chats)
        chain = chains.setdefault(chat, [0])
        if len(chain) > 30:
            chain = chains[chat] = [0]
        chain += range(fresh, fresh + 3)
        fresh += 3
        builder.add(number + 1, chain, 2.0 * number, len(chain) * BLOCK + 5, 1, session=str(chat))
    return builder.finish()


@pytest.fixture(scope="module")
def trace() -> Trace:
    return chats()


def test_rates_are_those_of_a_naive_simulator(trace: Trace) -> None:
    found = tune(trace, TOKEN_BYTES, Budget(200 * CHUNK_BYTES, 400 * FILE_BYTES), ("lru",))
    quarter, half = trace.num_requests // 4, trace.num_requests // 2
    for point in found.tried:
        if point.ttl_s is not None or point.write != "through":
            continue
        chunked = coarsen(trace, point.chunk_tokens)
        size = point.chunk_tokens * TOKEN_BYTES
        tokens = []
        in_host, on_disk = point.host_bytes // size, point.disk_bytes // stored_bytes(size)
        for slots in (in_host, max(in_host, on_disk)):
            hits = naive_lru(chunked, slots)
            tokens.append([tokens_of(chunked, request, found) for request, found in enumerate(hits)])
        host, both = tokens
        inputs = trace.input_tokens
        assert point.tuning_host_rate == pytest.approx(sum(host[quarter:half]) / inputs[quarter:half].sum())
        assert point.tuning_hit_rate == pytest.approx(sum(both[quarter:half]) / inputs[quarter:half].sum())
        assert point.hit_rate == pytest.approx(sum(both[half:]) / inputs[half:].sum())


def test_the_choice_is_within_the_budget_and_on_the_front(trace: Trace) -> None:
    budget = Budget(150 * CHUNK_BYTES, 300 * FILE_BYTES)
    found = tune(trace, TOKEN_BYTES, budget, FEW)
    chosen = found.chosen
    assert chosen.host_bytes <= budget.host_bytes and chosen.disk_bytes <= budget.disk_bytes
    assert (chosen.host_bytes, chosen.disk_bytes) in {(point.host_bytes, point.disk_bytes) for point in found.front}
    assert found.expected.low <= found.expected.value <= found.expected.high <= 1
    assert found.expected.value == pytest.approx(chosen.hit_rate)
    assert found.ceiling >= chosen.hit_rate
    for point in found.front:
        assert not any(
            other.host_bytes <= point.host_bytes
            and other.disk_bytes <= point.disk_bytes
            and other.tuning_hit_rate >= point.tuning_hit_rate
            and other.tuning_host_rate > point.tuning_host_rate
            for other in found.front
        )


def test_the_second_half_has_no_say(trace: Trace) -> None:
    half = trace.num_requests // 2
    keep = int(trace.starts[half])
    other = replace(
        trace,
        ids=np.concatenate([trace.ids[:keep], np.zeros(trace.num_requests - half, dtype=np.int32)]),
        starts=np.concatenate([trace.starts[: half + 1], keep + np.arange(1, trace.num_requests - half + 1)]),
        parents=trace.parents[: int(trace.ids[:keep].max()) + 1],
        input_tokens=np.concatenate([trace.input_tokens[:half], np.full(trace.num_requests - half, BLOCK)]),
    )
    budget = Budget(100 * CHUNK_BYTES, 200 * FILE_BYTES)
    ours, theirs = tune(trace, TOKEN_BYTES, budget, FEW), tune(other, TOKEN_BYTES, budget, FEW)
    names = ("chunk_tokens", "policy", "host_bytes", "disk_bytes", "ttl_s", "tuning_hit_rate")
    assert [getattr(ours.chosen, name) for name in names] == [getattr(theirs.chosen, name) for name in names]
    assert ours.chosen.hit_rate != theirs.chosen.hit_rate


def test_memory_that_does_not_help_is_not_spent() -> None:
    steady = chats(num_requests=800, num_chats=6)
    found = tune(steady, TOKEN_BYTES, Budget(10**12), ("lru",))
    assert found.chosen.host_bytes <= steady.num_unique * CHUNK_BYTES / 2
    assert found.expected.value == pytest.approx(found.ceiling, abs=0.01)


def test_a_workload_that_still_grows_is_said_to(trace: Trace) -> None:
    found = tune(trace, TOKEN_BYTES, Budget(10**12), ("lru",))
    assert any("tune on a longer trace" in note for note in found.notes)


def test_prices_move_the_choice(trace: Trace) -> None:
    def choice(gib_hour: float) -> int:
        prices = {"host": TierCost("host", 1e9, 0.0, gib_hour)}
        model = CostModel(Prefill(0, 1e-3, 0), TOKEN_BYTES, prices, 1.0)
        return tune(trace, TOKEN_BYTES, Budget(300 * CHUNK_BYTES), ("lru",), model).chosen.host_bytes

    assert choice(1e9) < choice(1e-9)


def test_rent_bounds_the_choice(trace: Trace) -> None:
    prices = {"host": TierCost("host", 1e9, 0.0, 1024.0**3)}
    model = CostModel(Prefill(0, 1e-3, 0), TOKEN_BYTES, prices)
    most = 100 * CHUNK_BYTES
    found = tune(trace, TOKEN_BYTES, Budget(300 * CHUNK_BYTES, dollars_per_hour=float(most)), ("lru",), model)
    assert max(point.host_bytes for point in found.front) <= most
    with pytest.raises(ConfigError, match="raise --dollars-per-hour"):
        tune(trace, TOKEN_BYTES, Budget(300 * CHUNK_BYTES, dollars_per_hour=1.0), ("lru",), model)
    with pytest.raises(ConfigError, match="needs prices"):
        make_budget("1GiB", "0", 3.0, None)


def test_bad_budgets_and_short_traces_are_refused(trace: Trace) -> None:
    with pytest.raises(ConfigError, match="raise --memory"):
        tune(trace, TOKEN_BYTES, Budget(CHUNK_BYTES - 1))
    with pytest.raises(ConfigError, match="too few"):
        tune(chats(5), TOKEN_BYTES, Budget(10 * CHUNK_BYTES))


def test_an_unknown_token_size_is_assumed_and_said(trace: Trace) -> None:
    assert known_token_bytes(trace, 0, None) == 0
    assert known_token_bytes(replace(trace, block_bytes=BLOCK * 7), 0, None) == 7
    budget = Budget(100 * BLOCK * ASSUMED_TOKEN_BYTES)
    assumed, given = tune(trace, 0, budget, ("lru",)), tune(trace, ASSUMED_TOKEN_BYTES, budget, ("lru",))
    assert assumed.token_bytes == ASSUMED_TOKEN_BYTES
    assert asdict(assumed.chosen) == asdict(given.chosen)
    assert any("--token-bytes" in note for note in assumed.notes)
    assert not any("--token-bytes" in note for note in given.notes)


def replayed_rate(found: Tuned, settings: dict[str, Any]) -> float:
    """Hits of the second half, by a replay of the settings that tune wrote."""
    chunk = found.chosen.chunk_tokens
    config = CacheConfig.model_validate(settings)
    result = replay_fleet(coarsen(found.trace, chunk), config, chunk * found.token_bytes, Fleet())
    return sum(result.hits("last-half").values()) / result.total_tokens("last-half")


@pytest.mark.parametrize("disk_bytes", [1, CHUNK_BYTES, FILE_BYTES - 1, FILE_BYTES, 3 * FILE_BYTES - 1])
def test_a_disk_holds_whole_files_within_the_budget(disk_bytes: int, tmp_path: Path) -> None:
    """One file more was replayed than the capacity held, and a disk of one chunk without its footer was refused by the live cache."""
    found = tune(
        chats(num_requests=41, num_chats=6, seed=4), TOKEN_BYTES, Budget(3 * CHUNK_BYTES, disk_bytes), ("lru",)
    )
    settings = tune_show.settings_of(found.chosen, tmp_path)
    for point in found.tried:
        assert point.disk_bytes <= disk_bytes
        assert point.disk_bytes % stored_bytes(point.chunk_tokens * TOKEN_BYTES) == 0
    assert ("disk" in settings) == (disk_bytes >= stored_bytes(found.chosen.chunk_tokens * TOKEN_BYTES))
    assert found.expected.value == pytest.approx(replayed_rate(found, settings))


@pytest.mark.parametrize("latency_s", [0.0, 0.1, 0.3])
def test_the_settings_that_are_written_are_those_that_are_judged(
    trace: Trace, latency_s: float, tmp_path: Path
) -> None:
    """Loads that min_load_tokens leaves out do not count as hits."""
    prices = {name: TierCost(name, 1e9, latency_s) for name in ("host", "disk")}
    model = CostModel(Prefill(0, 1e-3, 0), TOKEN_BYTES, prices)
    found = tune(trace, TOKEN_BYTES, Budget(100 * CHUNK_BYTES, 200 * FILE_BYTES), ("lru",), model)
    settings = tune_show.settings_of(found.chosen, tmp_path)
    assert ("min_load_tokens" in settings) == (latency_s > 0) and "disk" in settings
    assert found.expected.value == pytest.approx(replayed_rate(found, settings))
    without = replayed_rate(found, {**settings, "min_load_tokens": 1})
    assert (found.expected.value < without) == (latency_s > 0)
    modes = [point.hit_rate for point in found.tried if point.write != "through"]
    assert found.chosen.write == "through" and max(modes) > without + 0.0005
    assert any(f"write: through gave up {100 * (max(modes) - without):.2f} points" in note for note in found.notes)


def test_the_write_mode_that_hits_most_is_chosen_and_judged_by_replay(tmp_path: Path) -> None:
    """As much host as disk, and together as much as is reused: write through keeps everything twice."""
    many = chats(num_requests=1200, num_chats=40, seed=2)
    token_bytes = 10**5  # so that a footer is next to nothing
    chunk_bytes = BLOCK * token_bytes
    found = tune(many, token_bytes, Budget(500 * chunk_bytes, 500 * stored_bytes(chunk_bytes)), ("lru",))
    assert found.chosen.write == "back"
    through = [
        point
        for point in found.tried
        if (point.host_bytes, point.disk_bytes, point.write)
        == (found.chosen.host_bytes, found.chosen.disk_bytes, "through")
    ]
    assert found.chosen.hit_rate > through[0].hit_rate + 0.02
    settings = tune_show.settings_of(found.chosen, tmp_path)
    assert settings["write"] == "back"
    assert found.expected.value == pytest.approx(replayed_rate(found, settings))
    assert any("killed engine" in note for note in found.notes)


def test_a_short_record_takes_the_whole_budget() -> None:
    """Forty requests once chose 50 MB of host and no disk, ten points under what fits into the budget."""
    short = chats(num_requests=41, num_chats=6, seed=4)
    budget = Budget(1000 * CHUNK_BYTES, 3000 * FILE_BYTES)
    found = tune(short, TOKEN_BYTES, budget, ("lru",))
    size = found.chosen.chunk_tokens * TOKEN_BYTES
    assert found.chosen.host_bytes == budget.host_bytes // size * size
    assert found.chosen.disk_bytes == budget.disk_bytes // stored_bytes(size) * stored_bytes(size)
    assert found.expected.value == pytest.approx(found.ceiling)
    assert any("whole budget" in note for note in found.notes)


def test_what_the_choices_gave_up_is_said(trace: Trace) -> None:
    found = tune(trace, TOKEN_BYTES, Budget(10**12), ("lru",))
    best = max(point.hit_rate for point in found.tried if point.chunk_tokens == found.chosen.chunk_tokens)
    said = [note for note in found.notes if "smaller tiers gave up" in note]
    assert bool(said) == (best > found.chosen.hit_rate + 0.0005)
    assert not said or f"gave up {100 * (best - found.chosen.hit_rate):.2f} points" in said[0]
    assert not any("chunks of" in note for note in found.notes) or found.chosen.chunk_tokens > BLOCK


def test_short_loads_are_left_out_where_they_cost_more_than_they_save(trace: Trace) -> None:
    def least(latency_s: float) -> int:
        host = TierCost("host", 1e9, latency_s)
        model = CostModel(Prefill(0, 1e-3, 0), TOKEN_BYTES, {"host": host, "disk": host})
        return tune(trace, TOKEN_BYTES, Budget(100 * CHUNK_BYTES), ("lru",), model).chosen.min_load_tokens

    assert least(0.0) == 1
    assert 90 <= least(0.1) <= 110  # a load takes as long as the prefill of 100 tokens


def test_settings_are_what_serve_reads(trace: Trace, tmp_path: Path) -> None:
    found = tune(trace, TOKEN_BYTES, Budget(100 * CHUNK_BYTES, 400 * FILE_BYTES), FEW)
    path = tmp_path / "out" / "lmc.yaml"
    tune_show.write_settings(found, path, tmp_path / "disk")
    config = load_settings(path).config
    chosen = found.chosen
    assert (config.chunk_tokens, config.policy, config.ttl) == (chosen.chunk_tokens, chosen.policy, chosen.ttl_s)
    assert config.host.capacity == chosen.host_bytes
    assert config.disk.capacity == chosen.disk_bytes and config.disk.path == tmp_path / "disk"
    assert "# Expected:" in path.read_text()
    result = json.loads(json.dumps(tune_show.tune_json(found, tmp_path)))
    assert result["config"]["policy"] == chosen.policy
    assert result["interval"][0] <= result["expected_hit_rate"] <= result["interval"][1]
    assert len(result["front"]) == len(tune_show.front_table(found).rows)
