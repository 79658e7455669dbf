"""``fastbert check``: what runs here, why, and whether it is right."""

import json
from typing import Annotated

import typer

__all__ = ["command"]


def command(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show devices, backends and versions, and compare fastbert with transformers on a tiny model.

    Exits with 0 only if every check passes.
    """
    from rich.console import Console
    from rich.table import Table

    from ..tasks.selfcheck import run_checks

    facts, checks = run_checks()
    passed = all(check.passed for check in checks)
    if as_json:
        rows = [check._asdict() for check in checks]
        typer.echo(json.dumps({"facts": facts, "checks": rows, "passed": passed}, indent=1))
    else:
        console = Console()
        table = Table("what", "here", title="This machine")
        for name, value in facts.items():
            table.add_row(name, str(value))
        console.print(table)
        table = Table("check", "result", "detail", title="Checks")
        for check in checks:
            result = "[green]passed[/]" if check.passed else "[red]failed[/]"
            table.add_row(check.name, result, check.detail)
        console.print(table)
    raise typer.Exit(0 if passed else 1)
