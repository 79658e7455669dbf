"""Attention by oneDNN's graph: as exact as torch's, used where it is a gain, and seen by nobody."""

import copy
import math
import threading
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from test_frozen import batch_of, hidden
from tiny import pair
from torch.profiler import profile

from fastbert.frozen import Frozen
from fastbert.ops import onednn, onednn_attention
from fastbert.ops.attention_torch import varlen_in_torch, way_of_one
from fastbert.ops.reference import attention_varlen_ref
from fastbert.packing import PackedBatch
from fastbert.testing import assert_matches, assert_within_budget

pytestmark = [
    pytest.mark.usefixtures("on_torch"),
    pytest.mark.skipif(
        not (onednn.available() and hasattr(torch._C, "_jit_set_llga_enabled")),
        reason="needs torch's operators of oneDNN, and its graph in TorchScript",
    ),
]


@pytest.fixture(autouse=True)
def as_with_avx512(monkeypatch):
    """Where two heads are enough."""
    monkeypatch.setattr(onednn_attention, "_FROM", 92)
    monkeypatch.setattr(onednn_attention, "_COPIED_FROM", 152)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)


def in_graphs(function) -> int:
    """How often oneDNN's graph computes something in a call."""
    with profile() as seen:
        function()  # compiled before, which is a call of its own
    return sum("LlgaPartition" in event.name for event in seen.events())


def rows_of(count: int, heads: int, size: int, joined: bool) -> tuple[torch.Tensor, ...]:
    if joined:
        return torch.randn(count, 3, heads, size).unbind(1)
    return tuple(torch.randn(count, heads, size) for _ in range(3))


@pytest.mark.parametrize("joined", [True, False], ids=["joined", "apart"])
@pytest.mark.parametrize("size", [8, 32, 64, 80])
@pytest.mark.parametrize(
    ("lengths", "expected"),
    [([96], 1), ([96, 96, 5, 128], 3), ([95, 97, 144], 1), ([145, 3, 160, 170, 0, 170], 4)],
)
def test_sequences_are_as_exact(lengths, expected, size, joined):
    """In a batch those whose number is a round one, and long ones, copied."""
    batch = PackedBatch.from_lengths(lengths)
    q, k, v = rows_of(sum(lengths), 3, size, joined)
    scale = 1.5 / math.sqrt(size)  # of scores up to 6 or so

    def attend():
        return varlen_in_torch(q, k, v, batch, batch, scale, 0.0, False, one_by_one=True)

    with torch.inference_mode():
        found = attend()
        assert in_graphs(attend) == expected

    def specification(q, k, v):
        return attention_varlen_ref(q, k, v, lengths, lengths, scale)

    assert_matches(found, specification, (q, k, v), "attention")


@pytest.mark.parametrize("length", [81, 89, 96, 100, 250])
def test_rows_behind_a_text_are_not_seen(length):
    q, k, v = rows_of(onednn.bucket_of(length), 2, 16, True)
    attend = way_of_one(q, 1, length, 0.25, None)
    found = attend(q, k, v)[:length]
    for t in (q, k, v):
        t[length:] = 1e9
    assert torch.equal(attend(q, k, v)[:length], found)

    def specification(q, k, v):
        return attention_varlen_ref(q, k, v, [length], [length], 0.25)

    assert_matches(found, specification, tuple(t[:length] for t in (q, k, v)), "attention")


def test_scores_of_any_size():
    q, k, v = rows_of(96, 2, 16, True)
    for size in (0.0, 1e3, 1e18):
        found = onednn_attention.prepared(q, 96, 1.0)(q * size, k * size, v)
        expected = F.scaled_dot_product_attention(
            *(t.transpose(0, 1) for t in (q * size, k * size, v)), scale=1.0
        )
        assert found.isfinite().all() and torch.allclose(found.transpose(0, 1), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("mode", "form"),
    [(torch.inference_mode, True), (torch.no_grad, True), (torch.inference_mode, None),
     (torch.no_grad, None), (torch.inference_mode, "int8")],
)  # fmt: skip
@pytest.mark.parametrize(
    ("lengths", "expected"), [([89], 1), ([96], 1), ([88], 0), ([96] * 3, 3), ([7, 150, 96], 2)]
)
def test_layers_attend_in_a_graph_where_that_is_a_gain(lengths, expected, mode, form):
    theirs, ours = pair("BertModel", max_position_embeddings=160)
    ours.frozen = None if form is None else Frozen(form)
    inputs = batch_of(lengths)
    with mode():
        hidden(ours, inputs)
        assert in_graphs(lambda: hidden(ours, inputs)) == 2 * expected
        found = hidden(ours, inputs)
        assert torch.equal(hidden(ours, inputs), found)
    real = inputs["attention_mask"].bool()
    exact = hidden(copy.deepcopy(theirs).double(), inputs)[real]
    if form == "int8":
        assert F.cosine_similarity(found[real].double(), exact).min() > 0.99
    else:
        assert_within_budget(found[real], exact, hidden(theirs, inputs)[real], "hidden states")


