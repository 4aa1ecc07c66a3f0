"""The ops for torch where a plain call into C cannot serve: in torch.compile and torch.export, under autograd and
torch.func, for fake and meta tensors, tensor subclasses and dispatch modes.

A call on plain tensors that need no gradient never comes here. The C functions hand the others over, with all their
arguments, to the function of the same name below, and torch.compile traces that function in their place. It calls a
registered op, torch.ops.minivllm.<name>, which the dispatcher leads back to the C function once every transformation
is done; where a gradient is asked for, it does so through an autograd.Function.
"""

import functools

import torch

from . import _C, torch_ops
from .layers import FusedRMSNormQKV
from .signatures import OPS, type_of
from .torch_checks import check
from .torch_prepack import unpacked

_FLOATS = (
    (torch.float32, torch.float16, torch.bfloat16),
    "float32, float16 or bfloat16; convert it, such as by .to(torch.float32)",
)
_DTYPES = {  # by the type of a parameter, with what a refusal says
    "tensor": _FLOATS,
    "tensors": _FLOATS,
    "integers": ((torch.int32, torch.int64), "int32 or int64; convert it"),
    "flags": ((torch.bool,), "bool; convert it"),
}
_NORM_IN_PLACE = ("x", "residual")
_IN_PLACE = {  # what an output may be exactly
    "rms_norm": _NORM_IN_PLACE,
    "add_rms_norm": _NORM_IN_PLACE,
    "fused_add_rms_norm": _NORM_IN_PLACE,
    "linear_add": ("residual",),
}
_MEMBERS = {op: {p.name: p.members for p in parameters} for op, parameters in OPS.items()}
_APPROXIMATE = {"silu": None, "gelu_tanh": "tanh", "gelu": "none"}  # as torch calls them

# ---- gradients: the kernels forward, torch's own operations backward ------------------------------------------------


def _normed(s, eps):
    """(n, r) in float32: n = s r, r = 1 / sqrt(mean(s^2) + eps)."""
    s = s.float()
    r = torch.rsqrt(s.square().mean(-1, keepdim=True) + eps)
    return s * r, r


def _norm_gradients(dy, n, r, scale):
    """For y = n scale: the gradients of s and of scale, [hidden], in float32."""
    dn = dy * scale
    return r * (dn - n * (dn * n).mean(-1, keepdim=True)), (dy * n).reshape(-1, n.shape[-1]).sum(0)


