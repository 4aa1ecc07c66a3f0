"""Bit for bit: run to run, row by row, and over token counts where the contract promises it."""

import itertools

import numpy as np
import pytest
from cases import LAYOUTS, Layout, Placed, assert_same_bits, normal
from conftest import head_dim_for, roundings_of, short_dtype
from frameworks import NUMPY

import minivllm
from minivllm.testing.reference import to_float64

HIDDEN = (33, 1024, 5000)


def norm_inputs(dtype, rows, hidden):
    return (
        normal((rows, hidden), dtype, "rows", hidden),
        normal((rows, hidden), dtype, "residual", hidden),
        normal((hidden,), dtype, "w", hidden),
    )


@pytest.mark.rows("rms_norm")
def test_norm_rows_do_not_depend_on_each_other(kernel, framework):
    """A row's bits are the same alone, among others, permuted, unaligned, strided, and every time."""
    dtype = short_dtype(kernel.dtype)
    for hidden in HIDDEN:
        x, residual, weight = norm_inputs(dtype, 37, hidden)
        fixed = framework.tensor(weight, dtype)

        def run(rows, residual_rows):
            return to_float64(minivllm.add_rms_norm(rows, residual_rows, fixed, kernel=kernel.name)[0])

        whole = run(framework.tensor(x, dtype), framework.tensor(residual, dtype))
        assert_same_bits(run(framework.tensor(x, dtype), framework.tensor(residual, dtype)), whole, "the same again")
        for count in (1, 2, 36):
            assert_same_bits(
                run(framework.tensor(x[:count], dtype), framework.tensor(residual[:count], dtype)),
                whole[:count],
                f"{count} rows",
            )
        order = np.arange(37)[::-1]
        assert_same_bits(
            run(framework.tensor(x[order], dtype), framework.tensor(residual[order], dtype)), whole[order], "permuted"
        )
        for layout in LAYOUTS:
            placed = Placed(framework, x.shape, dtype, layout, x)
            assert_same_bits(run(placed.tensor, framework.tensor(residual, dtype)), whole, layout.name)


@pytest.mark.rows("rms_norm")
def test_norm_rows_among_thousands(kernel, framework):
    """Where a GPU gives a row to fewer threads, these add in the order of many."""
    dtype = short_dtype(kernel.dtype)
    hidden = 512 if dtype == "f32" else 1024
    x, residual, weight = norm_inputs(dtype, 37, hidden)
    fixed = framework.tensor(weight, dtype)

    def run(repeats):
        rows = (framework.tensor(np.tile(a, (repeats, 1)), dtype) for a in (x, residual))
        return to_float64(minivllm.add_rms_norm(*rows, fixed, kernel=kernel.name)[0])

    assert_same_bits(run(100), np.tile(run(1), (100, 1)), "3,700 rows")


def projection(framework, dtype, hidden, rows, seed=0, head_dim=24):
    x = framework.tensor(normal((rows, hidden), dtype, "x", hidden, seed), dtype)
    weights = (
        framework.tensor(normal((hidden,), dtype, "norm", hidden, mean=1.0), dtype),
        framework.tensor(normal((5 * head_dim, hidden), dtype, "matrix", hidden, scale=0.02), dtype),
    )
    return x, weights


def packed(parts):
    return np.concatenate([to_float64(part).reshape(part.shape[0], -1) for part in parts], -1)


@pytest.mark.rows("rms_norm_qkv")
def test_the_projection_is_the_same_every_time(kernel, framework):
    dtype = short_dtype(kernel.dtype)
    for hidden in (128, 1024):
        for rows in (1, 4, 50):
            x, weights = projection(framework, dtype, hidden, rows, head_dim=head_dim_for(kernel, 24))

            def run(x=x, weights=weights):
                rounding = roundings_of(kernel)[0]
                return packed(minivllm.rms_norm_qkv(x, *weights, 3, 1, rounding=rounding, kernel=kernel.name))

            try:
                first = run()
            except ValueError as error:
                assert "cannot serve this call" in str(error)
                continue
            for _ in range(5):
                assert_same_bits(run(), first)


