"""The connector on the real vLLM engine: outputs unchanged, whatever the cache does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engines.scenario import assert_same, driver, kv_bytes_per_token, prompt, wish
from tests.engines.vllm_driver import VllmDriver

pytestmark = [pytest.mark.engine, pytest.mark.compat]

TEXT = prompt(20, 500)


@pytest.fixture(scope="module", params=[1_000_000, 1], ids=["before the pass", "in the background"])
def cached(request: pytest.FixtureRequest, tiny_llama: Path) -> Iterator[VllmDriver]:
    with driver(tiny_llama, background_load_tokens=request.param) as engine:
        engine.call("watch_bytes")
        yield engine


def test_a_repeated_prompt_is_loaded_and_the_output_is_the_same(plain: VllmDriver, cached: VllmDriver) -> None:
    text = prompt(1, 700)
    reference = plain.generate([text])
    cold = cached.generate([text])
    warm = cached.generate([text])
    assert [cold[0]["cached"], warm[0]["cached"]] == [0, 640]
    assert_same(cold, reference)
    assert_same(warm, reference)
    watched = cached.call("watched")
    assert watched["different_blocks"] == 0
    assert watched["compared_bytes"] == 640 * 4 * 2 * 4 * 32 * 4  # tokens, layers, K and V, heads, head size, bytes


def test_a_shared_prefix_is_loaded_up_to_the_last_common_chunk(plain: VllmDriver, cached: VllmDriver) -> None:
    common = prompt(2, 300)
    first, second = common + prompt(3, 100), common + prompt(4, 100)
    cached.generate([first])
    got = cached.generate([second])
    assert got[0]["cached"] == 256
    assert_same(got, plain.generate([second]))


@pytest.mark.parametrize("length", [64, 128, 192])
def test_the_last_token_is_computed_when_the_prompt_ends_with_a_chunk(
    plain: VllmDriver, cached: VllmDriver, length: int
) -> None:
    text = prompt(5, length)
    cached.generate([text])
    got = cached.generate([text])
    assert got[0]["cached"] == length - 64
    assert_same(got, plain.generate([text]))


def test_requests_in_one_batch_share_and_stay_apart(plain: VllmDriver, cached: VllmDriver) -> None:
    common = prompt(6, 256)
    texts = [common + prompt(10 + index, 40 + 17 * index) for index in range(6)]
    cached.generate([[*common, 2]])
    got = cached.generate(texts)
    assert [one["cached"] for one in got] == [256] * 6
    assert_same(got, plain.generate(texts))


def test_different_salts_share_nothing(cached: VllmDriver) -> None:
    text = prompt(7, 200)
    cached.generate([text], cache_salts=["a"])
    assert cached.generate([text], cache_salts=["b"])[0]["cached"] == 0
    assert cached.generate([text])[0]["cached"] == 0
    assert cached.generate([text], cache_salts=["a"])[0]["cached"] == 192


def test_prompt_logprobs_are_computed_in_full(cached: VllmDriver) -> None:
    text = prompt(8, 200)
    cached.generate([text])
    asked = cached.call("metric", name="lmc_requests_total", labels={})
    assert cached.generate([text], prompt_logprobs=1)[0]["cached"] == 0
    assert cached.call("metric", name="lmc_requests_total", labels={}) == asked  # vLLM would ignore the answer


def test_a_failed_load_is_recomputed_and_poisons_nothing(plain: VllmDriver, cached: VllmDriver) -> None:
    """The pass on garbage also computes new chunks, which must not be stored."""
    text = prompt(9, 400)
    longer = text + prompt(11, 200)
    reference = plain.generate([longer])
    cached.generate([text])
    cached.call("fail_loads", count=1)
    assert_same(cached.generate([longer]), reference)
    again = cached.generate([longer])
    assert again[0]["cached"] == 576  # stored anew
    assert_same(again, reference)
    assert_same(cached.generate([text]), plain.generate([text]))


def test_a_reset_forgets_everything(cached: VllmDriver) -> None:
    text = prompt(12, 200)
    cached.generate([text])
    assert cached.call("reset")
    assert cached.call("state")["usage"]["host"][0] == 0
    assert cached.generate([text])[0]["cached"] == 0


def test_after_a_sleep_what_was_stored_is_loaded_again(plain: VllmDriver, cached: VllmDriver) -> None:
    """vLLM 0.33 calls the hooks; here a test does, as a CPU engine has no sleep mode, and what stood in the KV memory is lost as in one."""
    reference = plain.generate([TEXT])
    cached.generate([TEXT])
    cached.call("settle")
    cached.call("sleep_and_lose_the_kv_memory")
    got = cached.generate([TEXT])
    assert got[0]["cached"] == 448
    assert_same(got, reference)


def test_a_request_may_bypass_the_cache(cached: VllmDriver) -> None:
    text = prompt(13, 200)
    cached.generate([text], extra_args={"kv_transfer_params": {"lmc": {"store": False}}})
    assert cached.generate([text], extra_args={"kv_transfer_params": {"lmc": {"bypass": True}}})[0]["cached"] == 0
    cached.generate([text], extra_args=wish(tenant="a"))
    assert cached.generate([text], extra_args=wish(tenant="b"))[0]["cached"] == 0
    assert cached.generate([text], extra_args=wish(tenant="a"))[0]["cached"] == 192
    uninvited = {"kv_transfer_params": {"lmc": {"tenant": "a"}}}
    assert cached.generate([text], extra_args=uninvited)[0]["cached"] == 0
    unclear = {"kv_transfer_params": {"lmc": {"tenants": "a"}}}
    assert cached.generate([text], extra_args=unclear)[0]["cached"] == 0


def test_a_request_may_ask_why(cached: VllmDriver) -> None:
    text = prompt(14, 200)
    ask = wish(explain=True)
    assert (
        cached.generate([prompt(15, 200)], extra_args={"kv_transfer_params": {"lmc": {"explain": True}}})[0][
            "explanation"
        ]
        is None
    )
    cold = cached.generate([text], extra_args=ask)[0]["explanation"]["lmc"]
    assert cold == {"prompt_tokens": 200, "hit_tokens": {"device": 0}, "miss": "never stored"}
    warm = cached.generate([text], extra_args=ask)[0]["explanation"]["lmc"]
    assert warm == {"prompt_tokens": 200, "hit_tokens": {"device": 0, "host": 192}, "miss": None}


def test_a_request_aborted_while_loading_leaves_nothing(plain: VllmDriver, cached: VllmDriver) -> None:
    text = prompt(15, 700)
    cached.generate([text])
    free = cached.call("state")["free_blocks"]
    cached.call("abort_while_loading", prompt=text)
    state = cached.call("state")
    assert (state["open"], state["pins"], state["requests"], state["free_blocks"]) == (0, 0, 0, free)
    assert_same(cached.generate([text]), plain.generate([text]))


def test_nothing_is_left_over(cached: VllmDriver) -> None:
    state = cached.call("state")
    assert (state["open"], state["pins"], state["requests"], state["tracked"]) == (0, 0, 0, 0)


@pytest.fixture(scope="module")
def warm_disk(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A disk tier that an engine which was killed has left, with 7 chunks of TEXT."""
    disk = tmp_path_factory.mktemp("warm")
    engine = driver(tiny_llama, **{"disk.path": str(disk)})
    engine.generate([TEXT])
    assert engine.call("state")["usage"]["disk"][0] == 7
    engine.kill()
    return disk


