"""Every op in float64: the executable specification.

Arrays hold float64 values of whatever they stand for; `to_float64` makes them from any framework's tensor. The
functions work on NumPy arrays and on torch tensors alike (the latter to be quick on large shapes on a GPU).

Each op comes in two forms, chosen by `dtype`:
    dtype=None                     the true value: no rounding anywhere. What accuracy is judged by.
    dtype="f32" | "f16" | "bf16"   every rounding step of the contract, exactly, and float64 between them. What the
                                   bits should be, but for ties that float32 sums flip. round_last=False leaves out
                                   the last one.
"""

import math
import sys

import numpy as np

# Significant bits (the hidden one included) and the exponents of the smallest and largest normal number, 1.0 having
# exponent 0.
FORMATS = {"f32": (24, -126, 127), "f16": (11, -14, 15), "bf16": (8, -126, 127)}


def namespace(x):
    """The module whose functions work on x: torch for its tensors, otherwise numpy."""
    if type(x).__module__.split(".")[0] == "torch":
        import torch

        return torch
    return np


LARGE = 2**30  # multiplications: a matrix product of so many is left to a GPU


def times_rows(a, weight):
    """a @ weight.T in float64, a [..., k] and weight [n, k]. Where the process uses a GPU by torch, that computes
    a large product of NumPy arrays, in float64 as well: a CPU takes seconds for it."""
    if namespace(a) is np and a.size * len(weight) >= LARGE and "torch" in sys.modules:
        import torch

        if torch.cuda.is_initialized():
            a, weight = (torch.tensor(np.ascontiguousarray(each), device="cuda") for each in (a, weight))
            return (a @ weight.T).cpu().numpy()
    return a @ weight.T


def to_float64(x, keep_on_device: bool = False):
    """x, widened exactly: a float64 NumPy array, or with keep_on_device a float64 torch tensor where x is one."""
    if namespace(x) is not np:
        wide = x.detach().double()
        return wide if keep_on_device else wide.cpu().numpy()
    if hasattr(x, "numpy"):  # a DeviceArray
        x = x.numpy()
    elif hasattr(x, "get"):  # CuPy
        x = x.get()
    return np.asarray(x).astype(np.float64)


def quantum(x, dtype: str):
    """The spacing of dtype's numbers at x (at a power of two: the one above it), which is that of the subnormals near
    zero."""
    xp = namespace(x)
    bits, lowest, _ = FORMATS[dtype]
    exponent = (x.view(xp.int64) >> 52) & 0x7FF  # of a float64, biased by 1023
    return ((xp.clip(exponent, lowest + 1023, 2046) - (bits - 1)) << 52).view(xp.float64)


def round_to(x, dtype: str):
    """x rounded once to dtype: to nearest, ties to even, subnormals kept, overflow to infinity; the result is float64
    still."""
    xp = namespace(x)
    bits, _, highest = FORMATS[dtype]
    step = quantum(x, dtype)
    rounded = xp.round(x / step) * step
    largest = 2.0**highest * (2.0 - 2.0 ** (1 - bits))
    infinity = float("inf")
    return xp.where(rounded > largest, infinity, xp.where(rounded < -largest, -infinity, rounded))


def rounds_each_step(rounding: str) -> bool:
    """Is each step of a call rounded, such as the norm in front of a product? Else only what is stored."""
    if rounding not in ("hf", "hf_once", "fp32"):
        raise ValueError(f"rounding is {rounding!r}, expected 'hf', 'hf_once' or 'fp32'")
    return rounding != "fp32"


def _rounder(dtype):
    return (lambda x: x) if dtype is None else (lambda x: round_to(x, dtype))


def rms_norm(x, weight, eps=1e-6, *, residual=None, rounding="hf", weight_offset=0.0, dtype=None, round_last=True):
    """(y, s) of x [..., hidden], weight [hidden], residual [..., hidden]:

    s = rn(x + residual), or x;  r = 1 / sqrt(mean(s^2) + eps)
    hf:    y = rn(rn(s r) (weight_offset + weight));  hf_once, fp32:  y = rn(s r (weight_offset + weight))
    """
    rounds_each_step(rounding)
    xp, rn = namespace(x), _rounder(dtype)
    s = x if residual is None else rn(x + residual)
    r = 1.0 / xp.sqrt((s * s).mean(axis=-1, keepdims=True) + eps)
    normed = rn(s * r) if rounding == "hf" else s * r
    y = normed * (weight_offset + weight)
    return (rn(y) if round_last else y), s


