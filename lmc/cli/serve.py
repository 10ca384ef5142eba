"""lmc serve: run an engine with the cache on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lmc.cli.choices import ENGINES, POLICIES, WRITE_MODES, listed, metavar


def add_to(parent: typer.Typer) -> None:
    parent.command("serve", context_settings={"allow_extra_args": True, "ignore_unknown_options": False})(serve)


def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Model folder, hub name, or smollm2-135m-instruct (embedded).")],
    engine: Annotated[str, typer.Option(metavar=metavar(ENGINES), help="Engine to run.")] = "vllm",
    host: Annotated[str, typer.Option(help="Address that the engine's API listens on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port that the engine's API listens on.", min=1, max=65535)] = 8000,
    config: Annotated[Path | None, typer.Option(help="YAML file of cache settings.")] = None,
    cache: Annotated[bool, typer.Option("--cache/--no-cache", help="Run the engine with lmc, or without it.")] = True,
    chunk_tokens: Annotated[
        int | None, typer.Option(help="Tokens per chunk, a multiple of the engine's block size.")
    ] = None,
    policy: Annotated[str | None, typer.Option(help=f"Eviction policy: {listed(POLICIES)}.")] = None,
    host_capacity: Annotated[
        str | None,
        typer.Option(help="Host memory for chunks: a size such as 8GiB, or a share of the free memory such as 25%."),
    ] = None,
    disk_path: Annotated[
        Path | None, typer.Option(help="Folder of the disk tier. Without it, there is no disk tier.")
    ] = None,
    disk_capacity: Annotated[str | None, typer.Option(help="Size limit of the disk tier, such as 1TiB.")] = None,
    redis_url: Annotated[
        str | None, typer.Option(help="Address of the Redis tier. Without it, there is no Redis tier.")
    ] = None,
    node: Annotated[
        Path | None,
        typer.Option(
            help="Socket of an lmc node, whose cache the engine then uses. Without it, the engine has its own."
        ),
    ] = None,
    write: Annotated[
        str | None,
        typer.Option(
            metavar=metavar(WRITE_MODES),
            help="When chunks are written to lower tiers: at once, when the host evicts them, or when they are touched again.",
        ),
    ] = None,
    record: Annotated[Path | None, typer.Option(help="Record every lookup in this file, for lmc sim.")] = None,
    metrics_port: Annotated[
        int | None, typer.Option(help="Port of the metrics endpoint, by default a free one.")
    ] = None,
    strict: Annotated[
        bool | None, typer.Option("--strict", help="Refuse to start when a tier cannot be opened.")
    ] = None,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print the settings in force and stop.")] = False,
    ready_timeout: Annotated[
        float, typer.Option(help="Stop if the engine does not answer within this number of seconds.")
    ] = 900.0,
    ready_file: Annotated[
        Path | None,
        typer.Option(help="Write the ready line to this file too. The file is there only while the engine answers."),
    ] = None,
) -> None:
    """Run an engine with the cache on.

    Arguments after -- go to the engine. Any setting can also come from --config or from an LMC_* variable.
    """
    import os

    from lmc.cache.settings import load_settings
    from lmc.cli.config import print_settings
    from lmc.serve.start import ServeOptions
    from lmc.serve.start import serve as run

    settings = load_settings(
        config,
        os.environ,
        {
            "chunk_tokens": chunk_tokens,
            "policy": policy,
            "host.capacity": host_capacity,
            "disk.path": disk_path,
            "disk.capacity": disk_capacity,
            "redis.url": redis_url,
            "node": node,
            "write": write,
            "record": record,
            "metrics.port": metrics_port,
            "strict": strict,
        },
    )
    if print_config:
        print_settings(settings)
        return
    options = ServeOptions(model, engine, host, port, cache, ready_timeout, tuple(context.args), ready_file)
    raise typer.Exit(run(options, settings.config, typer.echo))
