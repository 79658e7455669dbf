"""Answers to questions, taken out of a text (SQuAD: Rajpurkar et al., 1606.05250, 1806.03822).

A context that is longer than the model is read in windows. Every token is asked whether the answer
begins or ends there; the best span of all windows is the answer, unless the first token of every
window, which stands for none, has more.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import BatchEncoding, PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from ..families.heads import packed_span_loss
from ..tasks.errors import InputError
from .table import Table
from .tasks import Example, Task, log_softmax

__all__ = ["Answering", "Answers", "best_span", "exact_match", "token_f1"]

_LONGEST = 30  # tokens of an answer, as in BERT's own script


class Answers(NamedTuple):
    """What is right: texts, and where in the context each is; none where there is no answer."""

    texts: tuple[str, ...]
    spans: tuple[tuple[int, int], ...]


class _Said(NamedTuple):
    """The best span of a row, its score and that of no answer; the logits that say so."""

    text: str
    start: int
    end: int
    score: float
    none: float
    parts: list[tuple[np.ndarray, Example]]


class Answering(Task):
    """Extractive question answering."""

    name, best = "answering", "f1"
    head, labels_of = "ForQuestionAnswering", "sequence"
    pipeline = "question-answering"
    has_own_loss = True
    threshold = 0.0  # by which an answer has to beat none

    @property
    def config(self) -> dict[str, Any]:
        return {}

    def fit(self, said: list[_Said], gold: list[Answers]) -> None:
        """Set the threshold at which rows that nothing is learned from have the highest F1."""
        margins = np.array([one.score - one.none for one in said])
        answered = np.array(
            [self._f1(one.text, right) for one, right in zip(said, gold, strict=True)]
        )
        silent = np.array([self._f1("", right) for right in gold])
        order = np.argsort(margins)
        # With k rows of the lowest margins without an answer.
        none_below = np.concatenate([[0], np.cumsum(silent[order])])
        answer_above = answered.sum() - np.concatenate([[0], np.cumsum(answered[order])])
        k = int((none_below + answer_above).argmax())
        bounds = np.concatenate([[margins.min() - 1], margins[order], [margins.max() + 1]])
        self.threshold = float((bounds[k] + bounds[k + 1]) / 2)

    @staticmethod
    def _f1(said: str, gold: Answers) -> float:
        return max(token_f1(said, text) for text in gold.texts or ("",))

    @classmethod
    def of(cls, *tables: Table) -> Answering:
        task = cls([])
        if not any(answers.texts for answers in task.gold(tables[0])):
            raise InputError(
                f"expected an answer or more in 'answers' of {tables[0].name!r}, got none in all "
                "rows"
            )
        return task

    def problems(self, table: Table) -> dict[int, str]:
        found = {}
        for name in ("question", "context"):
            for place, value in enumerate(_column(table, name)):
                if not isinstance(value, str) or not value.strip():
                    found.setdefault(place, f"expected a text in {name!r}, got {value!r}")
        return found

    def gold(self, table: Table) -> list[Answers]:
        contexts = _column(table, "context")
        rows = enumerate(zip(contexts, _column(table, "answers"), strict=True), table.first)
        return [_answers_in(*row, f"row {number} of {table.name!r}") for number, row in rows]

    def encode(
        self,
        table: Table,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        *,
        windows: bool = True,
    ) -> tuple[list[Example], int]:
        """In windows always, since an answer that is cut off is no answer."""
        self.check(table)
        contexts = table.column("context")
        texts = [[q.strip() for q in table.column("question")], contexts]
        examples, _ = self._windows(tokenizer, texts, max_length, True, "only_second")
        return [{**x, "context": contexts[x["row"]]} for x in examples], 0

    def places(self, made: BatchEncoding, i: int) -> Example:
        """Where in the context each token is, ``[n, 2]``; -1 for what is not in it."""
        inside = np.array([part == 1 for part in made.sequence_ids(i)])
        return {"offsets": np.where(inside[:, None], made["offset_mapping"][i], -1)}

    def targets(self, example: Example, gold: Answers) -> Example:
        """First and last token of the first answer, or 0 and 0 where it is not in the window."""
        labels = (0, 0)
        for start, end in gold.spans[:1]:
            offsets = example["offsets"]
            first = np.flatnonzero((offsets[:, 0] <= start) & (start < offsets[:, 1]))
            last = np.flatnonzero((offsets[:, 0] < end) & (end <= offsets[:, 1]))
            if first.size and last.size:
                labels = int(first[0]), int(last[-1])
        return {"labels": list(labels)}

    def loss(self, outputs: ModelOutput, labels: Tensor, bounds: Tensor) -> Tensor:
        """Of starts and ends, over the tokens of each sequence."""
        return 2 * packed_span_loss(outputs, labels, bounds, num_items=1)

    def logits(self, outputs: ModelOutput, lengths: list[int]) -> list[np.ndarray]:
        both = torch.stack([outputs.start_logits[0], outputs.end_logits[0]], -1)
        return [part.numpy() for part in both.detach().float().cpu().split(lengths)]

    def merge(self, parts: list[tuple[np.ndarray, Example]]) -> _Said:
        none = min(float(logits[0].sum()) for logits, _ in parts)
        spans = [best_span(logits, example["offsets"]) for logits, example in parts]
        score, start, end = max(spans)
        text = parts[0][1]["context"][start:end]
        return _Said(text, start, end, score, none, parts)

    def predict(self, said: _Said) -> str:
        return said.text if said.score - said.none > self.threshold else ""

    def losses(self, said: _Said, gold: Answers) -> np.ndarray:
        found = []
        for logits, example in said.parts:
            start, end = self.targets(example, gold)["labels"]
            of_start, of_end = -log_softmax(logits.T)
            found.append((of_start[start] + of_end[end]) / 2)
        return np.array(found)

    def describe(self, said: _Said) -> dict[str, Any]:
        """The answer, where it is in the context, and by how much it beats no answer."""
        text = self.predict(said)
        return {
            "prediction": text,
            "start": said.start if text else None,
            "end": said.end if text else None,
            "margin": said.score - said.none,
        }

    def told(self, gold: Answers) -> list[str]:
        return [*gold.texts]

    def score(self, predictions: list[str], gold: list[Answers]) -> dict[str, float]:
        pairs = [*zip(predictions, gold, strict=True)]
        return {
            "f1": float(np.mean([self._f1(p, g) for p, g in pairs])),
            "exact": float(
                np.mean([max(exact_match(p, t) for t in g.texts or ("",)) for p, g in pairs])
            ),
        }

    def baseline(self, train: list[Answers], gold: list[Answers]) -> tuple[str, list[str]]:
        return "never an answer", [""] * len(gold)


def best_span(logits: np.ndarray, offsets: np.ndarray) -> tuple[float, int, int]:
    """The highest sum of a start's and an end's logit, and the span of characters from the one to
    the other; within the context, `_LONGEST` tokens at most.

    Args:
        logits: ``[n, 2]``, of starts and ends.
        offsets: ``[n, 2]``, as `Answering.places`.
    """
    inside = np.flatnonzero(offsets[:, 0] >= 0)
    if not inside.size:
        return float("-inf"), 0, 0
    sums = logits[inside, 0][:, None].astype(np.float64) + logits[inside, 1][None]
    ahead = np.arange(inside.size)[None] - np.arange(inside.size)[:, None]
    sums[(ahead < 0) | (ahead >= _LONGEST)] = -np.inf
    first, last = np.unravel_index(sums.argmax(), sums.shape)
    start, end = offsets[inside[first], 0], offsets[inside[last], 1]
    return float(sums[first, last]), int(start), int(end)


def _normalized(text: str) -> list[str]:
    """Words without case, punctuation and articles, as SQuAD's script compares them."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def exact_match(said: str, right: str) -> float:
    """1 or 0."""
    return float(_normalized(said) == _normalized(right))


