"""CUDA graphs give what the layers give, for every batch that fits a bucket, and are never stale.

Without a GPU a stand-in records a function and calls it again at every replay, over the memory of
the bucket; what is tested then is all but the capture itself.
"""

import contextlib
import copy
import itertools
import pickle
import random
import threading

import pytest
import torch
from tiny import tiny_config

import fastbert
from fastbert import graphs
from fastbert.graphs import Bucket, CudaGraphs, bucket_of
from fastbert.packing import PackedBatch

pytest.importorskip("triton", reason="needs triton")


class Recorder:
    """As `fastbert.graphs._Recorder`, without a GPU: a replay is a call."""

    captures = 0

    def __init__(self, device):
        self.running = threading.Lock()

    def capture(self, function):
        Recorder.captures += 1
        out = function().clone()
        return (lambda: out.copy_(function())), out

    @contextlib.contextmanager
    def turn(self):
        assert self.running.acquire(blocking=False), "two replays at once"
        yield
        self.running.release()

    def close(self):
        pass


@pytest.fixture(autouse=True)
def _stand_in(device, monkeypatch):
    Recorder.captures = 0
    if device == "cpu":
        monkeypatch.setattr(graphs, "_Recorder", Recorder)
        monkeypatch.setattr(graphs, "_on_gpu", lambda rows: True)


def model_on(device, dtype=torch.float32, **options):
    torch.manual_seed(0)
    config = tiny_config(max_position_embeddings=160)
    model = fastbert.BertModel(config, cuda_graphs=True, **options)
    return model.to(device, dtype).eval()


def batch_of(lengths, device, width=None):
    width = width or max(lengths)
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(5, 90, mask.shape) * mask
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def without_graphs(model, inputs):
    kept, model.graphs = model.graphs, None
    try:
        return model(**inputs).last_hidden_state
    finally:
        model.graphs = kept


def same(model, inputs):
    # a library may take another way to multiply more rows
    expected = without_graphs(model, inputs)
    torch.testing.assert_close(model(**inputs).last_hidden_state, expected, atol=2e-5, rtol=1e-5)


# ---- buckets ----


def test_every_batch_has_a_small_bucket_that_holds_it():
    for n in (*range(1, 300), 511, 513, 1000, 2047, 2048, 2049, 5000, 32768):
        tokens = bucket_of(PackedBatch.from_lengths([n])).tokens
        assert n <= tokens and tokens % 16 == 0
        assert tokens <= max(16, n + 15 if n <= 64 else 1.5 * n)
        if n > 2048:
            assert tokens <= 1.25 * n
    ladder = {bucket_of(PackedBatch.from_lengths([n])).tokens for n in range(1, 32769)}
    assert len(ladder) < 80


def test_the_longest_sequence_decides_by_the_body_of_the_kernel_alone():
    """What a bucket has as its longest sequence chooses the tile of the batches in it."""
    from fastbert.kernels._tiles import ARCHITECTURES, attention_tile

    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    for arch, dtype, head in itertools.product(ARCHITECTURES, dtypes, (16, 32, 64, 128)):
        for n in (1, 31, 32, 33, 64, 65, 128, 129, 256, 300, 512, 8192):
            longest = bucket_of(PackedBatch.from_lengths([n])).longest
            own, bucket = (
                attention_tile(
                    head_dim=head, dtype=dtype, arch=arch, max_seqlen_q=s, max_seqlen_k=s
                )
                for s in (n, longest)
            )
            assert own == bucket, (n, longest)
    assert bucket_of(PackedBatch.from_lengths([3, 0, 7])) == Bucket(16, 4, 32)


def test_classes_of_shorter_sequences_are_launched_only_where_there_are_any():
    buckets = {lengths: bucket_of(PackedBatch.from_lengths(lengths)) for lengths in (
        (70,), (70, 0, 128), (70, 3), (300, 129), (300, 3), (3, 31), (64, 1),
    )}  # fmt: skip
    assert [b.lengths for b in buckets.values()] == [
        (128,), (128,), (32, 64, 128), (256,), (32, 64, 128, 256), (32,), (32, 64),
    ]  # fmt: skip


# ---- results ----


