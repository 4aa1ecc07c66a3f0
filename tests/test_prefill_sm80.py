"""The projections in tiles that run on any GPU: every tile, several of them for a block, blocks of a tuple, long sums."""

import numpy as np
import pytest
from cases import UNALIGNED, assert_same_bits, normal
from checks import QKV, check_qkv
from frameworks import TORCH_CUDA, hopper_dtype

import minivllm
from minivllm.testing.reference import to_float64

pytestmark = pytest.mark.gpu

# tokens, hidden, outputs. On the 132 SMs of an H100 the tiles are 32 x 64, 64 x 64, 64 x 96, 64 x 128, 128 x 96, 128 x 128,
# and 128 x 256, two for a block
TENSOR_CORES = ((33, 136, 1152), (65, 64, 7168), (130, 64, 7168), (130, 136, 10240), (400, 64, 6144), (300, 64, 10240),
                (1300, 2064, 6144))  # fmt: skip
# 64 x 64, 64 x 128, 128 x 128, 128 x 256
IN_OUT = ((33, 64, 1152), (130, 136, 10240), (300, 64, 10240), (1300, 2064, 6144))

# 64 x 64 and 128 x 64; an odd number of steps, more than 1,024 of hidden, and hidden that no group of four divides
CUDA_CORES = ((200, 1100, 1152), (1300, 1100, 4096), (130, 2065, 1152))

# 8, 16, 24, 32, 48 and 64 tokens x 16, 32, 40, 48, 56, 64 and 80 outputs, as 132 SMs want them
FEW_TOKENS, FEW_OUTPUTS = (5, 12, 20, 30, 44, 60, 130), (1152, 4096, 5120, 6144, 7168, 8448, 10240)

ROWS = ("f32_norm_ffma_sm80", "f32_norm_few_sm80", "f16_norm_mma_sm80", "bf16_norm_mma_sm80", "f16_norm_wgmma_sm90a",
        "bf16_norm_wgmma_sm90a")  # fmt: skip


def usable(row):
    """The dtype of a row; skips the test where the row cannot run."""
    dtype, kernel = row.split("_", 1)
    if kernel.endswith("sm90a"):
        return hopper_dtype(dtype, kernel)
    if reason := TORCH_CUDA.why_not(dtype):
        pytest.skip(reason)
    return dtype


def case_of(shape, row, **options):
    tokens, hidden, outputs = shape
    heads = outputs // 64
    return QKV((tokens,), hidden, heads - 2 * (heads // 6), heads // 6, 64, usable(row), kernel=row, **options)


@pytest.mark.parametrize("row", ["f16_norm_mma_sm80", "bf16_norm_mma_sm80"])
def test_every_tile_of_the_tensor_cores(row):
    for shape in TENSOR_CORES:
        check_qkv(TORCH_CUDA, case_of(shape, row, bias=True))
        check_qkv(TORCH_CUDA, case_of(shape, row, weights="tuple", residual=True, rounding="fp32"))
    for shape in IN_OUT:
        check_qkv(TORCH_CUDA, case_of(shape, row, weights="in_out", bias=True))
    check_qkv(TORCH_CUDA, case_of((400, 72, 6144), row, bias=True, out_layout=UNALIGNED))


@pytest.mark.parametrize("weights", ["packed", "in_out", "tuple"])
def test_every_tile_of_the_cuda_cores(weights):
    for shape in CUDA_CORES:
        check_qkv(TORCH_CUDA, case_of(shape, "f32_norm_ffma_sm80", weights=weights, bias=True, residual=True))
    case = case_of((130, 2064, 1152), "f32_norm_ffma_sm80", weights=weights, bias=True, out_layout=UNALIGNED)
    check_qkv(TORCH_CUDA, case)


@pytest.mark.parametrize("tokens", FEW_TOKENS)
def test_every_tile_of_few_tokens(tokens):
    for outputs in FEW_OUTPUTS:
        check_qkv(TORCH_CUDA, case_of((tokens, 132, outputs), "f32_norm_few_sm80", bias=True, residual=True))
        check_qkv(TORCH_CUDA, case_of((tokens, 1100, outputs), "f32_norm_few_sm80", weights="tuple", rounding="fp32"))
    check_qkv(TORCH_CUDA, case_of((tokens, 2064, 1152), "f32_norm_few_sm80", bias=True, out_layout=UNALIGNED))


@pytest.mark.parametrize("row", ROWS)
def test_a_row_keeps_its_bits_among_any_number_of_rows(row):
    """Also without batch_invariant, as long as it is this kernel: hidden is never split."""
    dtype, hidden, outputs = usable(row), 1600, 4096
    x = normal((2500, hidden), dtype, "x", hidden)
    weights = [
        TORCH_CUDA.tensor(normal(shape, dtype, *shape, scale=0.02), dtype) for shape in ((hidden,), (outputs, hidden))
    ]

    def run(rows):
        tensor = TORCH_CUDA.tensor(rows, dtype)
        parts = minivllm.rms_norm_qkv(tensor, *weights, 40, 12, batch_invariant=True, kernel=row)
        return np.concatenate([to_float64(part).reshape(len(rows), -1) for part in parts], -1)

    whole = run(x)
    for first, last in ((0, 1), (7, 40), (0, 130), (1100, 1500), (0, 1000), (300, 2400)):
        assert_same_bits(run(x[first:last]), whole[first:last], f"rows {first} to {last}")
