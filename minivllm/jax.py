"""The ops on JAX arrays, also inside jit, vmap and grad, on the CPU and on NVIDIA GPUs.

Each is a foreign function of XLA: it runs where XLA runs it, on XLA's stream and in XLA's memory. Names and arguments
are those of `minivllm`; there is no `out`, because JAX's arrays never change, and options are Python values.

Gradients are those of the formula, by plain jax.numpy: `jax.grad` and `jax.vjp` of x, residual, weights and bias.
Forward mode (`jax.jvp`) is an error of JAX's.
"""

import functools
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp

from . import _C
from .signatures import names

__all__ = [
    "add_rms_norm",
    "decode_attention",
    "gelu_and_mul",
    "greedy_tokens",
    "linear",
    "linear_add",
    "norm_add",
    "qk_norm_rope",
    "rms_norm",
    "rms_norm_gate_up",
    "rms_norm_linear",
    "rms_norm_qkv",
    "silu_and_mul",
]

for _op, _platform, _handler in _C._xla_handlers():
    jax.ffi.register_ffi_target(f"minivllm_{_op}", _handler, platform=_platform)


def rms_norm(x, weight, eps=1e-6, *, rounding="hf", weight_offset=0.0, kernel=None) -> jax.Array:
    """`minivllm.rms_norm`: x [..., hidden] and weight [hidden], or None for ones -> [..., hidden], in x's dtype.

    Errors as there, when the call is traced: a TypeError for dtypes, a ValueError for shapes and values.
    """
    arrays = _without_none(x=x, weight=weight)
    (out,) = _call("rms_norm", arrays, eps=eps, rounding=rounding, weight_offset=weight_offset, kernel=kernel)
    return out


def add_rms_norm(
    x, residual, weight, eps=1e-6, *, rounding="hf", weight_offset=0.0, kernel=None
) -> tuple[jax.Array, jax.Array]:
    """`minivllm.add_rms_norm`: x and residual [..., hidden], weight [hidden] -> (out, residual_out), both like x."""
    arrays = _without_none(x=x, residual=residual, weight=weight)
    return _call("add_rms_norm", arrays, eps=eps, rounding=rounding, weight_offset=weight_offset, kernel=kernel)


def norm_add(x, weight, residual, eps=1e-6, *, rounding="hf", weight_offset=0.0, kernel=None) -> jax.Array:
    """`minivllm.norm_add`: x and residual [..., hidden], weight [hidden] -> residual + rms_norm(x, weight), like x."""
    arrays = _without_none(x=x, weight=weight, residual=residual)
    (out,) = _call("norm_add", arrays, eps=eps, rounding=rounding, weight_offset=weight_offset, kernel=kernel)
    return out


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
    weight_layout="auto",
    rounding="hf",
    weight_offset=0.0,
    batch_invariant=False,
    allow_tf32=False,
    static_weights=False,
    kernel=None,
) -> tuple[jax.Array, ...]:
    """`minivllm.rms_norm_qkv`: x [..., hidden] -> (q, k, v), each [..., heads, head_dim]; with a residual also the sum.

    qkv_weight: [qkv, hidden] or [hidden, qkv], or a tuple of three. Where these are all square, weight_layout="out_in"
    or "in_out" says which.
    """
    return _call(
        "rms_norm_qkv",
        _without_none(x=x, norm_weight=norm_weight, qkv_weight=qkv_weight, bias=bias, residual=residual),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        eps=eps,
        head_dim=head_dim,
        weight_layout=weight_layout,
        rounding=rounding,
        weight_offset=weight_offset,
        batch_invariant=batch_invariant,
        allow_tf32=allow_tf32,
        static_weights=static_weights,
        kernel=kernel,
    )


