"""rms_norm and add_rms_norm: every kernel x shapes x dtypes x layouts, against float64."""

import itertools

import numpy as np
import pytest
from cases import CANARY, CONTIGUOUS, LAYOUTS, REVERSED, UNALIGNED, Layout, Placed, assert_same_bits, normal
from checks import Norm, check_norm
from conftest import short_dtype
from frameworks import NUMPY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import minivllm
from minivllm.testing import shapes
from minivllm.testing.reference import rms_norm as reference_norm
from minivllm.testing.reference import round_to, to_float64

ALL_NORMS = shapes.NORM_EDGES + tuple(
    shapes.NormShape(model.name, 3, model.hidden, model.reason) for model in shapes.MODELS
)


@pytest.mark.rows("rms_norm")
@pytest.mark.parametrize("shape", ALL_NORMS, ids=lambda shape: shape.name)
def test_every_kernel_at_every_shape(kernel, framework, shape):
    dtype = short_dtype(kernel.dtype)
    for rounding, residual, weight_dtype in itertools.product(("hf", "fp32"), (False, True), {dtype, "f32"}):
        check_norm(
            framework,
            Norm(
                (shape.tokens, shape.hidden),
                dtype,
                weight_dtype,
                residual,
                rounding,
                weight_offset=1.0 if residual else 0.0,
                kernel=kernel.name,
            ),
        )
        assert minivllm.last_kernel().name == kernel.name


