"""lmc bench: replay a workload against live engines, arm against arm."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lmc.cli.default_command import DefaultCommandGroup

if TYPE_CHECKING:
    from lmc.bench.progress import Progress
    from lmc.bench.records import Results

app = typer.Typer(
    cls=DefaultCommandGroup,
    help="Replay a workload against live engines, arm against arm: time to first token, hits, verdicts.",
    no_args_is_help=True,
)


def add_to(parent: typer.Typer) -> None:
    parent.add_typer(app, name="bench")


@app.command()
def run(
    workload: Annotated[Path, typer.Argument(help="Workload file (YAML).")],
    out: Annotated[Path | None, typer.Option(help="Folder for the report; default reports/NAME.")] = None,
    model: Annotated[str | None, typer.Option(help="Model instead of the workload's.")] = None,
    arm: Annotated[list[str] | None, typer.Option(help="Run only this arm; may be given several times.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="The workload's small size.")] = False,
    repeat: Annotated[int, typer.Option(min=1, help="Run every arm so often, each time with a new engine.")] = 1,
    scratch: Annotated[Path | None, typer.Option(help="Keep logs and disk tiers in this folder.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, no tables; the exit code tells.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Results as JSON on stdout, progress as JSON lines on stderr.")
    ] = False,
) -> None:
    """Replay WORKLOAD in every arm and write the report."""
    from lmc.bench.progress import JsonLines, Live, Quiet
    from lmc.bench.records import write_results
    from lmc.bench.render import write_report
    from lmc.bench.run import RunOptions, run_workload
    from lmc.bench.workload import load_workload

    plan = load_workload(workload, quick)
    folder = out or Path("reports") / plan.name
    name, model_folder = _model(model or plan.model)

    def options(progress: Progress) -> RunOptions:
        return RunOptions(workload.parent, name, model_folder, arm or [], repeat, scratch=scratch, progress=progress)

    if quiet or as_json:
        results, records = run_workload(plan, options(JsonLines() if as_json else Quiet()))
    else:
        with Live() as live:
            results, records = run_workload(plan, options(live))
    write_results(folder, results, records)
    write_report(folder, results, records)
    if as_json:
        typer.echo((folder / "results.json").read_text())
    elif not quiet:
        _show(results, folder)
    if not results.valid:
        raise typer.Exit(1)


@app.command()
def check(
    workload: Annotated[Path, typer.Argument(help="Workload file (YAML).")],
    model: Annotated[str | None, typer.Option(help="Model instead of the workload's.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="The workload's small size.")] = False,
) -> None:
    """Check WORKLOAD without an engine: schema, data, prompts, and the hits to expect."""
    from lmc.bench.check import check_workload
    from lmc.bench.workload import load_workload
    from lmc.report import print_table

    plan = load_workload(workload, quick)
    _, model_folder = _model(model or plan.model)
    for table in check_workload(plan, model_folder, workload.parent):
        print_table(table)


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="Folder of the run to compare with.")],
    b: Annotated[Path, typer.Argument(help="Folder of the run that is judged.")],
    arm: Annotated[list[str] | None, typer.Option(help="Compare only this arm; may be given several times.")] = None,
    fail_on_worse: Annotated[bool, typer.Option("--fail-on-worse", help="Exit code 1 if anything is worse.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Comparisons as JSON.")] = False,
) -> None:
    """Is run B better than run A? Paired by request, with intervals and verdicts."""
    from lmc.bench.compare import compare_runs
    from lmc.bench.tables import comparisons_table, outputs_table
    from lmc.report import print_table, to_json

    comparisons, outputs = compare_runs(a, b, arm or [])
    differ = [difference for output in outputs for difference in output.differences]
    if as_json:
        typer.echo(to_json({"comparisons": comparisons, "outputs": outputs}).decode())
    else:
        print_table(comparisons_table(comparisons, "B against A"))
        print_table(outputs_table(outputs))
    if differ or (fail_on_worse and any(comparison.verdict == "worse" for comparison in comparisons)):
        raise typer.Exit(1)


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="Folder with results.json and requests.parquet.")]) -> None:
    """Render the report of an earlier run again."""
    from lmc.bench.records import read_records, read_results
    from lmc.bench.render import write_report

    write_report(folder, read_results(folder), read_records(folder))
    typer.echo(f"report: {folder / 'report.html'}")


def _show(results: Results, folder: Path) -> None:
    from lmc.bench.tables import bars_table, brief_table, hits_table, outputs_table
    from lmc.report import print_table

    for table in (brief_table(results), hits_table(results), bars_table(results), outputs_table(results.outputs)):
        if table.rows:
            print_table(table)
    for problem in results.problems:
        typer.echo(f"INVALID: {problem}", err=True)
    typer.echo(f"report: {folder / 'report.html'}")


def _model(name: str | None) -> tuple[str, Path]:
    from lmc.model import EMBEDDED, resolve_model

    return name or EMBEDDED, resolve_model(name or EMBEDDED)
