"""The tolerance of "hf": it names the elements that float32 may round otherwise, and leaves no room for other roundings."""

import numpy as np
import pytest
from cases import normal

from minivllm.testing import numeric, reference
from minivllm.testing.reference import round_to

EPS = 1e-6


def inputs(dtype, hidden):
    return normal((512, hidden), dtype, "x", hidden), normal((hidden,), dtype, "w", hidden, mean=1.0, scale=0.1)


@pytest.mark.parametrize("hidden", [896, 5120])
@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_float32_moves_only_the_elements_that_are_named(dtype, hidden):
    x, gain = inputs(dtype, hidden)
    exact, _ = reference.rms_norm(x, gain, EPS, dtype=dtype)
    r = np.float32(1 / np.sqrt((x**2).mean(axis=-1, keepdims=True) + EPS))
    named = numeric.may_flip(x, gain, EPS, dtype)
    moved = np.zeros_like(named)
    for ulps in (-2, -1, 1, 2):  # what rsqrt may be off by
        inexact = (np.float32(x) * (r + ulps * np.spacing(r))).astype(np.float64)
        moved |= round_to(round_to(inexact, dtype) * gain, dtype) != exact
    assert moved.any() and not (moved & ~named).any()
    assert named.mean() < 0.01


@pytest.mark.parametrize("hidden", [896, 5120])
@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_the_other_rounding_is_outside(dtype, hidden):
    x, gain = inputs(dtype, hidden)
    weight = normal((64, hidden), dtype, "matrix", hidden, scale=hidden**-0.5)
    flips = numeric.may_flip(x, gain, EPS, dtype)
    options = {"eps": EPS, "dtype": dtype, "round_last": False}
    expected, y, _ = reference.rms_norm_qkv(x, gain, weight, **options)
    bound = numeric.tolerance(expected, y, dtype, weight=weight, length=hidden, gain=abs(gain), flips=flips)
    once, _, _ = reference.rms_norm_qkv(x, gain, weight, rounding="fp32", **options)
    numeric.assert_within(round_to(expected, dtype), expected, bound)
    with pytest.raises(AssertionError, match="are wrong"):
        numeric.assert_within(round_to(once, dtype), expected, bound)


@pytest.mark.gpu
def test_large_products_on_a_gpu(cuda_torch):
    """They are those of NumPy, whose sums have another order."""
    cuda_torch.cuda.init()
    a, weight = normal((1200, 1024), "f32", "a")[::-1], normal((1000, 1024), "f32", "weight")
    assert a.size * len(weight) >= reference.LARGE
    bound = 1024 * 2.0**-53 * (abs(a) @ abs(weight).T)
    cuda_torch.cuda.reset_peak_memory_stats()
    product = reference.times_rows(a, weight)
    assert cuda_torch.cuda.max_memory_allocated() >= a.nbytes + weight.nbytes, "it stayed on the CPU"
    numeric.assert_within(product, a @ weight.T, 2 * bound)
