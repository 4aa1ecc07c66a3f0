"""How wrong a result may be, how wrong it is, and where.

The one tolerance
-----------------
A result t = sum_k y_k W_k (a norm op is the case of one term with W = 1), rounded to a dtype with `bits` significant
bits and spacing q(.) of its numbers, is held to

    |got - t| <= q(t)/2 + 2 u |t| + spread,   spread = min(L * ||e W||_2, ||e W||_1),   L = 6,  u = 2^-24

    e_k = roundings * h_k + (sqrt(length)/2 + 4) u |y_k| [+ length/(8 L) u |y_k| in products of 16 bits]
          [+ 2^-10 |y_k| when products are rounded to TF32]
    h_k = max(2^-bits |y_k|, max(gain_k, 1) * smallest subnormal / 2)

q(t)/2 is the last rounding. e_k is what each term may have lost before it is summed: `roundings` roundings to the
dtype on the way to y_k, each followed by a factor of at most gain_k (of the norm weight, for "hf"), and the float32
arithmetic, of which the sum over `length` numbers has an error that grows like a random walk (N. J. Higham and T.
Mary, "A new approach to probabilistic rounding error analysis", SIAM J. Sci. Comput. 41, 2019; halved by the square
root in r); 4 u is for r itself and the products. Matrix instructions that add 16 products at a time truncate: that may
take 2 u of the sum in each of length/16 additions, always towards zero. Independent errors bounded by |e_k W_k| add
up to more than L ||e W||_2 with a probability below 2 exp(-L^2/2) = 3e-8 (Hoeffding), and never to more than ||e W||_1.

Held against a reference that makes the same roundings, y_k differs only where float32 noise moves it across a tie, and
then by no more than 4 h_k (a neighbour before the factor, another after it); so e_k has 4 h_k in place of `roundings *
h_k` for the elements this may happen to (`may_flip`), and nothing for the others. (They come in groups: numbers of 16
bits repeat, and those with the same mantissa are equally far from a tie.)
"""

import functools
import math
from typing import NamedTuple

import numpy as np

from .reference import (
    FORMATS,
    act_and_mul,
    activation,
    gelu_exponent,
    halves,
    namespace,
    quantum,
    rms_norm,
    round_to,
    rounds_each_step,
    times_rows,
)

UNIT_F32 = 2.0**-24
UNIT_TF32 = 2.0**-11
LAMBDA = 6.0


def _noise(length: int) -> float:
    """Relative error of y after float32 arithmetic with one sum over `length` squares."""
    return (length**0.5 / 2 + 4) * UNIT_F32


def _truncation(length: int, dtype: str) -> float:
    """What matrix instructions cut off a sum over `length` products of 16 bits, as an error of each term."""
    return 0.0 if dtype == "f32" else length / 8 / LAMBDA * UNIT_F32


def _from_tie(value, dtype: str):
    """How far each value is from where it would round to dtype's other neighbour."""
    spacing = quantum(value, dtype)
    return abs(abs(value) / spacing % 1.0 - 0.5) * spacing


def may_flip(s, gain, eps: float, dtype: str, rounding: str = "hf"):
    """Which elements of y = rn(rn(s r) gain), or in "hf_once" rn(s r gain), s and y [..., k], gain [k], float32
    arithmetic may round to a neighbour of what float64 rounds to: [..., k], True or False."""
    normalised, _ = rms_norm(s, 1.0, eps, rounding="fp32", round_last=False)
    if rounding == "hf_once":
        y = normalised * gain
        return _from_tie(y, dtype) <= _noise(s.shape[-1]) * abs(y) + 2.0**-149 * abs(gain)
    scaled = round_to(normalised, dtype) * gain
    first = _from_tie(normalised, dtype) <= _noise(s.shape[-1]) * abs(normalised)
    distance = _from_tie(scaled, dtype)  # 0 where the product is exactly on a tie: then it is exact in float32, too
    return first | ((distance <= 4 * UNIT_F32 * abs(scaled)) & (distance > 0))


