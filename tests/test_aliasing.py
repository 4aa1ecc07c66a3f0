"""Which tensors may share memory: the matrix of the contract, and the overlap test against NumPy's exact one."""

import numpy as np
import pytest
from cases import CANARY, PADDED, Placed, assert_same_bits, normal
from conftest import short_dtype
from frameworks import NUMPY
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import minivllm
from minivllm.testing.reference import to_float64

SHAPE = (6, 40)
X, RESIDUAL = normal(SHAPE, "f32", "x"), normal(SHAPE, "f32", "residual")
WEIGHT = normal((40,), "f32", "weight", mean=1.0)


def expected(framework):
    out, sums = minivllm.add_rms_norm(*(framework.tensor(values, "f32") for values in (X, RESIDUAL, WEIGHT)))
    return to_float64(out), to_float64(sums)


@pytest.mark.parametrize("layout", [PADDED, None], ids=["padded", "contiguous"])
@pytest.mark.parametrize("out_is", ["fresh", "x", "residual"])
@pytest.mark.parametrize("sums_are", ["fresh", "x", "residual"])
def test_each_output_may_be_exactly_an_input(device, framework, out_is, sums_are, layout):
    options = {"layout": layout} if layout else {}
    x = Placed(framework, SHAPE, "f32", values=X, **options)
    residual = Placed(framework, SHAPE, "f32", values=RESIDUAL, **options)
    tensors = {"fresh": None, "x": x.tensor, "residual": residual.tensor}
    arguments = (x.tensor, residual.tensor, framework.tensor(WEIGHT, "f32"))
    if out_is == sums_are != "fresh":
        with pytest.raises(ValueError, match=r"add_rms_norm: out overlaps residual_out"):
            minivllm.add_rms_norm(*arguments, out=tensors[out_is], residual_out=tensors[sums_are])
        assert_same_bits(x.tensor, X), assert_same_bits(residual.tensor, RESIDUAL)
        return
    right = expected(framework)
    out, sums = minivllm.add_rms_norm(*arguments, out=tensors[out_is], residual_out=tensors[sums_are])
    framework.synchronize()
    assert_same_bits(out, right[0], "out")
    assert_same_bits(sums, right[1], "residual_out")
    x.check_canaries("x"), residual.check_canaries("residual")
    if "x" not in (out_is, sums_are):
        assert_same_bits(x.tensor, X, "x")
    if "residual" not in (out_is, sums_are):
        assert_same_bits(residual.tensor, RESIDUAL, "residual")


@pytest.mark.rows("rms_norm")
def test_every_kernel_works_in_place(kernel, framework):
    dtype = short_dtype(kernel.dtype)
    for shape in ((3, 33), (5, 1024), (2, 9000)):
        x, residual, weight = normal(shape, dtype, "x"), normal(shape, dtype, "r"), normal(shape[-1:], dtype, "w")
        right = minivllm.add_rms_norm(*(framework.tensor(t, dtype) for t in (x, residual, weight)), kernel=kernel.name)
        for swapped in (False, True):
            a, b = framework.tensor(x, dtype), framework.tensor(residual, dtype)
            outputs = {"out": b, "residual_out": a} if swapped else {"out": a, "residual_out": b}
            minivllm.add_rms_norm(a, b, framework.tensor(weight, dtype), **outputs, kernel=kernel.name)
            framework.synchronize()
            assert_same_bits(outputs["out"], right[0], "out")
            assert_same_bits(outputs["residual_out"], right[1], "residual_out")
        a = framework.tensor(x, dtype)
        alone = minivllm.rms_norm(framework.tensor(x, dtype), framework.tensor(weight, dtype), kernel=kernel.name)
        assert minivllm.rms_norm(a, framework.tensor(weight, dtype), out=a, kernel=kernel.name) is a
        assert_same_bits(a, alone)


def test_x_may_be_the_residual(device, framework):
    x = framework.tensor(X, "f32")
    out, sums = minivllm.add_rms_norm(x, x, framework.tensor(WEIGHT, "f32"))
    assert_same_bits(sums, 2 * X)
    assert_same_bits(out, minivllm.rms_norm(sums, framework.tensor(WEIGHT, "f32")))


