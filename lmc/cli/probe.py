"""lmc probe: measure this machine's hardware, and how much of it lmc uses."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Measure this machine's hardware, and how much of it lmc uses.", no_args_is_help=True)


def add_to(parent: typer.Typer) -> None:
    parent.add_typer(app, name="probe")


@app.command()
def transfer(
    device: Annotated[
        str,
        typer.Option(
            help="Device to measure: cpu, cuda:N, or auto. auto takes the first CUDA device, or the CPU if there is none."
        ),
    ] = "auto",
    sizes: Annotated[
        str | None,
        typer.Option(help="Sizes of the pieces that are copied, separated by commas, such as 8KiB,64KiB,1MiB."),
    ] = None,
    total: Annotated[
        str, typer.Option(help="Bytes of each copy. Choose more than the processor's caches hold.")
    ] = "64MiB",
    repetitions: Annotated[
        int,
        typer.Option(
            min=1,
            help="Number of alternating measurements of the backend and of the hardware limit. The median is reported.",
        ),
    ] = 7,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    csv: Annotated[Path | None, typer.Option(help="Write the rows to this CSV file.")] = None,
    png: Annotated[Path | None, typer.Option(help="Draw the rate over the piece size into this PNG file.")] = None,
) -> None:
    """Measure how fast the transfer backends copy.

    Each piece size is measured in both directions, beside the hardware limit: memcpy, or the GPU's copy engine.
    """
    from lmc import report
    from lmc.probe.show import transfer_figure, transfer_table
    from lmc.probe.transfer import PIECE_SIZES, probe_device
    from lmc.units import parse_size

    pieces = PIECE_SIZES if sizes is None else tuple(parse_size(size) for size in sizes.split(","))
    probe = probe_device(device, pieces, total_bytes=parse_size(total), repetitions=repetitions)
    table = transfer_table(probe)
    if csv is not None:
        report.write_file(csv, report.table_csv(table))
    if png is not None:
        report.write_file(png, transfer_figure(probe).png)
    if json:
        typer.echo(report.to_json(probe).decode(), nl=False)
    else:
        report.print_table(table)


@app.command()
def codec(
    model: Annotated[
        str,
        typer.Option(help="Model whose KV is measured: a folder, a hub name, or smollm2-135m-instruct."),
    ] = "smollm2-135m-instruct",
    chunk: Annotated[
        list[Path] | None,
        typer.Option(help="Chunk file of a disk tier to measure instead of a model. May be repeated."),
    ] = None,
    element: Annotated[
        str | None,
        typer.Option(
            metavar="[bf16|fp16|fp32|fp8]",
            help="What the KV consists of. By default bf16, or what the chunk files say.",
        ),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="Text that the model reads, by default a part of Python's documentation.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=128, help="Tokens that it reads.")] = 1024,
    repetitions: Annotated[int, typer.Option(min=1, help="Measurements of each chunk. The median is reported.")] = 3,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure the ratio and the speed of lossless compression.

    The KV is a model's own, or that of stored chunks. lmc sim replay and lmc sim tune take the ratio and the speed.
    """
    from lmc import report
    from lmc.model import resolve_model
    from lmc.probe.codec import codec_table, model_chunks, probe_codec, read_element, read_text, stored_chunks

    if chunk:
        found, chunks = stored_chunks(chunk)
        probe = probe_codec(f"{len(chunk)} stored chunks", read_element(element, found), chunks, repetitions)
    else:
        kind = read_element(element, "bf16")
        chunks = model_chunks(resolve_model(model), read_text(text), kind, tokens)
        probe = probe_codec(model, kind, chunks, repetitions)
    if json:
        typer.echo(report.to_json(probe).decode(), nl=False)
    else:
        report.print_table(codec_table(probe))


@app.command()
def model(
    model: Annotated[str, typer.Argument(help="A folder, a hub name, or smollm2-135m-instruct.")],
    block_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the engine's block.")] = 16,
    dtype: Annotated[
        str,
        typer.Option(
            metavar="[auto|bfloat16|float16|float32|fp8]", help="Type of the KV. auto takes the checkpoint's."
        ),
    ] = "auto",
    out: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the shape to this file, for lmc sim replay --shape.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Describe which KV a model keeps.

    That is its groups of layers, their windows and their bytes. It reads the configuration only.
    """
    from lmc import report
    from lmc.model import resolve_model
    from lmc.probe.model_shape import probe_shape, shape_table, write_shape

    shape = probe_shape(resolve_model(model), block_tokens, dtype)
    if out is not None:
        write_shape(shape, out)
    if json:
        typer.echo(report.to_json(shape.to_json()).decode(), nl=False)
    else:
        report.print_table(shape_table(shape, model))
