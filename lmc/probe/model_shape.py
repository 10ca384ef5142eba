"""What a model keeps of each token, by KV group: the groups that vLLM would make of its layers, from its checkpoint's configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lmc.cache.parts import Group, Kind
from lmc.cache.shape import ModelShape
from lmc.errors import ConfigError
from lmc.report import Column, Table, to_json, write_file
from lmc.units import format_size

_KINDS: dict[str, tuple[Kind, str]] = {  # of a layer, and what its span is called
    "full_attention": ("full", ""),
    "sliding_attention": ("window", "sliding_window"),
}
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1}
_FEW_MORE = 1.5  # vLLM fills up groups rather than splitting a kind that has hardly more layers than another


def probe_shape(model: Path, block_tokens: int, dtype: str = "auto") -> ModelShape:
    """model: a folder with config.json. dtype: of the KV, one of _BYTES; auto: the checkpoint's.

    Raises ConfigError for a model of which this is not known.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model).get_text_config()
    number = int(config.num_hidden_layers)
    kinds = list(getattr(config, "layer_types", None) or _without_types(config, model) * number)
    if unknown := sorted(set(kinds) - set(_KINDS)):
        raise ConfigError(f"{model}: lmc does not describe layers of the kind {', '.join(unknown)} yet")
    if "full_attention" not in kinds:
        raise ConfigError(f"{model}: every layer has a window; such a model is not cached")
    heads = int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    size = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    layer_bytes = 2 * heads * size * _element_bytes(config, dtype, model) * block_tokens
    counts = {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
    groups = [
        (Group(_KINDS[kind][0], block_tokens, int(getattr(config, _KINDS[kind][1], 0) or 0)), layers * layer_bytes)
        for kind, layers in split_layers(counts)
    ]
    groups.sort(key=lambda one: one[0].kind != "full")  # the spine first; the others keep their order
    if len(groups) > 1 and groups[1][0].kind == "full":
        raise ConfigError(f"{model}: several groups of layers keep all tokens; such a model is not cached")
    return ModelShape(tuple(group for group, _ in groups), tuple(num_bytes for _, num_bytes in groups))


def shape_table(shape: ModelShape, name: str) -> Table:
    columns = [Column("group"), Column("kind"), Column("window", "tokens"), Column("tokens per block")]
    rows = [
        [number, group.kind, group.span or None, group.block_tokens, format_size(size)]
        for number, (group, size) in enumerate(zip(shape.groups, shape.block_bytes, strict=True))
    ]
    return Table(f"KV groups of {name}", [*columns, Column("KV of a block")], rows, "Over all ranks.")


def write_shape(shape: ModelShape, file: Path) -> None:
    """Raises ConfigError."""
    write_file(file, to_json(shape.to_json()))


def split_layers(counts: dict[str, int]) -> list[tuple[str, int]]:
    """Kinds of layers with their numbers, split into groups of about one size, as vLLM does."""
    least, most = min(counts.values()), max(counts.values())
    size = most if most < least * _FEW_MORE else least
    return [
        (kind, len(range(first, layers, number)))
        for kind, layers in counts.items()
        for number in [-(-layers // size)]
        for first in range(number)
    ]


def _without_types(config: Any, model: Path) -> list[str]:  # Any: of transformers
    """The one kind of all layers, for a configuration that does not name kinds."""
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return ["sliding_attention"]
    if any(getattr(config, name, None) for name in ("attention_chunk_size", "mamba_d_state", "full_attn_idxs")):
        raise ConfigError(f"{model}: lmc does not describe the layers of this model yet")
    return ["full_attention"]


def _element_bytes(config: Any, dtype: str, model: Path) -> int:
    name = str(config.dtype).removeprefix("torch.") if dtype == "auto" else dtype
    if name not in _BYTES:
        raise ConfigError(f"{model}: the KV's type is not known ({name}); give --dtype {' or '.join(_BYTES)}")
    return _BYTES[name]