@pytest.mark.slow
@torch.inference_mode()
def test_ragged_batches_of_one_bucket_share_a_graph_and_are_right(device):
    model = model_on(device)
    draw = random.Random(0)
    for _ in range(16):
        lengths = [draw.randint(1, 30) for _ in range(draw.choice([3, 4]))]
        same(model, batch_of(lengths, device, width=31))
    assert len(model.graphs.buckets) <= 6
    assert all(b.sequences == 4 and b.longest == 32 for b in model.graphs.buckets)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.inference_mode()
def test_sequences_of_several_lengths_share_a_graph_whichever_lengths_there_are(dtype, device):
    """Their attention is launched by classes of lengths, each over tiles of its own."""
    model = model_on(device, dtype)
    fewer = ([70, 40, 30], [70, 3, 66])  # sequences of the second class, by the same graph
    for lengths in ([70, 3], [40, 66], [66, 33], [3, 128], [65, 65], [135, 3], [3, 140], *fewer):
        inputs = batch_of(lengths, device, width=140)
        expected = without_graphs(model, inputs)
        atol = 2e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(model(**inputs).last_hidden_state, expected, atol=atol, rtol=0)
    assert {(b.longest, b.mixed) for b in model.graphs.buckets} == {
        (128, True), (128, False), (256, True),
    }  # fmt: skip


@pytest.mark.slow
@torch.no_grad()
def test_full_buckets_empty_sequences_and_batches_without_a_mask(device):
    model = model_on(device)
    for lengths in ([16], [8, 8], [1], [4, 0, 4, 0], [12, 4], [16], [1, 1, 1, 13]):
        same(model, batch_of(lengths, device))
    ids = torch.randint(5, 90, (2, 8), device=device)
    same(model, {"input_ids": ids})
    assert {b.tokens for b in model.graphs.buckets} == {16}
    assert {b.sequences for b in model.graphs.buckets} == {1, 2, 4}


@pytest.mark.slow
@torch.no_grad()
def test_long_sequences_walk_over_keys(device):
    model = model_on(device)
    same(model, batch_of([140, 3], device))
    same(model, batch_of([129, 20], device))
    assert [b.longest for b in model.graphs.buckets] == [256]


@torch.no_grad()
def test_results_belong_to_the_caller(device):
    model = model_on(device)
    first = model(**batch_of([9], device)).last_hidden_state
    kept = first.clone()
    model(**batch_of([9], device))
    assert torch.equal(first, kept)


@torch.no_grad()
def test_what_the_last_batch_left_in_the_bucket_reaches_nobody(device):
    model = model_on(device)
    small = batch_of([3], device)
    expected = model(**small).last_hidden_state
    model.embeddings.word_embeddings.weight[7] = float("nan")
    poison = torch.full((1, 16), 7, device=device)
    assert model(input_ids=poison).last_hidden_state.isnan().all()
    assert len(model.graphs.buckets) == 1, "another bucket shows nothing"
    assert torch.equal(model(**small).last_hidden_state, expected)


# ---- never stale ----


@pytest.mark.slow
@torch.no_grad()
def test_weights_changed_in_place_are_seen_and_replaced_ones_captured_anew(device):
    model = model_on(device)
    inputs = batch_of([5, 9], device)
    same(model, inputs)
    layer = model.encoder.layer[0]
    layer.output.dense.weight.mul_(2)
    same(model, inputs)
    assert len(model.graphs.buckets) == 1
    made_for = model.graphs._made_for
    for change in (
        lambda: setattr(layer.output.dense, "bias", torch.nn.Parameter(torch.randn_like(
            layer.output.dense.bias))),
        lambda: setattr(layer.output.dense.weight, "data", layer.output.dense.weight * 3),
        lambda: model.load_state_dict({k: v * 1.5 for k, v in model.state_dict().items()
                                       if v.is_floating_point()}, strict=False, assign=True),
        lambda: setattr(layer.attention.self, "scaling", 0.5),
        lambda: setattr(layer.output.LayerNorm, "eps", 1e-2),
        lambda: setattr(layer.intermediate, "intermediate_act_fn", torch.nn.ReLU()),
    ):  # fmt: skip
        change()
        same(model, inputs)
        assert model.graphs._made_for != made_for, "nothing was captured anew"
        made_for = model.graphs._made_for


@torch.no_grad()
def test_another_dtype_is_captured_anew(device):
    model = model_on(device)
    inputs = batch_of([5, 9], device)
    same(model, inputs)
    model.bfloat16()
    out = model(**inputs).last_hidden_state
    assert out.dtype == torch.bfloat16
    expected = without_graphs(model, inputs)
    torch.testing.assert_close(out, expected, atol=3e-2, rtol=3e-2)


