"""``fastbert kernels``: the workbench of kernel developers."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from ..tasks.errors import InputError, OutputError, TaskError

__all__ = ["app"]

app = typer.Typer(
    help="Check, inspect, compare, tune and profile the kernels; most of it needs no GPU.",
    no_args_is_help=True,
)
_ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100")

Name = Annotated[str, typer.Argument(help="A kernel of `fastbert kernels list`.")]
Arch = Annotated[str, typer.Option(help=f"One of {', '.join(_ARCHS)}.")]
VariantText = Annotated[
    str, typer.Option("--variant", help="Words that a variant's name must contain, such as D64.")
]
Dtype = Annotated[str, typer.Option(help="bf16, fp16 or fp32.")]
TileText = Annotated[
    str | None,
    typer.Option("--tile", help="Fields to change, such as block_m=64,num_warps=4,num_stages=3."),
]


@app.command("list")
def list_kernels() -> None:
    """The kernels, what they compute, and how many variants of each can be launched."""
    _without_interpreter()
    from rich.console import Console
    from rich.table import Table

    from ..kernels._tiles import ARCHITECTURES
    from ..kernels._variants import KERNELS, variants

    table = Table()
    for column in ("kernel", "computes", "op", "file", "variants"):
        table.add_column(column, overflow="fold")
    for name, kernel in KERNELS.items():
        counts = [sum(1 for _ in variants(name, arch)) for arch in ARCHITECTURES]
        table.add_row(
            name, kernel.computes, kernel.op, f"kernels/{Path(kernel.module.__file__).name}",
            f"{min(counts)} to {max(counts)}" if min(counts) < max(counts) else str(counts[0]),
        )  # fmt: skip
    Console().print(table)


@app.command()
def check(
    name: Annotated[str | None, typer.Argument(help="A kernel; all of them if left out.")] = None,
    seconds: Annotated[float, typer.Option(help="How long for each kernel.")] = 20.0,
    seed: Annotated[int, typer.Option(help="Of the random cases.")] = 0,
    case: Annotated[
        str | None, typer.Option(help="Run this one case again, as JSON that a failure printed.")
    ] = None,
) -> None:
    """Random shapes, dtypes, strides and masks against the reference: on a GPU or interpreted."""
    device = _kernels_can_run()
    from ..workbench import fuzz

    if name is not None and name not in fuzz.FUZZERS:
        raise typer.BadParameter(f"expected one of {', '.join(fuzz.FUZZERS)}, got {name!r}")
    if case is not None:
        if name is None:
            raise typer.BadParameter("--case needs the name of its kernel")
        try:
            fuzz.run_case(name, _case(case), device)
        except AssertionError as error:
            raise TaskError(str(error)) from error
        typer.echo(f"{name}: this case passes")
        return
    failed = 0
    for kernel in fuzz.FUZZERS if name is None else (name,):
        found = fuzz.check(kernel, seconds=seconds, device=device, seed=seed)
        if isinstance(found, int):
            typer.echo(f"{kernel}: {found} random cases passed on {_where(device)}")
            continue
        failed += 1
        text = json.dumps(found.case)
        typer.echo(f"{kernel}: failed, the smallest case found after {found.cases_run} cases:")
        typer.echo(f"  {text}\n  {found.error}")
        typer.echo(f"  again: fastbert kernels check {kernel} --case '{text}'")
    if failed:
        raise TaskError(f"{failed} kernels failed")


def _case(text: str) -> dict[str, Any]:
    try:
        case = json.loads(text)
    except json.JSONDecodeError as error:
        raise typer.BadParameter(f"--case: expected JSON, {error}") from error
    if not isinstance(case, dict) or "seed" not in case:
        raise typer.BadParameter("--case: expected an object as a failure prints it")
    return case


@app.command()
def inspect(
    name: Name,
    arch: Arch = "sm_90",
    variant: VariantText = "",
    dtype: Dtype = "bf16",
    tile: TileText = None,
    ptx: Annotated[bool, typer.Option("--ptx", help="Print the PTX.")] = False,
    sass: Annotated[bool, typer.Option("--sass", help="Print the machine code.")] = False,
    ttgir: Annotated[bool, typer.Option("--ttgir", help="Print Triton's GPU dialect.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    report: Annotated[
        Path | None, typer.Option("--html", help="Also write a page with plots to this file.")
    ] = None,
) -> None:
    """Compile for a GPU that need not be here, and say what came out."""
    chosen = _chosen(name, arch, variant, dtype, tile)
    texts = [t for t, wanted in (("ptx", ptx), ("sass", sass), ("ttgir", ttgir)) if wanted]
    if texts and len(chosen) > 1:
        names = "\n  ".join(v.name for v in chosen)
        raise typer.BadParameter(
            f"--{texts[0]} needs one variant, these match; narrow with --variant:\n  {names}"
        )
    found = _inspected(chosen)
    for text in texts:
        typer.echo(getattr(found[0].artefact, text))
    if report is not None:
        _write_page(found, report)
    if as_json:
        for one in found:
            typer.echo(json.dumps(one.facts()))
    elif not texts:
        _show(found)


@app.command()
def screen(
    name: Annotated[
        list[str] | None, typer.Argument(help="Kernels; all of them if left out.")
    ] = None,
    arch: Annotated[
        list[str] | None, typer.Option(help="Architectures; those that ship if left out.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Compile everything that can be launched and list what must not ship; exit code 1 if any."""
    _without_interpreter()
    from ..kernels._tiles import ARCHITECTURES
    from ..kernels._variants import KERNELS, variants
    from ..workbench.inspection import inspect_variant

    bad = count = 0
    for architecture in map(_arch, arch) if arch else ARCHITECTURES:
        for kernel in name or KERNELS:
            _known(kernel)
            for v in variants(kernel, architecture):
                facts = inspect_variant(v).facts()
                count += 1
                bad += bool(facts["faults"])
                if as_json:
                    typer.echo(json.dumps(facts))
                elif facts["faults"]:
                    typer.echo(f"{facts['name']}: {'; '.join(facts['faults'])}")
    if not as_json:
        typer.echo(f"{count} variants, {bad} with faults")
    if bad:
        raise typer.Exit(1)


