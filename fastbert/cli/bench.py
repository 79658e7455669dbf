"""``fastbert bench``: run a suite, compare two result files, make a report anew."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..tasks.errors import InputError, TaskError

if TYPE_CHECKING:
    from fastbert.benchmarks.results import Results

__all__ = ["app"]

app = typer.Typer(
    help="Measure fastbert against what else runs here; every number after a correctness check.",
    invoke_without_command=True,
)


@app.callback()
def run(
    context: typer.Context,
    suite: Annotated[
        str, typer.Option(help="quick (two minutes on a CPU), targets, kernels, models.")
    ] = "quick",
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder for results.json and the reports.")
    ] = Path("fastbert-bench"),
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto.")] = "auto",
    provider: Annotated[
        list[str] | None, typer.Option(help="Only these providers; may be given several times.")
    ] = None,
    workload: Annotated[
        list[str] | None,
        typer.Option(help="Only workloads with this in their name; may be given several times."),
    ] = None,
    seconds: Annotated[float, typer.Option(help="Timed rounds per workload.")] = 5.0,
    time_budget: Annotated[
        float | None, typer.Option(help="Seconds after which no workload is started any more.")
    ] = None,
) -> None:
    """Run a suite: a table here; one JSON, a Markdown report and an HTML page in a folder."""
    if context.invoked_subcommand is not None:
        return
    _needs_matplotlib()
    import torch
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from fastbert.benchmarks.catalogue import SUITES, workloads
    from fastbert.benchmarks.session import run_suite

    if suite not in SUITES:
        raise typer.BadParameter(f"--suite: expected one of {', '.join(SUITES)}, got {suite!r}")
    if device not in ("auto", "cpu", "cuda") or (
        device == "cuda" and not torch.cuda.is_available()
    ):
        raise typer.BadParameter(f"--device: expected cpu, auto, or cuda with a GPU, got {device}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if output.exists() and not output.is_dir():
        raise typer.BadParameter(f"-o: expected a folder, {output} is a file")
    every = workloads(device, suite)
    todo = [w for w in every if not workload or any(part in w.id for part in workload)]
    if not todo:
        raise typer.BadParameter(
            f"--workload: no name in suite {suite} has {' or '.join(workload or ())} in it; "
            f"there are {', '.join(w.id for w in every)}"
        )
    known = {p for w in todo for p in w.providers}
    unknown = set(provider or ()) - known
    if unknown:
        raise typer.BadParameter(
            f"--provider: {', '.join(sorted(unknown))} does not occur there; "
            f"expected some of {', '.join(sorted(known))}"
        )
    errors = Console(stderr=True)
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=errors, transient=True) as bar:
        task = bar.add_task(str(todo[0]), total=len(todo))

        def progress(i, count, measured, entries):
            following = str(todo[i + 1]) if i + 1 < count else "reports"
            bar.update(task, completed=i + 1, description=following)
            for entry in entries:
                if getattr(entry, "failed", False):
                    errors.print(f"[red]{measured}: {entry.reason}[/red]")

        try:
            results = run_suite(
                suite,
                output,
                device=device,
                chosen=todo,
                seconds=seconds,
                time_budget=time_budget,
                providers=provider or None,
                progress=progress,
            )
        except KeyboardInterrupt:
            errors.print(f"what was measured until then is in {output}")
            raise
    show(results, Console())
    typer.echo(f"{output}/results.json, report.md, report.html")
    if results.failures:
        raise TaskError(f"{len(results.failures)} wrong results, listed above; they have no times")


@app.command()
def compare(
    old: Annotated[Path, typer.Argument(help="A results.json, or its folder.")],
    new: Annotated[Path, typer.Argument(help="Another one.")],
    fail_slower: Annotated[
        bool, typer.Option("--fail-slower", help="Exit code 1 if fastbert became slower.")
    ] = False,
) -> None:
    """Say what moved beyond noise between two runs."""
    from rich.console import Console
    from rich.table import Table

    from fastbert.benchmarks.results import compare as compare_results
    from fastbert.benchmarks.workload import OURS

    before, after = _load(old), _load(new)
    changes = compare_results(before, after)
    if not changes:
        raise InputError(f"{old} and {new} have no workload in common")
    console = Console()
    if before.machine["device"] != after.machine["device"]:
        console.print(
            f"[yellow]different devices: {before.machine['device']}, {after.machine['device']}"
        )
    table = Table(title="Times, new against old")
    for name in ("workload", "provider", "change", "noise", "relative to", ""):
        table.add_column(name)
    moved = [c for c in changes if c.verdict != "same"]
    for c in sorted(moved, key=lambda c: -c.ratio):
        table.add_row(
            c.workload, c.provider, f"{100 * (c.ratio - 1):+.1f} %", f"{100 * c.noise:.1f} %",
            c.relative_to or "-", f"[{'red' if c.verdict == 'slower' else 'green'}]{c.verdict}",
        )  # fmt: skip
    if moved:
        console.print(table)
    console.print(f"{len(moved)} of {len(changes)} moved beyond noise")
    slower = [c for c in moved if c.verdict == "slower" and c.provider == OURS]
    if fail_slower and slower:
        raise TaskError(f"fastbert became slower on {len(slower)} workloads")


@app.command()
def report(
    file: Annotated[Path, typer.Argument(help="A results.json, or its folder.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the reports.")],
) -> None:
    """Make the Markdown and HTML reports of a result file anew, and show its tables."""
    _needs_matplotlib()
    from rich.console import Console

    from fastbert.benchmarks.report import write_reports

    results = _load(file)
    output.mkdir(parents=True, exist_ok=True)
    write_reports(results, output)
    show(results, Console())
    typer.echo(f"{output}/report.md, report.html")


def show(results: Results, console) -> None:
    """Targets, then one table with a row per measurement."""
    from rich.table import Table

    from fastbert.benchmarks.report import TARGET_HEADER, measured_rows, target_rows
    from fastbert.benchmarks.targets import judge
    from fastbert.benchmarks.workload import OURS

    judged = [j for j in judge(results) if j.value is not None]
    colours = {"pass": "green", "between": "yellow", "below": "red"}
    if judged:
        table = Table(title="Targets")
        for name in TARGET_HEADER:
            table.add_column(name)
        for j, cells in zip(judged, target_rows(judged), strict=True):
            table.add_row(*cells[:-1], f"[{colours[j.status]}]{cells[-1]}")
        console.print(table)
    table = Table(title=f"{results.machine['device']}, fastbert {results.machine['fastbert']}")
    table.add_column("workload, provider", overflow="fold")
    for name in ("median", "20 to 80 %", "against reference"):
        table.add_column(name, no_wrap=True, justify="right")
    for name, group in results.by_workload():
        table.add_row(name, style="bold")
        for row in measured_rows(results, group):
            table.add_row(f"  {row[0]}", *row[1:4], style="blue" if row[0] == OURS else None)
        table.add_section()
    console.print(table)
    missing = {(n.provider, n.reason) for n in results.not_measured if not n.failed}
    for provider, reason in sorted(missing):
        console.print(f"not measured: {provider}: {reason}", style="dim", highlight=False)


def _load(path: Path) -> Results:
    from fastbert.benchmarks.results import Results
    from fastbert.benchmarks.session import RESULTS_NAME

    path = path / RESULTS_NAME if path.is_dir() else path
    if not path.exists():
        raise InputError(f"{path}: no such file")
    try:
        return Results.load(path)
    except ValueError as error:
        raise InputError(str(error)) from error


def _needs_matplotlib() -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise TaskError("the reports need matplotlib; run: pip install 'fastbert-triton[bench]'")
