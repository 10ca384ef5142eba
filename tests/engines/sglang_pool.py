"""SGLang's linker on a real pool, called as SGLang's wrapper calls it; there is no scheduler."""

from __future__ import annotations

import warnings
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from tests.services import wait_until

PAGE = 16
LAYERS, HEADS, SIZE = 3, 2, 8
CHUNK_BYTES = PAGE * LAYERS * 2 * HEADS * SIZE * 4


@dataclass
class Request:
    """As much of SGLang's request as the linker looks at."""

    rid: str
    origin_input_ids: array[int]
    linker: Any
    device_pages: int = 0
    output_ids: array[int] = field(default_factory=lambda: array("q"))
    extra_key: str | None = None
    cache_salt: str | None = None
    multimodal_inputs: object = None
    input_embeds: object = None
    positional_embed_overrides: object = None
    custom_params: dict[str, object] | None = None
    customized_info: dict[str, list[Any]] | None = None
    hits: list[int] = field(default_factory=list)

    @property
    def sampling_params(self) -> Any:
        return SimpleNamespace(custom_params=self.custom_params)

    @property
    def prefix_len(self) -> int:
        return self.device_pages * PAGE

    @property
    def hashes(self) -> list[str]:
        from sglang.srt.mem_cache.radix_cache import RadixKey
        from sglang.srt.mem_cache.utils import get_storage_hash_str

        full = len(self.origin_input_ids) // PAGE * PAGE
        key = RadixKey(self.origin_input_ids[:full], self.extra_key, cache_salt=self.cache_salt)
        return list(get_storage_hash_str(key, None, page_size=PAGE))

    @property
    def tail(self) -> list[str]:
        """Pages beyond the device hit; the last token is never matched."""
        return self.hashes[self.device_pages : (len(self.origin_input_ids) - 1) // PAGE]

    def init_next_round_input(self, tree_cache: object, cow_mamba: bool) -> None:
        self.hits = self.linker.lookup(self.rid, [transfer(self.tail)]) if self.tail else []


def transfer(hashes: list[str], pages: list[int] | None = None) -> Any:
    import torch
    from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer

    slots = None
    if pages is not None:
        slots = torch.tensor([page * PAGE + offset for page in pages for offset in range(PAGE)], dtype=torch.int64)
    return PoolTransfer(name=PoolName.KV, keys=hashes, device_indices=slots)


class Engine:
    """One SGLang process: a pool and its linker."""

    def __init__(
        self,
        settings: dict[str, object],
        model: str = "one",
        arguments: dict[str, object] | None = None,
        *,
        runner: bool = True,
        **params: object,
    ) -> None:
        import torch

        from lmc.cache.connectors.sglang import LmcLinker

        defaults = {"host.capacity": "16MiB", "disk.capacity": "64MiB", "metrics.enabled": False, "strict": True}
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
        from sglang.srt.mem_cache.unified_cache.component_type import ComponentType

        self.pool = MHATokenToKVPool(4096, PAGE, torch.float32, HEADS, SIZE, LAYERS, "cpu", False)
        if runner:  # SGLang's ModelRunner, by which the linker finds the model
            self.runner = SimpleNamespace(token_to_kv_pool=self.pool, model=_model_of(model))
        self.linker = LmcLinker(
            SimpleNamespace(
                disaggregation_mode="null",
                dcp_size=1,
                revision=None,
                dtype="float32",
                **{
                    "quantization": None,
                    "model_path": model,
                    "quantization_param_path": None,
                    "load_format": "auto",
                    "download_dir": None,
                    "nnodes": 1,
                    "random_seed": 0,
                    "json_model_override_args": "{}",
                    **(arguments or {}),
                },
            ),
            SimpleNamespace(
                token_to_kv_pool_allocator=SimpleNamespace(get_kvcache=lambda: self.pool),
                attn_tp_cache_group=None,
                tp_cache_group=None,
                attn_cp_size=1,
                **{
                    "page_size": PAGE,
                    "pp_size": 1,
                    "is_eagle": False,
                    "mtp_draft_device_pools": (),
                    "sidecar_draft_device_pools": (),
                    **params,
                },
            ),
            components={ComponentType.FULL},
            extra_config={"settings": {**defaults, **settings}},
            forward_stream=None,
        )

    @property
    def cache(self) -> Any:
        return self.linker._cache

    def arrive(self, tokens: list[int], rid: str = "", **more: Any) -> Request:
        request = Request(rid or f"r{tokens[0]}-{len(tokens)}", array("q", tokens), self.linker, **more)
        self.linker._hold([request], None)
        return request

    def wait(self, request: Request, seconds: float = 10.0) -> None:
        """Rounds of the scheduler until the request may join a batch; then SGLang matches once more."""
        wait_until(lambda: not self.linker._hold([request], None), "the request is held", seconds)
        request.init_next_round_input(None, False)

    def leave(self) -> None:
        """A round with an empty queue."""
        self.linker._hold([], None)

    def load(self, request: Request, pages: list[int]) -> bool:
        """Admission, forward pass and its end."""
        hashes = request.tail[: len(pages)]
        if not self.linker.load(request.rid, [transfer(hashes, pages)]):
            return False
        index = self.linker.start_layer_wise_loading()
        assert index >= 0
        return bool(self.linker.finish_layer_wise_loading(index))

    def offload(self, request: Request, pages: list[int], first: int = 0) -> bool:
        """Insertion of a node with these pages, and the end of its offload."""
        if not self.linker.offload([transfer(request.hashes[first : first + len(pages)], pages)]):
            return False
        wait_until(lambda: self.linker.num_completed_offloads() > 0, "the offload ends")
        return bool(self.linker.pop_completed_offload())

    def serve(self, tokens: list[int], pages: list[int]) -> Request:
        """A prompt that is computed and inserted."""
        request = self.arrive(tokens)
        self.leave()
        assert self.offload(request, pages)
        return request

    def fill(self, pages: list[int], seed: int) -> None:
        import torch

        torch.manual_seed(seed)
        for buffer in (*self.pool.k_buffer, *self.pool.v_buffer):
            for page in pages:
                buffer[page * PAGE : (page + 1) * PAGE] = torch.randn(PAGE, HEADS, SIZE)

    def read(self, pages: list[int]) -> Any:
        import torch

        buffers = (*self.pool.k_buffer, *self.pool.v_buffer)
        return torch.stack([buffer[page * PAGE : (page + 1) * PAGE] for buffer in buffers for page in pages])

    def settle(self) -> None:
        assert self.cache.settle()

    def check_idle(self) -> None:
        """Nothing is pinned, open or remembered."""
        self.leave()
        self.settle()
        directory = self.cache.scheduler.directory
        directory.check()
        assert (directory.num_open, directory.num_pins, self.linker._prompts, self.cache.scheduler._requests) == (
            0,
            0,
            {},
            {},
        )


def _model_of(name: str) -> Any:
    """Stands in for the engine's model, whose weights the linker reads: other weights for each name."""
    from torch import nn

    model = nn.Linear(8, len(name))
    model.weight.data.fill_(float(sum(name.encode())))
    model.bias.data.zero_()
    return model


Start = Callable[..., Engine]


def equal(one: Any, other: Any) -> bool:
    import torch

    return bool(torch.equal(one, other))


def start_engines(monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """A function that starts engines; closes them at the end."""
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SGLang warns about what a CPU lacks while it is imported
        from lmc.cache.connectors.sglang import linker

    monkeypatch.setattr(linker, "watch_queue", lambda hold: None)  # there is no scheduler here
    alone = SimpleNamespace(attn_dp_size=1, attn_dp_rank=0, dp_rank=None, num_dp_ranks=1)
    monkeypatch.setattr(linker, "get_parallel", lambda: alone)  # nor a launcher that publishes it
    engines: list[Engine] = []

    def one(
        model: str = "one",
        params: dict[str, object] | None = None,
        arguments: dict[str, object] | None = None,
        *,
        runner: bool = True,
        **settings: object,
    ) -> Engine:
        named = {key.replace("__", "."): value for key, value in settings.items()}
        engines.append(Engine(named, model, arguments, runner=runner, **params or {}))
        return engines[-1]

    yield one
    for engine in engines:
        engine.linker.close()
