"""Limits of registers: which launches have one, by the names of their variants."""

import pytest
import torch

pytest.importorskip("triton")
from fastbert.kernels import _registers, attention, attention_bias_bwd, attention_bwd
from fastbert.kernels._registers import (
    ONE_PROGRAM,
    PROGRAMS,
    TWO_PROGRAMS,
    Form,
    registers_for,
)
from fastbert.kernels._tiles import ARCHITECTURES, attention_tile, attention_tiles
from fastbert.kernels._variants import variants

FWD, DQ = "_attention_fwd_kernel", "_attention_bwd_kernel_dq"
DKDV, BIAS = "_attention_bwd_kernel_dkdv", "_attention_bwd_kernel_bias"


@pytest.fixture
def launched(monkeypatch, device):
    """Kernel -> limit of its launch; nothing runs. Tiles are those of sm_90."""
    found = {}

    def launch(kernel, grid, *args, maxnreg, **constants):
        found[kernel.__name__] = maxnreg

    for module in (attention, attention_bwd, attention_bias_bwd):
        monkeypatch.setattr(module, "launch", launch)
    monkeypatch.setattr(_registers, "device_arch", lambda device: 90)
    return found


def test_names_are_those_of_variants():
    """One that no variant has any more, after a change of a tile, would limit nothing."""
    names = {
        variant.name
        for arch in ARCHITECTURES
        for kernel in ("attention", "attention_bwd")
        for variant in variants(kernel, arch)
    }
    assert names >= TWO_PROGRAMS | ONE_PROGRAM | set(PROGRAMS)
    assert not TWO_PROGRAMS & (ONE_PROGRAM | set(PROGRAMS))


@pytest.mark.parametrize("head_dim, dropout_p, limit", [(64, 0.1, 128), (64, 0.0, None),
                                                        (32, 0.1, 128)])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_packed_attention_with_dropout_is_limited(launched, head_dim, dropout_p, limit, dtype):
    rows = torch.zeros(300, 2, head_dim, dtype=dtype)
    tile = attention_tile(
        head_dim=head_dim, dtype=dtype, arch=90, max_seqlen_q=300, max_seqlen_k=300
    )
    bounds = torch.tensor([0, 300], dtype=torch.int32)
    attention.attention_varlen_fwd(
        rows, rows, rows, bounds, bounds, [(torch.zeros(3, 2, dtype=torch.int32), tile)],
        scale=1.0, dropout_p=dropout_p, seed=torch.zeros(1, dtype=torch.int64),
    )  # fmt: skip
    assert launched == {FWD: limit}


def test_backward_is_limited_by_kernel_and_form(launched):
    x, bias = torch.zeros(2, 3, 200, 128), torch.zeros(2, 3, 200, 200)
    mask, lse = torch.ones(2, 200, dtype=torch.bool), torch.zeros(2, 3, 200)
    attention_bwd.attention_padded_bwd(x, x, x, x, x, lse, mask, None, scale=1.0)
    assert launched == {DQ: None, DKDV: None}
    attention_bwd.attention_padded_bwd(
        x, x, x, x, x, lse, mask, bias, scale=1.0, bias_gradient=True
    )
    assert launched == {DQ: None, DKDV: 128, BIAS: None}


def test_a_limit_is_what_so_many_programs_may_have():
    assert [registers_for(2, warps) for warps in (4, 8, 16)] == [255, 128, 64]
    assert [registers_for(programs, 4) for programs in (3, 4)] == [168, 128]
    # Older cards of a kind have the tables and the names of the newer; others have no names.
    tiles = attention_tiles(89, torch.bfloat16, 32, has_bias=False)
    form = Form(packed=True, dropout_bits=8)
    limits = {
        arch: [_registers.limited_for(tile, attention._attention_fwd_kernel, arch,
                                      torch.bfloat16, 32, form).max_registers for tile in tiles]
        for arch in (86, 89, 100, 120)
    }  # fmt: skip
    assert limits == {
        86: [None, None, 128],
        89: [None, None, 128],
        100: [None] * 3,
        120: [None] * 3,
    }
