"""Embeddings that are trained: sentence-transformers' own losses, models it loads, exact resume."""

import html
import json
import random
import signal
from dataclasses import asdict
from functools import partial
from itertools import chain

import datasets
import numpy as np
import pytest
import sentence_transformers
import torch
from forked import launched
from runs import At, metrics_of, weights_of

from fastbert.finetuning.embedding import Retrieval, Similarity
from fastbert.finetuning.embedding_trainer import EmbeddingBatches
from fastbert.finetuning.finetune import Request, prepare
from fastbert.finetuning.table import Table
from fastbert.tasks.errors import InputError

pytestmark = [
    pytest.mark.usefixtures("on_torch", "undrawn"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]

PLACES = [f"word{i}" for i in range(20)]
FILLER = ("the", "of", "is", "a", "in", "and")


def rows_of(kind, count, seed=0):
    """What a tiny model can learn: words stand for others, so that words alone do not tell."""
    draw, rows = random.Random(seed), []
    meant = {place: f"word{20 + i}" for i, place in enumerate(PLACES)}

    def text(*words):
        made = [*words, *draw.choices(FILLER, k=draw.randint(1, 5))]
        draw.shuffle(made)
        return " ".join(made)

    for i in range(count):
        a, b = draw.sample(PLACES, 2)
        if kind == "similarity":
            same = i % 2 == 0
            other = (a, b) if same else draw.sample([p for p in PLACES if p not in (a, b)], 2)
            rows.append({"text_a": text(a, b), "text_b": text(*map(meant.get, other)),
                         "score": 5 if same else 1})  # fmt: skip
            continue
        row = {"query": text(a, b), "passage": text(meant[a], meant[b])}
        if kind == "negatives":
            row["negative"] = text(*(meant[p] for p in draw.sample(PLACES, 2)))
        rows.append(row)
    return rows


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


@pytest.fixture
def request_for(tiny_folder, text_cache, tmp_path):
    def make(kind="retrieval", output="run", rows=None, **options):
        options = {
            "train": write(tmp_path / "train.jsonl", rows or rows_of(kind, 160)),
            "model": str(tiny_folder), "epochs": 3, "batch_size": 16, "max_length": 40,
            "learning_rate": 3e-3, "dev_share": 0.25, "patience": 0, "device": "cpu",
            "cache_dir": text_cache, "task": "embeddings", **options,
        }  # fmt: skip
        return Request(output=str(tmp_path / output), **options)

    return make


@pytest.fixture
def finetune(request_for):
    def call(*args, callbacks=(), **options):
        return prepare(request_for(*args, **options)).train(callbacks=callbacks)

    return call


def table_of(rows):
    return Table(datasets.Dataset.from_list(rows), "rows")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options"),
    [pytest.param("retrieval", {"epochs": 8, "learning_rate": 6e-3}, marks=pytest.mark.draws),
     ("negatives", {"epochs": 8, "learning_rate": 6e-3}), ("similarity", {"epochs": 12})],
)  # fmt: skip
def test_embeddings_learn(finetune, tmp_path, kind, options):
    test = write(tmp_path / "test.jsonl", rows_of(kind, 40, seed=1))
    verdict = finetune(kind, test=test, **options)
    said, baseline = verdict.baseline
    score = verdict.scores[verdict.metric]
    assert said == "words alone (TF-IDF)" and score > max(baseline, verdict.untrained) + 0.2
    assert score > (0.5 if kind == "similarity" else 0.7)  # of at most 0.87 and 1
    assert (verdict.split, verdict.rows) == ("test", 40)
    run = tmp_path / "run"
    plain = sentence_transformers.SentenceTransformer(str(run / "best"), device="cpu")
    assert type(plain[0].model).__module__.startswith("transformers.")
    lines = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == list(range(1, 41))
    rows = rows_of(kind, 40, seed=1)
    if kind == "similarity":
        sides = [plain.encode([row[name] for row in rows]) for name in ("text_a", "text_b")]
        norms = np.prod([np.linalg.norm(side, axis=1) for side in sides], 0)
        cosine = (sides[0] * sides[1]).sum(1) / norms
        np.testing.assert_allclose([line["prediction"] for line in lines], cosine, atol=1e-5)
    else:
        for line, row in zip(lines, rows, strict=True):
            assert (line["query"], line["label"]) == (row["query"], row["passage"])
            scores = [hit["score"] for hit in line["prediction"]]
            assert len(scores) == 10 and scores == sorted(scores, reverse=True)
            best = plain.encode([row["query"], line["prediction"][0]["passage"]])
            cosine = best[0] @ best[1] / np.prod(np.linalg.norm(best, axis=1))
            assert scores[0] == pytest.approx(cosine, abs=1e-5)
    card = (run / "final/README.md").read_text()
    assert "library_name: sentence-transformers" in card and str(verdict) in card
    page = (run / "report.html").read_text("utf-8")
    assert html.escape(str(verdict)) in page and "Classes" not in page


