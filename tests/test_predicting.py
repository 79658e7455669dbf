"""Tables, metrics, and what checkpoints with heads predict: transformers' own, in any order."""

import gzip
import json
import random

import datasets
import numpy as np
import pytest
import torch
import transformers
from tiny import tiny_config

from fastbert.finetuning import predict_file as predict_module
from fastbert.finetuning.predict_file import predict_file
from fastbert.finetuning.predicting import Predictor, logits_of
from fastbert.finetuning.sequences import Classification, MultiLabel, Regression
from fastbert.finetuning.spans import tags_of_spans
from fastbert.finetuning.table import Table, read_table, split_off
from fastbert.finetuning.tagging import Tagging, entities_of
from fastbert.tasks.errors import InputError, LoadError, OutputError

pytestmark = pytest.mark.usefixtures("on_torch")


def table_of(**columns):
    return Table(datasets.Dataset.from_dict(columns), "rows")


# ---- tables ----


def write(path, text):
    path.write_text(text, "utf-8")
    return path


def test_every_kind_of_table_has_the_same_rows(tmp_path, text_cache):
    rows = [{"text": 'a "b", c', "label": "x"}, {"text": "d\ne", "label": "NA"}]
    plain = datasets.Dataset.from_list(rows)
    plain.to_parquet(tmp_path / "a.parquet")
    plain.save_to_disk(tmp_path / "folder")
    write(tmp_path / "a.csv", 'text,label\n"a ""b"", c",x\n"d\ne",NA\n')
    write(tmp_path / "a.tsv", 'text\tlabel\n"a ""b"", c"\tx\n"d\ne"\tNA\n')
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    write(tmp_path / "a.jsonl", lines)
    write(tmp_path / "a.json", json.dumps(rows))
    with gzip.open(tmp_path / "a.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(lines)
    digests = set()
    for name in ("a.parquet", "folder", "a.csv", "a.tsv", "a.jsonl", "a.json", "a.jsonl.gz"):
        table = read_table(tmp_path / name, text_cache)
        assert table.rows(["text", "label"]) == [('a "b", c', "x"), ("d\ne", "NA")], name
        digests.add(table.digest())
    assert len(digests) == 1


def test_conll(tmp_path):
    path = write(
        tmp_path / "a.conll", "-DOCSTART- -X- O\n\nAda NNP B-PER\nran VBD O\n\nRome NNP B-LOC"
    )
    table = read_table(path)
    assert table.rows(["tokens", "tags"]) == [
        (["Ada", "ran"], ["B-PER", "O"]), (["Rome"], ["B-LOC"]),
    ]  # fmt: skip
    write(path, "Ada B-PER\nran\n")
    with pytest.raises(InputError, match="a token and its tag on line 2"):
        read_table(path)


def test_tables_that_cannot_be_read(tmp_path, text_cache):
    for name, text, message in [
        ("a.doc", "x", r"a file of \.csv, .*a\.doc"),
        ("a.jsonl", '{"text": "a"}\n{"text": ', "a table in .*a.jsonl.*cannot be read"),
        ("a.csv", "text,label\n", "at least one row in .*a.csv"),
        ("a.parquet", "no parquet", "a table in .*a.parquet.*cannot be read"),
    ]:
        with pytest.raises(InputError, match=message):
            read_table(write(tmp_path / name, text), text_cache)
    with pytest.raises(InputError, match="which is not"):
        read_table(tmp_path / "nowhere.csv")
    (tmp_path / "latin.csv").write_bytes("text\ncaf\xe9\n".encode("latin-1"))
    with pytest.raises(InputError, match="cannot be read"):
        read_table(tmp_path / "latin.csv", text_cache)
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"a": [1]})}).save_to_disk(
        tmp_path / "several"
    )
    with pytest.raises(InputError, match=r"one table, got .* with train; name one"):
        read_table(tmp_path / "several")


def test_splits_are_of_the_seed(tmp_path):
    table = table_of(x=list(range(100)))
    kept, taken = split_off(table, 0.2, seed=3)
    assert len(taken) == 20 and sorted(kept.column("x") + taken.column("x")) == list(range(100))
    assert split_off(table, 0.2, seed=3)[1].column("x") == taken.column("x")
    assert split_off(table, 0.2, seed=4)[1].column("x") != taken.column("x")


