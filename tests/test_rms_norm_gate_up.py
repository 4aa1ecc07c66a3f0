"""rms_norm_gate_up: every kernel, layout and framework against float64, and gradients. Its kernels are those of
rms_norm_qkv, whose tests take them to every edge; what differs is that outputs are made of pairs of sums."""

import functools

import numpy as np
import pytest
from cases import CONTIGUOUS, PADDED, UNALIGNED, Placed, assert_same_bits, normal
from checks import IS_IN_OUT, WEIGHTS
from conftest import roundings_of, short_dtype
from frameworks import TORCH_CPU, TORCH_CUDA, hopper_dtype

import minivllm
from minivllm.testing import numeric, reference
from minivllm.testing.reference import round_to, to_float64

KINDS = {"silu": "silu", "gelu_tanh": "tanh", "gelu": "none"}  # as the references call them
SHAPES = ((64, 7), (128, 1), (256, 192), (1024, 500), (40, 131))  # hidden, d
EPS = 1e-6
# tokens, hidden, d: on the 132 SMs of an H100 every tile for Hopper's tensor cores, with clusters and without, and with
# rows that are normalised meanwhile (test_cuda_on_cpu holds the list to that)
TILES = ((9, 3080, 512), (40, 72, 3551), (40, 72, 6144), (64, 72, 8512),
         *((130, 72, d) for d in (512, 2656, 3201, 4256)), *((300, 72, d) for d in (3552, 4257, 4960)),
         (300, 328, 6441), (1160, 3584, 6144), (1100, 3584, 4608), (4700, 2560, 1920), (2500, 5120, 3584))  # fmt: skip


def inputs_of(hidden, d, tokens, dtype, weight_dtype=None):
    """Gates are of size one to three: where activations bend."""
    return {
        "x": normal((tokens, hidden), dtype, "x", hidden, tokens),
        "residual": normal((tokens, hidden), dtype, "residual", hidden, tokens),
        "norm_weight": normal((hidden,), dtype, "norm", hidden, scale=0.2, mean=1.0),
        "weight": normal((2 * d, hidden), weight_dtype or dtype, "weight", hidden, d, scale=1.5 / hidden**0.5),
        "bias": normal((2 * d,), dtype, "bias", d, scale=0.5),
    }


@functools.cache
def products(hidden, d, tokens, dtype, weight_dtype, rounding, adds, biased):
    """(gate | up before they are rounded, the sum, the tolerance of gate | up)"""
    values = inputs_of(hidden, d, tokens, dtype, weight_dtype)
    residual, bias = values["residual"] if adds else None, values["bias"] if biased else None
    x, gamma, weight = values["x"], values["norm_weight"], values["weight"]
    gate_up, y, s = reference.rms_norm_qkv(
        x, gamma, weight, EPS, bias=bias, residual=residual, rounding=rounding, dtype=dtype, round_last=False
    )
    lost = numeric.lost_before_the_product(s, gamma, EPS, dtype, rounding)
    bound = numeric.tolerance(gate_up, y, dtype, weight=weight, length=hidden, gain=abs(gamma), **lost)
    return gate_up, s, bound


def expected(hidden, d, tokens, dtype, rounding, adds, biased, activation="silu", weight_dtype=None):
    """(out before its last rounding, the sum, the tolerance)"""
    gate_up, s, bound = products(hidden, d, tokens, dtype, weight_dtype, rounding, adds, biased)
    out, bound = numeric.gate_up_tolerance(gate_up, bound, KINDS[activation], rounding, dtype)
    return out, s, bound


def placed_bias(framework, bias, dtype, layout):
    parts = np.split(bias, 2) if layout.startswith("tuple") else [bias]
    tensors = tuple(framework.tensor(part, dtype) for part in parts)
    return tensors if len(parts) == 2 else tensors[0]


