"""More than 2^31 elements between the first and the last, and on the GPU more than 2^31 of them."""

import mmap
import os

import numpy as np
import pytest
from cases import assert_same_bits, normal
from checks import QKV, expect_qkv
from conftest import short_dtype
from frameworks import hopper_dtype

import minivllm
from minivllm.testing import numeric
from minivllm.testing.reference import to_float64

FAR = 2**31 + 4096 + 64  # elements between two rows
MAP_NORESERVE = 0x4000  # Linux; the mmap module names it from Python 3.13 on


def sparse_rows(rows, hidden, itemsize, dtype):
    """[rows, hidden] with FAR elements between rows, on pages that exist only where somebody writes."""
    memory = mmap.mmap(
        -1, ((rows - 1) * FAR + hidden) * itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    )
    return np.ndarray((rows, hidden), dtype, buffer=memory, strides=(FAR * itemsize, itemsize))


@pytest.mark.rows("rms_norm")
def test_rows_far_apart(kernel, framework):
    """The strided trick: three rows, 2^32 elements from the first to the last."""
    if framework.device == "cuda":
        if kernel.dtype in ("f32", "float32"):
            pytest.skip("float32 rows this far apart take 34 GB for x and out each; the 16-bit rows run the same code")
        torch = framework.torch
        kind = framework.dtype("f16" if "16" in kernel.name and "bf" not in kernel.name else "bf16")
        x = torch.empty_strided((2, 3, 100), (FAR, 100, 1), dtype=kind, device="cuda")
        out = torch.empty_strided((2, 3, 100), (FAR, 100, 1), dtype=kind, device="cuda")
        x.normal_()
        weight = torch.ones(100, dtype=kind, device="cuda")
        minivllm.rms_norm(x, weight, out=out, kernel=kernel.name)
        assert torch.equal(out, minivllm.rms_norm(x.contiguous(), weight, kernel=kernel.name))
        return
    dtype = framework.dtype({"float32": "f32", "float16": "f16", "bfloat16": "bf16"}.get(kernel.dtype, kernel.dtype))
    x, out = (sparse_rows(3, 100, dtype.itemsize, dtype) for _ in range(2))
    x[...] = normal((3, 100), "bf16", "far").astype(dtype)
    weight = np.ones(100, dtype)
    minivllm.rms_norm(x, weight, out=out, kernel=kernel.name)
    assert_same_bits(out, minivllm.rms_norm(np.ascontiguousarray(x), weight, kernel=kernel.name))


def test_projection_of_rows_far_apart():
    """x, out, and the rows of the weight, each more than 2^31 elements long, on the CPU."""
    x, out, matrix = (sparse_rows(rows, columns, 4, np.float32) for rows, columns in ((3, 64), (3, 5), (5, 64)))
    case = QKV((3,), 64, 3, 1, 1, "f32")
    values, weights = normal((3, 64), "f32", "x"), normal((5, 64), "f32", "w", scale=0.02)
    x[...], matrix[...] = values, weights
    for rows in (slice(0, 1), slice(0, 3)):
        minivllm.rms_norm_qkv(x[rows], np.ones(64, np.float32), matrix, 3, 1, out=out[rows])
        expect_qkv(case, to_float64(out[rows]), values[rows], np.ones(64), weights, None)


RUN = 16384  # columns whose squares a CPU kernel adds in float32; the sums of such runs are added in double
LONG_ROWS = [2**25 + 5, pytest.param(2**31 + 5, marks=pytest.mark.slow)]


