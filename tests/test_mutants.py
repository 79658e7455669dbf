"""Wrong kernels are found: each fault, in a copy of its kernel, by random cases of every dtype.

The faults are of the sizes that matter: a sum kept in fp16, the last element left out, a scale off
by a thousandth, tanh for erf, one bit of a mask.
"""

import importlib
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch

from fastbert.workbench import fuzz

pytest.importorskip("triton")
KERNELS = Path(__file__).parents[1] / "kernels"


class Mutant(NamedTuple):
    """A kernel and a fault of it: the file that is changed, what is replaced there by what, and
    what cases have to have that reach it, where few do."""

    kernel: str
    fault: str
    file: str
    edits: tuple[tuple[str, str], ...]
    only: dict


TO_HALF = ".to(tl.float16)"
HALF = f"{TO_HALF}.to(tl.float32)"
PRODUCT = "input_precision=INPUT_PRECISION)"
ERF = "ACTIVATION, SHORT_ERF)"
TANH = 'ACTIVATION if ACTIVATION != "gelu" else "gelu_tanh", SHORT_ERF)'


def in_fp16(*sums: str) -> tuple[tuple[str, str], ...]:
    """Each of these rounded to fp16."""
    return tuple((s, s + HALF) for s in sums)


def added_in_fp16(*products: str) -> tuple[tuple[str, str], ...]:
    """Each of these, ``[name = ]tl.dot(a, b[, total], ...)``, with its total in fp16."""
    edits = []
    for product in products:
        name, dot, arguments = product.removesuffix(f", {PRODUCT}").partition("tl.dot(")
        arguments = ", ".join(f"({each}){TO_HALF}" for each in arguments.split(", "))
        edits.append((product, f"{name}{dot}{arguments}, out_dtype=tl.float16).to(tl.float32)"))
    return tuple(edits)


def without(total: str, left_out: str) -> tuple[tuple[str, str], ...]:
    """A sum ``tl.sum(terms, ...)`` over fewer terms."""
    terms, _, axis = total.removeprefix("tl.sum(").rpartition(", ")
    return ((total, f"tl.sum(tl.where({left_out}, {terms}, 0.0), {axis}"),)


LAST_COLUMN = "(offs_n < N - 1)[None, :]"
LAST_ROW = "(offs_m < M - 1)[:, None]"

