"""The boundary of the ops: backends, gradients, compilation, registration, errors."""

from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from tiny import one_is_quick

import fastbert
from fastbert import ops
from fastbert.ops import backend as backend_module  # the function and its module share a name
from fastbert.ops import onednn
from fastbert.ops.reference import attention_ref, attention_varlen_ref, embed_ref, linear_ref
from fastbert.packing import PackedBatch
from fastbert.testing import assert_matches, assert_within_budget, with_gradients

LENGTHS = [5, 1, 12]


@contextmanager
def without_onednn(monkeypatch):
    """Products as torch makes them."""
    with monkeypatch.context() as patch:
        patch.setitem(onednn._known, torch.float32, False)
        yield


def batch_of(device, lengths=LENGTHS):
    return PackedBatch.from_lengths(lengths, device)


def example(name: str, device: str, dtype=torch.float32, grad: bool = False):
    """A call of each op: function, tensors, keyword arguments."""
    generator = torch.Generator().manual_seed(0)

    def rand(*shape):
        x = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return x.to(device, dtype).requires_grad_(grad)

    total = sum(LENGTHS)
    ids = torch.arange(total).to(device) % 7
    return {
        "attention_varlen": (
            lambda q, k, v: ops.attention_varlen(q, k, v, batch_of(device)),
            [rand(total, 2, 16) for _ in range(3)],
        ),
        "attention": (
            lambda q, k, v, bias: ops.attention(q, k, v, bias=bias),
            [*(rand(2, 2, 9, 16) for _ in range(3)), rand(1, 2, 9, 9)],
        ),
        "attention_qkv": (
            lambda qkv: ops.attention_qkv(qkv, batch_of(device)), [rand(total, 3, 2, 16)],
        ),
        "softmax": (
            lambda x, m: ops.softmax(x, mask=m, scale=0.5), [rand(2, 3, 4, 9), rand(1, 3, 1, 9)],
        ),
        "layer_norm": (
            lambda x, w, b, r, i: ops.layer_norm(x, w, b, eps=1e-5, residual=r, input_bias=i),
            [rand(6, 32), rand(32), rand(32), rand(6, 32), rand(32)],
        ),
        "embed": (
            lambda w, p, t, g, b: ops.embed(ids, ids, ids % 2, w, p, t, g, b, eps=1e-5),
            [rand(7, 32), rand(7, 32), rand(2, 32), rand(32), rand(32)],
        ),
        "linear": (lambda x, w, b: ops.linear(x, w, b), [rand(6, 32), rand(48, 32), rand(48)]),
        "linear_gelu": (ops.linear_gelu, [rand(6, 32), rand(48, 32), rand(48)]),
        "linear, silu": (
            lambda x, w, b: ops.linear(x, w, b, activation="silu"),
            [rand(6, 32), rand(48, 32), rand(48)],
        ),
        "linear_add_norm": (
            lambda x, w, b, r, g, h: ops.linear_add_norm(x, w, b, r, g, h, eps=1e-5),
            [rand(6, 32), rand(48, 32), rand(48), rand(6, 48), rand(48), rand(48)],
        ),
        "linear_stacked": (
            lambda x, v, w, b, c: ops.linear_stacked(x, (v, w), (b, c)),
            [rand(6, 32), rand(48, 32), rand(16, 32), rand(48), rand(16)],
        ),
        "feed_forward_add_norm": (
            lambda x, v, b, w, c, g, h: ops.feed_forward_add_norm(
                x, v, b, "gelu", w, c, g, h, eps=1e-5
            ),
            [rand(6, 32), rand(48, 32), rand(48), rand(32, 48), rand(32), rand(32), rand(32)],
        ),
    }[name]  # fmt: skip


NAMES = (
    "attention_varlen",
    "attention",
    "attention_qkv",
    "softmax",
    "layer_norm",
    "embed",
    "linear",
    "linear_gelu",
    "linear, silu",
    "linear_add_norm",
    "linear_stacked",
    "feed_forward_add_norm",
)


