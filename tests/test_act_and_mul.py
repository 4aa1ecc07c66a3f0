"""silu_and_mul and gelu_and_mul: every kernel, layout and framework against float64, and gradients.
tests/c/test_act_and_mul.c takes every kernel to every gate of 16 bits."""

import functools
import math

import numpy as np
import pytest
from cases import CONTIGUOUS, LAYOUTS, REVERSED, Placed, assert_same_bits, normal
from conftest import short_dtype
from frameworks import FRAMEWORKS, TORCH_CPU, TORCH_CUDA, need

import minivllm
from minivllm.testing import numeric, reference
from minivllm.testing.reference import round_to, to_float64

KINDS = ("silu", "tanh", "none")
COLUMNS = (1, 3, 8, 33, 64, 1000, 1028, 4864)
SPECIAL = (0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 1e4, -1e4, 2.4e-7, -2.4e-7, 1e-38, 3e38, -3e38, -12.0, -88.0,
           -88.73, -89.5, -104.5, 65504.0)  # fmt: skip


def gated(kind, ops=minivllm):
    return ops.silu_and_mul if kind == "silu" else functools.partial(ops.gelu_and_mul, approximate=kind)


def assert_right(got, x, kind, rounding, dtype, what):
    """got [..., d] is between the ends of what x [..., 2 d] may give; zeros have the sign of gate times up; NaN where both
    ends are, or one."""
    least, most = numeric.act_and_mul_ends(x, kind, rounding, dtype)
    (gate, up), got = reference.halves(x), to_float64(got)
    assert got.shape == least.shape, what
    with np.errstate(invalid="ignore"):
        inside = (got >= round_to(least, dtype)) & (got <= round_to(most, dtype))
        inside &= np.signbit(got) == (np.signbit(gate) ^ np.signbit(up))
    good = np.where(np.isnan(got), np.isnan(least) | np.isnan(most), inside)
    bad = np.argwhere(~good)
    if len(bad):
        at = tuple(bad[0])
        raise AssertionError(
            f"{what}: {len(bad)} are wrong, the first of gate {gate[at]!r} and up {up[at]!r}: {got[at]!r}"
        )


def check(framework, dtype, shape, kind, *, rounding="hf", kernel=None, x=None, x_layout=CONTIGUOUS, out=CONTIGUOUS):
    """One call, of x with twice the columns of `shape`."""
    x = normal((*shape[:-1], 2 * shape[-1]), dtype, "x", shape, scale=3.0) if x is None else x
    placed_x = Placed(framework, x.shape, dtype, x_layout, x)
    placed = Placed(framework, shape, dtype, out) if out else None
    options = {"out": placed.tensor} if placed else {}
    got = gated(kind)(placed_x.tensor, rounding=rounding, kernel=kernel, **options)
    framework.synchronize()
    assert framework.is_mine(got) and tuple(got.shape) == tuple(shape)
    assert_right(got, x, kind, rounding, dtype, f"{kind} {rounding} {dtype} {shape} {kernel}")
    assert_same_bits(placed_x.tensor, x, "x, an input")
    if placed:
        assert got is placed.tensor
        placed.check_canaries()
    return to_float64(got)


@pytest.mark.sanitize
@pytest.mark.rows("silu_and_mul")
@pytest.mark.parametrize("kind", KINDS)
def test_every_kernel(kernel, framework, kind):
    dtype = short_dtype(kernel.dtype)
    for rounding in ("hf", "fp32"):
        for columns in COLUMNS:
            check(framework, dtype, (5, columns), kind, rounding=rounding, kernel=kernel.name)
            ran = minivllm.last_kernel()
            assert (ran.op, ran.name) == ("silu_and_mul" if kind == "silu" else "gelu_and_mul", kernel.name)
            assert f"tokens=5 hidden={columns}:" in ran.why


@pytest.mark.rows("gelu_and_mul")
def test_every_kernel_on_special_values(kernel, framework):
    """NaN and infinity where the formula has them: every one of these values as the gate of every one."""
    dtype = short_dtype(kernel.dtype)
    values = round_to(np.array(SPECIAL), dtype)
    x = np.concatenate([np.tile(values, (len(values), 1)), np.repeat(values[:, None], len(values), 1)], 1)
    for kind in KINDS:
        for rounding in ("hf", "fp32"):
            got = check(framework, dtype, (len(values), len(values)), kind, rounding=rounding, kernel=kernel.name, x=x)
            exact = reference.act_and_mul(x, kind, rounding=rounding, dtype=dtype)
            active = reference.activation(x[:, : len(values)], kind)
            sure = (
                (abs(active) > 2.0**-100) | (active == x[:, : len(values)]) | np.isnan(active)
            )  # exp does not overflow
            assert (np.isnan(got) == np.isnan(exact))[sure].all()
            assert (np.isinf(got) == np.isinf(exact))[sure].all()