class _Norm(torch.autograd.Function):
    """rms_norm, or with a residual add_rms_norm."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, residual, weight, options):
        return torch_ops.call("rms_norm", {"x": x, "residual": residual, "weight": weight} | options)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, residual, weight, options = inputs
        ctx.adds, ctx.eps, ctx.weight_offset = residual is not None, options["eps"], options["weight_offset"]
        ctx.save_for_backward(output[1] if ctx.adds else x, weight)

    @staticmethod
    def backward(ctx, dy, ds=None):
        s, weight = ctx.saved_tensors
        n, r = _normed(s, ctx.eps)
        scale = ctx.weight_offset + (1.0 if weight is None else weight.float())
        dx, dweight = _norm_gradients(dy.float(), n, r, scale)
        dx = (dx + ds.float() if ctx.adds else dx).to(s.dtype)
        dweight = None if weight is None else dweight.to(weight.dtype)
        return dx, dx if ctx.adds else None, dweight, None


def _product_gradients(dout, y, weights, biases, needed, in_out):
    """For out = y W^T + b, with one matrix or several: the gradient of y in float32, and those of W and b."""
    if in_out:
        weights = [weight.t() for weight in weights]
    dy, gradients = 0.0, []
    for weight, part, need in zip(weights, dout.split([len(weight) for weight in weights], 1), needed):
        dtype = torch.promote_types(part.dtype, weight.dtype)
        dy = dy + (part.to(dtype) @ weight.to(dtype)).float()
        gradient = (part.t().to(dtype) @ y.to(dtype)).to(weight.dtype) if need else None
        gradients.append(gradient.t() if need and in_out else gradient)
    for bias, part in zip(biases, dout.split([len(bias) for bias in biases], 1)) if biases else ():
        gradients.append(part.float().sum(0).to(bias.dtype))
    return dy, gradients


class _Linear(torch.autograd.Function):
    """linear, or with a residual linear_add. weights: the matrix, and the bias where there is one."""

    generate_vmap_rule = True

    @staticmethod
    def forward(op, x, residual, options, *weights):
        tensors = {"x": x, "weight": weights[0], "bias": weights[1] if len(weights) > 1 else None}
        if residual is not None:
            tensors["residual"] = residual
        return torch_ops.call(op, tensors | options)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, x, residual, options, *weights = inputs
        ctx.adds, ctx.scale = residual is not None, options.get("scale", 1.0)
        ctx.in_out = torch_ops.is_in_out(weights[:1], x.shape[-1], options["weight_layout"])
        ctx.save_for_backward(x, *weights)

    @staticmethod
    def backward(ctx, dout):
        x, weight, *biases = ctx.saved_tensors
        _, _, _, _, *needed = ctx.needs_input_grad
        dsum = (dout * ctx.scale).reshape(-1, dout.shape[-1])
        rows = x.reshape(-1, x.shape[-1])
        dx, gradients = _product_gradients(dsum, rows, [weight], biases, needed, ctx.in_out)
        return None, dx.to(x.dtype).reshape(x.shape), dout if ctx.adds else None, None, *gradients


class _NormAdd(torch.autograd.Function):
    """norm_add."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight, residual, options):
        return torch_ops.call("norm_add", {"x": x, "weight": weight, "residual": residual} | options)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _, options = inputs
        ctx.eps, ctx.weight_offset = options["eps"], options["weight_offset"]
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx, dout):
        x, weight = ctx.saved_tensors
        n, r = _normed(x, ctx.eps)
        scale = ctx.weight_offset + (1.0 if weight is None else weight.float())
        dx, dweight = _norm_gradients(dout.float(), n, r, scale)
        return dx.to(x.dtype), None if weight is None else dweight.to(weight.dtype), dout, None


def _gated_gradients(gate, up, dout, approximate):
    """For out = activation(gate) up, in float32: the gradients of gate and of up. approximate: None of silu."""
    if approximate is None:
        active = torch.nn.functional.silu(gate)
        dgate = torch.ops.aten.silu_backward(dout * up, gate)
    else:
        active = torch.nn.functional.gelu(gate, approximate=approximate)
        dgate = torch.ops.aten.gelu_backward(dout * up, gate, approximate=approximate)
    return dgate, dout * active


def _gate_up_gradients(dout, y, weights, biases, in_out, activation):
    """For out = activation(g) u, g | u = y W^T + b: the gradient of g | u, which are computed once more."""
    parts = []
    for weight in weights:
        dtype = torch.promote_types(y.dtype, weight.dtype)
        parts.append((y.to(dtype) @ (weight if in_out else weight.t()).to(dtype)).float())
    products = torch.cat(parts, -1)
    if biases:
        products = products + torch.cat([bias.float() for bias in biases])
    gradients = _gated_gradients(*products.chunk(2, -1), dout.float(), _APPROXIMATE[activation])
    return torch.cat(gradients, -1).to(dout.dtype)


