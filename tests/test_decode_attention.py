"""decode_attention: every kernel against float64, over lengths, heads, caches and everything that cuts the keys; what
no key may touch is NaN."""

from typing import NamedTuple

import numpy as np
import pytest
from cases import CONTIGUOUS, PADDED, UNALIGNED, Layout, Placed, assert_same_bits, normal, random, rotary_rows
from conftest import changed, short_dtype
from frameworks import TORCH_CPU

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
    """(exact, bound) of one sequence, [heads, dim]."""
    found = reference.attention(q, keys, values, scale=scale, soft_cap=soft_cap)
    return found[0], numeric.attention_tolerance(*found, q, keys, values, dtype, scale=scale)


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


def check_or_refuse(framework, case, dtype, kernel, **options):
    """The same of a named kernel. Those on tensor cores leave some heads and caches to another."""
    try:
        check(framework, case, dtype, kernel.name, **options)
    except ValueError as error:
        assert f"kernel '{kernel.name}' cannot serve this call: " in str(error)
        assert "_mma_" in kernel.name
        assert case.dim % 8 or case.dim > 256 or case.layout == UNALIGNED, f"{case}: {error}"


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


@pytest.mark.sanitize
@pytest.mark.rows("decode_attention")
@pytest.mark.parametrize("case", CASES, ids=changed)
def test_every_kernel(kernel, framework, case):
    dtype = short_dtype(kernel.dtype)
    check_or_refuse(framework, case, dtype, kernel)
    if "portable" not in kernel.name:
        check_or_refuse(framework, case, dtype, kernel, batch_invariant=True)


@pytest.mark.rows("decode_attention")
def test_long_sequences(kernel, framework):
    dtype = short_dtype(kernel.dtype)
    check(framework, Case((4000, 3999), heads=4, kv_heads=2, dim=128, spread=3), dtype, kernel.name)
    check(framework, Case((32000,), heads=2, kv_heads=1, dim=64), dtype, kernel.name)


def drawn(index):
    """A case of anything that goes together."""
    rng = random("drawn", index)
    pick = lambda *values: values[rng.integers(len(values))]  # noqa: E731
    kv_heads, cache = int(rng.integers(1, 4)), pick("static", "ring", "NHD", "HND")
    positions = tuple(int(p) for p in rng.integers(-2, pick(5, 70, 300), rng.integers(1, 6)))
    longest = max(0, *positions)
    window = pick(None, 1, int(rng.integers(1, longest + 2)))
    capacity = longest + 1 + int(rng.integers(0, 40))
    if cache == "ring":
        capacity = int(rng.integers(1, longest + 2))
        window = int(rng.integers(1, capacity + 1))
    starts = tuple(int(rng.integers(-1, max(p, 0) + 1)) for p in positions) if rng.random() < 0.3 else None
    return Case(
        positions, kv_heads * int(rng.integers(1, 10)), kv_heads, int(pick(64, 80, 96, 128, 24, 17, 5)),
        capacity, cache, int(pick(1, 3, 16, 64)), window, pick(None, None, 30.0), pick(None, 0.3), starts,
        bool(rng.integers(2)), pick(CONTIGUOUS, PADDED, UNALIGNED),
    )  # fmt: skip


@pytest.mark.rows("decode_attention")
def test_drawn_cases(kernel, framework):
    for index in range(40):
        check_or_refuse(framework, drawn(index), short_dtype(kernel.dtype), kernel, batch_invariant=index % 2 == 0)


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_a_sequence_alone(device, dtype, framework):
    """Its bits do not depend on the batch."""
    case = Case((700, 3, 129, 64), heads=8, kv_heads=2, dim=128, capacity=2000)
    whole = to_float64(check(framework, case, dtype, batch_invariant=True))
    inputs = Inputs(case, dtype)
    for b, position in enumerate(case.positions):
        q, k, v = (framework.tensor(x[b : b + 1], dtype) for x in (inputs.q, inputs.k, inputs.v))
        caches = [framework.tensor(x[b : b + 1], dtype) for x in (inputs.key_cache, inputs.value_cache)]
        out = minivllm.decode_attention(q, k, v, *caches, framework.integers([position], True), batch_invariant=True)
        assert_same_bits(out, whole[b : b + 1], f"sequence {b}")


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@pytest.mark.parametrize("dim, layout, taken", [(128, CONTIGUOUS, True), (40, PADDED, True), (33, CONTIGUOUS, False),
                                                (300, CONTIGUOUS, False), (128, UNALIGNED, False)])  # fmt: skip
def test_tensor_cores_take_what_they_can(device, dtype, dim, layout, taken, framework):
    if device == "cpu":
        pytest.skip("the kernels of GPUs are meant")
    case = Case((300, 12), heads=8, kv_heads=2, dim=dim, layout=layout)
    if taken:
        check(framework, case, dtype, f"{dtype}_mma_sm80")
    else:
        with pytest.raises(ValueError, match="_mma_sm80' cannot serve this call: "):
            check(framework, case, dtype, f"{dtype}_mma_sm80")


