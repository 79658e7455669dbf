"""Small sets to try fine-tuning on: inference, entities, questions, choices.

``python -m fastbert.demo.frames FOLDER`` writes nli, ner, answers and choices, each as
NAME-train.jsonl, NAME-dev.jsonl and NAME-test.jsonl. Every row is a frame with something in each of
its slots. All of it was written for this project and stands in ``frames.json``; people, towns and
firms are invented. No frame of inference and of entities, no pair of a goal and a tool and no name
is in two of the files, so that a score says what carries over to what was never seen; questions ask
for the same kinds of facts everywhere.
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import typer

__all__ = ["main", "sets"]

Row = dict[str, Any]
_SHARES = {"test": 0.3, "dev": 0.15, "train": 0.55}  # of frames, and of what fills them
_ROWS = {
    "nli": {"train": 480, "dev": 90, "test": 180},
    "ner": {"train": 300, "dev": 60, "test": 150},
    "answers": {"train": 600, "dev": 80, "test": 200},
    "choices": {"train": 270, "dev": 50, "test": 180},
}
_INFERENCES = ("entailment", "neutral", "contradiction")
_ENTITIES = {"person": "PER", "place": "LOC", "organisation": "ORG", "date": "DATE"}
_FACTS = 3  # sentences of a context
_CHOICES = 4
_SLOT = re.compile(r"{(\w+)}")


def sets() -> dict[str, dict[str, list[Row]]]:
    """Rows by set and file, always the same ones."""
    source = json.loads(files("fastbert.demo").joinpath("frames.json").read_text("utf-8"))
    draw = random.Random(0)
    shared = {
        name: _share_out(source[name], draw)
        for name in ("names", "surnames", "places", "organisations", "dates", "nli", "ner", "goals")
    }
    makers: dict[str, Callable[[dict[str, list], _Fill], Iterator[Row]]]
    makers = {"nli": _inferences, "ner": _entities, "answers": _questions, "choices": _choices}
    found: dict[str, dict[str, list[Row]]] = {name: {} for name in makers}
    for split in _SHARES:
        part = {name: values[split] for name, values in shared.items()}
        part |= {"facts": source["facts"]}
        fill = _Fill(part | {"days": source["days"]} | source["others"], draw)
        for name, make in makers.items():
            rows = make(part, fill)
            found[name][split] = [next(rows) for _ in range(_ROWS[name][split])]
    return found


def _share_out(values: list[Any], draw: random.Random) -> dict[str, list[Any]]:
    values, found, start = draw.sample(values, len(values)), {}, 0
    for name, share in _SHARES.items():
        end = start + round(share * len(values))
        found[name], start = values[start:end], end
    return found


class _Fill:
    """Draws what stands in slots."""

    def __init__(self, words: dict[str, list[str]], draw: random.Random):
        self.words, self.draw = words, draw

    def value(self, slot: str) -> str:
        """Something for a slot."""
        words, draw = self.words, self.draw
        if slot == "person":
            return f"{draw.choice(words['names'])} {draw.choice(words['surnames'])}"
        if slot == "year":
            return str(draw.randint(1480, 1990))
        if slot in ("number", "n"):
            return f"{draw.randint(3, 900 if slot == 'number' else 19):,}"
        lists = {"name": "names", "other": "names", "town": "places", "day": "days"}
        return draw.choice(words[lists.get(slot, slot if slot in words else f"{slot}s")])

    def values(self, *texts: str) -> dict[str, str]:
        """For the slots of texts that belong together: different ones."""
        found: dict[str, str] = {}
        for slot in dict.fromkeys(_SLOT.findall(" ".join(texts))):
            value = self.value(slot)
            while value in found.values():
                value = self.value(slot)
            found[slot] = value
        return found


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _inferences(part: dict[str, list], fill: _Fill) -> Iterator[Row]:
    while True:
        for premise, *hypotheses in part["nli"]:
            for label, hypothesis in zip(_INFERENCES, hypotheses, strict=True):
                values = fill.values(premise, *hypotheses)
                yield {
                    "text_a": premise.format(**values),
                    "text_b": hypothesis.format(**values),
                    "label": label,
                }


def _entities(part: dict[str, list], fill: _Fill) -> Iterator[Row]:
    while True:
        for frame in part["ner"]:
            text, spans, end = "", [], 0
            for slot in _SLOT.finditer(frame):
                text, end = text + frame[end : slot.start()], slot.end()
                value = fill.value(slot[1])
                label = _ENTITIES[slot[1]]
                spans.append({"start": len(text), "end": len(text) + len(value), "label": label})
                text += value
            yield {"text": _sentence(text + frame[end:]), "spans": spans}


def _questions(part: dict[str, list], fill: _Fill) -> Iterator[Row]:
    while True:
        # One frame more than the context has: every eighth question is about what is not in it.
        frames = fill.draw.sample(part["facts"], _FACTS + 1)
        facts = [(fact, question, slot, fill.values(fact)) for fact, question, slot in frames]
        sentences = [_sentence(fact.format(**values)) for fact, _, _, values in facts]
        asked = fill.draw.choice([*range(_FACTS)] * 7 + [_FACTS] * 3)
        _, question, slot, values = facts[asked]
        context, answers = " ".join(sentences[:_FACTS]), []
        if asked < _FACTS:
            before = sum(len(sentence) + 1 for sentence in sentences[:asked])
            start = before + sentences[asked].index(values[slot])
            answers.append((values[slot], start))
        yield {
            "question": question.format(**values),
            "context": context,
            "answers": {
                "text": [text for text, _ in answers],
                "answer_start": [start for _, start in answers],
            },
        }


def _choices(part: dict[str, list], fill: _Fill) -> Iterator[Row]:
    while True:
        for goal, tool in part["goals"]:
            others = [other for _, other in part["goals"] if other != tool]
            choices = [tool, *fill.draw.sample(others, _CHOICES - 1)]
            fill.draw.shuffle(choices)
            name = fill.value("name")
            yield {
                "context": f"{name} wanted to {goal}. For that {name} needed",
                "choices": [f"{choice}." for choice in choices],
                "label": choices.index(tool),
            }


def main() -> None:
    """Write the files into the folder that the first argument names."""
    if len(sys.argv) != 2:
        sys.exit("expected the name of a folder to write: python -m fastbert.demo.frames FOLDER")
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, splits in sets().items():
        for split, rows in splits.items():
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{name}-{split}.jsonl").write_text(text, "utf-8")
        counts = ", ".join(f"{len(rows):,} rows to {split}" for split, rows in splits.items())
        typer.echo(f"{name}: {counts} on in {folder}")


if __name__ == "__main__":
    main()