def check(framework, dtype, hidden, d, tokens, *, activation="silu", layout="packed", rounding="hf", adds=False,
          biased=False, out=None, kernel=None, weight_dtype=None, **options):  # fmt: skip
    """Whether the kernel took the call; a forced one may refuse it."""
    values = inputs_of(hidden, d, tokens, dtype, weight_dtype)
    tensors = {name: framework.tensor(values[name], dtype) for name in ("x", "norm_weight", "residual")}
    weight = WEIGHTS[layout](framework, values["weight"], weight_dtype or dtype, (d, d))
    placed = Placed(framework, (tokens, d), dtype, out) if out else None
    sums = Placed(framework, (tokens, hidden), dtype, out) if out and adds else None
    options |= {"rounding": rounding, "kernel": kernel, "activation": activation}
    options["weight_layout"] = "in_out" if layout in IS_IN_OUT else "out_in"
    options |= {"residual": tensors["residual"]} if adds else {}
    options |= {"bias": placed_bias(framework, values["bias"], dtype, layout)} if biased else {}
    options |= {"out": placed.tensor} if placed else {}
    options |= {"residual_out": sums.tensor} if sums else {}
    try:
        result = minivllm.rms_norm_gate_up(tensors["x"], tensors["norm_weight"], weight, EPS, **options)
    except ValueError as error:
        assert kernel and f"kernel '{kernel}' cannot serve this call: " in str(error)
        return False
    framework.synchronize()
    got, *total = result if adds else (result,)
    assert tuple(got.shape) == (tokens, d) and framework.is_mine(got)
    exact, s, bound = expected(hidden, d, tokens, dtype, rounding, adds, biased, activation, weight_dtype)
    what = f"{activation} {rounding} {dtype} {hidden} -> 2 x {d}, {tokens} tokens, {layout}, {kernel}"
    numeric.assert_within(to_float64(got), exact, bound, what)
    if adds:
        assert_same_bits(total[0], s, "residual_out")
    for buffer in (placed, sums):
        if buffer:
            buffer.check_canaries()
    if placed:
        assert_same_bits(placed.values(), to_float64(got))
    if tokens and kernel:
        ran = minivllm.last_kernel()
        assert (ran.op, ran.name) == ("rms_norm_gate_up", kernel)
    return True


@pytest.mark.sanitize
@pytest.mark.rows("rms_norm_gate_up")
def test_every_kernel(kernel, framework):
    dtype, ran = short_dtype(kernel.dtype), 0
    for hidden, d in SHAPES:
        for tokens in (1, 5, 130):
            for rounding in roundings_of(kernel):
                for activation in KINDS:
                    adds = activation == "silu" and rounding == "hf"
                    layout = "tuple" if activation == "gelu" else "packed"
                    ran += check(framework, dtype, hidden, d, tokens, rounding=rounding, activation=activation,
                                 adds=adds, biased=activation != "gelu_tanh", layout=layout,
                                 kernel=kernel.name)  # fmt: skip
    if kernel.isa in ("portable", "avx2", "avx512", "neon"):
        assert ran == 3 * 3 * len(SHAPES) * len(roundings_of(kernel))


@pytest.mark.parametrize("layout", WEIGHTS)
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_every_layout(device, dtype, layout, framework):
    """Weights in one piece and in two that were allocated apart; outputs between canaries."""
    for tokens in (0, 1, 33):
        for out in (None, CONTIGUOUS, UNALIGNED, PADDED):
            assert check(framework, dtype, 256, 192, tokens, layout=layout, adds=True, biased=True, out=out)


