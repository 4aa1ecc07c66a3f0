"""linear and linear_add: every kernel, layout and framework against float64, where they round, and gradients. Their
kernels are those of rms_norm_qkv, whose tests take them to every edge of the product; what differs is how it begins,
without a norm, and how it ends, in a residual."""

import functools

import numpy as np
import pytest
from cases import CONTIGUOUS, PADDED, REVERSED, TRANSPOSED, UNALIGNED, Placed, assert_same_bits, normal, random
from checks import WEIGHTS
from conftest import short_dtype
from frameworks import TORCH_CPU, TORCH_CUDA

import minivllm
from minivllm.testing import numeric, reference
from minivllm.testing.reference import round_to, to_float64

LAYOUT_NAMES = {"packed": "out_in", "packed_t": "in_out", "in_out": "in_out", "padded": "out_in", "unaligned": "out_in"}
SHAPES = ((64, 7), (128, 1), (256, 384), (1024, 1000), (40, 131), (192, 448))  # hidden, outputs


def inputs_of(hidden, outputs, tokens, dtype):
    return {
        "x": normal((tokens, hidden), dtype, "x", hidden, tokens),
        "weight": normal((outputs, hidden), dtype, "weight", hidden, outputs, scale=0.05),
        "residual": normal((tokens, outputs), dtype, "residual", outputs, tokens),
        "bias": normal((outputs,), dtype, "bias", outputs, scale=0.5),
    }


@functools.cache
def expected(hidden, outputs, tokens, dtype, op, biased=False, scale=1.0, rounding="hf", tf32=False):
    """(out before its last rounding, the tolerance)"""
    values = inputs_of(hidden, outputs, tokens, dtype)
    x, weight = values["x"], values["weight"]
    residual = values["residual"] if op == "linear_add" else None
    scale = float(np.float32(scale))
    out, sums = reference.linear(
        x, weight, bias=values["bias"] if biased else None, residual=residual, scale=scale, rounding=rounding,
        dtype=dtype, round_last=False
    )  # fmt: skip
    bound = numeric.tolerance(sums, x, dtype, weight=weight, length=hidden, tf32=tf32)
    if residual is not None:
        bound = numeric.added_tolerance(sums, bound, out, dtype, scale=scale, rounding=rounding)
    return out, bound


def run(op, tensors, **options):
    """The op on these tensors, of which linear takes no residual and no scale."""
    if op == "linear":
        options.pop("scale", None)
        return minivllm.linear(tensors["x"], tensors["weight"], **options)
    return minivllm.linear_add(tensors["x"], tensors["weight"], tensors["residual"], **options)


def check(framework, op, dtype, hidden, outputs, tokens, *, layout="packed", biased=False, wide=False, in_place=False,
          out=None, x_layout=CONTIGUOUS, residual_layout=CONTIGUOUS, **options):  # fmt: skip
    """Whether the kernel took the call; a forced one may refuse it. wide: float32 weights under x of 16 bits."""
    values = inputs_of(hidden, outputs, tokens, dtype)
    weight_dtype = "f32" if wide else dtype
    rows = {name: Placed(framework, values[name].shape, dtype, where, values[name])
            for name, where in (("x", x_layout), ("residual", residual_layout))}  # fmt: skip
    tensors = {name: placed.tensor for name, placed in rows.items()}
    tensors["weight"] = WEIGHTS[layout](framework, values["weight"], weight_dtype, (outputs,))
    judged = {"biased": biased, "scale": options.get("scale", 1.0), "rounding": options.get("rounding", "hf")}
    judged["tf32"] = options.get("allow_tf32", False) and dtype == "f32"
    if biased:
        options["bias"] = framework.tensor(values["bias"], weight_dtype)
    placed = rows["residual"] if in_place else Placed(framework, (tokens, outputs), dtype, out) if out else None
    if placed:
        options["out"] = placed.tensor
    try:
        result = run(op, tensors, weight_layout=LAYOUT_NAMES[layout], **options)
    except ValueError as error:
        kernel = options.get("kernel")
        assert kernel and f"{op}: kernel '{kernel}' cannot serve this call: " in str(error)
        return False
    framework.synchronize()
    assert tuple(result.shape) == (tokens, outputs) and framework.is_mine(result)
    exact, bound = expected(hidden, outputs, tokens, dtype, op, **judged)
    numeric.assert_within(to_float64(result), exact, bound, f"{hidden} -> {outputs}, {tokens} tokens, {options}")
    assert_same_bits(tensors["x"], values["x"], "x, an input")
    if placed:
        placed.check_canaries()
        assert_same_bits(placed.values(), to_float64(result))
    if not in_place:
        assert_same_bits(tensors["residual"], values["residual"], "residual, an input")
    return True


