"""The command ``fastbert``, run as people run it, with the failures people meet."""

import errno
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tiny import tiny_config
from typer.testing import CliRunner

import fastbert
from fastbert import cli

pytestmark = pytest.mark.usefixtures("on_torch")
WORDS = ("paris", "is", "the", "capital", "of", "france", "rome", "italy", "madrid", "spain",
         "and", "a", "city", "in")  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny encoder with a real WordPiece tokenizer."""
    path = tmp_path_factory.mktemp("encoder")
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *WORDS]
    tokens += [f"word{i}" for i in range(99 - len(tokens))]
    (path / "vocab.txt").write_text("\n".join(tokens))
    tokenizer = transformers.BertTokenizer(vocab=str(path / "vocab.txt"))
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    fastbert.BertModel(tiny_config()).save_pretrained(path)
    return path


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command through `main`, so that exit codes and messages are the real ones."""

    def call(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fastbert", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return stop.value.code or 0, out, err

    return call


TEXTS = ["paris is a city", "rome", "madrid is the capital of spain and a city"]


def write_input(path, kind):
    if kind == ".txt":
        path.write_text("\n".join(TEXTS))
    elif kind == ".csv":
        path.write_text("id,text\n" + "".join(f'{i},"{t}"\n' for i, t in enumerate(TEXTS)))
    elif kind == ".jsonl":
        path.write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    else:
        import pyarrow as pa
        import pyarrow.parquet

        pa.parquet.write_table(pa.table({"text": TEXTS}), path)
    return path


@pytest.mark.parametrize("output", [".parquet", ".npy"])
@pytest.mark.parametrize("kind", [".txt", ".csv", ".jsonl", ".parquet"])
def test_embed_reads_and_writes_every_format(kind, output, folder, tmp_path, run):
    source = write_input(tmp_path / f"in{kind}", kind)
    target = tmp_path / f"out{output}"
    code, out, err = run("embed", source, "-o", target, "--model", folder, "--batch-tokens", 9)
    assert code == 0, err
    assert "3 embeddings of size 32" in out
    if output == ".npy":
        vectors = np.load(target)
    else:
        import pyarrow.parquet

        table = pyarrow.parquet.read_table(target)
        assert table.column("text").to_pylist() == TEXTS
        vectors = np.array(table.column("embedding").to_pylist(), dtype=np.float32)
    model = transformers.BertModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for text, vector in zip(TEXTS, vectors, strict=True):
        with torch.no_grad():
            alone = model(**tokenizer(text, return_tensors="pt"))[0][0].mean(0)
        assert np.abs(vector - alone.numpy()).max() < 1e-5
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


BAD_ROWS = {
    "not JSON": ("a.jsonl", b'{"text": "rome"}\n{"text": \n', 2, "not JSON"),
    "no such key": ("a.jsonl", b'{"text": "rome"}\n{"txt": "x"}\n', 2, "object with 'text'"),
    "not a text": ("a.jsonl", b'{"text": 3}\n{"text": "rome"}\n', 1, "got int"),
    "not UTF-8": ("a.txt", b"rome\nparis\n\xff\xfe\n", 3, "not UTF-8"),
    "empty line": ("a.txt", b"rome\n\nparis\n", 2, "got an empty one"),
    "too many cells": ("a.csv", b"text\nrome\nparis,x\n", 3, "expected 1 cells, got 2"),
    "bad cell": ("a.csv", b"text\nrome\n\xff\n", 3, "not UTF-8"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_reported_with_its_line_and_nothing_is_lost(name, folder, tmp_path, run):
    file, content, line, reason = BAD_ROWS[name]
    source, target = tmp_path / file, tmp_path / "out.npy"
    source.write_bytes(content)
    target.write_bytes(b"from before")
    code, _, err = run("embed", source, "-o", target, "--model", folder)
    assert code == 3 and f"line {line}: " in err.replace("\n", " ") and reason in err
    assert target.read_bytes() == b"from before"
    code, out, err = run("embed", source, "-o", target, "--model", folder, "--on-error", "skip")
    assert code == 0 and "1 bad rows left out" in out and f"line {line}: " in err.replace("\n", " ")
    assert len(np.load(target)) == content.count(b"\n") - (file.endswith("csv")) - 1


def test_unreadable_inputs_and_outputs(folder, tmp_path, run):
    text = tmp_path / "a.txt"
    text.write_text("rome\n")
    cases = [
        ((tmp_path / "none.txt", "-o", tmp_path / "o.npy"), 3, "No such file"),
        ((tmp_path / "a.pdf", "-o", tmp_path / "o.npy"), 3, ".jsonl, .parquet, got"),
        ((text, "-o", tmp_path / "o.txt"), 5, "expected an output of .parquet, .npy"),
        ((text, "-o", tmp_path / "none/o.npy"), 5, "expected an existing folder"),
        ((text,), 2, "output"),
        ((text, "-o", tmp_path / "o.npy", "--device", "tpu9"), 4, "expected a device"),
        ((text, "-o", tmp_path / "o.npy", "--dtype", "int3"), 4, "expected a dtype"),
        ((text, "-o", tmp_path / "o.npy", "--max-length", 99), 4, "from 3 to 40"),
    ]
    (tmp_path / "b.csv").write_text("title\nrome\n")
    cases.append(((tmp_path / "b.csv", "-o", tmp_path / "o.npy"), 3, "expected a column 'text'"))
    (tmp_path / "c.parquet").write_text("rome")
    cases.append(((tmp_path / "c.parquet", "-o", tmp_path / "o.npy"), 3, "a parquet file"))
    (tmp_path / "d.txt").write_text("")
    cases.append(((tmp_path / "d.txt", "-o", tmp_path / "o.npy"), 3, "at least one text"))
    for args, code, message in cases:
        found, out, err = run("embed", *args, "--model", folder)
        assert found == code and message in err + out, (args, found, err)
        assert "Traceback" not in err
    assert not (tmp_path / "o.npy").exists()


@pytest.mark.parametrize("output", ["o.npy", "o.parquet"])
def test_a_full_disk_leaves_everything_as_it_was(output, folder, tmp_path, run, monkeypatch):
    source = write_input(tmp_path / "a.txt", ".txt")
    target = tmp_path / output
    target.write_bytes(b"from before")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("fastbert.tasks.rows.os.fsync", full)
    code, _, err = run("embed", source, "-o", target, "--model", folder)
    assert code == 5 and "No space left on device" in err
    assert target.read_bytes() == b"from before"
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["a.txt", output])


@pytest.mark.skipif(not shutil.os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_disk_that_is_really_full(folder, tmp_path, run, monkeypatch):
    """Writes go to a device that has no room, as on a full disk."""
    source = write_input(tmp_path / "a.txt", ".txt")
    opened = Path("/dev/full").open
    monkeypatch.setattr("fastbert.tasks.rows.os.fdopen", lambda handle, mode: opened(mode))
    code, _, err = run("embed", source, "-o", tmp_path / "o.npy", "--model", folder)
    assert code == 5 and "No space left on device" in err
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_interrupting_leaves_nothing_behind(folder, tmp_path, run, monkeypatch):
    from fastbert.tasks.embed import Embedder

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    source = write_input(tmp_path / "a.txt", ".txt")
    monkeypatch.setattr(Embedder, "embed", interrupt)
    code, _, err = run("embed", source, "-o", tmp_path / "o.npy", "--model", folder)
    assert code == 130 and "interrupted" in err
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_models_that_cannot_be_used(folder, tmp_path, run):
    source = write_input(tmp_path / "a.txt", ".txt")

    def fails_with(model, message, *options):
        code, _, err = run("embed", source, "-o", tmp_path / "o.npy", "--model", model, *options)
        assert code == 4 and message in err, err

    fails_with(tmp_path / "nowhere", "which does not exist")
    fails_with(tmp_path, "with config.json")
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    weights = broken / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    fails_with(broken, "expected whole weights")
    model = fastbert.BertModel.from_pretrained(folder)
    state = model.state_dict()
    weights.unlink()
    fails_with(broken, "expected model.safetensors")
    torch.save(state, broken / "pytorch_model.bin")
    fails_with(broken, "pass --allow-pickle")
    code, _, err = run("embed", source, "-o", tmp_path / "p.npy", "--model", broken,
                       "--allow-pickle")  # fmt: skip
    assert code == 0, err
    del state["encoder.layer.1.output.dense.weight"]
    torch.save(state, broken / "pytorch_model.bin")
    fails_with(broken, "encoder.layer.1.output.dense.weight", "--allow-pickle")
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "model_type": "roberta"}))
    fails_with(broken, "'roberta'")
    (broken / "config.json").write_text(
        json.dumps({**config, "position_embedding_type": "relative_key"})
    )
    fails_with(broken, "'relative_key'", "--allow-pickle")
    (broken / "config.json").write_text("{")
    fails_with(broken, "expected JSON")


