"""Ways of writing at the masks of texts; several drafts are computed as one packed batch.

Every draft has numbers of its own to draw by, so that it is the same whatever is written beside it.
Drafts are scored by their mean pseudo-log-likelihood: the mean of the logarithms of what the model
gives each word at a mask, when it knows all others (Salazar et al., 1910.14659).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from ..tasks.errors import InputError
from .drafts import Draft, Template
from .masked import MaskedModel
from .sampling import Sampling
from .scoring import places_known

__all__ = ["SCHEDULES", "gibbs", "left_to_right", "mask_predict"]

LIKELIEST, DRAWN = Sampling(temperature=0.0), Sampling()
Progress = Callable[[int, int], object]
SCHEDULES: dict[str, Callable[[int, float], int]] = {
    "linear": lambda count, left: math.floor(count * left),
    "constant": lambda count, left: math.ceil(count / 3),
}


class _Drafts:
    """Texts that are being written."""

    def __init__(self, model: MaskedModel, templates: Sequence[Template], seed: int):
        self.model, self.templates = model, templates
        self.ids = [list(template.ids) for template in templates]
        self.random = [np.random.default_rng([seed, i]) for i in range(len(templates))]

    def write(self, places: Sequence[Sequence[int]], sampling: Sampling) -> list[dict[int, float]]:
        """Draw words for some places of each draft, all of which are masks while that is done.

        Returns:
            For each draft the logarithm of the probability of each new word, by place.
        """
        mask = self.model.tokenizer.mask_token_id
        chosen = [i for i, each in enumerate(places) if each]
        for i in chosen:
            for place in places[i]:
                self.ids[i][place] = mask
        found: list[dict[int, float]] = [{} for _ in places]
        said = self.model.log_probs([self.ids[i] for i in chosen], [places[i] for i in chosen])
        for i, log_probs in zip(chosen, said, strict=True):
            log_probs = self.templates[i].open_only(log_probs, places[i])
            words = sampling.draw(log_probs, self.random[i])
            for row, (place, word) in enumerate(zip(places[i], words, strict=True)):
                self.ids[i][place] = word
                found[i][place] = float(log_probs[row, word])
        return found

    def finished(self) -> list[Draft]:
        """What was written, with its score."""
        known = places_known(self.model, self.ids, [template.open for template in self.templates])
        return [
            template.draft(ids, float(np.mean(values)))
            for template, ids, values in zip(self.templates, self.ids, known, strict=True)
        ]


def mask_predict(
    model: MaskedModel,
    templates: Sequence[Template],
    *,
    iterations: int = 10,
    schedule: str = "linear",
    sampling: Sampling = LIKELIEST,
    seed: int = 0,
    progress: Progress = lambda done, total: None,
) -> list[Draft]:
    """Write all words at once, then the least certain ones again, and again (Ghazvininejad et al.,
    1904.09324).

    Args:
        iterations: how often the model is asked.
        schedule: how many words are written again: ``"linear"``, fewer each time, or
            ``"constant"``, a third.
        sampling: by default the likeliest word.

    Raises:
        InputError: settings that cannot be.
    """
    sampling.check()
    if iterations < 1:
        raise InputError(f"expected 1 iteration or more, got {iterations}")
    if schedule not in SCHEDULES:
        raise InputError(f"expected a schedule of {', '.join(SCHEDULES)}, got {schedule!r}")
    drafts = _Drafts(model, templates, seed)
    certain = drafts.write([template.open for template in templates], sampling)
    progress(1, iterations)
    for iteration in range(1, iterations):
        left = (iterations - iteration) / iterations
        again = []
        for known in certain:
            count = SCHEDULES[schedule](len(known), left)
            again.append(sorted(sorted(known, key=known.__getitem__)[:count]))
        for known, new in zip(certain, drafts.write(again, sampling), strict=True):
            known |= new
        progress(iteration + 1, iterations)
    return drafts.finished()


def gibbs(
    model: MaskedModel,
    templates: Sequence[Template],
    *,
    sweeps: int = 10,
    sampling: Sampling = DRAWN,
    seed: int = 0,
    progress: Progress = lambda done, total: None,
) -> list[Draft]:
    """Write one word after the other, in random order, with all others known; over and over (Wang
    and Cho, 1902.04094). The first sweep has masks where nothing is written yet.

    Raises:
        InputError: settings that cannot be.
    """
    sampling.check()
    if sweeps < 1:
        raise InputError(f"expected 1 sweep or more, got {sweeps}")
    drafts = _Drafts(model, templates, seed)
    orders = [
        [place for _ in range(sweeps) for place in random.permutation(template.open).tolist()]
        for template, random in zip(templates, drafts.random, strict=True)
    ]
    return _one_by_one(drafts, orders, sampling, progress)


def left_to_right(
    model: MaskedModel,
    templates: Sequence[Template],
    *,
    sampling: Sampling = DRAWN,
    seed: int = 0,
    progress: Progress = lambda done, total: None,
) -> list[Draft]:
    """Write one word after the other from the left; those to the right are masks until then.

    Raises:
        InputError: settings that cannot be.
    """
    drafts = _Drafts(model, templates, seed)
    orders = [template.open for template in templates]
    return _one_by_one(drafts, orders, sampling.check(), progress)


def _one_by_one(
    drafts: _Drafts, orders: list[list[int]], sampling: Sampling, progress: Progress
) -> list[Draft]:
    steps = max(map(len, orders), default=0)
    for step in range(steps):
        drafts.write([order[step : step + 1] for order in orders], sampling)
        progress(step + 1, steps)
    return drafts.finished()