class _NormLinear(torch.autograd.Function):
    """rms_norm_qkv, rms_norm_linear or rms_norm_gate_up. weights: `members` matrices, then the biases."""

    generate_vmap_rule = True

    @staticmethod
    def forward(op, x, residual, norm_weight, members, options, *weights):
        tensors = {"x": x, "residual": residual, "norm_weight": norm_weight}
        if op == "rms_norm_linear":
            matrices = {"weight": weights[0], "bias": weights[1] if len(weights) > 1 else None}
        else:
            name = "qkv_weight" if op == "rms_norm_qkv" else "gate_up_weight"
            matrices = {name: weights[:members], "bias": weights[members:]}
        return torch_ops.call(op, tensors | matrices | options)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, x, residual, norm_weight, ctx.members, options, *weights = inputs
        ctx.adds, ctx.activation = residual is not None, options.get("activation")
        ctx.eps, ctx.weight_offset = options["eps"], options["weight_offset"]
        ctx.in_out = torch_ops.is_in_out(weights[: ctx.members], x.shape[-1], options["weight_layout"])
        ctx.save_for_backward(output[1] if ctx.adds else x, norm_weight, *weights)

    @staticmethod
    def backward(ctx, dout, ds=None):
        s, norm_weight, *weights = ctx.saved_tensors
        _, _, _, _, _, _, *needed = ctx.needs_input_grad
        weights, biases = weights[: ctx.members], weights[ctx.members :]
        n, r = _normed(s, ctx.eps)
        scale = ctx.weight_offset + norm_weight.float()
        y = (n * scale).to(s.dtype).reshape(-1, s.shape[-1])
        dsum = dout.reshape(-1, dout.shape[-1])
        if ctx.activation is not None:
            dsum = _gate_up_gradients(dsum, y, weights, biases, ctx.in_out, ctx.activation)
        dy, gradients = _product_gradients(dsum, y, weights, biases, needed, ctx.in_out)
        dx, dscale = _norm_gradients(dy.reshape(s.shape), n, r, scale)
        dx = (dx + ds.float() if ctx.adds else dx).to(s.dtype)
        return None, dx, dx if ctx.adds else None, dscale.to(norm_weight.dtype), None, None, *gradients


class _ActAndMul(torch.autograd.Function):
    """silu_and_mul or gelu_and_mul."""

    generate_vmap_rule = True

    @staticmethod
    def forward(op, x, options):
        return torch_ops.call(op, {"x": x} | options)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, x, options = inputs
        ctx.approximate = options.get("approximate")  # None: silu
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx, dout):
        (x,) = ctx.saved_tensors
        gradients = _gated_gradients(*x.float().chunk(2, -1), dout.float(), ctx.approximate)
        return None, torch.cat(gradients, -1).to(x.dtype), None


class _QkNormRope(torch.autograd.Function):
    """qk_norm_rope without a cache. The rotary embedding is linear: its transpose takes gradients back."""

    @staticmethod
    def forward(q, k, cos, sin, q_norm_weight, k_norm_weight, options):
        tensors = {"q": q, "k": k, "cos": cos, "sin": sin, "v": None, "key_cache": None, "value_cache": None}
        weights = {"q_norm_weight": q_norm_weight, "k_norm_weight": k_norm_weight, "slots": None}
        return torch_ops.call("qk_norm_rope", tensors | weights | options)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, options = inputs
        ctx.options = options
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, *gradients):
        q, k, cos, sin, *weights = ctx.saved_tensors
        dheads, dweights, drows = [], [], [None, None]
        for x, weight, dy in zip((q, k), weights, gradients):
            n, r = _normed(x, ctx.options["eps"])
            scale = None if weight is None else ctx.options["weight_offset"] + weight.float()
            dn = dy.float()
            if cos is not None:
                dn, *of_rows = _rotary_gradients(
                    x.float() if weight is None else n * scale, dn, cos, sin, ctx.options["interleaved"]
                )
                drows = [now if before is None else before + now for before, now in zip(drows, of_rows)]
            dweight = None
            if weight is not None:
                dn, dweight = _norm_gradients(dn, n, r, scale)
                dweight = dweight.to(weight.dtype)
            dheads.append(dn.to(x.dtype))
            dweights.append(dweight)
        drows = [None if row is None else of.to(row.dtype) for row, of in zip((cos, sin), drows)]
        return *dheads, *drows, *dweights, None


def _turned(x, interleaved):
    """-x of the other in the first of each pair, x of the other in the second."""
    if interleaved:
        return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


def _rotary_gradients(n, dy, cos, sin, interleaved):
    """For y = n cos + turned(n) sin in the first columns of n [*tokens, heads, D]: the gradients of n, cos and sin."""
    columns = cos.shape[-1]
    rows = [row.reshape(_tokens_like(row, n.shape[:-2])).float().unsqueeze(-2) for row in (cos, sin)]
    (n, _), (dy, rest) = n.split([columns, n.shape[-1] - columns], -1), dy.split([columns, n.shape[-1] - columns], -1)
    dn = dy * rows[0] - _turned(dy * rows[1], interleaved)
    drows = [
        (dy * by).sum_to_size(row.shape).reshape(of.shape)
        for by, row, of in zip((n, _turned(n, interleaved)), rows, (cos, sin))
    ]
    return torch.cat([dn, rest], -1), *drows


