"""decode_attention: every kernel against float64, over lengths, heads, caches and everything that cuts the keys; what
no key may touch is NaN."""

import functools
from typing import NamedTuple

import numpy as np
import pytest
from cases import CONTIGUOUS, PADDED, UNALIGNED, Layout, Placed, assert_same_bits, normal, random
from conftest import short_dtype

import minivllm
from minivllm.testing import numeric, reference
from minivllm.testing.reference import round_to, to_float64


class Case(NamedTuple):
    """A call without norms and rotary embedding, whose queries and keys are what they are."""

    positions: tuple  # of each sequence
    heads: int = 4
    kv_heads: int = 2
    dim: int = 64
    capacity: int = 0  # of a sequence; 0: one row more than the longest has
    cache: str = "static"  # or "ring", "NHD", "HND"
    page: int = 16
    window: int | None = None
    soft_cap: float | None = None
    scale: float | None = None
    starts: tuple | None = None
    wide: bool = False  # int64 positions
    layout: Layout = CONTIGUOUS  # of the caches
    spread: float = 1.0  # of the queries: how far scores are apart

    def first(self, sequence):
        """The first key that a sequence attends to."""
        start = self.starts[sequence] if self.starts else 0
        return max(start, 0, self.positions[sequence] - (self.window or 1 << 60) + 1)

    @property
    def rows(self):
        longest = self.capacity or max(0, *self.positions) + 1
        return -(-longest // self.page) * self.page if self.cache in ("NHD", "HND") else longest


class Inputs:
    """Of a case: float64 values as the dtype holds them. Caches are NaN but for the keys that are attended to."""

    def __init__(self, case, dtype):
        batch, dim, kv_heads = len(case.positions), case.dim, case.kv_heads
        self.case, self.dtype = case, dtype
        packed = normal((batch, case.heads + 2 * kv_heads, dim), dtype, "qkv", case.heads, kv_heads, dim)
        packed[:, : case.heads] = round_to(packed[:, : case.heads] * case.spread, dtype)
        self.packed = packed
        self.q, self.k, self.v = np.split(packed, [case.heads, case.heads + kv_heads], axis=1)
        self.keys, self.values, self.slots, self.table = [], [], [], None
        paged = case.cache in ("NHD", "HND")
        blocks = case.rows // case.page
        if paged:  # pages in any order; the table has holes wherever no key is
            order = random("pages", case.positions, case.page).permutation(batch * blocks + 1)
            self.table = np.full((batch, blocks + 1), -1, np.int64)
            shape = {"NHD": (len(order), case.page, kv_heads, dim), "HND": (len(order), kv_heads, case.page, dim)}
            self.shape = shape[case.cache]
        else:
            self.shape = (batch, kv_heads, case.rows, dim)
        self.key_cache, self.value_cache = np.full(self.shape, np.nan), np.full(self.shape, np.nan)
        for b, position in enumerate(case.positions):
            first = case.first(b)
            count = max(0, position - first)
            old = normal((2, count, kv_heads, dim), dtype, "cache", b, count, kv_heads, dim)
            self.keys.append(np.concatenate([old[0], self.k[b : b + 1]]))
            self.values.append(np.concatenate([old[1], self.v[b : b + 1]]))
            at = np.arange(first, max(first, position + 1))
            if paged and position >= 0:
                used = np.unique(at // case.page)
                self.table[b, used] = order[b * blocks + used]
            self.slots.append([self.slot(b, p) for p in at])
            for cache, rows in ((self.key_cache, old[0]), (self.value_cache, old[1])):
                for slot, row in zip(self.slots[b], rows):
                    cache[slot] = row

    def slot(self, sequence, position):
        """Of a cache: where the rows of a position's heads are."""
        case = self.case
        if case.cache == "static":
            return sequence, slice(None), position
        if case.cache == "ring":
            return sequence, slice(None), position % case.rows
        page, row = self.table[sequence, position // case.page], position % case.page
        return (page, row) if case.cache == "NHD" else (page, slice(None), row)

    def expected(self):
        """(out, bound), both [batch, heads, dim], and the caches afterwards."""
        case = self.case
        out, bound = np.zeros(self.q.shape), np.zeros(self.q.shape)
        caches = self.key_cache.copy(), self.value_cache.copy()
        for b, position in enumerate(case.positions):
            if position < 0:
                continue
            scale = case.scale or case.dim**-0.5
            out[b], bound[b] = attended(self.q[b], self.keys[b], self.values[b], scale, case.soft_cap, self.dtype)
            for cache, rows in zip(caches, (self.k, self.v)):
                cache[self.slots[b][-1]] = rows[b]
        return out, bound, caches


def attended(q, keys, values, scale, soft_cap, dtype):
    """(exact, bound) of one sequence, [heads, dim].

    The bound: the last rounding; and for float32 arithmetic, whose errors are random, L = 6 standard deviations. That
    of a score, a sum over dim, moves p_j by as much relative to it, and so the result by p_j (v_j - out); that of the
    sums over n keys is of each p_j v_j.
    """
    exact, p = reference.attention(q, keys, values, scale=scale, soft_cap=soft_cap)
    heads, n, group = len(q), len(keys), len(q) // keys.shape[1]
    bound = np.zeros_like(exact)
    for h in range(heads):
        k, v = keys[:, h // group], values[:, h // group]
        noise = (q.shape[1] ** 0.5 / 2 + 4) * numeric.UNIT_F32
        of_score = noise * (np.sqrt(((q[h] * k) ** 2).sum(1)) * scale + 2 * abs(q[h] @ k.T) * scale) + 4 * numeric.UNIT_F32
        of_sums = (n**0.5 / 2 + 4) * numeric.UNIT_F32
        error = p[h] * (of_score + of_sums)
        moved = np.sqrt((error[:, None] ** 2 * ((v - exact[h]) ** 2 + v**2)).sum(0))
        bound[h] = 6 * moved
    return exact, numeric.quantum(exact, dtype) / 2 + 2 * numeric.UNIT_F32 * abs(exact) + bound
