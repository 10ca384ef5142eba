"""Names LoRA adapters by the weights that the engine has loaded, whatever lies in their folders before or after that.

Only a worker sees an adapter's weights. So the scheduler's side asks before it names a request, and a worker compares before it copies.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from blake3 import blake3
from torch import nn
from vllm.lora.model_manager import LoRAModelManager

from lmc.cache.connectors.weights import add_tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm.lora.request import LoRARequest

logger = logging.getLogger(__name__)

Loaded = dict[tuple[int, int], str]  # (adapter, rank) -> digest of the weights that this rank holds


@dataclass
class LoadedAdapters:
    """In a worker: the adapters that the engine holds in this process."""

    rank: int
    managers: Sequence[LoRAModelManager]
    _known: dict[int, tuple[weakref.ref[Any], str]] = field(default_factory=dict)

    @classmethod
    def of(cls, models: Sequence[nn.Module], rank: int) -> LoadedAdapters:
        ours = {id(model) for model in models}
        found = (one for one in gc.get_objects() if issubclass(type(one), LoRAModelManager))
        return cls(rank, [one for one in found if id(one.model) in ours])

    def read(self) -> Loaded:
        """All that are loaded now. Each is hashed once, when it is first seen."""
        held: dict[int, Any] = {}
        for manager in self.managers:
            held.update(manager.list_adapters())
        known = {}
        for number, adapter in held.items():
            before = self._known.get(number)
            known[number] = before if before and before[0]() is adapter else (weakref.ref(adapter), _digest(adapter))
        self._known = known
        return {(number, self.rank): digest for number, (_, digest) in known.items()}


@dataclass
class AdapterNames:
    """In the scheduler's process: what the workers have said."""

    num_ranks: int
    asking: bool = False  # in this step
    _loaded: Loaded = field(default_factory=dict)
    _absent: set[int] = field(default_factory=set)  # no rank had it when they were asked
    _named: dict[int, str] = field(default_factory=dict)
    _sources: dict[int, object] = field(
        default_factory=dict
    )  # what each was loaded from, as far as can be seen from outside

    def known(self, adapter: LoRARequest) -> bool | None:
        """Whether the adapter has a name; None: ask again, when the workers have answered.

        False: the engine has not loaded it yet; it does so for the first batch with the adapter.
        """
        number, source = adapter.lora_int_id, _source(adapter)
        if self._sources.setdefault(number, source) != source:
            self._sources[number] = source
            self._absent.discard(number)
            for rank in range(self.num_ranks):
                self._loaded.pop((number, rank), None)
        if all((number, rank) in self._loaded for rank in range(self.num_ranks)):
            return True
        if number in self._absent:
            return False
        self.asking = True
        return None

    def digests(self, number: int) -> tuple[str, ...]:
        """By rank."""
        return tuple(self._loaded[number, rank] for rank in range(self.num_ranks))

    def name(self, adapter: LoRARequest) -> str:
        """The same wherever the same weights are loaded on as many ranks."""
        name = blake3("".join(self.digests(adapter.lora_int_id)).encode()).hexdigest()[:32]
        if self._named.get(adapter.lora_int_id) != name:
            self._named[adapter.lora_int_id] = name
            logger.info("lmc: the chunks of adapter %r are those of lora %s", adapter.lora_name, name)
        return name

    def learn(self, loaded: Loaded, answers: bool) -> None:
        """answers: it is all that the engine holds, by its workers' reply to a question."""
        self._loaded.update(loaded)
        self._absent -= {number for number, _ in loaded}
        if answers:
            self._absent |= set(self._sources) - {number for number, _ in self._loaded}


def _digest(adapter: Any) -> str:  # vLLM's LoRAModel
    hasher = blake3(max_threads=blake3.AUTO)
    for name, value in sorted(vars(adapter).items()):
        if name != "id":
            _add(hasher, name, value)
    return hasher.hexdigest()[:32]


def _add(hasher: blake3, name: str, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        add_tensor(hasher, name, value)
    elif isinstance(value, Mapping):
        for key in sorted(value):
            _add(hasher, f"{name}.{key}", value[key])
    elif isinstance(value, list | tuple):
        for index, one in enumerate(value):
            _add(hasher, f"{name}.{index}", one)
    elif hasattr(value, "__dict__"):
        _add(hasher, f"{name}:{type(value).__name__}", vars(value))
    else:
        hasher.update(f"{name}={value!r};".encode())


def _source(adapter: LoRARequest) -> object:
    """Changes when the files are replaced from which the engine would load the adapter next."""
    folder = Path(adapter.lora_path).expanduser()
    versions = []
    for file in sorted(folder.glob("adapter_*")):
        with contextlib.suppress(FileNotFoundError):
            stat = file.stat()
            versions.append((stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
    return adapter.lora_name, adapter.lora_path, versions
