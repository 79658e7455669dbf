"""Texts from masked language models, against brute force on a tiny vocabulary."""

import copy
import itertools
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from fastbert.benchmarks.scoring import compare
from tiny import tiny_config

import fastbert
from fastbert.generation import (
    MaskedModel,
    Sampling,
    Template,
    fill,
    gibbs,
    left_to_right,
    mask_predict,
    score,
)
from fastbert.generation import masked as masked_module
from fastbert.generation import scoring as scoring_module
from fastbert.tasks.errors import InputError
from fastbert.testing import assert_within_budget

pytestmark = pytest.mark.usefixtures("on_torch")
ALLOWED = ("paris", "rome", "city")
TEXT = "[MASK] is the [MASK] of france ."


@pytest.fixture(scope="module")
def folder(tiny_folder, tmp_path_factory):
    """A masked LM with clear opinions, as transformers saves it."""
    path = tmp_path_factory.mktemp("generation")
    torch.manual_seed(0)
    model = transformers.BertForMaskedLM(tiny_config(initializer_range=0.4))
    model.save_pretrained(path)
    transformers.AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def ours(folder):
    with fastbert.backend("torch"):
        return MaskedModel.load(folder, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def theirs(folder):
    return transformers.BertForMaskedLM.from_pretrained(folder).eval()


def template(ours, text=TEXT, **options):
    masks = text.count("[MASK]")
    options = {"allowed": {i: ALLOWED for i in range(1, masks + 1)}, **options}
    return Template.of(text, ours.tokenizer, **options)


def told(theirs, ids, place, words):
    """The distribution over some words at a place, by transformers' own class."""
    with torch.no_grad():
        logits = theirs(torch.tensor([ids])).logits[0, place, words]
    return dict(zip(words, logits.double().softmax(-1).tolist(), strict=True))


def chain(theirs, ours, order, ids):
    """Every way to fill places in an order, with its probability."""
    words = ours.tokenizer.convert_tokens_to_ids(list(ALLOWED))
    ways = {tuple(ids): 1.0}
    for place in order:
        found = Counter()
        for way, share in ways.items():
            masked = [*way[:place], ours.tokenizer.mask_token_id, *way[place + 1 :]]
            for word, each in told(theirs, masked, place, words).items():
                found[(*way[:place], word, *way[place + 1 :])] += share * each
        ways = found
    return ways


def assert_drawn_from(drafts, expected, sigmas=5):
    """Every way as often as its probability says, within so many standard deviations."""
    count = Counter(tuple(draft.ids) for draft in drafts)
    assert set(count) <= set(expected)
    for way, share in expected.items():
        bound = sigmas * math.sqrt(len(drafts) * share * (1 - share)) + 1
        assert abs(count[way] - share * len(drafts)) <= bound, (way, share, count[way])


# ---- what the model says ----


@torch.no_grad()
@pytest.mark.parametrize(("tokens", "places"), [(8192, 1024), (12, 1024), (8192, 2)])
def test_places_of_packed_texts(ours, theirs, monkeypatch, tokens, places):
    monkeypatch.setattr(masked_module, "_TOKENS", tokens)
    monkeypatch.setattr(masked_module, "_PLACES", places)
    texts = [[2, 7, 4, 3], [2, 4, 9, 4, 20, 30, 3], [2, 4, 3], [2, *range(5, 20), 4, 3]]
    where = [[2], [1, 3], [1], [16, 3]]
    found = list(ours.log_probs(texts, where))
    assert [len(log_probs) for log_probs in found] == [len(each) for each in where]

    def of(model, padding: int = 0) -> torch.Tensor:
        return torch.cat([
            model(torch.tensor([ids + [0] * padding]),
                  attention_mask=torch.tensor([[1] * len(ids) + [0] * padding]))
            .logits[0, each].log_softmax(-1)
            for ids, each in zip(texts, where, strict=True)
        ])  # fmt: skip

    # Six places are few: several results of torch say what it is off by.
    baselines = [of(theirs, padding) for padding in range(8)]
    assert_within_budget(
        torch.cat(found), of(copy.deepcopy(theirs).double()), baselines, "log-probabilities"
    )


def test_only_places_that_are_asked_for_meet_the_vocabulary(ours, monkeypatch):
    rows = []
    decoder = ours.model.cls.predictions.decoder
    handle = ours.model.cls.register_forward_pre_hook(lambda m, args: rows.append(len(args[0])))
    list(ours.log_probs([[2, 7, 4, 3], [2, 4, 9, 4, 20, 3]], [[2], [1, 3]]))
    handle.remove()
    assert rows == [3] and decoder.out_features == 99


@pytest.mark.parametrize("together", [2**19, 30])
def test_scores_are_sums_of_one_mask_at_a_time(ours, theirs, monkeypatch, together):
    monkeypatch.setattr(scoring_module, "_TOGETHER", together)
    texts = ["paris is a city", "rome", "madrid is the capital of spain and a city ."]
    mask = ours.tokenizer.mask_token_id
    for text, found in zip(texts, score(ours, texts), strict=True):
        ids = ours.tokenizer(text)["input_ids"]
        values = [
            told(theirs, [*ids[:i], mask, *ids[i + 1 :]], i, list(range(99)))[ids[i]]
            for i in range(1, len(ids) - 1)
        ]
        expected = float(np.log(values).sum())
        assert found.tokens == len(ids) - 2
        assert found.log_likelihood == pytest.approx(expected, rel=1e-5)
        assert found.perplexity == pytest.approx(math.exp(-expected / found.tokens), rel=1e-5)


# ---- draws ----


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (3, 1.0), (0, 0.6), (4, 0.8), (1, 1e-9)])
def test_distributions_by_hand(temperature, top_k, top_p):
    log_probs = torch.randn(5, 9).log_softmax(-1)
    found = Sampling(temperature, top_k, top_p).check().distribution(log_probs)
    for row, mine in zip(log_probs.double().tolist(), found.tolist(), strict=True):
        if temperature == 0:
            expected = [float(value == max(row)) for value in row]
        else:
            shares = [math.exp(value / temperature) for value in row]
            best = sorted(range(9), key=lambda i, shares=shares: -shares[i])[: top_k or 9]
            whole, kept, before = sum(shares[i] for i in best), [], 0.0
            for i in best:
                if before < top_p:
                    kept.append(i)
                before += shares[i] / whole
            rest = sum(shares[i] for i in kept)
            expected = [shares[i] / rest if i in kept else 0.0 for i in range(9)]
        assert mine == pytest.approx(expected, abs=1e-6)