@app.command()
def diff(
    name: Name,
    arch: Arch = "sm_90",
    variant: VariantText = "",
    dtype: Dtype = "bf16",
    tile: Annotated[
        list[str] | None, typer.Option("--tile", help="Given twice: the two tiles to compare.")
    ] = None,
    commits: Annotated[
        tuple[str, str] | None, typer.Option(help="Two revisions of this checkout instead.")
    ] = None,
) -> None:
    """What changes between two tiles, or between two commits."""
    if (tile is not None) == (commits is not None) or (tile is not None and len(tile) > 2):
        raise typer.BadParameter("expected --tile once or twice, or --commits OLD NEW")
    options = ("--arch", arch, "--variant", variant, "--dtype", dtype)
    if commits is not None:
        old, new = (_facts_of_commit(revision, name, options) for revision in commits)
        pairs = [(old[key], new[key]) for key in old if key in new]
        if not pairs:
            raise InputError("the two commits have no variant of the same name")
    else:
        tiles = [None, *tile] if len(tile) == 1 else tile
        sides = [_inspected(_chosen(name, arch, variant, dtype, t)) for t in tiles]
        if len(sides[0]) != len(sides[1]):
            raise InputError(
                f"{len(sides[0])} variants against {len(sides[1])}; narrow with --variant"
            )
        pairs = [(a.facts(), b.facts()) for a, b in zip(*sides, strict=True)]
    _show_differences(pairs)


