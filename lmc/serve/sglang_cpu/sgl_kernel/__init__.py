"""Stands for SGLang's compiled CPU kernels, which no package index offers and which need AVX-512 or AMX.

With SGLANG_USE_CPU_ENGINE=1 SGLang imports this module and names from it at start. None is called with --attention-backend torch_native and
a dense model; if one ever is, the call says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

__version__ = "0.4.10"  # SGLang refuses older ones
__path__ = []  # a package without files: `import sgl_kernel.x` fails like a missing module


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if name.startswith("__"):
        raise AttributeError(name)

    def absent(*arguments: object, **options: object) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name} is not built on this machine; lmc runs SGLang on CPU without it")

    return absent
