"""norm_add: every kernel and framework against float64, in place, and gradients. Its kernels are those of rms_norm, whose
tests take the norm to every edge; what differs is the residual that is added behind it."""

import functools

import numpy as np
import pytest
from cases import CONTIGUOUS, LAYOUTS, Placed, assert_same_bits, normal
from conftest import short_dtype
from frameworks import FRAMEWORKS, TORCH_CPU, TORCH_CUDA, need

import minivllm
from minivllm.testing import numeric, reference
from minivllm.testing.reference import quantum, round_to, to_float64

EPS = 1e-6
HIDDEN = (1, 33, 64, 256, 1000, 2048, 4104, 8200, 40000)


@functools.cache
def inputs_of(shape, dtype, weight_dtype=None):
    return {
        "x": normal(shape, dtype, "x", shape, scale=2.0),
        "weight": normal(shape[-1:], weight_dtype or dtype, "weight", shape[-1], scale=0.2, mean=1.0),
        "residual": normal(shape, dtype, "residual", shape),
    }


@functools.cache
def expected(shape, dtype, rounding="hf", weight_offset=0.0, weight_dtype=None):
    """(out before its last rounding, how far it may be off): all but "fp32" round the norm first, by a neighbour too far
    where float32 moves it across a tie."""
    x, weight, residual = inputs_of(shape, dtype, weight_dtype).values()
    options = {"rounding": rounding, "weight_offset": weight_offset, "dtype": dtype}
    y, _ = reference.rms_norm(x, weight, EPS, round_last=False, **options)
    gain = weight_offset + weight
    flips = numeric.may_flip(x, gain, EPS, dtype, rounding) if rounding != "fp32" else None
    bound = numeric.tolerance(y, y, dtype, length=x.shape[-1], gain=abs(gain), flips=flips) - quantum(y, dtype) / 2
    if rounding != "fp32":
        y, bound = round_to(y, dtype), bound + np.where(flips, quantum(y, dtype), 0.0)
    out = y + residual
    return out, bound + quantum(out, dtype) / 2 + 2 * numeric.UNIT_F32 * (abs(y) + abs(out))


def check(framework, dtype, shape, *, rounding="hf", weight_offset=0.0, kernel=None, layout=CONTIGUOUS, out=None,
          weight_dtype=None):  # fmt: skip
    values = inputs_of(shape, dtype, weight_dtype)
    placed = {name: Placed(framework, values[name].shape, dtype, layout, values[name]) for name in ("x", "residual")}
    weight = framework.tensor(values["weight"], weight_dtype or dtype)
    target = placed[out] if out in placed else Placed(framework, shape, dtype, out) if out else None
    options = {"rounding": rounding, "weight_offset": weight_offset, "kernel": kernel}
    options |= {"out": target.tensor} if target else {}
    got = minivllm.norm_add(placed["x"].tensor, weight, placed["residual"].tensor, EPS, **options)
    framework.synchronize()
    assert framework.is_mine(got) and tuple(got.shape) == tuple(shape)
    numeric.assert_within(
        to_float64(got),
        *expected(tuple(shape), dtype, rounding, weight_offset, weight_dtype),
        f"{dtype} {shape} {rounding}",
    )
    for name, tensor in placed.items():
        if tensor is not target:
            assert_same_bits(tensor.tensor, values[name], name)
    if target:
        assert got is target.tensor
        target.check_canaries()
    return to_float64(got)


@pytest.mark.sanitize
@pytest.mark.rows("norm_add")
def test_every_kernel(kernel, framework):
    dtype = short_dtype(kernel.dtype)
    for hidden in HIDDEN:
        for rounding in ("hf", "hf_once", "fp32"):
            check(framework, dtype, (5, hidden), rounding=rounding, kernel=kernel.name)
            ran = minivllm.last_kernel()
            assert (ran.op, ran.name) == ("norm_add", kernel.name)
    check(framework, dtype, (5, 256), weight_offset=1.0, kernel=kernel.name)
    check(framework, dtype, (5, 256), weight_dtype="f32", kernel=kernel.name)


