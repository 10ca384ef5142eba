"""lmc config: what the settings are and whether a file is right."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from lmc.cache.settings import Settings

app = typer.Typer(help="Explain and check the cache's settings.", no_args_is_help=True)


def add_to(parent: typer.Typer) -> None:
    parent.add_typer(app, name="config")


@app.command()
def explain(
    key: Annotated[str | None, typer.Argument(help="A setting such as host.capacity; none lists all.")] = None,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="All settings as a page.")] = False,
) -> None:
    """Say what a setting means, its default and its environment variable."""
    from lmc.cache.settings import all_settings, markdown
    from lmc.cache.settings import explain as text

    if as_markdown:
        typer.echo(markdown(), nl=False)
        return
    for name in [key] if key else [setting.key for setting in all_settings()]:
        typer.echo(text(name))


@app.command()
def check(file: Annotated[Path, typer.Argument(help="A YAML file of settings.")]) -> None:
    """Check a file, with the environment's settings on top, and print what would be in force."""
    import os

    from lmc.cache.settings import load_settings

    print_settings(load_settings(file, os.environ))


def print_settings(settings: Settings) -> None:
    """Each setting, its value and where that came from."""
    from lmc.cache.settings import all_settings, show, value_of

    width = max(map(len, settings.origins))
    for setting in all_settings():
        value = value_of(settings.config, setting.key)
        text = "(set)" if setting.secret and value is not None else show(value)
        typer.echo(f"{setting.key:<{width}}  {text:<16}  {settings.origins[setting.key]}")
