"""What lossless compression does to a tier below the host: chunks take less of it, and each copy takes the codec's time besides."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lmc.cache.config import CacheConfig
from lmc.cache.directory import HOST
from lmc.errors import ConfigError
from lmc.sim.cost import CostModel
from lmc.units import format_rate, parse_size

# Of bf16 KV, measured by benchmarks/compression.py: docs/compression.md has those of other numbers.
_MEASURED_RATIO = {"lossless": 0.71, "lossless-max": 0.68}


@dataclass(frozen=True)
class Codec:
    ratio: float = 1.0  # stored bytes / raw bytes
    bytes_per_s: float = float("inf")  # raw bytes, each way

    def stored(self, raw_bytes: int) -> int:
        return round(raw_bytes * self.ratio)

    @property
    def pays_below(self) -> float:
        """Bandwidth in bytes per second below which a compressed chunk is loaded sooner than a raw one."""
        return self.bytes_per_s * (1 - self.ratio)


NO_CODEC = Codec()


def make_codec(ratio: float | None, speed: str | None, compress: str = "lossless") -> Codec:
    """From the options of a command; what is not given is as measured, and infinitely fast. Raises ConfigError."""
    if compress == "none":
        return NO_CODEC
    ratio = _MEASURED_RATIO[compress] if ratio is None else ratio
    if not 0 < ratio <= 1:
        raise ConfigError(f"a compression ratio of {ratio} is not stored bytes / raw bytes; give a number such as 0.71")
    rate = float("inf") if speed is None else float(parse_size(speed.removesuffix("/s")))
    if rate == 0:
        raise ConfigError("a codec that does 0 bytes per second loads nothing; give a speed such as 4GB/s")
    return Codec(ratio, rate)


def codec_of(config: CacheConfig, ratio: float | None, speed: str | None) -> Codec:
    """The codec of the settings' disk. Raises ConfigError."""
    if config.disk.compress == "none" and (ratio is not None or speed is not None):
        raise ConfigError("a compression ratio or speed is given, but disk.compress is none; set it to lossless")
    return make_codec(ratio, speed, config.disk.compress)


def with_codec(cost: CostModel, codec: Codec) -> CostModel:
    """The cost model with the codec in every tier below the host."""
    tiers = {
        name: tier
        if name == HOST
        else replace(
            tier,
            bytes_per_s=1 / (codec.ratio / tier.bytes_per_s + 1 / codec.bytes_per_s),
        )
        for name, tier in cost.tiers.items()
    }
    return replace(cost, tiers=tiers)


def where_it_pays(cost: CostModel | None, codec: Codec) -> list[str]:
    """A line on the room that a chunk takes, one for each tier below the host whose bandwidth is known, and one for all others."""
    room = f"a chunk takes {codec.ratio:.3f} of its size on disk"
    if codec.bytes_per_s == float("inf"):
        return [
            room,
            "compression: no speed of the codec is given, so it is taken to cost no time; measure it with lmc probe codec",
        ]
    below = format_rate(codec.pays_below)
    lines = [room, f"compression: loads become quicker where a tier reads less than {below} per thread"]
    for name, tier in (cost.tiers if cost is not None else {}).items():
        if name == HOST:
            continue
        raw = 1 / tier.bytes_per_s
        change = (codec.ratio * raw + 1 / codec.bytes_per_s) / raw
        verdict = "it pays" if change < 1 else "it only saves room"
        lines.append(
            f"compression on {name} ({format_rate(tier.bytes_per_s)}): a load takes {change:.2f} of its time; {verdict}"
        )
    return lines
