"""Gradients, held against those of torch in float64 at the bound of minivllm.testing.numeric."""

import numpy as np
import pytest
from cases import assert_same_bits, normal
from torch_calls import FUNCTIONAL, HEADS, HIDDEN, KV_HEADS, WRITING, Inputs

import minivllm
from minivllm.testing import numeric, reference
from minivllm.testing.reference import round_to, to_float64

LEAVES = ("x", "residual", "norm", "wide", "square", "bias")


class Float64:
    """The ops in float64, for torch to differentiate. They round only the sum with a residual, which is where the
    gradient is taken, and keep what the bounds are made of."""

    def __init__(self, torch, dtype):
        self.torch, self.dtype, self.weights, self.y = torch, dtype, [], None

    def rms_norm(self, x, weight, eps=1e-6, *, rounding="hf", weight_offset=0.0):
        if weight is None:
            weight = self.torch.ones(x.shape[-1], dtype=x.dtype, device=x.device)
        s, self.scale = x.detach(), weight.detach() + weight_offset
        self.s, self.r = s, 1 / ((s**2).mean(-1, keepdim=True) + eps).sqrt()
        self.y, _ = reference.rms_norm(x, weight, eps, weight_offset=weight_offset)
        self.y.retain_grad()
        return self.y

    def add_rms_norm(self, x, residual, weight, eps=1e-6, **options):
        s = x + residual
        s = s + (round_to(s.detach(), self.dtype) - s.detach())
        s.retain_grad()
        return self.rms_norm(s, weight, eps, **options), s

    def rms_norm_qkv(
        self, x, norm_weight, weight, heads, kv_heads, *, bias=None, residual=None, weight_layout="auto",
        weight_offset=0.0, head_dim=None
    ):  # fmt: skip
        cat, total = self.torch.cat, []
        if residual is None:
            y = self.rms_norm(x, norm_weight, weight_offset=weight_offset)
        else:
            y, *total = self.add_rms_norm(x, residual, norm_weight, weight_offset=weight_offset)
        members = weight if isinstance(weight, tuple) else (weight,)
        in_out = weight_layout == "in_out"
        self.given_in_out = in_out and members[0].stride(1) == 1  # rather than as a view of what is not
        self.weights = [(member.t() if in_out else member).detach() for member in members]
        self.packed = y @ cat([member.t() if in_out else member for member in members]).t()
        if bias is not None:
            self.packed = self.packed + (cat(bias) if isinstance(bias, tuple) else bias)
        self.packed.retain_grad()
        parts = self.packed.unflatten(-1, (heads + 2 * kv_heads, -1)).split([heads, kv_heads, kv_heads], -2)
        return *parts, *total

    def silu_and_mul(self, x):
        gate, up = x.chunk(2, -1)
        return self.torch.nn.functional.silu(gate) * up

    def gelu_and_mul(self, x, *, approximate, rounding):
        gate, up = x.chunk(2, -1)
        return self.torch.nn.functional.gelu(gate, approximate=approximate) * up

    def bound(self, leaf, expected):
        """How far the gradient of a leaf may be off: by the one tolerance, of sums of the gradient of y times what y
        changes by; and by what that gradient, itself a product and rounded for each member of a tuple, was off."""
        if self.y is None:  # an activation: a dozen operations of float32 on numbers up to 4, and one rounding
            return reference.quantum(expected, self.dtype) / 2 + 64 * numeric.UNIT_F32 * (1 + abs(expected))
        tensors = [to_float64(t) for t in (self.s, self.r, self.y, self.y.grad)]
        s, r, y, dy = (t.reshape(-1, t.shape[-1]) for t in tensors)  # a row per token
        n, tokens, scale = s * r, len(s), to_float64(self.scale)

        def tolerance(result, terms, weight, roundings=0, error=None):
            length = max(HIDDEN, tokens, len(weight), weight.shape[-1])
            bound = numeric.tolerance(result, terms, self.dtype, length=length, weight=weight, roundings=roundings)
            if error is not None:
                spread = numeric.LAMBDA * np.sqrt(error**2 @ (weight**2).T)
                bound = bound + np.minimum(spread, error @ abs(weight).T)
            return bound

        error = None
        if self.weights:
            dout, weights = to_float64(self.packed.grad).reshape(tokens, -1), [to_float64(w) for w in self.weights]
            parts = np.split(dout, np.cumsum([len(w) for w in weights])[:-1], 1)
            error = sum(tolerance(part @ w, part, w.T) for part, w in zip(parts, weights))
        if leaf in ("x", "residual"):
            bound = np.zeros_like(expected)
            for t in range(tokens):
                jacobian = r[t] * (np.diag(scale) - np.outer(n[t], scale * n[t]) / HIDDEN)
                bound[t] = tolerance(expected[t], dy[t], jacobian, error=None if error is None else error[t])
            return bound
        ones = np.ones((1, tokens))
        if leaf == "norm":
            error = None if error is None else (error * abs(n)).T
            return tolerance(expected[:, None], (dy * n).T, ones, error=error)[:, 0]
        if leaf == "bias":
            return tolerance(expected[:, None], dout.T, ones)[:, 0]
        bound = tolerance(y.T @ dout, y.T, dout.T, roundings=1)  # [hidden, outputs]; y is rounded
        return bound if self.given_in_out else bound.T


