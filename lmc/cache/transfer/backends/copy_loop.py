"""The compiled inner loops of the host backend. Importing it imports Numba; both loops are compiled once per machine and cached on disk.

Large batches go past the caches: their destination is not read soon, and writing it without reading it first saves a third of the memory
traffic (reports/transfer-cpu: 1.2 to 1.5 times memcpy's rate from 64 KiB on). The next piece's first kilobyte is prefetched, because
the processor's own prefetcher starts anew on every scattered piece.
"""

from __future__ import annotations

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils, typing
from numba.extending import intrinsic

from lmc.compiled import compiled

_LINE = 64  # bytes of a cache line, and of one vector store
_STEP = 4 * _LINE
_PREFETCHED_LINES = 16

_word = types.uintp
_memmove = types.ExternalFunction("memmove", typing.signature(_word, _word, _word, _word))

_SIGNATURE = "void(uint64[::1], uint64[::1], uint64[::1])"  # sources, destinations, sizes

# Numba gives these functions their types, so they have none for mypy.


@intrinsic
def _prefetch(typing_context, address):  # type: ignore[no-untyped-def]
    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        pointer, flag = ir.IntType(8).as_pointer(), ir.IntType(32)
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(ir.VoidType(), [pointer, flag, flag, flag]), "llvm.prefetch.p0"
        )
        read, keep, data = ir.Constant(flag, 0), ir.Constant(flag, 3), ir.Constant(flag, 1)
        builder.call(function, [builder.inttoptr(arguments[0], pointer), read, keep, data])
        return context.get_dummy_value()

    return types.void(types.uint64), generate


@intrinsic
def _stream_steps(typing_context, dst, src, num_bytes):  # type: ignore[no-untyped-def]
    """num_bytes, a multiple of _STEP, to dst, a multiple of _LINE, with non-temporal stores."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        word = ir.IntType(64)
        vector = ir.VectorType(word, _LINE // 8).as_pointer()
        dst, src, num_bytes = arguments
        mark = builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)])
        with cgutils.for_range_slice(builder, ir.Constant(word, 0), num_bytes, ir.Constant(word, _STEP)) as (at, _):
            for line in range(0, _STEP, _LINE):
                offset = builder.add(at, ir.Constant(word, line))
                value = builder.load(builder.inttoptr(builder.add(src, offset), vector), align=1)
                stored = builder.store(value, builder.inttoptr(builder.add(dst, offset), vector), align=_LINE)
                stored.set_metadata("nontemporal", mark)
        return context.get_dummy_value()

    return types.void(types.uint64, types.uint64, types.uint64), generate


@intrinsic
def _fence(typing_context):  # type: ignore[no-untyped-def]
    """Non-temporal stores are ordered by nothing else: without this another thread could see the call return before the bytes."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


@compiled(_SIGNATURE)
def copy_loop(src, dst, size):  # type: ignore[no-untyped-def]
    for index in range(len(size)):
        _memmove(dst[index], src[index], size[index])


@compiled(_SIGNATURE)
def stream_loop(src, dst, size):  # type: ignore[no-untyped-def]
    count = len(size)
    for index in range(count):
        if index + 1 < count:
            for line in range(_PREFETCHED_LINES):
                _prefetch(src[index + 1] + types.uint64(line * _LINE))
        source, target, rest = src[index], dst[index], size[index]
        head = min((types.uint64(0) - target) % types.uint64(_LINE), rest)
        if head:
            _memmove(target, source, head)
        rest -= head
        body = rest - rest % types.uint64(_STEP)
        _stream_steps(target + head, source + head, body)
        if rest > body:
            _memmove(target + head + body, source + head + body, rest - body)
    _fence()