def test_whoever_wants_more_than_the_layers_gets_it_without_graphs(device):
    model = model_on(device)
    inputs = batch_of([5, 9], device)
    assert model(**inputs).last_hidden_state.requires_grad
    with torch.no_grad():
        assert len(model(**inputs, output_hidden_states=True).hidden_states) == 3
        seen = []
        handle = model.encoder.layer[0].register_forward_hook(lambda *a: seen.append(a))
        model(**inputs)
        handle.remove()
        assert seen and not model.graphs.buckets
        model.graphs.max_tokens = 8
        model(**inputs)
        assert not model.graphs.buckets, "too many tokens"
        model.graphs.max_tokens = 32768
        model(**inputs)
        assert model.graphs.buckets


@pytest.mark.slow
@torch.no_grad()
def test_few_graphs_are_kept_and_the_oldest_is_given_up(device):
    model = model_on(device)
    model.graphs.at_most = 2
    for n in (10, 20, 10, 40):
        same(model, batch_of([n], device))
    assert [b.tokens for b in model.graphs.buckets] == [16, 48]


@torch.no_grad()
def test_a_capture_that_fails_is_said_once_and_the_layers_run(device, monkeypatch, caplog):
    model = model_on(device)

    def fails(self, function):
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(graphs._Recorder, "capture", fails)
    inputs = batch_of([5, 9], device)
    for _ in range(2):
        torch.testing.assert_close(model(**inputs).last_hidden_state, without_graphs(model, inputs))
    assert caplog.text.count("runs without CUDA graphs") == 1
    assert "not permitted when stream" in caplog.text


# ---- life ----


@torch.no_grad()
def test_copies_and_pickles_capture_for_themselves(device):
    model = model_on(device)
    inputs = batch_of([5, 9], device)
    expected = model(**inputs).last_hidden_state
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(other.graphs, CudaGraphs) and not other.graphs.buckets
        torch.testing.assert_close(other(**inputs).last_hidden_state, expected)
        other.encoder.layer[0].output.dense.weight.zero_()
        same(other, inputs)
        torch.testing.assert_close(model(**inputs).last_hidden_state, expected)


@torch.no_grad()
def test_accelerate_switches_them_on_and_undo_off(device):
    import transformers

    torch.manual_seed(0)
    model = transformers.BertModel(tiny_config()).to(device).eval()
    inputs = batch_of([5, 9], device)
    handle = fastbert.accelerate(model, cuda_graphs=True)
    same(model, inputs)
    runner = model.graphs
    assert runner.buckets
    handle.undo()
    assert not hasattr(model, "graphs") and not runner.buckets
    fastbert.accelerate(model)
    assert model.graphs is None


gpu_only = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@gpu_only
@torch.no_grad()
def test_threads_take_turns():
    model = model_on("cuda")
    batches = [batch_of([n, 3], "cuda") for n in (4, 9, 12, 13)]
    expected = [without_graphs(model, b) for b in batches]
    wrong = []

    def work(i):
        with torch.no_grad():
            for _ in range(10):
                out = model(**batches[i]).last_hidden_state
                if not torch.allclose(out, expected[i], atol=2e-5):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


@gpu_only
@torch.inference_mode()
def test_streams_wait_for_each_other_and_a_capture_of_the_callers_own_is_left_alone():
    model = model_on("cuda", torch.bfloat16)
    batches = [batch_of([n, 3], "cuda") for n in (4, 9, 12, 13)]
    expected = [model(**b).last_hidden_state for b in batches]
    streams = [torch.cuda.Stream() for _ in batches]
    torch.cuda.synchronize()
    for _ in range(50):
        found = []
        for stream, inputs in zip(streams, batches, strict=True):
            with torch.cuda.stream(stream):
                found.append(model(**inputs).last_hidden_state)
        torch.cuda.synchronize()
        assert all(map(torch.equal, found, expected))
    ids = torch.randint(5, 90, (2, 8), device="cuda")
    before = model(input_ids=ids).last_hidden_state
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = model(input_ids=ids).last_hidden_state
    graph.replay()
    torch.testing.assert_close(out, before, atol=2e-2, rtol=2e-2)
    with pytest.raises(RuntimeError, match="inside a CUDA graph capture"):
        batch = PackedBatch.from_lengths([3, 4], "cuda")
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            batch.classes(())[0].tile_map(16)
