"""``fastbert embed`` and the library behind it: every format, every option, every failure."""

import errno
import importlib.util
import json
import os
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from forked import COMMAND, forked

import fastbert
from fastbert.ops import onednn_int8
from fastbert.tasks.embed import Embedder, batches_by_tokens
from fastbert.tasks.embed_file import embed_file
from fastbert.tasks.errors import InputError, LoadError, TaskError
from fastbert.tasks.loading import load_sentence_transformer
from fastbert.tasks.reading import TextFile

pytest.importorskip("sentence_transformers")
# Importing sentence-transformers takes seconds; the readers are tested without it.
pytestmark = [pytest.mark.usefixtures("on_torch"), pytest.mark.slow]
CPU = torch.device("cpu")
TEXTS = ["paris is a city", "rome", "madrid is the capital of spain and a city"]


def write_input(path, kind):
    if kind == ".txt":
        path.write_text("\n".join(TEXTS))
    elif kind in (".csv", ".tsv"):
        comma = "," if kind == ".csv" else "\t"
        rows = "".join(f'{i}{comma}"{t}"\n' for i, t in enumerate(TEXTS))
        path.write_text(f"id{comma}text\n" + rows)
    elif kind == ".jsonl":
        path.write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    else:
        import pyarrow as pa
        import pyarrow.parquet

        pa.parquet.write_table(pa.table({"text": TEXTS}), path)
    return path


def read_output(path):
    """Lines, texts and vectors of a file that was written."""
    import gzip

    if path.suffix == ".npy":
        return None, None, np.load(path)
    if path.suffix == ".parquet":
        import pyarrow.parquet

        rows = pyarrow.parquet.read_table(path).to_pylist()
    else:
        import csv

        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rt", encoding="utf-8", newline="") as file:
            if ".csv" in path.suffixes:
                rows = [{**row, "line": int(row["line"]), "embedding": json.loads(row["embedding"])}
                        for row in csv.DictReader(file)]  # fmt: skip
            else:
                rows = [json.loads(line) for line in file]
    vectors = np.array([row["embedding"] for row in rows], dtype=np.float32)
    return [row["line"] for row in rows], [row["text"] for row in rows], vectors


@pytest.fixture(scope="module")
def expected(tiny_folder):
    """The mean of transformers' last hidden states, text by text."""
    model = transformers.BertModel.from_pretrained(tiny_folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_folder)
    with torch.no_grad():
        alone = [model(**tokenizer(text, return_tensors="pt"))[0][0].mean(0) for text in TEXTS]
    return torch.stack(alone).numpy()


OUTPUTS = (".npy", ".parquet", ".jsonl", ".csv", ".jsonl.gz", ".csv.gz")


@pytest.mark.parametrize("kind", [".txt", ".csv", ".tsv", ".jsonl", ".parquet"])
def test_embed_reads_every_format(kind, tiny_folder, expected, tmp_path, run):
    source, target = write_input(tmp_path / f"in{kind}", kind), tmp_path / "out.npy"
    code, out, err = run("embed", source, "-o", target, "--model", tiny_folder, "--batch-tokens", 9)
    assert code == 0, err
    assert "3 embeddings of size 32" in out
    assert "not a sentence-transformers model: mean pooling" in err
    assert np.abs(np.load(target) - expected).max() < 1e-5


@pytest.mark.parametrize("kind", OUTPUTS)
def test_embed_writes_every_format_to_the_last_bit(kind, tiny_folder, expected, tmp_path, run):
    text = '\u2028a "quoted"\r, text'
    source, target = tmp_path / "in.jsonl", tmp_path / f"out{kind}"
    lines = [json.dumps({"text": text}), "", *(json.dumps({"text": t}) for t in TEXTS)]
    source.write_text("\n".join(lines))
    options = ("--model", tiny_folder, "--on-error", "skip")
    code, _, err = run("embed", source, "-o", target, *options)
    assert code == 0, err
    line, texts, vectors = read_output(target)
    assert np.abs(vectors[1:] - expected).max() < 1e-5
    if line is not None:
        assert line == [1, 3, 4, 5] and texts == [text, *TEXTS]
    assert run("embed", source, "-o", tmp_path / "same.npy", *options)[0] == 0
    assert np.array_equal(vectors, np.load(tmp_path / "same.npy"))
    again = tmp_path / f"again{kind}"
    assert run("embed", source, "-o", again, *options)[0] == 0
    assert again.read_bytes() == target.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        {"in.jsonl", "same.npy", target.name, again.name}
    )


