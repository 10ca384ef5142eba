"""lmc config: explain the settings and check a file of settings."""

from __future__ import annotations

from collections.abc import Iterator
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
    key: Annotated[
        str | None,
        typer.Argument(help="Name of a setting, such as host.capacity. Without it, all settings are explained."),
    ] = None,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print all settings as a Markdown page.")] = False,
) -> None:
    """Explain one setting, or all of them. Prints its meaning, choices, default and environment variable."""
    from lmc.cache.settings import all_settings, markdown
    from lmc.cache.settings import explain as text

    if as_markdown:
        typer.echo(markdown(), nl=False)
        return
    for name in [key] if key else [setting.key for setting in all_settings()]:
        typer.echo(text(name))


@app.command()
def check(
    file: Annotated[Path, typer.Argument(help="YAML file of cache settings.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check a settings file and print the settings in force. LMC_* environment variables override the file."""
    import os

    import orjson

    from lmc.cache.settings import load_settings
    from lmc.cache.tiers.check import check_meant

    settings = load_settings(file, os.environ)
    check_meant(settings.config)
    if as_json:
        rows = {key: {"value": value, "origin": settings.origins[key]} for key, value in _shown(settings)}
        typer.echo(orjson.dumps(rows, default=str, option=orjson.OPT_INDENT_2).decode())
    else:
        print_settings(settings)


@app.command("from-lmcache")
def from_lmcache(
    file: Annotated[Path, typer.Argument(help="YAML file of LMCache's settings (LMCACHE_CONFIG_FILE).")],
    out: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the settings to this file, for lmc serve --config.")
    ] = None,
) -> None:
    """Translate a settings file of LMCache. What has no counterpart is named in comments."""
    from lmc.cache.from_lmcache import translate
    from lmc.report import write_file

    text = translate(file).yaml()
    if out is None:
        typer.echo(text, nl=False)
    else:
        write_file(out, text)
        typer.echo(f"settings: {out}; check them: lmc config check {out}")


def print_settings(settings: Settings) -> None:
    """Print each setting, its value and where the value came from."""
    from lmc.cache.settings import show

    width = max(map(len, settings.origins))
    for key, value in _shown(settings):
        typer.echo(f"{key:<{width}}  {show(value):<16}  {settings.origins[key]}")


def _shown(settings: Settings) -> Iterator[tuple[str, object]]:
    """Each setting and its value; secrets are only said to be set."""
    from lmc.cache.settings import all_settings, value_of

    for setting in all_settings():
        value = value_of(settings.config, setting.key)
        yield setting.key, "(set)" if setting.secret and value is not None else value