def check_count(kernel, ran, calls):
    """How many of the calls a kernel took: all that it could, and none where it has a norm in it."""
    if "heads" in kernel.name or kernel.name == "bf16_wgmma_sm90a" or kernel.name.split("_", 1)[1] == "ffma_sm80":
        assert ran == 0
    elif any(part in kernel.name for part in ("mma", "sm90a", "norm_few")) and "norm_ffma" not in kernel.name:
        assert ran
    else:
        assert ran == calls


@pytest.mark.sanitize
@pytest.mark.rows("linear")
def test_every_kernel(kernel, framework):
    dtype, ran = short_dtype(kernel.dtype), 0
    for hidden, outputs in SHAPES:
        for tokens in (1, 5, 19, 130):
            for biased in (False, True):
                ran += check(framework, "linear", dtype, hidden, outputs, tokens, biased=biased, kernel=kernel.name,
                             static_weights=biased)  # fmt: skip
    check_count(kernel, ran, 8 * len(SHAPES))


@pytest.mark.sanitize
@pytest.mark.rows("linear_add")
def test_every_kernel_adds(kernel, framework):
    dtype, ran, calls = short_dtype(kernel.dtype), 0, 0
    for hidden, outputs in SHAPES:
        for tokens in (1, 5, 19, 130):
            for scale, rounding in ((1.0, "hf"), (0.22, "hf"), (0.22, "fp32")):
                calls += 1
                ran += check(framework, "linear_add", dtype, hidden, outputs, tokens, biased=rounding == "hf",
                             scale=scale, rounding=rounding, in_place=scale == 1, static_weights=scale != 1,
                             kernel=kernel.name)  # fmt: skip
    check_count(kernel, ran, calls)


@pytest.mark.rows("linear_add")
def test_every_kernel_rounds_where_it_should(kernel, framework):
    """Small integers, of which every sum is exact: bit for bit, by whatever order they are added."""
    dtype, rng, ran = short_dtype(kernel.dtype), random("integers"), 0
    for tokens, hidden, outputs in ((3, 256, 72), (70, 128, 200)):
        integers = {name: rng.integers(-6, 7, shape).astype(np.float64) for name, shape in
                    (("x", (tokens, hidden)), ("weight", (outputs, hidden)), ("bias", (outputs,)))}  # fmt: skip
        values = integers | {"residual": normal((tokens, outputs), dtype, "residual", tokens)}
        tensors = {name: framework.tensor(value, dtype) for name, value in values.items()}
        bias = tensors.pop("bias")
        for scale, rounding in ((1.0, "hf"), (1.0, "fp32"), (0.375, "hf"), (0.375, "fp32")):
            options = {"scale": scale, "rounding": rounding, "kernel": kernel.name, "bias": bias}
            try:
                got = run("linear_add", tensors, **options)
            except ValueError as error:
                assert "cannot serve this call" in str(error)
                continue
            ran += 1
            out, _ = reference.linear(**values, scale=scale, rounding=rounding, dtype=dtype)
            assert_same_bits(to_float64(got), out, f"{tokens} tokens, scale {scale}, {rounding}")
    check_count(kernel, ran, 8)


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("op", ["linear", "linear_add"])
def test_every_layout(device, op, dtype, layout, framework):
    for tokens in (0, 1, 33):
        for out in (None, CONTIGUOUS, UNALIGNED, PADDED):
            for wide in (False, True):
                assert check(framework, op, dtype, 256, 384, tokens, layout=layout, biased=True, out=out, wide=wide)
        for where in (UNALIGNED, PADDED):
            assert check(framework, op, dtype, 256, 384, tokens, layout=layout, x_layout=where, residual_layout=where)
            if op == "linear_add":
                assert check(
                    framework, op, dtype, 256, 384, tokens, layout=layout, residual_layout=where, in_place=True
                )
        for options in ({"batch_invariant": True}, {"allow_tf32": True}, {"static_weights": True}):
            assert check(framework, op, dtype, 256, 384, tokens, layout=layout, **options)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_leading_dimensions_of_any_strides(device, dtype, framework):
    """x, residual and out each with strides of their own, also where the op runs in several pieces."""
    lead, hidden, outputs = (2, 3, 4, 2), 64, 72
    x = normal((*lead, hidden), dtype, "x", lead)
    residual = normal((*lead, outputs), dtype, "residual", lead)
    values = inputs_of(hidden, outputs, 1, dtype)
    weight, bias = (framework.tensor(values[name], dtype) for name in ("weight", "bias"))
    whole = minivllm.linear_add(framework.tensor(x, dtype), weight, framework.tensor(residual, dtype), bias=bias)
    backwards = [] if framework.name.startswith("torch") else [REVERSED]
    for where in (PADDED, UNALIGNED, TRANSPOSED, *backwards):
        for in_place in (False, True):
            placed = Placed(framework, residual.shape, dtype, where, residual)
            out = placed if in_place else Placed(framework, residual.shape, dtype, where)
            given = Placed(framework, x.shape, dtype, PADDED if where is TRANSPOSED else where, x)
            minivllm.linear_add(given.tensor, weight, placed.tensor, bias=bias, out=out.tensor)
            framework.synchronize()
            out.check_canaries()
            sums = x @ values["weight"].T + values["bias"]
            bound = numeric.tolerance(sums, x, dtype, weight=values["weight"], length=hidden)
            added = round_to(sums, dtype) + residual
            bound = numeric.added_tolerance(sums, bound, added, dtype)
            numeric.assert_within(out.values(), added, bound, where.name)
            numeric.assert_within(to_float64(whole), added, bound)


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("op", ["linear", "linear_add"])
def test_a_row_alone_and_among_others(device, op, dtype, framework):
    values = inputs_of(256, 200, 70, dtype)
    tensors = {name: framework.tensor(value, dtype) for name, value in values.items()}
    together = to_float64(run(op, tensors, batch_invariant=True))
    for row in (0, 33, 69):
        alone = tensors | {name: tensors[name][row : row + 1] for name in ("x", "residual")}
        assert_same_bits(to_float64(run(op, alone, batch_invariant=True)), together[row : row + 1])