@pytest.mark.rows("silu_and_mul")
def test_every_kernel_with_every_layout(kernel, framework):
    dtype = short_dtype(kernel.dtype)
    layouts = LAYOUTS if framework.device == "cuda" else (*LAYOUTS, REVERSED)
    if framework.name == "torch":
        layouts = LAYOUTS
    for columns in (8, 33, 96):
        same = []
        for x_layout in layouts:
            for out in (*layouts, None):
                arguments = {"kernel": kernel.name, "x_layout": x_layout, "out": out}
                same.append(check(framework, dtype, (3, 2, 4, columns), "silu", **arguments))
        for got in same:  # a row's bits do not depend on where it lies
            assert_same_bits(got, same[0])


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_every_framework(framework, kind, dtype):
    need(framework, dtype)
    x = normal((4, 48), dtype, "frameworks")
    got = gated(kind)(framework.tensor(x, dtype))
    framework.synchronize()
    assert framework.is_mine(got)
    assert_right(got, x, kind, "hf", dtype, framework.name)


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_accuracy_beside_torch(device, framework, dtype, kind):
    """RMS error against float64 of no more than 1.02 times that of torch's own expression, pooled over 256 rows."""
    torch_framework = torch_on(device)
    torch, x = torch_framework.torch, normal((256, 2 * 1024), dtype, "accuracy", scale=2.0)
    exact = reference.act_and_mul(x, kind)
    tensor = torch_framework.tensor(x, dtype)
    theirs = numeric.rms_error(to_float64(expression(torch, tensor, kind)), exact)
    for rounding in ("hf", "fp32"):
        assert numeric.rms_error(to_float64(gated(kind)(tensor, rounding=rounding)), exact) <= 1.02 * theirs


@pytest.mark.parametrize("kind", KINDS)
def test_other_rows_do_not_matter(device, framework, kind):
    x = framework.tensor(normal((300, 2 * 72), "f32", "rows"), "f32")
    together = gated(kind)(x)
    for row in (0, 137, 299):
        assert_same_bits(gated(kind)(x[row : row + 1])[0], together[row])
        assert_same_bits(gated(kind)(x[row]), together[row])


def test_slices_of_one_buffer(device, framework):
    """gate | up | out side by side: they share no element."""
    x = normal((7, 48), "f32", "slices")
    buffer = framework.tensor(np.concatenate([x, np.zeros((7, 24))], 1), "f32")
    out = minivllm.silu_and_mul(buffer[:, :48], out=buffer[:, 48:])
    framework.synchronize()
    assert_right(out, x, "silu", "hf", "f32", "slices")
    assert_same_bits(buffer[:, :48], x, "x, an input")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_more_than_2_31_elements(cuda_torch, kind):
    """x has 2^31 + 2^17 elements of 16 bits, the last rows of which are looked at."""
    torch, columns = cuda_torch, 1 << 16
    rows = (1 << 14) + 1
    x = torch.empty(rows, 2 * columns, dtype=torch.bfloat16, device="cuda")
    last = normal((2, 2 * columns), "bf16", "far", scale=3.0)
    x[-2:] = TORCH_CUDA.tensor(last, "bf16")
    out = gated(kind)(x)
    assert_right(out[-2:], last, kind, "hf", "bf16", "the last rows")


# ---- torch and JAX -----------------------------------------------------------------------------------------------------


def torch_on(device):
    framework = TORCH_CUDA if device == "cuda" else TORCH_CPU
    if reason := framework.why_not():
        pytest.skip(reason)
    return framework


