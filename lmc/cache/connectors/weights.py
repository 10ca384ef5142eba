"""Names the weights that an engine holds in memory: what it computes with, wherever that was loaded from and however it was converted.

Runs in the process that holds the weights, between two forward passes.
"""

from __future__ import annotations

import gc
import logging
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from blake3 import blake3
from torch import distributed, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lmc.errors import ModelError
from lmc.weights import unchanged_since_start, weights_digest

logger = logging.getLogger(__name__)

_BLOCK_WORDS = 1024  # 64-bit words that a device condenses into one
_PIECE_BLOCKS = 4096  # condensed at once: 32 MiB, and as much again for what is computed from them
_STEP = -0x61C8864680B583EB  # these are SplitMix64's numbers
_MULTIPLIERS = (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)
_OPTIONAL = ("g_idx", "g_idx_sort_indices", "perm", "qzeros", "zero_point", "zp")  # empty where a quantisation has none


@dataclass(frozen=True)
class WeightsReading:
    """What one rank can say of its weights."""

    digest: str  # of all that can be read
    is_complete: bool  # that is everything
    files: str = ""  # digest of the files that they were loaded from as they are, if that is known
    reason: str = ""  # why it isn't
    changed: bool = False  # since the reading before
    token: str = ""  # nobody else's


class HeldWeights:
    """The weights of an engine's models in this process.

    An engine may keep weights where nobody else can read them: on CPUs vLLM packs matrices into memory of its kernels. Such a matrix counts
    as changed when the engine has packed it anew.
    """

    def __init__(self, models: Sequence[nn.Module], *, is_all: bool = True) -> None:
        """is_all: the engine computes with no weights beside those of its ranks' models."""
        self._models = models
        self._is_all = is_all and bool(models)
        self._digest = ""
        self._packed: list[FunctionType] | None = None

    def read(self, source: Path | None = None) -> WeightsReading:
        """Read all weights. source: the folder or file that the engine loaded as it is, for what can't be read in memory."""
        hidden = [module for model in self._models for module in model.modules() if _hides_weights(module)]
        try:
            digest, packed = self._hash(), _packed_weights(hidden)
        except RuntimeError as error:  # torch's word for everything, lack of memory included
            logger.warning("lmc: the weights can't be read in memory: %s", error)
            digest, packed, hidden = "", None, list(self._models)
        same = self._is_all and digest == self._digest and _identical(packed, self._packed)
        self._digest, self._packed = digest, packed
        if self._is_all and not hidden:
            return WeightsReading(digest, True, changed=not same)
        files, reason = _read_files(source)
        return WeightsReading(digest, False, files, reason, not same, secrets.token_hex(16))

    def _hash(self) -> str:
        hasher = blake3(max_threads=blake3.AUTO)
        for model in self._models:
            for name, tensor in (*model.named_parameters(), *model.named_buffers()):
                add_tensor(hasher, name.replace(".base_layer", ""), tensor)  # where LoRA is on, layers are wrapped
        return hasher.hexdigest()[:32]


def share_readings(read: Callable[[], WeightsReading], group: Any) -> list[WeightsReading]:
    """The readings of all ranks of the engine's tensor-parallel group (None: this rank is alone).

    Every rank must call it when one does: the others wait for its reading, also if it has none. Raises what read() raised, and ModelError
    if another rank has none.
    """
    if group is None or group.world_size == 1:
        return [read()]
    reading, failure = None, None
    try:
        reading = read()
    except Exception as error:  # noqa: BLE001  the others wait, whatever it is
        failure = error
    readings: list[WeightsReading | None] = [None] * group.world_size
    distributed.all_gather_object(readings, reading, group=group.cpu_group)
    if failure is not None:
        raise failure
    complete = [one for one in readings if one is not None]
    if len(complete) < len(readings):
        raise ModelError("another rank of this engine cannot read its weights")
    return complete


def name_weights(ranks: Sequence[WeightsReading]) -> str:
    """A name that engines share only if they hold the same weights; if that can't be told, one that nobody else has."""
    digests = (
        ranks[0].digest if len(ranks) == 1 else blake3("".join(one.digest for one in ranks).encode()).hexdigest()[:32]
    )
    if all(one.is_complete for one in ranks):
        return digests
    unsure = next(one for one in ranks if not one.is_complete)
    if unsure.files:
        return f"{digests}-{unsure.files}"
    logger.warning(
        "lmc: no chunks are shared with other starts, as these weights can't be told from others: %s", unsure.reason
    )
    return f"start {unsure.token}"