def torch_on(device):
    framework = TORCH_CUDA if device == "cuda" else TORCH_CPU
    if reason := framework.why_not():
        pytest.skip(reason)
    return framework


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("kind", ["normal", "outlier channels"])
def test_as_accurate_as_torch(device, dtype, kind):
    """The pooled RMS error, against that of torch's own expressions in the same dtype."""
    framework = torch_on(device)
    torch, errors = framework.torch, {"ours": [], "torch's": []}
    for tokens, hidden, outputs in ((1, 2048, 512), (8, 1024, 768), (96, 768, 512)):
        values = inputs_of(hidden, outputs, tokens, dtype)
        if kind == "outlier channels":
            values["x"] = round_to(values["x"] * np.where(np.arange(hidden) % 97 == 0, 100.0, 1.0), dtype)
        x, weight, residual, bias = (
            framework.tensor(values[name], dtype) for name in ("x", "weight", "residual", "bias")
        )
        for scale in (1.0, 0.22):
            truth, _ = reference.linear(**values, scale=scale, dtype=None)
            projected = torch.nn.functional.linear(x, weight, bias)
            theirs = residual + (projected if scale == 1 else projected * scale)
            ours = minivllm.linear_add(x, weight, residual, bias=bias, scale=scale)
            for name, result in (("ours", ours), ("torch's", theirs)):
                errors[name].append(((to_float64(result) - truth) ** 2).mean())
    ours, theirs = (np.sqrt(np.mean(errors[name])) for name in ("ours", "torch's"))
    assert ours <= (1.5 if dtype == "f32" else 1.02) * theirs


@pytest.mark.parametrize("in_out", [False, True])
@pytest.mark.parametrize("scale", [None, 1.0, 0.22])  # None: linear
def test_gradients(device, in_out, scale):
    """Those of torch's own expression, to the float32 noise of sums of that length; compiled and not."""
    framework = torch_on(device)
    torch = framework.torch
    values = inputs_of(96, 40, 6, "f32")
    leaves = {name: framework.tensor(value, "f32").requires_grad_() for name, value in values.items()}
    if in_out:
        leaves["weight"] = leaves["weight"].detach().t().contiguous().requires_grad_()

    def ours(x, weight, residual, bias):
        if scale is None:
            return minivllm.linear(x, weight, bias=bias)
        return minivllm.linear_add(x, weight, residual, bias=bias, scale=scale)

    def theirs(x, weight, residual, bias):
        out = torch.nn.functional.linear(x, weight.t() if in_out else weight, bias)
        return out if scale is None else residual + out * scale

    def gradients(function):
        out = function(**leaves)
        return torch.autograd.grad(out.sin().sum(), list(leaves.values()), allow_unused=scale is None)

    wanted = gradients(theirs)
    for function in (ours, torch.compile(ours, backend="aot_eager", fullgraph=True)):
        for name, got, want in zip(leaves, gradients(function), wanted, strict=True):
            assert (got is None) == (want is None), name
            if want is not None:
                bound = 2**-24 * 96 * float(want.abs().max())
                assert float((got - want).abs().max()) <= bound, name