# ---- norm and rotary embedding --------------------------------------------------------------------------------------


def prepared(x, weight, cos, sin, dtype, rounding="hf", interleaved=False, wide=False):
    """Heads x [B, heads, D] after norm and rotary embedding; wide: the rows of that are of float32."""
    made = {"rounding": rounding, "dtype": dtype, "round_last": rounding != "fp32"}
    if weight is not None:
        x, _ = reference.rms_norm(x, weight, **made)
    if cos is None:
        return x
    rows = "f32" if wide else None
    return reference.rotary(x, cos[:, None], sin[:, None], interleaved=interleaved, rows=rows, **made)


@pytest.mark.rows("decode_attention")
@pytest.mark.parametrize("rounding", ["hf", "hf_once", "fp32"])
@pytest.mark.parametrize(
    "dim, columns, interleaved, normed, wide",
    [(128, 128, False, True, False), (64, 64, True, False, False), (96, 32, False, True, True),
     (80, 0, False, True, False), (33, 30, True, True, True), (256, 256, False, False, False),
     (64, 64, False, True, False)],
)  # fmt: skip
def test_norm_and_rotary_embedding(kernel, framework, rounding, dim, columns, interleaved, normed, wide):
    if "_mma_" in kernel.name and (dim % 8 or (kernel.dtype == "float16" and rounding == "fp32")):
        pytest.skip("tensor cores take heads of whole packets of 16 bytes, and queries rounded to float16")
    dtype = short_dtype(kernel.dtype)
    case = Case((1, 127, 1000), heads=24 if dim == 64 else 4, kv_heads=2, dim=dim)
    inputs, rows = Inputs(case, dtype), "f32" if wide else dtype
    options = {"rounding": rounding, "interleaved": interleaved, "kernel": kernel.name}
    cos = sin = weight = None
    if columns:
        cos, sin = (round_to(row, rows) for row in rotary_rows(case.positions, columns, 1e6, interleaved))
        options |= {"cos": framework.tensor(cos, rows), "sin": framework.tensor(sin[:, None], rows)}
    if normed:
        weight = normal((dim,), dtype, "head weight", dim, scale=0.2, mean=1.0)
        options |= {name: framework.tensor(weight, dtype) for name in ("q_norm_weight", "k_norm_weight")}
    caches = [framework.tensor(x, dtype) for x in (inputs.key_cache, inputs.value_cache)]
    q, k, v = (framework.tensor(x, dtype) for x in (inputs.q, inputs.k, inputs.v))
    out = minivllm.decode_attention(q, k, v, *caches, framework.integers(case.positions, True), **options)
    framework.synchronize()

    given = (weight, cos, sin, dtype, rounding, interleaved, wide and dtype != "f32")
    new_q, new_k = prepared(inputs.q, *given), prepared(inputs.k, *given)
    written = to_float64(caches[0])
    stored = np.stack([written[slots[-1]] for slots in inputs.slots])
    # float32 noise moves a rounding to the neighbour: of n, of its products and of their sum, and of few elements.
    size = abs(new_k).max(-1, keepdims=True)
    numeric.assert_within(stored, round_to(new_k, dtype), 4 * numeric.quantum(size, dtype) + 2**-20 * size, "key")
    if dtype != "f32":
        assert (stored != round_to(new_k, dtype)).mean() <= 0.01
    for b in range(len(case.positions)):
        keys = np.concatenate([inputs.keys[b][:-1], stored[b : b + 1]])
        exact, bound = attended(new_q[b], keys, inputs.values[b], dim**-0.5, None, dtype)
        # The same of queries: one in a hundred elements is a neighbour, which moves the scores like a random walk.
        step = (
            4 * numeric.quantum(abs(new_q[b]).max(-1), dtype) * (0.1 if dtype == "f32" or rounding != "fp32" else 0.01)
        )
        moved = numeric.LAMBDA * dim**-0.5 * step * np.sqrt((keys**2).sum(-1).max())
        limit = bound + np.minimum(moved, 1)[:, None] * abs(inputs.values[b]).max() / 4
        numeric.assert_within(to_float64(out)[b], exact, limit, f"sequence {b}")