# ---- metrics ----


def test_entities():
    """As conlleval reads them."""
    assert entities_of(["B-A", "I-A", "O", "B-A"]) == {("A", 0, 2), ("A", 3, 4)}
    assert entities_of(["B-A", "B-A", "I-B"]) == {("A", 0, 1), ("A", 1, 2), ("B", 2, 3)}
    assert entities_of(["I-A", "I-A", "O"]) == {("A", 0, 2)}
    assert entities_of(["O", "B-X-Y", "I-X-Y"]) == {("X-Y", 1, 3)}
    assert entities_of([]) == set()


def test_entity_f1_is_seqevals():
    seqeval = pytest.importorskip("seqeval.metrics")
    draw = random.Random(0)
    tags = ["O", "B-A", "I-A", "B-B", "I-B"]
    task = Tagging(tags)
    for _ in range(50):
        gold, said = ([[draw.choice(tags) for _ in range(9)] for _ in range(5)] for _ in range(2))
        scores = task.score(said, gold)
        for name, theirs in (("f1", seqeval.f1_score), ("precision", seqeval.precision_score),
                             ("recall", seqeval.recall_score)):  # fmt: skip
            assert scores[name] == pytest.approx(theirs(gold, said), abs=1e-12)
        theirs = seqeval.classification_report(gold, said, output_dict=True, zero_division=0)
        for row in task.by_class(said, gold):
            assert row["f1"] == pytest.approx(theirs[row["class"]]["f1-score"])
            assert row["rows"] == theirs[row["class"]]["support"]


def test_scores_by_hand():
    task = Classification(["a", "b", "c"])
    scores = task.score([0, 0, 1, 1], [0, 1, 1, 1])
    assert scores["accuracy"] == 0.75
    assert scores["macro_f1"] == pytest.approx((2 / 3 + 4 / 5) / 2)  # of the classes that are there
    assert task.baseline([1, 1, 2], [0, 1]) == ("always 'b'", [1, 1])
    rows = task.by_class([0, 0, 1, 1], [0, 1, 1, 1])
    assert [row["rows"] for row in rows] == [1, 3, 0] and rows[1]["recall"] == pytest.approx(2 / 3)
    several = MultiLabel(["a", "b"])
    gold = [np.array(row) for row in ([True, False], [True, True], [False, False])]
    said = [np.array(row) for row in ([True, False], [True, False], [True, False])]
    scores = several.score(said, gold)
    assert scores["micro_f1"] == pytest.approx(4 / 6) and scores["exact"] == pytest.approx(1 / 3)
    number = Regression([])
    scores = number.score([1.0, 2.0, 4.0], [1.0, 3.0, 2.0])
    assert scores["rmse"] == pytest.approx((5 / 3) ** 0.5)
    assert scores["pearson"] == pytest.approx(np.corrcoef([1, 2, 4], [1, 3, 2])[0, 1])
    assert scores["spearman"] == pytest.approx(0.5)
    assert number.score([1.0, 1.0], [1.0, 2.0])["pearson"] == 0.0, "the same is said of all"


def test_losses_are_torchs():
    logits, draw = torch.randn(6, 4), torch.nn.functional
    gold = [0, 3, 1, 2, 2, 0]
    found = [Classification(["a", "b", "c", "d"]).losses(row.numpy(), y)
             for row, y in zip(logits, gold, strict=True)]  # fmt: skip
    expected = draw.cross_entropy(logits.double(), torch.tensor(gold))
    assert np.concatenate(found).mean() == pytest.approx(expected.item())
    has = torch.rand(6, 4) < 0.5
    found = [MultiLabel(["a", "b", "c", "d"]).losses(row.numpy(), y.numpy())
             for row, y in zip(logits, has, strict=True)]  # fmt: skip
    expected = draw.binary_cross_entropy_with_logits(logits.double(), has.double())
    assert np.concatenate(found).mean() == pytest.approx(expected.item())


# ---- predictions ----


@pytest.fixture
def checkpoint(tiny_folder, tmp_path):
    """One of transformers' own, with clear answers."""

    def make(head="BertForSequenceClassification", **changes):
        torch.manual_seed(0)
        options = {"num_labels": 3, "initializer_range": 0.3, **changes}
        model = getattr(transformers, head)(tiny_config(**options)).eval()
        model.save_pretrained(tmp_path / "model")
        transformers.AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(tmp_path / "model")
        return str(tmp_path / "model")

    return make