@pytest.mark.slow
def test_standard_input(tiny_folder, expected, tmp_path):
    target = tmp_path / "o.npy"
    arguments = ("embed", "-", "-o", target, "--model", tiny_folder)
    result = forked(COMMAND, *arguments, text="\n".join(TEXTS))
    assert result.returncode == 0, result.stderr
    assert "a text on every line (--format says otherwise)" in result.stderr
    assert np.abs(np.load(target) - expected).max() < 1e-5


# The readers' own cases are in test_reading.py.
BAD_ROWS = {
    "not JSON": ("a.jsonl", b'{"text": "rome"}\n{"text": \n', 2, "not JSON"),
    "not UTF-8": ("a.txt", b"rome\nparis\n\xff\xfe\n", 3, "not UTF-8"),
    "too many cells": ("a.csv", b"text\nrome\nparis,x\n", 3, "expected 1 cells, got 2"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_reported_with_its_line_and_nothing_is_lost(name, tiny_folder, tmp_path, run):
    file, content, line, reason = BAD_ROWS[name]
    source, target = tmp_path / file, tmp_path / "out.npy"
    source.write_bytes(content)
    target.write_bytes(b"from before")
    code, _, err = run("embed", source, "-o", target, "--model", tiny_folder)
    assert code == 3 and f"line {line}: " in err and reason in err
    assert target.read_bytes() == b"from before"
    code, out, err = run(
        "embed", source, "-o", target, "--model", tiny_folder, "--on-error", "skip"
    )
    assert code == 0 and "1 bad rows left out" in out and f"line {line}: " in err
    assert len(np.load(target)) == content.count(b"\n") - (file.endswith("csv")) - 1


def test_unreadable_inputs_and_outputs(tiny_folder, tmp_path, run):
    text = tmp_path / "a.txt"
    text.write_text("rome\n")
    (tmp_path / "b.csv").write_text("title\nrome\n")
    (tmp_path / "c.jsonl").write_text('{"text": "rome"}\n')
    (tmp_path / "folder.npy").mkdir()
    cases = [
        ((tmp_path / "none.txt", "-o", tmp_path / "o.npy"), 3, "No such file"),
        ((text, "-o", tmp_path / "o.txt"), 5, "expected an output of .npy, .parquet"),
        ((text, "-o", tmp_path / "none/o.npy"), 5, "expected an existing folder"),
        ((text, "-o", tmp_path / "folder.npy"), 5, "expected a file that can be written"),
        ((tmp_path / "c.jsonl", "-o", tmp_path / "c.jsonl"), 5, "another file than the input"),
        ((text,), 2, "output"),
        ((text, "-o", tmp_path / "o.npy", "--column", "text"), 3, "expected no column"),
        ((text, "-o", tmp_path / "o.npy", "--device", "tpu9"), 4, "expected a device"),
        ((text, "-o", tmp_path / "o.npy", "--dtype", "int3"), 4, "expected a dtype"),
        ((text, "-o", tmp_path / "o.npy", "--max-length", 99), 4, "from 3 to 40"),
        ((text, "-o", tmp_path / "o.npy", "--prompt-name", "ode"), 4, "got 'ode'"),
        ((tmp_path / "b.csv", "-o", tmp_path / "o.npy"), 3, "expected a column 'text'"),
        ((tmp_path / "b.csv", "-o", tmp_path / "o.npy", "--format", "jsonl"), 3, "not JSON"),
    ]
    before = sorted(tmp_path.iterdir())
    for args, code, message in cases:
        found, out, err = run("embed", *args, "--model", tiny_folder)
        assert found == code and message in err + out, (args, found, err)
        assert "Traceback" not in err
    assert sorted(tmp_path.iterdir()) == before and (tmp_path / "c.jsonl").read_text()


def test_options_reach_the_vectors(tiny_folder, tmp_path, run):
    source = write_input(tmp_path / "a.csv", ".csv")

    def embed(*options):
        code, _, err = run("embed", source, "-o", tmp_path / "o.npy", "--model", tiny_folder,
                           *options)  # fmt: skip
        assert code == 0, err
        return np.load(tmp_path / "o.npy")

    plain = embed()
    unit = embed("--normalize")
    assert np.allclose(unit, plain / np.linalg.norm(plain, axis=1, keepdims=True), atol=1e-6)
    assert np.array_equal(embed("--truncate-dim", 5), plain[:, :5])
    short = embed("--normalize", "--truncate-dim", 5)
    assert np.allclose(np.linalg.norm(short, axis=1), 1, atol=1e-6) and short.shape == (3, 5)
    prompted = embed("--prompt", "rome is ")
    source.write_text("text\n" + "".join(f"rome is {text}\n" for text in TEXTS))
    assert np.array_equal(prompted, embed())
    cut = embed("--max-length", 4)
    assert np.abs(cut - embed()).max() > 1e-3


def test_int8_is_asked_for_and_said_where_it_cannot_be(tiny_folder, tmp_path, run):
    if not onednn_int8.available():
        pytest.skip("needs torch's int8 products of oneDNN")
    source, output = write_input(tmp_path / "a.csv", ".csv"), tmp_path / "o.npy"

    def embed(*options):
        return run("embed", source, "-o", output, "--model", tiny_folder, *options)

    assert embed()[0] == 0
    exact = np.load(output)
    assert embed("--int8")[0] == 0
    found = np.load(output)
    norms = np.linalg.norm(found, axis=1) * np.linalg.norm(exact, axis=1)
    assert ((found * exact).sum(1) / norms).min() > 0.98 and np.abs(found - exact).max() > 1e-4
    code, _, err = embed("--int8", "--dtype", "bfloat16")
    assert code == 4 and "expected int8 of an accelerated model in float32 on a CPU" in err
    assert np.array_equal(np.load(output), found)
    with pytest.raises(LoadError, match="not accelerated"):
        Embedder.load(tiny_folder, device=CPU, int8=True, accelerated=False)
    model = load_sentence_transformer(tiny_folder, device=CPU, dtype=torch.float32)
    fastbert.accelerate(model, frozen="int8")
    assert Embedder(model).computes_in == "int8"  # whoever has asked for it
    if importlib.util.find_spec("triton"):
        with (
            fastbert.backend("triton"),
            pytest.raises(LoadError, match="plain weights for int8"),
        ):
            Embedder.load(tiny_folder, device=CPU, int8=True)


def embedder_of(folder, **options):
    return Embedder.load(folder, device=CPU, **options)


@pytest.mark.parametrize("prompt", [None, "rome is "])
def test_windows_of_long_texts(tiny_folder, prompt):
    """The mean of what their windows would give for themselves; short texts are as they were."""
    words = [f"word{i % 70}" for i in range(100)]
    texts = ["rome", " ".join(words), " ".join(words[:23])]
    options = {"max_length": 20, "prompt": prompt}
    whole = embedder_of(tiny_folder, windows=True, **options)
    found = whole.embed(texts, batch_tokens=64)
    room = 18 - 2 * (prompt is not None)
    for text, vector in zip(texts, found, strict=True):
        pieces, step = text.split(), room - 5
        starts = range(0, max(len(pieces) - room, 0) + step, step)
        windows = [" ".join(pieces[start : start + room]) for start in starts]
        assert windows[-1].split()[-1] == pieces[-1]
        cut = embedder_of(tiny_folder, **options).embed(windows)
        np.testing.assert_allclose(vector, cut.mean(0), atol=1e-5)
    np.testing.assert_allclose(*(np.concatenate(list(e.stream(texts, window=2)))[:1] for e in (
        whole, embedder_of(tiny_folder, **options))), atol=1e-6)  # fmt: skip
    unit = embedder_of(tiny_folder, windows=True, normalize=True, truncate_dim=9, **options)
    expected = found[:, :9] / np.linalg.norm(found[:, :9], axis=1, keepdims=True)
    np.testing.assert_allclose(unit.embed(texts), expected, atol=1e-6)


def test_every_part_of_a_long_text_counts(tiny_folder):
    words = ["rome"] * 20_000
    embedder = embedder_of(tiny_folder, windows=True)
    before = embedder.embed([" ".join(words)])
    for place in (0, 10_000, 19_999):
        other = " ".join([*words[:place], "paris", *words[place + 1 :]])
        assert np.abs(embedder.embed([other]) - before).max() > 1e-6, place


def test_windows_of_a_model_with_unit_vectors(minilm_folder):
    """The mean has length 1 too; without room beside the prompt nothing is done."""
    text = " ".join(f"The {i}. year of the war was worse than the others." for i in range(40))
    vectors = embedder_of(minilm_folder, windows=True, max_length=64).embed([text, "A word."])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    with pytest.raises(LoadError, match=r"room for more than 4 tokens beside the prompt, got 2"):
        embedder_of(minilm_folder, windows=True, max_length=16, prompt="a " * 12)


@pytest.mark.parametrize("output", ["o.npy", "o.parquet", "o.jsonl"])
def test_a_full_disk_leaves_everything_as_it_was(output, tiny_folder, tmp_path, run, monkeypatch):
    source = write_input(tmp_path / "a.txt", ".txt")
    target = tmp_path / output
    target.write_bytes(b"from before")
    real, calls = os.fsync, []

    def fills_at(number):
        def fsync(descriptor):
            calls.append(descriptor)
            if len(calls) == number:
                raise OSError(errno.ENOSPC, "No space left on device")
            real(descriptor)

        return fsync

    for number in range(1, 5 if output == "o.npy" else 6):
        calls.clear()
        monkeypatch.setattr("fastbert.tasks.writing.os.fsync", fills_at(number))
        code, _, err = run("embed", source, "-o", target, "--model", tiny_folder)
        if number <= (3 if output == "o.npy" else 4):
            assert code == 5 and "No space left on device; nothing was left behind" in err, number
            assert target.read_bytes() == b"from before"
        else:
            assert code == 0
        assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["a.txt", output])


def test_a_disk_that_really_takes_no_more(tiny_folder, tmp_path, run):
    """The kernel refuses the write, here since files may not grow beyond 8 kB."""
    source, target = tmp_path / "a.txt", tmp_path / "o.npy"
    source.write_text("rome\n" * 2000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        code, _, err = run("embed", source, "-o", target, "--model", tiny_folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 5 and "File too large; nothing was left behind" in err
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(tiny_folder, tmp_path, run):
    source = write_input(tmp_path / "a.txt", ".txt")
    (tmp_path / "locked").mkdir(mode=0o500)
    code, _, err = run("embed", source, "-o", tmp_path / "locked/o.npy", "--model", tiny_folder)
    assert code == 5 and "can be written" in err


def test_an_input_that_changes_meanwhile_is_noticed(tiny_folder, tmp_path, monkeypatch):
    source, target = write_input(tmp_path / "a.txt", ".txt"), tmp_path / "o.npy"
    embedder = embedder_of(tiny_folder)
    encode = embedder._encode

    def changing(features):
        source.write_text(source.read_text() + "\nmore")
        return encode(features)

    monkeypatch.setattr(embedder, "_encode", changing)
    with pytest.raises(InputError, match="got another file while it was read"):
        embed_file(TextFile(source), target, embedder)
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_vectors_that_are_not_finite_are_refused(tiny_folder, tmp_path):
    source, target = write_input(tmp_path / "a.txt", ".txt"), tmp_path / "o.npy"
    embedder = embedder_of(tiny_folder)
    with torch.no_grad():
        word = embedder.model.tokenizer.convert_tokens_to_ids("rome")
        embedder.model[0].model.embeddings.word_embeddings.weight[word] = torch.nan
    with pytest.raises(TaskError, match="got 1 that are not, the first for text 2"):
        embed_file(TextFile(source), target, embedder)
    assert not target.exists()


def test_streaming_is_embedding(tiny_folder):
    embedder = embedder_of(tiny_folder)
    texts = [text for text in TEXTS for _ in range(9)]
    whole = embedder.embed(texts)
    assert whole.shape == (27, embedder.size) and embedder.embed([]).shape == (0, embedder.size)
    for window in (1, 7, 27, 100):
        parts = list(embedder.stream(iter(texts), batch_tokens=20, window=window))
        assert np.abs(np.concatenate(parts) - whole).max() < 1e-5
        assert [len(part) for part in parts[:-1]] == [window] * (len(parts) - 1)
    assert list(embedder.stream(iter([]))) == []


def test_a_failure_while_reading_ahead_is_raised(tiny_folder):
    def texts():
        yield from TEXTS
        raise InputError("expected more")

    stream = embedder_of(tiny_folder).stream(texts(), window=2)
    assert len(next(stream)) == 2
    with pytest.raises(InputError, match="expected more"):
        list(stream)


def test_batches_hold_at_most_the_budget():
    lengths = [3, 50, 1, 8, 9, 9, 2]
    batches = list(batches_by_tokens(lengths, 18))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in batch) <= 18 or len(batch) == 1 for batch in batches)
    assert len(batches) == 3


def test_the_folder_of_a_path_may_be_relative(tiny_folder, tmp_path, run, monkeypatch):
    write_input(tmp_path / "a.txt", ".txt")
    monkeypatch.chdir(tmp_path)
    code, _, err = run("embed", "a.txt", "-o", "o.npy", "--model", tiny_folder)
    assert code == 0 and Path("o.npy").exists(), err
