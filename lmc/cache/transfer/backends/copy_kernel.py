"""The Triton kernel that copies descriptors. Importing it imports Triton; compile it with compiled() when a backend is made.

A few programs walk a table of addresses, which may be pinned host memory: the device reads and writes it over the bus. More programs
bring nothing once the bus is full, and take multiprocessors from the model. Reads bypass L1 (.cg), writes are marked as streaming (.cs).
The shape of the loop (persistent programs, 64-bit words, an address table) is that of vLLM's swap_blocks_triton.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from triton.errors import TritonError

__all__ = ["ALIGNMENT", "BLOCK_WORDS", "NUM_WARPS", "TritonError", "compiled", "copy_kernel"]

BLOCK_WORDS = 1024  # 64-bit words per step: 8 KiB, two 16-byte loads for each of 256 threads
NUM_WARPS = 8
ALIGNMENT = 16  # of both addresses and of the size


def copy_kernel(src_table, dst_table, size_table, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    for index in range(tl.program_id(0), count, tl.num_programs(0)):
        src = tl.multiple_of(tl.load(src_table + index).to(tl.pointer_type(tl.int64)), 16)
        dst = tl.multiple_of(tl.load(dst_table + index).to(tl.pointer_type(tl.int64)), 16)
        words = tl.multiple_of(tl.load(size_table + index) // 8, 2)
        for start in range(0, words, BLOCK):
            at = start + tl.arange(0, BLOCK)
            inside = at < words
            tl.store(dst + at, tl.load(src + at, mask=inside, cache_modifier=".cg"), mask=inside, cache_modifier=".cs")


def compiled() -> Any:  # Triton has no types
    """The kernel, or its interpreted form when TRITON_INTERPRET=1 is set now.

    No argument is specialised: a table at another alignment, or of one row, would be compiled anew in the middle of serving.
    """
    return triton.jit(do_not_specialize=["src_table", "dst_table", "size_table", "count"])(copy_kernel)