def gradients(torch, call, inputs, ops, weigh):
    """Of every leaf: the gradient of sum(weight_i output_i), or None."""
    for name in LEAVES:
        setattr(inputs, name, getattr(inputs, name).detach().requires_grad_())
    outputs = call(inputs, ops)
    torch.autograd.backward(outputs, [weigh(i, output) for i, output in enumerate(outputs)])
    return {name: getattr(inputs, name).grad for name in LEAVES}


def check(torch, call, inputs, transform=lambda call: call):
    """The gradients of transform(call)."""
    dtype = inputs.dtype

    def weigh(i, output):
        values = torch.from_numpy(normal(tuple(output.shape), dtype, "gradient", i))
        return values.to(output)

    wide = Inputs(dtype=dtype)
    for name in LEAVES:
        setattr(wide, name, getattr(inputs, name).detach().double().cpu())
    exact = Float64(torch, dtype)
    expected = gradients(torch, call, wide, exact, weigh)
    got = gradients(torch, transform(call), inputs, minivllm, weigh)
    for name in LEAVES:
        assert (got[name] is None) == (expected[name] is None), name
        if got[name] is not None:
            assert got[name].dtype == getattr(inputs, name).dtype
            values = to_float64(expected[name])
            numeric.assert_within(to_float64(got[name]), values, exact.bound(name, values), f"gradient of {name}")


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "mixed"])
@pytest.mark.parametrize("call", FUNCTIONAL.values(), ids=FUNCTIONAL)
def test_gradients(torch, device, call, dtype):
    inputs = Inputs(device, "bf16" if dtype == "mixed" else dtype)
    if dtype == "mixed":
        for name in ("norm", "wide", "square", "bias"):
            setattr(inputs, name, getattr(inputs, name).float() * 1.001)
    check(torch, call, inputs)


@pytest.mark.parametrize("call", FUNCTIONAL.values(), ids=FUNCTIONAL)
def test_gradients_of_a_graph(torch, device, call):
    torch.compiler.reset()
    check(torch, call, Inputs(device, "bf16"), lambda call: torch.compile(call, fullgraph=True, backend="aot_eager"))