def _tokens_like(row, tokens):
    """The shape of a row of cos or sin that broadcasts to [*tokens, R]: its own, or that but for dimensions of 1."""
    lead = row.shape[:-1]
    if len(lead) <= len(tokens) and all(a in (1, b) for a, b in zip(lead[::-1], tokens[::-1])):
        return row.shape
    return (*tokens, row.shape[-1])


# ---- the faces: what the C functions hand over to, and what torch.compile traces ------------------------------------


def _wants_gradient(op, outputs, **tensors):
    """Whether a gradient is asked for, of tensors that may be None or several. Refuses what the dispatcher could only
    refuse in words of its own; `outputs`: those that the op is told to write to. An exported program holds the op
    alone: the function around it would come with its forward pass only, which is detached."""
    wants = False
    for name, given in (tensors | outputs).items():
        several = isinstance(given, (tuple, list))
        for i, tensor in enumerate(given if several else (given,)):
            if tensor is None:
                continue
            what = f"{op}: {name}[{i}]" if several else f"{op}: {name}"
            if not isinstance(tensor, torch.Tensor):
                raise TypeError(
                    f"{what} is of type {type(tensor).__qualname__}, expected a torch.Tensor: a gradient, a tensor "
                    "subclass or a transformation of torch is involved"
                )
            if not torch.compiler.is_compiling() and tensor.is_nested:
                raise TypeError(
                    f"{what} is a nested tensor, expected a dense one; call this on its to_padded_tensor(0.0), or of a "
                    "jagged one's rows on its values()"
                )
            if tensor.layout is not torch.strided:
                raise TypeError(f"{what} has layout {tensor.layout}, expected a dense tensor; pass its to_dense()")
            dtypes, expected = _DTYPES[type_of(op, name)]
            if tensor.dtype not in dtypes:
                raise TypeError(f"{what} has dtype {tensor.dtype}, expected {expected}")
            # In a graph torch resolves the mark before the op runs.
            if not torch.compiler.is_compiling() and tensor.is_neg():
                raise ValueError(
                    f"{what} is lazily negated (is_neg()): its memory holds the values with the other sign; pass its "
                    "resolve_neg()"
                )
            if tensor.requires_grad and torch.is_grad_enabled():
                wants = True
                if any(output is not None for output in outputs.values()):
                    without = f"{op.replace('fused_', '')} without {', '.join(outputs)}, or"
                    how = "it" if "key_cache" in outputs else without  # which is not to be left out
                    raise RuntimeError(
                        f"{what} requires grad and grad mode is on, but an op that is told where to write carries no "
                        f"gradients; call {how} under torch.no_grad()"
                    )
    # torch.compiler.is_exporting() is the name of it, and in torch 2.11 true of torch.compile as well.
    return wants and not getattr(torch.compiler, "_is_exporting_flag", False)


def _checked(op, inputs, outputs, **options):
    """Refuses what the C function refuses. Ops of a graph do so when they run, but are not told of the outputs, nor
    how weights were given; and where a tensor is, torch.compile does not know."""
    if not torch.compiler.is_compiling():
        return check(op, inputs | outputs, **options)
    for name, given in inputs.items():
        members = _MEMBERS[op][name]
        if isinstance(given, (tuple, list)) and len(given) != len(members):
            count = {2: "two", 3: "three"}.get(len(members))
            raise ValueError(
                f"{op}: {name} has {len(given)} members, expected one packed tensor or {count} ({', '.join(members)})"
            )
    given = {name: out for name, out in outputs.items() if out is not None}
    if "residual_out" in given and inputs["residual"] is None:
        raise ValueError(f"{op}: residual_out was given without a residual")
    for name, out in given.items():
        for other, tensor in (inputs | given).items():
            if out is tensor and name != other and other not in _IN_PLACE.get(op, ()):
                raise ValueError(f"{op}: {name} overlaps {other}; pass memory of its own")