def find_models(layers: Sequence[nn.Module]) -> list[nn.Module]:
    """The whole models that these layers are part of; no layer knows its model."""
    everything = [one for one in gc.get_objects() if issubclass(type(one), nn.Module) and "_modules" in vars(one)]
    inner = {id(child) for one in everything for child in one.children()}
    models = {}
    for root in (one for one in everything if id(one) not in inner):
        members = {id(module) for module in root.modules()}
        if places := [index for index, layer in enumerate(layers) if id(layer) in members]:
            models[places[0]] = root
    return [model for _, model in sorted(models.items())]


def add_tensor(hasher: blake3, name: str, tensor: torch.Tensor) -> None:
    """Add a tensor's name, shape, type and bytes, wherever they are."""
    wrapper: Any = tensor  # torch has no type for tensors that keep their bytes in others
    if is_traceable_wrapper_subclass(wrapper):
        for inner in wrapper.__tensor_flatten__()[0]:
            add_tensor(hasher, f"{name}.{inner}", getattr(wrapper, inner))
        return
    hasher.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype}:".encode())
    if tensor.is_meta or tensor.numel() == 0:
        return
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    hasher.update((raw if raw.device.type == "cpu" else condense(raw)).numpy().data)


def condense(raw: torch.Tensor) -> torch.Tensor:
    """Bytes on any device, (n,) uint8, as 1/1024 of them on the CPU, and the last incomplete block as it is.

    Each block becomes the sum of what SplitMix64 makes of its words and their places: two that differ agree with a chance of 2^-64.
    """
    whole = len(raw) // (_BLOCK_WORDS * 8) * _BLOCK_WORDS * 8
    words = raw[:whole]
    if words.data_ptr() % 8:
        words = words.clone()
    blocks = words.view(torch.int64).view(-1, _BLOCK_WORDS)
    places = torch.arange(1, _BLOCK_WORDS + 1, dtype=torch.int64, device=raw.device) * _STEP
    sums = [
        _mix(blocks[start : start + _PIECE_BLOCKS] ^ places).sum(dim=1).cpu().view(torch.uint8)
        for start in range(0, len(blocks), _PIECE_BLOCKS)
    ]
    return torch.cat([*sums, raw[whole:].cpu()])


def _mix(words: torch.Tensor) -> torch.Tensor:
    """SplitMix64's last steps, in place. torch shifts with the sign, which the masks take away."""
    for shift, multiplier in zip((30, 27), _MULTIPLIERS, strict=True):
        words ^= (words >> shift) & ((1 << (64 - shift)) - 1)
        words *= multiplier
    words ^= (words >> 31) & ((1 << 33) - 1)
    return words


def _hides_weights(module: nn.Module) -> bool:
    """Whether an engine has taken a weight out of the module to keep it elsewhere."""
    return any(
        weight.numel() == 0 and not name.endswith(_OPTIONAL) for name, weight in module.named_parameters(recurse=False)
    )


def _packed_weights(hidden: Sequence[nn.Module]) -> list[FunctionType] | None:
    """The functions by which modules reach what they hide; packing makes new ones. None: some reach it otherwise."""
    found = []
    for module in hidden:
        functions = [value for value in vars(module).values() if isinstance(value, FunctionType)]
        if not functions:
            return None
        found += functions
    return found


def _identical(ones: list[FunctionType] | None, others: list[FunctionType] | None) -> bool:
    if ones is None or others is None or len(ones) != len(others):
        return False
    return all(one is other for one, other in zip(ones, others, strict=True))


def _read_files(source: Path | None) -> tuple[str, str]:
    """The digest of the files, or why it does not name what was loaded from them."""
    if source is None:
        return "", "they were not loaded from a folder as they are"
    try:
        digest = weights_digest(source)
        if unchanged_since_start(source):
            return digest, ""
        return "", f"files in {source} are newer than this process"
    except (ModelError, OSError) as error:
        return "", str(error)
