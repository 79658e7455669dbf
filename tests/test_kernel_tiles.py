"""The tile tables: pure functions, legal for every size on every architecture, known or newer."""

import pytest
import torch

tiles = pytest.importorskip("fastbert.kernels._tiles", reason="needs triton", exc_type=ImportError)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def is_power_of_2(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


@pytest.mark.parametrize("arch", [75, 80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_tiles_are_legal_for_every_head_and_length(arch, dtype):
    for head_dim in range(1, 129):
        for length in (0, 1, 31, 32, 33, 64, 65, 128, 129, 512, 8192):
            for has_bias in (False, True):
                tile = tiles.attention_tile(
                    head_dim=head_dim,
                    dtype=dtype,
                    arch=arch,
                    max_seqlen_q=length,
                    max_seqlen_k=length,
                    has_bias=has_bias,
                )
                assert all(map(is_power_of_2, (tile.block_m, tile.block_n, tile.block_d)))
                assert tile.block_d >= max(16, head_dim)
                assert tile.block_m >= 16 and tile.block_n >= 16  # the least a product takes
                assert tile.num_warps in (1, 2, 4, 8, 16) and tile.num_stages >= 1
                assert not tile.single or length <= tile.block_n


def test_an_architecture_gets_the_tables_of_what_it_is_like():
    """Tiles of sm_90 ask for more shared memory than sm_120 has, and for wgmma; those of sm_80 for
    more registers than sm_86 has without a stack."""
    options = dict(head_dim=128, dtype=torch.bfloat16, max_seqlen_q=512, max_seqlen_k=512)
    chosen = {
        arch: tiles.attention_tile(**options, arch=arch) for arch in (80, 86, 89, 90, 103, 120, 121)
    }
    assert chosen[120] == chosen[121] == chosen[86] == chosen[89]
    assert chosen[80] != chosen[89] != chosen[90] == chosen[103]
    for arch in (86, 120):
        assert tiles.cross_entropy_tile(30522, arch) == tiles.cross_entropy_tile(30522, 89)


def test_dropout_beside_a_bias_leaves_registers_for_the_smaller_whole_sequence():
    options = dict(head_dim=32, dtype=torch.bfloat16, arch=90, max_seqlen_q=100, max_seqlen_k=100)
    assert tiles.attention_bwd_tiles(**options, has_bias=True).is_whole
    for also in ({"has_bias": True, "dropout_bits": 8}, {"has_bias": True, "dropout_bits": 16}):
        assert not tiles.attention_bwd_tiles(**options, **also).is_whole
    assert tiles.attention_bwd_tiles(**options, dropout_bits=8).is_whole


def test_long_keys_are_walked_and_short_ones_are_not():
    options = dict(head_dim=64, dtype=torch.bfloat16, arch=90)
    assert tiles.attention_tile(**options, max_seqlen_q=512, max_seqlen_k=128).single
    assert not tiles.attention_tile(**options, max_seqlen_q=1, max_seqlen_k=129).single


def test_enumeration_has_what_selection_returns():
    """The compile test sees only what is enumerated."""
    for arch in tiles.ARCHITECTURES:
        for dtype in DTYPES:
            for has_bias in (False, True):
                listed = tiles.attention_tiles(arch, dtype, 64, has_bias)
                for length in range(1, 300):
                    assert (
                        tiles.attention_tile(
                            head_dim=64,
                            dtype=dtype,
                            arch=arch,
                            max_seqlen_q=length,
                            max_seqlen_k=length,
                            has_bias=has_bias,
                        )
                        in listed
                    )


def test_heads_over_128_are_refused():
    with pytest.raises(NotImplementedError, match="head sizes up to 128, got 129"):
        tiles.attention_tile(
            head_dim=129, dtype=torch.float16, arch=90, max_seqlen_q=1, max_seqlen_k=1
        )


@pytest.mark.parametrize("width", [1, 2, 31, 32, 77, 384, 768, 1024, 4096, 8192])
def test_row_tiles_cover_a_row(width):
    for tile in (tiles.layernorm_tile(width, 90), tiles.softmax_tile(width, 90)):
        assert is_power_of_2(tile.block_n) and tile.block_n >= width
        assert is_power_of_2(tile.rows)
        assert tile.rows == 1 or tile.rows * tile.block_n <= 4096
    strip = tiles.bias_activation_tile(width, 90)
    assert is_power_of_2(strip.block_n) and is_power_of_2(strip.rows)
    assert tiles.softmax_tile(32, 90).rows > 1 and tiles.layernorm_tile(128, 90).rows > 1


def test_fp32_products_are_ieee_unless_torch_allows_tf32():
    """By either form of torch's switch; reading the older one raises once the newer one is set."""
    from fastbert.kernels._device import input_precision

    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        assert input_precision(torch.float32) == "ieee"
        for allow in (
            lambda: setattr(matmul, "allow_tf32", True),
            lambda: setattr(matmul, "fp32_precision", "tf32"),
        ):
            matmul.fp32_precision = "ieee"
            allow()
            assert input_precision(torch.float32) == "tf32"
            assert input_precision(torch.bfloat16) == "ieee"
    finally:
        matmul.fp32_precision = before


def test_the_linear_route_is_the_library_until_it_is_measured():
    assert tiles.linear_route(m=32768, n=3072, k=768, dtype=torch.bfloat16, arch=90) == "library"


def test_a_tuned_tile_replaces_the_tables_for_its_architecture_alone():
    plain = tiles.softmax_tile(128, 90)
    with tiles.tuned(90, "softmax 128", {"rows": 2, "num_warps": 1}):
        assert tiles.softmax_tile(128, 90) == tiles.RowTile(2, 128, 1)
        assert tiles.softmax_tile(128, 80) == plain
        assert tiles.softmax_tile(256, 90).num_warps != 1
    assert tiles.softmax_tile(128, 90) == plain
    options = dict(head_dim=64, dtype=torch.bfloat16, arch=90, max_seqlen_q=512, max_seqlen_k=512)
    with tiles.tuned(90, "attention D64 16 bit long", {"block_m": 64}):
        assert tiles.attention_tile(**options).block_m == 64
        listed = tiles.attention_tiles(90, torch.bfloat16, 64, False)
        assert tiles.attention_tile(**options) in listed, "the compile test would not see it"