@pytest.mark.rows("norm_add")
def test_every_kernel_in_place_and_in_every_layout(kernel, framework):
    dtype = short_dtype(kernel.dtype)
    for hidden in (33, 256, 8200, 40000):
        apart = check(framework, dtype, (2, 3, hidden), kernel=kernel.name)
        for layout in LAYOUTS:
            for out in ("x", "residual", layout):
                got = check(framework, dtype, (2, 3, hidden), kernel=kernel.name, layout=layout, out=out)
                assert_same_bits(got, apart)  # a row's bits do not depend on where it lies


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_every_framework(framework, dtype):
    need(framework, dtype)
    values = inputs_of((4, 48), dtype)
    got = minivllm.norm_add(*(framework.tensor(values[name], dtype) for name in ("x", "weight", "residual")), EPS)
    framework.synchronize()
    assert framework.is_mine(got)
    numeric.assert_within(to_float64(got), *expected((4, 48), dtype), framework.name)


def test_without_a_weight(device, framework):
    values, ones = inputs_of((3, 72), "f32"), framework.full((72,), 1.0, "f32")
    x, residual = framework.tensor(values["x"], "f32"), framework.tensor(values["residual"], "f32")
    assert_same_bits(minivllm.norm_add(x, None, residual), minivllm.norm_add(x, ones, residual))


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_hf_rounds_the_norm_and_fp32_does_not(device, framework, dtype):
    """The norm by itself, then the sum, bit for bit; and with one rounding a smaller error."""
    if reason := framework.why_not(dtype):
        pytest.skip(reason)
    values = inputs_of((64, 512), dtype)
    x, weight, residual = (framework.tensor(values[name], dtype) for name in ("x", "weight", "residual"))
    apart = to_float64(minivllm.rms_norm(x, weight, EPS)) + values["residual"]
    assert_same_bits(minivllm.norm_add(x, weight, residual, EPS), round_to(apart, dtype))
    y, _ = reference.rms_norm(values["x"], values["weight"], EPS)
    exact = y + values["residual"]
    errors = {
        rounding: numeric.rms_error(to_float64(minivllm.norm_add(x, weight, residual, EPS, rounding=rounding)), exact)
        for rounding in ("hf", "fp32")
    }
    assert errors["fp32"] < 0.9 * errors["hf"]


def test_what_out_may_be(device, framework):
    x, weight = framework.full((3, 9), 1.0, "f32"), framework.full((8,), 1.0, "f32")
    with pytest.raises(ValueError, match="norm_add: out overlaps x"):
        minivllm.norm_add(x[:, :8], weight, x[:, :8], out=x[:, 1:])
    with pytest.raises(ValueError, match="norm_add: out overlaps weight"):
        minivllm.norm_add(x[:1, :8], weight, x[:1, :8], out=weight[None])


# ---- torch and JAX -----------------------------------------------------------------------------------------------------


def gradients(torch, function, leaves):
    return torch.autograd.grad(function(**leaves).sin().sum(), list(leaves.values()))


def test_gradients(device):
    """Those of torch's own expression, to the float32 noise of sums of that length; compiled and not."""
    framework = TORCH_CUDA if device == "cuda" else TORCH_CPU
    if reason := framework.why_not():
        pytest.skip(reason)
    torch, values = framework.torch, inputs_of((6, 96), "f32")
    leaves = {name: framework.tensor(value, "f32").requires_grad_() for name, value in values.items()}

    def theirs(x, weight, residual):
        return torch.nn.functional.rms_norm(x, (96,), weight, EPS) + residual

    wanted = gradients(torch, theirs, leaves)
    for function in (minivllm.norm_add, torch.compile(minivllm.norm_add, backend="aot_eager", fullgraph=True)):
        for name, got, want in zip(leaves, gradients(torch, function, leaves), wanted, strict=True):
            assert float((got - want).abs().max()) <= 2**-24 * 96 * float(want.abs().max()), name


def test_jax():
    jax = pytest.importorskip("jax", reason="jax is not installed")
    from minivllm import jax as ops

    values = inputs_of((6, 48), "f32")
    x, weight, residual = (jax.numpy.asarray(values[name], "float32") for name in ("x", "weight", "residual"))
    for call in (ops.norm_add, jax.jit(ops.norm_add), jax.vmap(ops.norm_add, (0, None, 0))):
        numeric.assert_within(np.asarray(call(x, weight, residual), np.float64), *expected((6, 48), "f32"))
    of_residual = jax.grad(lambda r: ops.norm_add(x, weight, r).sum())(residual)
    assert (np.asarray(of_residual) == 1).all()
    ours, theirs = (jax.grad(lambda x, f=f: (f(x) ** 2).sum())(x) for f in (
        functools.partial(ops.norm_add, weight=weight, residual=residual),
        lambda x: ops.rms_norm(x, weight) + residual,
    ))  # fmt: skip
    numeric.assert_within(np.asarray(ours, np.float64), np.asarray(theirs, np.float64), 2.0**-18)