def expression(torch, x, kind):
    gate, up = x.chunk(2, -1)
    if kind == "silu":
        return torch.nn.functional.silu(gate) * up
    return torch.nn.functional.gelu(gate, approximate=kind) * up


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(device, kind):
    """Those of torch's own expression, compiled and not, within what two orders of a few float32 operations differ by."""
    framework = torch_on(device)
    torch, values = framework.torch, normal((6, 2 * 40), "f32", "gradient", scale=2.0)
    x = framework.tensor(values, "f32").requires_grad_()

    def gradient(function):
        return torch.autograd.grad(function(x).sin().sum(), x)[0]

    wanted = gradient(lambda x: expression(torch, x, kind))
    bound = 2.0**-24 * 64 * (1 + values.max() ** 2)
    for function in (gated(kind), torch.compile(gated(kind), backend="aot_eager", fullgraph=True)):
        assert float((gradient(function) - wanted).abs().max()) <= bound
    with pytest.raises(RuntimeError, match="and_mul: x requires grad and grad mode is on"):
        gated(kind)(x, out=torch.empty(6, 40, device=x.device))


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_gradients_of_16_bits(device, dtype):
    """That of x is computed in float32 and rounded once."""
    framework = torch_on(device)
    torch = framework.torch
    x = framework.tensor(normal((6, 80), dtype, "gradient 16"), dtype).requires_grad_()
    wide = x.detach().double().requires_grad_()
    (got,) = torch.autograd.grad(minivllm.silu_and_mul(x).sum(), x)
    (wanted,) = torch.autograd.grad(expression(torch, wide, "silu").sum(), wide)
    assert got.dtype == x.dtype
    exact = to_float64(wanted)
    numeric.assert_within(to_float64(got), exact, reference.quantum(exact, dtype) / 2 + 2.0**-20)


@pytest.mark.parametrize("kind", KINDS)
def test_vmap_and_vmap_of_gradients(device, kind):
    framework = torch_on(device)
    torch, x = framework.torch, framework.tensor(normal((3, 4, 16), "f32", "vmap"), "f32")
    assert_same_bits(torch.vmap(gated(kind))(x), gated(kind)(x))
    assert_same_bits(torch.vmap(gated(kind), in_dims=1)(x), gated(kind)(x.transpose(0, 1)))
    gradient = torch.func.grad(lambda row: gated(kind)(row).sum())
    together = torch.autograd.grad(gated(kind)(leaf := x.clone().requires_grad_()).sum(), leaf)[0]
    assert float((torch.vmap(gradient)(x) - together).abs().max()) <= 2.0**-22


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_with_symbolic_sizes(device, kind):
    """One graph for every number of tokens."""
    torch = torch_on(device).torch
    graph = torch.compile(gated(kind), backend="aot_eager", dynamic=True, fullgraph=True)
    for tokens in (2, 5, 9):
        x = torch.randn(tokens, 24, device=device)
        assert_same_bits(graph(x), gated(kind)(x))


@pytest.mark.parametrize("kind", KINDS)
def test_jax(kind):
    jax = pytest.importorskip("jax", reason="jax is not installed")
    from minivllm import jax as ops

    values = normal((6, 48), "f32", "jax", scale=2.0)
    x = jax.numpy.asarray(values, "float32")
    for call in (gated(kind, ops), jax.jit(gated(kind, ops)), jax.vmap(gated(kind, ops))):
        assert_right(np.asarray(call(x)), values, kind, "hf", "f32", "jax")
    gradient = jax.grad(lambda x: gated(kind, ops)(x).sum())(x)
    step = 1e-6  # of float64, whose difference is right to about 1e-10
    (gate, up), wanted = reference.halves(values), np.zeros_like(values)
    wanted[:, :24] = (
        up * (reference.activation(gate + step, kind) - reference.activation(gate - step, kind)) / (2 * step)
    )
    wanted[:, 24:] = reference.activation(gate, kind)
    bound = 2.0**-24 * (1 + abs(values).max()) ** 3  # jax.nn.gelu takes differences from 1
    numeric.assert_within(np.asarray(gradient, np.float64), wanted, bound)
    with pytest.raises(ValueError, match="expected an even last dimension"):
        jax.jit(gated(kind, ops))(x[:, :47])


# ---- decode, on the GPU: graphs, and what the kernel in front still writes -------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_in_a_cuda_graph(cuda_torch, kind):
    """A chain, each call of which reads what the kernel just in front wrote."""
    torch = cuda_torch
    x = torch.empty(4, 2 * 4864, dtype=torch.bfloat16, device="cuda")
    source, out = torch.empty_like(x), torch.empty(4, 4864, dtype=torch.bfloat16, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(8):
            torch.mul(source, 1, out=x)
            gated(kind)(x, out=out)
            x.fill_(math.nan)
    for seed in range(10):
        values = normal(tuple(x.shape), "bf16", "graph", seed)
        source.copy_(TORCH_CUDA.tensor(values, "bf16"))
        graph.replay()
        assert_right(out, values, kind, "hf", "bf16", "a graph")