class Given(sentence_transformers.SentenceTransformerTrainer):
    """sentence-transformers' own Trainer on the batches that it is given."""

    batches = None

    def get_train_dataloader(self):
        return torch.utils.data.DataLoader(
            self.train_dataset, batch_sampler=self.batches, collate_fn=self.data_collator
        )


@pytest.mark.parametrize(
    ("kind", "device_tokens"),
    [("negatives", 8192), pytest.param("retrieval", 64, marks=pytest.mark.slow),
     pytest.param("similarity", 64, marks=pytest.mark.slow)],
)  # fmt: skip
def test_the_losses_of_sentence_transformers(
    finetune, request_for, tmp_path, tiny_folder, kind, device_tokens
):
    """In every step, without dropout; in parts too, where a batch is more than a pass."""
    options = {"dropout": 0.0, "learning_rate": 1e-3, "device_tokens": device_tokens}
    ours = prepare(request_for(kind, **options))
    passes = []
    ours.model[0].register_forward_hook(lambda *_: passes.append(1))
    ours.train()
    calls = ours.steps * (2 + (kind == "negatives"))
    assert (len(passes) > 3 * calls) is (device_tokens < 8192)
    found = [line["loss"] for line in metrics_of(tmp_path / "run") if "loss" in line]
    theirs = sentence_transformers.SentenceTransformer(str(tiny_folder), device="cpu")
    theirs.max_seq_length = 40
    for module in theirs.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    losses = sentence_transformers.sentence_transformer.losses
    loss = losses.CoSENTLoss if kind == "similarity" else losses.MultipleNegativesRankingLoss
    arguments = sentence_transformers.SentenceTransformerTrainingArguments(
        str(tmp_path / "theirs"), max_steps=ours.steps, learning_rate=1e-3, weight_decay=0.01,
        warmup_steps=int(np.ceil(0.06 * ours.steps)), logging_steps=1, save_strategy="no",
        report_to=[], disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = Given(theirs, arguments, ours.data, loss=loss(theirs))
    trainer.batches = EmbeddingBatches(
        ours.data, ours.size, ours.steps, distinct=kind != "similarity", seed=0
    )
    trainer.train()
    expected = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    np.testing.assert_allclose(found, expected, rtol=5e-5, atol=2e-5)
    assert np.ptp(found) > 1e-2, "something was trained"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "options"), [(2, {}), (9, {"lora": 4}), (5, {"device_tokens": 64})]
)
def test_stopped_and_resumed_is_not_stopped(finetune, tmp_path, step, options):
    options["epochs"] = 2
    whole = finetune(output="whole", **options)
    with pytest.raises(SystemExit) as stop:
        finetune(
            output="parts",
            callbacks=[At(step, lambda: signal.raise_signal(signal.SIGTERM))],
            **options,
        )
    assert stop.value.code == 128 + signal.SIGTERM
    parts = finetune(output="parts", **options)
    assert whole._replace(overhead=None) == parts._replace(overhead=None)
    assert metrics_of(tmp_path / "whole") == metrics_of(tmp_path / "parts")
    for folder in ("best", "final"):
        one, other = (weights_of(tmp_path / name / folder) for name in ("whole", "parts"))
        assert not any("lora" in name for name in one)
        assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.slow