def test_gradients_by_inductor(torch, device):
    def both(i, ops):
        return *FUNCTIONAL["residual"](i, ops), *FUNCTIONAL["add_rms_norm"](i, ops)

    torch.compiler.reset()
    inputs = Inputs(device)
    for name in LEAVES:
        setattr(inputs, name, getattr(inputs, name).requires_grad_())
    outputs = both(inputs, minivllm)
    expected = torch.autograd.grad([output.sum() for output in outputs], [inputs.x, inputs.wide, inputs.norm])
    outputs = torch.compile(both, fullgraph=True)(inputs, minivllm)
    got = torch.autograd.grad([output.sum() for output in outputs], [inputs.x, inputs.wide, inputs.norm])
    for a, b in zip(got, expected):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))


TWICE = {
    "x is the residual": lambda i: minivllm.add_rms_norm(i.x, i.x, i.norm),
    "x is the residual of a projection": lambda i: minivllm.rms_norm_qkv(
        i.x, i.norm, i.wide, HEADS, KV_HEADS, residual=i.x
    ),
    "a row is its weight": lambda i: (minivllm.rms_norm(i.norm, i.norm),),
    "k is v": lambda i: minivllm.rms_norm_qkv(
        i.x, i.norm, (i.square[:8], i.part, i.part), 1, 1, bias=(i.norm[:8], i.few, i.few)
    ),
}


@pytest.mark.parametrize("call", TWICE.values(), ids=TWICE)
def test_a_tensor_given_twice_to_a_graph(torch, device, call):
    """Its gradient is the sum of both. To torch.compile an autograd.Function may have no argument twice."""

    def gradients(call):
        i = Inputs(device)
        i.part, i.few = i.square[8:16].clone(), i.bias[:8].clone()
        leaves = [tensor.requires_grad_() for tensor in (i.x, i.norm, i.part, i.few)]
        sum((part**2).sum() for part in call(i)).backward()
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    torch.compiler.reset()
    got = gradients(torch.compile(call, fullgraph=True, backend="aot_eager"))
    for a, b in zip(got, gradients(call), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))


def test_only_the_gradients_asked_for(torch, device):
    """A frozen weight costs no product, and one member of a tuple may be the only one that learns."""
    i = Inputs(device)
    members = [member.clone() for member in i.square.split([32, 8, 8])]
    members[1].requires_grad_()
    q, k, v = minivllm.rms_norm_qkv(i.x, i.norm, members, HEADS, KV_HEADS, weight_layout="out_in")
    assert q.requires_grad  # of one autograd function
    (k.sum() + q.sum()).backward()
    y = minivllm.rms_norm(i.x, i.norm)
    assert torch.allclose(members[1].grad, y.sum(0).expand(8, -1), rtol=1e-5, atol=1e-5)
    assert members[0].grad is None and i.norm.grad is None


def test_no_tokens(torch, device):
    i = Inputs(device)
    i.norm.requires_grad_(), i.wide.requires_grad_()
    sum(part.sum() for part in minivllm.rms_norm_qkv(i.x[:0], i.norm, i.wide, HEADS, KV_HEADS)).backward()
    assert not i.norm.grad.any() and not i.wide.grad.any()


def test_second_derivatives(torch, device):
    """The backward is plain torch, so it can be differentiated again."""
    i, names = Inputs(device), ("x", "norm", "wide")

    def second(ops, tensors):
        for name, tensor in tensors.items():
            setattr(i, name, tensor.detach().requires_grad_())
        q, k, v, total = ops.rms_norm_qkv(i.x, i.norm, i.wide, HEADS, KV_HEADS, residual=i.residual.to(i.x))
        leaves = [getattr(i, name) for name in names]
        first = torch.autograd.grad((q**2).sum() + (k**3).sum() + total.sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum((gradient**2).sum() for gradient in first), leaves)

    tensors = {name: getattr(i, name) for name in names}
    got = second(minivllm, tensors)
    exact = second(Float64(torch, "f32"), {name: tensor.double() for name, tensor in tensors.items()})
    for name, a, b in zip(names, got, exact):
        # Two passes, each of some sums over at most 96 terms; relative to the largest element, since they cancel.
        bound = 16 * numeric.LAMBDA * numeric.UNIT_F32 * len(i.wide) ** 0.5 * float(b.abs().max())
        numeric.assert_within(to_float64(a), to_float64(b), bound, f"second derivative by {name}")


