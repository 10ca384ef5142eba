"""Find the cache's settings, merge them by precedence, and explain them. lmc.cache.config declares them."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from lmc.cache.config import CacheConfig
from lmc.cache.sections import LEAST_CAPACITY, Section
from lmc.errors import ConfigError

logger = logging.getLogger(__name__)

# Variables that start with LMC_ and are not settings of the cache.
_OTHER_VARIABLES = {"LMC_BENCH_API_KEY", "LMC_VENV", "LMC_DATA_DIR", "LMC_CACHE_HOME", "LMC_LOG_LEVEL"}

# What Kubernetes sets in every container beside a service named lmc or lmc-redis: LMC_REDIS_SERVICE_HOST, LMC_REDIS_PORT=tcp://10.0.0.7:6379,
# LMC_REDIS_PORT_6379_TCP_ADDR and so on. Some are named like settings.
_SERVICE_NAME = re.compile(r"\w+_SERVICE_(HOST|PORT(_\w+)?)|\w+_PORT_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?")
_SERVICE_VALUE = re.compile(r"(tcp|udp|sctp)://\S*")


@dataclass(frozen=True)
class Setting:
    """One leaf of the schema, such as host.capacity."""

    key: str
    field: FieldInfo

    @property
    def variable(self) -> str:
        return "LMC_" + self.key.replace(".", "_").upper()

    @property
    def secret(self) -> bool:
        extra = self.field.json_schema_extra
        return isinstance(extra, dict) and bool(extra.get("secret"))

    @property
    def choices(self) -> tuple[str, ...]:
        """The values that it may have, if they are few."""
        extra = self.field.json_schema_extra
        names = extra.get("choices") if isinstance(extra, dict) else None
        if isinstance(names, list):
            return tuple(map(str, names))
        return get_args(self.field.annotation) if get_origin(self.field.annotation) is Literal else ()

    @property
    def meaning(self) -> str:
        meaning = " ".join((self.field.description or "").split())
        return f"{meaning} Choices: {', '.join(self.choices)}." if self.choices else meaning


@dataclass(frozen=True)
class Settings:
    config: CacheConfig
    origins: Mapping[str, str]  # key -> "flag --x", "environment X", "file F" or "default"


def all_settings(section: type[Section] = CacheConfig, prefix: str = "") -> Iterator[Setting]:
    """Every leaf of the schema in its order."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from all_settings(field.annotation, f"{prefix}{name}.")
        else:
            yield Setting(prefix + name, field)


def load_settings(
    file: Path | None = None,
    environment: Mapping[str, str] | None = None,
    flags: Mapping[str, object] | None = None,
) -> Settings:
    """Merge file, environment and flags (by dotted key; None means not given). Raises ConfigError."""
    known = {setting.key: setting for setting in all_settings()}
    values: dict[str, tuple[object, str]] = {}
    if file is not None:
        for key, value in _flatten(read_yaml(file), file):
            _require_known(key, known, f"{file}: ")
            _require_unit(key, value, f"{file}: ")
            values[key] = (value, f"file {file}")
    by_variable = {setting.variable: setting.key for setting in known.values()}
    services = []
    for variable, text in sorted((environment or {}).items()):
        if not variable.startswith("LMC_") or variable in _OTHER_VARIABLES:
            continue
        if _is_of_a_service(variable, text, by_variable):
            services.append(variable)
            continue
        if variable not in by_variable:
            raise ConfigError(f"unknown setting {variable} in the environment{_nearest(variable, by_variable)}")
        _require_unit(by_variable[variable], text, f"environment {variable}: ")
        values[by_variable[variable]] = (text or None, f"environment {variable}")
    if services:
        logger.warning(
            "lmc: %s: set by Kubernetes for a service, so no settings; they are ignored", ", ".join(services)
        )
    for key, value in (flags or {}).items():
        if value is not None:
            _require_known(key, known, "")
            values[key] = (value, f"flag --{key.replace('.', '-').replace('_', '-')}")
    return Settings(_validate(values), {key: values[key][1] if key in values else "default" for key in known})


def explain(key: str) -> str:
    """Meaning, choices, default and environment variable of a setting. Raises ConfigError for an unknown key."""
    known = {setting.key: setting for setting in all_settings()}
    _require_known(key, known, "")
    setting = known[key]
    return f"{key}\n  {setting.meaning}\n  default: {show(setting.field.default)}\n  environment: {setting.variable}"


