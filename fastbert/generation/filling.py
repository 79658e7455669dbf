"""Several masks of one text together."""

from __future__ import annotations

from ..tasks.errors import InputError
from .drafts import Draft, Template
from .masked import MaskedModel

__all__ = ["fill"]


def fill(model: MaskedModel, template: Template, *, beam: int = 32, top: int = 5) -> list[Draft]:
    """The likeliest ways to fill all masks, by beam search from the left.

    The probability of a way is that of its first word, times that of the second one when the first
    one is known, and so on, with masks to the right; a beam as wide as all beginnings finds the
    likeliest ones for certain. A masked model knows several orders of words and may give each
    another probability.

    Args:
        beam: beginnings that are followed.
        top: ways at most.

    Returns:
        The likeliest first; the score is the logarithm of the probability.

    Raises:
        InputError: settings that cannot be.
    """
    if beam < 1 or top < 1:
        raise InputError(f"expected a beam and a top of 1 or more, got {beam} and {top}")
    begun = [(0.0, template.ids)]
    for place in template.open:
        places = [[place]] * len(begun)
        found = []
        said = model.log_probs([ids for _, ids in begun], places)
        for (score, ids), log_probs in zip(begun, said, strict=True):
            values = template.open_only(log_probs, [place])[0]
            best = values.topk(min(max(beam, top), int(values.isfinite().sum())))
            for value, word in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                found.append((score + value, [*ids[:place], word, *ids[place + 1 :]]))
        found.sort(key=lambda one: -one[0])
        begun = found[: max(beam, top)]
    return [template.draft(ids, score) for score, ids in begun[:top]]
