"""What the workbench finds, as tables on a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from fastbert.benchmarks.tracing import Profile

from .host import HostCost
from .inspection import Inspection
from .tune import Candidate

__all__ = [
    "show_candidates", "show_differences", "show_host", "show_inspections", "show_profile",
]  # fmt: skip


def show_inspections(console: Console, found: list[Inspection]) -> None:
    """One table per variant."""
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


def show_candidates(console: Console, title: str, candidates: list[Candidate]) -> None:
    """Tiles with what the compiler made of them, and their times where they were timed."""
    table = Table(title=title)
    for column in ("tile", "registers", "warps/SM", "instructions/element", "time"):
        table.add_column(column, overflow="fold")
    for c in candidates:
        table.add_row(
            ", ".join(f"{k}={v}" for k, v in c.fields.items()), str(c.facts["registers"]),
            str(c.facts["warps_per_sm"]), f"{c.facts['instructions_per_element']:.3g}",
            "not measured" if c.seconds is None else f"{1e6 * c.seconds:.1f} us",
        )  # fmt: skip
    console.print(table)


def show_differences(console: Console, pairs: list[tuple[dict, dict]]) -> None:
    """For each pair of `Inspection.facts` what is not the same in both."""
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


def show_profile(console: Console, title: str, found: Profile) -> None:
    """The kernels that took longest, the gaps, and the share of the roofline."""
    table = Table(title=title)
    for column in ("kernel", "launches", "time", "share"):
        table.add_column(column, overflow="fold")
    for k in found.kernels[:25]:
        table.add_row(
            k.name[:90], str(k.launches), f"{1e6 * k.seconds:.1f} us",
            f"{100 * k.seconds / found.span:.1f} %",
        )  # fmt: skip
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


def show_host(console: Console, found: HostCost) -> None:
    """Microseconds of a call and of its parts, and everything that it launches."""
    machine = found.machine
    console.print(
        f"{found.what}: {1e6 * found.seconds:.0f} us of the host, "
        f"{1e6 * found.layer_seconds:.1f} us a layer\n"
        f"{machine['device']}, python {machine['python']}, torch {machine['torch']}, "
        f"triton {machine['triton']}; the least of all calls, over a stub driver",
        highlight=False,
    )
    table = Table()
    for column in ("part", "calls", "us"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for part in found.parts:
        table.add_row("  " * part.depth + part.name, str(part.calls), f"{1e6 * part.seconds:.1f}")
    console.print(table)
    table = Table()
    for column in ("launched", "in a call", "by a layer"):
        table.add_column(column, justify="left" if column == "launched" else "right")
    for kernel, count in found.launches.items():
        table.add_row(kernel, str(count), str(found.layer_launches.get(kernel, 0)))
    products = f"products, {1e6 * found.product_seconds:.1f} us each here"
    table.add_row(products, str(found.products), str(found.layer_products))
    for name, count in found.operations.items():
        table.add_row(f"torch: {name}", str(count), str(found.layer_operations.get(name, 0)))
    table.add_section()
    totals = (found.launches, found.layer_launches), (found.operations, found.layer_operations)
    whole, each = (
        sum(sum(counts.values()) for counts in by_call) for by_call in zip(*totals, strict=True)
    )
    table.add_row("all", str(whole + found.products), str(each + found.layer_products))
    console.print(table)
    console.print(f"the host waits for the device {found.waits} times", highlight=False)
