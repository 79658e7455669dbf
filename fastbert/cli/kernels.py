"""``fastbert kernels``: the workbench of kernel developers."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..tasks.errors import InputError, OutputError, TaskError

__all__ = ["app"]

app = typer.Typer(
    help="Check, inspect, compare, tune and profile the kernels; most of it needs no GPU.",
    no_args_is_help=True,
)
_ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")

Name = Annotated[str, typer.Argument(help="A kernel of `fastbert kernels list`.")]
Arch = Annotated[str, typer.Option(help=f"One of {', '.join(_ARCHS)}.")]
VariantText = Annotated[
    str,
    typer.Option(
        "--variant", help="Words of a variant's name, such as D64; ending in the last is better."
    ),
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
    seconds: Annotated[
        float | None, typer.Option(help="How long for each kernel; 20 if left out.")
    ] = None,
    cases: Annotated[
        int | None, typer.Option(min=1, help="How many for each kernel; the same for a seed.")
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="fp32, fp16 or bf16; all if left out.")
    ] = None,
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
    if cases is not None and seconds is not None:
        raise typer.BadParameter("expected either --cases or --seconds")
    if cases is None and seconds is None:
        seconds = 20.0
    for text in dtype or ():
        _dtype(text)
    options = {"cases": cases, "seconds": seconds, "dtypes": dtype or tuple(fuzz.DTYPES)}
    failed = 0
    for kernel in fuzz.FUZZERS if name is None else (name,):
        found = fuzz.check(kernel, device=device, seed=seed, **options)
        if isinstance(found, int):
            typer.echo(f"{kernel}: {found} random cases passed on {_where(device)}")
            continue
        failed += 1
        text = json.dumps(found.case)
        typer.echo(f"{kernel}: failed, the smallest case found after {found.cases_run} cases:")
        typer.echo(f"  {text}\n  {found.error}")
        typer.echo(f"  again: fastbert kernels check {kernel} --case '{text}'")
        if found.drawn != found.case:
            typer.echo(f"  made smaller from: {json.dumps(found.drawn)}")
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
    from rich.console import Console

    chosen = _chosen(name, arch, variant, dtype, tile)
    texts = [t for t, wanted in (("ptx", ptx), ("sass", sass), ("ttgir", ttgir)) if wanted]
    if texts and len(chosen) > 1:
        names = "\n  ".join(v.name for v in chosen)
        raise typer.BadParameter(
            f"--{texts[0]} needs one variant, these match; narrow with --variant:\n  {names}"
        )
    found = _inspected(chosen)
    from ..workbench.terminal import show_inspections

    for text in texts:
        typer.echo(getattr(found[0].artefact, text))
    if report is not None:
        _write_page(found, report)
    if as_json:
        for one in found:
            typer.echo(json.dumps(one.facts()))
    elif not texts:
        show_inspections(Console(), found)


@app.command()
def screen(
    name: Annotated[
        list[str] | None, typer.Argument(help="Kernels; all of them if left out.")
    ] = None,
    arch: Annotated[
        list[str] | None, typer.Option(help="Architectures; those that ship if left out.")
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="bf16, fp16 or fp32; bf16 and fp32 if left out.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Compile everything that can be launched and list what must not ship; exit code 1 if any."""
    _without_interpreter()
    from ..kernels._tiles import ARCHITECTURES
    from ..kernels._variants import KERNELS, variants
    from ..workbench.inspection import inspect_variant, room_for_two

    dtypes = tuple(map(_dtype, dtype or ("bf16", "fp32")))
    bad = count = 0
    for architecture in map(_arch, arch) if arch else ARCHITECTURES:
        for kernel in name or KERNELS:
            _known(kernel)
            for v in variants(kernel, architecture, dtypes=dtypes):
                found = inspect_variant(v)
                found.faults.extend(room_for_two(found))
                facts = found.resources()
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
    from rich.console import Console

    if commits is not None:
        from ..workbench.revisions import facts_of_commit

        old, new = (facts_of_commit(revision, name, options) for revision in commits)
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
    from ..workbench.terminal import show_differences

    show_differences(Console(), pairs)


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

    from fastbert.benchmarks.timing import CudaClock

    from ..kernels._device import device_arch
    from ..kernels._tiles import TUNED_FILE
    from ..workbench import tune as tuner
    from ..workbench.terminal import show_candidates

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
        show_candidates(console, title, survivors[:top])
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

    from fastbert.benchmarks.shapes import LENGTHS, MODELS

    for option, value, known in (("--model", size, MODELS), ("--lengths", lengths, LENGTHS)):
        if value not in known:
            raise typer.BadParameter(f"{option}: expected one of {', '.join(known)}, got {value!r}")
    if not torch.cuda.is_available():
        raise TaskError("profile needs a GPU (torch.cuda.is_available() is False)")
    from rich.console import Console

    from fastbert.benchmarks.limits import measure_limits
    from fastbert.benchmarks.model_workloads import inference
    from fastbert.benchmarks.timing import CudaClock
    from fastbert.benchmarks.tracing import profile_forward
    from fastbert.benchmarks.workload import OURS

    from ..workbench.terminal import show_profile

    workload = inference(size, batch, length, lengths=lengths, dtype=torch.bfloat16)
    prepared = workload.setup(workload, "cuda")
    run = prepared.providers[OURS]()
    prepared.check(OURS, run(prepared.inputs[0]))
    limits = measure_limits(CudaClock(), "cuda")
    least = max(
        prepared.cost.flops / (1e12 * limits["matmul_tflops_bfloat16"]),
        prepared.cost.bytes / (1e9 * limits["copy_gbs"]),
    )
    found = profile_forward(lambda: run(prepared.inputs[0]), least=least)
    show_profile(Console(), str(workload), found)


