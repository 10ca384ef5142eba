"""Which ranks are taken to hold the same KV; that they do is shown by bytes in test_vllm_models.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn
from vllm.model_executor.layers.linear import QKVParallelLinear

from lmc.cache.config import CacheConfig
from lmc.cache.connectors.vllm import worker as worker_module
from lmc.cache.connectors.vllm.alike import ranks_alike
from lmc.cache.connectors.vllm.worker import WorkerSide

pytestmark = pytest.mark.compat


def projection(replicas: int) -> QKVParallelLinear:
    """One that tensor parallelism has given to several ranks; without the weights, which need a process group."""
    made = QKVParallelLinear.__new__(QKVParallelLinear)
    nn.Module.__init__(made)
    made.num_kv_head_replicas = replicas
    return made


def attention(*beside: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A part of a model, and the layer in it that has the KV."""
    layer = nn.Identity()
    return nn.ModuleDict({"attn": layer, **{f"other{number}": one for number, one in enumerate(beside)}}), layer


def told(replicas: int | None) -> Any:
    return SimpleNamespace(**({} if replicas is None else {"kv_tp_replicas": replicas}))


@pytest.mark.parametrize(
    ("of_layers", "alike"),
    [
        ([[projection(2)], [projection(2)]], 2),
        ([[projection(4)], [projection(2)]], 2),  # a draft model has more heads
        ([[projection(2)], [projection(1)]], 1),
        ([[projection(2)], [nn.Linear(1, 1)]], 1),  # a projection that is not known
        ([[projection(2)], [projection(2), projection(2)]], 1),  # which of them is it
        ([[nn.Sequential(nn.Sequential(projection(2)))]], 2),  # wrapped, as LoRA does
        ([], 1),
    ],
)
def test_ranks_are_alike_only_if_every_layer_says_so(of_layers: list[list[nn.Module]], alike: int) -> None:
    parts = [attention(*beside) for beside in of_layers]
    model = nn.ModuleList([part for part, _ in parts])
    layers = [layer for _, layer in parts]
    assert ranks_alike(told(None), [model], layers) == alike
    assert ranks_alike(told(1), [model], layers) == alike
    assert ranks_alike(told(4), [model], layers) == 4
    if layers:
        assert ranks_alike(told(None), [model], [*layers, nn.Identity()]) == 1  # in no model that was found


@pytest.mark.parametrize("num_groups", [1, 2])
def test_with_several_kv_groups_each_rank_keeps_a_copy(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, num_groups: int
) -> None:
    """The other ranks are not asked for anything then."""
    opened: list[dict[str, Any]] = []
    shared: list[int] = []

    def share_slots(config: Any, describe: Any, *, alike: int, **_: Any) -> Any:
        shared.append(alike)
        return describe(), None

    monkeypatch.setattr(worker_module, "share_slots", share_slots)
    monkeypatch.setattr(worker_module, "open_worker", lambda *_, **options: opened.append(options))
    parallel = SimpleNamespace(local_world_size=4, world_size=4, rank=0)
    config: Any = SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=None)] * num_groups)
    side = WorkerSide(CacheConfig(), SimpleNamespace(parallel_config=parallel), config)
    side.alike = 2
    described: Any = ("the namespace", "the layout")
    side._open_worker(lambda: described)
    assert shared == [2 if num_groups == 1 else 1]
    assert opened == [{"rank": 0, "num_ranks": 4, "others": ()}]
    assert ("store a copy each: not all layers keep all tokens" in caplog.text) == (num_groups == 2)
