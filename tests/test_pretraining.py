"""Pre-training runs: what is trained, what is written, and that no end of a process changes it."""

import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from fastbert.benchmarks.pretraining import compare
from tiny import tiny_config

import fastbert
from fastbert.tasks.errors import InputError, LoadError, OutputError
from fastbert.training import beginning
from fastbert.training import pretraining as module
from fastbert.training.pretraining import prepare
from fastbert.training.request import Request, mask_schedule
from fastbert.training.run_folder import RunFolder
from fastbert.training.trainer import NotFinite

pytestmark = [
    pytest.mark.usefixtures("on_torch"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]


@pytest.fixture(autouse=True)
def _interruptible():
    """As in a terminal: what runs in the background of a shell ignores Ctrl-C from the start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setitem(beginning.SIZES, "tiny", (2, 32, 2))
    monkeypatch.setattr(module, "_PROBE_BATCHES", 2)


@pytest.fixture
def request_for(texts, text_cache, tiny_folder, tmp_path):
    def make(output="run", **options):
        options = {
            "size": "tiny", "tokenizer": str(tiny_folder), "steps": 8, "batch_tokens": 512,
            "device_tokens": 256, "max_length": 40, "held_out": 0.1, "save_every": 3,
            "device": "cpu", "cache_dir": text_cache, "texts": (str(texts),), **options,
        }  # fmt: skip
        return Request(output=str(tmp_path / output), **options)

    return make


@pytest.fixture
def pretrain(request_for):
    def call(output="run", *, callbacks=(), allow=(), **options):
        pretraining = prepare(request_for(output, **options))
        pretraining.train(pretraining.plan(), callbacks=callbacks, allow=allow)
        return pretraining

    return call


class At(transformers.TrainerCallback):
    """Does something behind a step, once.

    A signal is raised by this thread: one that is sent to the process may be taken by another one,
    and be noted a step later.
    """

    def __init__(self, step, do):
        self.step, self.do = step, do

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.do()


def metrics_of(folder):
    """Without times and memory."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "memory")} for line in lines]


def weights_of(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def assert_same_run(one, other):
    first, second = weights_of(one / "final"), weights_of(other / "final")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first.keys() == second.keys()
    states = [
        torch.load(max((run / "checkpoints").iterdir()) / "optimizer.pt") for run in (one, other)
    ]
    for mine, theirs in zip(*(state["state"].values() for state in states), strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert metrics_of(one) == metrics_of(other)


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
def test_tensorboard_shows_each_step_once(pretrain, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with pytest.raises(SystemExit):
        pretrain(callbacks=[At(4, lambda: signal.raise_signal(signal.SIGTERM))])
    folder = tmp_path / "run/checkpoints"
    (folder / "step-4").rename(tmp_path / "lost")  # so that step 4 comes twice
    pretrain()
    events = accumulator.EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    for name in ("train/loss", "train/mlm_accuracy", "train/nsp_accuracy"):
        assert [event.step for event in events.Scalars(name)] == list(range(1, 9))
    assert [event.step for event in events.Scalars("eval/perplexity")] == [0, 3, 6, 8]


@pytest.mark.slow
def test_a_finished_run_is_not_trained_again(pretrain, tmp_path):
    pretrain()
    before = (tmp_path / "run/metrics.jsonl").read_text(), weights_of(tmp_path / "run/final")
    pretrain()
    assert (tmp_path / "run/metrics.jsonl").read_text() == before[0]
    assert all(torch.equal(v, before[1][k]) for k, v in weights_of(tmp_path / "run/final").items())


@pytest.mark.parametrize(
    ("number", "step", "workers"),
    [
        pytest.param(signal.SIGTERM, 1, 0, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 3, 0, marks=pytest.mark.slow),
        (signal.SIGTERM, 7, 0),
        pytest.param(signal.SIGINT, 4, 2, marks=pytest.mark.slow),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_stopped_and_resumed_is_not_stopped(pretrain, tmp_path, number, step, workers):
    pretrain("whole")
    with pytest.raises(SystemExit) as stop:
        pretrain("parts", callbacks=[At(step, lambda: signal.raise_signal(number))])
    assert stop.value.code == 128 + number
    assert RunFolder(tmp_path / "parts", "pretrain").latest()[0] == step
    assert not (tmp_path / "parts" / "final").exists()
    pretrain("parts", workers=workers)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_second_signal_ends_at_once(pretrain):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        pretrain(callbacks=[At(2, twice)])


PROGRAM = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
import fastbert.tasks.durable as durable
import fastbert.training.run_folder as run_folder
from fastbert.training import beginning, pretraining
from fastbert.training.pretraining import prepare
from fastbert.training.request import Request

beginning.SIZES["tiny"] = (2, 32, 2)
pretraining._PROBE_BATCHES = 2
moments = {"publish": 0, "to_disk": 0, "remove": 0}
name, count = sys.argv[3].split(":")
original = getattr(run_folder, name)

def deadly(*args, **kwargs):
    moments[name] += 1
    if moments[name] == int(count):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)

setattr(run_folder, name, deadly)
pretrained = prepare(Request(**eval(sys.argv[1])))
pretrained.train(pretrained.plan())
"""


def in_a_process(*arguments):
    """As users have it, without the interpreter of kernels."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment
    )


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["publish:2", "publish:4", "remove:1", "to_disk:4"])
def test_killed_at_any_moment(pretrain, request_for, tmp_path, moment):
    """In the middle of a checkpoint and of a model too."""
    from dataclasses import asdict

    pretrain("whole")
    arguments = [repr(asdict(request_for("parts"))), os.getcwd(), moment]
    done = in_a_process("-c", PROGRAM, *arguments)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    pretrain("parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert not list((tmp_path / "parts").rglob(".*")), "something was left behind"


@pytest.mark.slow
def test_a_full_disk_loses_nothing(pretrain, tmp_path, monkeypatch):
    pretrain("whole")
    save = torch.save

    def full(value, path, *args, **kwargs):
        if "checkpoint-6" in str(path):
            raise OSError(28, "No space left on device")
        return save(value, path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OutputError, match="No space left on device; what was complete"):
            pretrain("parts")
    assert RunFolder(tmp_path / "parts", "pretrain").latest()[0] == 3
    pretrain("parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_where_nothing_can_be_written(pretrain, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"cannot write in '.*file/run': Not a directory"):
        pretrain("file/run")

    def read_only(*args, **kwargs):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", read_only)
    for tokenizer in ({}, {"tokenizer": None, "vocab_size": 60}):
        with pytest.raises(OutputError, match=r"cannot write in '.*': Read-only file system"):
            pretrain(**tokenizer)


def test_a_loss_that_is_not_finite_ends_the_run(pretrain, tmp_path, monkeypatch):
    broken = []

    def breaks():
        with torch.no_grad():
            broken[0][0].bert.embeddings.LayerNorm.weight.fill_(float("nan"))

    make = module.model_for
    monkeypatch.setattr(module, "model_for", lambda *args: broken.append(make(*args)) or broken[0])
    with pytest.raises(NotFinite, match="got nan in step 5; the last checkpoint"):
        pretrain(callbacks=[At(4, breaks)])
    assert RunFolder(tmp_path / "run", "pretrain").latest()[0] == 3


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
def test_single_segments_and_whole_words(pretrain, tmp_path, request_for, texts, text_cache):
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
def test_steps_from_tokens_and_hours(request_for):
    plan = prepare(request_for(steps=None, tokens=20_000)).plan()
    assert plan.steps * plan.tokens_per_step <= 20_000 < (plan.steps + 1) * plan.tokens_per_step
    assert 0.9 * 512 < plan.tokens_per_step <= 512 and plan.passes_per_step == 2
    pretraining = prepare(request_for(steps=None, hours=0.01))
    plan = pretraining.plan()
    assert plan.seconds == pytest.approx(36, rel=0.1)
    with RunFolder(pretraining.request.output, "pretrain") as run:
        run.begin(pretraining.facts(plan.steps))
    assert prepare(request_for(steps=None, hours=0.01)).plan().steps == plan.steps, "as begun"


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
def test_what_cannot_be(request_for, options, error, message):
    if error is None:
        assert prepare(request_for(**options)).model.config.max_position_embeddings == 513
        return
    with pytest.raises(error, match=message):
        prepare(request_for(**options))


def test_texts_that_are_too_few(request_for, tmp_path):
    one = tmp_path / "one.txt"
    one.write_text("paris is the capital of france. rome is the capital of italy.")
    pretraining = prepare(request_for(texts=(str(one),)))
    with pytest.raises(InputError, match=r"two documents or more for next-sentence .* --no-nsp"):
        pretraining.plan()
    pretraining = prepare(request_for(texts=(str(one),), nsp=False, steps=2))
    verdict = pretraining.train(pretraining.plan())
    assert str(verdict) == "2 steps; no document was held out, so nothing was evaluated"
    with pytest.raises(InputError, match=r"at least the \d+ tokens of one step, got 3"):
        prepare(request_for(texts=(str(one),), nsp=False, steps=None, tokens=3)).plan()


def test_models_that_do_not_fit(request_for, tiny_folder, tmp_path):
    with pytest.raises(InputError, match=r"--max-length of at most 40.* got 41"):
        prepare(request_for(model=str(tiny_folder), max_length=41))
    fastbert.BertModel(tiny_config(vocab_size=50)).save_pretrained(tmp_path / "few")
    with pytest.raises(LoadError, match=r"at most 50 tokens, .* got 99"):
        prepare(request_for(model=str(tmp_path / "few")))


def test_mask_schedule():
    falls = mask_schedule("0.30:0.10")
    assert [falls(x) for x in (0, 0.5, 1)] == pytest.approx([0.3, 0.2, 0.1])
    assert mask_schedule("0.15")(0.7) == pytest.approx(0.15)


def test_a_falling_share_is_masked(pretrain, tmp_path):
    pretrain(mask="0.5:0.1", steps=10)
    shares = [m["masked"] / m["tokens"] for m in metrics_of(tmp_path / "run") if "masked" in m]
    assert shares[0] > 0.4 and shares[-1] < 0.17


# accelerate shards on accelerators alone.
SHARDS_ON_CPU = """
import accelerate.state as state
make = state.AcceleratorState.__init__

def made(self, *args, fsdp_plugin=None, **kwargs):
    make(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        self.fsdp_plugin = fsdp_plugin
        self.distributed_type = state.DistributedType.FSDP
        state.PartialState._shared_state["distributed_type"] = self.distributed_type

state.AcceleratorState.__init__ = made
import fastbert.training.run as run
run._shards_on = lambda device: True
"""


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True], ids=["copies", "shares"])
def test_two_processes_are_one(pretrain, request_for, tmp_path, monkeypatch, fsdp):
    """Without dropout, which draws in each process for itself."""
    from dataclasses import asdict

    config = functools.partial(
        transformers.BertConfig, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    monkeypatch.setattr(beginning, "BertConfig", config)
    pretrain("one")
    callback = (
        "from transformers import TrainerCallback\n"
        "class At(TrainerCallback):\n"
        "    def on_step_end(self, args, state, control, **kwargs):\n"
        "        if os.environ['RANK'] == os.environ['STOPS'] and state.global_step == 4:\n"
        "            signal.raise_signal(signal.SIGTERM)\n"
    )
    program = PROGRAM.replace(
        "pretrained = prepare",
        "import functools, transformers\n"
        "beginning.BertConfig = functools.partial(transformers.BertConfig, "
        "hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)\n"
        + callback
        + (SHARDS_ON_CPU if fsdp else "")
        + "pretrained = prepare",
    ).replace("train(pretrained.plan())", "train(pretrained.plan(), callbacks=[At()])")
    (tmp_path / "program.py").write_text(program)
    arguments = [repr(asdict(request_for("two", fsdp=fsdp))), os.getcwd(), "publish:0"]
    for stops, codes in (("1", {1}), ("", {0})):  # first one of them gets a signal
        monkeypatch.setenv("STOPS", stops)
        done = in_a_process(
            "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
            str(tmp_path / "program.py"), *arguments,
        )  # fmt: skip
        assert done.returncode in codes, done.stderr[-3000:]
        latest = RunFolder(tmp_path / "two", "pretrain").latest()
        assert latest and latest[0] == (4 if stops else 8), done.stderr[-6000:]
    assert (tmp_path / "two/checkpoints/step-8/pytorch_model_fsdp.bin").exists() == fsdp
    one, two = (weights_of(tmp_path / name / "final") for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=2e-5, rtol=1e-4)
    for mine, theirs in zip(
        *([m for m in metrics_of(tmp_path / name) if "loss" in m] for name in ("one", "two")),
        strict=True,
    ):
        assert (mine["tokens"], mine["masked"]) == (theirs["tokens"], theirs["masked"])
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


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