@app.command()
def tune(
    name: Annotated[str, typer.Argument(help="attention, layernorm, softmax or linear.")],
    arch: Annotated[
        str | None, typer.Option(help="Without a GPU: which to rank for (sm_90).")
    ] = None,
    slot: Annotated[str, typer.Option(help="Only slots with these words, such as D64.")] = "",
    output: Annotated[
        Path | None, typer.Option("-o", help="The table file; the one of the package if left out.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Compilers at a time; one per core.")] = None,
    top: Annotated[int, typer.Option(help="How many candidates to show.")] = 5,
) -> None:
    """Search tiles: compiled and screened in parallel, then timed if there is a GPU."""
    _without_interpreter()
    import torch
    from rich.console import Console
    from rich.table import Table

    from fastbert.benchmarks.timing import CudaClock

    from ..kernels._device import device_arch
    from ..kernels._tiles import TUNED_FILE
    from ..workbench import tune as tuner

    on_gpu = torch.cuda.is_available()
    if on_gpu and arch is not None:
        raise typer.BadParameter("--arch is for machines without a GPU; here the GPU decides")
    number = device_arch(torch.device("cuda", 0)) if on_gpu else _arch(arch or "sm_90")
    try:
        chosen = [p for p in tuner.problems(name) if slot in p.slot]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if not chosen:
        raise typer.BadParameter(f"--slot: no slot of {name} contains {slot!r}")
    console, path = Console(), output or TUNED_FILE
    if not on_gpu:
        console.print(
            "[yellow]No GPU: ranked by a static model (instructions per element over resident "
            "warps) and by nothing else. Nothing was timed, nothing is written."
        )
    for problem in chosen:
        survivors, dropped = tuner.screen_candidates(problem, number, workers=workers)
        title = f"{problem.slot}, sm_{number}: {len(survivors)} of {len(problem.grid)} may ship"
        before = None
        if on_gpu and survivors:
            before, survivors = tuner.time_candidates(
                problem, survivors, number, CudaClock(), "cuda"
            )
        table = Table(title=title)
        for column in ("tile", "registers", "warps/SM", "instructions/element",
                       "time" if on_gpu else "time (not measured)"):  # fmt: skip
            table.add_column(column, overflow="fold")
        for c in survivors[:top]:
            table.add_row(
                ", ".join(f"{k}={v}" for k, v in c.fields.items()), str(c.facts["registers"]),
                str(c.facts["warps_per_sm"]), f"{c.facts['instructions_per_element']:.3g}",
                "-" if c.seconds is None else f"{1e6 * c.seconds:.1f} us",
            )  # fmt: skip
        console.print(table)
        for reason, count in dropped.items():
            console.print(f"  dropped {count}: {reason}", style="dim", highlight=False)
        if before is not None and survivors:
            better = tuner.write_tuned(path, number, problem.slot, before, survivors[0])
            verdict = f"written to {path}" if better else "the table's tile stays"
            console.print(f"  before {1e6 * before:.1f} us; {verdict}")


@app.command()
def profile(
    size: Annotated[str, typer.Option("--model", help="minilm, base or large.")] = "base",
    batch: Annotated[int, typer.Option(help="Sequences.")] = 8,
    length: Annotated[int, typer.Option(help="Tokens of the longest.")] = 128,
    lengths: Annotated[str, typer.Option(help="fixed, uniform, squad or short.")] = "fixed",
) -> None:
    """One forward pass on a GPU: time per kernel, launch gaps, share of the roofline."""
    import torch

    if not torch.cuda.is_available():
        raise TaskError("profile needs a GPU (torch.cuda.is_available() is False)")
    from fastbert.benchmarks.limits import measure_limits
    from fastbert.benchmarks.model_workloads import inference
    from fastbert.benchmarks.timing import CudaClock
    from fastbert.benchmarks.workload import OURS

    from ..workbench.profile import profile_forward

    workload = inference(size, batch, length, lengths=lengths, dtype=torch.bfloat16)
    prepared = workload.setup(workload, "cuda")
    run = prepared.providers[OURS]()
    prepared.check(OURS, run(prepared.inputs[0]))
    limits = measure_limits(CudaClock(), "cuda")
    least = max(
        prepared.cost.flops / (1e12 * limits["matmul_tflops_bfloat16"]),
        prepared.cost.bytes / (1e9 * limits["copy_gbs"]),
    )
    _show_profile(str(workload), profile_forward(lambda: run(prepared.inputs[0]), least=least))


