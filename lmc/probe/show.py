"""Renders the result of `lmc probe`: a table and a plot of the measured rates beside the machine's limit."""

from __future__ import annotations

from lmc.probe.transfer import WINDOW_BYTES, Probe
from lmc.report import Column, Figure, Table, new_axes, to_figure
from lmc.units import format_size


def transfer_table(probe: Probe) -> Table:
    columns = [
        Column("direction"),
        Column("piece"),
        Column("backend"),
        Column("rate", "GB/s", 1),
        Column("limit", "GB/s", 1),
        Column("share", "%", 0),
    ]
    rows = [
        (row.direction, format_size(row.piece_bytes), row.backend, row.gb_per_s, row.limit_gb_per_s, row.share * 100)
        for row in sorted(probe.rows, key=lambda row: (row.direction != "store", row.piece_bytes))
    ]
    limit = (
        f"memcpy of {format_size(WINDOW_BYTES)} by one thread"
        if probe.device == "cpu"
        else "one copy by the bare copy engine"
    )
    note = f"limit: {limit}, measured by turns with the backend; share: median of the turns."
    missing = "; ".join(f"{name} ({reason})" for name, reason in probe.absent.items())
    note += f" Not measured: {missing}." if missing else ""
    return Table(f"Transfers on {probe.device} ({probe.machine})", columns, rows, note)


def transfer_figure(probe: Probe) -> Figure:
    """Plot the rate over the piece size: one plot for each direction, one line for each backend, and the limit as a dashed line."""
    directions = ("store", "load")
    picture, axes = new_axes(columns=len(directions), width=5.2)
    for axis, direction in zip(axes, directions, strict=True):
        rows = [row for row in probe.rows if row.direction == direction]
        for backend in dict.fromkeys(row.backend for row in rows):
            own = sorted((row.piece_bytes, row.gb_per_s) for row in rows if row.backend == backend)
            axis.plot([size for size, _ in own], [rate for _, rate in own], marker="o", markersize=3.5, label=backend)
        limits: dict[int, list[float]] = {}
        for row in rows:
            limits.setdefault(row.piece_bytes, []).append(row.limit_gb_per_s)
        means = sorted((size, sum(rates) / len(rates)) for size, rates in limits.items())
        axis.plot([size for size, _ in means], [rate for _, rate in means], "--", color="#2b2b2b", label="limit")
        axis.set_xscale("log", base=2)
        sizes = [size for size, _ in means]
        axis.set_xticks(sizes[::2], [format_size(size).replace(".0", "") for size in sizes[::2]])
        axis.set_ylim(bottom=0)
        axis.set_title(f"{direction}: {'blocks to slots' if direction == 'store' else 'slots to blocks'}", loc="left")
        axis.set_xlabel("piece")
        axis.set_ylabel("GB/s")
        axis.legend(frameon=False)
    return to_figure(
        picture,
        f"Transfer rate on {probe.device}",
        "Scattered pieces on the engine's side, medians; the dashed line is the limit.",
    )
