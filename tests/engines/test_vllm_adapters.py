"""LoRA adapters have the names of the weights that the engine holds, and a worker copies nothing of another one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.request import LoRARequest

from lmc.cache.connectors.vllm.adapters import LoadedAdapters
from lmc.cache.connectors.vllm.messages import StepPlan
from lmc.cache.connectors.vllm.worker import WorkerSide
from lmc.cache.keys import ChunkKey
from lmc.cache.plan import BlockCopy, Plan, RequestCopies
from tests.engines.scheduler_side import DrivenSide

BLOCK = 16


def adapter(number: int, seed: int, scaling: float = 1.0) -> LoRAModel:
    generator = torch.Generator().manual_seed(seed)
    layers = {
        name: LoRALayerWeights(
            name, 4, 4, torch.randn(4, 8, generator=generator), torch.randn(8, 4, generator=generator), scaling
        )
        for name in ("q", "v")
    }
    return LoRAModel(number, 4, layers)


class Manager:
    """Stands in for vLLM's LoRAModelManager, which wants a whole model: it holds adapters."""

    def __init__(self, *adapters: LoRAModel) -> None:
        self.held = {one.id: one for one in adapters}

    def list_adapters(self) -> dict[int, LoRAModel]:
        return dict(self.held)


def test_an_adapter_is_named_by_its_weights_alone() -> None:
    found = LoadedAdapters(0, [Manager(adapter(1, 1), adapter(2, 2), adapter(3, 1), adapter(4, 1, 2.0))])  # type: ignore[list-item]
    digests = found.read()
    assert list(digests) == [(1, 0), (2, 0), (3, 0), (4, 0)]
    assert digests[1, 0] == digests[3, 0]
    assert len(set(digests.values())) == 3


def test_an_adapter_that_is_loaded_again_under_its_id_is_read_again() -> None:
    manager = Manager(adapter(1, 1))
    found = LoadedAdapters(0, [manager])  # type: ignore[list-item]
    first = found.read()
    assert found.read() == first
    manager.held[1] = adapter(1, 2)
    assert found.read() != first
    manager.held[1] = adapter(1, 1)
    assert found.read() == first


def lora(number: int, path: str | Path = "nowhere") -> LoRARequest:
    return LoRARequest(f"adapter {number}", number, str(path))


TEXT = list(range(100, 400))
HIT = 18 * BLOCK


def test_requests_share_by_what_is_loaded_under_their_adapters() -> None:
    driven = DrivenSide(BLOCK, slots=200, chunk_tokens=BLOCK)
    driven.adapters = {(1, 0): "same", (2, 0): "same", (3, 0): "other"}
    found = [driven.serve(driven.request(TEXT, lora_request=lora(number))) for number in (1, 2, 3, 3)]
    assert found == [0, HIT, 0, HIT]
    assert driven.serve(driven.request(TEXT)) == 0


def test_a_request_whose_adapter_is_not_loaded_is_neither_loaded_nor_stored() -> None:
    driven = DrivenSide(BLOCK, slots=200, chunk_tokens=BLOCK)
    assert driven.serve(driven.request(TEXT, lora_request=lora(1))) == 0
    assert not any(plan.stores for plan in driven.plans)
    driven.adapters = {(1, 0): "loaded by that request"}
    driven.step({})
    assert [driven.serve(driven.request(TEXT, lora_request=lora(1))) for _ in range(2)] == [0, HIT]


def test_files_that_were_replaced_make_the_scheduler_ask_again(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(b"one")
    driven = DrivenSide(BLOCK, slots=200, chunk_tokens=BLOCK)
    driven.adapters = {(1, 0): "one"}
    request = lora(1, tmp_path)
    assert [driven.serve(driven.request(TEXT, lora_request=request)) for _ in range(2)] == [0, HIT]
    (tmp_path / "adapter_model.safetensors").write_bytes(b"another")
    assert driven.serve(driven.request(TEXT, lora_request=request)) == HIT  # the engine still holds the first
    driven.adapters = {}  # it has dropped it, and will load the new one
    (tmp_path / "adapter_model.safetensors").write_bytes(b"a third")
    assert driven.serve(driven.request(TEXT, lora_request=request)) == 0


class Recorded:
    """Stands in for the CacheWorker: what it is told to do."""

    def __init__(self) -> None:
        self.plan = Plan()
        self.given_up: list[int] = []

    def begin(self, plan: Plan, *, by_layer: bool) -> None:
        self.plan = plan

    def end(self, plan: Plan) -> None:
        self.plan = plan

    def give_up(self, operations: Sequence[int], cause: str) -> None:
        self.given_up += operations


def copies(request: str, operation: int) -> RequestCopies:
    return RequestCopies(request, (BlockCopy(operation, ChunkKey(bytes(32)), 0, (operation * 10, -1)),))


@pytest.mark.parametrize("kind", ["loads", "background_loads", "stores"])
@pytest.mark.parametrize("held", ["right", "wrong", "none"])
def test_a_worker_copies_only_under_the_adapter_that_the_plan_names(kind: str, held: str) -> None:
    manager = Manager() if held == "none" else Manager(adapter(1, 1 if held == "right" else 2))
    side = WorkerSide(None, SimpleNamespace(speculative_config=None), None)  # type: ignore[arg-type]
    side.worker = worker = Recorded()  # type: ignore[assignment]
    side.adapters = LoadedAdapters(0, [manager])  # type: ignore[list-item]
    digest = LoadedAdapters(0, [Manager(adapter(1, 1))]).read()[1, 0]  # type: ignore[list-item]
    plan = Plan(**{kind: [copies("with adapter", 1), copies("without", 2)]})  # type: ignore[arg-type]
    step = StepPlan(plan, {"with adapter": (1, (digest,))})
    context: Any = SimpleNamespace(attn_metadata=None)
    side.begin(step, context) if kind != "stores" else side.end(step)
    left = [one.request_id for one in getattr(worker.plan, kind)]
    if held == "right" or (held == "none" and kind == "background_loads"):  # the engine loads it with the next batch
        assert left == ["with adapter", "without"]
        assert worker.given_up == []
        return
    assert left == ["without"]
    assert worker.given_up == [1]
    assert worker.plan.failed_blocks == ([] if kind == "stores" else [10])
    assert worker.plan.failed_requests == (["with adapter"] if kind == "background_loads" else [])
    assert plan.failed_blocks == []  # the plan belongs to the scheduler, too, where both run in one process