# ---- helpers ----


def _without_interpreter() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise TaskError("interpreted kernels cannot be compiled; unset TRITON_INTERPRET")
    _needs_triton()


def _needs_triton() -> None:
    if importlib.util.find_spec("triton") is None:
        raise TaskError("the kernels need triton, which is not installed")


def _kernels_can_run() -> str:
    """The device to run kernels on; without a GPU, this process interprets them from here on."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise TaskError("triton was imported before; run again with TRITON_INTERPRET=1")
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)  # many tiny products
    _needs_triton()
    from ..kernels import _interpreter

    _interpreter.install()
    return "cpu"


def _where(device: str) -> str:
    return "the GPU" if device == "cuda" else "the CPU, interpreted"


def _arch(text: str) -> int:
    if text not in _ARCHS:
        raise typer.BadParameter(f"--arch: expected one of {', '.join(_ARCHS)}, got {text!r}")
    return int(text.removeprefix("sm_"))


def _known(kernel: str) -> None:
    from ..kernels._variants import KERNELS

    if kernel not in KERNELS:
        raise typer.BadParameter(f"expected one of {', '.join(KERNELS)}, got {kernel!r}")


def _fields(text: str | None) -> dict[str, int]:
    fields = {}
    for part in filter(None, (text or "").split(",")):
        key, equals, value = part.partition("=")
        if not equals or not value.strip().isdigit():
            raise typer.BadParameter(f"--tile: expected field=number, got {part!r}")
        fields[key.strip()] = int(value)
    return fields


def _chosen(name: str, arch: str, words: str, dtype: str, tile: str | None) -> list:
    """The variants that were asked for."""
    _without_interpreter()
    import torch

    from ..kernels._variants import variants

    _known(name)
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    if dtype not in dtypes:
        raise typer.BadParameter(f"--dtype: expected one of {', '.join(dtypes)}, got {dtype!r}")
    number, fields = _arch(arch), _fields(tile)
    try:
        found = list(variants(name, number, dtypes=(dtypes[dtype],), tile=fields))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    chosen = [v for v in found if all(word in v.name for word in words.split())]
    if not chosen:
        names = "\n  ".join(v.name for v in found)
        raise typer.BadParameter(f"--variant: no name contains {words!r}; there are:\n  {names}")
    return chosen


def _inspected(chosen: list) -> list:
    from rich.console import Console
    from rich.progress import Progress

    from ..workbench.inspection import inspect_variant

    found = []
    with Progress(console=Console(stderr=True), transient=True) as bar:
        for variant in bar.track(chosen, description="compiling"):
            try:
                found.append(inspect_variant(variant))
            except Exception as error:  # the compiler's; a bad tile is the user's
                reason = " ".join(str(error).split())[:300]
                raise InputError(f"{variant.name} does not compile: {reason}") from error
    return found


def _show(found: list) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for one in found:
        a, o, v = one.artefact, one.occupancy, one.variant
        table = Table(title=v.name, show_header=False, title_justify="left")
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        table.add_row("tile", ", ".join(f"{k}={x}" for k, x in one.facts()["tile"].items()))
        table.add_row("registers, stack", f"{a.registers} per thread, {a.stack} B")
        table.add_row("spills", f"{a.spill_stores} B stored, {a.spill_loads} B loaded")
        table.add_row("shared memory", f"{a.shared:,} B per program")
        table.add_row(
            "occupancy",
            f"{o.programs} programs of {v.num_warps} warps, {100 * o.share:.0f} % of the warps; "
            f"{o.limit} allow no more",
        )
        table.add_row("matrix instructions", one.matrix_instructions)
        access = ", ".join(f"{n} x {kind} bit" for kind, n in one.listing.widths.items())
        table.add_row("global memory", access or "none")
        where = f"inner loop of {one.listing.loop}" if one.listing.loop else "no loop, all"
        mix = ", ".join(f"{k} {n:.3g}" for k, n in one.per_element.items())
        table.add_row(
            f"per {v.element}",
            f"{sum(one.per_element.values()):.3g} instructions ({where} of {one.listing.total}): "
            f"{mix}",
        )
        table.add_row("intensity", f"{v.cost.intensity:.3g} operations per byte ({v.example})")
        for card, seconds, bound in one.rooflines():
            table.add_row(f"least on {card.name}", f"{1e6 * seconds:.1f} us, bound by {bound}")
        for warning in a.warnings:
            table.add_row("ptxas", warning)
        table.add_row("faults", "; ".join(one.faults) or "none", style="red" if one.faults else "")
        console.print(table)


def _write_page(found: list, path: Path) -> None:
    from ..workbench.report import page

    try:
        path.write_text(page(found), "utf-8")
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror}") from error


def _facts_of_commit(revision: str, name: str, options: tuple[str, ...]) -> dict[str, dict]:
    """What the kernels of another commit compile to, by its own code in a process of its own."""
    import fastbert

    root = Path(fastbert.__file__).resolve().parents[1]
    with tempfile.TemporaryDirectory(prefix="fastbert-diff-") as folder:
        archive = subprocess.run(
            ["git", "-C", str(root), "archive", revision], capture_output=True, check=False
        )
        if archive.returncode:
            raise InputError(f"{revision}: {archive.stderr.decode(errors='replace').strip()}")
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        if not (Path(folder) / "kernels/_variants.py").exists():
            raise InputError(f"{revision}: no kernels/_variants.py in it; it is too old to inspect")
        program = "from fastbert.cli import main; main()"
        done = subprocess.run(
            [sys.executable, "-c", program, "kernels", "inspect", name, *options, "--json"],
            cwd=folder, env={**os.environ, "PYTHONPATH": folder}, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            raise InputError(f"{revision}: {done.stderr.strip()[-500:]}")
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {row["name"]: row for row in rows}


def _show_differences(pairs: list[tuple[dict, dict]]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for old, new in pairs:
        left, right = _flat(old), _flat(new)
        changed = [k for k in {**left, **right} if left.get(k) != right.get(k) and k != "name"]
        title = old["name"] if old["name"] == new["name"] else f"{old['name']}  ->  {new['name']}"
        if not changed:
            console.print(f"{title}: the same")
            continue
        table = Table(title=title, title_justify="left")
        for column in ("", "old", "new"):
            table.add_column(column)
        for key in changed:
            table.add_row(key, str(left.get(key, "-")), str(right.get(key, "-")))
        console.print(table)


def _flat(facts: dict[str, Any]) -> dict[str, Any]:
    flat = {}
    for key, value in facts.items():
        if isinstance(value, dict):
            flat |= {f"{key.replace('_', ' ')}: {k}": v for k, v in value.items()}
        else:
            flat[key.replace("_", " ")] = value
    return flat


def _show_profile(title: str, found) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for column in ("kernel", "launches", "time", "share"):
        table.add_column(column, overflow="fold")
    for k in found.kernels[:25]:
        table.add_row(
            k.name[:90], str(k.launches), f"{1e6 * k.seconds:.1f} us",
            f"{100 * k.seconds / found.span:.1f} %",
        )  # fmt: skip
    console = Console()
    console.print(table)
    console.print(
        f"span {1e6 * found.span:.1f} us, {100 * found.idle_share:.1f} % of it without a kernel "
        f"(largest gap {1e6 * found.largest_gap:.1f} us)"
    )
    if found.roofline_share is not None:
        console.print(
            f"least time at this machine's measured limits {1e6 * found.least:.1f} us: "
            f"{100 * found.roofline_share:.0f} % of the roofline"
        )