@pytest.mark.parametrize("name", NAMES)
def test_op_and_gradients_match_fp64(name, device, each_backend, monkeypatch):
    """Against the same op in torch in fp64; torch in fp32 is the baseline."""
    function, tensors = example(name, device)
    upstream = torch.randn_like(function(*tensors))
    actual = with_gradients(function)(upstream, *tensors)
    with fastbert.backend("torch"), without_onednn(monkeypatch):
        assert_matches(actual, with_gradients(function), (upstream, *tensors), name)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_of_some_inputs_and_of_a_sum(name, device, each_backend):
    """``.sum()`` hands down an expanded gradient of stride 0; only asked-for inputs get one."""
    function, tensors = example(name, device)
    tensors[0].requires_grad_()
    function(*tensors).sum().backward()
    with fastbert.backend("torch"):
        other, copies = example(name, device)
        copies[0].requires_grad_()
        other(*copies).sum().backward()
    torch.testing.assert_close(tensors[0].grad, copies[0].grad, atol=1e-5, rtol=1e-4)
    assert all(t.grad is None for t in tensors[1:])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_op_compiles_as_one_graph(name, device, each_backend):
    function, tensors = example(name, device)
    torch._dynamo.reset()
    with torch.no_grad():
        expected = function(*tensors)
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*tensors), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_op_compiles_in_16_bits(name, device, each_backend):
    """Whose tiles are others, by tables of their own."""
    function, tensors = example(name, device)
    tensors = [t.bfloat16() for t in tensors]
    torch._dynamo.reset()
    with torch.no_grad():
        actual = torch.compile(function, fullgraph=True, backend="aot_eager")(*tensors)
        with fastbert.backend("torch"):
            exact, theirs = function(*(t.double() for t in tensors)), function(*tensors)
    assert_within_budget(actual, exact, theirs, name)


def test_a_position_that_is_padding_gets_no_gradient_by_default_either(device, each_backend):
    word, position = torch.randn(2, 7, 8, device=device).unbind()
    position.requires_grad_()
    ids, one = torch.arange(5, device=device), torch.ones(8, device=device)
    out = ops.embed(ids, None, None, word, position, None, one, one, eps=1e-5,
                    position_padding_idx=2)  # fmt: skip
    out.pow(3).sum().backward()
    assert position.grad.any(-1).tolist() == [True, True, False, True, True, False, False]


@pytest.mark.parametrize("types", [None, [1, 0, 1]])
@pytest.mark.parametrize("positions", [None, [4, 0, 2]])
def test_embeddings_are_the_same_in_place_and_leave_their_tables(types, positions, on_torch):
    """Without a gradient they are added up in place, to the same bits; not across dtypes."""
    word, position, kind = torch.randn(3, 7, 8)
    ids, types, positions = (
        None if each is None else torch.tensor(each) for each in ([3, 3, 6], types, positions)
    )
    weight, bias = torch.randn(2, 8)
    for table in (position, position.double()):
        tables = (word, table, kind)
        before = [t.clone() for t in tables]
        last = (weight, bias) if table is position else (weight.double(), bias.double())
        found = ops.embed(ids, positions, types, *tables, *last, eps=1e-5)
        expected = embed_ref(ids, positions, types, *tables, *last, 1e-5)
        assert torch.equal(found, expected) and found.dtype == expected.dtype
        assert all(map(torch.equal, tables, before))


@pytest.fixture
def written(monkeypatch):
    """Of each launch, what is written that only backward reads."""
    from fastbert.kernels import attention, embedding, layernorm

    found = []

    def launch(kernel, grid, *args, original=attention.launch, **named):
        given = dict(zip(kernel.arg_names, args, strict=False))
        kept = ("lse_ptr", "z_ptr", "mean_ptr", "rstd_ptr")
        found.append({given[n] is not None for n in kept if n in given})
        original(kernel, grid, *args, **named)

    for module in (attention, embedding, layernorm):
        monkeypatch.setattr(module, "launch", launch)
    return found


@pytest.mark.parametrize("name", ["attention_varlen", "attention", "layer_norm", "embed"])
def test_what_only_backward_reads_is_written_only_where_there_will_be_one(name, device, written):
    for grad in (False, True):
        function, tensors = example(name, device, grad=grad)[:2]
        with fastbert.backend("triton"):
            function(*tensors)
            with torch.no_grad():
                function(*tensors)
    assert written == [{False}, {False}, {True}, {False}]