def _written(op, name, out, result):
    """`result`, written to `out` where that is given."""
    if out is None:
        return result
    if out.dtype != result.dtype:
        why = " (the dtype of x)" if result.is_floating_point() else ""
        raise TypeError(f"{op}: {name} is {out.dtype}, expected {result.dtype}{why}")
    if (out.shape, out.device) != (result.shape, result.device):
        raise ValueError(
            f"{op}: {name} is {list(out.shape)} on {out.device}, expected {list(result.shape)} on {result.device}"
        )
    out.copy_(result)
    return out


def _each_once(*tensors):
    """The tensors, for an autograd.Function: to torch.compile no two of them may be the same one."""
    if not torch.compiler.is_compiling():
        return tensors
    return [
        tensor.view_as(tensor) if any(tensor is before for before in tensors[:i] if before is not None) else tensor
        for i, tensor in enumerate(tensors)
    ]


def _results(op, inputs, outputs, options, with_gradients=None):
    """What `op` gives, one tensor for each of `outputs` that it has: written there, or with gradients where one is
    asked for."""
    wants = _wants_gradient(op, outputs, **inputs)
    _checked(op, inputs, outputs, **options)
    results = with_gradients(inputs, options) if wants else torch_ops.call(op, inputs | options)
    results = results if isinstance(results, tuple) else (results,)
    return tuple(_written(op, name, out, result) for (name, out), result in zip(outputs.items(), results))


def _norm_with_gradients(inputs, options):
    return _Norm.apply(*_each_once(inputs["x"], inputs.get("residual"), inputs["weight"]), options)


def rms_norm(x, weight, eps=1e-6, *, out=None, rounding="hf", weight_offset=0.0, kernel=None):
    """minivllm.rms_norm for every torch tensor, with gradients of x and weight."""
    options = {"eps": eps, "rounding": rounding, "weight_offset": weight_offset, "kernel": kernel}
    inputs, outputs = {"x": x, "weight": weight}, {"out": out}
    (result,) = _results("rms_norm", inputs, outputs, options, _norm_with_gradients)
    return result


def add_rms_norm(
    x, residual, weight, eps=1e-6, *, out=None, residual_out=None, rounding="hf", weight_offset=0.0, kernel=None
):
    """minivllm.add_rms_norm for every torch tensor, with gradients of x, residual and weight."""
    options = {"eps": eps, "rounding": rounding, "weight_offset": weight_offset, "kernel": kernel}
    inputs = {"x": x, "residual": residual, "weight": weight}
    outputs = {"out": out, "residual_out": residual_out}
    return _results("add_rms_norm", inputs, outputs, options, _norm_with_gradients)


def fused_add_rms_norm(x, residual, weight, eps=1e-6, *, rounding="hf", weight_offset=0.0):
    """minivllm.fused_add_rms_norm for every torch tensor; no gradients."""
    inputs = {"x": x, "residual": residual, "weight": weight}
    _wants_gradient("fused_add_rms_norm", {"x": x, "residual": residual}, weight=weight)
    options = {"eps": eps, "rounding": rounding, "weight_offset": weight_offset}
    _checked("fused_add_rms_norm", inputs, {"out": x, "residual_out": residual}, **options)
    torch_ops.call("fused_add_rms_norm", inputs | options)
    return x, residual


def _norm_add_with_gradients(inputs, options):
    return _NormAdd.apply(*_each_once(inputs["x"], inputs["weight"], inputs["residual"]), options)


def norm_add(x, weight, residual, eps=1e-6, *, out=None, rounding="hf", weight_offset=0.0, kernel=None):
    """minivllm.norm_add for every torch tensor, with gradients of x, weight and residual."""
    options = {"eps": eps, "rounding": rounding, "weight_offset": weight_offset, "kernel": kernel}
    inputs, outputs = {"x": x, "weight": weight, "residual": residual}, {"out": out}
    (result,) = _results("norm_add", inputs, outputs, options, _norm_add_with_gradients)
    return result


def _linear_with_gradients(op, weight, inputs, options):
    weights, biases = torch_ops.listed(inputs[weight]), torch_ops.listed(inputs["bias"])
    x, residual, norm_weight, *weights_and_biases = _each_once(
        inputs["x"], inputs["residual"], inputs["norm_weight"], *weights, *biases
    )
    return _NormLinear.apply(op, x, residual, norm_weight, len(weights), options, *weights_and_biases)


