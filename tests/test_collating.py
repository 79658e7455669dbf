"""Examples to packed and padded batches: the same losses, and nothing mixed up."""

import numpy as np
import pytest
import torch
import transformers
from tiny import specified_by, tiny_config

import fastbert
from fastbert.testing import assert_matches
from fastbert.training import Masking, PackedCollator

pytestmark = pytest.mark.usefixtures("on_torch")
LENGTHS = (9, 4, 12, 1)


def model(name="BertForPreTraining", **options):
    torch.manual_seed(0)
    return getattr(fastbert, name)(tiny_config(**options)).eval()


def examples(**more):
    """One of each length; ``more`` gives a column by what it makes of a length."""
    generator = torch.Generator().manual_seed(0)
    rows = [
        {
            "input_ids": torch.randint(5, 90, (n,), generator=generator).tolist(),
            "token_type_ids": [0] * (n // 2) + [1] * (n - n // 2),
        }
        for n in LENGTHS
    ]
    for index, (row, n) in enumerate(zip(rows, LENGTHS, strict=True)):
        row.update({name: make(index, n) for name, make in more.items()})
    return rows


def of_tokens(index, n):
    return [7 if i % 3 == 0 else -100 for i in range(n)]


def both(rows, model, **options):
    packed = PackedCollator(model, **options)(rows)
    padded = PackedCollator(padded=True, **options)(rows)
    assert "attention_mask" not in packed and "cu_seq_lens_q" not in padded
    return packed, padded


def test_shapes():
    packed, padded = both(examples(next_sentence_label=lambda i, n: i % 2), model())
    total = sum(LENGTHS)
    for name in ("input_ids", "token_type_ids", "position_ids"):
        assert packed[name].shape == (1, total) and packed[name].dtype == torch.int64
    assert packed["position_ids"][0].tolist() == [i for n in LENGTHS for i in range(n)]
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        assert packed[name].tolist() == [0, 9, 13, 25, 26] and packed[name].dtype == torch.int32
    assert packed["max_length_q"] == packed["max_length_k"] == 12
    assert packed["next_sentence_label"].tolist() == [0, 1, 0, 1]
    assert padded["input_ids"].shape == padded["attention_mask"].shape == (4, 12)
    assert padded["attention_mask"].sum(1).tolist() == list(LENGTHS)
    real = padded["attention_mask"].bool()
    for name in ("input_ids", "token_type_ids"):
        assert (padded[name][real] == packed[name][0]).all() and not padded[name][~real].any()


@pytest.mark.parametrize(
    ("head", "columns"),
    [
        ("BertForPreTraining", {"labels": of_tokens, "next_sentence_label": lambda i, n: i % 2}),
        ("BertForMaskedLM", {"labels": of_tokens}),
        ("BertForTokenClassification", {"labels": lambda i, n: [i % 2] * n}),
        ("BertForSequenceClassification", {"label": lambda i, n: i % 2}),
        ("BertForNextSentencePrediction", {"labels": lambda i, n: i % 2}),
    ],
)
def test_packed_and_padded_have_the_loss_of_transformers(head, columns):
    ours = model(head)
    theirs = getattr(transformers, head)(ours.config).eval()
    theirs.load_state_dict(ours.state_dict())
    packed, padded = both(examples(**columns), ours)
    with torch.no_grad():
        expected = theirs(**padded).loss
        for batch in (packed, padded):
            torch.testing.assert_close(ours(**batch).loss, expected, atol=1e-5, rtol=1e-5)


def test_regression_and_several_labels():
    for value, shape in ((lambda i, n: i / 2, (4,)), (lambda i, n: [1.0, 0.0], (4, 2))):
        packed, padded = both(examples(labels=value), model("BertForSequenceClassification"))
        assert packed["labels"].dtype == torch.float32 and packed["labels"].shape == shape
        assert (packed["labels"] == padded["labels"]).all()


def test_as_many_labels_as_tokens_by_chance():
    rows = [{"input_ids": [5, 6, 7], "labels": [1.0, 0.0, 1.0]}] * 2
    assert PackedCollator(padded=True, labels="sequence")(rows)["labels"].dtype == torch.float32
    assert PackedCollator(padded=True)(rows)["labels"].shape == (2, 3)
    with pytest.raises(ValueError, match=r"a label for each token.*got \[2\] for \[3\] tokens"):
        PackedCollator(padded=True, labels="token")([{"input_ids": [5, 6, 7], "labels": [1, 0]}])
    with pytest.raises(ValueError, match="'token' or 'sequence', got 'word'"):
        PackedCollator(padded=True, labels="word")


def test_answers_are_places_in_their_sequence():
    """Packed and one by one, by transformers' own class; an end behind the end is ignored."""
    rows = examples(
        start_positions=lambda i, n: min(i, n - 1), end_positions=lambda i, n: n - (i != 1)
    )
    ours = model("BertForQuestionAnswering")
    theirs = transformers.BertForQuestionAnswering(ours.config).eval()
    theirs.load_state_dict(ours.state_dict())
    packed = PackedCollator(ours)(rows)
    assert packed["end_positions"].tolist() == [8, 4, 11, 0]
    losses = {"start_positions": [], "end_positions": []}
    for row in rows:
        ids = {k: torch.tensor([row[k]]) for k in ("input_ids", "token_type_ids")}
        output = theirs(**ids)
        for name, logits in zip(losses, (output.start_logits, output.end_logits), strict=True):
            if row[name] < logits.shape[1]:
                right = torch.tensor([row[name]])
                losses[name].append(torch.nn.functional.cross_entropy(logits, right))
    assert [*map(len, losses.values())] == [4, 3]
    expected = sum(torch.stack(values).mean() for values in losses.values()) / 2
    torch.testing.assert_close(ours(**packed).loss, expected, atol=1e-6, rtol=1e-5)
    share = ours(**packed, num_items_in_batch=10).loss
    torch.testing.assert_close(share, sum(map(sum, losses.values())) / 20, atol=1e-6, rtol=1e-5)
    few = {name: packed[name][:3] for name in losses}
    with pytest.raises(
        ValueError, match="a start and an end for each of 4 packed sequences, got 3"
    ):
        ours(**{**packed, **few})
    padded = PackedCollator(padded=True)(rows)
    assert torch.equal(padded["end_positions"], packed["end_positions"])


def questions(*counts):
    """With so many choices; their lengths come in turns."""
    made, found = examples(), []
    for index, count in enumerate(counts):
        choices = [made[(index + i) % len(made)] for i in range(count)]
        found.append({k: [choice[k] for choice in choices] for k in made[0]} | {"label": count - 1})
    return found


def test_choices_have_the_logits_and_the_loss_of_transformers():
    """As many in every question in one batch; else each question for itself."""
    ours = model("BertForMultipleChoice", initializer_range=0.3)
    theirs = transformers.BertForMultipleChoice(ours.config).eval()
    theirs.load_state_dict(ours.state_dict())
    packed, padded = both(questions(3, 3, 3), ours)
    assert padded["input_ids"].shape == (3, 3, 12) and packed["num_choices"].tolist() == [3, 3, 3]
    specification, parameters = specified_by(
        theirs, lambda output: [output.logits, output.loss], **padded
    )
    with torch.no_grad():
        for batch in (packed, padded):
            output = ours(**batch)
            assert_matches([output.logits, output.loss], specification, parameters, "choices")
        ragged = questions(2, 4, 1)
        batch = PackedCollator(ours)(ragged)
        found = ours(**batch)
        assert found.logits.shape == (3, 4)
        losses = []
        for row, question in zip(found.logits, ragged, strict=True):
            one = PackedCollator(padded=True)([question])
            count = one["input_ids"].shape[1]
            specification, parameters = specified_by(theirs, lambda out: out.logits[0], **one)
            assert_matches(row[:count], specification, parameters, f"{count} choices")
            assert (row[count:] == torch.finfo(torch.float32).min).all()
            losses.append(torch.nn.functional.cross_entropy(row[None, :count], one["labels"]))
        mean = torch.stack(losses).mean()
        torch.testing.assert_close(found.loss, mean)
        share = ours(**batch, num_items_in_batch=6, return_dict=False)[0]
        torch.testing.assert_close(share, mean / 2)
        del batch["num_choices"], batch["labels"]
        assert ours(**batch).logits.shape == (1, 7)


def test_choices_that_do_not_fit():
    ours = model("BertForMultipleChoice")
    with pytest.raises(ValueError, match=r"as many choices in every example.*got \[2, 3\]"):
        PackedCollator(padded=True)(questions(2, 3))
    packed, padded = both(questions(2, 2), ours)
    with pytest.raises(ValueError, match=r"share out the 4 packed sequences, got \[2, 1\]"):
        ours(**packed | {"num_choices": torch.tensor([2, 1])})
    with pytest.raises(ValueError, match="num_choices with packed sequences alone"):
        ours(**padded, num_choices=torch.tensor([2, 2]))
    some = questions(2, 2)
    some[1]["token_type_ids"].pop()
    with pytest.raises(ValueError, match=r"token_type_ids for each of \[2, 2\] choices"):
        PackedCollator(ours)(some)


def test_padding_that_examples_bring_is_left_out():
    rows = examples(labels=of_tokens)
    wide = [
        {name: [*values, *[0] * 3] for name, values in row.items()}
        | {"attention_mask": [1] * len(row["input_ids"]) + [0] * 3}
        for row in rows
    ]
    collator = PackedCollator(model())
    for name, values in collator(rows).items():
        assert torch.equal(torch.as_tensor(collator(wide)[name]), torch.as_tensor(values)), name


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor], ids=["list", "numpy", "torch"])
def test_kinds_of_columns(kind):
    rows = examples(labels=of_tokens)
    made = [{name: kind(values) for name, values in row.items()} for row in rows]
    for name, values in PackedCollator(model())(rows).items():
        assert torch.equal(
            torch.as_tensor(PackedCollator(model())(made)[name]), torch.as_tensor(values)
        )


