"""lmc cache: check stored chunk files, and watch a running cache."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from lmc.cache.tiers.namespaces import NamespaceUse
    from lmc.probe.inspect import Inspection

MOST_PREFIXES = 30  # in the table

app = typer.Typer(help="Check stored chunk files, and watch a running cache.", no_args_is_help=True)


def add_to(parent: typer.Typer) -> None:
    parent.add_typer(app, name="cache")


@app.command()
def inspect(
    files: Annotated[list[Path], typer.Argument(help="Chunk files, or folders of chunk files such as disk.path.")],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object per file and namespace, each on its own line.")
    ] = False,
    auth_key_file: Annotated[Path | None, typer.Option(help="File that contains the auth_key of the chunks.")] = None,
    by_prefix: Annotated[
        bool, typer.Option("--by-prefix", help="Print a table of the prefixes, not a line for each file.")
    ] = False,
) -> None:
    """Check every byte of chunk files, and list the namespaces on disk.

    Exits with 1 if a file is damaged, forged or not a chunk.
    """
    import orjson

    from lmc.cache.config import CacheConfig
    from lmc.cache.tiers.namespaces import list_namespaces
    from lmc.cache.tiers.open import read_auth_key
    from lmc.probe.inspect import find_files, inspect_file
    from lmc.probe.prefixes import prefixes, prefixes_table
    from lmc.report import print_table

    auth_key = read_auth_key(CacheConfig(auth_key_file=auth_key_file))
    damaged = 0
    count = 0
    sound = []
    for path in find_files(files):
        found = inspect_file(path, auth_key)
        count += 1
        damaged += found.problem is not None
        if found.problem is None and by_prefix:
            sound.append(found)
        else:
            typer.echo(_as_json(found) if as_json else _as_text(found))
    if by_prefix and as_json:
        for prefix in prefixes(sound):
            typer.echo(orjson.dumps({**vars(prefix), "first": prefix.first.hex()}).decode())
    elif by_prefix:
        print_table(prefixes_table(prefixes(sound), MOST_PREFIXES))
    for folder in files:
        for namespace in list_namespaces(folder):
            typer.echo(_namespace_as_json(namespace) if as_json else _namespace_as_text(namespace))
    if not as_json:
        typer.echo(f"{count} files, {damaged} damaged")
    if damaged:
        raise typer.Exit(1)


@app.command()
def stats(
    url: Annotated[str, typer.Argument(help="Metrics address that lmc serve printed, such as 127.0.0.1:9400.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and stop.")] = False,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two updates of the table.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print the table once and stop.")] = False,
) -> None:
    """Watch tiers, hit rates, transfers and misses of a running cache. Stop it with Ctrl-C. LMC_ADMIN_TOKEN is the token, if one is set."""
    import os

    import orjson

    from lmc.probe.watch import read_stats, watch

    token = os.environ.get("LMC_ADMIN_TOKEN")
    if as_json:
        typer.echo(orjson.dumps(read_stats(url, token), option=orjson.OPT_INDENT_2).decode())
        return
    watch(url, interval, once, token=token)


def _as_text(found: Inspection) -> str:
    from lmc.units import format_size

    well = "sealed with an auth_key; give --auth-key-file to check it" if found.unchecked else "ok"
    lines = [f"{found.path}: {found.problem or well}"]
    if found.footer is not None:
        footer = found.footer
        lines.append(f"  namespace {footer.namespace}  rank {footer.rank}  key {footer.key.hex()}")
        if footer.parent is not None:
            lines.append(f"  continues {footer.parent.hex()}")
        lines.append(f"  layout {footer.layout}")
        lines.append(f"  payload {format_size(footer.payload_bytes)}  xxh3 {footer.checksum:016x}")
        if footer.coding is not None:
            coding, share = footer.coding, footer.payload_bytes / footer.raw_bytes
            lines.append(f"  {coding.compress} of {coding.element}: {share:.3f} of {format_size(coding.raw_bytes)}")
    return "\n".join(lines)


def _namespace_as_text(one: NamespaceUse) -> str:
    from lmc.units import format_size

    used = (
        "in use"
        if one.open
        else f"last used {datetime.datetime.fromtimestamp(one.used, datetime.UTC):%Y-%m-%d %H:%M} UTC"
    )
    return f"namespace {one.label}: {one.chunks} chunks, {format_size(one.num_bytes)}, {used}"


def _namespace_as_json(one: NamespaceUse) -> str:
    import orjson

    return orjson.dumps(one).decode()


def _as_json(found: Inspection) -> str:
    import orjson

    record: dict[str, object] = {"file": str(found.path), "file_bytes": found.file_bytes, "problem": found.problem}
    record["checked"] = not found.unchecked
    if found.footer is not None:
        footer = found.footer
        record |= {
            "namespace": footer.namespace,
            "rank": footer.rank,
            "key": footer.key.hex(),
            "parent": footer.parent.hex() if footer.parent else None,
            "layout": footer.layout,
            "payload_bytes": footer.payload_bytes,
            "raw_bytes": footer.raw_bytes,
            "ratio": footer.payload_bytes / footer.raw_bytes if footer.raw_bytes else 1.0,
            "compress": footer.coding.compress if footer.coding else "none",
            "element": footer.coding.element if footer.coding else None,
            "xxh3": f"{footer.checksum:016x}",
        }
    return orjson.dumps(record).decode()
