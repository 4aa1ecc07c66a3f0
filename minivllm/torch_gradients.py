"""The gradients of the ops in torch: an autograd.Function for each kind of op. Forward it calls the registered op; its
backward is made of torch's own operations, in float32.
"""

import torch

from . import torch_ops

APPROXIMATE = {"silu": None, "gelu_tanh": "tanh", "gelu": "none"}  # the activations as torch calls them


def _normed(s, eps):
    """(n, r) in float32: n = s r, r = 1 / sqrt(mean(s^2) + eps)."""
    s = s.float()
    r = torch.rsqrt(s.square().mean(-1, keepdim=True) + eps)
    return s * r, r


def _norm_gradients(dy, n, r, scale):
    """For y = n scale: the gradients of s and of scale, [hidden], in float32."""
    dn = dy * scale
    return r * (dn - n * (dn * n).mean(-1, keepdim=True)), (dy * n).reshape(-1, n.shape[-1]).sum(0)


class Norm(torch.autograd.Function):
    """rms_norm, or with a residual add_rms_norm or norm_add, which adds it to the norm."""

    generate_vmap_rule = True

    @staticmethod
    def forward(op, x, residual, weight, options):
        return torch_ops.call(op, {"x": x, "residual": residual, "weight": weight} | options)

    @staticmethod
    def setup_context(ctx, inputs, output):
        op, x, residual, weight, options = inputs
        ctx.adds, ctx.is_last = residual is not None, op == "norm_add"
        ctx.eps, ctx.weight_offset = options["eps"], options["weight_offset"]
        ctx.save_for_backward(output[1] if ctx.adds and not ctx.is_last else x, weight)

    @staticmethod
    def backward(ctx, dout, ds=None):
        s, weight = ctx.saved_tensors
        n, r = _normed(s, ctx.eps)
        scale = ctx.weight_offset + (1.0 if weight is None else weight.float())
        dx, dweight = _norm_gradients(dout.float(), n, r, scale)
        dx = (dx if ds is None else dx + ds.float()).to(s.dtype)
        dresidual = dout if ctx.is_last else dx if ctx.adds else None
        return None, dx, dresidual, None if weight is None else dweight.to(weight.dtype), None


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


class Linear(torch.autograd.Function):
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
    gradients = _gated_gradients(*products.chunk(2, -1), dout.float(), APPROXIMATE[activation])
    return torch.cat(gradients, -1).to(dout.dtype)


class NormLinear(torch.autograd.Function):
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


class ActAndMul(torch.autograd.Function):
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


class QkNormRope(torch.autograd.Function):
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