def test_a_restart_finds_the_disk_tier_warm(
    tiny_llama: Path, plain: VllmDriver, warm_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", "7")  # changes the hashes of vLLM's own blocks
    with driver(tiny_llama, **{"disk.path": str(warm_disk)}) as engine:
        got = engine.generate([TEXT])
        assert got[0]["cached"] == 448
        assert_same(got, plain.generate([TEXT]))
        assert engine.call("metric", name="lmc_hit_tokens_total", labels={"tier": "disk"}) == 448


def test_corrupt_files_are_recomputed_and_replaced(tiny_llama: Path, plain: VllmDriver, disk: Path) -> None:
    text = prompt(21, 500)
    reference = plain.generate([text])
    with driver(tiny_llama, **{"disk.path": str(disk)}) as first:
        first.generate([text])
        first.call("settle")
    files = sorted(file for file in disk.glob("v*/*/r0/??/*") if file.is_file())
    assert len(files) == 7
    for file in files:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 0x10
        file.write_bytes(content)
    with driver(tiny_llama, **{"disk.path": str(disk)}) as second:
        got = second.generate([text])
        assert got[0]["cached"] == 0
        assert_same(got, reference)
        assert second.generate([text])[0]["cached"] == 448
        assert second.call("metric", name="lmc_failures_total", labels={"operation": "stage"}) > 0


def test_a_fault_in_lmc_ends_at_most_the_cache_and_not_the_engine(
    tmp_path: Path, tiny_llama: Path, plain: VllmDriver
) -> None:
    """First a record for which there is no room any more, which costs lines of the record only."""
    text, trace = prompt(22, 200), tmp_path / "trace.jsonl"
    with driver(tiny_llama, record=str(trace)) as engine:
        engine.generate([text])
        engine.call("limit_files", num_bytes=trace.stat().st_size + 10)
        for _ in range(3):
            assert engine.generate([text], max_tokens=1)[0]["cached"] == 192
        assert any("lookups are missing in the trace" in line and "File too large" in line for line in engine.log)
        engine.call("crash_cache")
        got = engine.generate([text])
        assert got[0]["cached"] == 0
        assert_same(got, plain.generate([text]))


def test_chunked_prefill_prefix_caching_and_preemption_together(tiny_llama: Path, plain: VllmDriver) -> None:
    """Long prompts in steps of 128 tokens, an engine cache that shares blocks with lmc's, and too little KV memory for the batch."""
    options = {
        "enable_prefix_caching": True,
        "max_num_batched_tokens": 128,
        "max_num_seqs": 8,
        "max_model_len": 1024,
        "num_gpu_blocks_override": 60,
        "async_scheduling": True,  # a step is planned before the tokens of the step before it are known
    }
    common = prompt(30, 320)
    texts = [common + prompt(31 + index, 60 + 40 * index) for index in range(8)]
    reference = plain.generate(texts, max_tokens=60)
    with driver(tiny_llama, options=options) as engine:
        engine.call("watch_loads")
        for _ in range(2):
            assert_same(engine.generate(texts, max_tokens=60), reference)
        assert engine.call("engine_metric", name="num_preemptions") > 0
        assert engine.call("by_label", name="lmc_hit_tokens_total", label="tier")["host"] > 0
        assert engine.call("copying_threads") == ["MainThread"]  # each load was over at once
        state = engine.call("state")
        assert (state["open"], state["pins"], state["requests"], state["tracked"]) == (0, 0, 0, 0)
        assert state["free_blocks"] == 59


def test_the_bytes_of_a_bfloat16_cache_come_back(tiny_llama: Path) -> None:
    """Its blocks hold K transposed on a CPU. Rounding differs with the batch's shape, so bytes are compared and not tokens."""
    text = prompt(40, 300)
    with driver(tiny_llama, options={"dtype": "bfloat16"}) as engine:
        engine.call("watch_bytes")
        assert [engine.generate([text])[0]["cached"] for _ in range(2)] == [0, 256]
        chunk_bytes = 64 * kv_bytes_per_token(tiny_llama) // 2
        assert engine.call("watched") == {"compared_bytes": 4 * chunk_bytes, "different_blocks": 0}


def test_two_ranks_store_and_load_their_own_halves(tiny_llama: Path, plain: VllmDriver, warm_disk: Path) -> None:
    reference = plain.generate([TEXT])
    settings: dict[str, Any] = {"disk.path": str(warm_disk), "options": {"tensor_parallel_size": 2}}
    with driver(tiny_llama, **settings) as first:
        cold = first.generate([TEXT])
        assert cold[0]["cached"] == 0  # what one rank alone has stored is not for two
        assert_same(cold, reference)
        warm = first.generate([TEXT])
        assert warm[0]["cached"] == 448
        assert_same(warm, reference)
        first.call("settle")
    (folder,) = (found.parent for found in warm_disk.glob("v*/*/r1"))
    files = [sorted(folder.glob(f"r{rank}/??/*")) for rank in (0, 1)]
    assert [len(found) for found in files] == [7, 7]
    files[1][0].unlink()  # one half of some chunk
    with driver(tiny_llama, **settings) as second:
        got = second.generate([TEXT])
        assert got[0]["cached"] < 448
        assert_same(got, reference)


def test_a_cache_that_cannot_start_leaves_the_engine_running(tiny_llama: Path, plain: VllmDriver, disk: Path) -> None:
    text = prompt(60, 200)
    with driver(tiny_llama, **{"disk.path": str(disk), "disk.capacity": 1000, "strict": False}) as engine:
        for _ in range(2):
            got = engine.generate([text])
            assert got[0]["cached"] == 0
            assert_same(got, plain.generate([text]))
