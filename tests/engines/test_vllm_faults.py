"""Whatever fails inside lmc, at whatever call of vLLM's, ends at most the cache: answers are right, nothing waits, no block is lost."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import Counter, Gauge, Histogram

from lmc.cache.connectors import guard
from lmc.cache.connectors.vllm import LmcConnector
from lmc.cache.connectors.vllm import worker as worker_module
from lmc.cache.connectors.vllm.messages import StepReport
from lmc.cache.connectors.vllm.stats import LmcPromMetrics, LmcStats
from lmc.cache.plan import Report
from lmc.cache.settings import load_settings
from lmc.serve.engines import vllm_transfer_config
from tests.engines.injection import ERRORS, Injection
from tests.engines.moving_engine import MovingEngine, answer_to
from tests.engines.test_vllm_hooks import vllm_config

pytestmark = [pytest.mark.engine, pytest.mark.fault]

NO_HOOKS = {"strict", "end_cache"}  # the guard's own
HOOKS = sorted(name for name in vars(LmcConnector) if not name.startswith("_") and name not in NO_HOOKS)
_EVERY = int(os.environ.get("LMC_TEST_EVERY", "11"))  # 1: each function
ELSEWHERE = {  # in processes without a cache, or before there is one
    f"LmcConnector.{name}"
    for name in (
        "build_kv_connector_stats",
        "build_prom_metrics",
        "get_required_kvcache_layout",
        "shutdown",
        "supports_sleep_mode",
    )
} | {f"LmcStats.{name}" for name in ("aggregate", "is_empty", "reduce", "reset")}
PROMPTS = [[seed * 100 + index % 97 for index in range(100)] for seed in range(1, 5)]


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A start looks through all objects of the process for the model, and there are many in a test's."""
    monkeypatch.setattr(worker_module, "find_models", list)
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(before)


class Case:
    """A fresh engine under traffic that reaches every hook."""

    def __init__(self, model: Path, disk: Path, *, shares_blocks: bool = False, num_ranks: int = 1) -> None:
        flags = {"metrics.enabled": False, "chunk_tokens": 32, "host.capacity": "4MiB", "disk.fsync": False}
        flags |= {"disk.path": str(disk), "disk.capacity": "4MiB", "transfer_backend": "torch", "close_timeout": 1}
        transfer = vllm_transfer_config(load_settings(flags=flags).config)
        self.config = vllm_config(model, kv_transfer_config=transfer, enable_prefix_caching=shares_blocks)
        self.num_ranks = num_ranks
        self.engine: Any = None

    def run(self) -> None:
        LmcConnector.get_required_kvcache_layout(self.config)
        LmcConnector.supports_sleep_mode(None)
        LmcConnector.build_kv_connector_stats()
        labels = {0: ["model", "0"]}
        LmcConnector.build_prom_metrics(
            self.config, {kind: kind for kind in (Counter, Gauge, Histogram)}, ["model_name", "engine"], labels
        )
        self.engine = engine = MovingEngine(self.config, num_ranks=self.num_ranks)
        for index, prompt in enumerate(PROMPTS[:3]):
            engine.add(f"cold {index}", prompt)
        engine.run()
        engine.scheduler.reset_prefix_cache()
        wishes = {"kv_transfer_params": {"lmc": {"explain": True}}}
        for index, prompt in enumerate(PROMPTS):
            engine.add(f"warm {index}", prompt, extra_args=wishes)
        engine.step()
        engine.abort("warm 1")
        engine.run()
        engine.connector.request_finished(engine.requests["warm 0"], [])
        for worker in engine.workers:
            worker.unregister_kv_caches()
            worker.restore_kv_caches()
        engine.add("running", PROMPTS[0] + PROMPTS[1] + PROMPTS[2])
        engine.step()
        assert engine.scheduler.reset_prefix_cache(reset_running_requests=True, reset_connector=True)
        for index, prompt in enumerate(PROMPTS):
            engine.add(f"late {index}", prompt)
        engine.run()

    def check(self) -> None:
        engine = self.engine
        engine.add("after", PROMPTS[0])
        engine.run()
        for name, request in engine.requests.items():
            assert request.is_finished(), name
            if name != "warm 1":
                assert list(request.output_token_ids) == answer_to(list(request.prompt_token_ids)), name
        pool = engine.scheduler.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
        assert not engine.scheduler.requests and not engine.connector.has_pending_push_work()

    @property
    def has_cache(self) -> bool:
        return all(one._side.__dict__[half] is not None for one, half in self._halves())

    @property
    def has_ended(self) -> bool:
        return all(one._side.__dict__[half] is None for one, half in self._halves())

    def _halves(self) -> list[tuple[Any, str]]:
        return [(self.engine.connector, "scheduler"), *((worker, "worker") for worker in self.engine.workers)]


