"""What the tests compute on: kinds of data, and layouts in memory with canaries around them."""

import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from minivllm.testing.reference import round_to, to_float64

CANARY = -1232.0  # exact in every dtype


def random(*key):
    """A generator that depends on the key alone, not on which tests ran before."""
    return np.random.default_rng(zlib.crc32(repr(key).encode()))


def normal(shape, dtype: str, *key, scale: float = 1.0, mean: float = 0.0):
    """Normal numbers as dtype holds them, float64."""
    return round_to(mean + scale * random(*key).standard_normal(shape), dtype)


def rotary_rows(positions, columns: int, theta: float, interleaved: bool):
    """cos and sin of a rotary embedding, float64, [*positions, columns]."""
    angles = np.maximum(positions, 0)[..., None] * theta ** (-np.arange(0, columns, 2) / columns)
    angles = np.repeat(angles, 2, -1) if interleaved else np.concatenate([angles, angles], -1)
    return np.cos(angles), np.sin(angles)


def outlier_channels(x, weight):
    x = x.copy()
    x[..., ::97] *= 100.0
    return x, weight


def outlier_weight(x, weight):
    weight = weight.copy()
    weight[len(weight) // 3] = 96.5
    return x, weight


# The five kinds of data of the accuracy gate: (x ~ N(0, 1), norm weight) -> (x, norm weight).
KINDS: dict[str, Callable] = {
    "normal": lambda x, weight: (x, weight),
    "outlier_channels": outlier_channels,
    "tiny": lambda x, weight: (x * 1e-6, weight),
    "huge": lambda x, weight: (x * 1e4, weight),
    "outlier_weight": outlier_weight,
}


class Layout(NamedTuple):
    """Where the elements of a shape lie in a flat buffer: their strides and the offset of the first."""

    name: str
    strides: Callable
    offset: int = 64


def _c_strides(shape, row=None):
    strides, step = [1], shape[-1] if row is None else row
    for size in reversed(shape[:-1]):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def _transposed(shape):
    """The leading dimensions run backwards in memory; the last one stays contiguous."""
    strides, step = [1], shape[-1]
    for size in shape[:-1]:
        strides.append(step)
        step *= size
    return tuple(strides[1:]) + (1,)


CONTIGUOUS = Layout("contiguous", _c_strides)
UNALIGNED = Layout("unaligned", _c_strides, offset=65)
PADDED = Layout("padded", lambda shape: _c_strides(shape, shape[-1] + 8))
RAGGED = Layout("ragged", lambda shape: _c_strides(shape, shape[-1] + 3), offset=67)
TRANSPOSED = Layout("transposed", _transposed)
REVERSED = Layout("reversed", lambda shape: tuple(-s for s in _c_strides(shape)[:-1]) + (1,))
LAYOUTS = (CONTIGUOUS, UNALIGNED, PADDED, RAGGED, TRANSPOSED)


class Placed:
    """A tensor in the middle of a buffer of canaries."""

    def __init__(self, framework, shape, dtype: str, layout: Layout = CONTIGUOUS, values=None):
        strides = layout.strides(tuple(shape))
        lowest = sum(min(0, (n - 1) * s) for n, s in zip(shape, strides) if n)
        highest = sum(max(0, (n - 1) * s) for n, s in zip(shape, strides) if n)
        offset = layout.offset - lowest
        self.framework, self.dtype = framework, dtype
        self.buffer = framework.full((offset + highest + 1 + 64,), CANARY, dtype)
        self.tensor = framework.strided(self.buffer, tuple(shape), strides, offset)
        places = np.arange(offset + highest + 1 + 64)
        self.places = (
            np.lib.stride_tricks.as_strided(places[offset:], shape, [8 * s for s in strides]).reshape(-1).copy()
        )
        if values is not None:
            self.tensor[...] = framework.tensor(values, dtype)

    def check_canaries(self, what: str = "output"):
        """Nothing around the tensor was written."""
        around = to_float64(self.buffer)
        around[self.places] = CANARY
        wrong = np.flatnonzero(around != CANARY)
        assert wrong.size == 0, (
            f"{what}: {wrong.size} elements around it were written, the first {wrong[0] - self.places[0]} past its start"
        )

    def values(self):
        return to_float64(self.tensor)


def assert_same_bits(got, expected, what: str = "result"):
    """Equal bit for bit, but for the payloads of NaNs."""
    from minivllm.testing.numeric import assert_equal

    got, expected = to_float64(got), to_float64(expected)
    assert_equal(got, expected, what)
    signs = np.signbit(got) != np.signbit(expected)
    assert not (signs & ~np.isnan(expected)).any(), f"{what}: a zero changed its sign"
