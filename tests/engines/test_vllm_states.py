"""Models with recurrent states on the real engine, as test_vllm_hybrid.py has those with windows.

Log-probabilities are those without lmc, and no longer when the bytes of one KV group are left out. On a CPU vLLM's Mamba 2 can compute no
more than one block of a prompt in a step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lmc.cache.keys import ChunkKey, KeyChain, Namespace, root
from lmc.cache.parts import leaf_key
from tests.engines.scenario import assert_same, prompt
from tests.engines.test_vllm_hybrid import (
    PAST_LMC,
    assert_every_part_counts,
    assert_nothing_is_left,
    compared,
    engine_on,
)
from tests.engines.tiny_model import make_tiny_falcon, make_tiny_qwen3_next

pytestmark = pytest.mark.engine

TEXT, MORE = prompt(1, 330), prompt(2, 80)
SEVERAL = [prompt(60, 200), TEXT, prompt(61, 130), prompt(63, 260), prompt(62, 150)]
ONE_BLOCK: dict[str, Any] = {"block_size": 64, "max_num_batched_tokens": 64, "enable_prefix_caching": True}


def test_states_of_mamba_2(tmp_path: Path) -> None:
    model, disk = make_tiny_falcon(tmp_path / "model"), tmp_path / "disk"
    settings = {"checkpoint_tokens": 256}
    with engine_on(model, disk, settings=settings, **ONE_BLOCK) as engine:
        assert compared(engine, TEXT) == [0]
        assert compared(engine, TEXT) == [320]
        assert compared(engine, TEXT + MORE) == [320]
        # The second of those that share a prefix: to the last checkpoint in it.
        assert compared(engine, TEXT[:300] + prompt(3, 50)) == [256]
        # Where a prompt parts between checkpoints, it leaves one for the next.
        assert compared(engine, TEXT[:230] + prompt(4, 60)) == [0]
        assert engine.call("by_label", name="lmc_misses_total", label="reason")["no checkpoint"] > 0
        assert compared(engine, TEXT[:230] + prompt(5, 60)) == [192]
        assert compared(engine, *SEVERAL) == [0, 320, 0, 0, 0]
        assert compared(engine, *SEVERAL) == [192, 320, 128, 256, 128]
        assert_every_part_counts(engine, TEXT, groups=2)
        reference = engine.generate([TEXT], extra_args=PAST_LMC)
        engine.call("reset_device")
        engine.call("fail_loads", count=1)
        assert_same(engine.generate([TEXT]), reference)
        assert engine.call("metric", name="lmc_failures_total", labels={"operation": "load"}) > 0
        engine.call("settle")
        engine.call("reset_device")
        assert compared(engine, TEXT) == [320]
        assert_nothing_is_left(engine)
        namespace = Namespace(**engine.call("namespace"))
    damage_states(namespace, disk)
    with engine_on(model, disk, settings=settings, **ONE_BLOCK) as engine:
        assert compared(engine, TEXT) == [320]
        assert engine.call("metric", name="lmc_hit_tokens_total", labels={"tier": "disk"}) > 0
        engine.generate([TEXT[:200]], extra_args=PAST_LMC)  # now the device holds a start itself
        beside = engine.generate([TEXT])
        assert beside[0]["cached"] == 320
        engine.call("reset_device")
        assert_same(beside, engine.generate([TEXT], extra_args=PAST_LMC))
        engine.call("reset_device")
        engine.call("abort_while_loading", prompt=TEXT)
        assert compared(engine, TEXT) == [320]
        # The last state of each of three prompts is damaged, and is stored anew.
        for text in SEVERAL[::2]:
            assert compared(engine, text) == [0]
            assert compared(engine, text) == [len(text) // 64 * 64]
        assert_nothing_is_left(engine)


def damage_states(namespace: Namespace, disk: Path) -> None:
    """Of the ends of three prompts: a flipped bit, a file that was cut, no file."""
    for number, text in enumerate(SEVERAL[::2]):
        keys: list[ChunkKey] = KeyChain(root(namespace), 64).extend(text)
        (file,) = disk.glob(f"v*/*/r0/??/{leaf_key(keys[-1], 1).hex()}")
        content = bytearray(file.read_bytes())
        content[1000] ^= 1
        file.unlink()
        if number < 2:
            file.write_bytes(content[: None if number == 0 else 5000])


def test_states_of_the_gated_delta_rule(tmp_path: Path) -> None:
    """Three groups of states beside one of attention, in bfloat16; vLLM fits the block to the size of a state."""
    model, chunk = make_tiny_qwen3_next(tmp_path / "model"), 384
    text = prompt(1, 3 * chunk + 2)
    options: dict[str, Any] = {"block_size": None, "dtype": "bfloat16", "enable_prefix_caching": True}
    settings = {"chunk_tokens": None, "checkpoint_tokens": chunk}
    with engine_on(
        model, tmp_path / "disk", settings=settings, max_num_batched_tokens=chunk + 100, **options
    ) as engine:
        assert engine.call("namespace")["chunk_tokens"] == chunk
        assert compared(engine, text) == [0]
        assert compared(engine, text) == [3 * chunk]
        assert compared(engine, text[: 2 * chunk + 50] + prompt(3, 100)) == [2 * chunk]
        assert compared(engine, prompt(60, chunk + 5), text) == [0, 3 * chunk]
        assert compared(engine, prompt(60, chunk + 5), text) == [chunk, 3 * chunk]
        assert_every_part_counts(engine, text, groups=4)
        assert_nothing_is_left(engine)


def test_without_vllms_prefix_cache_states_are_refused_and_the_engine_runs(tmp_path: Path) -> None:
    options = {**ONE_BLOCK, "enable_prefix_caching": False}
    with engine_on(
        make_tiny_falcon(tmp_path / "model"),
        tmp_path / "disk",
        settings={"strict": False, "chunk_tokens": None},
        **options,
    ) as engine:
        assert any("needs vLLM's prefix cache" in line for line in engine.log)
        first, again = engine.generate([TEXT]), engine.generate([TEXT])
        assert [first[0]["cached"], again[0]["cached"]] == [0, 0]
        assert_same(again, first)
