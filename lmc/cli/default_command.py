"""A command group whose first argument may also be a file: `lmc sim TRACE` runs the default verb, `lmc sim tune TRACE` another one."""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup


class DefaultCommandGroup(TyperGroup):
    """Runs the sub-command called "run" when the first argument names no sub-command."""

    default = "run"

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        # ctx is click's context; typer ships its own copy of click, which cannot be named here.
        if args and args[0] not in self.commands and args[0] not in ("--help", "-h"):
            args = [self.default, *args]
        return super().parse_args(ctx, args)