def test_masking(tiny_folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_folder)
    collator = PackedCollator(model(), masking=Masking(tokenizer))
    rows = examples(example=lambda i, n: 10 + i, epoch=lambda i, n: 2)
    batch = collator(rows)
    chosen = batch["labels"] != -100
    assert not {"example", "epoch"} & set(batch)
    assert (
        chosen.sum() == 1 + 1 + 2 + 1 and (batch["input_ids"] != collator([*rows])["labels"]).any()
    )
    turned = collator(rows[::-1])
    ends = batch["cu_seq_lens_q"].tolist()
    again = torch.cat([turned["labels"][0].split([1, 12, 4, 9])[3 - i] for i in range(4)])
    assert torch.equal(again, batch["labels"][0]) and ends[-1] == 26
    with pytest.raises(ValueError, match=r"a number .'example'. for masking"):
        collator(examples())
    with pytest.raises(ValueError, match="without choices for masking"):
        collator(questions(2))


def test_models_that_would_mix_sequences_are_refused():
    theirs = transformers.BertModel(tiny_config())
    with pytest.raises(TypeError, match=r"BertModel, in which they would attend to each other"):
        PackedCollator(theirs)
    with pytest.raises(TypeError, match="the model that packed batches are for, got none"):
        PackedCollator()
    fastbert.accelerate(theirs)
    PackedCollator(theirs)
    PackedCollator(torch.nn.Sequential(model()))  # wrapped, as by DDP or PEFT


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"input_ids": [5]}, {"input_ids": []}], "got none in example 1"),
        ([{"input_ids": [5]}, {"ids": [5]}], r"\['ids', 'input_ids'\] in some only \(example 1"),
        ([{"text": "a"}], r"expected input_ids, got \['text'\]"),
        ([{"input_ids": [5], "token_type_ids": [0, 0]}], r"1 token_type_ids.*got shape \(2,\)"),
        ([{"input_ids": [5], "text": "a"}], "numbers.*in 'text', got 'a' first"),
        ([{"input_ids": [5], "x": [1]}, {"input_ids": [5], "x": [1, 2]}], r"as many in every"),
    ],
)
def test_bad_examples(rows, message):
    with pytest.raises(ValueError, match=message):
        PackedCollator(padded=True)(rows)


def test_trainer_takes_it(tmp_path):
    """Anybody's Trainer, whose batches are counted in examples."""
    ours = model("BertForSequenceClassification")
    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=3, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(
        ours, arguments, train_dataset=examples(labels=lambda i, n: i % 2) * 3,
        data_collator=PackedCollator(ours),
    )  # fmt: skip
    assert trainer.train().global_step == 3