@pytest.mark.parametrize("spread", [1, 100])
@pytest.mark.parametrize("position", [1, 127, 1000, 4000])
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_as_accurate_as_torch(device, dtype, framework, torch, position, spread):
    """The gate: the RMS error, pooled, against that of torch's own expressions with softmax and P in float32."""
    dim, heads, kv_heads, ours, theirs = 128, 8, 2, [], []
    for draw in range(4):
        key = (dtype, "gate", draw, position)
        weight = normal((dim,), dtype, "w", *key, scale=0.2, mean=1.0)
        if draw % 2:
            weight[5] = 96.5
        q, k, v = (normal((1, n, dim), dtype, name, *key) for name, n in zip("qkv", (heads, kv_heads, kv_heads)))
        q[..., ::97] = round_to(q[..., ::97] * spread, dtype)
        keys, values = (normal((1, kv_heads, position + 1, dim), dtype, name, *key) for name in ("keys", "values"))
        cos, sin = (round_to(row, dtype) for row in rotary_rows((position,), dim, 1e4, False))
        data = {"q": q, "k": k, "v": v, "key_cache": keys, "value_cache": values, "cos": cos, "sin": sin,
                "q_norm_weight": weight, "k_norm_weight": weight}  # fmt: skip
        given = {name: framework.tensor(x, dtype) for name, x in data.items()}
        got = to_float64(minivllm.decode_attention(**given, positions=framework.integers([position], True)))
        t = {name: torch.from_numpy(x.copy()).to(TORCH_CPU.dtype(dtype)) for name, x in data.items()}
        new_q, keys[:, :, -1] = (prepared(x, weight, cos, sin, dtype, "fp32") for x in (q, k))
        values[:, :, -1] = v
        exact, _ = reference.attention(new_q[0], keys[0].swapaxes(0, 1), values[0].swapaxes(0, 1), scale=dim**-0.5)

        def rotated(x, t=t):
            wide = x.float()
            n = t["q_norm_weight"] * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
            half = torch.cat([-n[..., dim // 2 :], n[..., : dim // 2]], -1)
            return n * t["cos"][:, None] + half * t["sin"][:, None]

        t["key_cache"][:, :, -1], t["value_cache"][:, :, -1] = rotated(t["k"]), t["v"]
        wide = [t[name].repeat_interleave(heads // kv_heads, 1).float() for name in ("key_cache", "value_cache")]
        p = torch.softmax((rotated(t["q"])[:, :, None].float() @ wide[0].transpose(-1, -2)) * dim**-0.5, -1)
        theirs.append(numeric.rms_error(to_float64((p @ wide[1]).to(t["q"].dtype))[0, :, 0], exact))
        ours.append(numeric.rms_error(got[0], exact))
    factor = 1.5 if dtype == "f32" else 1.02
    assert np.square(ours).sum() <= factor**2 * np.square(theirs).sum(), (ours, theirs)


@pytest.mark.parametrize("cache", ["static", "NHD"])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_what_the_positions_do_not_allow(device, dtype, framework, cache):
    """NaN, and nothing written: positions past the cache, starts past the position, missing pages."""
    inputs = Inputs(Case((10, 31, 20, 30, 5), heads=4, kv_heads=2, dim=64, capacity=32, cache=cache), dtype)
    caches = [framework.tensor(x, dtype) for x in (inputs.key_cache, inputs.value_cache)]
    expected = [to_float64(x) for x in caches]
    options = {"starts": framework.integers([0, 0, 21, 0, 0], False)}
    if cache == "NHD":
        inputs.table[3, 0] = -1  # a hole
        inputs.table[4, 0] = inputs.shape[0]  # past the pages
        options |= {"block_table": framework.integers(inputs.table[:, :2], False), "cache_layout": cache}
    q, k, v = (framework.tensor(x, dtype) for x in (inputs.q, inputs.k, inputs.v))
    positions = framework.integers((10, 40, 20, 30, 5), True)
    out = to_float64(minivllm.decode_attention(q, k, v, *caches, positions, **options))
    nan = np.isnan(out).all((1, 2))
    assert list(nan) == [False, True, True, cache == "NHD", cache == "NHD"]
    assert not np.isnan(out[~nan]).any()
    for was, now, rows in zip(expected, caches, (inputs.k, inputs.v)):
        for b in np.flatnonzero(~nan):
            was[inputs.slots[b][-1]] = rows[b]
        assert_same_bits(now, was, "cache")


def test_nan_and_infinity_stay_in_their_heads(device, framework):
    inputs = Inputs(Case((70,) * 4, heads=4, kv_heads=2, dim=64), "f32")
    inputs.key_cache[1, 0, 3], inputs.value_cache[2, 1, 69, 5] = np.inf, np.nan
    caches = [framework.tensor(x, "f32") for x in (inputs.key_cache, inputs.value_cache)]
    q, k, v = (framework.tensor(x, "f32") for x in (inputs.q, inputs.k, inputs.v))
    nan = np.isnan(to_float64(minivllm.decode_attention(q, k, v, *caches, framework.integers([70] * 4, False))))
    assert nan[1, :2].all() and nan[2, 2:, 5].all() and nan.sum() == 2 * 64 + 2