def test_draws_have_their_distribution():
    log_probs, sampling = torch.randn(9).log_softmax(-1), Sampling(0.8, 6, 0.9)
    expected = sampling.distribution(log_probs).numpy()
    drawn = sampling.draw(log_probs.expand(20_000, 9), np.random.default_rng(0))
    counts = np.bincount(drawn, minlength=9)
    bound = 5 * np.sqrt(20_000 * expected * (1 - expected))
    assert (np.abs(counts - 20_000 * expected) <= bound).all()


# ---- writing ----


def test_the_likeliest_ways_to_fill_masks_together(ours, theirs):
    """All of them by a wide beam; a narrow one finds ways with their true probability."""
    one = template(ours, "[MASK] is the [MASK] of [MASK] .")
    every = chain(theirs, ours, one.open, one.ids)
    assert len(every) == 27 and sum(every.values()) == pytest.approx(1)
    best = sorted(every.items(), key=lambda way: -way[1])
    found = fill(ours, one, beam=27, top=27)
    assert [math.exp(draft.score) for draft in found] == pytest.approx(
        [share for _, share in best], rel=1e-4
    )
    assert tuple(found[0].ids) == best[0][0]
    for draft in fill(ours, one, beam=1, top=2):
        assert math.exp(draft.score) == pytest.approx(every[tuple(draft.ids)], rel=1e-4)
    only = fill(ours, template(ours, allowed={1: ["paris"], 2: ["city"]}), top=9)
    assert [draft.text for draft in only] == ["paris is the city of france."]
    assert only[0].score == pytest.approx(0, abs=1e-5) and only[0].words == ["paris", "city"]


def test_left_to_right_draws_from_the_chain(ours, theirs):
    one = template(ours)
    assert_drawn_from(left_to_right(ours, [one] * 2000), chain(theirs, ours, one.open, one.ids))