def overlapping_outputs(framework, buffer):
    """Outputs that touch x = buffer[1:7, :40] without being it."""
    yield "one row up", buffer[0:6, :40]
    yield "one row down", buffer[2:8, :40]
    yield "one column right", buffer[1:7, 1:41]
    yield "the last element only", framework.strided(buffer.reshape(-1), (6, 40), (48, 1), 6 * 48 + 39)
    yield "the same start, other strides", framework.strided(buffer.reshape(-1), (6, 40), (96, 1), 48)


def test_partial_overlap_is_refused_and_nothing_written(device, framework):
    cases = len(list(overlapping_outputs(framework, framework.full((13, 48), 0.0, "f32"))))
    for i in range(cases):
        buffer = framework.full((13, 48), CANARY, "f32")
        x = buffer[1:7, :40]
        x[...] = framework.tensor(X, "f32")
        before = to_float64(buffer)
        what, out = list(overlapping_outputs(framework, buffer))[i]
        residual, weight = framework.tensor(RESIDUAL, "f32"), framework.tensor(WEIGHT, "f32")
        with pytest.raises(ValueError, match=r"rms_norm: out overlaps x in part"):
            minivllm.rms_norm(x, weight, out=out)
        with pytest.raises(ValueError, match=r"add_rms_norm: residual_out overlaps residual in part"):
            minivllm.add_rms_norm(residual, x, weight, residual_out=out)
        assert_same_bits(buffer, before, f"{what}: the buffer after the refusal")


def test_an_output_over_a_weight_is_refused(device, framework):
    buffer = framework.full((7, 40), 1.0, "f32")
    x = framework.tensor(X, "f32")
    for out in (buffer[:6], buffer[1:]):
        with pytest.raises(ValueError, match=r"rms_norm: out overlaps weight"):
            minivllm.rms_norm(x, buffer[3], out=out)
        with pytest.raises(ValueError, match=r"add_rms_norm: residual_out overlaps weight"):
            minivllm.add_rms_norm(x, framework.tensor(RESIDUAL, "f32"), buffer[3], residual_out=out)
    assert (to_float64(buffer) == 1).all()


def test_disjoint_slices_of_one_buffer(device, framework):
    """Columns beside each other, and rows between each other."""
    right = expected(framework)
    weight = framework.tensor(WEIGHT, "f32")
    wide = framework.full((6, 160), CANARY, "f32")
    columns = [wide[:, 40 * i : 40 * i + 40] for i in range(4)]
    tall = framework.full((24, 40), CANARY, "f32")
    rows = [tall[i::4] for i in range(4)]
    for x, residual, out, sums in (columns, rows):
        x[...], residual[...] = framework.tensor(X, "f32"), framework.tensor(RESIDUAL, "f32")
        minivllm.add_rms_norm(x, residual, weight, out=out, residual_out=sums)
        framework.synchronize()
        assert_same_bits(out, right[0])
        assert_same_bits(sums, right[1])
        assert_same_bits(x, X), assert_same_bits(residual, RESIDUAL)


def qkv_arguments(framework, as_tuple):
    weight, bias = normal((32, 40), "f32", "qkv"), normal((32,), "f32", "bias")
    tensors = {"x": X, "norm_weight": WEIGHT, "residual": RESIDUAL}
    if as_tuple:
        ends = (16, 24)
        tensors |= {f"qkv_weight[{i}]": part for i, part in enumerate(np.split(weight, ends))}
        tensors |= {f"bias[{i}]": part for i, part in enumerate(np.split(bias, ends))}
    else:
        tensors |= {"qkv_weight": weight, "bias": bias}
    return {name: framework.tensor(values, "f32") for name, values in tensors.items()}


def call_qkv(tensors, as_tuple, **outputs):
    weight = tuple(tensors[f"qkv_weight[{i}]"] for i in range(3)) if as_tuple else tensors["qkv_weight"]
    bias = tuple(tensors[f"bias[{i}]"] for i in range(3)) if as_tuple else tensors["bias"]
    return minivllm.rms_norm_qkv(
        tensors["x"], tensors["norm_weight"], weight, 2, 1, bias=bias, residual=tensors["residual"], **outputs
    )