def rms_norm_linear(
    x,
    norm_weight,
    weight,
    eps=1e-6,
    *,
    bias=None,
    residual=None,
    out=None,
    residual_out=None,
    weight_layout="auto",
    rounding="hf",
    weight_offset=0.0,
    batch_invariant=False,
    allow_tf32=False,
    static_weights=False,
    kernel=None,
):
    """minivllm.rms_norm_linear for every torch tensor, with gradients of x, residual, the weights and the bias."""
    op = "rms_norm_linear"
    inputs = {"x": x, "norm_weight": norm_weight, "weight": weight, "bias": bias, "residual": residual}
    options = {
        "eps": eps, "weight_layout": weight_layout, "rounding": rounding, "weight_offset": weight_offset,
        "batch_invariant": batch_invariant, "allow_tf32": allow_tf32, "static_weights": static_weights,
        "kernel": kernel,
    }  # fmt: skip
    outputs = {"out": out, "residual_out": residual_out}
    results = _results(op, inputs, outputs, options, functools.partial(_linear_with_gradients, op, "weight"))
    return results[0] if residual is None else results


def rms_norm_gate_up(
    x,
    norm_weight,
    gate_up_weight,
    eps=1e-6,
    *,
    activation="silu",
    bias=None,
    residual=None,
    out=None,
    residual_out=None,
    weight_layout="auto",
    rounding="hf",
    weight_offset=0.0,
    batch_invariant=False,
    allow_tf32=False,
    static_weights=False,
    kernel=None,
):
    """minivllm.rms_norm_gate_up for every torch tensor, with gradients of x, residual, the weights and biases."""
    op = "rms_norm_gate_up"
    inputs = {"x": x, "norm_weight": norm_weight, "gate_up_weight": gate_up_weight, "bias": bias, "residual": residual}
    options = {
        "eps": eps, "activation": activation, "weight_layout": weight_layout, "rounding": rounding,
        "weight_offset": weight_offset, "batch_invariant": batch_invariant, "allow_tf32": allow_tf32,
        "static_weights": static_weights, "kernel": kernel,
    }  # fmt: skip
    outputs = {"out": out, "residual_out": residual_out}
    results = _results(op, inputs, outputs, options, functools.partial(_linear_with_gradients, op, "gate_up_weight"))
    return results[0] if residual is None else results


def _linear(op, inputs, out, options):
    def with_gradients(inputs, options):
        weights = [tensor for tensor in (inputs["weight"], inputs["bias"]) if tensor is not None]
        x, residual, *weights = _each_once(inputs["x"], inputs.get("residual"), *weights)
        return _Linear.apply(op, x, residual, options, *weights)

    (result,) = _results(op, inputs, {"out": out}, options, with_gradients)
    return result


def linear(
    x,
    weight,
    *,
    bias=None,
    out=None,
    weight_layout="auto",
    rounding="hf",
    batch_invariant=False,
    allow_tf32=False,
    static_weights=False,
    kernel=None,
):
    """minivllm.linear for every torch tensor, with gradients of x, the weight and the bias."""
    options = {
        "weight_layout": weight_layout, "rounding": rounding, "batch_invariant": batch_invariant,
        "allow_tf32": allow_tf32, "static_weights": static_weights, "kernel": kernel,
    }  # fmt: skip
    return _linear("linear", {"x": x, "weight": weight, "bias": bias}, out, options)


def linear_add(
    x,
    weight,
    residual,
    *,
    bias=None,
    scale=1.0,
    out=None,
    weight_layout="auto",
    rounding="hf",
    batch_invariant=False,
    allow_tf32=False,
    static_weights=False,
    kernel=None,
):
    """minivllm.linear_add for every torch tensor, with gradients of x, residual, the weight and the bias."""
    options = {
        "scale": scale, "weight_layout": weight_layout, "rounding": rounding, "batch_invariant": batch_invariant,
        "allow_tf32": allow_tf32, "static_weights": static_weights, "kernel": kernel,
    }  # fmt: skip
    return _linear("linear_add", {"x": x, "weight": weight, "residual": residual, "bias": bias}, out, options)