def lost_before_the_product(s, gain, eps: float, dtype: str, rounding: str) -> dict:
    """What `tolerance` is told of the y that a projection multiplies: held against a reference that rounds it as well,
    or in "fp32" against one that does not, though it may be rounded once."""
    if not rounds_each_step(rounding):
        return {"roundings": 1}
    return {"flips": may_flip(s, gain, eps, dtype, rounding)}


def tolerance(
    result,
    y,
    dtype: str,
    *,
    length: int,
    weight=None,
    gain=1.0,
    roundings: int = 0,
    flips=None,
    tf32: bool = False,
):
    """The bound above, for each element of `result`.

    result [..., n] and y [..., k] are float64, result not rounded at the end; weight [n, k], or None for a norm op (y
    is result). gain: |weight_offset + norm weight| [k]. roundings: to dtype, before the last. flips: the reference
    made these roundings as well, and these elements of y may differ. tf32: products of TF32 numbers.
    """
    xp = namespace(result)
    bits, lowest, _ = FORMATS[dtype]
    truncation = 0.0 if weight is None else _truncation(length, dtype)
    error = (_noise(length) + truncation + (2 * UNIT_TF32 if tf32 else 0.0)) * abs(y)
    factor = xp.maximum(xp.zeros_like(y) + gain, xp.ones_like(y))
    half = xp.maximum(2.0**-bits * abs(y), factor * 2.0 ** (lowest - bits))
    error = error + (roundings if flips is None else 4 * flips) * half
    if weight is None:
        spread = error
    else:
        squares, sums = times_rows(error**2, weight**2), times_rows(error, abs(weight))
        spread = xp.minimum(LAMBDA * xp.sqrt(squares), sums)
    return quantum(result, dtype) / 2 + 2 * UNIT_F32 * abs(result) + spread


def _activation_ends(z, kind: str):
    """Between what two numbers float32 may put the activation of z: within E u |activation| + 2^-149 (|z| + 1) of it,
    E = 6 of silu, 12 + min(z, 0)^2 / 2 of gelu, 6 + 5 max(w, 0.4) of gelu by tanh, which is z / (1 + exp(w)). 6 and 12
    are for exp, a sum, a reciprocal, a product and the normal distribution; the rest is what exp makes of an argument
    that was rounded. Where exp(w) exceeds float32 the activation is zero."""
    xp, a = namespace(z), activation(z, kind)
    w = -z if kind == "silu" else gelu_exponent(z)
    below = xp.clip(z, -math.inf, 0.0)
    units = 6.0 if kind == "silu" else 12.0 + below**2 / 2 if kind == "none" else 6.0 + 5 * xp.clip(w, 0.4, math.inf)
    error = abs(a) * units * UNIT_F32 + (abs(z) + 1) * 2.0**-149
    low, high = a - error, a + error
    zero = xp.copysign(xp.zeros_like(z), z)
    if kind != "none":
        most, off = 128 * math.log(2.0), (4 + 5 * abs(w)) * UNIT_F32
        low = xp.where(w > most + off, zero, low)
        high = xp.where(w > most - off, zero, high)
    low = xp.where((z >= 0) & (low < 0), zero, low)  # the sign is that of z
    high = xp.where((z <= 0) & (high > 0), zero, high)
    finite = xp.isfinite(z)
    return xp.where(finite, low, a), xp.where(finite, high, a)


_LEAST_AT = {
    "silu": -1.2784645427610738,
    "tanh": -0.7524614220710162,
    "none": -0.7517915246935645,
}  # each falls, then rises