ATTENTION = {
    "fp16 accumulation": added_in_fp16(
        f"acc = tl.dot(p.to(v.dtype), v, acc, {PRODUCT}",
        f"acc = tl.dot(p.to(v.dtype), v, {PRODUCT}",
    ),
    "dropped tail": (("where(columns < len_k, s", "where(columns < len_k - 1, s"),),
    "wrong scale": (("scale * LOG2E.value", "1.001 * scale * LOG2E.value"),),
    "wrong scale of the result": (("acc / safe[:, None]", "1.001 * acc / safe[:, None]"),),
    "one mask bit": (("where(keep != 0, s", "where((keep != 0) | (columns == 1), s"),),
    "wrong scale of the bias": (("LOG2E / scale_log2", "1.001 * LOG2E / scale_log2"),),
    "a key outside with a bias": (("(columns < len_k), other", "(columns <= len_k), other"),),
}
LSE = "weights(s, lse[None, :], scale_log2)"
ATTENTION_BWD = {
    "fp16 accumulation": added_in_fp16(
        f"tl.dot(ds.to(k.dtype), k, acc, {PRODUCT}",
        f"tl.dot(ds.to(q.dtype), q, acc_dk, {PRODUCT}",
        f"dv = tl.dot(dropped.to(do.dtype), do, {PRODUCT}",
        f"dk = tl.dot(ds, q, {PRODUCT}",
    ),
    "dropped tail": without(
        "tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)", "(offs_d < HEAD_DIM - 1)[None, :]"
    ),
    "wrong scale": (
        ("acc * scale,", "acc * (1.001 * scale),"),
        ("dq * scale", "dq * (1.001 * scale)"),
    ),
    "wrong scale of keys": (("dk * scale,", "dk * (1.001 * scale),"),),
    "one mask bit": ((LSE, f"tl.where(offs_n[:, None] == 1, 0.0, {LSE})"),),
    "pairs the other way round": (("tl.join(lse, delta)", "tl.join(delta, lse)"),),
    "a pair that is not stored": (("length)[:, None])", "length - 1)[:, None])"),),
}
ATTENTION_BIAS_BWD = {
    "dropped tail of the bias": (("offs_m, rest_q)", "offs_m, rest_q - 1)"),),
    "wrong scale of the bias": (("return p * ", "return 1.001 * p * "),),
    "keys of the first sequence for the bias": (("(start + first_n).to", "first_n.to"),),
}
SOFTMAX = {
    "fp16 accumulation": in_fp16("tl.sum(p, 1)"),
    "dropped tail": (("where(mask_n[None, :], s", f"where({LAST_COLUMN}, s"),),
    "wrong scale": (("s = x * scale", "s = x * (1.001 * scale)"),),
    "wrong scale of the result": (("y = p /", "y = 1.001 * p /"),),
    "one mask bit": (("where(given != 0, s", "where((given != 0) | (offs_n == 1)[None, :], s"),),
}
SOFTMAX_BWD = {
    "fp16 accumulation": in_fp16("tl.sum(dy * y, 1)"),
    "dropped tail": without("tl.sum(dy * y, 1)", LAST_COLUMN),
    "wrong scale": (("dx = scale * y", "dx = 1.001 * scale * y"),),
}
LAYERNORM = {
    "fp16 accumulation": in_fp16("tl.sum(z, 1)", "tl.sum(centred * centred, 1)"),
    "dropped tail": without("tl.sum(z, 1)", LAST_COLUMN),
    "wrong scale": (("rstd = tl.rsqrt(", "rstd = 1.001 * tl.rsqrt("),),
}
LAYERNORM_BWD = {
    "fp16 accumulation": in_fp16("tl.sum(g * h, 1)"),
    "dropped tail": without("tl.sum(g * h, 1)", LAST_COLUMN),
    "dropped row": without("tl.sum(dy, 0)", LAST_ROW),
    "wrong scale": (("dz = (g - mean_g", "dz = 1.001 * (g - mean_g"),),
}
LINEAR = {
    "fp16 accumulation": added_in_fp16(f"acc = tl.dot(x, tl.trans(w), acc, {PRODUCT}"),
    "dropped tail": (("start + offs_k < K", "start + offs_k < K - 1"),),
    "wrong scale": (("activate(acc, ", "activate(1.001 * acc, "),),
    "tanh for erf": ((f"activate(acc, {ERF}", f"activate(acc, {TANH}"),),
}
BIAS_ACTIVATION = {
    "dropped tail": (("bias_ptr + offs_n, mask=mask_n", "bias_ptr + offs_n, mask=offs_n < N - 1"),),
    "wrong scale": ((f"activate(x, {ERF}.to(", f"activate(1.001 * x, {ERF}.to("),),
    "tanh for erf": ((f"activate(x, {ERF}.to(", f"activate(x, {TANH}.to("),),
}
ACTIVATION_BWD = {
    "fp16 accumulation": in_fp16("tl.sum(dx, 0)"),
    "dropped tail": without("tl.sum(dx, 0)", LAST_ROW),
    "wrong scale": (("dx = dy * activation_slope", "dx = 1.001 * dy * activation_slope"),),
    "tanh for erf": ((f"activation_slope(x, {ERF}", f"activation_slope(x, {TANH}"),),
}
CROSS_ENTROPY = {
    "fp16 accumulation": in_fp16("tl.sum(tl.exp2((x - higher) * LOG2E), 0)"),
    "dropped tail": (("x = tl.where(mask, x", "x = tl.where(start + offs_n < N - 1, x"),),
    "wrong scale": (
        ("tl.exp2((x - top) * LOG2E) / total", "1.001 * tl.exp2((x - top) * LOG2E) / total"),
    ),
}
MUTANTS = [
    Mutant(kernel, fault, file, edits, {"packed": True, "bias": True} if "bias" in fault else {})
    for kernel, file, faults in (
        ("attention", "attention.py", ATTENTION),
        ("attention_bwd", "attention_bwd_kernels.py", ATTENTION_BWD),
        ("attention_bwd", "attention_bias_bwd.py", ATTENTION_BIAS_BWD),
        ("softmax", "softmax.py", SOFTMAX),
        ("softmax_bwd", "softmax.py", SOFTMAX_BWD),
        ("layernorm", "layernorm.py", LAYERNORM),
        ("layernorm_bwd", "layernorm.py", LAYERNORM_BWD),
        ("embedding", "layernorm.py", LAYERNORM),  # it takes its norm from there
        ("linear", "linear.py", LINEAR),
        ("bias_activation", "linear.py", BIAS_ACTIVATION),
        ("activation_bwd", "linear.py", ACTIVATION_BWD),
        ("cross_entropy", "cross_entropy.py", CROSS_ENTROPY),
    )
    for fault, edits in faults.items()
]


CASES = [
    pytest.param(mutant, dtype, id=f"{mutant.kernel}, {mutant.fault}, {dtype}")
    for mutant in MUTANTS
    for dtype in fuzz.DTYPES
]


def test_every_kernel_has_mutants():
    assert {m.kernel for m in MUTANTS} == set(fuzz.FUZZERS)


@pytest.fixture
def mutate(tmp_path, monkeypatch):
    """Puts a changed copy of the kernels in the place of the kernels, for one test."""
    package = importlib.import_module("fastbert.kernels")

    def take_out() -> dict[str, ModuleType]:
        # But what mends the interpreter: it does so once in a process.
        kernels, keep = "fastbert.kernels.", "fastbert.kernels._interpreter"
        names = [n for n in sys.modules if n.startswith(kernels) and not n.startswith(keep)]
        for name in names:
            delattr(package, name.rpartition(".")[2])
        return {name: sys.modules.pop(name) for name in names}

    def apply(mutant: Mutant) -> None:
        shutil.copytree(KERNELS, tmp_path / "kernels")
        path = tmp_path / "kernels" / mutant.file
        text = path.read_text()
        for old, new in mutant.edits:
            assert old in text, f"{mutant.file} no longer has {old!r}: change the mutant with it"
            text = text.replace(old, new)
        path.write_text(text)
        monkeypatch.setattr(package, "__path__", [str(tmp_path / "kernels")])

    right = take_out()
    yield apply
    take_out()
    for name, module in right.items():
        sys.modules[name] = module
        setattr(package, name.rpartition(".")[2], module)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="each would be compiled for its few cases")
@pytest.mark.parametrize(("mutant", "dtype"), CASES)
def test_a_wrong_kernel_is_found(mutant, dtype, mutate, device):
    mutate(mutant)
    found = fuzz.check(
        mutant.kernel, cases=150, dtypes=(dtype,), only=mutant.only, device=device, seed=5,
        shrink=False,
    )  # fmt: skip
    assert isinstance(found, fuzz.Failure), f"{found} cases passed"
    assert found.error.startswith("AssertionError"), found.error
