"""Answers out of texts: every character where it is, in any script; every token in a window."""

import json
import random

import datasets
import numpy as np
import pytest
import torch
import transformers
from tiny import tiny_config

import fastbert
from fastbert.finetuning.answering import (
    Answering,
    Answers,
    _Said,
    best_span,
    exact_match,
    token_f1,
)
from fastbert.finetuning.predicting import Predictor
from fastbert.finetuning.sequences import Classification
from fastbert.finetuning.table import Table, read_table
from fastbert.finetuning.tagging import Tagging
from fastbert.tasks.errors import InputError
from fastbert.training import PackedCollator

pytestmark = pytest.mark.usefixtures("on_torch")
CPU = torch.device("cpu")


def table_of(**columns):
    return Table(datasets.Dataset.from_dict(columns), "rows")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """One that knows every character by itself, so that all scripts have tokens."""
    scripts = sorted({c for text, _ in SCRIPTS for c in text if not c.isspace()})
    characters = [*map(chr, range(33, 127)), *scripts]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    names = [*special, *characters, *(f"##{c}" for c in characters), "paris", "##ville"]
    vocab = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return transformers.BertTokenizer(vocab=vocab, do_lower_case=False)


SCRIPTS = [
    ("Paris-ville is the capital.", "Paris-ville"),
    (
        "\u5f7c\u306f\u6771\u4eac\u90fd\u306b\u4f4f\u3080\u65e5\u672c\u8a9e\u306e\u4eba",
        "\u6771\u4eac\u90fd",
    ),
    ("cafe\u0301 ole\u0301 and more", "cafe\u0301"),
    (
        "so \U0001f44d\U0001f3fd good \U0001f469\u200d\U0001f4bb work",
        "\U0001f469\u200d\U0001f4bb work",
    ),
    ("na\u00efve   spaces\tand\nlines", "spaces\tand"),
    (
        "\u0647\u0630\u0627 \u0643\u062a\u0627\u0628 \u062c\u062f\u064a\u062f",
        "\u0643\u062a\u0627\u0628",
    ),
]


@pytest.mark.parametrize(("context", "answer"), SCRIPTS)
def test_spans_are_the_very_characters(tokenizer, context, answer):
    """There and back: from characters to tokens to characters, in windows of every size."""
    task = Answering([])
    table = table_of(question=["where?"], context=[context], answers=[[answer]])
    (gold,) = task.gold(table)
    assert context[slice(*gold.spans[0])] == answer
    found = 0
    for size in (20, 24, 100):
        examples, _ = task.encode(table, tokenizer, size)
        for example in examples:
            start, end = task.targets(example, gold)["labels"]
            if (start, end) != (0, 0):
                logits = np.zeros((len(example["input_ids"]), 2))
                logits[start, 0] = logits[end, 1] = 9
                score, a, b = best_span(logits, example["offsets"])
                assert context[a:b] == answer and score == 18
                found += 1
    assert found >= 1


def test_windows_cover_every_token(tokenizer):
    """And share a quarter, of texts, words and contexts."""
    draw = random.Random(0)
    text = " ".join("".join(draw.choices("abcdefgh", k=draw.randint(1, 9))) for _ in range(120))
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    examples, longer = Classification(["a", "b"]).encode(
        table_of(text=[text, "short"]), tokenizer, 40, windows=True
    )
    assert longer == 1 and examples[-1]["row"] == 1
    seen, shared = examples[0]["input_ids"][1:-1], 40 // 4
    for example in examples[1:-1]:
        ids = example["input_ids"][1:-1]
        assert ids[:shared] == seen[-shared:] and len(example["input_ids"]) <= 40
        seen += ids[shared:]
    assert seen == whole
    words = text.split()
    examples, _ = Tagging(["O", "B-A", "I-A"]).encode(
        table_of(tokens=[words]), tokenizer, 40, windows=True
    )
    assert {word for example in examples for word in example["words"]} == set(range(120))
    for example in examples:
        for word, place in zip(example["words"], example["first"], strict=True):
            assert tokenizer.convert_ids_to_tokens(example["input_ids"][place]) == words[word][0]
    examples, _ = Answering([]).encode(table_of(question=["who?"], context=[text]), tokenizer, 40)
    characters = {c for x in examples for a, b in x["offsets"] if a >= 0 for c in range(a, b)}
    assert characters == {i for i, c in enumerate(text) if c != " "}


