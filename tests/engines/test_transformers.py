"""The Transformers adapter: a hit skips prefill and changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lmc.cache.connectors.transformers import CachedGenerator
from lmc.cache.settings import load_settings
from lmc.errors import ConfigError
from tests.engines.scenario import prompt

pytestmark = pytest.mark.engine

GREEDY = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_llama)


@pytest.fixture
def computed(model: Any) -> Iterator[list[int]]:
    """The number of tokens of each forward pass."""
    lengths: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda module, arguments, options: lengths.append(options["input_ids"].shape[1]), with_kwargs=True
    )
    yield lengths
    hook.remove()


def opened(model: Any, **settings: object) -> CachedGenerator:
    values = {"chunk_tokens": 64, "host.capacity": "64MiB", "metrics.enabled": False, "strict": True, **settings}
    return CachedGenerator(model, load_settings(flags=values).config, max_tokens=2048)


def plain(model: Any, tokens: list[int]) -> list[int]:
    import torch

    ids = torch.tensor([tokens])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)
    return list(output[0, len(tokens) :].tolist())


def test_a_hit_skips_prefill_and_the_output_is_the_same(model: Any, computed: list[int]) -> None:
    generator = opened(model)
    tokens = prompt(40, 700)
    reference = plain(model, tokens)
    computed.clear()
    cold = generator.generate(tokens, **GREEDY)
    warm = generator.generate(tokens, **GREEDY)
    longer = generator.generate([*tokens, *cold.tokens, 7], **GREEDY)
    assert cold.tokens == warm.tokens == reference
    assert longer.tokens == plain(model, [*tokens, *cold.tokens, 7])
    assert [cold.num_loaded, warm.num_loaded, longer.num_loaded] == [0, 640, 640]
    assert [length for length in computed if length > 1][:3] == [700, 60, 73]
    generator.close()


def test_a_new_process_state_loads_from_disk(model: Any, disk: Path) -> None:
    tokens = prompt(41, 300)
    first = opened(model, **{"disk.path": str(disk)})
    reference = first.generate(tokens, **GREEDY)
    assert first.cache.settle()
    first.close()
    second = opened(model, **{"disk.path": str(disk)})
    again = second.generate(tokens, **GREEDY)
    assert (again.tokens, again.num_loaded) == (reference.tokens, 256)
    second.close()


def test_a_corrupt_file_is_recomputed(model: Any, disk: Path) -> None:
    tokens = prompt(42, 300)
    first = opened(model, **{"disk.path": str(disk)})
    reference = first.generate(tokens, **GREEDY)
    assert first.cache.settle()
    first.close()
    files = [file for file in disk.rglob("*") if file.is_file() and file.stat().st_size > 64 * 1024]
    assert len(files) == 4
    for file in files:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    second = opened(model, **{"disk.path": str(disk)})
    assert second.generate(tokens, **GREEDY).tokens == reference.tokens
    second.close()


def test_a_prompt_without_room_is_refused(model: Any) -> None:
    generator = opened(model)
    with pytest.raises(ConfigError, match="does not fit"):
        generator.generate([5] * 2048, **GREEDY)
    generator.close()


@pytest.mark.parametrize("compress", ["lossless", "lossless-max"])
def test_a_chunk_that_was_compressed_on_disk_changes_nothing(
    model: Any, computed: list[int], tmp_path: Path, compress: str
) -> None:
    tokens = prompt(41, 700)
    reference = plain(model, tokens)
    disk = {"disk.path": tmp_path, "disk.compress": compress}
    first = opened(model, **disk)
    assert first.generate(tokens, **GREEDY).tokens == reference
    assert first.cache.settle()
    raw, held = 10 * first.cache.scheduler.chunk_bytes, sum(path.stat().st_size for path in tmp_path.rglob("*"))
    first.close()
    assert held < 0.95 * raw
    second = opened(model, **disk)
    computed.clear()
    warm = second.generate(tokens, **GREEDY)
    second.close()
    assert warm.tokens == reference and warm.num_loaded == 640