@pytest.fixture(scope="module")
def masked_lm(folder, tmp_path_factory):
    """A tiny masked LM that has learned four sentences by heart."""
    path = tmp_path_factory.mktemp("masked_lm")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
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


def test_fill_mask_finds_the_word(masked_lm, folder, run):
    text = "[MASK] is the capital of italy ."
    code, out, err = run("fill-mask", text, "--model", masked_lm, "--top-k", 2)
    assert code == 0, err
    first = next(line for line in out.splitlines() if "0." in line)
    assert "rome" in first and "rome is the capital" in out.replace("\n", " ")
    code, out, _ = run("fill-mask", "[MASK] is the [MASK] .", "--model", masked_lm)
    assert code == 0 and "[MASK] 2" in out
    code, _, err = run("fill-mask", "no mask", "--model", masked_lm)
    assert code == 3 and "expected [MASK] in the text" in err
    code, _, err = run("fill-mask", text, "--model", folder)  # an encoder without the head
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


def test_check_fails_when_results_are_wrong(run, monkeypatch):
    from fastbert import encoder

    right = encoder.ops.linear_add_norm
    monkeypatch.setattr(encoder.ops, "linear_add_norm", lambda *a, **k: 1.01 * right(*a, **k))
    code, out, _ = run("check")
    assert code == 1 and "failed" in out


def test_help_is_there_for_everything():
    for args in ([], ["embed"], ["fill-mask"], ["check"]):
        result = CliRunner().invoke(cli.app, [*args, "--help"])
        assert result.exit_code == 0 and "Usage" in result.output


@pytest.mark.slow
def test_demo_answers_and_agrees(tmp_path, capsys, monkeypatch, minilm_folder):
    from fastbert.demo import __main__ as demo
    from fastbert.demo import passages

    every = passages()
    assert len(every) >= 200
    monkeypatch.setattr(demo, "passages", lambda: every[::3])
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


def test_demo_fails_loudly_when_results_differ(monkeypatch, capsys, minilm_folder):
    from fastbert.demo import __main__ as demo

    few = demo.passages()[:8]
    monkeypatch.setattr(demo, "passages", lambda: few)
    monkeypatch.setattr(demo, "TOLERANCE", 0.0)
    assert demo.main(["--question", "x", "--rounds", "1"]) == 1
    assert "OVER" in capsys.readouterr().out