TEXTS = [
    "paris is the capital of france.",
    "rome",
    "a city in italy and spain " * 4,
    "madrid is in",
]
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("changes", "pipeline"),
    [
        ({}, {}),
        ({"problem_type": "multi_label_classification"}, {"function_to_apply": "sigmoid"}),
        ({"num_labels": 1, "problem_type": "regression"}, {"function_to_apply": "none"}),
    ],
    ids=["classification", "multi-label", "regression"],
)
def test_predictions_are_those_of_a_pipeline(checkpoint, changes, pipeline):
    folder = checkpoint(**changes)
    predictor = Predictor(folder, CPU)
    _, described, cut = predictor(table_of(text=TEXTS))
    classifier = transformers.pipeline("text-classification", model=folder)
    for said, theirs in zip(described, classifier(TEXTS, top_k=None, **pipeline), strict=True):
        scores = {one["label"]: one["score"] for one in theirs}
        mine = said.get("probabilities") or {"LABEL_0": said["prediction"]}
        assert mine == pytest.approx(scores, abs=1e-5)
        if not changes:
            assert said["prediction"] == theirs[0]["label"]
    assert cut == 0


def test_pairs_are_those_of_transformers(checkpoint):
    folder = checkpoint()
    _, described, _ = Predictor(folder, CPU)(table_of(text_a=TEXTS, text_b=TEXTS[::-1]))
    classifier = transformers.pipeline("text-classification", model=folder)
    pairs = [{"text": a, "text_pair": b} for a, b in zip(TEXTS, TEXTS[::-1], strict=True)]
    for said, theirs in zip(described, classifier(pairs), strict=True):
        assert said["prediction"] == theirs["label"]
        assert max(said["probabilities"].values()) == pytest.approx(theirs["score"], abs=1e-5)


def test_tags_are_those_of_transformers(checkpoint):
    labels = ["O", "B-A", "I-A"]
    folder = checkpoint("BertForTokenClassification", id2label=dict(enumerate(labels)))
    predictor = Predictor(folder, CPU)
    sentences = [["Paris", "unbelievable", "is", "word50"], ["rome"], ["a", "city"] * 30]
    said, described, cut = predictor(table_of(tokens=sentences))
    assert cut == 1 and said[2][38:] == ["O"] * 22, "what was cut off is outside"
    model = transformers.BertForTokenClassification.from_pretrained(folder)
    for words, tags in zip(sentences[:2], said, strict=False):
        inputs = predictor.tokenizer([words], is_split_into_words=True, return_tensors="pt")
        with torch.no_grad():
            best = model(**inputs).logits[0].argmax(-1)
        ids = inputs.word_ids()
        assert tags == [labels[best[ids.index(word)]] for word in range(len(words))]
    for tags, one in zip(said, described, strict=True):
        entities = {(e["label"], e["start"], e["end"]) for e in one["entities"]}
        assert one["prediction"] == tags and entities == entities_of(tags)


def test_entities_of_a_text(checkpoint):
    """Words as the model's own tokenizer splits the text; spans that are the text they say."""
    labels = ["O", "B-A", "I-A"]
    folder = checkpoint("BertForTokenClassification", id2label=dict(enumerate(labels)))
    predictor = Predictor(folder, CPU)
    texts = [
        "Paris-based, the caf\u00e9 is",
        "rome\u6771\u4eac \U0001f600 e\u0301 paris  and. " * 3,
    ]
    _, described, _ = predictor(table_of(text=texts))
    found = 0
    for text, said in zip(texts, described, strict=True):
        inputs = predictor.tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            best = predictor.model(**inputs).logits[0].argmax(-1)
        ids = inputs.word_ids()
        words = sorted({i for i in ids if i is not None})
        assert said["prediction"] == [labels[best[ids.index(word)]] for word in words]
        assert "".join(said["tokens"]) == "".join(text.split())
        for span in said["entities"]:
            assert text[span["start"] : span["end"]] == span["text"] and span["label"] == "A"
        found += len(said["entities"])
        whole = entities_of(said["prediction"])
        assert len(whole) == len(said["entities"])
    assert found >= 3


