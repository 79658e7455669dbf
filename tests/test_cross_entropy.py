"""The masked-LM loss: against torch's cross-entropy of all logits, and what it may not allocate."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from tiny import DTYPES
from torch.utils._python_dispatch import TorchDispatchMode

from fastbert import ops
from fastbert.ops import cross_entropy as module
from fastbert.testing import assert_matches, with_gradients


def example(n, width, vocabulary, dtype, device):
    x = torch.randn(n, width).to(device, dtype)
    weight = (torch.randn(vocabulary, width) * width**-0.5).to(device, dtype)
    bias = torch.randn(vocabulary).to(device, dtype)
    labels = torch.randint(0, vocabulary, (n,)).to(device)
    labels[::3] = -100
    return x, weight, bias, labels


def by_torch(x, weight, bias, labels, **options):
    return F.cross_entropy(F.linear(x, weight, bias), labels, **options)


def gradients(function, tensors, dtype, factor=1.0):
    leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in tensors]
    loss = function(*leaves)
    given = [t for t in leaves if t is not None]
    return [loss, *torch.autograd.grad(loss * factor, given)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [7, 33, 5000])  # the last takes two strips of the kernel
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_and_gradients_match_fp64(dtype, vocabulary, smoothing, device, each_backend):
    x, weight, bias, labels = example(37, 32, vocabulary, dtype, device)
    for reduction, tensors in (("mean", (x, weight, bias)), ("sum", (x, weight, None))):
        run, plain = (
            partial(loss, labels=labels, reduction=reduction, label_smoothing=smoothing)
            for loss in (ops.linear_cross_entropy, by_torch)
        )
        upstream = torch.tensor(3.0, device=device)
        loss, *grads = with_gradients(run)(upstream, *tensors)
        assert loss.dtype == torch.float32 and all(g.dtype == dtype for g in grads)
        actual = [loss.to(dtype), *grads]
        assert_matches(actual, with_gradients(plain), (upstream, *tensors), reduction)


def test_chunks_give_what_one_piece_gives(device, each_backend, monkeypatch):
    """Several chunks, the last a short one: same loss and gradients within rounding."""
    x, weight, bias, labels = example(100, 16, 50, torch.float32, device)
    whole = gradients(lambda *t: ops.linear_cross_entropy(*t, labels), (x, weight, bias), x.dtype)
    monkeypatch.setattr(module, "CHUNK", 30)
    parts = gradients(lambda *t: ops.linear_cross_entropy(*t, labels), (x, weight, bias), x.dtype)
    for a, b in zip(parts, whole, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(ops.linear_cross_entropy(x, weight, bias, labels), whole[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_right_labels_are_counted(dtype, device, each_backend, monkeypatch):
    """Over chunks, with a bias that decides, in training or not."""
    monkeypatch.setattr(module, "CHUNK", 30)
    x, weight, bias, _ = example(100, 16, 5000, dtype, device)
    right = F.linear(x.double(), weight.double(), 8 * bias.double()).argmax(-1)
    labels = torch.where(torch.arange(100, device=device) % 4 == 0, (right + 1) % 5000, right)
    for leaf in (x, x.clone().requires_grad_()):
        for smoothing in (0.0, 0.1):
            _, correct = module.summed_cross_entropy(leaf, weight, 8 * bias, labels, smoothing)
            assert correct == 75


class _Largest(TorchDispatchMode):
    """The most elements that any result of an operation had."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, torch.Tensor):
                self.numel = max(self.numel, t.numel())
        return out


def test_no_tensor_of_all_logits_exists(device, each_backend, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 16)
    x, weight, bias, _ = example(400, 8, 300, torch.float32, device)
    labels = torch.randint(0, 300, (400,), device=device)
    with _Largest() as seen:
        gradients(lambda *t: ops.linear_cross_entropy(*t, labels), (x, weight, bias), x.dtype)
    assert 16 * 300 <= seen.numel <= 16 * (300 + 64) < 400 * 300
    with _Largest() as seen:
        gradients(lambda *t: by_torch(*t, labels), (x, weight, bias), x.dtype)
    assert seen.numel == 400 * 300  # the measure works


