"""Writes the speed tables of README.md from result files, so that they hold only what was measured.

python -m fastbert.benchmarks.readme            # write
python -m fastbert.benchmarks.readme --check    # exit code 1 if a table is stale
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from .encoders import (
    BASELINE,
    COMPILED,
    CTRANSLATE2,
    EAGER,
    FREEZING,
    OPENVINO,
    ORT,
    OWN_FROZEN,
    OWN_GRAPHS,
    TORCH_ENCODER,
)
from .report import TARGET_HEADER, target_rows
from .results import Results
from .targets import judge
from .workload import OURS

__all__ = ["rendered"]

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks/results"
_PEERS = {
    "cpu": (OWN_FROZEN, COMPILED, FREEZING, ORT, OPENVINO, CTRANSLATE2, TORCH_ENCODER),
    "cuda": (OWN_GRAPHS, EAGER, COMPILED, TORCH_ENCODER),
}
_NOT_MEASURED = {
    "cpu": "Not measured yet.",
    "cuda": "Not measured yet. The kernels are compiled and screened for registers, spills, "
    "shared memory and\nmatrix instructions, and their results are tested; no figure for a GPU is "
    "claimed.",
    "host": "Not measured yet.",
    "families": "Not measured yet.",
}


def rendered(text: str, results: Path = RESULTS) -> str:
    """README text with its tables made from the newest result file of each kind of device."""
    written = {"cpu": _tables, "cuda": _tables, "host": _host_table, "families": _families_table}
    for kind, table in written.items():
        block = re.compile(rf"(<!-- {kind}-table:begin -->\n).*?(<!-- {kind}-table:end -->)", re.S)
        files = sorted(results.glob(f"{kind}-*.json*"))
        body = table(files[-1]) if files else _NOT_MEASURED[kind]
        text, count = block.subn(lambda m, body=body: f"{m[1]}{body}\n{m[2]}", text)
        assert count == 1, f"README.md has no place for the {kind} table"
    return text


def _tables(path: Path) -> str:
    results = Results.load(path)
    m = results.machine
    columns = _PEERS[m["kind"]]
    lines = ["| workload | transformers sdpa | fastbert | speed-up | " + " | ".join(columns) + " |"]
    lines.append("|---" * (4 + len(columns)) + "|")
    for name, group in results.by_workload():
        by = {x.provider: x for x in group}
        if group[0].level != "model" or not {OURS, BASELINE} <= set(by):
            continue
        base, ours = by[BASELINE], by[OURS]
        peers = [f"{by[p].speedup_over(base):.2f}x" if p in by else "-" for p in columns]
        sizes, _, dtype = name.rpartition("/")
        sizes += "" if dtype == results.measurements[0].dtype else f"/{dtype}"
        lines.append(
            f"| {sizes.replace('/', ' ')}"
            f"{', disturbed' if ours.disturbed else ''} | {1e3 * base.seconds:.4g} ms | "
            f"{1e3 * ours.seconds:.4g} ms | **{ours.speedup_over(base):.2f}x** | "
            + " | ".join(peers)
            + " |"
        )
    caption = (
        f"{m['device']}, "
        + (f"{m['instruction_set']}, {m['threads']} threads, " if m["kind"] == "cpu" else "")
        + f"{results.measurements[0].dtype}; torch {m['torch']}, transformers "
        f"{m['transformers']}; {m['date']}, "
        f"`benchmarks/results/{path.name}`. All columns but the times are relative to "
        "sdpa."
    )
    profile = results.settings.get("profile")
    traced: list[str] = []
    if profile:
        traced += ["", "Milliseconds of one call, traced by itself:", ""]
        traced += ["| workload | | host, until all is queued | GPU, first kernel to last | busy |"]
        traced += ["|---|---|---|---|---|"]
        traced += [
            f"| {name.rpartition('/')[0].replace('/', ' ')} | {provider} | {t['host']:.3g} | "
            f"{t['span']:.3g} | {t['busy']:.3g} |"
            for name, providers in profile.items()
            for provider, t in providers.items()
        ]
    targets = ["| " + " | ".join(TARGET_HEADER) + " |", "|---" * len(TARGET_HEADER) + "|"]
    targets += ["| " + " | ".join(row) + " |" for row in target_rows(judge(results))]
    return "\n".join([*lines, *traced, "", caption, "", *targets])


def _host_table(path: Path) -> str:
    """Of what ``fastbert kernels host --json`` printed, a line a call."""
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    lines = ["| call | host | each layer | it launches: kernels, products, other | waits |"]
    lines.append("|---" * 5 + "|")
    for row in rows:
        counts = [sum(row[kind].values()) for kind in ("layer_launches", "layer_operations")]
        counts.insert(1, row["layer_products"])
        lines.append(
            f"| {row['what']} | {1e3 * row['seconds']:.2f} ms "
            f"| {1e6 * row['layer_seconds']:.0f} us "
            f"| {', '.join(map(str, counts))} | {row['waits']} |"
        )
    m = rows[0]["machine"]
    caption = (
        f"{m['device']}, python {m['python']}, torch {m['torch']}, triton {m['triton']}; "
        f"{m['date']}, `benchmarks/results/{path.name}`."
    )
    return "\n".join([*lines, "", caption])


def _families_table(path: Path) -> str:
    """Of what ``python -m fastbert.benchmarks.families --json`` printed, a line a family."""
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    lines = [
        "| family | transformers runs | fastbert, frozen | padding left out |",
        "|---" * 4 + "|",
    ]
    lines += [
        f"| {row['model_type']} | {row['attention']} | **{row['ratio']:.2f}x** "
        f"| {1 / row['fill']:.2f}x |"
        for row in rows
    ]
    m = rows[0]["machine"]
    caption = (
        f"{m['device']}, {m['instruction_set']}, {m['threads']} threads, float32; "
        f"torch {m['torch']}, transformers {m['transformers']}; {m['date']}, "
        f"`benchmarks/results/{path.name}`."
    )
    return "\n".join([*lines, "", caption])


def main() -> int:
    text = README.read_text("utf-8")
    new = rendered(text)
    if "--check" in sys.argv[1:]:
        return 0 if text == new else 1
    README.write_text(new, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