@pytest.mark.parametrize("layout", ["packed", "in_out", "tuple"])
def test_float32_weights(device, layout, framework):
    for tokens in (1, 40):
        for activation in KINDS:
            assert check(framework, "bf16", 64, 48, tokens, layout=layout, activation=activation, weight_dtype="f32",
                         biased=True)  # fmt: skip


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_options(device, dtype, framework):
    for tokens in (1, 40):
        assert check(framework, dtype, 64, 48, tokens, batch_invariant=True)
        assert check(framework, dtype, 64, 48, tokens, static_weights=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@pytest.mark.parametrize("shape", TILES, ids=str)
def test_every_tile(dtype, shape):
    tokens, hidden, d = shape
    hopper_dtype(dtype, "norm_wgmma_sm90a")
    kernel = f"{dtype}_norm_wgmma_sm90a"
    for layout, rounding, out in (("packed", "hf", None), ("tuple", "fp32", PADDED)):
        assert check(TORCH_CUDA, dtype, hidden, d, tokens, layout=layout, rounding=rounding, out=out, biased=True,
                     kernel=kernel)  # fmt: skip


def test_many_outputs(device, framework):
    """As those of a large model: more than q, k and v have."""
    assert check(framework, "bf16", 64, 14_336, 3)


def test_weights_and_biases_given_in_different_ways(device, framework):
    """Packed weights with two biases, and two weights with a packed one: the same numbers."""
    values = inputs_of(64, 24, 7, "f32")
    x, gamma, weight, bias = (framework.tensor(values[name], "f32") for name in ("x", "norm_weight", "weight", "bias"))
    halves = [tuple(framework.tensor(part, "f32") for part in np.split(values[name], 2)) for name in ("weight", "bias")]
    exact, _, bound = expected(64, 24, 7, "f32", "hf", False, True)
    for given, biases in ((weight, halves[1]), (halves[0], bias), (list(halves[0]), list(halves[1]))):
        got = minivllm.rms_norm_gate_up(x, gamma, given, EPS, bias=biases)
        framework.synchronize()
        numeric.assert_within(to_float64(got), exact, bound)


def test_it_is_what_two_calls_give(device, framework):
    """rms_norm_linear, then silu_and_mul, up to what a gate or up that rounds to the other neighbour changes."""
    values = inputs_of(128, 96, 17, "bf16")
    x, gamma, weight = (framework.tensor(values[name], "bf16") for name in ("x", "norm_weight", "weight"))
    one = to_float64(minivllm.rms_norm_gate_up(x, gamma, weight, EPS))
    two = to_float64(minivllm.silu_and_mul(minivllm.rms_norm_linear(x, gamma, weight, EPS)))
    framework.synchronize()
    assert (one == two).mean() > 0.99


def torch_on(device):
    framework = TORCH_CUDA if device == "cuda" else TORCH_CPU
    if reason := framework.why_not():
        pytest.skip(reason)
    return framework


def leaves_of(framework, dtype, kind):
    """Tensors that require grad; the weight and the bias packed, [hidden, 2 d], or in two."""
    values = inputs_of(96, 40, 6, dtype)
    leaves = {name: framework.tensor(value, dtype) for name, value in values.items()}
    if kind == "in_out":
        leaves["weight"] = leaves["weight"].t().contiguous()
    if kind == "tuple":
        for name in ("weight", "bias"):
            leaves[name], leaves[f"{name} of up"] = (half.clone() for half in leaves[name].chunk(2))
    return {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}


def ours(leaves, activation, kind):
    weight, bias = leaves["weight"], leaves["bias"]
    if kind == "tuple":
        weight, bias = (weight, leaves["weight of up"]), (bias, leaves["bias of up"])
    return minivllm.rms_norm_gate_up(
        leaves["x"], leaves["norm_weight"], weight, EPS, activation=activation, bias=bias, residual=leaves["residual"]
    )


def theirs(torch, leaves, activation, kind):
    functional, s = torch.nn.functional, leaves["x"] + leaves["residual"]
    y = functional.rms_norm(s, (96,), leaves["norm_weight"], EPS)
    weight, bias = leaves["weight"], leaves["bias"]
    if kind == "tuple":
        weight, bias = torch.cat([weight, leaves["weight of up"]]), torch.cat([bias, leaves["bias of up"]])
    gate, up = functional.linear(y, weight.t() if kind == "in_out" else weight, bias).chunk(2, -1)
    if activation == "silu":
        return functional.silu(gate) * up, s
    return functional.gelu(gate, approximate=KINDS[activation]) * up, s


def gradients(torch, function, leaves):
    out, s = function(leaves)
    return torch.autograd.grad(out.sin().sum() + s.square().sum(), list(leaves.values()))


@pytest.mark.parametrize("kind", ["packed", "in_out", "tuple"])
@pytest.mark.parametrize("activation", KINDS)
def test_gradients(device, activation, kind):
    """Those of torch's own expression, to the float32 noise of sums of that length; compiled and not."""
    framework = torch_on(device)
    torch = framework.torch
    leaves = leaves_of(framework, "f32", kind)
    wanted = gradients(torch, lambda leaves: theirs(torch, leaves, activation, kind), leaves)
    call = functools.partial(ours, activation=activation, kind=kind)
    torch.compiler.reset()  # of nine cases: torch compiles a function eight times
    for function in (call, torch.compile(call, backend="aot_eager", fullgraph=True)):
        for name, got, want in zip(leaves, gradients(torch, function, leaves), wanted, strict=True):
            bound = 2**-23 * 96 * float(want.abs().max())
            assert float((got - want).abs().max()) <= bound, name


@pytest.mark.parametrize("kind", ["packed", "tuple"])
@pytest.mark.parametrize("activation", KINDS)
def test_gradients_of_16_bits(device, activation, kind):
    """Beside those of float64, all together no further off than torch's own by more than a quarter; of a sum that is
    linear in out, so that the roundings of out do not matter."""
    framework = torch_on(device)
    torch, leaves = framework.torch, leaves_of(framework, "bf16", kind)
    wide = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    factors = framework.tensor(normal((6, 40), "bf16", "factors"), "bf16")

    def gradients_of(function, leaves):
        out, s = function(leaves, activation=activation, kind=kind)
        return torch.autograd.grad((out * factors.to(out.dtype)).sum() + 2 * s.sum(), list(leaves.values()))

    of_torch = functools.partial(theirs, torch)
    found = zip(gradients_of(ours, leaves), gradients_of(of_torch, leaves), gradients_of(of_torch, wide), strict=True)
    errors = np.zeros(2)  # mean squares beside those of the gradient itself
    for leaf, (mine, other, exact) in zip(leaves.values(), found, strict=True):
        assert mine.dtype == torch.bfloat16 and mine.shape == leaf.shape
        for i, gradient in enumerate((mine, other)):
            errors[i] += float((gradient.double() - exact).square().mean() / exact.square().mean())
    assert errors[0] <= 1.25**2 * errors[1]


def test_without_a_gradient_of_some(device):
    """Only of what asks for one, and of x alone without a bias or a residual."""
    framework = torch_on(device)
    leaves = {name: leaf.detach() for name, leaf in leaves_of(framework, "f32", "packed").items()}
    x = leaves["x"].requires_grad_()
    out = minivllm.rms_norm_gate_up(x, leaves["norm_weight"], leaves["weight"])
    out.sum().backward()
    assert x.grad.shape == x.shape
    with pytest.raises(RuntimeError, match="rms_norm_gate_up: x requires grad and grad mode is on"):
        minivllm.rms_norm_gate_up(x, leaves["norm_weight"], leaves["weight"], out=out.detach())


def test_vmap_and_symbolic_sizes(device):
    torch = torch_on(device).torch
    x, gamma, weight = (torch.randn(size, device=device) for size in ((3, 4, 24), (24,), (32, 24)))
    call = torch.vmap(minivllm.rms_norm_gate_up, in_dims=(0, None, None))
    assert_same_bits(call(x, gamma, weight), minivllm.rms_norm_gate_up(x, gamma, weight))
    halves = (weight[:16].contiguous(), weight[16:].contiguous())
    graph = torch.compile(minivllm.rms_norm_gate_up, backend="aot_eager", dynamic=True, fullgraph=True)
    for tokens in (2, 5, 9):
        rows = torch.randn(tokens, 24, device=device)
        for given in (weight, weight.t().contiguous(), halves):
            assert_same_bits(graph(rows, gamma, given), minivllm.rms_norm_gate_up(rows, gamma, given))


@pytest.mark.parametrize("activation", KINDS)
@pytest.mark.parametrize("halves", [False, True])
def test_jax(activation, halves):
    jax = pytest.importorskip("jax", reason="jax is not installed")
    from minivllm import jax as ops

    values = {name: jax.numpy.asarray(value, "float32") for name, value in inputs_of(96, 40, 6, "f32").items()}
    x, gamma, residual = values["x"], values["norm_weight"], values["residual"]
    weight, bias = (values[name] if not halves else tuple(np.split(values[name], 2)) for name in ("weight", "bias"))
    options = {"activation": activation, "bias": bias, "residual": residual}
    call = functools.partial(ops.rms_norm_gate_up, **options)
    exact, total, bound = expected(96, 40, 6, "f32", "hf", True, True, activation)
    for function in (call, jax.jit(call)):
        out, s = function(x, gamma, weight)
        numeric.assert_within(np.asarray(out, np.float64), exact, bound)
        assert_same_bits(np.asarray(s), total)
    together = jax.vmap(lambda x, residual: ops.rms_norm_gate_up(x, gamma, weight, **options | {"residual": residual}))
    numeric.assert_within(np.asarray(together(x, residual)[0], np.float64), exact, bound)


@pytest.mark.parametrize("activation", KINDS)
@pytest.mark.parametrize("kind", ["packed", "in_out", "tuple"])
def test_jax_gradients(activation, kind):
    """Those that torch has, within what two orders of float32 sums differ by."""
    jax = pytest.importorskip("jax", reason="jax is not installed")
    framework = torch_on("cpu")
    torch = framework.torch
    from minivllm import jax as ops

    leaves = leaves_of(framework, "f32", kind)
    wanted = gradients(torch, lambda leaves: theirs(torch, leaves, activation, kind), leaves)

    def loss(given):
        weight, bias = given["weight"], given["bias"]
        if kind == "tuple":
            weight, bias = (weight, given["weight of up"]), (bias, given["bias of up"])
        out, s = ops.rms_norm_gate_up(given["x"], given["norm_weight"], weight, EPS, activation=activation, bias=bias,
                                      residual=given["residual"])  # fmt: skip
        return jax.numpy.sin(out).sum() + jax.numpy.square(s).sum()

    given = {name: jax.numpy.asarray(leaf.detach().numpy()) for name, leaf in leaves.items()}
    for name, want in zip(leaves, wanted, strict=True):
        got = np.asarray(jax.grad(lambda part, name=name: loss(given | {name: part}))(given[name]))
        assert abs(got - want.numpy()).max() <= 2**-23 * 96 * float(want.abs().max()), name


@pytest.mark.parametrize(
    "change,message",
    [
        ({"gate_up_weight": (40, 60)}, r"gate_up_weight has shape \[40, 60\], expected "),
        ({"gate_up_weight": (41, 64)}, r"gate_up_weight has 41 outputs, expected an even number \(gate \| up"),
        ({"gate_up_weight": (0, 64)}, r"gate_up_weight has 0 outputs, expected an even number"),
        ({"gate_up_weight": (64, 64)}, r"gate_up_weight is square \(\[64, 64\]\), so it could be "),
        ({"gate_up_weight": ((64, 64), (64, 64))}, r"gate_up_weight has only members that are square .*weight_layout"),
        ({"gate_up_weight": ((20, 64), (22, 64))},
         r"gate_up_weight\[1\] has 22 outputs, expected 20 \(= those of gate_up_weight\[0\]\)"),
        ({"gate_up_weight": ((20, 64), (64, 20))}, r"gate_up_weight\[[01]\] has shape "),
        ({"gate_up_weight": ((20, 64),) * 3},
         r"gate_up_weight has 3 members, expected one packed tensor or two \(gate, up\)"),
        ({"bias": ((20,),) * 3}, r"bias has 3 members, expected one packed tensor or two \(gate, up\)"),
        ({"bias": (39,)}, r"bias has 39 elements, expected 40 \(= the outputs of gate_up_weight\)"),
        ({"bias": ((20,), (19,))}, r"bias\[1\] has 19 elements, expected 20 \(= the outputs of its weight\)"),
        ({"norm_weight": (63,)}, r"norm_weight has 63 elements, expected 64"),
        ({"residual": (5, 64)}, r"residual has shape \[5, 64\], expected \[6, 64\]"),
        ({"out": (6, 40)}, r"out has shape \[6, 40\], expected \[6, 20\]"),
        ({"residual_out": (6, 64)}, r"residual_out was given without a residual"),
    ],
)  # fmt: skip
def test_what_is_refused(change, message):
    def made(shape):
        return tuple(map(made, shape)) if shape and isinstance(shape[0], tuple) else np.ones(shape, np.float32)

    shapes = {"x": (6, 64), "norm_weight": (64,), "gate_up_weight": (40, 64)} | change
    with pytest.raises(ValueError, match="rms_norm_gate_up: " + message):
        minivllm.rms_norm_gate_up(**{name: made(shape) for name, shape in shapes.items()})


def test_other_refusals():
    x, gamma = np.ones((6, 64), np.float16), np.ones(64, np.float16)
    gate, up = np.ones((20, 64), np.float16), np.ones((20, 64), np.float32)
    with pytest.raises(TypeError, match=r"gate_up_weight\[1\] is float32, expected float16 \(= the dtype of gate_up_w"):
        minivllm.rms_norm_gate_up(x, gamma, (gate, up))
    apart = np.ones((64, 20), np.float16).T
    with pytest.raises(ValueError, match="one of gate_up_weight is contiguous along hidden and the other is not"):
        minivllm.rms_norm_gate_up(x, gamma, (gate, apart))
    for activation in ("relu", "tanh", "", "SILU"):
        with pytest.raises(ValueError, match=r"activation is '\w*', expected \"silu\", \"gelu_tanh\" or \"gelu\""):
            minivllm.rms_norm_gate_up(x, gamma, gate, activation=activation)
    for activation in (None, 0, b"silu"):
        with pytest.raises(TypeError, match=r"activation must be \"silu\", \"gelu_tanh\" or \"gelu\", got "):
            minivllm.rms_norm_gate_up(x, gamma, gate, activation=activation)


def test_out_must_not_overlap():
    x, gamma = np.ones((2, 8), np.float32), np.ones(8, np.float32)
    packed, gate, up = (np.ones((size, 8), np.float32) for size in (6, 3, 3))
    for name, weight, out in (
        ("x", packed, x[:, :3]),
        ("gate_up_weight", packed, packed[:2, :3]),
        ("gate_up_weight[1]", (gate, up), up[:2, :3]),
    ):
        name = name.replace("[", r"\[")
        with pytest.raises(ValueError, match=f"rms_norm_gate_up: out overlaps {name}"):
            minivllm.rms_norm_gate_up(x, gamma, weight, out=out)
    with pytest.raises(ValueError, match="rms_norm_gate_up: residual_out overlaps x"):
        minivllm.rms_norm_gate_up(x, gamma, packed, residual=np.ones_like(x), residual_out=x)


def test_a_graph_refuses_too(device):
    torch = torch_on(device).torch
    x, gamma, weight = (torch.ones(size, device=device) for size in ((2, 8), (8,), (6, 8)))
    graph = torch.compile(minivllm.rms_norm_gate_up, backend="aot_eager")
    with pytest.raises(
        Exception, match=r"gate_up_weight has 3 members, expected one packed tensor or two \(gate, up\)"
    ):
        graph(x, gamma, (weight, weight, weight))


@pytest.mark.parametrize("kind", KINDS.values())
@pytest.mark.parametrize("rounding", ["hf", "fp32"])
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_the_tolerance_holds_and_is_no_wider_than_it_must(dtype, rounding, kind):
    """Products moved to both ends of their tolerance and to places between stay within that of the result; and where
    no product is near a tie, "hf" of 16 bits allows for little more than the last rounding."""
    exact = normal((40, 400), "f32", "products", scale=2.0) * (1 + 2.0**-30)
    error = 2.0**-20 * abs(exact)
    bound = error + reference.quantum(exact, dtype) / 2
    values, allowed = numeric.gate_up_tolerance(exact, bound, kind, rounding, dtype)
    for part in (-1.0, -0.5, 0.0, 0.3, 1.0):
        moved = exact + part * error
        moved = round_to(moved, dtype) if rounding == "hf" else moved
        got = reference.act_and_mul(moved, kind, rounding=rounding, dtype=dtype)
        numeric.assert_within(got, values, allowed, f"{part}")
    if rounding == "hf" and dtype != "f32":
        tight = allowed <= 0.51 * reference.quantum(values, dtype)
        assert tight.mean() > 0.9
