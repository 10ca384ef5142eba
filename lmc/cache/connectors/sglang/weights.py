"""The weights of this SGLang process, and what all ranks of the engine hold together."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from sglang.srt.distributed import get_tp_group
from torch import distributed, nn

from lmc.cache.connectors.sglang.identity import options_digest
from lmc.cache.connectors.weights import HeldWeights, WeightsReading, name_weights, share_readings
from lmc.errors import ModelError

_FROM_FILES = {"auto", "fastsafetensors", "gguf", "mistral", "npcache", "pt", "safetensors"}


class EngineWeights:
    """Every rank must call start() and changed() when the others do, also one that runs without the cache."""

    def __init__(self, server_args: Any, pool: Any) -> None:  # ServerArgs, KVCache
        self._server_args = server_args
        self._pool = pool
        self._held: HeldWeights | None = None
        self._options = ""
        self.model = ""

    def start(self) -> None:
        """Read all weights for the first time; model is their name. Raises ModelError if some rank cannot."""
        readings = share_readings(self._first_reading, _group())
        self._options = options_digest(self._server_args)
        self.model = self._name(readings)

    def changed(self) -> bool:
        """Read all weights again; the same answer on all ranks. If they have changed, model is their new name."""
        readings = share_readings(self._next_reading, _group())
        if not any(one.changed for one in readings):
            return False
        self.model = self._name(readings)
        return True

    def _first_reading(self) -> WeightsReading:
        group = _group()
        self._held = HeldWeights(_models_beside(self._pool))
        return self._held.read(_source(self._server_args) if group is None or group.rank_in_group == 0 else None)

    def _next_reading(self) -> WeightsReading:
        if self._held is None:
            raise ModelError("this rank has not read its weights")
        return self._held.read()

    def _name(self, readings: list[WeightsReading]) -> str:
        return f"{name_weights(readings)}-{self._options}"


def _group() -> Any:
    """SGLang's tensor-parallel group, if there is one."""
    return get_tp_group() if distributed.is_initialized() else None


def _models_beside(pool: Any) -> list[nn.Module]:
    """The model whose KV is in the pool: that of the model runner, which holds both; the linker interface gives the pool only."""
    models = {}
    for owner in gc.get_referrers(pool):
        values = owner if isinstance(owner, dict) else getattr(owner, "__dict__", {})
        model = values.get("model")
        if isinstance(model, nn.Module) and any(value is pool for value in values.values()):
            models[id(model)] = model
    return list(models.values())


def _source(server_args: Any) -> Path | None:
    """The folder or file that the engine has loaded as it is; None if it made its weights up, or got them elsewhere."""
    if server_args.load_format not in _FROM_FILES:
        return None
    if os.path.exists(server_args.model_path):  # noqa: PTH110  # Path's raises what only this rank may meet
        return Path(server_args.model_path)
    try:
        found = snapshot_download(
            server_args.model_path,
            revision=server_args.revision,
            cache_dir=server_args.download_dir,
            local_files_only=True,
        )
    except (HFValidationError, LocalEntryNotFoundError, OSError):
        return None  # neither a path nor on the hub
    return Path(found)