def test_what_only_the_end_of_a_text_says_is_learned(run, request_for, text_cache, tmp_path):
    """Cut, passages are all the same; evaluate says what the run has said."""

    def rows(count, seed):
        filler = " ".join(["the of is a in and"] * 5)
        return [row | {"passage": f"{filler} {row['passage']}"}
                for row in rows_of("retrieval", count, seed)]  # fmt: skip

    test = write(tmp_path / "test.jsonl", rows(40, 1))
    options = {"rows": rows(96, 0), "test": test, "max_length": 20, "device_tokens": 512}
    scores = {}
    for long, epochs in {"cut": 3, "windows": 12}.items():  # cut, no number would be enough
        prepared = prepare(request_for(output=long, long=long, epochs=epochs, **options))
        assert (prepared.cut["train"] > 0) is (long == "cut")
        scores[long] = prepared.train().scores
    assert scores["windows"]["ndcg@10"] > scores["cut"]["ndcg@10"] + 0.3
    best = tmp_path / "windows/best"
    assert "--long windows" in (tmp_path / "windows/final/README.md").read_text("utf-8")
    code, out, err = run(
        "evaluate", test, "--model", best, "--long", "windows", "--device", "cpu",
        "--cache-dir", text_cache,
    )  # fmt: skip
    assert code == 0, err
    assert json.loads(out) == {"rows": 40, **scores["windows"]}
    modules = json.loads((best / "modules.json").read_text())
    assert all(each["type"].startswith("sentence_transformers.") for each in modules)


@pytest.mark.slow
def test_two_processes_are_one(request_for, tmp_path):
    """A process's rows are negatives of the other's; without dropout, which each draws for
    itself."""
    request = request_for(dropout=0.0, epochs=2, dev_share=0.2)
    one = prepare(request)
    one.train()
    program = (
        "import sys\nfrom fastbert.finetuning.finetune import Request, prepare\n"
        "print(prepare(Request(**eval(sys.argv[1]))).train())\n"
    )
    two = repr(asdict(request) | {"output": str(tmp_path / "two")})
    ends = launched(program, two, processes=2)
    assert all(end.returncode == 0 for end in ends), ends[0].stderr[-3000:]
    assert len({end.stdout for end in ends}) == 1, "both say the same"
    mine, theirs = (metrics_of(tmp_path / name) for name in ("run", "two"))
    for each, other in zip(mine, theirs, strict=True):
        assert other == pytest.approx(each, rel=2e-3, abs=1e-5)


@pytest.mark.slow
def test_parts_stay_as_they_are(request_for, finetune, tmp_path):
    prepared = prepare(request_for(freeze=1, epochs=1))
    before = {k: v.clone() for k, v in prepared.model[0].model.state_dict().items()}
    prepared.train()
    after = weights_of(tmp_path / "run/final")
    same = {name for name, value in after.items() if torch.equal(value, before[name])}
    frozen = {name for name in after if name.startswith(("embeddings", "encoder.layer.0"))}
    assert frozen <= same < set(after)
    lora = prepare(request_for(output="lora", lora=2, epochs=1))
    trained = {name for name, p in lora.model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)


def test_batches_have_no_text_twice():
    rows = datasets.Dataset.from_list(rows_of("negatives", 50) + rows_of("negatives", 50)[:20])
    make = partial(EmbeddingBatches, rows, 8, distinct=True, seed=3)
    batches = make(25)
    made = list(batches)
    assert len(made) == 25 and sorted(chain(*made[: batches.starts[1]])) == [*range(70)]
    for batch in made:
        texts = [text for i in batch for text in {*rows[i].values()}]
        assert len(texts) == len(set(texts)) or len(batch) == 1
    again = make(25)
    again.done, again.starts = 12, batches.starts
    assert list(again)[12:] == made[12:]
    shares = [list(make(12, rank=rank, world_size=2)) for rank in (0, 1)]
    full = [batch for batch in make(40) if len(batch) == 8]
    assert [x for pair in zip(*shares, strict=True) for x in pair] == full[:24]
    any_order = list(EmbeddingBatches(rows, 8, 18, distinct=False, seed=3))
    assert [*map(len, any_order)] == ([8] * 8 + [6]) * 2
    assert sorted(chain(*any_order[:9])) == [*range(70)] and any_order[0] != any_order[9]


