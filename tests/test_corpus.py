"""Texts to documents, tokens, sentences and examples: nothing lost, nothing twice."""

import gzip
import json

import numpy as np
import pytest
import transformers
from scipy import stats
from tiny import one_is_quick

from fastbert.tasks.errors import InputError, LoadError
from fastbert.training import corpus as corpus_module
from fastbert.training.corpus import Corpus, files_of
from fastbert.training.segments import Drawn, SegmentDataset, draw

WORDS = ("paris", "is", "the", "capital", "of", "france", "rome", "italy", "madrid", "spain")


@pytest.fixture(scope="module")
def tokenizer(tiny_folder):
    return transformers.AutoTokenizer.from_pretrained(tiny_folder)


@pytest.fixture
def prepare(tokenizer, tmp_path):
    def call(*files, **options):
        return Corpus.prepare(files, tokenizer, cache_dir=tmp_path / "cache", **options)

    return call


def texts_of(corpus, tokenizer):
    bounds = zip(corpus.starts, corpus.starts[1:], strict=False)
    return [tokenizer.decode(corpus.tokens(a, b)) for a, b in bounds]


def made_up(documents=60, seed=0, sentences=(1, 30), words=(1, 20)):
    """Documents of sentences of words, each document a list of sentences."""
    random = np.random.default_rng(seed)
    return [
        [
            " ".join(random.choice(WORDS, random.integers(*words))) + "."
            for _ in range(random.integers(*sentences))
        ]
        for _ in range(documents)
    ]


def written(path, documents):
    path.write_text("\n\n".join("\n".join(sentences) for sentences in documents))
    return path


def test_documents_of_every_kind_of_file(prepare, tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("\n \nparis is. the capital\nof france.\n\n\n\nrome.\n")
    with gzip.open(tmp_path / "b.txt.gz", "wt") as file:
        file.write("madrid\r\n\r\nspain")
    rows = [{"body": "italy is the capital."}, {"body": "   "}, {"body": "of spain"}]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, rows)))
    corpus = prepare(tmp_path / "a.txt", tmp_path / "b.txt.gz", tmp_path / "c.jsonl", column="body")
    assert texts_of(corpus, tokenizer) == [
        "paris is. the capital of france.", "rome.", "madrid", "spain", "italy is the capital.",
        "of spain",
    ]  # fmt: skip
    assert corpus.num_documents == 6 and corpus.num_tokens == corpus.starts[-1]
    assert corpus.sentences[corpus.first[0] : corpus.first[1] + 1].tolist() == [0, 3, 8]
    assert not corpus.bad and corpus.num_bad == 0


def test_bad_lines_are_named_and_cost_themselves(prepare, tokenizer, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"paris\nr\xffme\nis.\n\nitaly\n")
    corpus = prepare(tmp_path / "a.txt")
    assert texts_of(corpus, tokenizer) == ["paris is.", "italy"]
    assert corpus.num_bad == 1 and "a.txt, line 2: not UTF-8 (byte 0xff" in corpus.bad[0]


def test_tokenised_once(prepare, tokenizer, tmp_path, monkeypatch):
    path = written(tmp_path / "a.txt", made_up())
    first = prepare(path)
    monkeypatch.setattr(corpus_module, "documents", lambda file: pytest.fail("read again"))
    again = prepare(path)
    assert again.digest == first.digest and (again.sentences == first.sentences).all()
    moved = path.rename(tmp_path / "moved.txt")
    assert prepare(moved).digest == first.digest, "it goes by content"
    moved.write_text(moved.read_text() + "\n\nrome")
    with pytest.raises(BaseException, match="read again"):
        prepare(moved)
    monkeypatch.undo()
    assert prepare(moved).num_documents == first.num_documents + 1
    digests = {prepare(moved).digest, prepare(moved, language="de").digest}
    (tmp_path / "vocab.txt").write_text("\n".join([*tokenizer.get_vocab(), "more"]))
    other = transformers.BertTokenizer(vocab=str(tmp_path / "vocab.txt"))
    digests.add(Corpus.prepare([moved], other, cache_dir=tmp_path / "cache").digest)
    assert len(digests) == 3


def test_tokens_stay_on_the_disk(prepare, tmp_path):
    corpus = prepare(written(tmp_path / "a.txt", made_up()))
    assert not any(part.flags.owndata or part.flags.writeable for part in corpus._parts)