def rms_norm_linear(
    x,
    norm_weight,
    weight,
    eps=1e-6,
    *,
    bias=None,
    residual=None,
    weight_layout="auto",
    rounding="hf",
    weight_offset=0.0,
    batch_invariant=False,
    allow_tf32=False,
    static_weights=False,
    kernel=None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """`minivllm.rms_norm_linear`: x [..., hidden] and weight [outputs, hidden] or [hidden, outputs] -> [..., outputs];
    with a residual (out, residual_out).
    """
    out, *sums = _call(
        "rms_norm_linear",
        _without_none(x=x, norm_weight=norm_weight, weight=weight, bias=bias, residual=residual),
        eps=eps,
        weight_layout=weight_layout,
        rounding=rounding,
        weight_offset=weight_offset,
        batch_invariant=batch_invariant,
        allow_tf32=allow_tf32,
        static_weights=static_weights,
        kernel=kernel,
    )
    return (out, *sums) if sums else out


def rms_norm_gate_up(
    x,
    norm_weight,
    gate_up_weight,
    eps=1e-6,
    *,
    activation="silu",
    bias=None,
    residual=None,
    weight_layout="auto",
    rounding="hf",
    weight_offset=0.0,
    batch_invariant=False,
    allow_tf32=False,
    static_weights=False,
    kernel=None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """`minivllm.rms_norm_gate_up`: x [..., hidden] and gate_up_weight [2 d, hidden], [hidden, 2 d] or a tuple of two
    -> activation(gate) * up, [..., d]; with a residual (out, residual_out).
    """
    out, *sums = _call(
        "rms_norm_gate_up",
        _without_none(x=x, norm_weight=norm_weight, gate_up_weight=gate_up_weight, bias=bias, residual=residual),
        eps=eps,
        activation=activation,
        weight_layout=weight_layout,
        rounding=rounding,
        weight_offset=weight_offset,
        batch_invariant=batch_invariant,
        allow_tf32=allow_tf32,
        static_weights=static_weights,
        kernel=kernel,
    )
    return (out, *sums) if sums else out


def silu_and_mul(x, *, rounding="hf", kernel=None) -> jax.Array:
    """`minivllm.silu_and_mul`: x [..., 2 d], which is gate | up -> silu(gate) * up, [..., d]."""
    (out,) = _call("silu_and_mul", {"x": x}, rounding=rounding, kernel=kernel)
    return out


def gelu_and_mul(x, *, approximate="tanh", rounding="hf", kernel=None) -> jax.Array:
    """`minivllm.gelu_and_mul`: x [..., 2 d], which is gate | up -> gelu(gate) * up, [..., d]."""
    (out,) = _call("gelu_and_mul", {"x": x}, approximate=approximate, rounding=rounding, kernel=kernel)
    return out


def linear(
    x,
    weight,
    *,
    bias=None,
    weight_layout="auto",
    rounding="hf",
    batch_invariant=False,
    allow_tf32=False,
    static_weights=False,
    kernel=None,
) -> jax.Array:
    """`minivllm.linear`: x [..., hidden] and weight [outputs, hidden] or [hidden, outputs] -> [..., outputs]."""
    (out,) = _call(
        "linear",
        _without_none(x=x, weight=weight, bias=bias),
        weight_layout=weight_layout,
        rounding=rounding,
        batch_invariant=batch_invariant,
        allow_tf32=allow_tf32,
        static_weights=static_weights,
        kernel=kernel,
    )
    return out


def linear_add(
    x,
    weight,
    residual,
    *,
    bias=None,
    scale=1.0,
    weight_layout="auto",
    rounding="hf",
    batch_invariant=False,
    allow_tf32=False,
    static_weights=False,
    kernel=None,
) -> jax.Array:
    """`minivllm.linear_add`: x [..., hidden], weight [outputs, hidden] or [hidden, outputs] and residual
    [..., outputs] -> [..., outputs].
    """
    (out,) = _call(
        "linear_add",
        _without_none(x=x, weight=weight, residual=residual, bias=bias),
        scale=scale,
        weight_layout=weight_layout,
        rounding=rounding,
        batch_invariant=batch_invariant,
        allow_tf32=allow_tf32,
        static_weights=static_weights,
        kernel=kernel,
    )
    return out


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
    rounding="hf",
    batch_invariant=False,
    static_weights=False,
    static_rows=False,
    kernel=None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`minivllm.decode_attention`: (out, key_cache, value_cache), the caches with the new keys and values.

    Inside of `jax.jit` with donated caches it works in their memory; else they are copied. No gradients, no `jax.vmap`.
    """
    return _call(
        "decode_attention",
        _without_none(
            q=q,
            k=k,
            v=v,
            key_cache=key_cache,
            value_cache=value_cache,
            positions=positions,
            cos=cos,
            sin=sin,
            q_norm_weight=q_norm_weight,
            k_norm_weight=k_norm_weight,
            block_table=block_table,
            starts=starts,
        ),
        eps=eps,
        weight_offset=weight_offset,
        interleaved=interleaved,
        cache_layout=cache_layout,
        ring=ring,
        scale=scale,
        window=window,
        soft_cap=soft_cap,
        rounding=rounding,
        batch_invariant=batch_invariant,
        static_weights=static_weights,
        static_rows=static_rows,
        kernel=kernel,
    )


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
    v=None,
    key_cache=None,
    value_cache=None,
    slots=None,
    cache_layout=None,
    kernel=None,
) -> tuple[jax.Array, ...]:
    """`minivllm.qk_norm_rope`: (out_q, out_k), and with a cache (out_q, out_k, key_cache, value_cache).

    Inside of `jax.jit` with donated caches it works in their memory; else they are copied, and have no gradients. No
    `jax.vmap`.
    """
    return _call(
        "qk_norm_rope",
        _without_none(
            q=q,
            k=k,
            cos=cos,
            sin=sin,
            q_norm_weight=q_norm_weight,
            k_norm_weight=k_norm_weight,
            v=v,
            key_cache=key_cache,
            value_cache=value_cache,
            slots=slots,
        ),
        eps=eps,
        weight_offset=weight_offset,
        interleaved=interleaved,
        rounding=rounding,
        cache_layout=cache_layout,
        kernel=kernel,
    )


def greedy_tokens(
    logits, *, finished=None, ends=None, pad=None, history=None, counts=None, positions=None, kernel=None
) -> jax.Array | tuple[jax.Array, ...]:
    """`minivllm.greedy_tokens`: logits [..., vocabulary] -> int64 [...]; where any of finished, history, counts and
    positions are given (out, *those, brought up to date).

    Inside of `jax.jit` with those donated it works in their memory; else they are copied, and there is no `jax.vmap`.
    No gradients. RuntimeError: without jax_enable_x64 JAX has no int64.
    """
    if not jax.config.jax_enable_x64:
        raise RuntimeError(
            "greedy_tokens: tokens are int64, which JAX has only after jax.config.update('jax_enable_x64', True)"
        )
    logits = lax.stop_gradient(logits)
    out, *in_place = _call(
        "greedy_tokens",
        _without_none(
            logits=logits,
            finished=finished,
            ends=ends,
            pad=pad,
            history=history,
            counts=counts,
            positions=positions,
        ),
        kernel=kernel,
    )
    return (out, *in_place) if in_place else out


# ---- one call, whatever the op: the options are hashable pairs, the arrays a dict of those that there are ------------


def _without_none(**arrays):
    return {name: array for name, array in arrays.items() if array is not None}


def _call(op, arrays, **options):
    for name, value in options.items():
        if isinstance(value, jax.Array):
            raise TypeError(f"{op}: {name} is a JAX array, expected a Python value: it is part of what is compiled")
        if getattr(value, "ndim", None) == 0:  # NumPy's numbers, which may have no hash
            options[name] = value.item()
    jitted = _jitted_in_place if _in_place(op, arrays) else _jitted
    return jitted(op, tuple(options.items()), tuple(map(type, options.values())), arrays)


def _in_place(op, arrays):
    """What the op writes to of what it is given."""
    return [name for name in names(op, "in place") if name in arrays]


# types: of the options. 2, 2.0 and True are equal, but not all of them are numbers of heads.
@functools.partial(jax.jit, static_argnums=(0, 1, 2), inline=True)
def _jitted(op, options, types, arrays):
    out, *sums = _differentiable(op, options, arrays)
    if op != "rms_norm_qkv":
        return out, *sums
    num_heads, num_kv_heads = dict(options)["num_heads"], dict(options)["num_kv_heads"]
    all_heads = num_heads + 2 * num_kv_heads
    heads = out.reshape(*out.shape[:-1], all_heads, out.shape[-1] // all_heads)
    return *jnp.split(heads, [num_heads, num_heads + num_kv_heads], axis=-2), *sums


# Without gradients, and no batch of caches.
@functools.partial(jax.jit, static_argnums=(0, 1, 2), inline=True)
def _jitted_in_place(op, options, types, arrays):
    return tuple(_foreign_call(op, options, arrays))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _differentiable(op, options, arrays):
    if op == "qk_norm_rope":  # whose rows of cos and sin broadcast: a batch is no more dimension of all
        return _foreign_call(op, options, arrays)
    return _batchable(op, options)(arrays)


def _forward(op, options, arrays):
    return _differentiable(op, options, arrays), arrays


def _backward(op, options, arrays, gradients):
    _, in_out, _, _ = _plan(op, options, arrays)
    formulas = {
        "rms_norm_gate_up": _gate_up,
        "silu_and_mul": _act_and_mul,
        "gelu_and_mul": _act_and_mul,
        "norm_add": _norm_add,
        "qk_norm_rope": _qk_norm_rope,
    }
    formula = formulas.get(op, _formula)
    _, pull_back = jax.vjp(functools.partial(formula, in_out=in_out, **dict(options)), arrays)
    return pull_back(gradients)


_differentiable.defvjp(_forward, _backward)


def _batchable(op, options):
    """arrays -> results. Rows are independent: a batch of them is one more leading dimension; a batch of weights is a
    call for each."""

    @jax.custom_batching.custom_vmap
    def call(arrays):
        return _foreign_call(op, options, arrays)

    @call.def_vmap
    def batched(size, is_batched, arrays):
        (is_batched,) = is_batched  # of the one argument
        rows = [name for name in names(op, "rows") if name in arrays]
        weights = {name: is_batched[name] for name in arrays if name not in rows}
        if any(jax.tree.leaves(weights)):
            everything = jax.tree.map(functools.partial(_repeat, size), arrays, is_batched)
            results = lax.map(call, everything)
        else:
            results = call(arrays | {name: _repeat(size, arrays[name], is_batched[name]) for name in rows})
        return results, [True] * len(results)

    return call


def _repeat(size, array, is_batched):
    return array if is_batched else jnp.broadcast_to(array, (size, *array.shape))


# ---- forward: the foreign function ----------------------------------------------------------------------------------


def _foreign_call(op, options, arrays):
    """[out] or [out, residual_out], where out is packed, [..., qkv], for q, k and v; then what the op has written to in
    place: arrays of their own, in the memory of the old ones if nobody needs those."""
    outputs, _, scratch_bytes, attributes = _plan(op, options, arrays)
    results = [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape, dtype in outputs]
    in_order = [name for name in names(op, *_READ) if name in arrays]
    in_place = _in_place(op, arrays)
    aliases = {in_order.index(name): len(results) + i for i, name in enumerate(in_place)}
    results += [jax.ShapeDtypeStruct(arrays[name].shape, arrays[name].dtype) for name in in_place]
    scratch = jax.ShapeDtypeStruct((scratch_bytes,), jnp.uint8)
    call = jax.ffi.ffi_call(f"minivllm_{op}", [*results, scratch], input_output_aliases=aliases)
    return list(call(*jax.tree.leaves([arrays[name] for name in in_order]), **attributes))[:-1]


_READ = ("rows", "weight", "in place")


def _plan(op, options, arrays):
    """As C's _plan: checked, and planned for both platforms that may run the call.

    JAX decides where only after this. So what both refuse is refused here, and what one of them does, there.
    """
    stand_ins = dict.fromkeys(names(op, *_READ)) | jax.tree.map(_stand_in, arrays)
    plans, refusals = [], []
    for device in _devices():
        try:
            plans.append(_C._plan(op, device, **stand_ins, **dict(options)))
        except (TypeError, ValueError, RuntimeError) as refusal:
            refusals.append(refusal)
    if not plans:
        raise refusals[-1]
    outputs, in_out, _, attributes = plans[0]
    return outputs, in_out, max(scratch for _, _, scratch, _ in plans), attributes


def _stand_in(array):
    """An array of the same shape and dtype, whose memory nobody touches."""
    import numpy as np

    return np.empty(array.shape, array.dtype) if hasattr(array, "dtype") else array


@functools.cache
def _devices():
    """-1 for the CPU, and the index of this process's first GPU, if JAX has one."""
    try:
        return -1, jax.local_devices(backend="cuda")[0].local_hardware_id
    except RuntimeError:
        return (-1,)


# ---- backward: the formula ------------------------------------------------------------------------------------------


def _formula(
    arrays: dict[str, Any],
    *,
    in_out,
    rounding,
    eps=None,
    weight_offset=None,
    scale=1.0,
    allow_tf32=False,
    **without_influence,
):
    """What the foreign function computes, with the same roundings; without an eps there is no norm."""
    x = arrays["x"]
    if eps is None:
        out = _product(x, arrays, in_out, allow_tf32)
        return [_added(out, arrays["residual"], scale, rounding) if "residual" in arrays else out.astype(x.dtype)]
    weight = arrays.get("norm_weight", arrays.get("weight"))
    s = x + arrays["residual"] if "residual" in arrays else x
    wide = s.astype(jnp.float32)
    normed = wide * lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + eps)
    if rounding == "hf":
        normed = normed.astype(x.dtype).astype(jnp.float32)
    y = (normed * (weight_offset + (1 if weight is None else weight.astype(jnp.float32)))).astype(x.dtype)
    sums = [s] if "residual" in arrays else []
    if "norm_weight" not in arrays:
        return [y, *sums]

    return [_product(y, arrays, in_out, allow_tf32).astype(x.dtype), *sums]


def _product(y, arrays, in_out, allow_tf32):
    """The linear layer of y, in float32."""
    name = next(name for name in ("qkv_weight", "gate_up_weight", "weight") if name in arrays)
    matrices = jax.tree.leaves(arrays[name])
    product = functools.partial(
        jnp.einsum,
        "...k,kn->...n" if in_out else "...k,nk->...n",
        precision=lax.Precision.DEFAULT if allow_tf32 else lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    out = jnp.concatenate([product(y, matrix) for matrix in matrices], -1)
    if "bias" in arrays:
        out = out + jnp.concatenate([bias.astype(jnp.float32) for bias in jax.tree.leaves(arrays["bias"])])
    return out


def _added(out, residual, scale, rounding):
    """residual + scale out, of a float32 out."""
    rounded = (lambda v: v.astype(residual.dtype).astype(jnp.float32)) if rounding != "fp32" else (lambda v: v)
    out = rounded(out)
    if scale != 1:
        out = rounded(out * scale)
    return (out + residual).astype(residual.dtype)


def _act_and_mul(arrays, *, rounding, approximate=None, **without_influence):
    """The same of silu_and_mul, and of gelu_and_mul, which alone has `approximate`."""
    x = arrays["x"]
    gate, up = jnp.split(x.astype(jnp.float32), 2, -1)
    active = jax.nn.silu(gate) if approximate is None else jax.nn.gelu(gate, approximate == "tanh")
    if rounding != "fp32":
        active = active.astype(x.dtype).astype(jnp.float32)
    return [(active * up).astype(x.dtype)]


def _gate_up(arrays, *, activation, **options):
    """The same of rms_norm_gate_up. A gradient does not see that "fp32" leaves gate and up as they are."""
    products, *sums = _formula(arrays, **options)
    approximate = {"silu": None, "gelu_tanh": "tanh", "gelu": "none"}[activation]
    return [*_act_and_mul({"x": products}, rounding=options["rounding"], approximate=approximate), *sums]


def _norm_add(arrays, **options):
    """The same of norm_add. A gradient does not see the roundings."""
    (y,) = _formula({name: array for name, array in arrays.items() if name != "residual"}, **options)
    return [y + arrays["residual"]]


def _qk_norm_rope(arrays, *, eps, rounding, weight_offset, interleaved, **without_influence):
    """The same of qk_norm_rope without a cache."""
    results = []
    for name in ("q", "k"):
        x, weight = arrays[name], arrays.get(f"{name}_norm_weight")
        rn = (lambda y, dtype=x.dtype: y.astype(dtype)) if rounding != "fp32" else (lambda y: y)
        n = x if rounding != "fp32" else x.astype(jnp.float32)
        if weight is not None:
            wide = x.astype(jnp.float32)
            n = wide * lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + eps)
            if rounding == "hf":
                n = rn(n).astype(jnp.float32)
            n = rn(n * (weight_offset + weight.astype(jnp.float32)))
        if "cos" in arrays:
            cos, sin = (_of_tokens(arrays[row], x.shape[:-2]) for row in ("cos", "sin"))
            first, rest = jnp.split(n, [cos.shape[-1]], -1)
            if interleaved:
                turned = jnp.stack([-first[..., 1::2], first[..., ::2]], -1).reshape(first.shape)
            else:
                halves = jnp.split(first, 2, -1)
                turned = jnp.concatenate([-halves[1], halves[0]], -1)
            n = jnp.concatenate([(first * cos + turned * sin).astype(n.dtype), rest], -1)
        results.append(n.astype(x.dtype))
    return results


def _of_tokens(row, tokens):
    """Rows of cos or sin for the heads of these tokens: broadcast, or else without dimensions of 1 the same."""
    lead = row.shape[:-1]
    if len(lead) > len(tokens) or any(a not in (1, b) for a, b in zip(lead[::-1], tokens[::-1])):
        row = row.reshape(*tokens, row.shape[-1])
    return row[..., None, :]
