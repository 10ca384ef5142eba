"""Read options out of an engine's command line, as argparse would, without knowing all of them."""

from __future__ import annotations

from collections.abc import Sequence


def given(option: str, arguments: Sequence[str]) -> bool:
    """Whether the arguments hold this option."""
    return any(argument == option or argument.startswith(option + "=") for argument in arguments)


def value(option: str, arguments: Sequence[str]) -> str | None:
    """The option's value; the last one counts, as in argparse."""
    found = None
    for index, argument in enumerate(arguments):
        if argument == option and index + 1 < len(arguments):
            found = arguments[index + 1]
        elif argument.startswith(option + "="):
            found = argument.partition("=")[2]
    return found


def count(options: Sequence[str], arguments: Sequence[str]) -> int | None:
    """A whole number under any of the option's names; None when it is not given, or is no such number."""
    for option in options:
        text = value(option, arguments)
        if text is not None:
            return int(text) if text.isdecimal() and len(text) < 10 else None
    return None