SPANS = [
    ("Ada Lovelace, London", [(0, 12, "P"), (14, 20, "L")], "B-P I-P O B-L", 0),
    ("\u6771\u4eac\u30bf\u30ef\u30fc e\u0301t\u00e9 \U0001f600", [(0, 2, "L"), (6, 10, "T")],
     "B-L I-L O B-T O", 0),
    ("Parisian life", [(0, 5, "L")], "B-L O", 1),
    ("a b", [], "O O", 0),
]  # fmt: skip


@pytest.mark.parametrize(("text", "spans", "tags", "widened"), SPANS)
def test_spans_are_tags(text, spans, tags, widened):
    rows = [dict(zip(("start", "end", "label"), span, strict=True)) for span in spans]
    assert tags_of_spans(rows, text, "row 1") == (tags.split(), widened)
    columns = {name: [row[name] for row in rows] for name in ("start", "end", "label")}
    assert tags_of_spans(columns, text, "row 1") == (tags.split(), widened)


def test_spans_that_cannot_be():
    for spans, message in [
        ([{"start": 0, "end": 3}], r"start, end and label in row 1.* got \{'start': 0, 'end': 3\}"),
        ([{"start": 12, "end": 15, "label": "P"}], "in characters of its text"),
        ([{"start": 3, "end": 3, "label": "P"}], "in characters of its text"),
        ([{"start": 4, "end": 13, "label": "P"}], "in characters of its text"),
        ([{"start": -1, "end": 3, "label": "P"}], "in characters of its text"),
        ([{"start": 0, "end": "3", "label": "P"}], "in characters of its text"),
        ([{"start": 0, "end": 3, "label": ""}], "in characters of its text"),
        ([{"start": 0, "end": 3, "label": "P"}, {"start": 2, "end": 9, "label": "L"}],
         "share no word in row 1, got .*'L'"),
        ("Ada", "a list of spans in row 1, got 'Ada'"),
        ({"start": [0], "end": [3], "label": []}, "a list of spans in row 1"),
    ]:  # fmt: skip
        with pytest.raises(InputError, match=message):
            tags_of_spans(spans, "Ada Lovelace", "row 1")


def test_choices_are_those_of_transformers(checkpoint):
    """Each question for itself, whatever stands beside it; what is cut is counted once."""
    predictor = Predictor(checkpoint("BertForMultipleChoice"), CPU)
    rows = {
        "context": ["paris is", "rome " * 30, "a city in italy"],
        "choices": [TEXTS[:2], TEXTS[:3], TEXTS],
    }
    said, described, cut = predictor(table_of(**rows))
    assert cut == 1
    model = transformers.BertForMultipleChoice.from_pretrained(predictor.model.name_or_path)
    rows = zip(*rows.values(), strict=True)
    for (context, choices), place, told in zip(rows, said, described, strict=True):
        inputs = predictor.tokenizer(
            [context] * len(choices), choices, padding=True, truncation=True, max_length=40,
            return_tensors="pt",
        )  # fmt: skip
        with torch.no_grad():
            expected = model(**{name: x[None] for name, x in inputs.items()}).logits[0].softmax(-1)
        assert told["probabilities"] == pytest.approx(expected.tolist(), abs=1e-5)
        assert told["prediction"] == place == expected.argmax()
        assert told["choice"] == choices[place]
    with pytest.raises(InputError, match="columns context and choices in 'rows', got text"):
        predictor(table_of(text=["a"]))


def test_order_and_batches_change_nothing(checkpoint):
    predictor = Predictor(checkpoint(), CPU)
    draw = random.Random(0)
    texts = [" ".join(draw.choices(TEXTS[0].split(), k=draw.randint(1, 30))) for _ in range(60)]
    examples, _ = predictor.task.encode(table_of(text=texts), predictor.tokenizer, 40)
    whole = dict(logits_of(predictor.model, predictor.task, examples, CPU))
    for tokens in (1, 100, 350):
        found = dict(logits_of(predictor.model, predictor.task, examples, CPU, tokens=tokens))
        np.testing.assert_allclose(*(np.stack([x[i] for i in range(60)]) for x in (found, whole)),
                                   atol=1e-5)  # fmt: skip
    backwards = dict(logits_of(predictor.model, predictor.task, examples[::-1], CPU))
    np.testing.assert_allclose(backwards[59], whole[0], atol=1e-5)
    shares = [dict(logits_of(predictor.model, predictor.task, examples, CPU, tokens=100, rank=rank,
                             world_size=3)) for rank in range(3)]  # fmt: skip
    assert sorted(i for share in shares for i in share) == list(range(60))


