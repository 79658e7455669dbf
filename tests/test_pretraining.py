"""Pre-training runs: what is trained, what is written, what is refused."""

import json
import signal

import pytest
import torch
import transformers
from fastbert.benchmarks.pretraining import compare
from runs import At, metrics_of, weights_of
from tiny import tiny_config

import fastbert
from fastbert.tasks.errors import InputError, LoadError, OutputError
from fastbert.training.pretraining import prepare
from fastbert.training.request import mask_schedule
from fastbert.training.run_folder import RunFolder

pytestmark = [
    pytest.mark.usefixtures("on_torch", "pretraining_request"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]


def test_a_run(pretrain, tmp_path):
    pretrain()
    run = tmp_path / "run"
    assert {p.name for p in run.iterdir()} == {
        "best", "checkpoints", "final", "lock", "metrics.jsonl", "run.json", "tensorboard",
    }  # fmt: skip
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"step-6", "step-8"}
    lines = metrics_of(run)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 9))
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 3, 6, 8]
    assert steps[-1]["loss"] < steps[0]["loss"] and all(s["tokens"] <= 512 for s in steps)
    assert steps[0].keys() == {
        "step", "loss", "grad_norm", "learning_rate", "tokens", "masked", "mlm_accuracy",
        "nsp_accuracy",
    }  # fmt: skip
    facts = json.loads((run / "run.json").read_text())
    assert facts["steps"] == 8 and facts["model"] is None
    assert facts["_machine"]["torch"] == torch.__version__ and "commit" in facts["_machine"]
    card = (run / "final" / "README.md").read_text()
    assert "8 steps; held out: perplexity" in card and "texts.txt" in card
    for folder in ("best", "final"):
        assert not list((run / folder).glob("*.bin")), "pickles"
        model = transformers.BertForPreTraining.from_pretrained(run / folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(run / folder)
        fill = transformers.pipeline("fill-mask", model=str(run / folder))
        assert model.config.vocab_size == len(tokenizer) and len(fill("paris is [MASK]")) == 5


@pytest.mark.slow
def test_a_finished_run_is_not_trained_again(pretrain, tmp_path):
    pretrain()
    before = (tmp_path / "run/metrics.jsonl").read_text(), weights_of(tmp_path / "run/final")
    pretrain()
    assert (tmp_path / "run/metrics.jsonl").read_text() == before[0]
    assert all(torch.equal(v, before[1][k]) for k, v in weights_of(tmp_path / "run/final").items())


@pytest.mark.slow
def test_what_changed_is_refused(pretrain, texts, tmp_path):
    with pytest.raises(SystemExit):
        pretrain(callbacks=[At(2, lambda: signal.raise_signal(signal.SIGTERM))])
    with pytest.raises(InputError, match=r"learning_rate was None and is 0.1; seed was 0 and is 5"):
        pretrain(seed=5, learning_rate=0.1)
    more = tmp_path / "more.txt"
    more.write_text(texts.read_text() + "\n\nrome is.")
    with pytest.raises(InputError, match=r"texts was '\w+' and is '\w+'"):
        pretrain(texts=(str(more),))
    pretrain(learning_rate=0.1, allow=["learning_rate"])


def test_folders_of_others(pretrain, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(InputError, match=r"holds 'thesis.tex' and no run.json"):
        pretrain("mine")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "run.json").write_text('{"kind": "finetune"}')
    with pytest.raises(
        InputError, match=r"a run of fastbert pretrain .* got one of fastbert finet"
    ):
        pretrain("other")
    with RunFolder(tmp_path / "busy", "pretrain"), pytest.raises(OutputError, match="alone"):
        pretrain("busy")


@pytest.mark.slow
def test_patience(pretrain, tmp_path):
    """A learning rate at which nothing gets better for long."""
    pretrain(steps=40, evaluate_every=1, patience=2, learning_rate=3.0, save_every=100)
    losses = [line["eval_loss"] for line in metrics_of(tmp_path / "run") if "eval_loss" in line]
    best = losses.index(min(losses))
    assert len(losses) == best + 3 < 41
    steps = [line["step"] for line in metrics_of(tmp_path / "run") if "loss" in line]
    assert steps[-1] == len(losses) - 1


@pytest.mark.slow
def test_single_segments_and_whole_words(
    pretrain, tmp_path, pretraining_request, texts, text_cache
):
    pretrain(nsp=False, tokenizer=None, vocab_size=60, whole_words=True, steps=3)
    line = metrics_of(tmp_path / "run")[-1]
    assert "eval_nsp_accuracy" not in line and "eval_mlm_accuracy" in line
    assert (tmp_path / "run/tokenizer/tokenizer.json").exists()
    model = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "run/final")
    assert type(model) is transformers.BertForMaskedLM


