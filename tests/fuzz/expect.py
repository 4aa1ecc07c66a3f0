"""What a case must give, in NumPy or on a torch device: float64 by the references, the bound of minivllm.testing.numeric, and infinities and NaN where
the formula has them.

Numbers from the ends of the range ask for more than the references: sums are float32, so that squares which overflow
there make r zero; and where the order of a float32 sum decides whether it overflows, or squares are lost below the
smallest number, any result is as good: those elements are not judged.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from fuzz.values import LARGEST
from minivllm.testing import numeric, reference
from minivllm.testing.reference import namespace, quantum, round_to

LARGEST_F32 = LARGEST["f32"]
LEAST_NORMAL = 2.0**-126  # of float32 and of bfloat16
SUBNORMAL_F32 = 2.0**-149  # what each step may be off by, however small its result
SAFE_SUM = 1e38  # of absolute values: no order of adding overflows
SAFE_SQUARES = 1e-30  # a mean of squares that keeps its accuracy in float32


class Expected(NamedTuple):
    """A result in float64, not rounded at the end; how far off it may be; and which elements are not judged."""

    values: Any  # a NumPy array or a torch tensor, as the inputs are
    bound: Any
    open: Any


def _normed(inputs, options, dtype: str, wild: bool, round_last: bool):
    """(y, s, gain, rows whose r float32 does not determine)"""
    eps, rounding = options.get("eps", 1e-6), options.get("rounding", "hf")
    offset = options.get("weight_offset", 0.0)
    xp = namespace(inputs["x"])
    weight = inputs.get("norm_weight", inputs.get("weight"))
    if weight is None:
        weight = xp.ones_like(inputs["x"])
    y, s = reference.rms_norm(inputs["x"], weight, eps, residual=inputs.get("residual"), rounding=rounding,
                              weight_offset=offset, dtype=dtype, round_last=round_last)  # fmt: skip
    gain = offset + weight
    squares = (s * s).sum(-1, keepdims=True)
    mean = squares / s.shape[-1] + eps
    unsure = (mean > 0) & (mean < SAFE_SQUARES)
    if wild:
        y = xp.where(xp.isfinite(s) & (squares > LARGEST_F32), 0.0 * gain, y)  # r = 1 / infinity
        unsure |= abs(squares / LARGEST_F32 - 1) < 1e-3
    return y, s, gain, unsure


def _as_well(y, s, gain, eps: float):
    """What y may be in its place where it is rounded once: zero where s r is lost below the smallest float32."""
    normalised, _ = reference.rms_norm(s, 1.0, eps, rounding="fp32", round_last=False)
    return namespace(y).where(abs(normalised) < 4 * SUBNORMAL_F32, 0.0 * gain, y)


def norm(inputs: dict, options: dict, dtype: str, wild: bool) -> Expected:
    y, s, gain, unsure = _normed(inputs, options, dtype, wild, round_last=False)
    finite_y, finite_s, finite_gain = (y, s, gain) if not wild else map(_finite, (y, s, gain))
    hf = options.get("rounding", "hf") == "hf"
    flips = numeric.may_flip(finite_s, finite_gain, options.get("eps", 1e-6), dtype) if hf else None
    bound = numeric.tolerance(finite_y, finite_y, dtype, length=s.shape[-1], gain=abs(finite_gain), flips=flips)
    unsure = namespace(y).broadcast_to(unsure, y.shape)
    if wild and not hf:
        unsure = unsure | ~_same_class(y, _as_well(y, s, gain, options.get("eps", 1e-6)))
    return Expected(y, bound + SUBNORMAL_F32 * abs(finite_gain), unsure if unsure.any() else None)


def norm_add(inputs: dict, options: dict, dtype: str, wild: bool) -> Expected:
    """The norm within its own bound, which holds its own rounding, and the residual added."""
    y, bound, open_ = norm({name: inputs[name] for name in inputs if name != "residual"}, options, dtype, wild)
    out, xp = y + inputs["residual"], namespace(y)
    if wild:  # where the norm may round to infinity before it is added
        most = round_to(abs(_finite(y)) + bound, dtype)
        open_ = xp.zeros_like(y, dtype=bool) if open_ is None else open_
        open_ = open_ | (xp.isfinite(y) & xp.isinf(most))
    finite = _finite(out) if wild else out
    return Expected(out, bound + quantum(finite, dtype) / 2 + 2 * numeric.UNIT_F32 * abs(finite), open_)


def takes_tf32(options: dict, dtype: str) -> bool:
    """Whether the products may be those of TF32 numbers."""
    return dtype == "f32" and options.get("allow_tf32", False)


def projection(inputs: dict, options: dict, dtype: str, wild: bool) -> Expected:
    weight = next(inputs[name] for name in ("qkv_weight", "gate_up_weight", "weight") if name in inputs)
    bias, rounding = inputs.get("bias"), options.get("rounding", "hf")
    y, s, gain, unsure = _normed(inputs, options, dtype, wild, round_last=rounding != "fp32")

    def product(rows, weight=weight):
        return rows @ weight.T if bias is None else rows @ weight.T + bias

    out = product(y)
    finite_y, finite_s, finite_gain, finite_weight = y, s, gain, weight
    unsure = namespace(out).broadcast_to(unsure, out.shape)
    if wild:
        finite_y, finite_s, finite_gain, finite_weight = map(_finite, (y, s, gain, weight))
        sizes = abs(finite_y) @ abs(finite_weight).T
        unsure = unsure | (sizes > SAFE_SUM)
        if rounding == "fp32":  # r may come after the sum
            unsure = unsure | (abs(_finite(s * gain)) @ abs(finite_weight).T > SAFE_SUM)
        if rounding != "hf":  # in "fp32" y may be rounded
            as_well = round_to(_as_well(y, s, gain, options.get("eps", 1e-6)), dtype)
            unsure = unsure | ~_same_class(out, product(as_well))
    if takes_tf32(options, dtype):  # infinity times what TF32 takes as zero
        unsure = unsure | ~_same_class(out, product(_normal_tf32(y), _normal_tf32(weight)))
    lost = numeric.lost_before_the_product(finite_s, finite_gain, options.get("eps", 1e-6), dtype, rounding)
    bound = numeric.tolerance(
        _finite(out) if wild else out, finite_y, dtype, weight=finite_weight, length=s.shape[-1],
        gain=abs(finite_gain), **lost, tf32=takes_tf32(options, dtype))  # fmt: skip
    bound = bound + _unlucky(_finite(out), finite_y, finite_weight, dtype, abs(finite_gain))
    bound = bound + _flushed(finite_y, finite_weight, dtype, takes_tf32(options, dtype))
    return Expected(out, bound, unsure if unsure.any() else None)


def gate_up(inputs: dict, options: dict, dtype: str, wild: bool) -> Expected:
    """The products within their own bound, and what the activation makes of both ends of that."""
    products, bound, open_ = projection(inputs, options, dtype, wild)
    xp, kind = namespace(products), {"silu": "silu", "gelu_tanh": "tanh", "gelu": "none"}
    kind, rounding = kind[options.get("activation", "silu")], options.get("rounding", "hf")
    values, _ = numeric.gate_up_tolerance(products, bound, kind, rounding, dtype)
    error = bound - quantum(_finite(products), dtype) / 2
    least, most = numeric.act_and_mul_ends(products, kind, rounding, dtype, error)
    sure = _same_class(least, most) & _same_class(least, values)
    (gate, up), made = reference.halves(products), xp.isnan(values)
    sure &= ~(made & ~xp.isnan(gate) & ~xp.isnan(up))  # 0 times infinity, where the zero may be none
    large = abs(_finite(products)) + error > LARGEST_F32  # infinite in float32, though "fp32" rounds none
    gate, up = reference.halves(large if open_ is None else large | open_)
    sure &= ~(gate | up)
    bound = xp.maximum(abs(_finite(most) - _finite(values)), abs(_finite(values) - _finite(least)))
    largest = xp.maximum(abs(_finite(least)), abs(_finite(most)))
    return Expected(values, bound + quantum(largest, dtype) / 2, None if sure.all() else ~sure)


def linear(inputs: dict, options: dict, dtype: str, wild: bool) -> Expected:
    x, weight, bias, residual = inputs["x"], inputs["weight"], inputs.get("bias"), inputs.get("residual")
    scale, rounding = float(np.float32(options.get("scale", 1.0))), options.get("rounding", "hf")
    out, sums = reference.linear(x, weight, bias=bias, residual=residual, scale=scale, rounding=rounding, dtype=dtype,
                                 round_last=False)  # fmt: skip
    finite_x, finite_weight, finite_sums, finite_out = map(_finite, (x, weight, sums, out))
    bound = numeric.tolerance(finite_sums, finite_x, dtype, weight=finite_weight, length=x.shape[-1],
                              tf32=takes_tf32(options, dtype))  # fmt: skip
    bound = bound + _unlucky(finite_sums, finite_x, finite_weight, dtype)
    bound = bound + _flushed(finite_x, finite_weight, dtype, takes_tf32(options, dtype))
    unsure = abs(finite_x) @ abs(finite_weight).T > SAFE_SUM
    if takes_tf32(options, dtype):
        unsure = unsure | ~_same_class(x @ weight.T, _normal_tf32(x) @ _normal_tf32(weight).T)
    if residual is not None:
        largest = LARGEST[dtype]  # where rounding in between may give infinity, or not
        unsure = (
            unsure | (abs(abs(finite_sums) / largest - 1) < 0.01) | (abs(abs(finite_sums * scale) / largest - 1) < 0.01)
        )
        bound = numeric.added_tolerance(finite_sums, bound, finite_out, dtype, scale=scale, rounding=rounding)
    return Expected(out, bound, unsure if unsure.any() else None)


def steady(sums, length: int, dtype: str):
    """Where all terms are nearly equal, rounding errors are not independent: the partial sums grow steadily, and as long
    as they have one exponent every addition loses the same part of a unit. A kernel adds 64 float32 terms to one sum
    before that joins a larger one: a quarter of a unit of the whole sum at most for each of the 64, and for each that
    joins. Nor does what matrix instructions cut off cancel: 2 u of the sum in each 16 products of 16 bits."""
    cut_off = length / 8 if dtype != "f32" else 0.0
    return ((64 + length / 64) / 4 + cut_off) * numeric.UNIT_F32 * abs(sums)


def _normal_tf32(values):
    """Without numbers that TF32 may take as zero."""
    return namespace(values).where(abs(values) < 2.0**-136, 0.0 * values, values)


def _unlucky(sums, y, weight, dtype: str, gain=0.0):
    """What a float32 sum may lose beyond the tolerance, which takes rounding errors as independent."""
    # Where one term dominates, every later addition rounds a sum of its size: a walk that is now and then, in 10^9
    # elements, longer than the tolerance's ||e W||_1.
    terms = namespace(sums).sqrt(y**2 @ (weight**2).T)
    steps = (gain + 1) * abs(weight) + 1
    walk = y.shape[-1] ** 0.5 * numeric.UNIT_F32 * terms
    return steady(sums, y.shape[-1], dtype) + walk + SUBNORMAL_F32 * (steps.sum(-1) + 1)


def _flushed(y, weight, dtype: str, tf32: bool = False):
    """What the bfloat16 products of some processors lose (docs/numerics.md): subnormal factors and sums are zero. And
    TF32 numbers below the smallest normal one: their spacing is 2^-136."""
    if tf32:
        return 2.0**-136 * (abs(y).sum(-1)[..., None] + abs(weight).sum(-1))
    if dtype != "bf16":
        return 0.0
    xp = namespace(y)
    y, weight = abs(y), abs(weight)
    small_y, small_weight = (xp.where(x < LEAST_NORMAL, x, 0.0) for x in (y, weight))
    return small_y @ weight.T + y @ small_weight.T + LEAST_NORMAL * (y.shape[-1] + 1)


def act_and_mul(inputs: dict, options: dict, dtype: str, wild: bool, kind: str | None = None) -> Expected:
    """Where float32 decides whether something is finite, both are right."""
    kind, rounding = kind or options.get("approximate", "tanh"), options.get("rounding", "hf")
    values = reference.act_and_mul(inputs["x"], kind, rounding=rounding, dtype=dtype, round_last=False)
    least, most = numeric.act_and_mul_ends(inputs["x"], kind, rounding, dtype)
    xp = namespace(values)
    sure = _same_class(least, most) & _same_class(least, values)
    bound = xp.maximum(abs(_finite(most) - _finite(values)), abs(_finite(values) - _finite(least)))
    return Expected(values, bound + quantum(values, dtype) / 2, None if sure.all() else ~sure)


def _finite(values):
    xp = namespace(values)
    return xp.where(xp.isfinite(values), values, 0.0)


def _same_class(a, b):
    xp = namespace(a)
    return (xp.isfinite(a) & xp.isfinite(b)) | (a == b) | (xp.isnan(a) & xp.isnan(b))


def first_wrong(got, expected: Expected, dtype: str) -> str | None:
    """None where every element of `got` (float64) is right; otherwise the first that is not."""
    values, bound, open_ = expected
    xp = namespace(values)
    good = abs(got - values) <= bound
    if good.all():
        return None
    good |= (got == values) | (xp.isnan(got) & xp.isnan(values))
    # An infinity is right where the largest value that it may have been before the last rounding rounds to it.
    most = xp.where(xp.isfinite(values), abs(values) + bound - quantum(values, dtype) / 2, 0.0)
    good |= xp.isinf(got) & xp.isinf(round_to(most, dtype)) & (xp.signbit(got) == xp.signbit(values))
    if open_ is not None:
        good |= open_
    if good.all():
        return None
    flat = int((~good).reshape(-1).nonzero()[0].reshape(-1)[0])
    where = tuple(int(i) for i in np.unravel_index(flat, tuple(good.shape)))
    wrong = int((~good).sum())
    return (
        f"[{', '.join(map(str, where))}] is {float(got[where])!r}, expected {float(values[where])!r} +- "
        f"{float(bound[where]):.3g}; {wrong} of {math.prod(good.shape)} are wrong"
    )
