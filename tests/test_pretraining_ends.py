"""Ends of pre-training runs: neither they nor the number of processes change what is trained."""

import functools
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from forked import forked, launched
from runs import At, metrics_of, weights_of

from fastbert.tasks.errors import OutputError
from fastbert.training import beginning
from fastbert.training import pretraining as module
from fastbert.training.run_folder import RunFolder
from fastbert.training.trainer import NotFinite

pytestmark = [
    pytest.mark.usefixtures("on_torch"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]


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
def test_stopped_and_resumed_is_not_stopped(pretrain, pretrained, tmp_path, number, step, workers):
    with pytest.raises(SystemExit) as stop:
        pretrain("parts", callbacks=[At(step, lambda: signal.raise_signal(number))])
    assert stop.value.code == 128 + number
    assert RunFolder(tmp_path / "parts", "pretrain").latest()[0] == step
    assert not (tmp_path / "parts" / "final").exists()
    pretrain("parts", workers=workers)
    assert_same_run(pretrained, tmp_path / "parts")


def test_a_second_signal_ends_at_once(pretrain):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        pretrain(callbacks=[At(2, twice)])


PROGRAM = """
import os, signal, sys
import fastbert.tasks.durable as durable
import fastbert.training.run_folder as run_folder
from fastbert.training import beginning, pretraining
from fastbert.training.pretraining import prepare
from fastbert.training.request import Request

beginning.SIZES["tiny"] = (2, 32, 2)
pretraining._PROBE_BATCHES = 2
moments = {"publish": 0, "to_disk": 0, "remove": 0}
name, count = sys.argv[2].split(":")
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


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["publish:2", "publish:4", "remove:1", "to_disk:4"])
def test_killed_at_any_moment(pretrain, pretraining_request, pretrained, tmp_path, moment):
    """In the middle of a checkpoint and of a model too."""
    from dataclasses import asdict

    arguments = [repr(asdict(pretraining_request("parts"))), moment]
    done = forked(PROGRAM, *arguments)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    pretrain("parts")
    assert_same_run(pretrained, tmp_path / "parts")
    assert not list((tmp_path / "parts").rglob(".*")), "something was left behind"


@pytest.mark.slow
def test_a_full_disk_loses_nothing(pretrain, pretrained, tmp_path, monkeypatch):
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
    assert_same_run(pretrained, tmp_path / "parts")


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


SAYS_WHO_IT_IS = """
import os
import sys
import torch

torch.distributed.init_process_group("gloo")
sum_of_ranks = torch.tensor(1 + torch.distributed.get_rank())
torch.distributed.all_reduce(sum_of_ranks)
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_USE_AGENT_STORE")
# As one piece: torchrun's processes write to one pipe, and print() would write each part by itself.
sys.stdout.write(" ".join([*map(os.environ.get, names), f"{sum_of_ranks.item()}\\n"]))
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_processes_are_what_torchrun_makes_of_them(tmp_path):
    """They find each other too; so other tests go without the command, which imports all anew."""
    program = tmp_path / "program.py"
    program.write_text(SAYS_WHO_IT_IS)
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", program]
    theirs = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert theirs.returncode == 0, theirs.stderr[-2000:]
    ours = [done.stdout for done in launched(SAYS_WHO_IT_IS, processes=2)]
    assert ours == ["0 0 2 2 True 3\n", "1 1 2 2 True 3\n"]
    assert sorted(theirs.stdout.splitlines(keepends=True)) == ours


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
def test_two_processes_are_one(pretrain, pretraining_request, tmp_path, monkeypatch, fsdp):
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
    arguments = [repr(asdict(pretraining_request("two", fsdp=fsdp))), "publish:0"]
    for stops, code in (("1", 128 + signal.SIGTERM), ("", 0)):  # first one of them gets a signal
        for done in launched(program, *arguments, processes=2, STOPS=stops):
            assert done.returncode == code, done.stderr[-3000:]
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
