"""The help of every command at 80 columns: nothing is cut, every option is explained, and fixed choices are shown."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, get_args

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from lmc.bench.dialect import Api
from lmc.cache.config import CacheConfig
from lmc.cache.policy import POLICIES
from lmc.cache.settings import all_settings
from lmc.cli import app, choices
from lmc.serve.engines import ENGINES
from lmc.sim.formats import FORMATS
from lmc.sim.policies import BOUND
from lmc.sim.router import Routing
from lmc.sim.shown import WINDOWS

# Every option with a fixed set of choices, by its name. What they take is said here by the code that checks them.
CHOICES: dict[str, set[str]] = {
    "--api": set(get_args(Api)),
    "--engine": set(ENGINES),
    "--format": set(FORMATS),
    "--policy": set(POLICIES),
    "--routing": set(get_args(Routing)),
    "--window": set(WINDOWS),
    "--write": set(get_args(CacheConfig.model_fields["write"].annotation)),
}
# A measure without its "as" or "than", and words that stand for nothing: they make a sentence that must be decoded.
UNCLEAR = re.compile(
    r"\bso (many|much|long|often|far|late[r]?)\b|\bfor people\b|\bwhoever\b|\bsomebody\b", re.IGNORECASE
)


# Any: click's commands; typer ships its own copy of click, which cannot be named here.
def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield path, command
    for name, child in getattr(command, "commands", {}).items():
        yield from commands(child, (*path, name))


COMMANDS = list(commands(get_command(app)))
each_command = pytest.mark.parametrize(
    ("path", "command"), COMMANDS, ids=lambda value: "-".join(value) or "lmc" if isinstance(value, tuple) else ""
)


def help_text(path: tuple[str, ...]) -> str:
    result = CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    return result.output


def entry(text: str, option: str) -> str:
    """The lines of one option in a help text."""
    found = re.search(rf"^  (?:-\w, )?{re.escape(option)}\b.*?(?=^  -|\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, f"{option} is not in {text}"
    return " ".join(re.sub(r"-\n +", "-", found[0]).split())


def test_all_commands_are_walked() -> None:
    paths = {path for path, _ in COMMANDS}
    assert {(), ("serve",), ("sim", "run"), ("bench", "compare"), ("cache", "stats"), ("config", "explain")} <= paths


@each_command
def test_no_help_is_cut_at_80_columns(path: tuple[str, ...], command: Any) -> None:
    text = help_text(path)
    usage, _, rest = text.partition("\n")
    assert usage.startswith("Usage:")
    assert not re.search(r"\.\.\.$|…", rest, re.MULTILINE), text
    assert max(map(len, text.splitlines())) <= 80


@each_command
def test_help_is_made_of_sentences(path: tuple[str, ...], command: Any) -> None:
    texts = {"": command.help} | {parameter.name: parameter.help for parameter in command.params}
    for name, text in texts.items():
        assert text and text[0].isupper() and text.rstrip()[-1] in ".)", f"{' '.join(path)} {name}: {text!r}"
        assert not UNCLEAR.search(text), f"{' '.join(path)} {name}: {text!r}"


@each_command
def test_options_show_their_choices(path: tuple[str, ...], command: Any) -> None:
    for parameter in command.params:
        for option in CHOICES.keys() & set(parameter.opts):
            shown = set(re.findall(r"[\w-]+", entry(help_text(path), option)))
            assert CHOICES[option] <= shown, f"{' '.join(path)} {option} does not show {CHOICES[option] - shown}"


def test_no_choice_is_shown_that_does_not_exist() -> None:
    named = (
        choices.APIS,
        choices.ENGINES,
        choices.FORMATS,
        choices.POLICIES,
        choices.ROUTINGS,
        choices.WINDOWS,
        choices.WRITE_MODES,
    )
    assert [set(names) for names in named] == [CHOICES[option] for option in sorted(CHOICES)]
    assert choices.BOUND == BOUND


def test_the_bound_is_shown_where_it_can_be_replayed() -> None:
    assert BOUND in entry(help_text(("sim", "run")), "--policy")


def test_settings_are_explained_in_sentences() -> None:
    assert [setting.key for setting in all_settings() if "Choices: lru" in setting.meaning] == ["policy"]
    for setting in all_settings():
        assert setting.meaning[0].isupper() and setting.meaning[-1] == ".", setting.key
        assert not UNCLEAR.search(setting.meaning), f"{setting.key}: {setting.meaning}"
