"""lmc sim: replay a trace without an engine."""

from __future__ import annotations

import typer

from lmc.cli.default_command import DefaultCommandGroup

app = typer.Typer(
    cls=DefaultCommandGroup,
    help="Replay a trace through the cache's own logic: hits, capacities, policies.",
    no_args_is_help=True,
)


def add_to(parent: typer.Typer) -> None:
    parent.add_typer(app, name="sim")


@app.command()
def run(trace: str) -> None:
    """Replay TRACE."""
    raise NotImplementedError(trace)


@app.command()
def describe(trace: str) -> None:
    """Describe TRACE."""
    raise NotImplementedError(trace)