def test_files_of_folders_and_globs(tmp_path):
    for name in ("b/2.txt", "b/c/1.jsonl.gz", "a.parquet", "b/x.pdf", "README"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    names = [p.relative_to(tmp_path).as_posix() for p in files_of([tmp_path])]
    assert names == ["a.parquet", "b/2.txt", "b/c/1.jsonl.gz"]
    assert files_of([tmp_path / "b" / "*.txt", tmp_path / "b"])[0].name == "2.txt"
    assert len(files_of([tmp_path / "b/2.txt", tmp_path / "b"])) == 2, "each once"
    for nothing in (tmp_path / "gone.txt", tmp_path / "b" / "*.csv", tmp_path / "no" / "*.txt"):
        with pytest.raises(InputError, match="got none; name files, folders or a glob"):
            files_of([nothing])


def test_nothing_to_read(prepare, tmp_path):
    (tmp_path / "a.txt").write_text("\n\n")
    with pytest.raises(InputError, match=r"a document or more in '.*a.txt', got none"):
        prepare(tmp_path / "a.txt")
    (tmp_path / "b.pdf").write_text("text")
    with pytest.raises(InputError, match=r"expected a file of \.txt"):
        prepare(tmp_path / "b.pdf")
    with pytest.raises(InputError, match="utf-16"):
        (tmp_path / "c.txt").write_text("text", "utf-16")
        prepare(tmp_path / "c.txt")


def test_what_is_not_installed(prepare, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sentencex", None)
    with pytest.raises(LoadError, match=r"pip install 'fastbert-triton\[train\]'"):
        prepare(written(tmp_path / "a.txt", [["rome"]]))


def test_split_by_document(prepare, tmp_path):
    corpus = prepare(written(tmp_path / "a.txt", made_up(documents=50)))
    train, held = corpus.split(0.1, seed=1)
    assert len(held) == 5 and sorted([*train, *held]) == list(range(50))
    assert (corpus.split(0.1, seed=2)[1] != held).any() and (corpus.split(0.1, 1)[1] == held).all()
    assert len(corpus.split(0.0)[1]) == 0 and len(corpus.split(0.001)[1]) == 2
    alone = prepare(written(tmp_path / "b.txt", [["rome"]]))
    assert [len(part) for part in alone.split(0.5)] == [1, 0]


@pytest.fixture(scope="module")
def corpus(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    long = [["word1 " * 500 + "."]]  # a sentence longer than any example
    path = written(folder / "a.txt", made_up(documents=300, sentences=(1, 40)) + long)
    return Corpus.prepare([path], tokenizer, cache_dir=folder / "cache")


def covered(spans, total):
    """How often each token is in one of the spans."""
    change = np.zeros(total + 1, np.int64)
    np.add.at(change, spans[:, 0], 1)
    np.add.at(change, spans[:, 1], -1)
    return np.cumsum(change)[:-1]


@pytest.mark.parametrize("max_length", one_is_quick([64, 5, 16, 512]))
@pytest.mark.parametrize("pairs", [True, False], ids=["pairs", "single"])
def test_every_token_once_in_an_epoch(corpus, pairs, max_length):
    everything = np.arange(corpus.num_documents)
    drawn = draw(corpus, everything, max_length=max_length, pairs=pairs, epoch=2)
    own = drawn.a if not pairs else np.concatenate([drawn.a, drawn.b[drawn.random == 0]])
    assert (covered(own, corpus.num_tokens) == 1).all()
    assert drawn.lengths.max() <= max_length and (drawn.a[:, 1] > drawn.a[:, 0]).all()
    assert drawn.lengths.max() > max_length - 21  # the longest sentence but one
    if pairs:
        assert (drawn.b[:, 1] > drawn.b[:, 0]).all()
        follows = drawn.random == 0
        assert (drawn.a[follows, 1] == drawn.b[follows, 0]).all()
        of_a, of_b = (np.searchsorted(corpus.starts, x[:, 0], "right") for x in (drawn.a, drawn.b))
        assert (of_a[follows] == of_b[follows]).all() and (of_a[~follows] != of_b[~follows]).all()
        of_end = np.searchsorted(corpus.starts, drawn.b[:, 1] - 1, "right")
        assert (of_end == of_b).all()
    else:
        assert not drawn.b.any() and not drawn.random.any()


def test_half_of_the_pairs_are_wrong_and_a_tenth_are_short(prepare, tmp_path):
    corpus = prepare(written(tmp_path / "a.txt", made_up(documents=40, sentences=(200, 201))))
    drawn = draw(corpus, np.arange(40), max_length=128)
    count = len(drawn)
    assert count > 1000
    assert stats.binomtest(int(drawn.random.sum()), count, 0.5).pvalue > 1e-6
    short = (drawn.lengths < 96).sum()  # most of those that were meant to be short
    assert 0.04 < short / count < 0.12
    others = np.searchsorted(corpus.starts, drawn.b[drawn.random == 1, 0], "right") - 1
    assert len(set(others)) == 40, "any other document may follow"


def test_lengths_do_not_give_the_answer_away(prepare, tmp_path):
    """Nor where segments end: who can tell right from wrong by that learns nothing else."""
    words = {"documents": 80, "sentences": (20, 120), "words": (1, 40)}
    corpus = prepare(written(tmp_path / "a.txt", made_up(**words)))
    for max_length in (64, 128):
        drawn = draw(corpus, np.arange(80), max_length=max_length)
        wrong, sizes = drawn.random == 1, drawn.b[:, 1] - drawn.b[:, 0]
        for lengths in (drawn.lengths, sizes, drawn.a[:, 1] - drawn.a[:, 0]):
            pairs = wrong.sum() * (~wrong).sum()
            above = stats.mannwhitneyu(lengths[wrong], lengths[~wrong]).statistic / pairs
            assert abs(above - 0.5) < 0.06, max_length
        whole = np.isin(drawn.b[:, 1], corpus.sentences)
        assert abs(whole[wrong].mean() - whole[~wrong].mean()) < 0.06


def test_epochs_differ_and_an_epoch_is_always_the_same(corpus):
    everything = np.arange(corpus.num_documents)
    first, same, other, seed = (
        draw(corpus, everything, max_length=64, epoch=e, seed=s)
        for e, s in ((0, 0), (0, 0), (1, 0), (0, 1))
    )
    for name in ("a", "b", "random"):
        assert (getattr(first, name) == getattr(same, name)).all()
    assert first.a.tolist() != other.a.tolist() and first.a.tolist() != seed.a.tolist()


def test_only_the_documents_that_are_named(corpus):
    train, held = corpus.split(0.2)
    for mine, theirs in ((train, held), (held, train)):
        drawn = draw(corpus, mine, max_length=64)
        seen = np.concatenate([drawn.a, drawn.b])
        of = np.searchsorted(corpus.starts, seen[:, 0], "right") - 1
        assert set(of) == set(mine) and not set(of) & set(theirs)


def test_what_cannot_be_drawn(corpus):
    with pytest.raises(InputError, match=r"two documents or more .* got 1.*blank line"):
        draw(corpus, np.array([3]), max_length=64)
    assert len(draw(corpus, np.array([3]), max_length=64, pairs=False))
    with pytest.raises(ValueError, match="max_length of 5 or more, got 4"):
        draw(corpus, np.arange(9), max_length=4)


@pytest.mark.parametrize("pairs", [True, False], ids=["pairs", "single"])
def test_examples(corpus, tokenizer, pairs):
    drawn = draw(corpus, np.arange(9), max_length=32, pairs=pairs)
    dataset = SegmentDataset(corpus, tokenizer, pairs=pairs)
    for index in range(len(drawn)):
        a, b = tuple(drawn.a[index]), tuple(drawn.b[index])
        example = dataset[Drawn(1, index, a, b, int(drawn.random[index]), 0.2)]
        ids, kinds = example["input_ids"], example["token_type_ids"]
        first = [2, *corpus.tokens(*a), 3]
        second = [*corpus.tokens(*b), 3] if pairs else []
        assert ids.tolist() == first + second and len(ids) == drawn.lengths[index]
        assert kinds.tolist() == [0] * len(first) + [1] * len(second)
        assert (example["epoch"], example["example"], example["probability"]) == (1, index, 0.2)
        assert example.get("next_sentence_label") == (drawn.random[index] if pairs else None)