def rms_norm_qkv_packed(
    x, norm_weight, qkv_weight, num_heads, num_kv_heads, eps, *, bias, residual, out=None, residual_out=None, **options
):
    """What rms_norm_qkv is made of: q, k and v as one tensor, and with a residual the sum as another."""
    options = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "eps": eps} | options
    tensors = {"norm_weight": norm_weight, "qkv_weight": unpacked(qkv_weight), "bias": bias, "residual": residual}
    outputs = {"out": out, "residual_out": residual_out}
    with_gradients = functools.partial(_linear_with_gradients, "rms_norm_qkv", "qkv_weight")
    results = _results("rms_norm_qkv", {"x": x} | tensors, outputs, options, with_gradients)
    return results[0] if residual is None else results


def rms_norm_qkv(
    x,
    norm_weight,
    qkv_weight,
    num_heads,
    num_kv_heads,
    eps=1e-6,
    *,
    bias=None,
    residual=None,
    head_dim=None,
    out=None,
    residual_out=None,
    weight_layout="auto",
    rounding="hf",
    weight_offset=0.0,
    batch_invariant=False,
    allow_tf32=False,
    static_weights=False,
    kernel=None,
):
    """minivllm.rms_norm_qkv for every torch tensor, with gradients of x, residual, the weights and biases."""
    result = rms_norm_qkv_packed(
        x, norm_weight, qkv_weight, num_heads, num_kv_heads, eps, bias=bias, residual=residual,
        weight_layout=weight_layout, rounding=rounding, weight_offset=weight_offset, batch_invariant=batch_invariant,
        allow_tf32=allow_tf32, static_weights=static_weights, kernel=kernel, head_dim=head_dim, out=out,
        residual_out=residual_out
    )  # fmt: skip
    packed, *total = [result] if residual is None else result
    heads, outputs = num_heads + 2 * num_kv_heads, packed.shape[-1]
    columns = outputs // heads if head_dim is None else head_dim
    if outputs != heads * columns:
        raise ValueError(
            f"rms_norm_qkv: qkv_weight has {outputs} outputs, expected {heads} (= num_heads + 2 * num_kv_heads) times "
            f"head_dim{'' if head_dim is None else f', which is {head_dim}'}"
        )
    parts = packed.view(*packed.shape[:-1], heads, columns).split_with_sizes(
        [num_heads, num_kv_heads, num_kv_heads], -2
    )
    return *parts, *total


def _act_and_mul(op, x, out, **options):
    def with_gradients(inputs, options):
        return _ActAndMul.apply(op, inputs["x"], options)

    (result,) = _results(op, {"x": x}, {"out": out}, options, with_gradients)
    return result


def silu_and_mul(x, *, out=None, rounding="hf", kernel=None):
    """minivllm.silu_and_mul for every torch tensor, with the gradient of x."""
    return _act_and_mul("silu_and_mul", x, out, rounding=rounding, kernel=kernel)


def gelu_and_mul(x, *, approximate="tanh", out=None, rounding="hf", kernel=None):
    """minivllm.gelu_and_mul for every torch tensor, with the gradient of x."""
    return _act_and_mul("gelu_and_mul", x, out, approximate=approximate, rounding=rounding, kernel=kernel)


def decode_attention(
    q,
    k,
    v,
    key_cache,
    value_cache,
    positions,
    *,
    cos=None,
    sin=None,
    q_norm_weight=None,
    k_norm_weight=None,
    eps=1e-6,
    weight_offset=0.0,
    interleaved=False,
    block_table=None,
    cache_layout=None,
    ring=False,
    starts=None,
    scale=None,
    window=None,
    soft_cap=None,
    out=None,
    rounding="hf",
    batch_invariant=False,
    static_weights=False,
    static_rows=False,
    kernel=None,
):
    """minivllm.decode_attention for every torch tensor; no gradients."""
    op = "decode_attention"
    caches = {"key_cache": key_cache, "value_cache": value_cache}
    inputs = {"q": q, "k": k, "v": v} | caches | {
        "positions": positions, "cos": cos, "sin": sin, "q_norm_weight": q_norm_weight, "k_norm_weight": k_norm_weight,
        "block_table": block_table, "starts": starts,
    }  # fmt: skip
    options = {
        "eps": eps, "weight_offset": weight_offset, "interleaved": interleaved, "cache_layout": cache_layout,
        "ring": ring, "scale": scale, "window": window, "soft_cap": soft_cap, "rounding": rounding,
        "batch_invariant": batch_invariant, "static_weights": static_weights, "static_rows": static_rows,
        "kernel": kernel,
    }  # fmt: skip
    _wants_gradient(op, caches | {"out": out}, **inputs)
    _checked(op, inputs, {"out": out}, **options)
    return _written(op, "out", out, torch_ops.call(op, inputs | options))