@torch.no_grad()
def test_layers_of_inference_write_nothing_for_backward(device, written):
    from fastbert.ops.inference import LayerLaunches

    with fastbert.backend("triton"):
        launches = LayerLaunches(batch_of(device), 0.25, 16, "gelu", (1e-5, 1e-5))
        rows, weight = torch.randn(sum(LENGTHS), 32, device=device), torch.eye(32, device=device)
        launches.attend(rows, rows, rows)
        launches.linear_add_norm(0, rows, weight, None, rows, None, None)
    assert written == [{False}, {False}]


def registered_calls(device):
    batch = batch_of(device)
    maps = (batch.classes(())[0].tile_map(32),)
    q, k, v = torch.randn(3, sum(LENGTHS), 2, 16, device=device)
    p = torch.randn(3, 2, 2, 9, 16, device=device)
    x, row = torch.randn(6, 32, device=device), torch.randn(32, device=device)
    ids = torch.arange(6, device=device)
    table = torch.randn(7, 32, device=device)
    cu = batch.cu_seqlens
    seed = ops.dropout_seed(device)
    lse = torch.randn(2, sum(LENGTHS), device=device)
    places = torch.randn(2, 12, 12, device=device)
    bias = torch.randn(2, 9, 9, device=device)[:, None].expand(2, 2, 9, 9)
    return {
        "attention_varlen": (q, k, v, cu, cu, maps, (12,), (12,), 0.25, 0.1, seed, places, True),
        "attention_varlen_bwd": (
            q, q, k, v, v, lse, cu, cu, maps, maps, (12,), (12,), 0.25, 0.1, seed, True,
            places, True,
        ),
        "attention_padded": (*p, None, None, 0.25, 0.1, seed, False),
        "attention_padded_bwd": (
            p[0], *p, p[0], p[0, ..., 0].contiguous(), None, bias, 0.25, 0.1, seed, True,
        ),
        "softmax": (p[0], None, 1.0),
        "softmax_bwd": (p[0], p[1], 0.5),
        "layer_norm": (x, row, row, 1e-5, x, row, 0.1, seed, True, torch.bfloat16),
        "layer_norm_bwd": (
            x, x, x[:2, :6].contiguous(), row, x.dtype, x.dtype, [True, False, True],
            torch.bfloat16, 0.1, seed,
        ),
        "layer_norm_again": (x, x[:2, :6].contiguous(), row, row, torch.bfloat16),
        "embed": (ids, ids, None, table, table, None, row, row, 1e-5, True, table.dtype),
        "linear_activation": (x, table, None, "gelu"),
        "bias_activation_": (x.clone(), row, "gelu"),
        "activation": (x, "gelu"),
        "activation_bwd": (x, x.clone(), "gelu", torch.bfloat16, False),
    }  # fmt: skip