@pytest.mark.parametrize("sweeps", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_gibbs_draws_from_its_chain(ours, theirs, sweeps):
    """Over all orders of all sweeps."""
    one = template(ours)
    expected = Counter()
    orders = list(itertools.product(itertools.permutations(one.open), repeat=sweeps))
    for order in orders:
        for way, share in chain(theirs, ours, itertools.chain(*order), one.ids).items():
            expected[way] += share / len(orders)
    assert_drawn_from(gibbs(ours, [one] * 1500, sweeps=sweeps), expected)


@pytest.mark.parametrize("schedule", ["linear", "constant"])
def test_mask_predict_step_by_step(ours, theirs, schedule):
    """The likeliest words, as a plain loop over transformers' class finds them."""
    one = Template.of("[MASK] is [MASK] [MASK] of [MASK] [MASK] .", ours.tokenizer)
    usable = [i for i in range(99) if i not in ours.tokenizer.all_special_ids]
    ids, mask, certain = list(one.ids), ours.tokenizer.mask_token_id, {}
    again = one.open
    for iteration in range(4):
        if iteration:
            left = (4 - iteration) / 4
            count = math.floor(5 * left) if schedule == "linear" else 2
            again = sorted(certain, key=certain.get)[:count]
        masked = [mask if i in again else token for i, token in enumerate(ids)]
        for place in again:
            shares = told(theirs, masked, place, usable)
            ids[place] = max(shares, key=shares.get)
            certain[place] = shares[ids[place]]
    (found,) = mask_predict(ours, [one], iterations=4, schedule=schedule)
    assert found.ids == ids
    values = [told(theirs, [*ids[:p], mask, *ids[p + 1 :]], p, list(range(99)))[ids[p]]
              for p in one.open]  # fmt: skip
    assert found.score == pytest.approx(np.log(values).mean(), rel=1e-4)


@pytest.mark.parametrize(
    "write", [mask_predict, gibbs, left_to_right], ids=lambda write: write.__name__
)
def test_drafts_do_not_know_of_each_other(ours, write):
    """Seeds give the same drafts, whatever is written beside them; given words stay."""
    texts = [TEXT, "a [MASK] in [MASK] [MASK] .", "[MASK]", "rome and [MASK] ."]
    templates = [Template.of(text, ours.tokenizer) for text in texts]
    sampling = Sampling(1.5, 40, 0.95)
    together = write(ours, templates, sampling=sampling, seed=3)
    alone = [write(ours, templates[: i + 1], sampling=sampling, seed=3)[i] for i in range(4)]
    for mine, other, one in zip(together, alone, templates, strict=True):
        assert mine.ids == other.ids and mine.score == pytest.approx(other.score, rel=1e-5)
        kept = [i for i in range(len(one.ids)) if i not in one.open]
        assert [mine.ids[i] for i in kept] == [one.ids[i] for i in kept]
        special = set(ours.tokenizer.all_special_ids)
        assert not special & {mine.ids[place] for place in one.open}
    again = write(ours, templates, sampling=sampling, seed=4)
    assert [draft.ids for draft in again] != [draft.ids for draft in together]
    seen = []
    write(
        ours, templates, sampling=sampling, progress=lambda done, total: seen.append((done, total))
    )
    assert seen[-1][0] == seen[-1][1] and len(seen) > 1


def test_the_inside_of_a_word_does_not_follow_a_given_one(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "city", "##s", "a"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = transformers.BertTokenizer(vocab=str(tmp_path / "vocab.txt"))
    config = tiny_config(vocab_size=8, initializer_range=0.4)
    with torch.no_grad():
        model = MaskedModel(fastbert.BertForMaskedLM(config).eval(), tokenizer)
        model.model.cls.predictions.bias[6] = 50.0  # says nothing else
    (found,) = mask_predict(model, [Template.of("city [MASK] [MASK]", tokenizer)])
    assert found.words[0] in ("city", "a") and found.words[1] == "##s"
    assert found.text == f"city {found.words[0]}s"


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("paris", {"allowed": {}}, r"expected \[MASK\] in the text, got 'paris'"),
        (" ", {"allowed": {}}, "got an empty one"),
        (TEXT, {"allowed": {3: ["rome"]}}, "a mask, 1 to 2, got 3"),
        (TEXT, {"allowed": {1: ["nowhere"]}}, "one token of the model, got 'nowhere'"),
        (TEXT, {"banned": ALLOWED}, "may stand at mask 1, got constraints that leave none"),
        (TEXT, {"allowed": {2: []}}, "may stand at mask 2"),
        (TEXT, {"length": 3}, r"expected one \[MASK\] .* got 2"),
        ("a [MASK]", {"length": 0}, "a length of 1 token or more, got 0"),
        ("a [MASK]", {"length": 40, "limit": 40, "allowed": {}}, "at most 40 tokens.* got 43"),
    ],
)
def test_templates_that_cannot_be(ours, text, options, message):
    with pytest.raises(InputError, match=message):
        template(ours, text, **options)


def test_settings_that_cannot_be(ours):
    one = template(ours)
    for write, options, message in [
        (mask_predict, {"iterations": 0}, "1 iteration or more"),
        (mask_predict, {"schedule": "cubic"}, "linear, constant, got 'cubic'"),
        (gibbs, {"sweeps": 0}, "1 sweep or more"),
        (left_to_right, {"sampling": Sampling(-1.0)}, "a temperature of 0 or more"),
        (gibbs, {"sampling": Sampling(top_k=-1)}, "a top-k of 0"),
        (gibbs, {"sampling": Sampling(top_p=0.0)}, "a top-p above 0"),
    ]:
        with pytest.raises(InputError, match=message):
            write(ours, [one], **options)
    with pytest.raises(InputError, match="beam and a top of 1 or more"):
        fill(ours, one, beam=0)
    with pytest.raises(InputError, match="a word or more, got ' '"):
        list(score(ours, ["paris", " "]))
    with pytest.raises(InputError, match=r"at most 40 tokens.* got 42; split"):
        list(score(ours, ["paris " * 40]))


