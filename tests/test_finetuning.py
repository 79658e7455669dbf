"""Fine-tuning runs: every task learns what there is, losses are transformers' own, no end of a
process changes anything."""

import csv
import html
import json
import random
import signal
from dataclasses import asdict
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from forked import launched
from runs import At, metrics_of, weights_of
from torch.utils.data import DataLoader

import fastbert
from fastbert.finetuning.finetune import Request, prepare
from fastbert.finetuning.trainer import RowBatches
from fastbert.tasks.errors import InputError, LoadError
from fastbert.training import PackedCollator

pytestmark = [
    pytest.mark.usefixtures("on_torch", "undrawn"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]

_slow = partial(pytest.param, marks=pytest.mark.slow)  # one of each kind is quick
FILLER = ("the", "capital", "of", "france", "is", "a", "city", "in", "italy", "and")


def sentence(draw, *words, low=3, high=9):
    """Words among others, at random places."""
    made = [draw.choice(FILLER) for _ in range(draw.randint(low, high))]
    for word in words:
        made.insert(draw.randint(0, len(made)), word)
    return made


def rows_of(task, count, seed=0):
    """What a tiny model can learn: a word decides."""
    draw, rows = random.Random(seed), []
    for i in range(count):
        yes = i % 2 == 0
        word = "paris" if yes else "rome"
        text = " ".join(sentence(draw, word))
        if task == "classification":
            rows.append({"text": text, "label": "north" if yes else "south"})
        elif task == "pairs":
            other = " ".join(sentence(draw, "madrid" if i % 3 else "spain"))
            rows.append({"text_a": other, "text_b": text, "label": int(yes)})
        elif task == "multi-label":
            has = [name for name in ("paris", "madrid") if draw.random() < 0.5]
            rows.append({"text": " ".join(sentence(draw, *has)), "labels": has})
        elif task == "regression":
            rows.append({"text": text, "score": 1.0 if yes else -1.0})
        elif task == "spans":
            places = {"paris": "CITY", "rome": "CITY", "spain": "LAND"}
            found = [{"start": text.index(w), "end": text.index(w) + len(w), "label": name}
                     for w, name in places.items() if w in text]  # fmt: skip
            rows.append({"text": text, "spans": found})
        elif task == "multiple-choice":
            choices = [" ".join(sentence(draw, other, high=4)) for other in ("madrid", "spain")]
            choices.insert(i % 3, text)
            context = "paris" if yes else "rome"
            rows.append({"context": context, "choices": choices, "label": i % 3})
        elif task == "answering":
            words = sentence(draw, word, low=20, high=60)
            rows.append({"question": "city", "context": " ".join(words), "answers": [word]})
        else:
            words = sentence(draw, word, "spain")
            tags = {"paris": "B-CITY", "rome": "B-CITY", "spain": "B-LAND"}
            rows.append({"tokens": words, "tags": [tags.get(w, "O") for w in words]})
    return rows


def write(path, rows):
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def request_in(folder, tiny_folder, text_cache):
    """Makes requests of runs that take a second, in a folder."""

    def make(kind="classification", output="run", rows=None, **options):
        train = write(folder / "train.jsonl", rows or rows_of(kind, 64))
        options = {
            "model": str(tiny_folder), "epochs": 4, "batch_size": 8, "max_length": 40,
            "learning_rate": 3e-3, "dev_share": 0.25, "patience": 0, "device": "cpu",
            "cache_dir": text_cache, "train": train, **options,
        }  # fmt: skip
        return Request(output=str(folder / output), **options)

    return make


@pytest.fixture
def request_for(tiny_folder, text_cache, tmp_path):
    return request_in(tmp_path, tiny_folder, text_cache)


@pytest.fixture(scope="module")
def whole(tiny_folder, text_cache, tmp_path_factory):
    """A run that nothing has stopped: its folder and its verdict."""
    folder = tmp_path_factory.mktemp("whole")
    with fastbert.backend("torch"):
        return folder / "run", prepare(request_in(folder, tiny_folder, text_cache)()).train()


@pytest.fixture
def finetune(request_for):
    def call(*args, callbacks=(), allow=(), **options):
        return prepare(request_for(*args, **options)).train(callbacks=callbacks, allow=allow)

    return call


def ends():
    signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize(
    ("task", "head", "pipeline"),
    [
        pytest.param("classification", "BertForSequenceClassification", "text-classification",
                     marks=pytest.mark.draws),
        _slow("pairs", "BertForSequenceClassification", "text-classification"),
        _slow("multi-label", "BertForSequenceClassification", "text-classification"),
        _slow("regression", "BertForSequenceClassification", "text-classification"),
        _slow("tagging", "BertForTokenClassification", "token-classification"),
        _slow("spans", "BertForTokenClassification", "token-classification"),
        _slow("answering", "BertForQuestionAnswering", None),
        _slow("multiple-choice", "BertForMultipleChoice", None),
    ],
)  # fmt: skip
def test_every_task_learns(finetune, tmp_path, task, head, pipeline):
    test = write(tmp_path / "test.jsonl", rows_of(task, 40, seed=1))
    epochs = 24 if task == "multi-label" else 8  # two words, of which each says something
    verdict = finetune(task, test=test, epochs=epochs)
    score, (_, baseline) = verdict.scores[verdict.metric], verdict.baseline
    assert score > 0.9 and score > baseline + 0.2 and score > verdict.untrained, verdict
    assert (verdict.split, verdict.rows) == ("test", 40)
    run = tmp_path / "run"
    lines = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == list(range(1, 41))
    assert all(line.keys() >= {"prediction", "label"} for line in lines)
    if task == "answering":
        assert "no_answer_threshold" in (run / "best/config.json").read_text()
        assert np.mean([line["prediction"] in line["label"] for line in lines]) > 0.8
    elif task != "regression":
        assert np.mean([line["prediction"] == line["label"] for line in lines]) > 0.8
    for folder in ("best", "final"):
        model = getattr(transformers, head).from_pretrained(run / folder)
        assert model.config.architectures == [head]
        if pipeline is not None:
            assert transformers.pipeline(pipeline, model=str(run / folder))("paris is in france")
    card = (run / "final" / "README.md").read_text()
    other = {"answering": "question-answering", "multiple-choice": "multiple-choice"}
    assert str(verdict) in card and f"pipeline_tag: {pipeline or other[task]}" in card
    page = (run / "report.html").read_text("utf-8")
    assert html.escape(str(verdict)) in page and "best model" in page
    assert "<script" not in page and "src=" not in page and 'href="http' not in page
    assert ("What is taken for what" in page) == (task in ("classification", "pairs"))
    evaluated = [line for line in metrics_of(run) if f"eval_{verdict.metric}" in line]
    assert [line["step"] for line in evaluated][:2] == [0, -(-verdict.steps // epochs)]


class Losses(transformers.Trainer):
    """transformers' own Trainer on the batches that it is given.

    Answers one by one: in a padded batch transformers' loss takes padding for possible answers.
    """

    loader = None

    def get_train_dataloader(self):
        return self.loader

    def compute_loss(self, model, inputs, return_outputs=False, **options):
        if not isinstance(model, transformers.BertForQuestionAnswering):
            return super().compute_loss(model, inputs, return_outputs, **options)
        labels, lengths = inputs.pop("labels"), inputs["attention_mask"].sum(1)
        rows = [
            model(
                **{name: x[i : i + 1, :length] for name, x in inputs.items()},
                start_positions=labels[i : i + 1, 0],
                end_positions=labels[i : i + 1, 1],
            ).loss
            for i, length in enumerate(lengths)
        ]
        return torch.stack(rows).mean()


@pytest.mark.parametrize(
    "task",
    [
        _slow("classification"), _slow("pairs"), _slow("multi-label"), _slow("regression"),
        "tagging", _slow("answering"), _slow("multiple-choice"),
    ],
)  # fmt: skip
def test_the_losses_of_transformers(finetune, request_for, tmp_path, task):
    """In every step, with the same batches and without dropout."""
    options = {"dropout": 0.0, "epochs": 3, "learning_rate": 1e-3}
    ours = prepare(request_for(task, **options))
    theirs = getattr(transformers, f"Bert{ours.task.head}")(ours.model.config)
    theirs.load_state_dict(ours.model.state_dict())
    ours.train()
    found = [line["loss"] for line in metrics_of(tmp_path / "run") if "loss" in line]
    arguments = transformers.TrainingArguments(
        str(tmp_path / "theirs"), max_steps=ours.steps, learning_rate=1e-3, weight_decay=0.01,
        warmup_steps=int(np.ceil(0.06 * ours.steps)), logging_steps=1, save_strategy="no",
        report_to=[], disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = Losses(theirs, arguments, train_dataset=ours.data)
    trainer.loader = DataLoader(
        ours.data,
        batch_sampler=RowBatches(ours.lengths, ours.pass_tokens, ours.steps, seed=0),
        collate_fn=PackedCollator(padded=True, labels=ours.task.labels_of),
    )
    trainer.train()
    expected = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-6)
    assert np.ptp(found) > 1e-3, "something was trained"


@pytest.mark.parametrize(("step", "workers"), [_slow(1, 0), _slow(7, 0), _slow(9, 2)])
def test_stopped_and_resumed_is_not_stopped(finetune, whole, tmp_path, step, workers):
    folder, verdict = whole
    with pytest.raises(SystemExit) as stop:
        finetune(output="parts", callbacks=[At(step, ends)])
    assert stop.value.code == 128 + signal.SIGTERM
    parts = finetune(output="parts", workers=workers)
    assert verdict._replace(overhead=None) == parts._replace(overhead=None)
    assert metrics_of(folder) == metrics_of(tmp_path / "parts")
    for name in ("best", "final"):
        one, other = (weights_of(run / name) for run in (folder, tmp_path / "parts"))
        assert all(torch.equal(one[key], other[key]) for key in one | other)


@pytest.mark.slow
def test_a_finished_run_and_what_changed(finetune, tmp_path):
    first = finetune()
    before = metrics_of(tmp_path / "run")
    assert finetune()._replace(overhead=first.overhead) == first
    assert metrics_of(tmp_path / "run") == before
    with pytest.raises(InputError, match=r"seed was 0 and is 1.*--allow-change"):
        finetune(seed=1)
    with pytest.raises(InputError, match=r"train was '\w+' and is '\w+'"):
        finetune(rows=rows_of("classification", 64, seed=5))


PROGRAM = """
import sys
from fastbert.finetuning.finetune import Request, prepare

print(prepare(Request(**eval(sys.argv[1]))).train())
"""


@pytest.mark.slow
def test_two_processes_are_one(request_for, tmp_path):
    """A pass of each is two of one; dev is shared out. Without dropout, which each draws for
    itself."""
    said = []
    for processes in (1, 2):
        request = request_for(output=str(processes), dropout=0.0, batch_size=16, device_tokens=100)
        for done in launched(PROGRAM, repr(asdict(request)), processes=processes):
            assert done.returncode == 0, done.stderr[-3000:]
            said.append(done.stdout)
    assert said == [said[0]] * 3, "all say the same"
    for mine, theirs in zip(*(metrics_of(tmp_path / name) for name in "12"), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-5)


@pytest.mark.slow
def test_low_rank_updates(finetune, request_for, tmp_path):
    """Layers stay; what is saved is the plain model that updates and layers come to; resume too."""
    prepared = prepare(request_for(lora=4))
    trained = {name for name, p in prepared.model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or "modules_to_save" in name for name in trained) and trained
    options = {"lora": 4, "epochs": 16, "learning_rate": 2e-2}
    whole = finetune(output="whole", **options)
    assert whole.scores["accuracy"] > 0.9
    with pytest.raises(SystemExit):
        finetune(output="parts", callbacks=[At(7, ends)], **options)
    parts = finetune(output="parts", **options)
    assert whole._replace(overhead=None) == parts._replace(overhead=None)
    assert metrics_of(tmp_path / "whole") == metrics_of(tmp_path / "parts")
    model = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "whole/best")
    assert not any("lora" in name for name in model.state_dict())
    before = prepared.model.get_base_model().bert.embeddings.word_embeddings.weight
    assert torch.equal(model.bert.embeddings.word_embeddings.weight, before)


def test_frozen_layers_stay(request_for, finetune, tmp_path):
    from safetensors.torch import load_file

    prepared = prepare(request_for(freeze=1, epochs=1))
    before = {name: value.clone() for name, value in prepared.model.state_dict().items()}
    prepared.train()
    after = load_file(tmp_path / "run/final/model.safetensors")
    same = {name for name, value in after.items() if torch.equal(value, before[name])}
    assert {name for name in after if name.startswith(("bert.emb", "bert.encoder.layer.0"))} == same
    with pytest.raises(InputError, match=r"--freeze of at most 2.* got 3"):
        prepare(request_for(freeze=3))
    with pytest.raises(InputError, match="got both"):
        prepare(request_for(freeze=1, lora=1))


def test_balance_and_smoothing(request_for):
    rows = [*rows_of("classification", 12), *rows_of("classification", 40)[1::2]]  # 6 and 26
    prepared = prepare(request_for(rows=rows, balance=True, label_smoothing=0.2))
    task, trained = prepared.task, prepared.splits.train.column("label")
    counts = torch.tensor([trained.count(name) for name in ("north", "south")])
    assert 0 < counts[0] < counts[1] and counts.sum() == 24
    logits, labels = torch.randn(9, 2), torch.randint(0, 2, (9,))
    loss = task.loss(SimpleNamespace(logits=logits), labels, None)
    expected = torch.nn.functional.cross_entropy(
        logits, labels, 12 / counts, reduction="sum", label_smoothing=0.2
    )
    torch.testing.assert_close(loss, expected)
    with pytest.raises(InputError, match="with classification, got them with regression"):
        prepare(request_for("regression", balance=True))


@pytest.mark.slow
def test_passes_add_up_to_a_step(finetune, tmp_path):
    """One step of several passes is a step of all their rows."""
    options = {"dropout": 0.0, "epochs": 2, "batch_size": 16}
    finetune(output="one", **options)
    finetune(output="several", device_tokens=60, **options)
    one, several = ([line["loss"] for line in metrics_of(tmp_path / name) if "loss" in line]
                    for name in ("one", "several"))  # fmt: skip
    assert len(several) >= len(one)
    assert np.mean(several) == pytest.approx(np.mean(one), rel=0.2)


@pytest.mark.slow
def test_patience_and_over_fitting(finetune, tmp_path):
    """Labels that nothing tells: training gets better by heart, dev does not."""
    draw = random.Random(0)
    rows = [{"text": " ".join(sentence(draw)), "label": draw.randint(0, 1)} for _ in range(40)]
    verdict = finetune(rows=rows, epochs=16, learning_rate=5e-3)
    step, best, last = verdict.overfits
    assert step < verdict.steps and best < last
    assert any("the loss on dev rose from" in line for line in verdict.lines())
    evaluated = [line for line in metrics_of(tmp_path / "run") if "eval_loss" in line]
    best = max(evaluated, key=lambda line: (line["eval_accuracy"], -line["eval_loss"]))
    assert best["step"] == verdict.best_step != evaluated[-1]["step"]
    lines = [json.loads(x) for x in (tmp_path / "run/predictions.jsonl").read_text().splitlines()]
    loss = np.mean([-np.log(line["probabilities"][line["label"]]) for line in lines])
    assert loss == pytest.approx(best["eval_loss"], rel=1e-4), "the best model is the one kept"
    early = finetune(output="early", rows=rows, epochs=16, learning_rate=5e-3, patience=2)
    assert early.steps < verdict.steps


def test_the_report_says_what_is_widened(request_for):
    rows = [*rows_of("spans", 30), {"text": "parisian", "spans": [
        {"start": 0, "end": 5, "label": "CITY"}]}] * 2  # fmt: skip
    finetuning = prepare(request_for(rows=rows))
    told = [line for line in finetuning.report().lines() if "inside a word" in line[1]]
    assert sum(int(text.split()[0]) for _, text in told) == 2 and told[0][0] in ("train", "dev")


def test_the_report(request_for, tmp_path):
    rows = rows_of("classification", 40)
    rows += [rows[0], rows[1], {"text": "paris " * 60, "label": "north"}]
    dev = [*rows_of("classification", 8, seed=3), rows[2], {"text": "a city", "label": "east"}]
    finetuning = prepare(request_for(rows=rows, dev=write(tmp_path / "dev.jsonl", dev)))
    report = finetuning.report()
    assert report.rows == {"train": 43, "dev": 10}
    assert report.labels == {"north": 22, "south": 21} and report.unseen == ("east",)
    assert (report.duplicates, report.shared) == (2, {"dev": 1})
    assert report.cut == {"train": 1, "dev": 0} and report.lengths[2] == 40
    assert report.baseline == ("always 'north'", 0.5) and 0 <= report.untrained <= 1
    told = dict(report.lines())
    assert told["rows"] == "43 train, 10 dev" and told["labels"] == "north 51.2%, south 48.8%"
    assert told["cut"] == "1 rows of train are longer than --max-length"
    assert told["not trained"] == "labels that no row to train on has: east"
    assert told["leak"] == "1 rows of dev are to be trained on too"


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"text": "a", "label": 1}] * 8, {}, "two classes or more .* got '1' in every row"),
        ([{"words": "a", "label": 1}] * 8, {}, "columns of a task .* got words, label"),
        ([{"text": "a", "label": 1}] * 8, {"task": "poetry"}, "--task of classification, .*poetry"),
        ([{"text": "a", "label": 1}] * 8, {"task": "tagging"}, "text and spans, .* text, label"),
        ([{"text": "a", "label": i % 2} for i in range(7)] + [{"text": " ", "label": 0}], {},
         r"row 8 of .*: expected a text in 'text', got an empty one"),
        ([{"text": "a", "label": str(i % 2) if i else ""} for i in range(8)], {},
         "a label in 'label', row 1 .* got an empty one"),
        ([{"text": "a", "label": None if i == 3 else i % 2} for i in range(8)], {},
         "labels of one kind.* got None in row 4"),
        ([{"text": "a", "score": float("nan") if i == 3 else i} for i in range(8)], {},
         "a number in 'score', row 4"),
        ([{"tokens": ["a", "b"], "tags": ["O"] * (1 + (i != 2))} for i in range(8)], {},
         "2 tags in row 3 .* got 1"),
        ([{"tokens": ["a", "b"], "tags": ["O", "PER"]}] * 8, {}, "B-X, I-X and O in row 1.* 'PER'"),
        ([{"tokens": ["a"], "tags": ["O"]}] * 8, {}, "an entity or more in .* got none"),
        ([{"text": "a", "spans": [{"start": 0, "end": 9, "label": "X"}]}] * 8, {},
         "in characters of its text, got .*'end': 9"),
        ([{"context": "a", "choices": ["a", "b"], "label": 2}] * 8, {},
         "a whole number from 0 to 1 in 'label'.* row 1 .* got 2"),
        ([{"context": "a", "choices": ["a"], "label": 0}] * 8, {},
         r"row 1 .* two texts or more in 'choices', got \['a'\]"),
        (rows_of("multiple-choice", 8), {"long": "windows"}, "--long cut with multiple choice"),
        (rows_of("classification", 2), {"dev_share": 0.9},
         "rows to train on and rows to split off .* got 2"),
        (rows_of("classification", 8), {"max_length": 41}, "--max-length of at most 40.* got 41"),
    ],
)  # fmt: skip
def test_what_cannot_be(request_for, rows, options, message):
    with pytest.raises(InputError, match=message):
        prepare(request_for(rows=rows, **options))