def test_the_best_span_by_trying_all():
    draw = np.random.default_rng(0)
    for _ in range(50):
        count = draw.integers(3, 80)
        inside = np.arange(count) >= draw.integers(0, 3)
        offsets = np.where(inside[:, None], np.arange(count)[:, None] * 3 + [0, 2], -1)
        logits = draw.standard_normal((count, 2))
        spans = [
            (logits[i, 0] + logits[j, 1], i, j)
            for i in range(count) for j in range(i, min(i + 30, count)) if inside[i]
        ]  # fmt: skip
        score, first, last = max(spans)
        assert best_span(logits, offsets) == (pytest.approx(score), first * 3, last * 3 + 2)


def test_windows_are_merged():
    """Of all windows the best span; no answer only if every window says so."""
    task, context = Answering([]), "aa bb cc dd"
    offsets = np.array([[-1, -1], [0, 2], [3, 5]]), np.array([[-1, -1], [6, 8], [9, 11]])
    logits = [[2.0, 2.0], [1.0, 0.0], [0.0, 1.0]], [[1.0, 1.5], [0.0, 0.0], [2.0, 3.0]]
    parts = [
        (np.array(values), {"offsets": places, "context": context})
        for values, places in zip(logits, offsets, strict=True)
    ]
    said = task.merge(parts)
    assert (said.text, said.score, said.none) == ("dd", 5.0, 2.5) and task.predict(said) == "dd"
    assert task.describe(said) == {"prediction": "dd", "start": 9, "end": 11, "margin": 2.5}
    parts[1][0][0] = 9
    assert task.predict(task.merge(parts)) == "dd", "one window that has it is enough"
    parts[0][0][0] = 9
    assert (
        task.predict(task.merge(parts)) == "" and task.describe(task.merge(parts))["start"] is None
    )


def test_the_threshold_is_the_best_one():
    """By trying all of them."""
    draw, task = np.random.default_rng(0), Answering([])
    for _ in range(20):
        margins = draw.standard_normal(12)
        gold = [
            Answers(("x",), ((0, 1),)) if draw.random() < 0.6 else Answers((), ())
            for _ in range(12)
        ]
        texts = ["x" if draw.random() < 0.7 else "y" for _ in range(12)]
        said = [
            _Said(text, 0, 1, margin, 0.0, []) for text, margin in zip(texts, margins, strict=True)
        ]
        scores = []
        for threshold in [-9, *(margins + 1e-9)]:
            task.threshold = threshold
            scores.append(task.score([*map(task.predict, said)], gold)["f1"])
        task.fit(said, gold)
        assert task.score([*map(task.predict, said)], gold)["f1"] == pytest.approx(max(scores))


def test_scores_by_hand():
    """As SQuAD's script: without case, punctuation and articles."""
    assert exact_match("The  Eiffel-Tower!", "eiffeltower") == 1
    assert exact_match("a", "the") == 1 and exact_match("two", "too") == 0
    assert token_f1("the big red dog", "red dog barks") == pytest.approx(2 * 2 / 6)
    assert token_f1("", "") == 1 and token_f1("", "x") == 0 and token_f1("x x", "x") == 2 / 3
    task = Answering([])
    gold = [Answers(("Rome", "in Rome"), ((0, 4), (0, 4))), Answers((), ())]
    assert task.score(["in rome", ""], gold) == {"f1": 1.0, "exact": 1.0}
    assert task.score(["rome italy", "x"], gold) == {"f1": pytest.approx(1 / 3), "exact": 0.0}