def token_f1(said: str, right: str) -> float:
    """Of the words that both have."""
    mine, theirs = _normalized(said), _normalized(right)
    if not mine or not theirs:
        return float(mine == theirs)
    shared = sum((Counter(mine) & Counter(theirs)).values())
    return 2 * shared / (len(mine) + len(theirs))


def _column(table: Table, name: str) -> list[Any]:
    if name not in table.columns:
        raise InputError(
            f"expected columns question, context and answers in {table.name!r}, got "
            f"{', '.join(table.columns)}"
        )
    return table.column(name)


def _answers_in(context: str, value: Any, where: str) -> Answers:
    """Answers as SQuAD has them, ``{"text": [...], "answer_start": [...]}``, or texts, or one.

    Raises:
        InputError: an answer that is not in the context.
    """
    if isinstance(value, dict):
        texts, starts = value.get("text", []), value.get("answer_start")
    else:
        texts, starts = ([value] if isinstance(value, str) and value else value or []), None
    spans = []
    for i, text in enumerate(texts):
        if not isinstance(text, str) or not isinstance(context, str):
            raise InputError(f"expected an answer that is a text in {where}, got {text!r}")
        start = context.find(text) if starts is None else starts[i]
        if not text or start < 0 or context[start : start + len(text)] != text:
            raise InputError(
                f"expected an answer that is in its context in {where}, got {text!r}, which is not"
                + ("" if starts is None or not text else f" at character {start}")
            )
        spans.append((start, start + len(text)))
    return Answers(tuple(texts), tuple(spans))
