"""How long it takes to name a model's weights: from files, in memory, and on a device if there is one; with an estimate for 16 GB.

python -m benchmarks.weights --size 2GB
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import nn

from lmc.cache.connectors.weights import HeldWeights
from lmc.units import format_size, parse_size
from lmc.weights import weights_digest

_TARGET = 16_000_000_000
_TURNS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="2GB", help="bytes of weights that are hashed")
    size = parse_size(parser.parse_args().size)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LMC_CACHE_HOME"] = f"{folder}/cache"
        model = Path(folder) / "model"
        model.mkdir()
        file = model / "model.safetensors"
        with file.open("wb") as stream:
            for _ in range(size // (1 << 20)):
                stream.write(os.urandom(1 << 20))
        _show("files, from the page cache", size, lambda: weights_digest(model))
        time.sleep(3)  # a younger file's digest is not kept
        weights_digest(model)
        _show("files whose digest is kept", size, lambda: weights_digest(model))
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        width = 4096
        layers = [
            nn.Linear(width, width, bias=False, dtype=torch.bfloat16, device=device)
            for _ in range(size // (width * width * 2))
        ]
        held = HeldWeights([nn.ModuleList(layers)])
        held.read()
        _show(f"weights in memory, {device}", sum(layer.weight.nbytes for layer in layers), held.read)


def _show(what: str, size: int, work: Callable[[], object]) -> None:
    seconds = []
    for _ in range(_TURNS):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    taken = median(seconds)
    print(f"{what}: {taken:.4f} s for {format_size(size)}; 16 GB: {taken * _TARGET / size:.1f} s")


if __name__ == "__main__":
    main()
