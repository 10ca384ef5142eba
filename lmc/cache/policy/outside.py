"""Finds policies that are not part of lmc: FILE.py:SPEC, or an entry point of the group `lmc.policies` by its name."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import sys
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from lmc.cache.policy.base import PolicySpec
from lmc.errors import ConfigError

GROUP = "lmc.policies"
_FILE = ".py:"
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")


def is_file(name: str) -> bool:
    """Whether a policy's name is FILE.py:SPEC."""
    return _FILE in name


def absolute(name: str) -> str:
    """The same name from every folder: that of a file gets its whole path."""
    if not is_file(name):
        return name
    file, _, attribute = name.rpartition(":")
    return f"{Path(file).resolve()}:{attribute}"


def installed() -> dict[str, EntryPoint]:
    """The entry points of installed packages, by the policy's name."""
    return {point.name: point for point in entry_points(group=GROUP)}


@cache
def load_file(name: str) -> PolicySpec:
    """The policy of FILE.py:SPEC, whose name is absolute. The file is run. Raises ConfigError."""
    file, _, attribute = name.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise ConfigError(f"policy {name}: there is no file {path}; write FILE.py:SPEC")
    module_name = f"lmc_policy_{path.stem}_{hashlib.blake2b(file.encode(), digest_size=4).hexdigest()}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # the simulator compiles functions by their module's name
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # a user's code may raise anything
        del sys.modules[module_name]
        raise ConfigError(
            f"policy {name}: {path} cannot be loaded ({type(error).__name__}: {error}); repair it"
        ) from error
    return _checked(name, getattr(module, attribute, None))


@cache
def load_installed(name: str) -> PolicySpec:
    """The policy of an installed package. Raises ConfigError."""
    point = installed()[name]
    try:
        found = point.load()
    except Exception as error:  # a package's code may raise anything
        raise ConfigError(
            f"policy {name}: {point.value} cannot be loaded ({type(error).__name__}: {error}); repair or remove the package"
        ) from error
    return _checked(name, found)


def _checked(name: str, found: object) -> PolicySpec:
    if not isinstance(found, PolicySpec):
        kind = "nothing" if found is None else f"a {type(found).__name__}"
        raise ConfigError(f"policy {name} names {kind}, not a PolicySpec of lmc.cache.policy.base; write FILE.py:SPEC")
    if not _NAME.fullmatch(found.name):
        raise ConfigError(f"policy {name} is called {found.name!r}; use lower-case letters, digits, - and _ only")
    return found
