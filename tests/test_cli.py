"""The command ``fastbert``, run as people run it, with the failures people meet."""

import json
import subprocess
import sys

import pytest
import torch
import transformers
from tiny import tiny_config
from typer.testing import CliRunner

import fastbert
from fastbert import cli

pytestmark = pytest.mark.usefixtures("on_torch")


@pytest.fixture(scope="module")
def masked_lm(tiny_folder, tmp_path_factory):
    """A tiny masked LM that has learned four sentences by heart."""
    path = tmp_path_factory.mktemp("masked_lm")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    with fastbert.backend("torch"):
        model = fastbert.BertForMaskedLM(tiny_config(hidden_dropout_prob=0.0)).train()
        facts = ["paris is the capital of france .", "rome is the capital of italy .",
                 "madrid is the capital of spain ."]  # fmt: skip
        batch = tokenizer(facts, return_tensors="pt", padding=True)
        labels = batch["input_ids"].clone()
        batch["input_ids"][:, 1] = tokenizer.mask_token_id
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(60):
            optimizer.zero_grad()
            model(**batch, labels=labels).loss.backward()
            optimizer.step()
    model.save_pretrained(path)
    return path


def test_fill_mask_finds_the_word(masked_lm, tiny_folder, run):
    text = "[MASK] is the capital of italy ."
    code, out, err = run("fill-mask", text, "--model", masked_lm, "--top-k", 2)
    assert code == 0, err
    first = next(line for line in out.splitlines() if "0." in line)
    assert "rome" in first and "rome is the capital" in out.replace("\n", " ")
    code, out, _ = run("fill-mask", "[MASK] is the [MASK] .", "--model", masked_lm)
    assert code == 0 and "[MASK] 2" in out
    code, _, err = run("fill-mask", "no mask", "--model", masked_lm)
    assert code == 3 and "expected [MASK] in the text" in err
    code, _, err = run("fill-mask", text, "--model", tiny_folder)  # an encoder without the head
    assert code == 4 and "cls.predictions" in err
    code, _, err = run("fill-mask", "[MASK] " + "word1 " * 50, "--model", masked_lm)
    assert code == 3 and "at most 40 tokens" in err


@pytest.mark.slow
def test_check_reports_and_passes(run):
    code, out, err = run("check", "--json")
    report = json.loads(out)
    assert code == 0 and report["passed"], (report, err)
    names = " ".join(check["name"] for check in report["checks"])
    assert "parity on cpu, float32" in names and "torch version" in names
    assert report["facts"]["torch"] == torch.__version__
    assert "backend on cpu" in report["facts"]


@pytest.mark.slow
def test_check_fails_when_results_are_wrong(run, monkeypatch):
    from fastbert import encoder
    from fastbert.tasks import selfcheck

    for owner, name in ((encoder.ops, "linear_add_norm"), (encoder, "_normed")):
        right = getattr(owner, name)
        wrong = lambda *a, right=right, **k: 1.01 * right(*a, **k)  # noqa: E731
        monkeypatch.setattr(owner, name, wrong)
    # In a process of its own, where nothing is wrong.
    right = selfcheck.Check("parity of the kernels", True, "")
    monkeypatch.setattr(selfcheck, "_kernels_in_the_interpreter", lambda: right)
    code, out, _ = run("check")
    assert code == 1 and "failed" in out


def test_the_version_and_the_module(run):
    code, out, _ = run("--version")
    assert code == 0 and out == f"fastbert {fastbert.__version__}\n"
    result = subprocess.run(
        [sys.executable, "-m", "fastbert", "--version"], capture_output=True, text=True
    )
    assert result.returncode == 0 and result.stdout == out, result.stderr


def test_help_is_there_for_everything():
    for args in ([], ["embed"], ["fill-mask"], ["generate"], ["score"], ["check"]):
        result = CliRunner().invoke(cli.app, [*args, "--help"])
        assert result.exit_code == 0 and "Usage" in result.output


@pytest.mark.slow
def test_demo_answers_and_agrees(tmp_path, capsys, monkeypatch, minilm_folder):
    from fastbert.demo import __main__ as demo
    from fastbert.demo import passages

    every = passages()
    assert len(every) >= 200
    monkeypatch.setattr(demo, "passages", lambda: every[3::6])
    code = demo.main(
        [
            "--question",
            "What makes dough rise?",
            "--rounds",
            "1",
            "--json",
            str(tmp_path / "r.json"),
        ]
    )
    out = capsys.readouterr().out
    assert code == 0 and "Yeast" in out and "speed-up" in out
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["largest_difference"] < 1e-5 and 0.3 < result["padding_removed"] < 0.9


@pytest.mark.slow
def test_demo_fails_loudly_when_results_differ(monkeypatch, capsys, minilm_folder):
    from fastbert.demo import __main__ as demo

    few = demo.passages()[:8]
    monkeypatch.setattr(demo, "passages", lambda: few)
    monkeypatch.setattr(demo, "TOLERANCE", 0.0)
    assert demo.main(["--question", "x", "--rounds", "1"]) == 1
    assert "OVER" in capsys.readouterr().out
