"""Reads a cost model from a YAML file. Its prefill may be fitted from a bench report, and a tier's bandwidth read from a probe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import orjson
import yaml

from lmc.errors import ConfigError
from lmc.sim.cost import CostModel, Prefill, TierCost, fit_prefill
from lmc.sim.engine_model import WHOLE_PROMPTS, Decode, EngineModel
from lmc.units import parse_count, parse_seconds, parse_size


def read_cost_model(path: Path) -> CostModel:
    """Read a YAML file of the form that docs/simulating.md shows. Raises ConfigError with the key."""
    try:
        raw = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; give a cost model file") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML ({' '.join(str(error).split())}); repair it") from None
    top = _section(path, "the file", raw, {"prefill", "token_bytes", "tiers", "gpu_dollars_per_hour", "engine"})
    prefill = _section(path, "prefill", top.get("prefill"), {"fixed", "token", "pair", "bench"})
    tiers = {}
    for name, value in _section(path, "tiers", top.get("tiers") or {}, None).items():
        entry = _section(path, f"tiers.{name}", value, {"bandwidth", "probe", "latency", "dollars_per_gib_hour"})
        rate = _probed_rate(path.parent / str(entry["probe"])) if "probe" in entry else _rate(path, str(name), entry)
        price = _amount(path, f"tiers.{name}.dollars_per_gib_hour", entry.get("dollars_per_gib_hour", 0))
        tiers[str(name)] = TierCost(str(name), rate, parse_seconds(entry.get("latency", 0)), price)
    return CostModel(
        _prefill(path, prefill),
        parse_size(top.get("token_bytes", 0)),
        tiers,
        _amount(path, "gpu_dollars_per_hour", top.get("gpu_dollars_per_hour", 0)),
        _engine(path, top["engine"]) if "engine" in top else WHOLE_PROMPTS,
    )


def _engine(path: Path, value: Any) -> EngineModel:  # Any: parsed YAML
    names = {field.name for field in fields(EngineModel)}
    section = _section(path, "engine", value, names)
    given: dict[str, Any] = {}  # Any: fields of an EngineModel
    for name, setting in section.items():
        if name == "decode":
            parts = _section(path, "engine.decode", setting, {"fixed", "sequence", "context"})
            given[name] = Decode(*(parse_seconds(parts.get(part, 0)) for part in ("fixed", "sequence", "context")))
        elif name in ("chunked_prefill", "prefix_cache", "background_copies"):
            if not isinstance(setting, bool):
                raise ConfigError(f"{path}: engine.{name} is {setting!r}; it must be true or false")
            given[name] = setting
        else:
            given[name] = parse_count(str(setting))
    try:
        return EngineModel(**given)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _rate(path: Path, tier: str, entry: Mapping[str, Any]) -> float:  # Any: parsed YAML
    rate = parse_size(str(entry.get("bandwidth", "")).removesuffix("/s"))
    if rate == 0:
        raise ConfigError(f"{path}: tiers.{tier}.bandwidth is 0; write a rate such as 20GB/s")
    return rate


def _probed_rate(file: Path) -> float:
    """Bytes per second of the fastest load in the output of `lmc probe transfer --json`."""
    try:
        rows = orjson.loads(file.read_bytes())["rows"]
        return max(float(row["gb_per_s"]) for row in rows if row["direction"] == "load") * 1e9
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}; give the output of lmc probe transfer --json") from None
    except (ValueError, TypeError, KeyError):
        raise ConfigError(f"{file} is not the output of lmc probe transfer --json; run that again") from None


def _prefill(path: Path, section: Mapping[str, Any]) -> Prefill:  # Any: parsed YAML
    if "bench" in section:
        if len(section) > 1:
            raise ConfigError(f"{path}: prefill.bench is a measurement; remove fixed, token and pair beside it")
        return fit_from_bench(path.parent / str(section["bench"]))
    if not section:
        raise ConfigError(f"{path}: prefill needs token (seconds per token), or bench (a folder that lmc bench wrote)")
    return Prefill(*(parse_seconds(section.get(name, 0)) for name in ("fixed", "token", "pair")))


def fit_from_bench(folder: Path) -> Prefill:
    """Fit the prefill to those requests of a bench report whose hits, if any, came from the engine's own cache. Raises ConfigError."""
    file = folder / "requests.parquet"
    if not file.is_file():
        raise ConfigError(f"{file} is not there; give the folder of a report that lmc bench wrote")
    import pandas

    frame = pandas.read_parquet(file, columns=["arm", "status", "service_ttft_ms", "prompt_tokens", "cached_tokens"])
    frame = frame[(frame["status"] == "ok") & frame["arm"].isin(["none", "engine"]) & (frame["service_ttft_ms"] > 0)]
    cached = frame["cached_tokens"].where(frame["arm"] == "engine", 0).fillna(0)
    return fit_prefill(
        cached.tolist(), (frame["prompt_tokens"] - cached).tolist(), (frame["service_ttft_ms"] / 1e3).tolist()
    )


def _section(path: Path, name: str, value: Any, known: set[str] | None) -> dict[str, Any]:  # Any: parsed YAML
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: {name} is missing or is not a mapping; docs/simulating.md has a complete example")
    for key in value:
        if known is not None and key not in known:
            raise ConfigError(f"{path}: unknown key {key!r} in {name}; there are {', '.join(sorted(known))}")
    return value


def _amount(path: Path, name: str, value: Any) -> float:  # Any: parsed YAML
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise ConfigError(f"{path}: {name} is {value!r}; it must be a number of dollars, 0 or more")
    return float(value)
