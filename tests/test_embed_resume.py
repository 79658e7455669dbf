"""A run of ``fastbert embed`` that ends at any moment: what is left, how the next goes on."""

import json
import random
import shutil
import signal

import numpy as np
import pytest
import torch
from interrupted import run

from fastbert.ops import onednn_int8
from fastbert.tasks.embed import Embedder
from fastbert.tasks.embed_file import embed_file
from fastbert.tasks.errors import OutputError
from fastbert.tasks.reading import TextFile
from fastbert.tasks.writing import VectorFile

pytest.importorskip("sentence_transformers")
pytestmark = [pytest.mark.usefixtures("on_torch"), pytest.mark.slow]
ROWS, WINDOW = 60, 10
CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGKILL: -9}


@pytest.fixture
def texts(tmp_path):
    random.seed(0)
    words = ["paris", "rome", "is", "a", "city"]
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(" ".join(random.choices(words, k=random.randint(1, 9)))
                              for _ in range(ROWS)))  # fmt: skip
    return path


def moments_of(log):
    return [line.rsplit(" ", 1) for line in log.read_text().splitlines()]


def encoded(log):
    return sum(int(number) for what, number in moments_of(log) if what == "encode")


@pytest.mark.parametrize("kind", ["npy", "parquet"])
def test_ended_at_any_moment_and_resumed(kind, texts, tiny_folder, tmp_path):
    """At every moment of a window and of the end of a run: the next run ends as the first would
    have, does not encode again what had been counted as done, and nothing else is left."""
    base = ["embed", texts, "--model", tiny_folder, "--batch-tokens", 40, "--resume", "-o"]
    whole, log = tmp_path / f"whole.{kind}", tmp_path / "log"
    assert run([*base, whole], window=WINDOW, log=log) == 0
    expected, moments = whole.read_bytes(), moments_of(log)
    assert encoded(log) == ROWS + 1  # one text finds out the size
    placed = [at for at, (what, _) in enumerate(moments) if what == "in place"]
    third, end = range(placed[2] + 1, placed[3] + 2), range(placed[-2] + 1, placed[-1] + 1)
    assert len(third) > 3 and len(end) > (kind == "parquet")
    cases = [(signal.SIGKILL, at) for at in (0, *(third if kind == "npy" else ()), *end)]
    cases += [(number, at) for number in (signal.SIGTERM, signal.SIGINT) for at in third[::2]]
    for number, at in cases if kind == "npy" else cases[: 1 + len(end)]:
        folder = tmp_path / f"{number}-{at}"
        folder.mkdir()
        target, log = folder / f"out.{kind}", folder / "log"
        code = run([*base, target], window=WINDOW, number=number, log=log, at=at)
        assert code == CODES[number], (code, number, at)
        assert not target.exists()
        assert run([*base, target], window=WINDOW, log=log) == 0, (number, at)
        assert target.read_bytes() == expected
        assert sorted(p.name for p in folder.iterdir()) == ["log", target.name]
        assert encoded(log) <= ROWS + 2 + WINDOW, (number, at)


@pytest.mark.parametrize("end", CODES)
def test_without_resume_nothing_is_left_or_used(end, texts, tiny_folder, tmp_path):
    base = ["embed", texts, "--model", tiny_folder, "--batch-tokens", 40, "-o"]
    target, log = tmp_path / "out.npy", tmp_path / "log"
    target.write_bytes(b"from before")
    assert run([*base, target], window=WINDOW, number=end, log=log, at=20) == CODES[end]
    left = sorted(p.name for p in tmp_path.iterdir())
    assert target.read_bytes() == b"from before"
    if end == signal.SIGKILL:  # nobody could clean up; the next run does
        assert ".out.npy.partial" in left
    else:
        assert left == ["log", "out.npy", "texts.txt"]
    log.unlink()
    assert run([*base, target], window=WINDOW, log=log) == 0
    assert encoded(log) == ROWS + 1
    assert np.load(target).shape == (ROWS, 32)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log", "out.npy", "texts.txt"]


def unfinished(texts, target, embedder, **options):
    """Leave a run after its first window."""
    done = []

    def stop(now, total):
        done.append(now)
        if now:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed_file(TextFile(texts), target, embedder, resume=True, progress=stop, **options)
    return done