@pytest.mark.rows("rms_norm")
@pytest.mark.parametrize("x_layout", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("hidden", [33, 40, 1024])
def test_every_layout(kernel, framework, hidden, x_layout):
    dtype = short_dtype(kernel.dtype)
    for residual_layout, out_layout in itertools.product((None, *LAYOUTS), (*LAYOUTS, None)):
        check_norm(
            framework,
            Norm(
                (2, 3, hidden),
                dtype,
                residual=residual_layout is not None,
                kernel=kernel.name,
                x_layout=x_layout,
                residual_layout=residual_layout or CONTIGUOUS,
                out_layout=out_layout,
                weight_layout=UNALIGNED if out_layout is UNALIGNED else CONTIGUOUS,
            ),
        )


@pytest.mark.rows("rms_norm")
def test_leading_dimensions_that_nothing_merges(kernel, framework):
    dtype = short_dtype(kernel.dtype)
    strange = Layout("strange", lambda shape: (48, 2 * 48 + 1, 9 * 48, 1))
    check_norm(framework, Norm((2, 3, 4, 48), dtype, kernel=kernel.name, x_layout=strange, residual=True))
    check_norm(framework, Norm((2, 1, 3, 1, 4, 40), dtype, kernel=kernel.name, out_layout=None))
    check_norm(framework, Norm((40,), dtype, kernel=kernel.name))


@pytest.mark.rows("rms_norm")
def test_heads_of_a_packed_buffer(kernel, framework):
    """A q view of a packed [tokens, qkv] buffer goes straight into a per-head norm."""
    dtype = short_dtype(kernel.dtype)
    heads_of_packed = Layout("q view", lambda shape: (7 * shape[-1], shape[-1], 1))
    for head_dim in (64, 128, 24):
        check_norm(framework, Norm((5, 4, head_dim), dtype, kernel=kernel.name, x_layout=heads_of_packed))


@pytest.mark.rows("rms_norm")
@pytest.mark.parametrize("hidden", [5, 128, 1100])
def test_nan_and_infinity_stay_in_their_row(kernel, framework, hidden):
    dtype = short_dtype(kernel.dtype)
    x = normal((6, hidden), dtype, "nan", hidden)
    weight = framework.tensor(normal((hidden,), dtype, "w", hidden, mean=1.0), dtype)
    clean = to_float64(minivllm.rms_norm(framework.tensor(x, dtype), weight, kernel=kernel.name))
    x[1, hidden // 2], x[3, 0], x[4, hidden - 1] = np.nan, np.inf, -np.inf
    got = to_float64(minivllm.rms_norm(framework.tensor(x, dtype), weight, kernel=kernel.name))
    assert_same_bits(got[[0, 2, 5]], clean[[0, 2, 5]], "rows beside the bad ones")
    assert np.isnan(got[1]).all()
    for row, place in ((3, 0), (4, hidden - 1)):  # r = 1 / inf = 0: the infinity becomes NaN, the rest zero
        assert np.isnan(got[row, place])
        assert (np.delete(got[row], place) == 0).all()


@pytest.mark.rows("rms_norm")
def test_zeros_and_eps(kernel, framework):
    dtype = short_dtype(kernel.dtype)
    weight = framework.full((64,), 1.0, dtype)
    assert (to_float64(minivllm.rms_norm(framework.full((2, 64), 0.0, dtype), weight, kernel=kernel.name)) == 0).all()
    nothing = minivllm.rms_norm(framework.full((2, 64), 0.0, dtype), weight, 0.0, kernel=kernel.name)
    assert np.isnan(to_float64(nothing)).all()  # 0 * (1 / 0)
    for eps in (0.0, 1e-12, 1e-5, 1.0):
        check_norm(framework, Norm((3, 100), dtype, eps=eps, kernel=kernel.name))


@pytest.mark.rows("rms_norm")
def test_weight_offset_is_added_in_float32(kernel, framework):
    """Gemma's 1 + w: for w = 2^-9 the sum is 1 in bfloat16 and 1.001953125 in float32."""
    dtype = short_dtype(kernel.dtype)
    got = minivllm.rms_norm(
        framework.tensor(np.full((1, 256), 1000.0), dtype),
        framework.tensor(np.full(256, 2.0**-9), "f32"),
        0.0,
        weight_offset=1.0,
        rounding="fp32",
        kernel=kernel.name,
    )
    assert_same_bits(got, round_to(np.full((1, 256), 1.0 + 2.0**-9), dtype))


def test_rows_that_run_backwards_and_rows_that_repeat():
    """NumPy alone has negative strides."""
    for dtype in ("f32", "f16"):
        check_norm(NUMPY, Norm((4, 3, 40), dtype, x_layout=REVERSED, out_layout=REVERSED, residual=True))
    row = NUMPY.tensor(normal((1, 96), "f32", "row"), "f32")
    weight = NUMPY.full((96,), 1.0, "f32")
    repeated = np.broadcast_to(row, (5, 96))
    assert_same_bits(minivllm.rms_norm(repeated, weight), np.repeat(minivllm.rms_norm(row, weight), 5, axis=0))


def test_a_strided_last_dimension_is_refused(device, framework):
    x = framework.full((4, 64), 1.0, "f32")
    weight = framework.full((32,), 1.0, "f32")
    with pytest.raises(ValueError, match=r"rms_norm: x must be contiguous in its last dimension, got stride 2"):
        minivllm.rms_norm(x[:, ::2], weight)
    with pytest.raises(ValueError, match=r"rms_norm: weight must be contiguous"):
        minivllm.rms_norm(framework.full((4, 32), 1.0, "f32"), framework.full((64,), 1.0, "f32")[::2])
    out = framework.full((4, 64), CANARY, "f32")
    with pytest.raises(ValueError, match=r"rms_norm: out must be contiguous"):
        minivllm.rms_norm(framework.full((4, 32), 1.0, "f32"), weight, out=out[:, ::2])
    assert (to_float64(out) == CANARY).all()
    one = minivllm.rms_norm(x[:, ::64], framework.full((1,), 1.0, "f32"))  # a stride nobody takes does not matter
    assert tuple(one.shape) == (4, 1)


def test_fresh_outputs_are_contiguous(device, framework):
    x = framework.full((6, 4, 32), 1.0, "f32")[::2]
    weight = framework.full((32,), 1.0, "f32")
    out, residual_out = minivllm.add_rms_norm(x, x, weight)
    for tensor in (out, residual_out, minivllm.rms_norm(x, weight)):
        assert framework.is_mine(tensor)
        assert tuple(framework.strides(tensor)) == (128, 32, 1)
    assert framework.pointer(out) != framework.pointer(residual_out)


@pytest.mark.rows("rms_norm")
@pytest.mark.parametrize("hidden", [1, 33, 1024, 40000])
def test_no_weight_is_ones(kernel, framework, hidden):
    dtype = short_dtype(kernel.dtype)
    x, residual = (framework.tensor(normal((3, hidden), dtype, name), dtype) for name in ("x", "residual"))
    ones = framework.tensor(np.ones(hidden), dtype)
    for rounding, offset in itertools.product(("hf", "fp32"), (0.0, 0.5)):
        options = {"rounding": rounding, "weight_offset": offset, "kernel": kernel.name}
        assert_same_bits(minivllm.rms_norm(x, None, **options), minivllm.rms_norm(x, ones, **options))
        got, expected = (minivllm.add_rms_norm(x, residual, weight, **options) for weight in (None, ones))
        for a, b in zip(got, expected):
            assert_same_bits(a, b)


def test_fused_add_rms_norm_rounds_as_it_is_told(device, framework):
    x, residual, weight = (normal((7, 200), "f16", "x"), normal((7, 200), "f16", "r"), normal((200,), "f16", "w"))
    for held in (framework.tensor(weight, "f16"), None):
        options = {"rounding": "fp32", "weight_offset": 1.0}
        separate = minivllm.add_rms_norm(
            framework.tensor(x, "f16"), framework.tensor(residual, "f16"), held, 1e-5, **options
        )
        mine, stream = framework.full((7, 200), 0.0, "f16"), framework.full((7, 200), 0.0, "f16")
        mine[...], stream[...] = framework.tensor(x, "f16"), framework.tensor(residual, "f16")
        minivllm.fused_add_rms_norm(mine, stream, held, 1e-5, **options)
        assert_same_bits(mine, separate[0], "x")
        assert_same_bits(stream, separate[1], "residual")


def test_fused_add_rms_norm_works_in_place(device, framework):
    x, residual = normal((7, 200), "f16", "x"), normal((7, 200), "f16", "r")
    weight = normal((200,), "f16", "w", mean=1.0)
    placed = Placed(framework, x.shape, "f16", UNALIGNED, x)
    stream = Placed(framework, x.shape, "f16", LAYOUTS[3], residual)
    result = minivllm.fused_add_rms_norm(placed.tensor, stream.tensor, framework.tensor(weight, "f16"), 1e-5)
    assert result[0] is placed.tensor and result[1] is stream.tensor
    separate = minivllm.add_rms_norm(
        framework.tensor(x, "f16"), framework.tensor(residual, "f16"), framework.tensor(weight, "f16"), 1e-5
    )
    assert_same_bits(placed.tensor, separate[0], "x")
    assert_same_bits(stream.tensor, round_to(x + residual, "f16"), "residual")
    placed.check_canaries("x")
    stream.check_canaries("residual")


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
@given(
    lead=st.lists(st.integers(1, 4), max_size=3),
    hidden=st.integers(1, 600),
    dtype=st.sampled_from(["f32", "f16", "bf16"]),
    mixed=st.booleans(),
    residual=st.booleans(),
    rounding=st.sampled_from(["hf", "fp32"]),
    offset=st.sampled_from([0.0, 1.0, -0.5]),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 3),
)
def test_any_call(device, framework, lead, hidden, dtype, mixed, residual, rounding, offset, layouts):
    if reason := framework.why_not(dtype):
        pytest.skip(reason)
    check_norm(
        framework,
        Norm(
            (*lead, hidden),
            dtype,
            "f32" if mixed else dtype,
            residual,
            rounding,
            offset,
            x_layout=layouts[0],
            residual_layout=layouts[1],
            out_layout=layouts[2],
        ),
    )


def test_the_reference_is_that_of_the_models(torch):
    """The rounded reference against the HF expression itself, written in torch."""
    for dtype in ("f16", "bf16"):
        x, weight = normal((64, 512), dtype, "hf"), normal((512,), dtype, "hfw", mean=1.0)
        kind = {"f16": torch.float16, "bf16": torch.bfloat16}[dtype]
        states = torch.from_numpy(x).to(kind).float()
        states = states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + 1e-6)
        hf = to_float64(torch.from_numpy(weight).to(kind) * states.to(kind))
        rounded, _ = reference_norm(x, weight, dtype=dtype)
        assert (hf != rounded).mean() < 1e-3