@pytest.mark.slow
def test_going_on_from_a_checkpoint(pretrain, tiny_folder, tmp_path):
    """An encoder without heads gets new ones."""
    done = pretrain(model=str(tiny_folder), tokenizer=None, steps=2, learning_rate=1e-6)
    assert done.new and all(name.startswith("cls.") for name in done.new)
    facts = json.loads((tmp_path / "run/run.json").read_text())
    assert len(facts["model"]) == 32 and facts["_model"] == str(tiny_folder)
    other = transformers.AutoModel.from_pretrained(tiny_folder)
    other.embeddings.LayerNorm.weight.data[0] += 1
    other.save_pretrained(tmp_path / "other")
    again = dict(tokenizer=str(tiny_folder), steps=2, learning_rate=1e-6)
    with pytest.raises(InputError, match=r"model was '\w+' and is '\w+'"):
        pretrain(model=str(tmp_path / "other"), **again)
    (tmp_path / "moved").symlink_to(tiny_folder)
    pretrain(model=str(tmp_path / "moved"), **again)  # where it is does not matter
    before = weights_of(tiny_folder)
    after = weights_of(tmp_path / "run/final")
    for name, value in before.items():
        if not name.startswith("pooler"):
            torch.testing.assert_close(after[f"bert.{name}"], value, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_steps_from_tokens_and_hours(pretraining_request):
    plan = prepare(pretraining_request(steps=None, tokens=20_000)).plan()
    assert plan.steps * plan.tokens_per_step <= 20_000 < (plan.steps + 1) * plan.tokens_per_step
    assert 0.9 * 512 < plan.tokens_per_step <= 512 and plan.passes_per_step == 2
    pretraining = prepare(pretraining_request(steps=None, hours=0.01))
    plan = pretraining.plan()
    assert plan.seconds == pytest.approx(36, rel=0.1)
    with RunFolder(pretraining.request.output, "pretrain") as run:
        run.begin(pretraining.facts(plan.steps))
    assert prepare(pretraining_request(steps=None, hours=0.01)).plan().steps == plan.steps, (
        "as begun"
    )


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": None}, InputError, "one of --tokens, --steps and --hours"),
        ({"tokens": 9}, InputError, "one of --tokens, --steps and --hours"),
        ({"fsdp": True}, InputError, "several processes with a GPU each .* got 1 on cpu"),
        (
            {"batch_tokens": 30},
            InputError,
            "at least --max-length 40 tokens, got --batch-tokens 30",
        ),
        ({"max_length": 513, "device_tokens": 600, "batch_tokens": 600}, None, None),
        ({"mask": "1.5"}, InputError, "a share such as 0.15.* got '1.5'"),
        ({"mask": "a:b"}, InputError, "got 'a:b'"),
        ({"size": "huge"}, InputError, "a --size of tiny, .* got 'huge'"),
        ({"texts": ("/nowhere/x.txt",)}, InputError, "got none; name files"),
        ({"model": "/nowhere"}, LoadError, "cannot|expected"),
    ],
)
def test_what_cannot_be(pretraining_request, options, error, message):
    if error is None:
        assert prepare(pretraining_request(**options)).model.config.max_position_embeddings == 513
        return
    with pytest.raises(error, match=message):
        prepare(pretraining_request(**options))


