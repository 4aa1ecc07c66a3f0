"""The tensor core projection of Hopper over many tokens: every tile, several waves of them, clusters, blocks of a tuple."""

import numpy as np
import pytest
from cases import UNALIGNED, assert_same_bits, normal
from checks import QKV, check_qkv
from frameworks import TORCH_CUDA, hopper_dtype

import minivllm
from minivllm.testing.reference import to_float64

pytestmark = pytest.mark.gpu

# tokens, hidden, outputs: 64 tokens high; tiles of 64, 96, 128, 192, 224, 256 outputs; 160, four waves of them; nine waves;
# clusters
SHAPES = ((50, 200, 4096), (130, 200, 4096), (300, 200, 4096), (500, 136, 4096), (500, 128, 6144), (512, 128, 7168), (1000, 64, 4096),
          (1000, 64, 10240), (4300, 64, 6144), (4300, 64, 5632))  # fmt: skip

# the same, where spare warps normalise the rows of later tiles: 4, 2, 1 row at a time, and a row in two rounds
MEANWHILE = ((2048, 1024, 4096), (1300, 1280, 6144), (1100, 2560, 3840), (1100, 4104, 3840))


@pytest.fixture(params=["f16", "bf16"])
def dtype(request):
    return hopper_dtype(request.param, "norm_wgmma_sm90a")


def case_of(tokens, hidden, outputs, dtype, **options):
    heads = outputs // 64
    return QKV((tokens,), hidden, heads - 2 * (heads // 6), heads // 6, 64, dtype,
               kernel=f"{dtype}_norm_wgmma_sm90a", **options)  # fmt: skip


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


@pytest.mark.parametrize("weights", ["tuple", "packed_t", "in_out"])
def test_every_layout_of_many_tokens(dtype, weights):
    for tokens, outputs in ((700, 3840), (4300, 5632)):
        check_qkv(TORCH_CUDA, case_of(tokens, 72, outputs, dtype, weights=weights, bias=True, residual=True))
    check_qkv(TORCH_CUDA, case_of(700, 72, 3840, dtype, weights=weights, bias=True, out_layout=UNALIGNED))


def test_a_row_keeps_its_bits_among_any_number_of_rows(dtype):
    """Also without batch_invariant, as long as it is this kernel: hidden is never split."""
    hidden, outputs = 1024, 4096
    x = normal((2500, hidden), dtype, "x", hidden)
    weights = [
        TORCH_CUDA.tensor(normal(shape, dtype, *shape, scale=0.02), dtype) for shape in ((hidden,), (outputs, hidden))
    ]

    def run(rows):
        parts = minivllm.rms_norm_qkv(TORCH_CUDA.tensor(rows, dtype), *weights, 40, 12, batch_invariant=True)
        assert minivllm.last_kernel().name == f"{dtype}_norm_wgmma_sm90a"
        return np.concatenate([to_float64(part).reshape(len(rows), -1) for part in parts], -1)

    whole = run(x)
    for first, last in ((0, 1), (7, 40), (0, 130), (1100, 1500), (0, 1000), (300, 2400)):
        assert_same_bits(run(x[first:last]), whole[first:last], f"rows {first} to {last}")
