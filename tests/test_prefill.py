"""The tensor core projection of Hopper over many tokens: every tile, several waves of them, clusters, blocks of a tuple."""

import pytest
from cases import UNALIGNED
from checks import QKV, check_qkv
from frameworks import TORCH_CUDA, hopper_dtype

pytestmark = pytest.mark.gpu

# tokens, hidden, outputs. On the 132 SMs of an H100: every tile 64 tokens high, of 32 to 96 outputs, two waves of them, a single
# step; every tile of 128, of 64 to 256; tiles that one warpgroup has for itself, nine waves of them, and in clusters; two waves
# of others, and those in clusters (test_cuda_on_cpu holds the list to that)
SHAPES = (
    *((9, 3080, outputs) for outputs in (1024, 6144)),
    *((40, 72, outputs) for outputs in (1024, 7104, 8512, 12288, 17024)),
    (23, 1352, 4096), (40, 1352, 4096), (64, 64, 1024), (1, 64, 1024),
    *((130, 72, outputs) for outputs in (1024, 4288, 5312, 6400, 7424, 8512, 9536)),
    *((130, 1352, outputs) for outputs in (1024, 4288)),
    *((300, 72, outputs) for outputs in (7104, 7808, 8512, 9216, 9920, 10624)),
    (4300, 64, 6144), (4300, 64, 5632), (1160, 3584, 12288), (1100, 8192, 3840), (1100, 3584, 9216))  # fmt: skip

# the same, where spare warps normalise the rows of later tiles, in one round or several, the last one short: beside whole tiles,
# and beside those of 224, 240 and 256 outputs, with clusters and without
MEANWHILE = ((6500, 1024, 7680), (4700, 2560, 3840), (4700, 4104, 3840), (2500, 5120, 7168), (2500, 5120, 7680),
             (4300, 4104, 3840))  # fmt: skip


@pytest.fixture(params=["f16", "bf16"])
def dtype(request):
    return hopper_dtype(request.param, "norm_wgmma_sm90a")


def case_of(tokens, hidden, outputs, dtype, row="norm_wgmma_sm90a", **options):
    heads = outputs // 64
    return QKV((tokens,), hidden, heads - 2 * (heads // 6), heads // 6, 64, dtype, kernel=f"{dtype}_{row}", **options)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rounding", ["hf", "fp32"])
def test_every_tile(dtype, shape, rounding):
    check_qkv(TORCH_CUDA, case_of(*shape, dtype, rounding=rounding, bias=True))


@pytest.mark.parametrize("shape", MEANWHILE, ids=str)
def test_rows_normalised_meanwhile(dtype, shape):
    for options in (
        {"bias": True},
        {"rounding": "fp32", "weights": "tuple", "norm_dtype": "f32"},
        {"residual": True, "weight_offset": 1.0},
        {"residual": True, "weights": "in_out"},
    ):
        check_qkv(TORCH_CUDA, case_of(*shape, dtype, **options))


@pytest.mark.sanitize
@pytest.mark.parametrize("shape", [(260, 192, 25344), (6630, 1280, 1152)], ids=str)
def test_whole_tiles_under_the_sanitizer(dtype, shape):
    """Tiles that a warpgroup has for itself: three waves, three steps; and with rows normalised meanwhile, in clusters."""
    check_qkv(TORCH_CUDA, case_of(*shape, dtype, bias=True))


SMALL = pytest.param((2200, 264, 384), marks=pytest.mark.sanitize)


@pytest.mark.parametrize("shape", [SMALL, (2200, 896, 384), (8999, 264, 384)], ids=str)
def test_many_short_rows(dtype, shape):
    """The norm's blocks take rows in turn: 16 blocks an SM, then as many as leave none more than four rows."""
    for weights in ("packed", "tuple_of_slices"):
        check_qkv(TORCH_CUDA, case_of(*shape, dtype, weights=weights))


# The row factor joins late: every tile, of 64 to 256 outputs, one wave of them and two; one step, an odd number of them, the last
# one short; fewer tokens than a tile has, and a last tile that begins early.
LATE = ((1, 64, 1024), (40, 72, 4224), (129, 192, 4224), (300, 264, 4224), (200, 72, 7104), (130, 136, 8512),
        (130, 320, 10624), (130, 72, 12736), (130, 136, 15104), (130, 2568, 16896), (700, 1352, 7104))  # fmt: skip


@pytest.mark.parametrize("shape", LATE, ids=str)
@pytest.mark.parametrize("weights", ["packed", "tuple", "packed_t", "padded", "tuple_of_slices", "tuple_t"])
def test_every_tile_with_a_late_row_factor(shape, weights):
    hopper_dtype("bf16", "wgmma_sm90a")
    for bias in (False, True):
        check_qkv(TORCH_CUDA, case_of(*shape, "bf16", "wgmma_sm90a", rounding="fp32", weights=weights, bias=bias))


@pytest.mark.sanitize
@pytest.mark.parametrize("shape", [(40, 72, 384), (260, 192, 25344), (300, 1352, 7104)], ids=str)
def test_late_row_factor_under_the_sanitizer(shape):
    hopper_dtype("bf16", "wgmma_sm90a")
    check_qkv(TORCH_CUDA, case_of(*shape, "bf16", "wgmma_sm90a", rounding="fp32", bias=True))


@pytest.mark.parametrize("weights", ["tuple", "packed_t", "in_out"])
def test_every_layout_of_many_tokens(dtype, weights):
    for tokens, outputs in ((21, 3840), (700, 3840), (4300, 5632)):
        check_qkv(TORCH_CUDA, case_of(tokens, 72, outputs, dtype, weights=weights, bias=True, residual=True))
    for tokens in (33, 700):
        check_qkv(TORCH_CUDA, case_of(tokens, 72, 3840, dtype, weights=weights, bias=True, out_layout=UNALIGNED))