@pytest.mark.parametrize("name", one_is_quick(sorted(registered_calls("cpu"))))
def test_registered_op_passes_opcheck(name, device):
    pytest.importorskip("triton")
    op = getattr(torch.ops.fastbert, name).default
    torch.library.opcheck(
        op,
        registered_calls(device)[name],
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


def test_backends_nest_and_come_back(device):
    resolve = backend_module.resolve
    cpu = torch.device("cpu")
    open_choice = resolve(cpu)
    with fastbert.backend("torch"):
        assert resolve(cpu) == "torch"
        with pytest.raises(RuntimeError, match="inside"), fastbert.backend(None):
            assert resolve(cpu) == open_choice
            raise RuntimeError("inside")
        assert resolve(cpu) == "torch"
    assert resolve(cpu) == open_choice
    with pytest.raises(ValueError, match="expected one of torch, triton, got 'cuda'"):
        fastbert.backend("cuda").__enter__()


def test_a_forced_backend_that_cannot_run_is_an_error(monkeypatch):
    monkeypatch.setattr(backend_module, "_known", {("cpu", None): "there is no GPU"})
    with (
        fastbert.backend("triton"),
        pytest.raises(RuntimeError, match=r"'triton' was asked for.*there is no GPU"),
    ):
        ops.softmax(torch.zeros(2, 2))
    assert backend_module.resolve(torch.device("cpu")) == "torch"


def test_environment_variable_chooses(monkeypatch):
    monkeypatch.setattr(backend_module, "_known", {})
    monkeypatch.setenv("FASTBERT_BACKEND", "torch")
    assert backend_module.resolve(torch.device("cpu")) == "torch"
    monkeypatch.setattr(backend_module, "_known", {})
    monkeypatch.setenv("FASTBERT_BACKEND", "fast")
    with pytest.raises(ValueError, match="FASTBERT_BACKEND: expected one of"):
        backend_module.resolve(torch.device("cpu"))


def test_what_the_kernels_do_not_cover(device):
    """Torch when the choice is open, an error that names the way out when it is not."""
    pytest.importorskip("triton")
    q, k, v = torch.randn(3, sum(LENGTHS), 1, 136, device=device)
    expected = attention_varlen_ref(q, k, v, LENGTHS, LENGTHS)
    batch = batch_of(device)
    torch.testing.assert_close(ops.attention_varlen(q, k, v, batch), expected)
    with fastbert.backend("triton"):
        with pytest.raises(NotImplementedError, match="head sizes up to 128, got 136"):
            ops.attention_varlen(q, k, v, batch)
        with pytest.raises(NotImplementedError, match="float64"):
            ops.attention_varlen(*(t[..., :8].double() for t in (q, k, v)), batch)
        with pytest.raises(NotImplementedError, match="rows of at most 8192, got 8193"):
            ops.softmax(torch.zeros(1, 8193, device=device))


@pytest.mark.slow
def test_dropout_keeps_the_mean(device):
    n = 320
    q, k = torch.zeros(2, n, 2, 8, device=device)
    v = torch.ones(n, 2, 8, device=device)
    out = ops.attention_varlen(q, k, v, PackedBatch.from_lengths([n], device), dropout_p=0.5)
    # Each of 2 n rows is a mean over n independent draws of 0 or 2, deviation 1.
    assert abs(out.mean() - 1) < 5 / (2 * n * n) ** 0.5
    assert 0.85 < out[..., 0].std() * n**0.5 < 1.15  # of 2 n rows: within 5 / sqrt(4 n) or 14 %


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_gradients_are_right_or_refused(name, device, each_backend):
    """Behind a sum, where nothing upstream depends on the input, above all."""
    function, tensors = example(name, device, grad=True)

    def penalty(function, tensors):
        (grad,) = torch.autograd.grad(function(*tensors).sum(), tensors[0], create_graph=True)
        (second,) = torch.autograd.grad(grad.pow(2).sum(), tensors[0], allow_unused=True)
        return torch.zeros_like(grad) if second is None else second

    if each_backend == "triton":
        with pytest.raises(RuntimeError, match=r"fastbert\.backend\('torch'\)"):
            penalty(function, tensors)
    elif not name.startswith("attention"):  # torch's own attention decides for itself
        function, wide = example(name, device, torch.float64, grad=True)
        exact = penalty(function, wide)
        function, tensors = example(name, device, grad=True)
        scale = exact.abs().max().item()
        torch.testing.assert_close(
            penalty(function, tensors).double(), exact, atol=1e-4 * scale + 1e-6, rtol=0
        )


def test_cpu_products_use_onednn_and_stay_exact(on_torch, monkeypatch):
    """The quick CPU route really runs, gives what torch gives, and steps aside when told to."""
    x, weight, bias = torch.randn(33, 64), torch.randn(48, 64), torch.randn(48)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        actual = ops.linear_gelu(x, weight, bias)
    if torch.backends.mkldnn.is_available():
        assert any("mkldnn" in event.key for event in profile.key_averages())
    assert_matches(actual, linear_ref, (x, weight, bias, "gelu"), "oneDNN")
    with without_onednn(monkeypatch):
        assert torch.equal(ops.linear(x, weight, bias), F.linear(x, weight, bias))
    for other in (x.double(), x.half()):
        out = ops.linear(other, weight.to(other.dtype), bias.to(other.dtype))
        assert out.dtype == other.dtype
    assert ops.linear(x[:0], weight, bias).shape == (0, 48)
    assert ops.linear(x[0], weight, bias).shape == (48,)


def test_autocast_decides_the_dtype(on_torch):
    x, weight = torch.randn(4, 32), torch.randn(16, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ops.linear(x, weight).dtype == torch.bfloat16
        mixed = ops.layer_norm(x.bfloat16(), None, None, eps=1e-5, residual=x)
        assert mixed.dtype == torch.float32


def test_padded_attention_without_any_key_gives_zeros(device, each_backend):
    q, k, v = torch.randn(3, 2, 2, 5, 16, device=device)
    mask = torch.zeros(2, 5, dtype=torch.bool, device=device)
    mask[0, 2] = True
    out = ops.attention(q, k, v, key_mask=mask)
    assert not out[1].any()
    torch.testing.assert_close(out, attention_ref(q, k, v, mask))
    assert not ops.attention(q, k[:, :, :0], v[:, :, :0]).any()


BAD = {
    "linear, sizes": (lambda x: ops.linear(x, x.t()), ValueError, r"\[out, in\]"),
    "linear, bias": (lambda x: ops.linear(x, x, x[0]), ValueError, r"bias \(3,\), got \(4,\)"),
    "linear, activation": (lambda x: ops.linear(x, x, activation="gleu"), ValueError, "'gleu'"),
    "activate": (lambda x: ops.activate(x, "tan"), ValueError, "'tan'"),
    "layer_norm, weight": (
        lambda x: ops.layer_norm(x, x[:, 0], None, eps=0.0), ValueError, r"weight \(4,\)",
    ),
    "layer_norm, residual": (
        lambda x: ops.layer_norm(x, None, None, eps=0.0, residual=x[:2]), ValueError, "residual",
    ),
    "softmax, mask": (lambda x: ops.softmax(x, mask=x[:2]), ValueError, "broadcasts"),
    "softmax, dims": (lambda x: ops.softmax(x.view(1, 1, 1, 3, 4)), ValueError, "four dimensions"),
    "attention, dims": (lambda x: ops.attention(x, x, x), ValueError, "4 dimensions"),
    "attention, dtypes": (
        lambda x: ops.attention(*(x[None, None],) * 2, x[None, None].half()),
        ValueError, "one dtype",
    ),
    "attention, mask": (
        lambda x: ops.attention(*(x[None, None],) * 3, key_mask=x[:1] > 0), ValueError, "key_mask",
    ),
    "attention, bias": (
        lambda x: ops.attention(*(x[None, None],) * 3, bias=x), ValueError, "bias that broadcasts",
    ),
    "varlen, rows": (
        lambda x: ops.attention_varlen(*(x[:, None],) * 3, PackedBatch.from_lengths([4])),
        ValueError, "expected 4 query",
    ),
    "varlen, sequences": (
        lambda x: ops.attention_varlen(
            *(x[:, None],) * 3, PackedBatch.from_lengths([3]),
            key_batch=PackedBatch.from_lengths([1, 2]),
        ), ValueError, "key_batch with 1 sequences",
    ),
    "embed, no table": (
        lambda x: ops.embed(*(x[0].long(),) * 3, x, x, None, x[0], x[0], eps=0.0),
        ValueError, "a table token_type",
    ),
    "embed, too long": (
        lambda x: ops.embed(torch.tensor([0] * 5), None, None, x, x, None, x[0], x[0], eps=0.0),
        ValueError, "at most 3 tokens.*got 5",
    ),
    "embed, range": (
        lambda x: ops.embed(torch.tensor([3]), torch.tensor([0]), None, x, x, None, x[0], x[0],
                            eps=0.0),
        ValueError, "from 0 to 2.*from 3 to 3",
    ),
    "embed, range of types": (
        lambda x: ops.embed(torch.tensor([0]), torch.tensor([0]), torch.tensor([-1]), x, x, x,
                            x[0], x[0], eps=0.0),
        ValueError, "token_type_ids from 0 to 2.*from -1 to -1",
    ),
    "embed, range with a gradient": (
        lambda x: ops.embed(torch.tensor([0]), torch.tensor([-2]), None, x, x.requires_grad_(),
                            None, x[0], x[0], eps=0.0),
        ValueError, "position_ids from 0 to 2.*from -2 to -2",
    ),
    "embed, dtype": (
        lambda x: ops.embed(x[0], x[0], None, x, x, None, x[0], x[0], eps=0.0),
        TypeError, "int32 or int64",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name, each_backend):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call(torch.zeros(3, 4))


def test_rows_of_a_ragged_batch_have_one_gradient(on_torch):
    """Not one of all rows for each length, as slices of them would have."""
    q, k, v = torch.randn(3, 10, 2, 16).requires_grad_().unbind()
    out = ops.attention_varlen(q, k, v, PackedBatch.from_lengths([3, 5, 2]))
    nodes, found = [out.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in found:
            found.add(node)
            nodes += [next_node for next_node, _ in node.next_functions]
    names = [node.name() for node in found]
    assert names.count("SplitWithSizesBackward0") == 3 and "SliceBackward0" not in names
