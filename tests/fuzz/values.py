"""Numbers to compute on: pools of each dtype and kind, made once, of which a case takes a piece."""

import functools

import numpy as np
from cases import random
from frameworks import NUMPY

POOL = 1 << 16
PRIME = 65521  # the largest below POOL: a weight that repeats so many numbers has no two rows alike
ITEMSIZE = {"f32": 4, "f16": 2, "bf16": 2, "i32": 4, "i64": 8}
BITS = {"f32": np.uint32, "f16": np.uint16, "bf16": np.uint16}
SUBNORMAL = {"f32": 2.0**-149, "f16": 2.0**-24, "bf16": 2.0**-133}  # the smallest
LARGEST = {"f32": 2.0**128 - 2.0**104, "f16": 65504.0, "bf16": 2.0**128 - 2.0**120}


@functools.cache
def _kinds(dtype: str):
    def draw(name):
        return random("fuzz", dtype, name)

    normal = draw("normal").standard_normal(POOL)
    outliers = normal.copy()
    outliers[::97] *= 100.0
    signs = draw("signs").choice([-1.0, 1.0], POOL)
    return {
        "normal": normal,
        "small": 0.02 * normal,  # as the weights of a projection
        "near one": 1.0 + 0.2 * normal,  # as the weights of a norm
        "outliers": outliers,
        "tiny": 1e-6 * normal,
        "large": 1e4 * normal,
        "zero": 0.0 * signs,
        "one value": np.ones(POOL),
        "subnormal": draw("subnormal").integers(-100, 101, POOL) * SUBNORMAL[dtype],
        "every exponent": signs * np.exp2(draw("exponents").uniform(*_exponents(dtype), POOL)),
    }


def _exponents(dtype: str):
    return (-24.0, 15.9) if dtype == "f16" else (-140.0, 127.9)


TAME = ("normal", "normal", "normal", "small", "near one", "outliers", "tiny", "large", "zero", "one value")
WILD = ("subnormal", "every exponent")


@functools.cache
def pool(dtype: str, kind: str) -> np.ndarray:
    """POOL numbers as the dtype holds them."""
    with np.errstate(all="ignore"):
        return _kinds(dtype)[kind].astype(NUMPY.dtype(dtype))


@functools.cache
def specials(dtype: str) -> np.ndarray:
    """What may be sprinkled over any kind."""
    finite = (LARGEST[dtype], -LARGEST[dtype], SUBNORMAL[dtype], -SUBNORMAL[dtype], 0.0, -0.0)
    held = np.array((np.inf, -np.inf, np.nan, np.nan, np.nan, *finite)).astype(NUMPY.dtype(dtype))
    ones = (1 << 8 * held.itemsize) - 1
    held.view(BITS[dtype])[3:5] = ones, ones >> 1  # the NaNs whose bits run over when they are rounded as a number
    return held


def same_bits(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Where two arrays of one dtype hold the same bits; every NaN is the same as every other."""
    bits = np.dtype(f"u{a.itemsize}")
    with np.errstate(invalid="ignore"):
        return (a.view(bits) == b.view(bits)) | ((a != a) & (b != b))
