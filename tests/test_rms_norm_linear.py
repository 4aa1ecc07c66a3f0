"""rms_norm_linear: every kernel, layout and framework against float64, and gradients. Its kernels are those of
rms_norm_qkv, whose tests take them to every edge; what differs is one block of outputs in place of three."""

import functools

import numpy as np
import pytest
from cases import CONTIGUOUS, PADDED, UNALIGNED, Placed, assert_same_bits, normal
from checks import WEIGHTS
from conftest import roundings_of, short_dtype
from frameworks import TORCH_CPU, TORCH_CUDA

import minivllm
from minivllm.testing import numeric, reference
from minivllm.testing.reference import round_to, to_float64

LAYOUT_NAMES = {"packed": "out_in", "packed_t": "in_out", "in_out": "in_out", "padded": "out_in", "unaligned": "out_in"}
SHAPES = ((64, 7), (128, 1), (256, 384), (1024, 1000), (40, 131))  # hidden, outputs
EPS = 1e-6


def inputs_of(hidden, outputs, tokens, dtype):
    return {
        "x": normal((tokens, hidden), dtype, "x", hidden, tokens),
        "residual": normal((tokens, hidden), dtype, "residual", hidden, tokens),
        "norm_weight": normal((hidden,), dtype, "norm", hidden, scale=0.2, mean=1.0),
        "weight": normal((outputs, hidden), dtype, "weight", hidden, outputs, scale=0.02),
        "bias": normal((outputs,), dtype, "bias", outputs, scale=0.5),
    }


@functools.cache
def expected(hidden, outputs, tokens, dtype, rounding, adds, biased):
    """(out before its last rounding, the sum, the tolerance)"""
    values = inputs_of(hidden, outputs, tokens, dtype)
    residual, bias = values["residual"] if adds else None, values["bias"] if biased else None
    x, gamma, weight = values["x"], values["norm_weight"], values["weight"]
    out, y, s = reference.rms_norm_qkv(
        x, gamma, weight, EPS, bias=bias, residual=residual, rounding=rounding, dtype=dtype, round_last=False
    )
    lost = numeric.lost_before_the_product(s, gamma, EPS, dtype, rounding)
    bound = numeric.tolerance(out, y, dtype, weight=weight, length=hidden, gain=abs(gamma), **lost)
    return out, s, bound


def check(framework, dtype, hidden, outputs, tokens, *, layout="packed", rounding="hf", adds=False, biased=False,
          out=None, kernel=None):  # fmt: skip
    """Whether the kernel took the call; a forced one may refuse it."""
    values = inputs_of(hidden, outputs, tokens, dtype)
    tensors = {name: framework.tensor(values[name], dtype) for name in ("x", "norm_weight", "residual", "bias")}
    weight = WEIGHTS[layout](framework, values["weight"], dtype, (outputs,))
    placed = Placed(framework, (tokens, outputs), dtype, out) if out else None
    options = {"rounding": rounding, "kernel": kernel, "weight_layout": LAYOUT_NAMES[layout]}
    options |= {"residual": tensors["residual"]} if adds else {}
    options |= {"bias": tensors["bias"]} if biased else {}
    options |= {"out": placed.tensor} if placed else {}
    try:
        result = minivllm.rms_norm_linear(tensors["x"], tensors["norm_weight"], weight, EPS, **options)
    except ValueError as error:
        assert kernel and f"kernel '{kernel}' cannot serve this call: " in str(error)
        return False
    framework.synchronize()
    got, *sums = result if adds else (result,)
    assert tuple(got.shape) == (tokens, outputs) and framework.is_mine(got)
    exact, s, bound = expected(hidden, outputs, tokens, dtype, rounding, adds, biased)
    numeric.assert_within(to_float64(got), exact, bound, f"{hidden} -> {outputs}, {tokens} tokens, {layout}")
    if adds:
        assert_same_bits(sums[0], s, "residual_out")
    if placed:
        placed.check_canaries()
        assert_same_bits(placed.values(), to_float64(got))
    return True


@pytest.mark.rows("rms_norm_linear")
def test_every_kernel(kernel, framework):
    dtype, ran = short_dtype(kernel.dtype), 0
    for hidden, outputs in SHAPES:
        for tokens in (1, 5, 130):
            for rounding in roundings_of(kernel):
                for adds, biased in ((False, False), (rounding == "hf", True)):
                    ran += check(framework, dtype, hidden, outputs, tokens, rounding=rounding, adds=adds,
                                 biased=biased, kernel=kernel.name)  # fmt: skip
    if not any(part in kernel.name for part in ("mma", "sm90a", "norm_few")):
        assert ran == 3 * len(SHAPES) * 2 * len(roundings_of(kernel))
    assert ran or "heads" in kernel.name


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_every_layout(device, dtype, layout, framework):
    for tokens in (0, 1, 33):
        for out in (None, CONTIGUOUS, UNALIGNED, PADDED):
            assert check(framework, dtype, 256, 384, tokens, layout=layout, adds=True, biased=True, out=out)


