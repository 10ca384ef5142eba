"""The cost model: seconds of prefill and of loading, time to first token, and money.

The prefill of `new` tokens after `position` cached ones costs fixed + token * new + pair * new * (position + new / 2) seconds; the last two
terms are the linear layers and the attention to all earlier tokens. Loading from a tier costs its latency plus bytes over bandwidth. Times
are those of one request on an idle engine: the model has no queueing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from lmc.cache.directory.prefill import amounts_of, fit
from lmc.errors import ConfigError
from lmc.sim.engine_model import WHOLE_PROMPTS, EngineModel
from lmc.sim.trace import Float64, Int64, Trace

_GIB = 1024**3


@dataclass(frozen=True)
class Prefill:
    fixed_s: float
    token_s: float
    pair_s: float

    def seconds(self, position: Int64, new: Int64) -> Float64:
        pairs = new * (position + new / 2)
        return self.fixed_s * (new > 0) + self.token_s * new + self.pair_s * pairs

    def saved(self, hit_tokens: int, hit_squares: int) -> float:
        """Seconds that hits save. The arguments are sums over the requests: of their hit tokens, and of the squares of these."""
        return self.token_s * hit_tokens + self.pair_s * hit_squares / 2


@dataclass(frozen=True)
class TierCost:
    name: str
    bytes_per_s: float
    latency_s: float = 0.0
    dollars_per_gib_hour: float = 0.0

    def seconds(self, num_bytes: Float64) -> Float64:
        return np.where(num_bytes > 0, self.latency_s + num_bytes / self.bytes_per_s, 0.0)


@dataclass(frozen=True)
class CostModel:
    prefill: Prefill
    token_bytes: int  # KV bytes per token over all ranks
    tiers: Mapping[str, TierCost] = field(default_factory=dict)
    gpu_dollars_per_hour: float = 0.0
    engine: EngineModel = WHOLE_PROMPTS

    def tier(self, name: str) -> TierCost:
        if name not in self.tiers:
            raise ConfigError(f"the cost model has no tier {name!r}; add it under `tiers`, with its bandwidth")
        return self.tiers[name]

    def serve(self, input_tokens: Int64, loaded: Mapping[str, Int64]) -> tuple[Float64, Float64]:
        """(num_requests,) seconds to the first token, and the seconds of prefill in them. `loaded` has tokens by tier, fastest first.

        A request loads its prefix up to the tier after which loading more takes longer than computing it.
        """
        most = np.maximum(input_tokens - 1, 0)  # the last token is always computed
        hits = np.zeros_like(input_tokens)
        waited = np.zeros(input_tokens.size)
        computed = self.prefill.seconds(hits, input_tokens)
        ttft = computed
        for name, tokens in loaded.items():
            hits = np.minimum(hits + tokens, most)
            waited = waited + self.tier(name).seconds(tokens.astype(np.float64) * self.token_bytes)
            rest = self.prefill.seconds(hits, input_tokens - hits)
            better = waited + rest < ttft
            ttft = np.where(better, waited + rest, ttft)
            computed = np.where(better, rest, computed)
        return ttft, computed

    def break_even_tokens(self, name: str) -> int | None:
        """The shortest prefix that the tier loads faster than the engine computes it; None if there is none below 16 Mi tokens."""
        tier = self.tier(name)
        lengths = np.unique(np.geomspace(1, 2**24, 4096).astype(np.int64))
        gain = self.prefill.token_s * lengths + self.prefill.pair_s * lengths**2.0 / 2
        gain -= tier.seconds(lengths.astype(np.float64) * self.token_bytes)
        worth = np.flatnonzero(gain > 0)
        if worth.size == 0:
            return None
        low = int(lengths[worth[0] - 1]) + 1 if worth[0] else 1
        for length in range(low, int(lengths[worth[0]])):
            saved = self.prefill.token_s * length + self.prefill.pair_s * length**2 / 2
            if saved > tier.latency_s + length * self.token_bytes / tier.bytes_per_s:
                return length
        return int(lengths[worth[0]])

    def rent(self, sizes_bytes: Mapping[str, float], hours: float) -> float:
        """Dollars for tiers of these sizes during these hours."""
        return sum(self.tier(name).dollars_per_gib_hour * size / _GIB * hours for name, size in sizes_bytes.items())


def fit_prefill(position: Sequence[int], new: Sequence[int], seconds: Sequence[float]) -> Prefill:
    """Fit by least squares of the relative errors, with no negative coefficient. Raises ConfigError for fewer than three measurements."""
    if len(seconds) < 3:
        raise ConfigError(f"{len(seconds)} measured prefills are too few for a cost model; measure at least 3")
    amounts = np.array([amounts_of([part]) for part in zip(position, new, strict=True)])
    best = fit(amounts, np.asarray(seconds, float), np.ones(len(seconds)))
    return Prefill(*(float(value) for value in best))


def known_token_bytes(trace: Trace, given: int, cost: CostModel | None) -> int:
    """KV bytes per token: the given ones, else those of the trace, else those of the cost model, else 0."""
    return given or trace.block_bytes // trace.block_tokens or (cost.token_bytes if cost else 0)
