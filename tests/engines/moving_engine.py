"""vLLM's own scheduler with LmcConnector in both roles, and a model runner that only moves bytes: what each token's KV must be is known.

A pass that reads wrong KV without having said so fails the test. What a pass computes on wrong KV is wrong, too.
"""

from __future__ import annotations

import math
import pickle
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from vllm import SamplingParams
from vllm.config import CUDAGraphMode
from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.model_executor.layers.mamba.checkpoint import compute_mamba_prefill_checkpoints
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    MambaSpec,
    SlidingWindowSpec,
)
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from lmc.cache.connectors.vllm import LmcConnector
from lmc.cache.parts import Group

BLOCK_TOKENS = 16
LAYERS = 2
WIDTH = 4  # elements of a token's KV in one layer
NEW_TOKENS = 4
_PATIENCE = 20.0  # seconds until a run counts as one that hangs
_GARBAGE = 0x6A6A6A6A


def right_values(tokens: list[int]) -> np.ndarray:
    """What each token's KV must be: it depends on all tokens up to it."""
    values, state = np.empty(len(tokens), dtype=np.int64), 17
    for index, token in enumerate(tokens):
        state = (state * 1_000_003 + token + 1) % 2_147_483_629
        values[index] = state
    return values.astype(np.int32)


def first_attended(group: Group, position: int) -> int:
    """The first token before it whose KV the token at this position needs."""
    if group.kind == "window":
        return max(0, position - group.span + 1)
    return position // group.span * group.span if group.kind == "local" else 0


def answer_to(prompt: list[int]) -> list[int]:
    tokens = list(prompt)
    for _ in range(NEW_TOKENS):
        tokens.append(int(right_values(tokens)[-1]) % 400 + 2)
    return tokens[len(prompt) :]


class _Attention(torch.nn.Module):
    """Stands for the layers of a model, which the connector asks how they order the bytes of a page."""

    isa = "vec"


def spec_of(group: Group) -> Any:
    size = group.block_tokens
    head = WIDTH // 2 * BLOCK_TOKENS // size  # all blocks are of one size, as in vLLM
    common = {"block_size": size, "num_kv_heads": 1, "head_size": head, "dtype": torch.float32}
    if group.kind == "window":
        return SlidingWindowSpec(**common, sliding_window=group.span)
    if group.kind == "local":
        return ChunkedLocalAttentionSpec(**common, attention_chunk_size=group.span)
    if group.kind == "state":  # one value; span: whether a state inside a step is kept too, as Mamba 2 does on devices
        inside = {"num_prefill_checkpoint_blocks": 1, "prefill_checkpoint_alignment": 1} if group.span else {}
        return MambaSpec(BLOCK_TOKENS, shapes=((WIDTH,),), dtypes=(torch.int32,), mamba_cache_mode="align", **inside)
    return FullAttentionSpec(**common)


