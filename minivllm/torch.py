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
from .signatures import OPS
from .torch_checks import check, wants_gradient, written
from .torch_gradients import ActAndMul, Linear, Norm, NormLinear, QkNormRope
from .torch_prepack import unpacked


def _each_once(*tensors):
    """The tensors, for an autograd.Function: to torch.compile no two of them may be the same one."""
    if not torch.compiler.is_compiling():
        return tensors
    return [
        tensor.view_as(tensor) if any(tensor is before for before in tensors[:i] if before is not None) else tensor
        for i, tensor in enumerate(tensors)
    ]


def _results(op, inputs, outputs, options, with_gradients):
    """What `op` gives, one tensor for each of `outputs` that it has: written there, or with gradients where one is
    asked for."""
    wants = wants_gradient(op, outputs, **inputs)
    check(op, inputs, outputs, **options)
    results = with_gradients(op, inputs, options) if wants else torch_ops.call(op, inputs | options)
    results = results if isinstance(results, tuple) else (results,)
    return tuple(written(op, name, out, result) for (name, out), result in zip(outputs.items(), results))


def _norm_with_gradients(op, inputs, options):
    return Norm.apply(op, *_each_once(inputs["x"], inputs.get("residual"), inputs["weight"]), options)


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
    wants_gradient("fused_add_rms_norm", {"x": x, "residual": residual}, weight=weight)
    options = {"eps": eps, "rounding": rounding, "weight_offset": weight_offset}
    check("fused_add_rms_norm", inputs, {"out": x, "residual_out": residual}, **options)
    torch_ops.call("fused_add_rms_norm", inputs | options)
    return x, residual


def norm_add(x, weight, residual, eps=1e-6, *, out=None, rounding="hf", weight_offset=0.0, kernel=None):
    """minivllm.norm_add for every torch tensor, with gradients of x, weight and residual."""
    options = {"eps": eps, "rounding": rounding, "weight_offset": weight_offset, "kernel": kernel}
    inputs, outputs = {"x": x, "weight": weight, "residual": residual}, {"out": out}
    (result,) = _results("norm_add", inputs, outputs, options, _norm_with_gradients)
    return result


def _norm_linear_with_gradients(op, inputs, options):
    name = next(name for name in ("qkv_weight", "gate_up_weight", "weight") if name in inputs)
    weights, biases = torch_ops.listed(inputs[name]), torch_ops.listed(inputs["bias"])
    x, residual, norm_weight, *weights_and_biases = _each_once(
        inputs["x"], inputs["residual"], inputs["norm_weight"], *weights, *biases
    )
    return NormLinear.apply(op, x, residual, norm_weight, len(weights), options, *weights_and_biases)


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
    results = _results(op, inputs, outputs, options, _norm_linear_with_gradients)
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
    results = _results(op, inputs, outputs, options, _norm_linear_with_gradients)
    return results[0] if residual is None else results


def _linear_with_gradients(op, inputs, options):
    weights = [tensor for tensor in (inputs["weight"], inputs["bias"]) if tensor is not None]
    x, residual, *weights = _each_once(inputs["x"], inputs.get("residual"), *weights)
    return Linear.apply(op, x, residual, options, *weights)


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
    inputs = {"x": x, "weight": weight, "bias": bias}
    (result,) = _results("linear", inputs, {"out": out}, options, _linear_with_gradients)
    return result


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
    inputs = {"x": x, "weight": weight, "residual": residual, "bias": bias}
    (result,) = _results("linear_add", inputs, {"out": out}, options, _linear_with_gradients)
    return result


def rms_norm_qkv_packed(
    x, norm_weight, qkv_weight, num_heads, num_kv_heads, eps, *, bias, residual, out=None, residual_out=None, **options
):
    """What rms_norm_qkv is made of: q, k and v as one tensor, and with a residual the sum as another."""
    options = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "eps": eps} | options
    tensors = {"norm_weight": norm_weight, "qkv_weight": unpacked(qkv_weight), "bias": bias, "residual": residual}
    outputs = {"out": out, "residual_out": residual_out}
    results = _results("rms_norm_qkv", {"x": x} | tensors, outputs, options, _norm_linear_with_gradients)
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


def _act_and_mul_with_gradients(op, inputs, options):
    return ActAndMul.apply(op, inputs["x"], options)


def silu_and_mul(x, *, out=None, rounding="hf", kernel=None):
    """minivllm.silu_and_mul for every torch tensor, with the gradient of x."""
    options = {"rounding": rounding, "kernel": kernel}
    (result,) = _results("silu_and_mul", {"x": x}, {"out": out}, options, _act_and_mul_with_gradients)
    return result


def gelu_and_mul(x, *, approximate="tanh", out=None, rounding="hf", kernel=None):
    """minivllm.gelu_and_mul for every torch tensor, with the gradient of x."""
    options = {"approximate": approximate, "rounding": rounding, "kernel": kernel}
    (result,) = _results("gelu_and_mul", {"x": x}, {"out": out}, options, _act_and_mul_with_gradients)
    return result


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
    wants_gradient(op, caches | {"out": out}, **inputs)
    check(op, inputs, {"out": out}, **options)
    return written(op, "out", out, torch_ops.call(op, inputs | options))


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
    wants = wants_gradient(op, outputs | caches, **inputs)
    check(op, inputs, outputs, **options)
    if wants:
        results = QkNormRope.apply(*_each_once(q, k, cos, sin, q_norm_weight, k_norm_weight), options)
    else:
        results = torch_ops.call(op, inputs | options)
    return tuple(written(op, name, out, result) for (name, out), result in zip(outputs.items(), results))


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
    wants_gradient(op, {"out": out}, **inputs)
    check(op, inputs, {"out": out}, kernel=kernel)
    return written(op, "out", out, torch_ops.call(op, inputs | {"kernel": kernel}))


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