@pytest.mark.slow
def test_models_that_do_not_fit(finetune, request_for, tmp_path):
    finetune(epochs=1)
    rows = [{"text": "a city", "label": name} for name in ("one", "two", "three")] * 4
    with pytest.raises(LoadError, match="the labels one, three, two, got one for north, south"):
        prepare(request_for(rows=rows, model=str(tmp_path / "run/best")))
    with pytest.raises(LoadError, match="the labels of a regression, got one for north, south"):
        prepare(request_for("regression", model=str(tmp_path / "run/best")))
    again = prepare(request_for(model=str(tmp_path / "run/best")))
    assert again.new == [], "the head is there"
    for kind in ("regression", "tagging", "answering", "multiple-choice"):
        finetune(kind, output=kind, epochs=1)
        assert prepare(request_for(kind, model=str(tmp_path / kind / "best"))).new == []
    with pytest.raises(LoadError, match="nowhere"):
        prepare(request_for(model="/nowhere"))


@pytest.mark.slow
def test_the_commands(run, tiny_folder, text_cache, tmp_path):
    data = write(tmp_path / "data.csv", rows_of("classification", 80))
    cache = ("--cache-dir", text_cache)
    arguments = ["finetune", data, "-o", tmp_path / "run", "--model", tiny_folder, "--epochs", 12,
                 "--patience", 0, "--batch-size", 8, "--max-length", 40, "--learning-rate", 3e-3,
                 "--device", "cpu", "--dev-share", 0.2, "--test-share", 0.2, *cache]  # fmt: skip
    code, out, err = run(*arguments, "--dry-run")
    assert code == 0 and out == "" and not (tmp_path / "run").exists()
    assert "rows: 51 train, 13 dev, 16 test" in err and "new: classifier.bias" in err
    code, out, err = run(*arguments)
    assert code == 0 and out.count("\n") == 1 and "accuracy 1.000 on 16 test rows" in out
    assert "dev: accuracy" in err and "precision  recall" in err and "right" in err
    best = ("--model", tmp_path / "run/best", "--device", "cpu")
    code, out, err = run("evaluate", data, *best, *cache)
    assert code == 0 and json.loads(out) == {
        "rows": 80,
        "longer": 0,
        "accuracy": 1.0,
        "macro_f1": 1.0,
    }
    code, out, _ = run("classify", "paris is in france", "rome", *best)
    assert [json.loads(line)["prediction"] for line in out.splitlines()] == ["north", "south"]
    code, _, err = run("answer", "who?", "--context", data, *best)
    assert code == 3 and "a checkpoint that answers questions, got one for classification" in err
    code, out, _ = run("predict", data, "-o", tmp_path / "out.jsonl", *best, *cache)
    assert code == 0 and "80 predictions" in out
    code, _, err = run("predict", data, "-o", tmp_path / "out.txt", *best, *cache)
    assert code == 5 and "an output of .jsonl" in err
    code, _, err = run("evaluate", data, "--model", tiny_folder, *cache)
    assert code == 3 and "whose class ends in ForSequenceClassification" in err
