"""What a replay knows of the engine. Every limit is off where no figure is given; then the engine computes one whole prompt at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lmc.errors import ConfigError

if TYPE_CHECKING:
    from lmc.sim.cost import Prefill

DEVICE = "device"  # the engine's own KV space, as a tier


@dataclass(frozen=True)
class Decode:
    """A step takes fixed_s, and for each sequence that decodes sequence_s and context_s for each token before."""

    fixed_s: float = 0.0
    sequence_s: float = 0.0
    context_s: float = 0.0


@dataclass(frozen=True)
class EngineModel:
    """The scheduler of an engine that takes requests in step by step, as vLLM does."""

    max_num_seqs: int = 1  # requests in the batch
    max_num_batched_tokens: int | None = None  # tokens of one step; longer prompts are computed in several
    chunked_prefill: bool = True  # False: a prompt that no longer fits into a step waits for the next one
    kv_tokens: int | None = None  # tokens that the engine's own KV space holds; the device tier
    prefix_cache: bool = True  # the engine finds prefixes in its KV space
    background_copies: bool = False  # loads and stores run beside the steps, as on a GPU; else a step waits for them
    decode: Decode | None = None  # without it, a request ends with its first token

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "kv_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"engine.{name} is {value}; it must be at least 1")

    def step_s(self, prefill: Prefill | None, computed: list[tuple[int, int]], decoding: list[int]) -> float:
        """Seconds of a step. computed: (position, new tokens) of each prompt; decoding: tokens before each sequence that decodes."""
        fixed = seconds = 0.0
        if computed and prefill is not None:
            fixed = prefill.fixed_s
            seconds += sum(prefill.token_s * new + prefill.pair_s * new * (at + new / 2) for at, new in computed)
        if decoding and self.decode is not None:
            fixed = max(fixed, self.decode.fixed_s)
            seconds += self.decode.sequence_s * len(decoding) + self.decode.context_s * sum(decoding)
        return fixed + seconds


WHOLE_PROMPTS = EngineModel()
