"""Every family against transformers' own class: ``python -m fastbert.benchmarks.families``.

Models of MiniLM's size with random weights, on which times do not depend, and a batch of which half
is padding. transformers runs sdpa, or eager where a family has no other; both take turns, behind a
check that ours is as exact. ``1 / fill`` is what leaving padding out would come to by itself.
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import NamedTuple

import torch
from torch import nn

import fastbert
from fastbert.families.family import Family
from fastbert.families.registry import MODEL_TYPES, load
from fastbert.tasks.loading import quiet, resolve_device
from fastbert.testing import assert_within_budget

from .results import machine_facts
from .timing import clock_for, interleave

__all__ = ["Compared", "compare"]

_SEQUENCES, _LENGTH = 16, 128
_SIZES = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12,
          "vocab_size": 30522, "max_position_embeddings": 514}  # fmt: skip


class Compared(NamedTuple):
    """A family.

    Attributes:
        attention: what transformers runs.
        fill: share of the positions that are tokens.
        ratio: how many times as long transformers takes, the median over rounds.
        rounds: in each of which both are timed.
    """

    model_type: str
    attention: str
    fill: float
    ratio: float
    rounds: int


def _model(family: Family) -> nn.Module:
    config = family.config()
    for name, value in _SIZES.items():
        setattr(config, name, value)
    setattr(config, "hidden_dim" if hasattr(config, "hidden_dim") else "intermediate_size", 1536)
    torch.manual_seed(0)
    with quiet():
        return family.model(config).eval()


def compare(model_type: str, *, seconds: float = 15.0, device: str = "auto") -> Compared:
    """Run a model of a family in turns with its accelerated copy.

    Raises:
        AssertionError: ours is not as exact as theirs.
    """
    where, family = resolve_device(device), load(model_type)
    theirs, ours = (_model(family).to(where) for _ in range(2))
    if type(theirs)._supports_sdpa:
        theirs.set_attn_implementation("sdpa")
    fastbert.accelerate(ours, frozen=True)
    lengths = torch.linspace(1, _LENGTH, _SEQUENCES).round()
    mask = (torch.arange(_LENGTH) < lengths[:, None]).long()
    ids = torch.randint(1000, 30000, mask.shape, generator=torch.Generator().manual_seed(0))
    padding = theirs.config.pad_token_id or 0
    inputs = {"input_ids": ids.where(mask.bool(), padding).to(where), "attention_mask": mask}
    on_device = {**inputs, "attention_mask": mask.to(where)}
    with torch.inference_mode():
        real = mask.bool()
        found, plain = (model(**on_device)[0].cpu()[real] for model in (ours, theirs))
        oracle = theirs.double()(**on_device)[0].cpu()[real]
        theirs.float()
        assert_within_budget(found, oracle, plain, model_type)
        clock, models = clock_for(where.type), {"ours": ours, "theirs": theirs}
        calls = {
            name: clock.prepare(lambda x, model=model: model(**x), [on_device])
            for name, model in models.items()
        }
        samples = interleave(calls, seconds=seconds)
    ratios = [
        b.wall / a.wall if a.device is None else b.device / a.device
        for a, b in zip(samples["ours"], samples["theirs"], strict=True)
    ]
    return Compared(
        model_type,
        theirs.config._attn_implementation or "eager",
        mask.float().mean().item(),
        statistics.median(ratios),
        len(ratios),
    )


def main() -> None:
    """Print a line for each family.

    What ``--json`` prints may go to ``benchmarks/results/families-*.jsonl``, of which the newest is
    in README.md.
    """
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("families", nargs="*", default=MODEL_TYPES, help="default: all")
    parser.add_argument("--seconds", type=float, default=15.0, help="for each family")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args()
    device = resolve_device(options.device).type
    facts = machine_facts(device)
    if not options.json:
        print(f"{facts['device']}, torch {facts['torch']}, transformers {facts['transformers']}")
    for model_type in options.families:
        found = compare(model_type, seconds=options.seconds, device=options.device)
        if options.json:
            print(json.dumps({**found._asdict(), "machine": facts}), flush=True)
            continue
        print(
            f"{model_type:>14}: {found.ratio:.2f}x {found.attention}, {found.rounds} rounds; "
            f"1 / fill is {1 / found.fill:.2f}"
        )


if __name__ == "__main__":
    main()
