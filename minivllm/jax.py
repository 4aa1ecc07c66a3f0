"""The ops on JAX arrays, also inside jit, vmap and grad, on the CPU and on NVIDIA GPUs.

Each is a foreign function of XLA: it runs where XLA runs it, on XLA's stream and in XLA's memory. Names and arguments
are those of `minivllm`; there is no `out`, because JAX's arrays never change, and options are Python values.

Gradients are those of the formula, by plain jax.numpy: `jax.grad` and `jax.vjp` of x, residual, weights and bias.
Forward mode (`jax.jvp`) is an error of JAX's.
"""

import jax

from .jax_call import call

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


def rms_norm(x, weight, eps=1e-6, *, rounding="hf", weight_offset=0.0, kernel=None) -> jax.Array:
    """`minivllm.rms_norm`: x [..., hidden] and weight [hidden], or None for ones -> [..., hidden], in x's dtype.

    Errors as there, when the call is traced: a TypeError for dtypes, a ValueError for shapes and values.
    """
    arrays = {"x": x, "weight": weight}
    (out,) = call("rms_norm", arrays, eps=eps, rounding=rounding, weight_offset=weight_offset, kernel=kernel)
    return out


def add_rms_norm(
    x, residual, weight, eps=1e-6, *, rounding="hf", weight_offset=0.0, kernel=None
) -> tuple[jax.Array, jax.Array]:
    """`minivllm.add_rms_norm`: x and residual [..., hidden], weight [hidden] -> (out, residual_out), both like x."""
    arrays = {"x": x, "residual": residual, "weight": weight}
    return call("add_rms_norm", arrays, eps=eps, rounding=rounding, weight_offset=weight_offset, kernel=kernel)


def norm_add(x, weight, residual, eps=1e-6, *, rounding="hf", weight_offset=0.0, kernel=None) -> jax.Array:
    """`minivllm.norm_add`: x and residual [..., hidden], weight [hidden] -> residual + rms_norm(x, weight), like x."""
    arrays = {"x": x, "weight": weight, "residual": residual}
    (out,) = call("norm_add", arrays, eps=eps, rounding=rounding, weight_offset=weight_offset, kernel=kernel)
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
    arrays = {"x": x, "norm_weight": norm_weight, "qkv_weight": qkv_weight, "bias": bias, "residual": residual}
    return call(
        "rms_norm_qkv", arrays, num_heads=num_heads, num_kv_heads=num_kv_heads, eps=eps, head_dim=head_dim,
        weight_layout=weight_layout, rounding=rounding, weight_offset=weight_offset, batch_invariant=batch_invariant,
        allow_tf32=allow_tf32, static_weights=static_weights, kernel=kernel)  # fmt: skip


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
    arrays = {"x": x, "norm_weight": norm_weight, "weight": weight, "bias": bias, "residual": residual}
    out, *sums = call(
        "rms_norm_linear", arrays, eps=eps, weight_layout=weight_layout, rounding=rounding,
        weight_offset=weight_offset, batch_invariant=batch_invariant, allow_tf32=allow_tf32,
        static_weights=static_weights, kernel=kernel)  # fmt: skip
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
    arrays = {"x": x, "norm_weight": norm_weight, "gate_up_weight": gate_up_weight, "bias": bias, "residual": residual}
    out, *sums = call(
        "rms_norm_gate_up", arrays, eps=eps, activation=activation, weight_layout=weight_layout, rounding=rounding,
        weight_offset=weight_offset, batch_invariant=batch_invariant, allow_tf32=allow_tf32,
        static_weights=static_weights, kernel=kernel)  # fmt: skip
    return (out, *sums) if sums else out


def silu_and_mul(x, *, rounding="hf", kernel=None) -> jax.Array:
    """`minivllm.silu_and_mul`: x [..., 2 d], which is gate | up -> silu(gate) * up, [..., d]."""
    (out,) = call("silu_and_mul", {"x": x}, rounding=rounding, kernel=kernel)
    return out


def gelu_and_mul(x, *, approximate="tanh", rounding="hf", kernel=None) -> jax.Array:
    """`minivllm.gelu_and_mul`: x [..., 2 d], which is gate | up -> gelu(gate) * up, [..., d]."""
    (out,) = call("gelu_and_mul", {"x": x}, approximate=approximate, rounding=rounding, kernel=kernel)
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
    (out,) = call(
        "linear", {"x": x, "weight": weight, "bias": bias}, weight_layout=weight_layout, rounding=rounding,
        batch_invariant=batch_invariant, allow_tf32=allow_tf32, static_weights=static_weights,
        kernel=kernel)  # fmt: skip
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
    (out,) = call(
        "linear_add", {"x": x, "weight": weight, "residual": residual, "bias": bias}, scale=scale,
        weight_layout=weight_layout, rounding=rounding, batch_invariant=batch_invariant, allow_tf32=allow_tf32,
        static_weights=static_weights, kernel=kernel)  # fmt: skip
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
    arrays = {
        "q": q, "k": k, "v": v, "key_cache": key_cache, "value_cache": value_cache, "positions": positions, "cos": cos,
        "sin": sin, "q_norm_weight": q_norm_weight, "k_norm_weight": k_norm_weight, "block_table": block_table,
        "starts": starts}  # fmt: skip
    return call(
        "decode_attention", arrays, eps=eps, weight_offset=weight_offset, interleaved=interleaved,
        cache_layout=cache_layout, ring=ring, scale=scale, window=window, soft_cap=soft_cap, rounding=rounding,
        batch_invariant=batch_invariant, static_weights=static_weights, static_rows=static_rows,
        kernel=kernel)  # fmt: skip


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
    arrays = {
        "q": q, "k": k, "cos": cos, "sin": sin, "q_norm_weight": q_norm_weight, "k_norm_weight": k_norm_weight, "v": v,
        "key_cache": key_cache, "value_cache": value_cache, "slots": slots}  # fmt: skip
    return call(
        "qk_norm_rope", arrays, eps=eps, weight_offset=weight_offset, interleaved=interleaved, rounding=rounding,
        cache_layout=cache_layout, kernel=kernel)  # fmt: skip


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
    arrays = {
        "logits": jax.lax.stop_gradient(logits), "finished": finished, "ends": ends, "pad": pad, "history": history,
        "counts": counts, "positions": positions}  # fmt: skip
    out, *in_place = call("greedy_tokens", arrays, kernel=kernel)
    return (out, *in_place) if in_place else out
