"""Which of SGLang's options decide the bytes of a chunk, beside the weights and the pool."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from blake3 import blake3

from lmc.cache.connectors.positions import LONG_ROPE, rope_kinds
from lmc.errors import ConfigError


def options_digest(server_args: Any) -> str:  # ServerArgs
    """The values in force; of the file with KV scales its content. Raises ConfigError when KV depends on more than its tokens, OSError."""
    folder, overrides = Path(server_args.model_path), json.loads(server_args.json_model_override_args or "{}")
    config = json.loads((folder / "config.json").read_text()) if (folder / "config.json").is_file() else {}
    if LONG_ROPE & {*rope_kinds(config), *rope_kinds(overrides)}:
        raise ConfigError(
            "LongRoPE is not supported on SGLang, which encodes a prompt's positions by the longest prompt of the batch; "
            "run it with --no-cache, or on vLLM"
        )
    scales = server_args.quantization_param_path
    in_force = {
        "overrides": overrides,
        "quantization": server_args.quantization,
        "scales": blake3(Path(scales).read_bytes()).hexdigest() if scales else None,
        "seed of random weights": server_args.random_seed if server_args.load_format == "dummy" else None,
    }
    return blake3(json.dumps(in_force, sort_keys=True).encode()).hexdigest()[:32]