@pytest.fixture
def case(tiny_llama: Path, tmp_path: Path, quiet: None) -> Callable[..., Case]:
    numbers = itertools.count()
    return lambda **values: Case(tiny_llama, tmp_path / f"disk {next(numbers)}", **values)


def observed(case: Case) -> dict[tuple[str, str], int]:
    """The functions of lmc that run inside each hook, and how often, without a fault."""
    injection = Injection()
    with injection.armed():
        case.run()
    assert case.has_cache
    case.check()
    with injection.armed():
        case.engine.close()
    return dict(injection.seen)


def assert_survives(case: Case, injection: Injection) -> None:
    """Traffic with this fault. Hooks of other processes have no cache to end."""
    what = f"{injection.error!r} in {injection.function} within {injection.hook}"
    try:
        with injection.armed():
            case.run()
        case.check()
        has_ended = case.has_ended
        with injection.armed():
            case.engine.close()
        if injection.function == injection.hook:
            assert injection.raised, "the fault never came"
            assert has_ended == (injection.hook not in ELSEWHERE), "the cache has not ended"
    except Exception as error:
        raise AssertionError(f"{what}: {error}") from error


def test_every_method_that_vllm_calls_is_guarded(case: Callable[..., Case]) -> None:
    """A new method must be guarded, and the traffic of this file must reach it."""
    seen = observed(case())
    reached = {hook.rpartition(".")[2] for hook, _ in seen if hook.startswith("LmcConnector.")}
    assert reached == set(HOOKS)


@pytest.mark.parametrize("kind", [LmcStats, LmcPromMetrics, StepReport])
def test_what_vllm_calls_in_other_processes_is_guarded(kind: type) -> None:
    methods = {name for name in vars(kind) if hasattr(kind.__mro__[1], name) and not name.startswith("_")}
    methods -= {field.name for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()
    assert methods
    for name in methods:
        assert vars(kind)[name].__code__.co_filename == guard.__file__, name


def test_wrong_statistics_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    metrics = LmcPromMetrics.__new__(LmcPromMetrics)  # its constructor wants vLLM's metrics
    metrics.observe({"lmc_hit_tokens_total": 1.0})
    stats = LmcStats({"a_total": 1.0})
    assert stats.aggregate(LmcStats({"b_total": "many"})) is stats  # type: ignore[dict-item]
    assert LmcStats({"a_total": None}).reduce() == {}  # type: ignore[dict-item]
    assert StepReport(Report()).aggregate(None).gone  # type: ignore[arg-type]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("hook", HOOKS)
def test_a_fault_at_any_hook_ends_at_most_the_cache(case: Callable[..., Case], hook: str, error: Exception) -> None:
    name = f"LmcConnector.{hook}"
    turn = HOOKS.index(hook) + ERRORS.index(error)
    one = case(shares_blocks=bool(turn % 2), num_ranks=1 + turn % 3 // 2)
    assert_survives(one, Injection(name, name, error, closing_too=turn % 2 == 0))


@pytest.mark.parametrize(("shares_blocks", "num_ranks"), [(False, 1), (True, 2)], ids=["before the pass", "background"])
def test_a_fault_in_any_function_ends_at_most_the_cache(
    case: Callable[..., Case], shares_blocks: bool, num_ranks: int
) -> None:
    """Functions of lmc that run inside a hook raise once, at their first call or one in the middle. There are over 700; a part of them,
    chosen anew for each number of ranks, must do here."""
    seen = observed(case(shares_blocks=shares_blocks, num_ranks=num_ranks))
    assert len(seen) > 500, "the test says nothing"
    failures, raised = [], 0
    for turn, ((hook, function), calls) in list(enumerate(sorted(seen.items())))[num_ranks::_EVERY]:
        number = 1 if turn % 2 else -(-calls // 2)
        injection = Injection(hook, function, ERRORS[turn % len(ERRORS)], number, closing_too=turn % 3 == 0)
        try:
            assert_survives(case(shares_blocks=shares_blocks, num_ranks=num_ranks), injection)
        except AssertionError as failure:
            failures.append(str(failure)[:300])
        raised += injection.raised > 0
    assert not failures, "\n".join(failures)
    assert raised > 0.8 * len(seen) / _EVERY, "some functions run only when threads are slow, but not so many"