# ---- commands ----


@pytest.mark.slow
def test_generate_command(run, folder, tiny_folder):
    command = ["generate", "[MASK] is a city", "--model", folder, "--device", "cpu"]
    for method in ("mask-predict", "gibbs", "left-to-right"):
        options = ["--method", method, "--length", "1:3", "--json", "--seed", 2, "--top-p", 0.9]
        code, out, err = run(*command, *options)
        lines = [json.loads(line) for line in out.splitlines()]
        assert code == 0 and {len(line["words"]) for line in lines} == {1, 2, 3}, err
        scores = [line["score"] for line in lines]
        assert scores == sorted(scores, reverse=True)
        assert all(line["text"].endswith(" is a city") for line in lines)
        assert run(*command, *options)[1] == out, "the same seed"
    code, out, _ = run(*command, "--allow", "1=paris,rome", "--ban", "rome", "--drafts", 3)
    assert code == 0 and out.count("\n") == 1 and out.strip().endswith("paris is a city")
    for options, message in [
        (["--allow", "1=paris", "--allow", "1=rome"], "a word that all --allow for mask 1 have"),
        (["--allow", "paris"], "--allow NUMBER=WORD"),
        (["--length", "3:1"], "--length N or FROM:TO"),
        (["--top-p", "0"], "a top-p above 0"),
    ]:
        code, _, err = run(*command, *options)
        assert code == 3 and message in err
    code, _, err = run("generate", "[MASK]", "--model", tiny_folder)
    assert code == 4 and "cls.predictions" in err


@pytest.mark.slow
def test_fill_mask_together(run, folder, ours):
    command = ["fill-mask", TEXT, "--model", folder, "--device", "cpu"]
    code, out, _ = run(*command, "--joint", "--json", "--top-k", 3, "--beam", 99)
    found = [json.loads(line) for line in out.splitlines()]
    expected = fill(ours, Template.of(TEXT, ours.tokenizer), beam=99, top=3)
    assert code == 0 and [one["text"] for one in found] == [draft.text for draft in expected]
    code, out, _ = run(*command, "--json", "--top-k", 2)
    assert [json.loads(line)["mask"] for line in out.splitlines()] == [1, 1, 2, 2]
    code, _, err = run(*command, "--ban", "rome")
    assert code == 3 and "with --joint" in err


@pytest.mark.slow
def test_score_command(run, folder, ours, tmp_path):
    source = tmp_path / "texts.txt"
    source.write_text("paris is a city\n" + "rome " * 50 + "\nrome\n")
    output = tmp_path / "out.jsonl"
    command = ["score", source, "--model", folder, "--device", "cpu"]
    code, out, err = run(*command, "-o", output)
    assert code == 3 and "line 2: expected at most 40 tokens" in err and not output.exists()
    code, out, err = run(*command, "-o", output, "--on-error", "skip")
    assert code == 0 and out == "" and "2 texts, 5 tokens" in err and "1 bad rows" in err
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    for line, found in zip(lines, score(ours, ["paris is a city", "rome"]), strict=True):
        assert line["log_likelihood"] == pytest.approx(found.log_likelihood)
        assert line["perplexity"] == pytest.approx(found.perplexity)
    assert [line["line"] for line in lines] == [1, 3]
    code, again, _ = run(*command, "--on-error", "skip")
    assert code == 0 and again == output.read_text()
    code, _, err = run(*command, "-o", tmp_path / "out.csv", "--on-error", "skip")
    assert code == 5 and "an output of .jsonl" in err


@pytest.mark.slow
def test_scoring_is_compared_with_a_loop(minilm_folder):
    """That they say the same is asserted inside."""
    found = compare(sentences=2, parts=2, device="cpu")
    assert found.sentences == 2 and found.tokens > 20 and found.ratio > 0


def test_the_documentation_runs(folder, capsys):
    text = (Path(__file__).parents[1] / "docs/generation.md").read_text("utf-8")
    program = text.partition("```python\n")[2].partition("```")[0]
    assert '"generate-example/run/best"' in program
    exec(program.replace('"generate-example/run/best"', repr(str(folder))), {})
    printed, shown = capsys.readouterr().out.splitlines(), text.partition("in this order")[2]
    assert len(printed) == len(shown.split("```")[1].strip().splitlines()) == 10