def test_compiled_in_place_and_vmap(device):
    framework = torch_on(device)
    torch, values = framework.torch, inputs_of(96, 40, 6, "f32")
    x, weight, residual, bias = (framework.tensor(values[name], "f32") for name in ("x", "weight", "residual", "bias"))
    wanted = minivllm.linear_add(x, weight, residual, bias=bias, scale=0.5)
    written = residual.clone()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def add_to(out):
        minivllm.linear_add(x, weight, out, bias=bias, scale=0.5, out=out)
        return out + 1

    assert torch.equal(add_to(written), wanted + 1) and torch.equal(written, wanted)
    batched = torch.vmap(lambda x, residual: minivllm.linear_add(x, weight, residual, bias=bias, scale=0.5))
    assert torch.equal(batched(x.view(2, 3, 96), residual.view(2, 3, 40)).view(6, 40), wanted)
    each = torch.vmap(lambda weight: minivllm.linear(x, weight))(torch.stack((weight, 2 * weight)))
    assert torch.equal(each[0], minivllm.linear(x, weight)) and torch.equal(each[1], 2 * each[0])


def test_gradients_and_outputs_do_not_go_together(device):
    framework = torch_on(device)
    torch = framework.torch
    x, weight, residual = torch.ones(2, 4), torch.ones(3, 4), torch.ones(2, 3)
    with pytest.raises(RuntimeError, match="linear_add: weight requires grad and grad mode is on"):
        minivllm.linear_add(x, weight.requires_grad_(), residual, out=residual)


def test_jax():
    jax = pytest.importorskip("jax", reason="jax is not installed")
    from minivllm import jax as ops

    values = {name: jax.numpy.asarray(value, "float32") for name, value in inputs_of(96, 40, 6, "f32").items()}
    x, weight, residual, bias = (values[name] for name in ("x", "weight", "residual", "bias"))
    for scale in (1.0, 0.22):
        out = jax.jit(functools.partial(ops.linear_add, bias=bias, scale=scale))(x, weight, residual)
        numeric.assert_within(np.asarray(out, np.float64), *expected(96, 40, 6, "f32", "linear_add", True, scale))
    out = jax.jit(functools.partial(ops.linear, bias=bias))(x, weight)
    numeric.assert_within(np.asarray(out, np.float64), *expected(96, 40, 6, "f32", "linear", True))
    gradients = jax.grad(lambda x, w, r: ops.linear_add(x, w, r, scale=0.5).sum(), argnums=(0, 1, 2))(
        x, weight, residual
    )
    wide = {name: np.asarray(value, np.float64) for name, value in values.items()}
    wanted = (
        np.tile(wide["weight"].sum(0) / 2, (6, 1)),
        np.tile(wide["x"].sum(0) / 2, (40, 1)),
        np.ones((6, 40)),
    )
    for got, want in zip(gradients, wanted, strict=True):
        numeric.assert_within(np.asarray(got, np.float64), want, 2**-20)
    each = jax.vmap(ops.linear_add, in_axes=(0, None, 0))(x.reshape(2, 3, 96), weight, residual.reshape(2, 3, 40))
    assert_same_bits(np.asarray(each).reshape(6, 40), np.asarray(ops.linear_add(x, weight, residual)))