@app.command()
def host(
    kind: Annotated[str, typer.Argument(help="forward or training.")] = "forward",
    model: Annotated[str, typer.Option(help="minilm, base or large.")] = "base",
    layers: Annotated[int | None, typer.Option(min=3, help="Another number of layers.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 1,
    length: Annotated[int, typer.Option(min=1, help="Tokens of the longest.")] = 128,
    padded: Annotated[
        bool, typer.Option("--padded", help="Every other sequence is half as long.")
    ] = False,
    autocast: Annotated[
        bool, typer.Option("--autocast", help="Weights in fp32, bf16 by autocast.")
    ] = False,
    arch: Arch = "sm_90",
    calls: Annotated[int, typer.Option(min=2, help="How many are timed.")] = 300,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Launches, waits and microseconds of the host in one call: no GPU needed, a C compiler is."""
    _without_interpreter()
    import torch
    from rich.console import Console

    from fastbert.benchmarks.shapes import MODELS

    from ..workbench import host
    from ..workbench.terminal import show_host

    if kind not in host.KINDS:
        raise typer.BadParameter(f"expected one of {', '.join(host.KINDS)}, got {kind!r}")
    if model not in MODELS:
        raise typer.BadParameter(f"--model: expected one of {', '.join(MODELS)}, got {model!r}")
    torch.set_num_threads(1)
    options = {"model": model, "layers": layers, "batch": batch, "length": length}
    options |= {"padded": padded, "autocast": autocast, "arch": _arch(arch), "calls": calls}
    try:
        found = host.measure(kind, **options)
    except RuntimeError as error:
        raise TaskError(str(error)) from error
    if as_json:
        typer.echo(json.dumps(found.facts()))
    else:
        show_host(Console(), found)


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

    _interpreter.install(strict=True)
    return "cpu"


def _where(device: str) -> str:
    return "the GPU" if device == "cuda" else "the CPU, interpreted"


def _arch(text: str) -> int:
    if text not in _ARCHS:
        raise typer.BadParameter(f"--arch: expected one of {', '.join(_ARCHS)}, got {text!r}")
    return int(text.removeprefix("sm_"))


def _dtype(text: str):
    import torch

    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    if text not in dtypes:
        raise typer.BadParameter(f"--dtype: expected one of {', '.join(dtypes)}, got {text!r}")
    return dtypes[text]


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
    from ..kernels._variants import variants

    _known(name)
    number, fields = _arch(arch), _fields(tile)
    try:
        found = list(variants(name, number, dtypes=(_dtype(dtype),), tile=fields))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    chosen = [v for v in found if all(word in v.name for word in words.split())]
    if not chosen:
        names = "\n  ".join(v.name for v in found)
        raise typer.BadParameter(f"--variant: no name contains {words!r}; there are:\n  {names}")
    # "packed" means "packed" before "packed, dropout 8 bit".
    return [v for v in chosen if words and v.name.endswith(words.split()[-1])] or chosen


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


def _write_page(found: list, path: Path) -> None:
    from ..workbench.report import page

    try:
        path.write_text(page(found), "utf-8")
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror}") from error
