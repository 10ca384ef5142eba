from __future__ import annotations

from lmc.bench.counters import difference, parse

PAGE = """# TYPE lmc_hit_tokens counter
lmc_hit_tokens_total{tier="host"} 128.0
lmc_hit_tokens_total{tier="disk"} 256.0
vllm:cache_config_info{block_size="128",num_gpu_blocks="341"} 1.0
"""


def test_totals_labels_and_absence() -> None:
    counters = parse([PAGE, "other_total 1.0\n"])
    assert counters.total("lmc_hit_tokens_total") == 384.0
    assert counters.total("lmc_hit_tokens_total", tier="host") == 128.0
    assert counters.by_label("lmc_hit_tokens_total", "tier") == {"host": 128.0, "disk": 256.0}
    assert counters.label("vllm:cache_config_info", "num_gpu_blocks") == "341"
    assert counters.total("absent") is None
    assert counters.label("absent", "x") is None


def test_a_difference_of_an_absent_counter_is_not_zero() -> None:
    before, after = parse([""]), parse([PAGE])
    assert difference(after, before, "lmc_hit_tokens_total") == 384.0
    assert difference(after, after, "lmc_hit_tokens_total") == 0.0
    assert difference(after, before, "absent") is None


def test_metrics_that_the_engine_republishes_count_once() -> None:
    engine = 'lmc_hit_tokens_total{tier="host",engine="0",model_name="m"} 100.0\nvllm:x_total{engine="0"} 5.0\n'
    counters = parse([engine, PAGE])
    assert counters.by_label("lmc_hit_tokens_total", "tier") == {"host": 128.0, "disk": 256.0}
    assert counters.total("vllm:x_total") == 5.0