@pytest.mark.parametrize("as_tuple", [False, True], ids=["packed", "tuple"])
@pytest.mark.parametrize("output", ["out", "residual_out"])
def test_no_output_of_the_projection_may_touch_an_input(device, framework, output, as_tuple):
    columns = 32 if output == "out" else 40
    names = list(qkv_arguments(framework, as_tuple))
    for name in names:
        tensors = qkv_arguments(framework, as_tuple)
        buffer, base = framework.full((2400,), 0.0, "f32"), 400
        original = tensors[name]
        size = int(np.prod(original.shape))
        inside = buffer[base : base + size].reshape(original.shape)
        inside[...] = original
        tensors[name] = inside
        before = to_float64(buffer)
        # the output ends on the input's first element, or begins on its last
        for start in (base + 1 - 6 * columns, base + size - 1):
            outputs = {output: buffer[start : start + 6 * columns].reshape(6, columns)}
            with pytest.raises(ValueError, match=rf"rms_norm_qkv: {output} overlaps {name}".replace("[", r"\[")):
                call_qkv(tensors, as_tuple, **outputs)
        assert_same_bits(buffer, before)


def test_outputs_of_the_projection_may_not_touch_each_other(device, framework):
    tensors = qkv_arguments(framework, False)
    buffer = framework.full((1000,), 0.0, "f32")
    with pytest.raises(ValueError, match=r"rms_norm_qkv: (out overlaps residual_out|residual_out overlaps out)"):
        call_qkv(tensors, False, out=buffer[:192].reshape(6, 32), residual_out=buffer[191:431].reshape(6, 40))
    with pytest.raises(ValueError, match=r"rms_norm_qkv: residual_out overlaps residual;"):
        call_qkv(tensors, False, residual_out=tensors["residual"])


def test_the_projection_between_slices_of_one_buffer(device, framework):
    tensors = qkv_arguments(framework, False)
    fresh = call_qkv(tensors, False)
    buffer = framework.full((6, 40 + 32 + 40 + 40), CANARY, "f32")
    x, out, residual, sums = buffer[:, :40], buffer[:, 40:72], buffer[:, 72:112], buffer[:, 112:]
    x[...], residual[...] = tensors["x"], tensors["residual"]
    got = call_qkv(tensors | {"x": x, "residual": residual}, False, out=out, residual_out=sums)
    framework.synchronize()
    for a, b in zip(got, fresh):
        assert_same_bits(a, b)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    rows=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    hidden=st.integers(1, 6),
    strides=st.tuples(*[st.integers(0, 24)] * 4),
    offsets=st.tuples(st.integers(0, 60), st.integers(0, 60)),
)
def test_overlap_is_found_exactly(rows, hidden, strides, offsets):
    """Against numpy.shares_memory, which decides exactly."""
    buffer = NUMPY.full((256,), 1.0, "f32")
    x = NUMPY.strided(buffer, (*rows, hidden), (strides[0], strides[1], 1), offsets[0])
    out = NUMPY.strided(buffer, (*rows, hidden), (strides[2], strides[3], 1), offsets[1])
    places = NUMPY.strided(np.arange(256.0), (*rows, hidden), (strides[2], strides[3], 1), offsets[1])
    distinct = len(np.unique(places)) == places.size
    shared = np.shares_memory(x, out)
    same = offsets[0] == offsets[1] and all(a == b or n == 1 for a, b, n in zip(strides[:2], strides[2:], rows))
    weight = NUMPY.full((hidden,), 1.0, "f32")
    nested = all(
        sorted(pair)[0] >= hidden and sorted(pair)[1] % sorted(pair)[0] == 0 for pair in (strides[:2], strides[2:])
    )  # every stride a multiple of the next: any layout a framework makes by slicing
    if not distinct:
        with pytest.raises(ValueError, match="out (has elements that share memory|overlaps x)"):
            minivllm.rms_norm(x, weight, out=out)
    elif shared and not same:
        with pytest.raises(ValueError, match="out overlaps x in part|out has elements that share memory"):
            minivllm.rms_norm(x, weight, out=out)
    else:
        assume(nested)
        minivllm.rms_norm(x, weight, out=out)


def test_an_op_in_place_names_what_it_was_given():
    x, weight = np.ones((3, 8), np.float32), np.ones(8, np.float32)
    with pytest.raises(ValueError, match=r"fused_add_rms_norm: x overlaps residual; pass memory of its own"):
        minivllm.fused_add_rms_norm(x, x, weight)
    with pytest.raises(ValueError, match=r"fused_add_rms_norm: x overlaps weight; pass memory of its own"):
        minivllm.fused_add_rms_norm(weight[None], x[:1], weight)