def test_many_outputs(device, framework):
    """As those of a language model's head: more than q, k and v ever have."""
    assert check(framework, "bf16", 64, 151_936, 3)


def torch_on(device):
    framework = TORCH_CUDA if device == "cuda" else TORCH_CPU
    if reason := framework.why_not():
        pytest.skip(reason)
    return framework


@pytest.mark.parametrize("in_out", [False, True])
def test_gradients(device, in_out):
    """Those of torch's own expression, to the float32 noise of sums of that length; compiled and not."""
    framework = torch_on(device)
    torch, values = framework.torch, inputs_of(96, 40, 6, "f32")
    leaves = {name: framework.tensor(value, "f32").requires_grad_() for name, value in values.items()}
    if in_out:
        leaves["weight"] = leaves["weight"].detach().t().contiguous().requires_grad_()

    def ours(x, residual, norm_weight, weight, bias):
        return minivllm.rms_norm_linear(x, norm_weight, weight, EPS, bias=bias, residual=residual)

    def theirs(x, residual, norm_weight, weight, bias):
        s = x + residual
        y = torch.nn.functional.rms_norm(s, (96,), norm_weight, EPS)
        return torch.nn.functional.linear(y, weight.t() if in_out else weight, bias), s

    def gradients(function):
        out, s = function(**leaves)
        return torch.autograd.grad(out.sin().sum() + s.square().sum(), list(leaves.values()))

    wanted = gradients(theirs)
    for function in (ours, torch.compile(ours, backend="aot_eager", fullgraph=True)):
        for name, got, want in zip(leaves, gradients(function), wanted, strict=True):
            bound = 2**-24 * 96 * float(want.abs().max())
            assert float((got - want).abs().max()) <= bound, name


def test_jax():
    jax = pytest.importorskip("jax", reason="jax is not installed")
    from minivllm import jax as ops

    values = {name: jax.numpy.asarray(value, "float32") for name, value in inputs_of(96, 40, 6, "f32").items()}
    x, gamma, weight = values["x"], values["norm_weight"], values["weight"]
    out, s = jax.jit(functools.partial(ops.rms_norm_linear, bias=values["bias"], residual=values["residual"]))(
        x, gamma, weight
    )
    exact, total, bound = expected(96, 40, 6, "f32", "hf", True, True)
    numeric.assert_within(np.asarray(out, np.float64), exact, bound)
    assert_same_bits(np.asarray(s), total)
    gradient = jax.grad(lambda w: ops.rms_norm_linear(x, gamma, w).sum())(weight)
    y, _ = reference.rms_norm(inputs_of(96, 40, 6, "f32")["x"], np.asarray(gamma, np.float64), EPS)
    numeric.assert_within(np.asarray(gradient, np.float64), np.tile(y.sum(0), (40, 1)), 2**-22 * abs(y).sum(0))


@pytest.mark.parametrize(
    "change,message",
    [
        ({"weight": (40, 60)}, r"weight has shape \[40, 60\], expected \[outputs, 64\]"),
        ({"weight": (64, 64)}, r"weight is square \(\[64, 64\]\), so it could be \[outputs, hidden\]"),
        ({"weight": (0, 64)}, r"weight has no outputs"),
        ({"bias": (39,)}, r"bias has 39 elements, expected 40 \(= the outputs of weight\)"),
        ({"norm_weight": (63,)}, r"norm_weight has 63 elements, expected 64"),
        ({"residual": (5, 64)}, r"residual has shape \[5, 64\], expected \[6, 64\]"),
        ({"out": (6, 41)}, r"out has shape \[6, 41\], expected \[6, 40\]"),
        ({"residual_out": (6, 64)}, r"residual_out was given without a residual"),
    ],
)
def test_what_is_refused(change, message):
    shapes = {"x": (6, 64), "norm_weight": (64,), "weight": (40, 64)} | change
    arrays = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match="rms_norm_linear: " + message):
        minivllm.rms_norm_linear(**arrays)


def test_out_must_not_overlap():
    x, gamma, weight = np.ones((2, 8), np.float32), np.ones(8, np.float32), np.ones((4, 8), np.float32)
    for name, out in (("x", x[:, :4]), ("weight", weight[:2, :4])):
        with pytest.raises(ValueError, match=f"rms_norm_linear: out overlaps {name}"):
            minivllm.rms_norm_linear(x, gamma, weight, out=out)


def test_subnormal_rounding_of_the_tolerance():
    """A norm weight below one does not shrink what the last rounding of y may lose."""
    y = np.full((1, 4), 2.0**-20)
    bound = numeric.tolerance(y, y, "f16", length=4, gain=np.full(4, 1e-3), roundings=1)
    assert (bound >= abs(round_to(y + 2.0**-25, "f16") - y)).all()