def act_and_mul_ends(x, kind: str, rounding: str, dtype: str, error=None):
    """(least, most) that silu_and_mul or gelu_and_mul of x may give, in float64 and not rounded at the end. All that
    follows the activation is monotonic, so they come from the ends of what that may be.

    error: x is what a product gives, which float32 may put that far away, before all but "fp32" round it. Rounding is
    monotonic too, so gate and up are between their own ends; an activation falls to its least value and rises from
    there, so it is largest at one end of the gate, and least where the gate is nearest to that place."""
    xp, (gate, up) = namespace(x), halves(x)
    rn = (lambda v: round_to(v, dtype)) if rounds_each_step(rounding) else (lambda v: v)
    with np.errstate(all="ignore"):
        if error is None:
            ends, ups = _activation_ends(gate, kind), [up]
        else:
            (below, above), ups = ([rn(half) for half in pair] for pair in zip(halves(x - error), halves(x + error)))
            nearest = xp.minimum(xp.maximum(xp.zeros_like(below) + _LEAST_AT[kind], below), above)
            highest = xp.maximum(_activation_ends(below, kind)[1], _activation_ends(above, kind)[1])
            ends = (_activation_ends(nearest, kind)[0], highest)
        products = [rn(end) * factor for end in ends for factor in ups]
        least, most = functools.reduce(xp.minimum, products), functools.reduce(xp.maximum, products)
        if dtype != "f32":  # rounded to float32 first: exact of 16-bit factors, but below 2^-149
            unit = 0.0 if rounds_each_step(rounding) else UNIT_F32
            least = xp.where(xp.isfinite(least), least - abs(least) * unit - 2.0**-150, least)
            most = xp.where(xp.isfinite(most), most + abs(most) * unit + 2.0**-150, most)
    return least, most


def gate_up_tolerance(products, bound, kind: str, rounding: str, dtype: str):
    """(values, tolerance) of rms_norm_gate_up, given the products gate | up [..., 2 d], not rounded, and the tolerance
    of them rounded: what the reference's roundings but the last make of them, and how far from it a result may be.
    Without its last rounding a product is within bound - q(product) / 2, hence between two ends, and so is what follows
    (act_and_mul_ends); q / 2 of the end that is larger is the rounding at the end."""
    xp, rn = namespace(products), (lambda v: round_to(v, dtype)) if rounds_each_step(rounding) else (lambda v: v)
    values = act_and_mul(rn(products), kind, rounding=rounding, dtype=dtype, round_last=False)
    ends = act_and_mul_ends(products, kind, rounding, dtype, bound - quantum(products, dtype) / 2)
    with np.errstate(invalid="ignore"):
        off = xp.maximum(ends[1] - values, values - ends[0])
        return values, off + quantum(xp.maximum(abs(ends[0]), abs(ends[1])), dtype) / 2


def added_tolerance(sums, bound, added, dtype: str, *, scale: float = 1.0, rounding: str = "hf"):
    """How wrong rn(rn(rn(sums) scale) + residual) may be, given the tolerance of rn(sums), held against `added`: what a
    reference makes of it with the same roundings but the last. A rounding takes two numbers that are `error` apart to
    ones that are at most a spacing further apart; and float32 multiplies and adds with an error of 2 u each."""
    xp = namespace(sums)

    def spacing(value, error):
        return quantum(abs(value) + error, dtype)

    error = bound - quantum(sums, dtype) / 2
    if rounds_each_step(rounding):
        error = error + spacing(sums, error)
    scaled = sums * scale
    error = abs(scale) * error + 2 * UNIT_F32 * abs(scaled)
    if rounds_each_step(rounding) and scale != 1:
        error = error + spacing(scaled, error)
    error = error + 2 * UNIT_F32 * xp.maximum(abs(added), abs(scaled))
    return error + spacing(added, error) / 2


