"""A cache that cannot be opened: vLLM's hooks go on without it and the log says why; with `strict` the engine is refused."""

from __future__ import annotations

import dataclasses
import errno
import os
from types import SimpleNamespace
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request

from lmc.cache.connectors.vllm import worker as worker_module
from lmc.cache.connectors.vllm.connector import LmcConnector, _settings
from lmc.cache.connectors.vllm.messages import Introduction, StepPlan
from lmc.cache.connectors.vllm.scheduler import SchedulerSide
from lmc.cache.connectors.vllm.worker import WorkerSide
from lmc.cache.plan import Plan
from lmc.cache.scheduler.cache import CacheScheduler
from lmc.cache.worker import open as open_module
from lmc.errors import ConfigError, LayoutError
from tests.cache.instance import BLOCK_TOKENS, Instance, prompt, settings

pytestmark = pytest.mark.fault


def no_memory(*_: object, **__: object) -> None:
    raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))


def unknown_layout(*_: object, **__: object) -> None:
    raise LayoutError("layer 3: a KV cache of 7 dimensions is none that lmc knows")


def unsupported_option(*_: object, **__: object) -> None:
    raise ConfigError("--pipeline-parallel-size is not supported by the cache")


ONE_GROUP = SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=None)])  # of vLLM's KV cache


def open_worker_side(**values: object) -> WorkerSide:
    parallel = SimpleNamespace(tensor_parallel_size=1, world_size=1, enable_expert_parallel=False, rank=0)
    config = SimpleNamespace(
        parallel_config=parallel,
        compilation_config=SimpleNamespace(static_forward_context={}),
        lora_config=None,
        load_config=SimpleNamespace(load_format="dummy"),
        model_config=None,
    )
    side = WorkerSide(settings(**values), config, ONE_GROUP)  # type: ignore[arg-type]
    side.open({})
    return side


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (unsupported_option, "--pipeline-parallel-size is not supported"),
        (no_memory, "Cannot allocate memory"),
        (unknown_layout, "7 dimensions"),
    ],
    ids=["settings", "memory", "layout"],
)
def test_a_worker_that_cannot_open_its_cache_does_without(monkeypatch, caplog, broken, said):
    """test_vllm_options.py has which options are refused; here a stand-in for vLLM's configuration will do."""
    monkeypatch.setattr(worker_module, "require_supported_options", lambda config: None)
    monkeypatch.setattr(worker_module, "read_groups", broken)
    worker = open_worker_side()
    assert "lmc: no cache on rank 0: " in caplog.text and said in caplog.text
    worker.fence(frozenset())
    worker.begin(StepPlan(Plan()), None)  # type: ignore[arg-type]  # without a cache nobody looks at it
    worker.wait_layer("layer0")
    worker.end(StepPlan(Plan()))
    assert (worker.loaded(), worker.failed_blocks(), worker.report()) == (set(), set(), None)

    scheduler = SchedulerSide(settings(), BLOCK_TOKENS)
    scheduler.meet([worker.introduce()])
    assert "running WITHOUT the cache" in caplog.text
    assert_serves_on(scheduler)
    worker.close()
    with pytest.raises((ConfigError, LayoutError, OSError), match=said):
        open_worker_side(strict=True)


def test_ranks_that_do_not_fit_together_do_without(instances, caplog):
    instances.append(pair := Instance(settings(), 2))
    one, other = (worker.ready() for worker in pair.workers)
    other = dataclasses.replace(other, namespace=dataclasses.replace(other.namespace, revision="another"))
    with pytest.raises(ConfigError, match="the ranks disagree on the namespace"):
        CacheScheduler(settings(), [one, other], BLOCK_TOKENS)
    scheduler = SchedulerSide(settings(), BLOCK_TOKENS)
    scheduler.meet([Introduction(one), Introduction(other)])
    assert "running WITHOUT the cache: the ranks disagree" in caplog.text
    assert_serves_on(scheduler)
    strict = SchedulerSide(settings(strict=True), BLOCK_TOKENS)
    with pytest.raises(ConfigError, match="disagree"):
        strict.meet([Introduction(one), Introduction(other)])


def test_host_memory_that_cannot_be_had_is_an_error_of_the_kind_that_workers_survive(monkeypatch):
    monkeypatch.setattr(open_module, "open_slab", no_memory)
    with pytest.raises(OSError, match="Cannot allocate memory"):
        Instance(settings())


@pytest.mark.parametrize("extra", [{"setings": {}}, {"settings": {"hots.capacity": "1GiB"}}, {"chunk_tokens": 128}])
def test_a_key_that_nobody_reads_is_refused(extra: dict[str, Any]) -> None:
    transfer = SimpleNamespace(kv_connector_extra_config=extra)
    with pytest.raises(ConfigError, match="unknown"):
        _settings(SimpleNamespace(kv_transfer_config=transfer))  # type: ignore[arg-type]


def assert_serves_on(scheduler: SchedulerSide) -> None:
    request = Request("r", prompt(1, 50), SamplingParams(max_tokens=4), None)
    assert scheduler.lookup(request, 0) == (0, False)
    scheduler.admit(request, ([1, 2, 3],), 0)
    output = SchedulerOutput.make_empty()
    output.num_scheduled_tokens = {"r": 50}
    assert not scheduler.plan(output)
    assert scheduler.finish(request) is None
    assert scheduler.reset() and not scheduler.busy
    scheduler.close()


def test_a_cache_that_the_scheduler_refuses_is_closed_on_every_rank(instances):
    """Ranks that could open their part must not keep its memory when there is no cache."""
    instances.append(pair := Instance(settings(), 2))
    one, other = (worker.ready() for worker in pair.workers)
    scheduler = SchedulerSide(settings(), BLOCK_TOKENS)
    scheduler.meet([Introduction(one), Introduction(None, "no memory")])
    assert scheduler.refused
    connector = LmcConnector.__new__(LmcConnector)  # its constructor wants a whole configuration of vLLM
    connector._side = scheduler
    step = connector.build_connector_meta(SchedulerOutput.make_empty())
    connector._side = side = WorkerSide(settings(), None, ONE_GROUP, pair.workers[0])  # type: ignore[arg-type]
    connector.handle_preemptions(step)
    assert side.worker is None
    assert pair.workers[0]._slab._closing.is_set()

    scheduler = SchedulerSide(settings(), BLOCK_TOKENS)
    scheduler.meet([Introduction(one), Introduction(other)])
    connector._side = scheduler
    step = connector.build_connector_meta(SchedulerOutput.make_empty())
    connector._side = side = WorkerSide(settings(), None, ONE_GROUP, pair.workers[1])  # type: ignore[arg-type]
    connector.handle_preemptions(step)
    assert side.worker is pair.workers[1]
    scheduler.close()