def test_rows_behind_a_text_are_finite_where_the_text_is():
    """Without eps a row of zeros has no norm."""
    theirs, ours = pair("BertModel", max_position_embeddings=160, layer_norm_eps=0.0)
    with torch.no_grad():
        for model in (theirs, ours):
            model.encoder.layer[0].attention.output.dense.weight.zero_()
            model.encoder.layer[0].attention.output.dense.bias.zero_()
    inputs = batch_of([89])
    assert torch.allclose(hidden(ours, inputs), hidden(theirs, inputs), atol=1e-5)


def test_threads_get_what_one_gets():
    """They compile at the same time, too."""
    onednn_attention._function.cache_clear()
    lengths, wrong, start = (96, 100, 112, 130), [], threading.Barrier(4)
    tensors = {n: rows_of(onednn.bucket_of(n), 2, 16, True) for n in lengths}

    def call(length):
        q, k, v = tensors[length]
        start.wait()
        for _ in range(10):
            found = onednn_attention.prepared(q, length, 0.25)(q, k, v)[:length]
            rows = (t[:length].transpose(0, 1) for t in (q, k, v))
            expected = F.scaled_dot_product_attention(*rows).transpose(0, 1)
            if not torch.allclose(found, expected, atol=1e-5):
                wrong.append(length)

    threads = [threading.Thread(target=call, args=(n,)) for n in lengths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("before", [False, True])
def test_other_programs_are_compiled_as_before(before):
    """The switch is the whole process's."""
    onednn_attention._function.cache_clear()
    theirs = torch._C._jit_set_llga_enabled(before)
    try:
        q = torch.zeros(96, 2, 16)
        assert onednn_attention.prepared(q, 96, 1.0) is not None
        assert torch._C._jit_llga_enabled() == before
    finally:
        torch._C._jit_set_llga_enabled(theirs)


def _without(name):
    return lambda patch: patch.delattr(torch._C, name)


@pytest.mark.parametrize(
    "broken",
    [
        lambda patch: patch.setattr(torch._C, "_jit_set_llga_enabled", lambda on: False),
        *map(_without, ("_jit_set_llga_enabled", "parse_ir", "_create_function_from_graph",
                        "_jit_get_num_profiled_runs", "_last_executed_optimized_graph")),
        lambda patch: patch.setattr(onednn_attention, "_MASKED", onednn_attention._MASKED.replace(
            "aten::softmax(%seen", "aten::softmax(%scores")),
        lambda patch: patch.setattr(onednn_attention, "_MASKED", "graph():"),
    ],
)  # fmt: skip
def test_without_it_sequences_attend_as_they_did(broken, monkeypatch):
    theirs, ours = pair("BertModel", max_position_embeddings=160)
    inputs = batch_of([96, 150])
    onednn_attention._function.cache_clear()
    onednn_attention.available.cache_clear()
    try:
        with monkeypatch.context() as patch, torch.inference_mode():
            broken(patch)
            assert not onednn_attention.available()
            found = hidden(ours, inputs)
    finally:
        onednn_attention._function.cache_clear()
        onednn_attention.available.cache_clear()
    assert not torch._C._jit_llga_enabled()
    real = inputs["attention_mask"].bool()
    assert torch.allclose(found[real], hidden(theirs, inputs)[real], atol=1e-4)


def test_it_is_there():
    """Else sequences attend as they did: what is tested here would not be used."""
    assert onednn_attention.available()


def test_without_avx512_sequences_attend_as_they_did(monkeypatch):
    monkeypatch.setattr(onednn_attention, "_FROM", math.inf)
    assert onednn_attention.prepared(torch.zeros(512, 2, 16), 512, 1.0) is None


def test_few_heads_for_many_threads_attend_as_they_did(monkeypatch):
    q = torch.zeros(96, 12, 8)
    assert onednn_attention.prepared(q, 96, 1.0) is not None
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert onednn_attention.prepared(q, 96, 1.0) is None


@pytest.mark.parametrize("surroundings", ["fp64", "meta"])
def test_it_is_tried_the_same_whatever_surrounds_the_first_call(surroundings):
    onednn_attention.available.cache_clear()
    onednn_attention._function.cache_clear()
    if surroundings == "fp64":
        torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta") if surroundings == "meta" else nullcontext():
            assert onednn_attention.available()
    finally:
        torch.set_default_dtype(torch.float32)