def test_a_layer_of_parameters_learns(torch, device):
    """One step of SGD on a layer object ends where it ends on torch's own modules, and checkpointing changes nothing."""
    i = Inputs(device)
    norm, weight = torch.nn.Parameter(i.norm), torch.nn.Parameter(i.wide)
    layer = minivllm.FusedRMSNormQKV(norm_weight=norm, qkv_weight=weight, num_heads=HEADS, num_kv_heads=KV_HEADS)

    def gradient(run):
        norm.grad = weight.grad = None
        sum((part**2).sum() for part in run()).backward()
        return norm.grad, weight.grad

    plain = gradient(lambda: layer(i.x))
    again = gradient(lambda: torch.utils.checkpoint.checkpoint(layer, i.x, use_reentrant=False))
    pair = gradient(
        lambda: [torch.nn.functional.linear(torch.nn.functional.rms_norm(i.x, (HIDDEN,), norm, 1e-6), weight)]
    )
    for a, b, c in zip(plain, again, pair):
        assert_same_bits(a, b)
        assert torch.allclose(a, c, rtol=1e-4, atol=1e-5 * float(c.abs().max()))


def test_writing_ops_carry_no_gradient(torch, device):
    """They say so, whichever tensor it is that requires grad; and nothing has been written then."""
    for name, call in WRITING.items():
        for leaf in ("x", "residual", "norm"):
            i = Inputs(device)
            x = i.x.clone()
            getattr(i, leaf).requires_grad_()
            with pytest.raises(RuntimeError, match=r"requires grad and grad mode is on, but .* torch.no_grad\(\)"):
                call(i)
            assert torch.equal(i.x, x), (name, leaf)
            with torch.no_grad():
                call(i)
    i = Inputs(device)
    with pytest.raises(RuntimeError, match=r"rms_norm_qkv: qkv_weight\[1\] requires grad"):
        weights = (i.square[:32], i.square[32:40].clone().requires_grad_(), i.square[40:])
        minivllm.rms_norm_qkv(i.x, i.norm, weights, HEADS, KV_HEADS, weight_layout="out_in", out=i.x.clone())
    with pytest.raises(RuntimeError, match=r"rms_norm: out requires grad"):
        minivllm.rms_norm(i.x, i.norm, out=i.x.clone().requires_grad_())


@pytest.mark.parametrize("grad", [True, False], ids=["grad mode", "no_grad"])
def test_autograd_knows_what_was_overwritten(torch, device, grad):
    """A tensor that an earlier operation saved for its backward pass, and one of ours then writes to."""
    writing = {
        "fused_add_rms_norm": lambda x, i: minivllm.fused_add_rms_norm(i.residual.clone(), x, i.norm),
        "out=": lambda x, i: minivllm.rms_norm(i.residual, i.norm, out=x),
        "packed out=": lambda x, i: minivllm.rms_norm_qkv(
            i.residual, i.norm, i.square, HEADS, KV_HEADS, weight_layout="out_in", out=x
        ),
    }
    for write in writing.values():
        i, factor = Inputs(device), torch.ones((), device=device, requires_grad=True)
        product = factor * i.x
        with torch.set_grad_enabled(grad):
            write(i.x, i)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.sum().backward()


def test_other_frameworks_beside_a_gradient(torch):
    weight = torch.ones(8, requires_grad=True)
    with pytest.raises(TypeError, match=r"rms_norm: x is of type ndarray, expected a torch.Tensor: a gradient"):
        minivllm.rms_norm(np.ones((2, 8), np.float32), weight)
    with torch.no_grad():
        assert type(minivllm.rms_norm(np.ones((2, 8), np.float32), weight)) is np.ndarray
