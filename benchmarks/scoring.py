"""``fastbert score`` against the plain loop: ``python -m fastbert.benchmarks.scoring``.

The pseudo-log-likelihood of sentences of the demo's passages. The loop gives transformers' class
(sdpa) the masked copies of one sentence at a time, a batch without padding, and keeps the
probability of one word of each. Ours packs copies of many sentences and sees the vocabulary at the
masks alone. The model has the size of MiniLM and random weights, on which times do not depend. Both
take turns over parts of the sentences, behind a check that they say the same.
"""

from __future__ import annotations

import argparse
import copy
import re
import time
from collections.abc import Callable
from itertools import chain
from typing import NamedTuple

import torch
import transformers

import fastbert
from fastbert.demo import model_folder, passages
from fastbert.generation import MaskedModel, score
from fastbert.generation.scoring import places_known, token_ids
from fastbert.tasks.loading import quiet, resolve_device
from fastbert.testing import assert_within_budget

from .results import machine_facts

__all__ = ["Compared", "compare"]


class Compared(NamedTuple):
    """Seconds of all sentences, in turns."""

    fastbert: float
    transformers: float
    sentences: int
    tokens: int

    @property
    def ratio(self) -> float:
        """How many times as long transformers takes."""
        return self.transformers / self.fastbert


def compare(*, sentences: int = 1000, parts: int = 5, device: str = "auto") -> Compared:
    """Score with both, in turns.

    Args:
        sentences: how many; those of the passages, again and again.
        parts: turns of each.

    Raises:
        AssertionError: ours is not as exact as theirs on the first sentences.
    """
    where, texts = resolve_device(device), _sentences(sentences)
    with quiet():
        tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder())
        config = transformers.AutoConfig.from_pretrained(model_folder())
        torch.manual_seed(0)
        theirs = transformers.BertForMaskedLM._from_config(
            copy.deepcopy(config), attn_implementation="sdpa"
        ).to(where).eval()  # fmt: skip
        ours = fastbert.BertForMaskedLM(config, frozen=True)
        ours.load_state_dict(theirs.state_dict())
    model = MaskedModel(ours.to(where).eval(), tokenizer)
    few = [token_ids(model, text) for text in texts[:8]]
    said = list(places_known(model, few, [range(1, len(ids) - 1) for ids in few]))
    exact = _loop(copy.deepcopy(theirs).double(), model, texts[:8])
    actual, baseline = (
        torch.tensor([*chain(*values)]) for values in (said, _loop(theirs, model, texts[:8]))
    )
    oracle = torch.tensor([*chain(*exact)], dtype=torch.float64)
    assert_within_budget(actual, oracle, baseline, "log-probabilities of tokens")
    seconds = [0.0, 0.0]
    size, tokens = -(-len(texts) // parts), 0
    for start in range(0, len(texts), size):
        part = texts[start : start + size]
        seconds[0] += _timed(lambda part=part: list(score(model, part)))
        seconds[1] += _timed(lambda part=part: _loop(theirs, model, part))
        tokens += sum(len(ids) - 2 for ids in tokenizer(part)["input_ids"])
    return Compared(*seconds, len(texts), tokens)


def _sentences(count: int) -> list[str]:
    found = [
        sentence for passage in passages() for sentence in re.split(r"(?<=[.!?]) ", passage["text"])
    ]
    return [found[i % len(found)] for i in range(count)]


@torch.inference_mode()
def _loop(theirs: torch.nn.Module, model: MaskedModel, texts: list[str]) -> list[list[float]]:
    """The logarithm of the probability of each token of each text, all others known."""
    found = []
    for text in texts:
        ids = model.tokenizer(text, return_tensors="pt")["input_ids"].to(theirs.device)
        places = torch.arange(1, ids.shape[1] - 1, device=ids.device)
        copies = ids.repeat(len(places), 1)
        copies[torch.arange(len(places)), places] = model.tokenizer.mask_token_id
        logits = theirs(input_ids=copies, attention_mask=torch.ones_like(copies)).logits
        rows = logits[torch.arange(len(places)), places].log_softmax(-1)
        found.append(rows.gather(1, ids[0, places, None])[:, 0].tolist())
    return found


def _timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    """Print both and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--sentences", type=int, default=1000)
    parser.add_argument("--parts", type=int, default=5, help="turns of each")
    parser.add_argument("--device", default="auto")
    found = compare(**vars(parser.parse_args()))
    facts = machine_facts("cuda" if torch.cuda.is_available() else "cpu")
    print(
        f"{found.sentences:,} sentences, {found.tokens:,} tokens, {facts['device']}, torch "
        f"{facts['torch']}, transformers {facts['transformers']}"
    )
    print(f"    fastbert: {found.fastbert:.1f} s\ntransformers: {found.transformers:.1f} s")
    print(f"       ratio: {found.ratio:.2f}x")


if __name__ == "__main__":
    main()