def test_nothing_labelled_is_a_loss_of_zero(device, each_backend):
    x, weight, bias, labels = example(9, 16, 20, torch.float32, device)
    labels[:] = -100
    results = gradients(lambda *t: ops.linear_cross_entropy(*t, labels), (x, weight, bias), x.dtype)
    assert not any(t.any() for t in results)
    assert results[0].requires_grad
    assert [t.shape for t in results] == [(), x.shape, weight.shape, bias.shape]
    empty = ops.linear_cross_entropy(x[:0], weight, bias, labels[:0])
    assert empty == 0.0


def test_parts_of_an_accumulated_batch_add_up(device, each_backend):
    """``num_items``, as Trainer passes it: the parts give the gradient of the whole."""
    x, weight, bias, labels = example(30, 16, 20, torch.float32, device)
    whole = gradients(lambda *t: ops.linear_cross_entropy(*t, labels), (x, weight, bias), x.dtype)
    for num_items in (20, torch.tensor(20, device=device)):

        def parts(x, weight, bias, num_items=num_items):
            return sum(
                ops.linear_cross_entropy(x[i : i + n], weight, bias, labels[i : i + n],
                                         num_items=num_items)
                for i, n in ((0, 4), (4, 20), (24, 6))
            )  # fmt: skip

        for a, b in zip(gradients(parts, (x, weight, bias), x.dtype), whole, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_a_tied_weight_gets_its_gradient_once_from_each_use(device, each_backend):
    table = torch.randn(20, 16, device=device)
    ids, labels = torch.arange(8, device=device), torch.arange(8, device=device) + 3
    results = []
    for loss in (ops.linear_cross_entropy, by_torch):
        leaf = table.clone().requires_grad_()
        out = loss(F.embedding(ids, leaf) * 2.0, leaf, None, labels)
        results.append(torch.autograd.grad(out, leaf)[0])
    torch.testing.assert_close(*results, atol=1e-6, rtol=1e-5)


def test_gradients_of_gradients_are_right(device, each_backend):
    *tensors, labels = example(9, 16, 20, torch.float64, "cpu")
    results = []
    for loss, dtype in ((ops.linear_cross_entropy, torch.float32), (by_torch, torch.float64)):
        leaves = [t.to(device, dtype).requires_grad_() for t in tensors]
        grads = torch.autograd.grad(
            loss(*leaves, labels.to(device), label_smoothing=0.1), leaves, create_graph=True
        )
        results.append(torch.autograd.grad(sum(g.pow(2).sum() for g in grads), leaves))
    for got, exact in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), exact, atol=1e-6, rtol=1e-4)


def test_only_wanted_gradients(device, each_backend):
    for wanted in range(3):
        *tensors, labels = example(9, 16, 20, torch.float32, device)
        tensors[wanted].requires_grad_()
        ops.linear_cross_entropy(*tensors, labels).backward()
        assert [t.grad is not None for t in tensors] == [i == wanted for i in range(3)]


