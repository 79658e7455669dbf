"""fastbert against transformers (sdpa) on this CPU: one interleaved run, one table.

    python benchmarks/cpu_inference.py [--json FILE] [--rounds N] [--models minilm base]

Both models hold the same weights and get the same tensors. Outputs are compared before anything is
timed; a difference over the tolerance ends the run without a number. Timed calls alternate, the
table shows medians, and a ratio is the median of the ratios of neighbouring calls. "fill" is the
share of real
tokens in a padded batch; the mark for a ragged batch is 1 / fill.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import transformers  # noqa: E402

import fastbert  # noqa: E402

TOLERANCE = 1e-5
SEED = 0


@dataclass(frozen=True)
class Case:
    """A batch: ``batch`` sequences padded to ``length``; ``skew`` 0 is dense, 1 and 3 are ragged.

    Lengths are drawn as ``1 + (length - 1) * u ** skew`` with u uniform, so that the expected fill
    is about ``1 / (skew + 1)``; one sequence always has the full length.
    """

    batch: int
    length: int
    skew: int = 0

    @property
    def name(self) -> str:
        fill = "" if self.skew == 0 else f", about {100 // (self.skew + 1)} % full"
        return f"B{self.batch} S{self.length}{fill}"

    def inputs(self, vocab_size: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(SEED)
        ids = torch.randint(5, vocab_size, (self.batch, self.length), generator=generator)
        u = torch.rand(self.batch, generator=generator)
        lengths = 1 + ((self.length - 1) * u**self.skew).round().long()
        lengths[0] = self.length
        mask = (torch.arange(self.length) < lengths[:, None]).long()
        return {"input_ids": ids, "attention_mask": mask}


@dataclass
class Row:
    """One measured line: medians in milliseconds, the ratio pair by pair with its quartiles."""

    model: str
    case: str
    fill: float
    real_tokens: int
    transformers_ms: float
    fastbert_ms: float
    speedup: float
    speedup_p25: float
    speedup_p75: float
    mark: float
    max_difference: float

    @property
    def passed(self) -> bool:
        return self.speedup >= self.mark


CASES = (
    Case(1, 32),
    Case(1, 128),
    Case(8, 128),
    Case(32, 128, skew=1),
    Case(32, 128, skew=3),
)


def minilm() -> tuple[torch.nn.Module, torch.nn.Module]:
    """The real all-MiniLM-L6-v2 weights, from the package of the demo extra, in both classes."""
    from fastbert.demo import model_folder

    folder = model_folder()
    theirs = transformers.BertModel.from_pretrained(folder, attn_implementation="sdpa")
    return theirs.eval(), fastbert.BertModel.from_pretrained(folder).eval()


def base() -> tuple[torch.nn.Module, torch.nn.Module]:
    """BERT-base in size, with random weights."""
    torch.manual_seed(SEED)
    config = transformers.BertConfig()
    theirs = transformers.BertModel._from_config(config, attn_implementation="sdpa").eval()
    ours = fastbert.BertModel(config).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


MODELS = {"minilm": minilm, "base": base}


def measure(name: str, theirs, ours, case: Case, rounds: int) -> Row:
    """Check that the two agree on a case, then time them in turn.

    Raises:
        SystemExit: they do not agree.
    """
    inputs = case.inputs(theirs.config.vocab_size)
    real = inputs["attention_mask"].bool()
    with torch.inference_mode():
        expected, actual = theirs(**inputs), ours(**inputs)
        difference = max(
            (expected.last_hidden_state - actual.last_hidden_state)[real].abs().max().item(),
            (expected.pooler_output - actual.pooler_output).abs().max().item(),
        )
        if not difference <= TOLERANCE:
            raise SystemExit(f"{name} {case.name}: outputs differ by {difference:.1e}, not timed")
        times: dict[str, list[float]] = {"theirs": [], "ours": []}
        for _ in range(rounds):
            for key, model in (("theirs", theirs), ("ours", ours)):
                start = time.perf_counter()
                model(**inputs)
                times[key].append(1e3 * (time.perf_counter() - start))
    ratios = [a / b for a, b in zip(times["theirs"], times["ours"], strict=True)]
    p25, _, p75 = statistics.quantiles(ratios, n=4)
    fill = real.float().mean().item()
    return Row(
        model=name,
        case=case.name,
        fill=round(fill, 3),
        real_tokens=int(real.sum()),
        transformers_ms=round(statistics.median(times["theirs"]), 2),
        fastbert_ms=round(statistics.median(times["ours"]), 2),
        speedup=round(statistics.median(ratios), 3),
        speedup_p25=round(p25, 3),
        speedup_p75=round(p75, 3),
        mark=1.0 if case.skew == 0 else round(1 / fill, 3),
        max_difference=difference,
    )


def machine() -> dict[str, object]:
    """What a reader needs to run this again."""
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        )
        if Path("/proc/cpuinfo").exists()
        else (),
        platform.processor(),
    )
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    status = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
    return {
        "cpu": cpu,
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "fastbert": fastbert.__version__,
        "commit": commit.stdout.strip() or None,
        "dirty": bool(status.stdout.strip()),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def table(rows: list[Row]) -> str:
    """The rows as Markdown."""
    lines = [
        "| model | batch | transformers sdpa | fastbert | speed-up | mark |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.model} | {r.case} (fill {r.fill:.2f}) | {r.transformers_ms:.1f} ms "
        f"| {r.fastbert_ms:.1f} ms | **{r.speedup:.2f}x** | {r.mark:.2f}x "
        f"{'reached' if r.passed else 'missed'} |"
        for r in rows
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    parser.add_argument("--rounds", type=int, default=15, help="timed calls of each model per case")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    args = parser.parse_args()
    rows = []
    for name in args.models:
        theirs, ours = MODELS[name]()
        for case in CASES:
            print(f"{name} {case.name} ...", end=" ", file=sys.stderr, flush=True)
            rows.append(measure(name, theirs, ours, case, args.rounds))
            print(f"{rows[-1].speedup:.2f}x", file=sys.stderr, flush=True)
    facts = machine()
    print(table(rows))
    print(
        f"\n{facts['cpu']}, {facts['instruction_set']}, {facts['threads']} threads; "
        f"torch {facts['torch']}, transformers {facts['transformers']}, fp32"
    )
    if args.json is not None:
        result = {"machine": facts, "rounds": args.rounds, "rows": [asdict(r) for r in rows]}
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if all(r.passed for r in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
