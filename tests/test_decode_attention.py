"""decode_attention: every kernel against float64, over lengths, heads, caches and everything that cuts the keys; what
no key may touch is NaN."""

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

    The bound: the last rounding, and L = 6 standard deviations of what float32 arithmetic loses, whose errors are
    random. An error of a score, which is a sum over dim, changes p_j by as much relative to it, and the result by that
    times p_j (v_j - out); errors of the sums over the keys come with p_j v_j.
    """
    exact, p = reference.attention(q, keys, values, scale=scale, soft_cap=soft_cap)
    of_sums = numeric.LAMBDA * (len(keys) ** 0.5 / 2 + 4) * numeric.UNIT_F32
    of_scores = numeric.LAMBDA * (q.shape[1] ** 0.5 / 2 + 4) * numeric.UNIT_F32
    bound = np.zeros_like(exact)
    for h, of_head in enumerate(p):
        kv_head = h * keys.shape[1] // len(q)
        k, v = keys[:, kv_head], values[:, kv_head]
        score = scale * (np.sqrt(((q[h] * k) ** 2).sum(1)) + abs(k @ q[h])) + 1
        changed = (of_head * of_scores * score)[:, None] * (v - exact[h])
        bound[h] = np.sqrt((changed**2 + (of_head[:, None] * of_sums * v) ** 2).sum(0))
    return exact, numeric.quantum(exact, dtype) / 2 + 2 * numeric.UNIT_F32 * abs(exact) + bound


# ---- a call ---------------------------------------------------------------------------------------------------------


def check(framework, case, dtype, kernel=None, **options):
    """One call, held against float64: the result, what is written to the caches, and that nothing else is."""
    inputs = Inputs(case, dtype)
    packed = framework.tensor(inputs.packed, dtype)
    q, k, v = (packed[:, a:b] for a, b in ((0, case.heads), (case.heads, -case.kv_heads), (-case.kv_heads, None)))
    caches = [Placed(framework, inputs.shape, dtype, case.layout, x) for x in (inputs.key_cache, inputs.value_cache)]
    for name in ("window", "soft_cap", "scale"):
        options[name] = getattr(case, name)
    if inputs.table is not None:
        options |= {"block_table": framework.integers(inputs.table, False), "cache_layout": case.cache}
    if case.starts:
        options["starts"] = framework.integers(case.starts, case.wide)
    positions = framework.integers(case.positions, case.wide)
    out = minivllm.decode_attention(
        q, k, v, *(cache.tensor for cache in caches), positions, ring=case.cache == "ring", kernel=kernel, **options
    )
    framework.synchronize()
    exact, bound, expected = inputs.expected()
    assert framework.is_mine(out) and tuple(out.shape) == exact.shape
    numeric.assert_within(to_float64(out), exact, bound, f"{case}\nout")
    for name, cache, values in zip(("key_cache", "value_cache"), caches, expected):
        assert_same_bits(cache.values(), values, f"{case}\n{name}")
        cache.check_canaries(name)
    assert_same_bits(packed, inputs.packed, "q, k, v")
    return out


LENGTHS = (0, 1, 2, 62, 63, 64, 65, 127, 128, 500)
CASES = [
    Case((0,)),
    Case(LENGTHS, wide=True),
    Case((1000,), heads=1, kv_heads=1),
    Case((3, 700, 44), heads=6, kv_heads=6, dim=80),
    Case((513, 130, 1, 64, 2), heads=4, kv_heads=2, dim=96),
    Case((255,), heads=15, kv_heads=5, dim=128),
    Case((300, 12), heads=8, kv_heads=2, dim=128, capacity=1500),
    Case((300, 12), heads=10, kv_heads=2, dim=128, capacity=1500),
    Case((200,), heads=9, kv_heads=1, dim=64),
    Case((200,), heads=16, kv_heads=1, dim=256),
    Case((90, 3), heads=34, kv_heads=2, dim=64),  # more than a block takes
    Case((70, 5), heads=4, kv_heads=2, dim=256),
    Case((70, 5), heads=3, kv_heads=1, dim=40),
    Case((70, 5), heads=3, kv_heads=1, dim=33),
    Case((20, 5), heads=20, kv_heads=1, dim=7),
    Case((20,), heads=2, kv_heads=2, dim=1),
    Case((130, 7), heads=4, kv_heads=2, dim=300),
    Case((66,), heads=2, kv_heads=1, dim=1024),
    Case((64, 1, 0, 99, 700), window=1),
    Case((64, 1, 0, 99, 700), window=64),
    Case((64, 1, 0, 99, 700), window=65, soft_cap=5.0, spread=4),
    Case((64, 1, 0, 99, 700), soft_cap=50.0, spread=8, dim=96),
    Case((64, 1, 0, 99, 700), scale=1.25, spread=4, dim=128),
    Case((64, 1, 0, 99, 700), starts=(3, 1, 0, 98, 5), wide=True),
    Case((64, 1, 0, 99, 700), starts=(-3, 0, 0, 99, 650), window=100),
    Case((-1, 40, -7, 0), heads=4, kv_heads=2),
    Case((-1,)),
    Case((40, 65, 66, 131, 1000), cache="ring", capacity=66, window=66),
    Case((40, 65, 66, 131, 2**40 + 17), cache="ring", capacity=66, window=50, wide=True),
    Case((40, 165, 166), cache="ring", capacity=166, window=1, starts=(0, 100, 150)),
    Case((0, 1, 15, 16, 200), cache="NHD"),
    Case((0, 1, 15, 16, 200), cache="HND", page=1),
    Case((70, -1, 15, 640), cache="HND", dim=128, page=64, window=130, starts=(0, 0, 15, 600)),
    Case((100, 99, 3), cache="NHD", dim=80, page=24, window=30, soft_cap=20.0),
    Case((100, 99, 3), cache="NHD", layout=PADDED),
    Case((100, 99, 3), layout=PADDED, dim=128),
    Case((100, 99, 3), layout=UNALIGNED, dim=128),
]


@pytest.mark.rows("decode_attention")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_kernel(kernel, framework, case):
    dtype = short_dtype(kernel.dtype)
    check(framework, case, dtype, kernel.name)
    if "portable" not in kernel.name:
        check(framework, case, dtype, kernel.name, batch_invariant=True)


@pytest.mark.rows("decode_attention")
def test_long_sequences(kernel, framework):
    dtype = short_dtype(kernel.dtype)
    check(framework, Case((4000, 3999), heads=4, kv_heads=2, dim=128, spread=3), dtype, kernel.name)
    check(framework, Case((32000,), heads=2, kv_heads=1, dim=64), dtype, kernel.name)