@pytest.mark.rows("linear_add", "cuda")
@pytest.mark.parametrize("outputs", [896, 6144])
def test_addends_that_the_kernel_in_front_writes(kernel, outputs, cuda_torch):
    """The kernel in front lets the call begin at once, and takes several times as long as it: a call that reads the
    addends too early finds those of the round before."""
    torch, dtype, hidden = cuda_torch, getattr(cuda_torch, kernel.dtype), 896

    def drawn(*shape):
        return (torch.randn(*shape, device="cuda") / shape[-1] ** 0.5).to(dtype)

    weight, front = drawn(outputs, hidden), drawn(outputs, 8192)
    taken = 0
    for tokens in (1, 5, 16, 33, 130):
        x, sources, residual = drawn(tokens, hidden), [drawn(tokens, 8192) for _ in range(2)], drawn(tokens, outputs)
        out = torch.empty_like(residual)

        def call(source, options, x=x, residual=residual, out=out):
            minivllm.linear(source, front, weight_layout="out_in", out=residual, **options)
            minivllm.linear_add(
                x, weight, residual, weight_layout="out_in", out=out, kernel=kernel.name, static_weights=True
            )

        wanted = []
        try:
            for source in sources:
                call(source, {})
                torch.cuda.synchronize()
                wanted.append(out.clone())
        except ValueError as error:
            assert "cannot serve this call" in str(error)
            continue
        taken += 1
        assert not wanted[0].equal(wanted[1])
        wrong = torch.zeros((), dtype=torch.int64, device="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(40):
                call(sources[i % 2], {"static_weights": True})
                wrong += (out != wanted[i % 2]).any()
        for _ in range(10):
            graph.replay()
        assert int(wrong) == 0, f"{tokens} tokens: {int(wrong)} of 400 calls"
    if not taken:
        pytest.skip("this kernel of a GPU serves no such call")


@pytest.mark.parametrize(
    "change,message",
    [
        ({"weight": (40, 60)}, r"weight has shape \[40, 60\], expected \[outputs, 64\]"),
        (
            {"weight": (64, 64), "residual": (6, 64)},
            r"weight is square \(\[64, 64\]\), so it could be \[outputs, hidden\]",
        ),
        ({"weight": (0, 64)}, r"weight has no outputs"),
        ({"bias": (39,)}, r"bias has 39 elements, expected 40 \(= the outputs of weight\)"),
        ({"residual": (6, 41)}, r"residual has shape \[6, 41\], expected \[6, 40\]"),
        ({"residual": (40,)}, r"residual has shape \[40\], expected \[6, 40\]"),
        ({"out": (6, 41)}, r"out has shape \[6, 41\], expected \[6, 40\]"),
    ],
)
def test_what_is_refused(change, message):
    shapes = {"x": (6, 64), "weight": (40, 64), "residual": (6, 40)} | change
    arrays = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match="linear_add: " + message):
        minivllm.linear_add(**arrays)
    if "residual" not in change or "weight" in change:
        del arrays["residual"]
        with pytest.raises(ValueError, match="linear: " + message):
            minivllm.linear(**arrays)


def test_numbers_and_dtypes_that_are_refused():
    x, weight, residual = np.ones((2, 8), np.float32), np.ones((4, 8), np.float32), np.ones((2, 4), np.float32)
    for scale in (np.inf, np.nan, 1e39):
        with pytest.raises(ValueError, match="linear_add: scale is .*, expected a finite number of float32"):
            minivllm.linear_add(x, weight, residual, scale=scale)
    with pytest.raises(ValueError, match='linear: rounding is .*, expected "hf", "hf_once" or "fp32"'):
        minivllm.linear(x, weight, rounding="bf16")
    with pytest.raises(TypeError, match=r"linear_add: residual is float16, expected float32 \(the dtype of x\)"):
        minivllm.linear_add(x, weight, residual.astype(np.float16))
    with pytest.raises(TypeError, match="linear_add: residual must be a tensor"):
        minivllm.linear_add(x, weight, None)


def test_what_out_may_be():
    """Exactly the residual, and nothing else that the op reads."""
    buffer = np.ones((2, 9), np.float32)
    x, weight, bias = np.ones((2, 4), np.float32), np.ones((4, 4), np.float32), np.ones(4, np.float32)
    residual = buffer[:, :4]
    assert minivllm.linear_add(x, weight, residual, weight_layout="out_in", out=residual) is residual
    assert (residual == 5).all() and (buffer[:, 4:] == 1).all()
    for name, out in (("residual in part", buffer[:, 1:5]), ("x", x), ("weight", weight[:2])):
        with pytest.raises(ValueError, match=f"linear_add: out overlaps {name}"):
            minivllm.linear_add(x, weight, residual, bias=bias, weight_layout="out_in", out=out)
    with pytest.raises(ValueError, match="linear: out overlaps x"):
        minivllm.linear(x, weight, weight_layout="out_in", out=x)
