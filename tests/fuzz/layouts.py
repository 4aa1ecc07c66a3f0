"""Where the tensors of a case lie: blocks of bytes, and in each of them one tensor or several beside each other."""

import math
import random
from typing import NamedTuple

import numpy as np
from frameworks import NUMPY

from fuzz.values import ITEMSIZE, POOL, pool, specials

FILL = 0xFF  # around tensors: a NaN in every dtype, so that reading it shows, and bits that no kernel computes
MARGIN = 256  # bytes of it on the side of a block where there is no guard page


class Spec(NamedTuple):
    """A tensor: strides and offset count elements, the offset from the start of its block."""

    block: int
    dtype: str
    shape: tuple
    strides: tuple
    offset: int = 0

    def of(self, block: np.ndarray) -> np.ndarray:
        """The tensor in its block of bytes."""
        size = ITEMSIZE[self.dtype]
        strides = [stride * size for stride in self.strides]
        if 0 in self.shape:
            return np.ndarray(self.shape, NUMPY.dtype(self.dtype))
        return np.ndarray(self.shape, NUMPY.dtype(self.dtype), block, self.offset * size, strides)


class Block(NamedTuple):
    """The bytes of a block before the call, and whether its end or its start lies against a guard page."""

    image: np.ndarray
    at_end: bool


def extent(shape, strides):
    """The first and the last element that a tensor with these strides touches, from its own first."""
    spans = [(size - 1) * stride for size, stride in zip(shape, strides) if size]
    return sum(min(0, span) for span in spans), sum(max(0, span) for span in spans)


def row_strides(rng: random.Random, shape, *, distinct: bool):
    """Strides for a tensor whose last dimension is contiguous; `distinct`: no two elements share memory."""
    row = shape[-1]
    if rng.random() < 0.5:  # a padded row
        row += rng.choice((1, 2, 3, 4, 8, 16, 64))
    elif not distinct and rng.random() < 0.1:  # rows that overlap
        row = rng.randint(0, row)
    order = list(range(len(shape) - 1))
    if rng.random() < 0.6:
        order.reverse()
    else:
        rng.shuffle(order)
    strides, step = [1] * len(shape), row
    for dim in order:
        strides[dim] = step * rng.choice((1, 1, 1, -1, 2))
        if not distinct and rng.random() < 0.1:
            strides[dim] = 0
        step = abs(strides[dim] or step) * max(shape[dim], 1)
        if shape[dim] == 1 and rng.random() < 0.5:  # a stride that nobody takes
            strides[dim] = rng.choice((0, 1, 7, -3))
    return tuple(strides)


def c_strides(shape):
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


class Layouts:
    """Draws tensors into blocks. tidy: rows are contiguous. period: after so many numbers a long tensor repeats them."""

    def __init__(self, rng: random.Random, kinds, special_values: bool, tidy: bool = False, period: int = POOL):
        self.rng, self.kinds, self.special_values = rng, kinds, special_values
        self.tidy, self.period = tidy, period
        self.blocks: list[Block] = []

    def block(self, elements: int, dtype: str) -> tuple[int, int]:
        """A new block for so many elements; gives back its index and the element in it where they begin."""
        margin = MARGIN // ITEMSIZE[dtype]
        at_end = self.rng.random() < 0.7
        image = np.full((elements + margin) * ITEMSIZE[dtype], FILL, np.uint8)
        self.blocks.append(Block(image, at_end))
        return len(self.blocks) - 1, margin if at_end else 0

    def place(self, shape, dtype: str, strides) -> Spec:
        """A tensor without values in a block of its own."""
        low, high = extent(shape, strides)
        index, start = self.block(high - low + 1 if 0 not in shape else 0, dtype)
        return Spec(index, dtype, tuple(shape), tuple(strides), start - low)

    def beside(self, lead, widths, dtype: str) -> list[Spec]:
        """Tensors [*lead, width] as columns of one buffer, with or without a gap between them."""
        gaps = [self.rng.choice((0, 0, 1, 3, 8)) for _ in widths]
        row = sum(widths) + sum(gaps)
        strides = c_strides((*lead, row))
        index, start = self.block(math.prod(lead) * row, dtype)
        specs, column = [], 0
        for width, gap in zip(widths, gaps):
            specs.append(Spec(index, dtype, (*lead, width), strides, start + column))
            column += width + gap
        return specs

    def rows(self, shape, dtype: str, *, distinct: bool) -> Spec:
        """A tensor of rows, contiguous or not."""
        plain = self.tidy or self.rng.random() < 0.4
        return self.place(shape, dtype, c_strides(shape) if plain else row_strides(self.rng, shape, distinct=distinct))

    def fill(self, spec: Spec, kind: str | None = None) -> Spec:
        """Gives a tensor values: of this kind, or of one that is drawn."""
        size = math.prod(spec.shape)
        values = pool(spec.dtype, kind or self.rng.choice(self.kinds))
        at = self.rng.randrange(POOL)
        if at + size > POOL:
            values = np.resize(np.roll(values, -at)[: self.period], size)
            at = 0
        target = spec.of(self.blocks[spec.block].image)
        target[...] = values[at : at + size].reshape(spec.shape)
        if self.special_values and size and self.rng.random() < 0.5:
            for _ in range(self.rng.randint(1, 3)):
                target[tuple(self.rng.randrange(n) for n in spec.shape)] = self.rng.choice(specials(spec.dtype))
        return spec

    def values(self, spec: Spec) -> np.ndarray:
        return spec.of(self.blocks[spec.block].image)