def test_the_loss_is_transformers_own():
    """Of sequences of one length, where padding has no part in theirs."""
    torch.manual_seed(0)
    config = tiny_config(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    theirs = transformers.BertForQuestionAnswering(config)
    ours = fastbert.BertForQuestionAnswering(config)
    ours.load_state_dict(theirs.state_dict())
    ids, labels = torch.randint(5, 99, (4, 9)), torch.tensor([[1, 2], [0, 0], [3, 8], [4, 4]])
    expected = theirs(ids, start_positions=labels[:, 0], end_positions=labels[:, 1])
    batch = PackedCollator(ours)(
        [{"input_ids": x.tolist(), "labels": y.tolist()} for x, y in zip(ids, labels, strict=True)]
    )
    outputs = ours(**{k: v for k, v in batch.items() if k != "labels"})
    task = Answering([])
    loss = task.loss(outputs, batch["labels"], batch["cu_seq_lens_q"]) / labels.numel()
    torch.testing.assert_close(loss, expected.loss)
    parts = task.logits(outputs, [9] * 4)
    example = {"offsets": np.arange(9)[:, None] + [0, 1]}
    gold = [Answers(("x",), ((a, b + 1),)) for a, b in labels.tolist()]
    said = [task.merge([(part, {**example, "context": "x" * 9})]) for part in parts]
    mine = np.concatenate([task.losses(*pair) for pair in zip(said, gold, strict=True)])
    assert mine.mean() == pytest.approx(expected.loss.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (
            ["rome"],
            r"an answer that is in its context in row 1 of 'rows', got 'rome', which is not$",
        ),
        ({"text": ["is"], "answer_start": [2]}, "got 'is', which is not at character 2"),
        ({"text": ["is"], "answer_start": [-1]}, "which is not at character -1"),
        ([""], "got ''"),
    ],
)
def test_answers_that_are_nowhere(answers, message):
    table = table_of(question=["where?"], context=["paris is"], answers=[answers])
    with pytest.raises(InputError, match=message):
        Answering([]).gold(table)


def test_files_as_squad_has_them(tmp_path):
    def question(name, answers):
        return {
            "id": name,
            "question": f"{name}?",
            "answers": answers,
            "is_impossible": not answers,
        }

    answer = {"text": "Rome", "answer_start": 3}
    paragraph = {"context": "In Rome.", "qas": [question("a", [answer]), question("b", [])]}
    path = tmp_path / "squad.json"
    path.write_text(json.dumps({"version": "v2.0", "data": [{"paragraphs": [paragraph]}]}))
    table = read_table(path)
    assert table.rows(["id", "question"]) == [("a", "a?"), ("b", "b?")]
    gold = Answering([]).gold(table)
    assert gold == [Answers(("Rome",), ((3, 7),)), Answers((), ())]
    with pytest.raises(InputError, match="got none in all rows"):
        Answering.of(table.take(np.array([1])))
    with pytest.raises(InputError, match=r"a first text of at most 10 tokens.* got 30 in row 1"):
        long = table_of(question=["x " * 30], context=["y " * 30])
        characters = transformers.BertTokenizer(vocab={"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "x": 3})
        Answering([]).encode(long, characters, 20)


def test_the_command_finds_an_answer(run, tiny_folder, tmp_path):
    torch.manual_seed(0)
    transformers.BertForQuestionAnswering(tiny_config(initializer_range=0.3)).save_pretrained(
        tmp_path / "model"
    )
    transformers.AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(tmp_path / "model")
    context = tmp_path / "context.txt"
    context.write_text("paris is the capital of france and rome is in italy " * 9, "utf-8")
    code, out, _ = run("answer", "where is rome", "--context", context, "--model",
                       tmp_path / "model", "--device", "cpu")  # fmt: skip
    said = json.loads(out)
    assert code == 0 and said.keys() == {"prediction", "start", "end", "margin"}
    if said["prediction"]:
        assert context.read_text()[said["start"] : said["end"]] == said["prediction"]
    code, _, err = run("answer", "x", "--context", tmp_path / "no", "--model", tmp_path / "model")
    assert code == 3 and "a text in" in err


@pytest.mark.slow
def test_a_long_document_counts_in_every_part(tiny_folder, tmp_path):
    """Twenty thousand tokens of which one decides, wherever it is, in bounded memory."""
    torch.manual_seed(0)
    folder = str(tmp_path / "model")
    transformers.BertForSequenceClassification(tiny_config(initializer_range=0.3)).save_pretrained(
        folder
    )
    transformers.AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(folder)
    predictor = Predictor(folder, CPU, windows=True)
    words = ["city"] * 20_000
    texts = [" ".join(words)]
    for place in (0, 9_000, 19_999):
        changed = list(words)
        changed[place] = "paris"
        texts.append(" ".join(changed))
    predictions, described, longer = predictor(table_of(text=texts))
    shares = [one["probabilities"]["LABEL_0"] for one in described]
    assert longer == 4 and len(predictions) == 4 and len(set(shares)) == 4
    assert np.ptp(shares) < 0.05, "one of many windows"
    cut = Predictor(folder, CPU)(table_of(text=texts))[1]
    assert cut[0] == cut[2] == cut[3] != cut[1]