def _in_blocks(kv: torch.Tensor, block_tokens: int) -> torch.Tensor:
    """(layers, blocks, 1, tokens of a block, elements of a token): larger blocks have fewer elements for each token."""
    return kv.view(*kv.shape[:3], block_tokens, WIDTH * BLOCK_TOKENS // block_tokens)


def _state_view(layer: torch.Tensor) -> torch.Tensor:
    """The start of each block, as vLLM registers states: bytes, without the padding."""
    blocks = layer.view(torch.int8)
    stride = blocks.stride(0)
    return blocks.as_strided((len(layer), 1, 1, 4 * WIDTH), (stride, stride, stride, 1), blocks.storage_offset())


class MovingEngine:
    def __init__(
        self,
        vllm_config: Any,
        num_blocks: int = 64,
        num_ranks: int = 1,
        groups: Sequence[Group] = (Group("full", BLOCK_TOKENS),),
    ) -> None:
        """The configuration is for one rank; of more, each computes the same, as if KV heads were replicated.

        groups: kinds of layers, whose blocks share the memory, as vLLM lays them out.
        """
        self.groups = tuple(groups)
        self.names = [[f"layer.{number}.{index}" for index in range(LAYERS)] for number in range(len(groups))]
        names = [name for one in self.names for name in one]
        config = KVCacheConfig(
            num_blocks=num_blocks,
            kv_cache_tensors=[],
            kv_cache_groups=[
                KVCacheGroupSpec(own, spec_of(group)) for own, group in zip(self.names, groups, strict=True)
            ],
        )
        vllm_config.cache_config.num_gpu_blocks = num_blocks
        self.model = torch.nn.ModuleDict({name.replace(".", "_"): _Attention() for name in names})
        layers = dict(zip(names, self.model.values(), strict=True))
        vllm_config.compilation_config.static_forward_context.clear()
        vllm_config.compilation_config.static_forward_context.update(layers)
        self.scheduler = Scheduler(
            vllm_config=vllm_config,
            kv_cache_config=config,
            structured_output_manager=StructuredOutputManager(vllm_config),
            block_size=math.lcm(*(group.block_tokens for group in groups)),
            hash_block_size=BLOCK_TOKENS,
            log_stats=True,
        )
        self.connector: Any = self.scheduler.connector
        self.kv = [torch.zeros(LAYERS, num_blocks, 1, BLOCK_TOKENS, WIDTH) for _ in range(num_ranks)]
        self.workers: list[Any] = []
        for rank in range(num_ranks):
            own = copy(vllm_config)
            own.parallel_config = copy(vllm_config.parallel_config)
            own.parallel_config.rank = rank
            self.workers.append(LmcConnector(own, KVConnectorRole.WORKER, config))
        for worker, kv in zip(self.workers, self.kv, strict=True):
            views = {
                name: _state_view(kv[index]) if group.kind == "state" else _in_blocks(kv, group.block_tokens)[index]
                for own, group in zip(self.names, groups, strict=True)
                for index, name in enumerate(own)
            }
            worker.register_kv_caches(views)
        self.connector.set_xfer_handshake_metadata_pp_aware(
            {(0, rank): worker.get_handshake_metadata() for rank, worker in enumerate(self.workers)}
        )
        self.aggregator = KVOutputAggregator(num_ranks)
        init_none_hash(get_hash_fn_by_name("sha256"))
        self.hasher = get_request_block_hasher(BLOCK_TOKENS, get_hash_fn_by_name("sha256"))
        self.requests: dict[str, Request] = {}
        self.loaded_tokens = 0

    def add(self, name: str, prompt: list[int], **values: Any) -> None:
        sampling = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True, extra_args=values.pop("extra_args", None))
        request = Request(name, prompt, sampling, None, block_hasher=self.hasher, **values)
        self.requests[name] = request
        self.scheduler.add_request(request)

    def abort(self, name: str) -> None:
        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)

    def run(self) -> None:
        """Until nothing is left to do, the cache's own copies included."""
        until = time.monotonic() + _PATIENCE
        while self.scheduler.has_requests():
            if not self.step():
                time.sleep(0.0005)  # all wait for copies
            if time.monotonic() > until:
                waiting = [(name, one.status.name) for name, one in self.requests.items() if not one.is_finished()]
                raise AssertionError(f"requests or copies never ended: {waiting}")

    def step(self) -> int:
        """Returns the number of requests that were computed."""
        output = self.scheduler.schedule()
        plan = pickle.dumps(output.kv_connector_metadata)
        names = [name for one in self.names for name in one]
        reports, sampled, wrong = [], {}, {}
        for rank, worker in enumerate(self.workers):
            metadata = pickle.loads(plan)
            worker.handle_preemptions(metadata)
            report = KVConnectorOutput()
            with self._copies(worker, metadata, report, before=output.has_sync_kv_loads):
                for layer in names:
                    worker.wait_for_layer_load(layer)
                for name, count in output.num_scheduled_tokens.items():
                    wrong[name, rank], sampled[name] = self._compute(name, count, rank)
            reports.append(report)
        computed = list(output.num_scheduled_tokens)
        result = ModelRunnerOutput(
            req_ids=computed,
            req_id_to_index={name: index for index, name in enumerate(computed)},
            sampled_token_ids=[sampled[name] for name in computed],
            logprobs=None,
            prompt_logprobs_dict={},
            pooler_output=[],
        )
        parts = [copy(result) for _ in self.workers]
        for part, report in zip(parts, reports, strict=True):
            part.kv_connector_output = report
        whole = self.aggregator.aggregate(parts)
        invalid = whole.kv_connector_output.invalid_block_ids if whole.kv_connector_output else set()
        for (name, rank), is_wrong in wrong.items():
            told = invalid.intersection(self._table(name, 0))
            assert not is_wrong or told, f"rank {rank} computed {name} on wrong KV, and nobody said so"
        if whole.kv_connector_output is not None:
            stats = whole.kv_connector_output.kv_connector_stats
            assert stats is None or stats.is_empty()
        self.scheduler.update_from_output(output, whole)
        return len(computed)

    @contextmanager
    def _copies(self, worker: Any, metadata: Any, report: KVConnectorOutput, *, before: bool) -> Iterator[None]:
        """The order of vLLM's KVConnectorModelRunnerMixin."""
        worker.bind_connector_metadata(metadata)
        context = SimpleNamespace(attn_metadata={}, cudagraph_runtime_mode=CUDAGraphMode.NONE)
        if before:
            worker.start_load_kv(context)
        yield
        for layer in (name for one in self.names for name in one):
            worker.save_kv_layer(layer, None, None)
        if not before:
            worker.start_load_kv(context)
        worker.wait_for_save()
        results = worker.get_transfer_results(set())
        report.finished_sending, report.finished_recving = results.finished_sending, results.finished_recving
        report.failed_recving = results.failed_recving
        report.invalid_block_ids = worker.get_block_ids_with_load_errors()
        report.kv_connector_stats = worker.get_kv_connector_stats()
        report.kv_cache_events = worker.get_kv_connector_kv_cache_events()
        report.kv_connector_worker_meta = worker.build_connector_worker_meta()
        worker.clear_connector_metadata()

    def _table(self, name: str, group: int) -> list[int]:
        return list(self.scheduler.kv_cache_manager.get_block_ids(name)[group])

    def _compute(self, name: str, count: int, rank: int) -> tuple[bool, list[int]]:
        """Whether the KV before the scheduled tokens is wrong, and what was sampled."""
        request = self.requests[name]
        end = request.num_computed_tokens
        tokens = list(request.all_token_ids)[:end]
        values = right_values(tokens)
        kv, start = self.kv[rank].view(torch.int32), end - count
        filled = torch.arange(start, end)
        tables = [torch.tensor(self._table(name, number)) for number in range(len(self.groups))]
        is_wrong = False
        for number, (group, blocks) in enumerate(zip(self.groups, tables, strict=True)):
            if group.kind == "state":
                if start and not self._move_state(kv, blocks, start, end, int(values[start - 1]) + number):
                    is_wrong = True
                continue
            first = first_attended(group, start)
            seen = torch.arange(first, start)
            size = group.block_tokens
            rows = _in_blocks(kv, size)[:, blocks[seen // size], 0, seen % size]
            is_wrong |= not (rows == torch.from_numpy(values[first:start] + np.int32(number))[None, :, None]).all()
        for number, (group, blocks) in enumerate(zip(self.groups, tables, strict=True)):
            if group.kind == "state":
                self._leave_states(kv, blocks, group, start, end, None if is_wrong else values + np.int32(number))
                continue
            right = torch.from_numpy(values[start:] + np.int32(number))
            new = torch.full((count,), _GARBAGE, dtype=torch.int32) if is_wrong else right
            size = group.block_tokens
            _in_blocks(kv, size)[:, blocks[filled // size], 0, filled % size] = new[None, :, None]
        if end < request.num_tokens:
            return is_wrong, []
        return is_wrong, [int(values[-1]) % 400 + 2]

    @staticmethod
    def _move_state(kv: torch.Tensor, blocks: torch.Tensor, start: int, end: int, right: int) -> bool:
        """As vLLM does before a pass: the state goes from the block of the last token to that of the last new one. Whether it was right."""
        old, new = blocks[(start - 1) // BLOCK_TOKENS], blocks[(end - 1) // BLOCK_TOKENS]
        state = kv[:, old, 0, 0].clone()
        kv[:, new, 0, 0] = state
        return bool((state == right).all())

    def _leave_states(
        self, kv: torch.Tensor, blocks: torch.Tensor, group: Group, start: int, end: int, values: np.ndarray | None
    ) -> None:
        """The state behind the last token and, where the group keeps one inside a step, that behind the last full block."""
        kept = {(end - 1) // BLOCK_TOKENS: end}
        if group.span:
            (offset,), (column,) = compute_mamba_prefill_checkpoints(
                [end], [end - start], BLOCK_TOKENS, BLOCK_TOKENS, 1, False, BLOCK_TOKENS
            )
            if column >= 0 and blocks[column] > 0:
                kept[column] = start + offset
        for column, tokens in kept.items():
            kv[:, blocks[column], 0, 0] = _GARBAGE if values is None else int(values[tokens - 1])

    def close(self) -> None:
        self.scheduler.shutdown()
        for worker in self.workers:
            worker.shutdown()
