"""What the foreign functions compute, as formulas of jax.numpy with the same roundings: from these JAX gets gradients.

Each takes the arrays of its op by name, and those of its options that have an influence.
"""

import functools

import jax
from jax import lax
from jax import numpy as jnp


def _norm_and_linear(
    arrays, *, in_out, rounding, eps=None, weight_offset=None, scale=1.0, allow_tf32=False, **without_influence
):
    """The norms, the linear layers, and both in one; without an eps there is no norm."""
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
    products, *sums = _norm_and_linear(arrays, **options)
    approximate = {"silu": None, "gelu_tanh": "tanh", "gelu": "none"}[activation]
    return [*_act_and_mul({"x": products}, rounding=options["rounding"], approximate=approximate), *sums]


def _norm_add(arrays, **options):
    """The same of norm_add. A gradient does not see the roundings."""
    (y,) = _norm_and_linear({name: array for name, array in arrays.items() if name != "residual"}, **options)
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


_OTHERS = {
    "rms_norm_gate_up": _gate_up,
    "silu_and_mul": _act_and_mul,
    "gelu_and_mul": _act_and_mul,
    "norm_add": _norm_add,
    "qk_norm_rope": _qk_norm_rope,
}


def formula_of(op):
    return _OTHERS.get(op, _norm_and_linear)