def test_texts_that_are_too_few(pretraining_request, tmp_path):
    one = tmp_path / "one.txt"
    one.write_text("paris is the capital of france. rome is the capital of italy.")
    pretraining = prepare(pretraining_request(texts=(str(one),)))
    with pytest.raises(InputError, match=r"two documents or more for next-sentence .* --no-nsp"):
        pretraining.plan()
    pretraining = prepare(pretraining_request(texts=(str(one),), nsp=False, steps=2))
    verdict = pretraining.train(pretraining.plan())
    assert str(verdict) == "2 steps; no document was held out, so nothing was evaluated"
    with pytest.raises(InputError, match=r"at least the \d+ tokens of one step, got 3"):
        prepare(pretraining_request(texts=(str(one),), nsp=False, steps=None, tokens=3)).plan()


def test_models_that_do_not_fit(pretraining_request, tiny_folder, tmp_path):
    with pytest.raises(InputError, match=r"--max-length of at most 40.* got 41"):
        prepare(pretraining_request(model=str(tiny_folder), max_length=41))
    fastbert.BertModel(tiny_config(vocab_size=50)).save_pretrained(tmp_path / "few")
    with pytest.raises(LoadError, match=r"at most 50 tokens, .* got 99"):
        prepare(pretraining_request(model=str(tmp_path / "few")))


def test_mask_schedule():
    falls = mask_schedule("0.30:0.10")
    assert [falls(x) for x in (0, 0.5, 1)] == pytest.approx([0.3, 0.2, 0.1])
    assert mask_schedule("0.15")(0.7) == pytest.approx(0.15)


def test_a_falling_share_is_masked(pretrain, tmp_path):
    pretrain(mask="0.5:0.1", steps=10)
    shares = [m["masked"] / m["tokens"] for m in metrics_of(tmp_path / "run") if "masked" in m]
    assert shares[0] > 0.4 and shares[-1] < 0.17


@pytest.mark.slow
def test_the_command(run, texts, text_cache, tiny_folder, tmp_path):
    arguments = [
        "pretrain", texts, "-o", tmp_path / "run", "--size", "tiny", "--tokenizer", tiny_folder,
        "--steps", 4, "--batch-tokens", "0.5k", "--max-length", 40, "--held-out", 0.1,
        "--save-every", 2, "--device", "cpu", "--cache-dir", text_cache,
    ]  # fmt: skip
    code, out, err = run(*arguments, "--dry-run")
    assert code == 0 and out == "" and not (tmp_path / "run").exists()
    for told in ("documents: 54, 6 more held out", "steps: 4 of 1 passes", "would be padding"):
        assert told in err
    code, out, err = run(*arguments)
    assert code == 0 and "held out: perplexity" in out and out.count("\n") == 1
    assert "step 4/4 | loss" in err and "tokens/s" in err and "time outside the model: " in err
    code, _, err = run(*arguments, "--seed", 3)
    assert code == 3 and "seed was 0 and is 3" in err
    code, _, err = run(*arguments[:-6], "--batch-tokens", "many")
    assert code == 2 and "such as 32k or 100M" in err


@pytest.mark.slow
def test_steps_are_compared_with_transformers(tiny_folder):
    """That their losses agree is asserted inside."""
    found = compare(size="tiny", max_length=40, tokens=256, steps=3, rounds=2,
                    tokenizer=tiny_folder, device="cpu")  # fmt: skip
    assert len(found.fastbert) == len(found.transformers) == 4
    assert found.ratio > 0 and 0.4 < found.fill < 0.7 and 0 < found.overhead < 1