@pytest.mark.parametrize("hidden", LONG_ROWS)
@pytest.mark.rows("rms_norm", "cpu")
def test_the_mean_square_of_a_long_row(kernel, framework, hidden):
    """Of equal numbers, whose sum a float32 stops taking in at 2^24, and of normal ones; in place, it is a lot."""
    dtype = framework.dtype(short_dtype(kernel.dtype))
    if 2 * hidden * dtype.itemsize > 0.6 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
        pytest.skip("needs memory for two such rows")
    weight = np.ones(hidden, dtype)
    pattern = normal((1 << 16,), short_dtype(kernel.dtype), "pattern")
    repeats, rest = divmod(hidden, pattern.size)
    for values in (np.ones_like(pattern), pattern):
        square = (repeats * (values**2).sum() + (values[:rest] ** 2).sum()) / hidden
        x = np.empty((1, hidden), dtype)
        x[0, : repeats * values.size].reshape(repeats, -1)[...] = values.astype(dtype)
        x[0, repeats * values.size :] = values[:rest].astype(dtype)
        minivllm.rms_norm(x, weight, out=x, rounding="fp32", kernel=kernel.name)
        expected = values / np.sqrt(square + 1e-6)
        bound = numeric.tolerance(expected, expected, short_dtype(kernel.dtype), length=RUN)
        for first in (0, repeats // 2, repeats - 1):
            got = to_float64(x[0, first * values.size :][: values.size])
            numeric.assert_within(got, expected, bound, f"{hidden} columns, from {first * values.size} on")


@pytest.mark.rows("rms_norm_qkv", "cpu")
def test_the_products_of_a_long_row(kernel, framework):
    """A sum that grows and grows: of equal products, where each one that is rounded is rounded the same way."""
    short, hidden = short_dtype(kernel.dtype), 2**21 + 5
    dtype = framework.dtype(short)
    x, norm_weight = np.ones((1, hidden), dtype), np.ones(hidden, dtype)
    matrix = np.full((3, hidden), 0.02).astype(dtype)
    expected = np.full((1, 3, 1), hidden * to_float64(matrix)[0, 0])
    assert expected.max() < 65504  # the largest float16
    got = np.concatenate(minivllm.rms_norm_qkv(x, norm_weight, matrix, 1, 1, eps=0.0, kernel=kernel.name), 1)
    chain = 64 + RUN // 64 if short == "f32" else 2048 + 64  # float32 additions in a row: a lane's, then a run's
    bound = numeric.quantum(expected, short) / 2 + chain * numeric.UNIT_F32 * expected
    numeric.assert_within(to_float64(got), expected, bound)


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements(cuda_torch):
    """One truly large norm: 525,000 rows of 4096, in and out."""
    torch = cuda_torch
    rows, hidden = 525_000, 4096
    x = torch.empty(rows, hidden, dtype=torch.bfloat16, device="cuda").normal_()
    weight = torch.ones(hidden, dtype=torch.bfloat16, device="cuda")
    assert x.numel() > 2**31
    out = minivllm.rms_norm(x, weight)
    for start in (0, 2**31 // hidden - 3, rows - 5):
        piece = minivllm.rms_norm(x[start : start + 5], weight)
        assert torch.equal(out[start : start + 5], piece), f"row {start}"
    # every row: the mean square of a normed row is 1
    for chunk in out.split(65536):
        squares = chunk.float().square().mean(-1)
        assert (squares - 1).abs().max().item() < 0.02


@pytest.mark.gpu
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_a_large_projection(cuda_torch, batch_invariant):
    """More than 2^31 outputs: 2,100,000 tokens x 1,024."""
    torch = cuda_torch
    tokens, hidden = 2_100_000, 128
    x = torch.empty(tokens, hidden, dtype=torch.bfloat16, device="cuda").normal_()
    norm_weight = torch.ones(hidden, dtype=torch.bfloat16, device="cuda")
    matrix = torch.empty(1024, hidden, dtype=torch.bfloat16, device="cuda").normal_(std=0.02)
    out = torch.empty(tokens, 1024, dtype=torch.bfloat16, device="cuda")
    minivllm.rms_norm_qkv(x, norm_weight, matrix, 4, 2, out=out, batch_invariant=batch_invariant)
    normed = minivllm.rms_norm(x, norm_weight)
    for start in (0, 2**31 // 1024 - 64, tokens - 128):
        exact = normed[start : start + 128].double() @ matrix.double().T
        assert (out[start : start + 128].double() - exact).abs().max().item() < 0.02, f"token {start}"


@pytest.mark.gpu
def test_a_projection_of_tokens_far_apart(cuda_torch):
    torch = cuda_torch
    x = torch.empty_strided((2, 3, 128), (FAR, 128, 1), dtype=torch.bfloat16, device="cuda").normal_()
    out = torch.empty_strided((2, 3, 40), (FAR, 40, 1), dtype=torch.bfloat16, device="cuda")
    norm_weight = torch.ones(128, dtype=torch.bfloat16, device="cuda")
    matrix = torch.empty(40, 128, dtype=torch.bfloat16, device="cuda").normal_(std=0.02)
    for row in (
        row
        for row in minivllm.kernels("rms_norm_qkv")
        if row.usable and row.name.startswith("bf16") and row.isa.startswith("sm")
    ):
        try:
            minivllm.rms_norm_qkv(x, norm_weight, matrix, 3, 1, out=out, kernel=row.name)
        except ValueError as error:
            assert "cannot serve this call" in str(error)
            continue
        near = minivllm.rms_norm_qkv(x.contiguous(), norm_weight, matrix, 3, 1, kernel=row.name)
        assert torch.equal(out.reshape(2, 3, 5, 8)[..., :3, :], near[0]), row.name


@pytest.mark.gpu
def test_rows_far_apart_with_a_late_row_factor(cuda_torch):
    """Its tensor copies take x where it lies, and write out where that lies."""
    hopper_dtype("bf16", "wgmma_sm90a")
    torch = cuda_torch
    x = torch.empty_strided((2, 128), (FAR, 1), dtype=torch.bfloat16, device="cuda").normal_()
    out = torch.empty_strided((2, 40), (FAR, 1), dtype=torch.bfloat16, device="cuda")
    norm_weight = torch.ones(128, dtype=torch.bfloat16, device="cuda")
    matrix = torch.empty(40, 128, dtype=torch.bfloat16, device="cuda").normal_(std=0.02)
    options = {"rounding": "fp32", "kernel": "bf16_wgmma_sm90a"}
    minivllm.rms_norm_qkv(x, norm_weight, matrix, 3, 1, out=out, **options)
    near = minivllm.rms_norm_qkv(x.contiguous(), norm_weight, matrix, 3, 1, **options)
    assert torch.equal(out, torch.cat([part.flatten(1) for part in near], 1))