def qk_norm_rope(
    q,
    k,
    cos=None,
    sin=None,
    *,
    q_norm_weight=None,
    k_norm_weight=None,
    eps=1e-6,
    weight_offset=0.0,
    interleaved=False,
    rounding="hf",
    out_q=None,
    out_k=None,
    v=None,
    key_cache=None,
    value_cache=None,
    slots=None,
    cache_layout=None,
    kernel=None,
):
    """minivllm.qk_norm_rope for every torch tensor; without a cache with gradients of q, k, cos, sin and weights."""
    op, outputs = "qk_norm_rope", {"out_q": out_q, "out_k": out_k}
    caches = {"key_cache": key_cache, "value_cache": value_cache}
    inputs = {
        "q": q, "k": k, "cos": cos, "sin": sin, "q_norm_weight": q_norm_weight, "k_norm_weight": k_norm_weight, "v": v,
    } | caches | {"slots": slots}  # fmt: skip
    options = {
        "eps": eps, "weight_offset": weight_offset, "interleaved": interleaved, "rounding": rounding,
        "cache_layout": cache_layout, "kernel": kernel,
    }  # fmt: skip
    wants = _wants_gradient(op, outputs | caches, **inputs)
    _checked(op, inputs, outputs, **options)
    if wants:
        results = _QkNormRope.apply(*_each_once(q, k, cos, sin, q_norm_weight, k_norm_weight), options)
    else:
        results = torch_ops.call(op, inputs | options)
    return tuple(_written(op, name, out, result) for (name, out), result in zip(outputs.items(), results))


def greedy_tokens(
    logits,
    *,
    finished=None,
    ends=None,
    pad=None,
    history=None,
    counts=None,
    positions=None,
    out=None,
    kernel=None,
):
    """minivllm.greedy_tokens for every torch tensor; an index has no gradient, as in torch.argmax."""
    op, state = "greedy_tokens", {"history": history, "counts": counts, "positions": positions}
    if isinstance(logits, torch.Tensor):
        logits = logits.detach()
    inputs = {"logits": logits, "finished": finished, "ends": ends, "pad": pad} | state
    _wants_gradient(op, {"out": out}, **inputs)
    _checked(op, inputs, {"out": out}, kernel=kernel)
    return _written(op, "out", out, torch_ops.call(op, inputs | {"kernel": kernel}))


def _call_layer(layer, x, *, residual=None, out=None, residual_out=None):
    """A call of FusedRMSNormQKV."""
    weight = layer.norm_weight
    tensors = isinstance(x, torch.Tensor) and isinstance(weight, torch.Tensor)
    if tensors and x.ndim > 0 and weight.ndim == 1 and x.shape[-1] != weight.shape[0]:
        raise ValueError(
            f"FusedRMSNormQKV: x has hidden size {x.shape[-1]}, expected {weight.shape[0]} (that of norm_weight)"
        )
    return layer.spelled_out(x, residual, out, residual_out)


def substitute_in_graphs():
    """Tells torch.compile to trace these functions where it meets the C functions. Before torch 2.13 it has no such
    substitutes for methods: that of the layer becomes one in Python."""
    for name in (*OPS, "_call_layer"):
        torch.compiler.substitute_in_graph(getattr(_C, name))(globals()[name])

    @functools.wraps(FusedRMSNormQKV.__call__)
    def __call__(layer, *arguments, **options):
        return _C._call_layer(layer, *arguments, **options)

    FusedRMSNormQKV.__call__ = __call__