@pytest.mark.rows("rms_norm_qkv")
def test_batch_invariant_kernels(kernel, framework):
    """A kernel that serves batch_invariant=True gives a row the same bits among any number of rows; the others refuse."""
    dtype = short_dtype(kernel.dtype)
    serves = False
    for hidden in (128, 1000, 1024):
        x, weights = projection(framework, dtype, hidden, 300)

        def run(rows, weights=weights):
            return packed(minivllm.rms_norm_qkv(rows, *weights, 3, 1, batch_invariant=True, kernel=kernel.name))

        try:
            whole = run(x)
        except ValueError as error:
            assert "cannot serve this call: it is not batch invariant" in str(error) or "mma" in kernel.name
            continue
        serves = True
        for count in (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 200, 256):
            assert_same_bits(run(x[:count]), whole[:count], f"{count} of 300 rows at {hidden}")
            assert_same_bits(run(x[300 - count :]), whole[300 - count :], f"the last {count} of 300 rows at {hidden}")
    assert serves == ("prefill" in kernel.name or "_norm_" in kernel.name)


@pytest.mark.parametrize("rounding", ["hf", "fp32"])
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_batch_invariant_calls(device, framework, dtype, rounding):
    """The promise is about calls, whatever kernel they choose: 1 to 700 tokens, several layouts of the weight."""
    if reason := framework.why_not(dtype):
        pytest.skip(reason)
    for hidden in (40, 896, 1024):
        x, (norm_weight, matrix) = projection(framework, dtype, hidden, 700)
        bias = framework.tensor(normal((120,), dtype, "bias"), dtype)
        slices = (matrix[:72], matrix[72:96], matrix[96:])
        for weight in (matrix, matrix.T, slices):

            def run(rows, weight=weight, norm_weight=norm_weight, bias=bias):
                return packed(
                    minivllm.rms_norm_qkv(
                        rows,
                        norm_weight,
                        weight,
                        3,
                        1,
                        bias=bias,
                        rounding=rounding,
                        batch_invariant=True,
                        weight_layout="auto",
                    )
                )

            whole = run(x)
            for count in (1, 2, 5, 16, 40, 129, 512):
                assert_same_bits(
                    run(x[count : 2 * count] if count < 350 else x[:count]),
                    whole[count : 2 * count] if count < 350 else whole[:count],
                    f"{count} rows",
                )


def ordered(name, order):
    """A layout whose leading dimensions lie in memory in this order, the outermost first."""

    def strides(shape):
        result, step = [0] * (len(shape) - 1) + [1], shape[-1]
        for d in reversed(order):
            result[d], step = step, step * shape[d]
        return tuple(result)

    return Layout(name, strides)


ORDERS = [ordered(f"order {order}", order) for order in itertools.permutations(range(3))]
CPU_ROWS = [row for row in minivllm.kernels("rms_norm_qkv") if row.usable and not row.isa.startswith("sm")]


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_strides_change_no_bits(dtype, batch_invariant):
    """On the CPU: one result for every layout of x, residual and out, though some fall into pieces of a few tokens,
    which alone would go to another kernel; whether a kernel is forced or not."""
    if reason := NUMPY.why_not(dtype):
        pytest.skip(reason)
    lead, hidden = (8, 2, 2), 383
    _, weights = projection(NUMPY, dtype, hidden, 1)
    x, residual = (normal((*lead, hidden), dtype, name) for name in ("x", "residual"))
    served = [row.name for row in CPU_ROWS if short_dtype(row.dtype) == dtype]
    if batch_invariant:
        served = [name for name in served if "prefill" in name]
    for kernel in (None, *served):
        results = set()
        for layouts in itertools.product(ORDERS, ORDERS[::2], ORDERS):
            placed = [Placed(NUMPY, (*lead, hidden), dtype, layout, a) for layout, a in zip(layouts, (x, residual))]
            out = Placed(NUMPY, (*lead, 120), dtype, layouts[2])
            minivllm.rms_norm_qkv(
                placed[0].tensor, *weights, 3, 1, residual=placed[1].tensor, out=out.tensor,
                batch_invariant=batch_invariant, kernel=kernel,
            )  # fmt: skip
            results.add(out.values().tobytes())
        assert len(results) == 1, f"{len(results)} results by the strides, kernel={kernel}"


def test_threads_change_no_bits():
    """On the CPU, whatever the number of threads."""
    before = minivllm.get_num_threads()
    try:
        for dtype in ("f32", "f16"):
            x, weights = projection(NUMPY, dtype, 1024, 70)
            norms, batches = [], []
            for threads in (1, 2, 3, 8):
                minivllm.set_num_threads(threads)
                norms.append(to_float64(minivllm.rms_norm(x, weights[0])))
                batches.append([packed(minivllm.rms_norm_qkv(x[:count], *weights, 3, 1)) for count in (1, 5, 70)])
            for norm, batch in zip(norms[1:], batches[1:]):
                assert_same_bits(norm, norms[0])
                for got, first in zip(batch, batches[0]):
                    assert_same_bits(got, first)
    finally:
        minivllm.set_num_threads(before)