class Words:
    """What an evaluator takes for a model: TF-IDF vectors of texts that are known before."""

    similarity_fn_name = "cosine"

    def __init__(self, texts):
        from sklearn.feature_extraction.text import TfidfVectorizer

        self.vectorizer = TfidfVectorizer(token_pattern=r"\w+", sublinear_tf=True).fit(texts)

    def encode(self, texts, **options):
        return torch.tensor(self.vectorizer.transform(texts).toarray())

    encode_query = encode_document = encode


def test_words_alone_are_scored_as_models_are():
    """By sentence-transformers' evaluators, on texts of which no two score the same."""
    draw = random.Random(0)
    words = [f"w{i}" for i in range(40)]
    texts = [" ".join(draw.choices(words, k=draw.randint(3, 20))) for _ in range(60)]
    rows = [{"query": texts[i // 2], "passage": texts[30 + i % 25]} for i in range(40)]
    task, table = Retrieval(False), table_of(rows)
    used = [*dict.fromkeys(row["query"] for row in rows),
            *dict.fromkeys(row["passage"] for row in rows)]  # fmt: skip
    found = task._evaluator(table).compute_metrices(Words(used))["cosine"]
    assert task.words_alone(table) == pytest.approx(found["ndcg@k"][10], abs=1e-6)
    pairs = [{"text_a": a, "text_b": b, "score": i % 5}
             for i, (a, b) in enumerate(zip(texts[:30], texts[30:], strict=True))]  # fmt: skip
    model = Words(texts)
    alike = (model.encode(texts[:30]) * model.encode(texts[30:])).sum(1)
    from scipy.stats import spearmanr

    expected = spearmanr(alike, [i % 5 for i in range(30)]).statistic
    assert Similarity().words_alone(table_of(pairs)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"query": "a", "passage": " "}] * 8, {}, "a text in 'passage', row 1 .* got ' '"),
        ([{"query": "a", "passage": "b", "negative": None if i == 3 else "c"} for i in range(8)],
         {}, "a text in 'negative', row 4 .* got None"),
        ([{"text": "a", "label": 1}] * 8, {}, "query and passage, or text_a, .* got text, label"),
        ([{"text_a": "a", "text_b": "b", "score": 1.0}] * 8, {}, "there is nothing to learn"),
        ([{"text_a": "a", "text_b": "b", "score": str(i)} for i in range(8)], {},
         "a number in 'score', row 1 .* got '0'"),
        (rows_of("retrieval", 8), {"long": "window"}, "--long cut or windows, got 'window'"),
        (rows_of("retrieval", 8), {"balance": True}, "no --balance with embeddings"),
        (rows_of("retrieval", 8), {"max_length": 41}, "--max-length of at most 40"),
    ],
)  # fmt: skip
def test_what_cannot_be(request_for, rows, options, message):
    with pytest.raises(InputError, match=message):
        prepare(request_for(rows=rows, **options))


@pytest.mark.slow
def test_the_commands(run, tiny_folder, text_cache, tmp_path):
    data = write(tmp_path / "data.jsonl", rows_of("retrieval", 80))
    cache = ("--cache-dir", text_cache)
    code, out, err = run(
        "finetune", data, "-o", tmp_path / "run", "--model", tiny_folder, "--epochs", 2,
        "--max-length", 40, "--device", "cpu", "--dev-share", 0.2, *cache,
    )  # fmt: skip
    assert code == 0 and "ndcg@10" in out and "words alone (TF-IDF)" in err
    assert "new: mean pooling" in err and "dev: ndcg@10" in err
    best = tmp_path / "run/best"
    code, out, err = run("evaluate", data, "--model", best, "--device", "cpu", *cache)
    scores = json.loads(out)
    assert code == 0 and scores["rows"] == 80 and 0 < scores["ndcg@10"] <= 1
    code, _, err = run("predict", data, "-o", tmp_path / "x.jsonl", "--model", best, *cache)
    assert code == 3 and "fastbert embed is for embeddings" in err
    pairs = write(tmp_path / "pairs.jsonl", rows_of("similarity", 20))
    code, out, _ = run("evaluate", pairs, "--model", best, "--device", "cpu", *cache)
    assert code == 0 and json.loads(out).keys() == {"rows", "spearman", "pearson"}