def markdown() -> str:
    """All settings as a Markdown page, which is docs/configuration.md."""
    lines = [
        "# Settings",
        "",
        "A flag of `lmc serve` overrides the environment, the environment overrides the YAML file, and the file overrides the default.",
        "An unknown key or a bad value is an error. `lmc config check FILE` checks a file and prints the settings in force;",
        "`lmc serve MODEL --print-config` does the same for a command line. Both show where each value came from.",
        "",
        "Write sizes as 8GiB or 512 MB, and durations as 10ms, 1.5s or 2h. `lmc config explain --markdown` writes this page.",
    ]
    section = None
    for setting in all_settings():
        head = setting.key.rpartition(".")[0]
        if head != section:
            section = head
            lines += ["", f"## {head or 'The cache'}", ""]
            if head:
                lines += [f"{CacheConfig.model_fields[head].description}", ""]
            lines += ["| setting | default | meaning | environment |", "| --- | --- | --- | --- |"]
        default = show(setting.field.default).replace("|", "\\|")
        lines.append(f"| `{setting.key}` | {default} | {setting.meaning} | `{setting.variable}` |")
    return "\n".join(lines) + "\n"


def show(value: object) -> str:
    """A value as it would stand in a YAML file."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)


def value_of(config: CacheConfig, key: str) -> object:
    """The value at a dotted key."""
    value: object = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def read_yaml(file: Path) -> dict[str, object]:
    try:
        content = yaml.safe_load(file.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is not YAML{_where(error)}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{file} must hold a mapping of settings, not a {type(content).__name__}")
    return content


def _flatten(tree: Mapping[str, object], file: Path, prefix: str = "") -> Iterator[tuple[str, object]]:
    sections = {key.rpartition(".")[0] for key in (setting.key for setting in all_settings())}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if key not in sections:
            yield key, value
        elif isinstance(value, dict):
            yield from _flatten(value, file, f"{key}.")
        elif value is not None:
            raise ConfigError(f"{file}: {key} must be a mapping of settings, not a {type(value).__name__}")


def _where(error: yaml.YAMLError) -> str:
    """Without the line itself, which may hold a password."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or "it cannot be read"
    return f": {problem}" if mark is None else f": line {mark.line + 1}, column {mark.column + 1}: {problem}"


def _is_of_a_service(variable: str, text: str, settings: Mapping[str, str]) -> bool:
    if variable.endswith("_PORT") and _SERVICE_VALUE.fullmatch(text):
        return True
    return variable not in settings and _SERVICE_NAME.fullmatch(variable) is not None


def _require_known(key: str, known: Mapping[str, object], where: str) -> None:
    if key not in known:
        sections = {name.rpartition(".")[0] for name in known} - {""}
        raise ConfigError(f"{where}unknown setting {key!r}{_nearest(key, [*known, *sections])}")


def _require_unit(key: str, value: object, where: str) -> None:
    """A capacity of so few bytes was meant in another unit."""
    if key.endswith(".capacity") and str(value).isdigit() and 0 < int(str(value)) < LEAST_CAPACITY:
        raise ConfigError(
            f"{where}{key}: {value} is {value} bytes, which hold no chunk; write a unit, as in {value}GiB"
        )


def _nearest(name: str, known: Iterable[str]) -> str:
    """What all names begin with says nothing about what was meant."""
    shown = {other.removeprefix("LMC_"): other for other in known}
    close = difflib.get_close_matches(name.removeprefix("LMC_"), list(shown), n=1, cutoff=0.6)
    return f"; did you mean {shown[close[0]]}?" if close else "; `lmc config explain` lists all"


def _validate(values: Mapping[str, tuple[object, str]]) -> CacheConfig:
    tree: dict[str, object] = {}
    for key, (value, _) in values.items():
        node = tree
        *path, leaf = key.split(".")
        for part in path:
            child = node.setdefault(part, {})
            assert isinstance(child, dict)
            node = child
        node[leaf] = value
    try:
        return CacheConfig.model_validate(tree)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"] if isinstance(part, str))
        while key and key not in values and "." in key:
            key = key.rpartition(".")[0]
        message = str(first["msg"]).removeprefix("Value error, ")
        origin = f" ({values[key][1]})" if key in values else ""
        raise ConfigError(f"{key or 'settings'}{origin}: {message}") from None