def test_a_file_of_predictions(checkpoint, tmp_path, monkeypatch):
    predictor = Predictor(checkpoint(), CPU)
    monkeypatch.setattr(predict_module, "_PART", 3)
    texts = [*TEXTS, " ", *TEXTS, None]
    output, done = tmp_path / "out.jsonl", []
    with pytest.raises(InputError, match=r"row 5 of 'rows': .* an empty one \(2 bad rows in all\)"):
        predict_file(table_of(text=texts), predictor, output)
    assert not output.exists()
    result = predict_file(table_of(text=texts), predictor, output, skip=True, progress=done.append)
    assert result.rows == 8 and [*result.skipped] == [5, 10] and done == [3, 5, 8, 8]
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["row"] for line in lines] == [1, 2, 3, 4, 6, 7, 8, 9]
    assert [x["prediction"] for x in lines[:4]] == [x["prediction"] for x in lines[4:]]

    def broken(part):
        raise OSError(28, "No space left on device")

    before = output.read_text()
    with pytest.raises(OutputError, match="No space left"):
        predict_file(table_of(text=TEXTS), predictor, output, progress=broken)
    assert output.read_text() == before and {p.name for p in tmp_path.iterdir()} == {
        "model", "out.jsonl",
    }  # fmt: skip
    with pytest.raises(InputError, match="bad ones only"):
        predict_file(table_of(text=[" "]), predictor, output, skip=True)
    with pytest.raises(OutputError, match=r"an output of \.jsonl"):
        predict_file(table_of(text=TEXTS), predictor, tmp_path / "out.csv")


@pytest.mark.parametrize("at", [1, 2, 3])
def test_predictions_are_resumed(checkpoint, tmp_path, monkeypatch, at):
    """Behind every part, to the same bytes; not with another table, nor without being asked."""
    predictor = Predictor(checkpoint(), CPU)
    monkeypatch.setattr(predict_module, "_PART", 3)
    table, output = table_of(text=TEXTS * 3), tmp_path / "out.jsonl"
    predict_file(table, predictor, tmp_path / "whole.jsonl")
    calls = []

    def ends(done):
        calls.append(done)
        if len(calls) == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict_file(table, predictor, output, resume=True, progress=ends)
    partial = tmp_path / ".out.jsonl.partial"
    assert partial.exists() and not output.exists()
    with (partial / "rows.jsonl").open("a") as file:
        file.write('{"row": 99, "predi')  # as a kill leaves it
    with pytest.raises(OutputError, match=r"another table; use what it was begun with"):
        predict_file(table_of(text=TEXTS * 2), predictor, output, resume=True)
    result = predict_file(table, predictor, output, resume=True)
    assert result.resumed == 3 * at and result.rows == 12 and not partial.exists()
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        predict_file(table, predictor, output, progress=ends)
    assert not partial.exists(), "nobody asked to keep it"


def test_one_process_writes_a_file_of_predictions(checkpoint, tmp_path):
    predictor, output = Predictor(checkpoint(), CPU), tmp_path / "out.jsonl"

    def again(done):
        with pytest.raises(OutputError, match="alone, got another process"):
            predict_file(table_of(text=TEXTS), predictor, output)

    assert predict_file(table_of(text=TEXTS), predictor, output, progress=again).rows == 4


def test_checkpoints_for_something_else(checkpoint, tiny_folder):
    with pytest.raises(InputError, match="got a BertForMaskedLM; fastbert finetune"):
        Predictor(checkpoint("BertForMaskedLM"), CPU)
    with pytest.raises(InputError, match="got a BertModel"):
        Predictor(tiny_folder, CPU)
    with pytest.raises(LoadError, match="--max-length of at most 40"):
        Predictor(checkpoint(), CPU, max_length=41)
    with pytest.raises(InputError, match=r"a label of LABEL_0, .* got 'north' in row 1"):
        Predictor(checkpoint(), CPU).task.gold(table_of(text=["a"], label=["north"]))