def test_another_run_is_refused_with_the_difference(texts, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("fastbert.tasks.embed_file.WINDOW", WINDOW)
    device = torch.device("cpu")
    target = tmp_path / "out.npy"
    embedder = Embedder.load(tiny_folder, device=device)
    assert unfinished(texts, target, embedder, batch_tokens=40) == [0, WINDOW]

    def refused(match, embedder=embedder, file=texts, **options):
        options = {"batch_tokens": 40, **options}
        with pytest.raises(OutputError, match=match):
            embed_file(TextFile(file), target, embedder, resume=True, **options)
        left = json.loads((tmp_path / ".out.npy.partial/run.json").read_text())
        assert left["done"] == WINDOW

    refused("batch_tokens was 40 and is 41", batch_tokens=41)
    refused("max_length was 40 and is 9", Embedder.load(tiny_folder, device=device, max_length=9))
    refused("prompt was None and is 'x'", Embedder.load(tiny_folder, device=device, prompt="x"))
    refused("windows was False", Embedder.load(tiny_folder, device=device, windows=True))
    refused("normalize was False", Embedder.load(tiny_folder, device=device, normalize=True))
    if onednn_int8.available():
        in_int8 = Embedder.load(tiny_folder, device=device, int8=True)
        refused("dtype was 'torch.float32' and is 'int8'", in_int8)
    other = tmp_path / "other.txt"
    other.write_text(texts.read_text() + "\nmore")
    refused(rf"input was .* and is '{other} .*; rows was {ROWS} and is {ROWS + 1}", file=other)
    shutil.copyfile(other, texts)  # the same name, with other content
    refused("input was ")
    other.write_text(other.read_text()[: -len("\nmore")])
    shutil.copyfile(other, texts)
    with torch.no_grad():
        embedder.model[0].model.embeddings.word_embeddings.weight[7, 3] += 1e-3
    refused("model was ")
    with torch.no_grad():
        embedder.model[0].model.embeddings.word_embeddings.weight[7, 3] -= 1e-3
    fresh = Embedder.load(tiny_folder, device=device)
    done = embed_file(TextFile(texts), target, fresh, resume=True, batch_tokens=40)
    assert (done.num_rows, done.resumed) == (ROWS, WINDOW)


def test_a_run_without_resume_says_what_it_did_not_use(texts, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("fastbert.tasks.embed_file.WINDOW", WINDOW)
    embedder = Embedder.load(tiny_folder, device=torch.device("cpu"))
    target = tmp_path / "out.npy"
    unfinished(texts, target, embedder)
    done = embed_file(TextFile(texts), target, embedder)
    assert (done.resumed, done.discarded) == (0, WINDOW)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.npy", "texts.txt"]


def vector_file(target, **options):
    return VectorFile(target, {"a": 1}, num_rows=4, size=3, **{"resume": True, **options})


def test_two_runs_do_not_write_the_same_file(tmp_path):
    target = tmp_path / "out.npy"
    with vector_file(target, resume=False) as first:
        for resume in (False, True):
            with (
                pytest.raises(OutputError, match="another process that does so now"),
                vector_file(target, resume=resume),
            ):
                pass
        first.append(np.ones((4, 3)))
        first.finish([])
    assert np.array_equal(np.load(target), np.ones((4, 3)))


def test_vectors_that_are_not_counted_are_not_used(tmp_path):
    """Written, but the process ended before it could count them."""
    target = tmp_path / "out.npy"
    with vector_file(target) as file:
        file.append(np.full((2, 3), 1.0))
    with (tmp_path / ".out.npy.partial/vectors.npy").open("ab") as left:
        left.write(b"half a vec")
    with vector_file(target) as file:
        assert file.done == 2
        file.append(np.full((2, 3), 2.0))
        file.finish([])
    assert np.load(target).tolist() == [[1.0] * 3] * 2 + [[2.0] * 3] * 2


def test_fewer_vectors_than_were_counted_are_refused(tmp_path):
    target = tmp_path / "out.npy"
    with vector_file(target) as file:
        file.append(np.ones((2, 3)))
    with (tmp_path / ".out.npy.partial/vectors.npy").open("r+b") as left:
        left.truncate(140)
    with pytest.raises(OutputError, match="expected 2 vectors"), vector_file(target):
        pass
    assert (tmp_path / ".out.npy.partial").is_dir()
    with vector_file(target, resume=False) as file:
        assert file.done == 0
    assert not (tmp_path / ".out.npy.partial").exists()