def test_autocast_computes_in_16_bit_and_gives_fp32_gradients(device, each_backend):
    x, weight, bias, labels = example(30, 64, 50, torch.float32, device)

    def run(*tensors):
        with torch.autocast(device, torch.bfloat16):
            return ops.linear_cross_entropy(*tensors, labels)

    actual = gradients(run, (x, weight, bias), torch.float32)
    exact = gradients(lambda *t: by_torch(*t, labels), (x, weight, bias), torch.float64)
    for got, wanted in zip(actual, exact, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(
            got.double(), wanted, atol=0.02 * wanted.abs().max().item(), rtol=0
        )


def test_fp16_gradients_of_many_rows_do_not_underflow(device, each_backend):
    """The division by the number of rows comes after the products, with the upstream factor."""
    x, weight, bias, labels = example(64, 32, 1000, torch.float16, device)
    num_items = 2**20

    def run(*tensors):
        return ops.linear_cross_entropy(*tensors, labels, num_items=num_items)

    scaled = gradients(run, (x, weight, bias), torch.float16, factor=2.0**16)
    exact = gradients(
        lambda *t: by_torch(*t, labels, reduction="sum") / num_items, (x, weight, bias),
        torch.float64, factor=2.0**16,
    )  # fmt: skip
    for got, wanted in zip(scaled[1:], exact[1:], strict=True):
        torch.testing.assert_close(
            got.double(), wanted, atol=2e-3 * wanted.abs().max().item(), rtol=0
        )


def test_large_logits_stay_finite(device, each_backend):
    x, weight, bias, labels = example(12, 32, 40, torch.float32, device)
    actual = gradients(
        lambda *t: ops.linear_cross_entropy(*t, labels), (x * 1e4, weight, bias), x.dtype
    )
    exact = gradients(lambda *t: by_torch(*t, labels), (x * 1e4, weight, bias), torch.float64)
    for got, wanted in zip(actual, exact, strict=True):
        torch.testing.assert_close(got.double(), wanted, atol=1e-4, rtol=1e-4)


def test_it_compiles(device, each_backend):
    x, weight, bias, labels = example(12, 32, 40, torch.float32, device)
    torch._dynamo.reset()
    compiled = torch.compile(ops.linear_cross_entropy, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(x, weight, bias, labels), ops.linear_cross_entropy(x, weight, bias, labels)
    )


def test_kernel_marks_a_label_outside_the_vocabulary(device):
    """Nobody has looked at it on the host: the result says so, and nothing else is touched."""
    kernel = pytest.importorskip("fastbert.kernels.cross_entropy", exc_type=ImportError)
    x = torch.randn(4, 10, device=device)
    labels = torch.tensor([3, 10, -1, 9], device=device)
    losses, hits = kernel.cross_entropy_(
        x.clone(), None, labels, classes=10, smoothing=0, gradient=True
    )
    assert hits.tolist() == [x[0].argmax() == 3, False, False, x[3].argmax() == 9]
    assert losses.isnan().tolist() == [False, True, True, False]
    exact = F.cross_entropy(x[[0, 3]].double(), labels[[0, 3]], reduction="none")
    torch.testing.assert_close(losses[[0, 3]].double(), exact, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(labels=torch.tensor([0, 7])), r"labels: expected values from 0 to 6.*from 0 to 7"),
        (dict(labels=torch.tensor([-1, 2])), "from -1 to 2"),
        (dict(labels=torch.tensor([0])), r"int64 labels \(2,\)"),
        (dict(labels=torch.tensor([0.0, 1.0])), "float32"),
        (dict(bias=torch.zeros(3)), r"bias \(7,\)"),
        (dict(x=torch.zeros(2, 5)), r"\[N, E\]"),
        (dict(reduction="none"), "'none'"),
        (dict(reduction="sum", num_items=3), "num_items"),
        (dict(label_smoothing=1.5), r"1\.5"),
    ],
)
def test_bad_arguments_are_named(change, message, on_torch):
    given = dict(
        x=torch.zeros(2, 4), weight=torch.zeros(7, 4), bias=None, labels=torch.zeros(2).long()
    )
    with pytest.raises(ValueError, match=message):
        ops.linear_cross_entropy(**(given | change))


def test_loss_of_uniform_logits_is_known(device, each_backend):
    loss = ops.linear_cross_entropy(
        torch.ones(3, 4, device=device), torch.zeros(30522, 4, device=device), None,
        torch.tensor([0, 5, 30521], device=device), label_smoothing=0.2,
    )  # fmt: skip
    assert loss.item() == pytest.approx(math.log(30522), rel=1e-6)
