"""The Triton kernel without a GPU: interpreted on CPU memory, and compiled for GPUs that are not here."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmc.cache.transfer.backends.kernel import FRAGMENT_BYTES, KernelBackend
from lmc.cache.transfer.planner import Descriptors, Direction
from tests.contracts.transfer import DTYPES, ORDERS, Engine, block_tables, check_backend, sglang_engine, vllm_engine

triton = pytest.importorskip("triton", reason="the Triton kernel needs triton")


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> KernelBackend:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return KernelBackend("cpu", programs=3)


@st.composite
def aligned_engines(draw: st.DrawFn) -> Engine:
    dtype = draw(st.sampled_from(DTYPES))
    kind = draw(st.sampled_from([*ORDERS, "sglang", "sglang-mla"]))
    if kind.startswith("sglang"):
        return sglang_engine(dtype, mla=kind == "sglang-mla", dim=16)
    return vllm_engine(kind, dtype, layers=2, content=16)


def test_every_layout_round_trips(backend: KernelBackend) -> None:
    @settings(deadline=None, max_examples=25)
    @given(st.data(), st.integers(0, 2**20))
    def check(data: st.DataObject, seed: int) -> None:
        engine = data.draw(aligned_engines())
        check_backend(backend, engine, data.draw(block_tables(engine.layout.num_blocks)), seed)

    check()


@pytest.mark.parametrize("size", [16, 8192, 8208, FRAGMENT_BYTES - 16, FRAGMENT_BYTES, 2 * FRAGMENT_BYTES + 48])
def test_sizes_around_the_steps_of_the_loop(backend: KernelBackend, size: int) -> None:
    source = torch.randint(0, 256, (size + 64,), dtype=torch.uint8)
    target = torch.zeros(size + 64, dtype=torch.uint8)
    expected = target.clone()
    expected[16 : 16 + size] = source[32 : 32 + size]
    columns = (source.data_ptr() + 32, target.data_ptr() + 16, size)
    backend.execute(Descriptors(*(np.array([value], dtype=np.uint64) for value in columns), Direction.STORE))
    assert torch.equal(target, expected)


def test_what_it_cannot_copy_is_refused(backend: KernelBackend) -> None:
    def copies(src: int, dst: int, size: int) -> Descriptors:
        return Descriptors(*(np.array([16, value], dtype=np.uint64) for value in (src, dst, size)), Direction.STORE)

    assert backend.refuses(copies(16, 32, 48)) == ""
    for odd in (copies(24, 32, 48), copies(16, 40, 48), copies(16, 32, 56)):
        assert backend.refuses(odd) == "addresses and sizes are not multiples of 16 bytes"
    pageable = KernelBackend("cpu", is_pinned=lambda slots: bool((slots < 100).all()))
    assert pageable.refuses(copies(160, 32, 48)) == ""
    assert pageable.refuses(copies(16, 160, 48)) == "the slots are not pinned"


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_compiles_to_16_byte_accesses(capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lmc.cache.transfer.backends import copy_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    tables = dict.fromkeys(("src_table", "dst_table", "size_table"), "*i64")
    kernel = copy_kernel.compiled()
    assert all(parameter.do_not_specialize for parameter in kernel.params if not parameter.is_constexpr)
    source = ASTSource(
        fn=kernel,
        signature={**tables, "count": "i32", "BLOCK": "constexpr"},
        constexprs={(4,): copy_kernel.BLOCK_WORDS},
    )
    binary = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": copy_kernel.NUM_WARPS, "enable_fp_fusion": False},
    )
    assert len(binary.asm["cubin"]) > 1000
    assert f".target sm_{capability}" in binary.asm["ptx"]
    loads = re.findall(r"ld\.global\.cg\S*", binary.asm["ptx"])
    stores = re.findall(r"st\.global\S*", binary.asm["ptx"])
    threads, per_access = copy_kernel.NUM_WARPS * 32, 2
    assert len(loads) == len(stores) == copy_kernel.BLOCK_WORDS // (threads * per_access)
    assert set(loads) == {"ld.global.cg.v2.b64"}
    assert set(stores) == {"st.global.cs.v2.b64"}