def rms_norm_qkv(
    x,
    norm_weight,
    qkv_weight,
    eps=1e-6,
    *,
    bias=None,
    residual=None,
    rounding="hf",
    weight_offset=0.0,
    dtype=None,
    round_last=True,
):
    """(out, y, s): out [..., qkv] = rn(y @ qkv_weight.T + bias) with y and s of `rms_norm`; qkv_weight [qkv, hidden].

    With rounding="fp32" y is not rounded: the contract allows it to be, and asks for nothing.
    """
    y, s = rms_norm(
        x,
        norm_weight,
        eps,
        residual=residual,
        rounding=rounding,
        weight_offset=weight_offset,
        dtype=dtype,
        round_last=rounds_each_step(rounding),
    )
    out = times_rows(y, qkv_weight)
    if bias is not None:
        out = out + bias
    return (_rounder(dtype)(out) if round_last else out), y, s


_erfc_of_numpy = np.vectorize(math.erfc, otypes=[np.float64])


def gelu_exponent(z):
    """w of gelu by tanh: 0.5 (1 + tanh(-w / 2)) = 1 / (1 + exp(w)) without the difference that loses all digits."""
    return -2.0 * math.sqrt(2.0 / math.pi) * (z + 0.044715 * z**3)


def activation(z, kind: str):
    """kind "silu": z / (1 + exp(-z)); "tanh" and "none": the gelus that torch calls so."""
    xp = namespace(z)
    with np.errstate(all="ignore"):
        if kind == "none":
            erfc = _erfc_of_numpy if xp is np else xp.special.erfc
            return z * (0.5 * erfc(-z / math.sqrt(2.0)))
        return z / (1.0 + xp.exp(-z if kind == "silu" else gelu_exponent(z)))


def halves(x):
    """(gate, up) of x [..., 2 d]."""
    columns = x.shape[-1] // 2
    return x[..., :columns], x[..., columns:]


def act_and_mul(x, kind: str, *, rounding="hf", dtype=None, round_last=True):
    """silu_and_mul and gelu_and_mul of x [..., 2 d], by the kind of the activation:

    hf, hf_once: rn(rn(activation(gate)) up);  fp32: rn(activation(gate) up)
    """
    rn, (gate, up) = _rounder(dtype), halves(x)
    active = activation(gate, kind)
    with np.errstate(all="ignore"):
        out = (rn(active) if rounds_each_step(rounding) else active) * up
        return rn(out) if round_last else out


def linear(x, weight, *, bias=None, residual=None, scale=1.0, rounding="hf", dtype=None, round_last=True):
    """(out, sums): sums = x @ weight.T + bias, not rounded; weight [outputs, hidden]. Without a residual out is rn of
    it, with one rn(rn(rn(sums) scale) + residual): of the inner roundings "fp32" makes none, and the others the second
    only where scale is not 1.
    """
    rn = _rounder(dtype)
    sums = times_rows(x, weight) if bias is None else times_rows(x, weight) + bias
    out = sums
    if residual is not None:
        inner = rn if rounds_each_step(rounding) else _rounder(None)
        out = inner(out)
        if scale != 1:
            out = inner(out * scale)
        out = out + residual
    return (rn(out) if round_last else out), sums


def attention(q, keys, values, *, scale, soft_cap=None):
    """(out [heads, dim], p [heads, n]) of one token's queries q [heads, dim] against n keys and values [n, kv_heads,
    dim]: p = softmax(s), out = p v, where s = scale q k, or soft_cap tanh(scale q k / soft_cap)."""
    xp = namespace(q)
    kv_head = [h * keys.shape[1] // q.shape[0] for h in range(q.shape[0])]
    s = xp.einsum("hd,nhd->hn", q, keys[:, kv_head]) * scale
    if soft_cap is not None:
        s = soft_cap * xp.tanh(s / soft_cap)
    p = xp.exp(s - xp.amax(s, -1)[:, None])
    p = p / p.sum(-1)[:, None]
    return xp.einsum("hn,nhd->hd", p, values[:, kv_head]), p


def turned(x, interleaved=False):
    """The other of each pair with its sign: of (a, b), (-b, a). Pairs are in the halves of the row, or neighbours."""
    xp = namespace(x)
    if interleaved:
        return xp.stack([-x[..., 1::2], x[..., ::2]], -1).reshape(x.shape)
    half = x.shape[-1] // 2
    return xp.concatenate([-x[..., half:], x[..., :half]], -1)


def rotary(n, cos, sin, *, interleaved=False, rounding="hf", rows=None, dtype=None, round_last=True):
    """n [..., D] after the rotary embedding of its first R columns by cos and sin [..., R], which broadcast:

    hf, hf_once: rn(rn(n cos) + rn(turned(n) sin)), or with rows="f32" rn(n cos + turned(n) sin), as fp32
    """
    xp, rn = namespace(n), _rounder(dtype)
    columns = cos.shape[-1]
    each = rn if rounds_each_step(rounding) and rows != "f32" else _rounder(None)
    first = n[..., :columns]
    y = each(first * cos) + each(turned(first, interleaved) * sin)
    return xp.concatenate([rn(y) if round_last else y, n[..., columns:]], -1)
