"""Makes torchvision importable beside a CPU build of torch. Read by every Python process that has this folder on its PYTHONPATH.

SGLang's model configurations import torchvision. Its ordinary wheel is built for a CUDA torch: importing it looks up the operators
torchvision::nms and torchvision::qnms, which its compiled half would have defined, and fails. Declaring them is enough; SGLang never calls
them for text models. A stand-in package won't do: transformers then believes that torchvision is there and imports more of it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_kept: list[object] = []  # an operator library is undefined again when it is collected


class _DeclareOperators(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            import torch

            kind: Any = torch.library.Library  # torch leaves it untyped
            library = kind("torchvision", "DEF")
            for name in ("nms", "qnms"):
                library.define(name + _SCHEMA)
            _kept.append(library)
        return None


sys.meta_path.insert(0, _DeclareOperators())