def attention_tolerance(exact, p, q, keys, values, dtype: str, *, scale: float):
    """How wrong decode_attention may be of one sequence, given what reference.attention finds of the other arguments:
    the last rounding, and L standard deviations of what float32 arithmetic and matrix instructions lose. An error of
    a score, which is a sum over dim, changes p_j by as much relative to it, and the result by that times p_j (v_j -
    exact); errors of the sums over the keys come with p_j v_j. Matrix instructions take p_j in two parts of 16 bits:
    2^-17 p_j may be lost of bfloat16, 2^-23 p_j of float16, of which the smallest number beside the largest p_j is
    2^-24."""
    xp = namespace(exact)
    kv_head = [h * keys.shape[1] // q.shape[0] for h in range(q.shape[0])]
    v, products, p = values[:, kv_head], q * keys[:, kv_head], p.T[..., None]  # [keys, heads, dim], p [keys, heads, 1]
    score = scale * (xp.sqrt((products**2).sum(-1)) + abs(products.sum(-1))) + 1
    dim, count = q.shape[1], keys.shape[0]
    of_scores = (_noise(dim) + _truncation(dim, dtype)) * score[..., None] * p * (v - exact)
    of_sums = (_noise(count) + _truncation(count, dtype)) * p * v
    relative, smallest = {"f32": (0.0, 0.0), "f16": (2.0**-23, 2.0**-25), "bf16": (2.0**-17, 0.0)}[dtype]
    of_parts = (relative * p + xp.minimum(p, smallest * xp.amax(p, 0))) * v
    spread = LAMBDA * xp.sqrt((of_scores**2 + of_sums**2 + of_parts**2).sum(0))
    return quantum(exact, dtype) / 2 + 2 * UNIT_F32 * abs(exact) + spread


class Errors(NamedTuple):
    """How far `got` is from `expected`; ulp counts spacings of the dtype at the expected value."""

    max: float
    rms: float
    max_ulp: float
    correctly_rounded: float

    def __str__(self):
        return (
            f"max error {self.max:.3g}, RMS error {self.rms:.3g}, max {self.max_ulp:.3g} ulp, "
            f"{100 * self.correctly_rounded:.3f} % correctly rounded"
        )


def errors(got, expected, dtype: str) -> Errors:
    """Error figures of float64 arrays `got` against the unrounded `expected`; all zero and 1.0 for empty ones."""
    xp = namespace(expected)
    if got.shape != expected.shape:
        raise AssertionError(f"shape {tuple(got.shape)}, expected {tuple(expected.shape)}")
    if 0 in expected.shape:
        return Errors(0.0, 0.0, 0.0, 1.0)
    difference = abs(got - expected)
    right = got == round_to(expected, dtype)
    return Errors(
        float(difference.max()),
        float(xp.sqrt((difference**2).mean())),
        float((difference / quantum(expected, dtype)).max()),
        float(right.sum()) / got.reshape(-1).shape[0],
    )


def rms_error(got, expected) -> float:
    """Root mean square of got - expected, over float64 arrays; NaN when either holds one."""
    return float(namespace(expected).sqrt(((got - expected) ** 2).mean()))


def assert_within(got, expected, bound, what: str = "result"):
    """Every |got - expected| <= bound, NaN only where expected is NaN, infinities equal; otherwise AssertionError
    names the first bad coordinate in C order, both values, the bound, how many are bad, and the last of them."""
    xp = namespace(expected)
    if tuple(got.shape) != tuple(expected.shape):
        raise AssertionError(f"{what}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}")
    with np.errstate(invalid="ignore"):
        good = (abs(got - expected) <= bound) | (got == expected) | (xp.isnan(got) & xp.isnan(expected))
    if bool(good.all()):
        return
    bad = (~good).reshape(-1)
    total = bad.shape[0]
    flat = int(bad.nonzero()[0][0]), total - 1 - int(xp.flip(bad, (0,)).nonzero()[0][0])
    where, last = (tuple(int(i) for i in np.unravel_index(at, tuple(expected.shape))) for at in flat)
    allowed = bound[where] if hasattr(bound, "shape") and tuple(bound.shape) == tuple(expected.shape) else bound
    raise AssertionError(
        f"{what}[{', '.join(map(str, where))}] is {float(got[where])!r}, expected {float(expected[where])!r} "
        f"+- {float(allowed):.3g}; {total - int(good.sum())} of {total} are wrong, the "
        f"last of them [{', '.join(map(str, last))}]"
    )


def assert_equal(got, expected, what: str = "result"):
    """Every element equal, NaN to NaN; the message is that of `assert_within`."""
    assert_within(got, expected, 0.0, what)
