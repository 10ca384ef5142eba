"""The command that starts an engine, and the settings that travel in it. The builders for vLLM and SGLang share this module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lmc.cache.config import CacheConfig
from lmc.cache.settings import all_settings, value_of


@dataclass(frozen=True)
class EngineCommand:
    arguments: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)  # added to the parent's
    health_path: str | None = "/health"  # None: it serves no requests itself
    stop_seconds: float = 20.0  # until a stop becomes a kill


def open_settings(config: CacheConfig) -> dict[str, object]:
    """Return the connector's settings by dotted key, as JSON values. Secrets are left out."""
    values = {setting.key: value_of(config, setting.key) for setting in all_settings() if not setting.secret}
    return {key: str(item) if isinstance(item, Path) else item for key, item in values.items() if item is not None}


def secrets(config: CacheConfig | None) -> dict[str, str]:
    """Return the secret settings as environment variables, because every user of the machine can read a command line."""
    if config is None:
        return {}
    values = {setting.variable: value_of(config, setting.key) for setting in all_settings() if setting.secret}
    return {variable: str(item) for variable, item in values.items() if item is not None}
