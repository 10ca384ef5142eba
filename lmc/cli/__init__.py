"""The lmc command: one file per sub-command, no logic. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import Annotated, NoReturn

import typer

import lmc
from lmc.cli import bench, cache, config, data, doctor, metrics, node, probe, serve, sim
from lmc.errors import LmcError

app = typer.Typer(
    name="lmc",
    help="Cache the KV of prompts for LLM serving engines, and measure and predict what that gains.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
serve.add_to(app)
node.add_to(app)
bench.add_to(app)
sim.add_to(app)
probe.add_to(app)
cache.add_to(app)
config.add_to(app)
metrics.add_to(app)
data.add_to(app)
doctor.add_to(app)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lmc {lmc.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def _end(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)


def main() -> None:
    """Run the command; an LmcError becomes one line and its exit code. After SIGTERM it still stops the engines it has started."""
    signal.signal(signal.SIGTERM, _end)
    if (
        getattr(lmc, "DISTRIBUTION", None) is None
    ):  # PyPI's lmc has the same import name, and has overwritten a file of this one
        typer.echo(
            "lmc: another project called lmc is installed over this one; "
            "pip uninstall lmc && pip install --force-reinstall --no-deps lmc-kv",
            err=True,
        )
        sys.exit(1)
    try:
        app()
    except LmcError as error:
        typer.echo(f"lmc: {error}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        typer.echo("lmc: interrupted", err=True)
        sys.exit(130)
