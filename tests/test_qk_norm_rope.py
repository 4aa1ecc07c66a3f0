"""qk_norm_rope: every kernel against float64, over norms, rows of cos and sin, layouts and caches; and against what
transformers computes, at positions up to 32,000."""

import itertools
from typing import NamedTuple

import numpy as np
import pytest
from cases import CONTIGUOUS, PADDED, RAGGED, UNALIGNED, Layout, Placed, assert_same_bits, normal, random, rotary_rows
from conftest import changed, short_dtype
from frameworks import TORCH_CPU

import minivllm
from minivllm.testing import numeric, reference
from minivllm.testing.reference import round_to, to_float64

POSITIONS = (0, 1, 127, 1000, 4097, 31999)


class Case(NamedTuple):
    lead: tuple = (3,)  # of the tokens
    heads: int = 4
    kv_heads: int = 2
    dim: int = 64
    columns: int | None = None  # of the rotary embedding; None: all, 0: there is none
    norms: str = "qk"  # which of them have a weight
    interleaved: bool = False
    rounding: str = "hf"
    wide_rows: bool = False  # float32 rows of cos and sin
    wide_weights: bool = False
    rows: tuple | None = None  # the leading dimensions of cos and sin; None: those of the tokens
    weight_offset: float = 0.0
    cache: str | None = None  # or "static", "NHD", "HND"
    wide_slots: bool = False
    layout: Layout = CONTIGUOUS  # of the caches
    in_place: bool = False
    gap: int = 0  # elements between the rows of the packed buffer
    backwards: bool = False  # the tokens' dimensions in memory

    @property
    def tokens(self):
        return int(np.prod(self.lead, dtype=np.int64))


def drawn_rows(lead, columns, interleaved, key, dtype):
    """cos and sin of positions drawn from POSITIONS, as dtype holds them."""
    positions = random("positions", key).choice(POSITIONS, lead)
    return (round_to(row, dtype) for row in rotary_rows(positions, columns, 1e4, interleaved))


def of_tokens(row, lead):
    """Rows of cos or sin, one for each token and all of its heads."""
    try:
        row = np.broadcast_to(row, (*lead, row.shape[-1]))
    except ValueError:
        row = row.reshape(*lead, -1)
    return row[..., None, :]


def prepared(case, x, weight, cos, sin, dtype):
    """(exact, bound) of heads after norm and rotary embedding.

    The bound adds up what each step may lose: but in "fp32" half a spacing for each rounding on the way, which is 2^-bits of
    the value or half of a subnormal; the float32 arithmetic of the norm (see numeric.py) and of the sum; and the last
    rounding. Whoever rounds n loses that in both products.
    """
    bits, lowest, _ = reference.FORMATS[dtype]
    rounds, tiny = case.rounding != "fp32", 2.0 ** (lowest - bits)
    n, lost = x, np.zeros_like(x)
    if weight is not None:
        n, _ = reference.rms_norm(x, weight, rounding="fp32", weight_offset=case.weight_offset)
        gain = np.maximum(1, abs(case.weight_offset + weight))
        lost = (numeric.LAMBDA * (x.shape[-1] ** 0.5 / 2 + 4) * numeric.UNIT_F32) * abs(n)
        lost = lost + {"hf": 2, "hf_once": 1, "fp32": 0}[case.rounding] * (2.0**-bits * abs(n) + gain * tiny)
    if cos is None:
        return n, lost + numeric.quantum(n, dtype) / 2
    cos, sin = of_tokens(cos, case.lead), of_tokens(sin, case.lead)
    columns, exact = cos.shape[-1], reference.rotary(n, cos, sin, interleaved=case.interleaved)
    first, turned = (reference.turned(abs(each[..., :columns]), case.interleaved) for each in (n, lost))
    first, turned = abs(first), abs(turned)  # what the other of each pair has, and may have lost
    size = abs(n[..., :columns] * cos) + first * abs(sin)
    bound = lost.copy()
    bound[..., :columns] = lost[..., :columns] * abs(cos) + turned * abs(sin) + 3 * numeric.UNIT_F32 * size
    if rounds and not case.wide_rows:
        bound[..., :columns] += 2.0**-bits * size + 2 * tiny
    return exact, bound + numeric.quantum(exact, dtype) / 2 + numeric.UNIT_F32 * abs(exact)


class Inputs:
    """Of a case: float64 values as the dtype holds them, and tensors of a framework."""

    def __init__(self, case, dtype, framework):
        self.case, self.dtype = case, dtype
        heads, kv_heads, dim = case.heads, case.kv_heads, case.dim
        width = (heads + 2 * kv_heads) * dim + case.gap
        lead = case.lead[::-1] if case.backwards else case.lead
        packed = normal((*lead, width), dtype, "qkv", case.lead, heads, kv_heads, dim)
        self.packed, self.buffer = packed, framework.tensor(packed, dtype)
        self.q, self.k, self.v = self.cut(packed)
        self.tensors = dict(zip("qkv", self.cut(self.buffer)))
        if case.cache is None:
            del self.tensors["v"]
        for name in case.norms:
            of = "f32" if case.wide_weights else dtype
            weight = normal((dim,), of, name, dim, scale=0.5, mean=1.0)
            setattr(self, f"{name}_weight", weight)
            self.tensors[f"{name}_norm_weight"] = framework.tensor(weight, of)
        columns = dim if case.columns is None else case.columns
        self.cos = self.sin = None
        if columns:
            of = "f32" if case.wide_rows else dtype
            rows = case.lead if case.rows is None else case.rows
            self.cos, self.sin = drawn_rows(rows, columns, case.interleaved, case.lead, of)
            self.tensors |= {"cos": framework.tensor(self.cos, of), "sin": framework.tensor(self.sin, of)}
        self.caches = ()
        if case.cache is not None:
            self.make_caches(framework)

    def cut(self, packed):
        """q, k and v, [*tokens, heads, dim], as views of the packed buffer."""
        case = self.case
        sizes = [n * case.dim for n in (case.heads, case.kv_heads, case.kv_heads)]
        starts = np.cumsum([0, *sizes])
        parts = [packed[..., a : a + n] for a, n in zip(starts, sizes)]
        if case.backwards:
            axes = (*range(len(case.lead))[::-1], len(case.lead))
            parts = [part.transpose(axes) if isinstance(part, np.ndarray) else part.permute(axes) for part in parts]
        shapes = [(*case.lead, n // case.dim, case.dim) for n in sizes]
        return [
            part.reshape(shape) if isinstance(part, np.ndarray) and part.dtype == np.float64 else _split(part, shape)
            for part, shape in zip(parts, shapes)
        ]

    def make_caches(self, framework):
        case, rows, dim = self.case, 5, self.case.dim
        blocks = case.tokens // rows + 2
        self.shape = (blocks, rows, case.kv_heads, dim) if case.cache == "NHD" else (blocks, case.kv_heads, rows, dim)
        slots = random("slots", case.lead).permutation(blocks * rows)[: case.tokens].astype(np.int64)
        if case.tokens > 4:  # skipped: negative, and outside of the cache
            slots[1], slots[3] = -1, blocks * rows
            slots[4] = -(2**62) if case.wide_slots else -(2**31)
            slots[0] = 2**62 if case.wide_slots else 2**31 - 1
        self.slots, self.rows = slots.reshape(case.lead), rows
        nothing = np.full(self.shape, np.nan)
        self.caches = [Placed(framework, self.shape, self.dtype, case.layout, nothing) for _ in range(2)]
        self.tensors |= dict(zip(("key_cache", "value_cache"), (cache.tensor for cache in self.caches)))
        self.tensors["slots"] = framework.integers(self.slots, case.wide_slots)
        if case.cache != "static":
            self.tensors["cache_layout"] = case.cache

    def expected(self):
        """((out_q, bound), (out_k, bound)) in float64, not rounded at the end."""
        return [
            prepared(self.case, x, getattr(self, f"{name}_weight", None), self.cos, self.sin, self.dtype)
            for name, x in (("q", self.q), ("k", self.k))
        ]

    def expected_cache(self, heads):
        """A cache after the call: NaN but for the slots."""
        cache = np.full(self.shape, np.nan)
        flat = heads.reshape(-1, self.case.kv_heads, self.case.dim)
        for row, slot in zip(flat, self.slots.reshape(-1)):
            if 0 <= slot < self.shape[0] * self.rows:
                block, at = divmod(int(slot), self.rows)
                cache[(block, at) if self.case.cache == "NHD" else (block, slice(None), at)] = row
        return cache


def _split(part, shape):
    if hasattr(part, "unflatten"):
        return part.unflatten(-1, shape[-2:])
    itemsize = part.itemsize
    return np.lib.stride_tricks.as_strided(part, shape, (*part.strides[:-1], shape[-1] * itemsize, itemsize))


def check(framework, case, dtype, kernel=None):
    """One call, held against float64: both results, what is written to the caches, and that nothing else is."""
    inputs = Inputs(case, dtype, framework)
    outputs = {"out_q": inputs.tensors["q"], "out_k": inputs.tensors["k"]} if case.in_place else {}
    results = minivllm.qk_norm_rope(
        **inputs.tensors, **outputs, interleaved=case.interleaved, rounding=case.rounding,
        weight_offset=case.weight_offset, kernel=kernel,
    )  # fmt: skip
    framework.synchronize()
    for name, got, (expected, bound) in zip(("out_q", "out_k"), results, inputs.expected()):
        assert framework.is_mine(got)
        numeric.assert_within(to_float64(got), expected, bound, f"{case}\n{name}")
        assert got is outputs.get(name, got)
    if not case.in_place:
        assert_same_bits(inputs.buffer, inputs.packed, "q, k, v")
    else:
        sizes = (case.heads + case.kv_heads) * case.dim
        assert_same_bits(to_float64(inputs.buffer)[..., sizes:], inputs.packed[..., sizes:], "v and the gaps")
    for cache, heads in zip(inputs.caches, (to_float64(results[1]), inputs.v)):
        assert_same_bits(cache.values(), inputs.expected_cache(heads), f"{case}\ncache")
        cache.check_canaries("cache")
    return results


CASES = [
    Case(),
    Case((), heads=1, kv_heads=1),
    Case((1, 1), heads=16, kv_heads=8, dim=128),
    Case((2, 5), heads=14, kv_heads=2, dim=128, wide_rows=True),
    Case((2, 5), heads=3, kv_heads=5, dim=80, interleaved=True),
    Case((2, 5), dim=96, columns=24, interleaved=True, rounding="fp32"),
    Case((7,), dim=256, columns=64, rounding="fp32", wide_weights=True),
    Case((7,), dim=33, columns=32, gap=3),
    Case((7,), dim=7, columns=2, norms="", gap=1),
    Case((4,), heads=1, kv_heads=1, dim=1, columns=0),
    Case((4,), dim=300, columns=0, weight_offset=1.0),
    Case((2,), heads=2, kv_heads=1, dim=1024, norms="q"),
    Case((2,), heads=2, kv_heads=1, dim=1022, columns=1020, norms="k", interleaved=True),
    Case((5,), norms="", columns=0),
    Case((4, 3), rows=(1, 3), dim=128),
    Case((4, 3), rows=(4, 1)),
    Case((4, 3), rows=(1, 1)),
    Case((4, 3), rows=(3,)),
    Case((4, 3), rows=()),
    Case((4, 1), rows=(4,), dim=128),
    Case((4,), rows=(4, 1)),
    Case((2, 3, 4), rows=(2, 1, 4), backwards=True, gap=8),
    Case((2, 3, 4, 2), rows=(3, 1, 2), backwards=True, cache="NHD"),
    Case((3, 5), backwards=True, in_place=True, dim=128),
    Case((9,), in_place=True, gap=5),
    Case((9,), cache="static", dim=128),
    Case((9,), cache="static", wide_slots=True, in_place=True, rounding="fp32"),
    Case((3, 4), cache="NHD", dim=80, norms="k"),
    Case((3, 4), cache="HND", wide_slots=True, backwards=True, wide_rows=True),
    Case((9,), cache="HND", layout=PADDED, dim=128, in_place=True),
    Case((9,), cache="NHD", layout=RAGGED, dim=33, columns=20),
    Case((9,), cache="static", layout=UNALIGNED, dim=128, interleaved=True),
    Case((200,), heads=16, kv_heads=8, dim=128, cache="NHD"),
]


@pytest.mark.sanitize
@pytest.mark.rows("qk_norm_rope")
@pytest.mark.parametrize("case", CASES, ids=changed)
def test_every_kernel(kernel, framework, case):
    check(framework, case, short_dtype(kernel.dtype), kernel.name)


@pytest.mark.rows("qk_norm_rope")
def test_options_multiplied(kernel, framework):
    """Every combination of what decides which roundings are made."""
    choices = itertools.product(("", "q", "k", "qk"), (False, True), ("hf", "fp32"), (False, True), (None, 32, 0))
    for norms, interleaved, rounding, wide_rows, columns in choices:
        case = Case((2, 3), 2, 1, 64, columns, norms, interleaved, rounding, wide_rows, cache="NHD")
        check(framework, case, short_dtype(kernel.dtype), kernel.name)


@pytest.mark.rows("qk_norm_rope")
def test_roundings_are_those_of_transformers(kernel, framework):
    """Bit for bit, but where the noise of float32 moves a value across a tie: 2^-17 of a bfloat16's spacing, for each of
    five roundings, and eight times as much of a float16's."""
    dtype = short_dtype(kernel.dtype)
    if dtype == "f32":
        pytest.skip("the noise of float32 is as large as its roundings")
    for wide_rows in (False, True):
        case = Case((64,), heads=8, dim=128, wide_rows=wide_rows)
        inputs = Inputs(case, dtype, framework)
        out, _ = minivllm.qk_norm_rope(**inputs.tensors, kernel=kernel.name)
        n, _ = reference.rms_norm(inputs.q, inputs.q_weight, dtype=dtype)
        cos, sin = of_tokens(inputs.cos, case.lead), of_tokens(inputs.sin, case.lead)
        expected = reference.rotary(n, cos, sin, rows="f32" if wide_rows else dtype, dtype=dtype)
        assert (to_float64(out) != expected).mean() < (0.001 if dtype == "bf16" else 0.008)


@pytest.mark.rows("qk_norm_rope")
def test_a_token_alone_has_the_same_bits(kernel, framework):
    dtype = short_dtype(kernel.dtype)
    inputs = Inputs(Case((9,), heads=8, kv_heads=2, dim=128), dtype, framework)
    whole = minivllm.qk_norm_rope(**inputs.tensors, kernel=kernel.name)
    weights = {name: t for name, t in inputs.tensors.items() if "weight" in name}
    for i in range(9):
        one = {name: t[i : i + 1] for name, t in inputs.tensors.items() if "weight" not in name}
        for got, expected in zip(minivllm.qk_norm_rope(**one, **weights, kernel=kernel.name), whole):
            assert_same_bits(got, to_float64(expected)[i : i + 1])


@pytest.mark.parametrize("lead", [(0,), (0, 4), (2, 0)])
def test_no_tokens(device, framework, lead):
    case = Case(lead, cache="NHD")
    for got, heads in zip(check(framework, case, "f32"), (4, 2)):
        assert tuple(got.shape) == (*lead, heads, 64)


def drawn(index):
    """A case of anything that goes together."""
    rng = random("drawn", index)
    pick = lambda *values: values[rng.integers(len(values))]  # noqa: E731
    lead = tuple(int(n) for n in rng.integers(1, 6, rng.integers(0, 4)))
    dim = int(pick(64, 80, 96, 128, 256, int(rng.integers(2, 300))))
    cache = pick(None, "static", "NHD", "HND") if lead else None
    rows = tuple(int(pick(1, n)) for n in lead)[int(rng.integers(0, len(lead) + 1)) :]
    return Case(
        lead, int(rng.integers(1, 9)), int(rng.integers(1, 5)), dim, int(pick(0, dim // 2 * 2, dim // 4 * 2)),
        pick("", "q", "k", "qk"), bool(rng.integers(2)), pick("hf", "hf_once", "fp32"), bool(rng.integers(2)),
        bool(rng.integers(2)), pick(None, rows), pick(0.0, 1.0, -0.5), cache, bool(rng.integers(2)),
        pick(CONTIGUOUS, PADDED, UNALIGNED, RAGGED), bool(rng.integers(2)), int(rng.integers(0, 9)),
        bool(rng.integers(2)),
    )  # fmt: skip


@pytest.mark.rows("qk_norm_rope")
def test_drawn_cases(kernel, framework):
    for index in range(60):
        check(framework, drawn(index), short_dtype(kernel.dtype), kernel.name)


# ---- transformers ---------------------------------------------------------------------------------------------------


SCALINGS = {
    "theta 10,000": {"rope_type": "default", "rope_theta": 1e4},
    "theta 1,000,000": {"rope_type": "default", "rope_theta": 1e6},
    "llama3": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
    "yarn": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768},
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_as_in_transformers(device, dtype, framework, scaling, torch):
    """The head norms and the rotary embedding of Qwen 3, by its own code: the same roundings, and as accurate."""
    qwen = pytest.importorskip("transformers.models.qwen3.modeling_qwen3", reason="transformers is not installed")
    from transformers import Qwen3Config

    dim, heads, kv_heads = 128, 8, 2
    config = Qwen3Config(
        hidden_size=heads * dim, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=dim,
        max_position_embeddings=131072, rope_parameters=scaling,
    )  # fmt: skip
    kind = TORCH_CPU.dtype(dtype)
    positions = torch.tensor([[*range(4), 126, 127, 1000, 4096, 8191, 31999, 32000]])
    count = positions.shape[1]
    data = {n: normal((1, count, h, dim), dtype, n, "qwen") for n, h in (("q", heads), ("k", kv_heads))}
    data["q"][..., ::97] = round_to(data["q"][..., ::97] * 100, dtype)
    theirs, weights = [], {}
    rows = qwen.Qwen3RotaryEmbedding(config)(torch.zeros(1, dtype=kind), positions)
    for name, x in data.items():
        norm = qwen.Qwen3RMSNorm(dim, 1e-6).to(kind)
        weight = normal((dim,), dtype, name, "weight", scale=0.2, mean=1.0)
        weight[5] = 96.5
        weights[name] = weight
        norm.weight.data.copy_(torch.from_numpy(weight))
        theirs.append(norm(torch.from_numpy(x).to(kind)).transpose(1, 2))
    theirs = [x.transpose(1, 2) for x in qwen.apply_rotary_pos_emb(*theirs, *rows)]
    cos, sin = (to_float64(row) for row in rows)
    arrays = data | {"cos": cos, "sin": sin} | {f"{name}_norm_weight": w for name, w in weights.items()}
    ours = minivllm.qk_norm_rope(**{name: framework.tensor(x, dtype) for name, x in arrays.items()})
    for name, got, expected in zip("qk", map(to_float64, ours), map(to_float64, theirs)):
        n, _ = reference.rms_norm(data[name], weights[name], rounding="fp32")
        exact = reference.rotary(n, cos[:, :, None], sin[:, :, None])
        factor = 1.5 if dtype == "f32" else 1.02
        assert numeric.rms_error(got, exact) <= factor * numeric.rms_error(expected, exact)
        if dtype != "f32":
            assert (got != expected).mean() < (0.001 if dtype == "bf16" else 0.008)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_interleaved_as_in_transformers(device, dtype, framework, torch):
    """GLM's rotary embedding of a part of each head, without a norm."""
    glm = pytest.importorskip("transformers.models.glm.modeling_glm", reason="transformers is not installed")
    q, k = (normal((2, 5, heads, 64), dtype, "glm", heads) for heads in (4, 2))
    cos, sin = drawn_rows((2, 5), 32, False, "glm", dtype)
    tensors = [torch.from_numpy(x).to(TORCH_CPU.dtype(dtype)) for x in (q, k, cos, sin)]
    theirs = glm.apply_rotary_pos_emb(*(x.transpose(1, 2) for x in tensors[:2]), *tensors[2:])
    repeated = [np.repeat(row[..., :16], 2, -1) for row in (cos, sin)]
    given = (framework.tensor(x, dtype) for x in (q, k, *repeated))
    for got, expected in zip(minivllm.qk_norm_rope(*given, interleaved=True), theirs):
        assert_same_bits(got, to_float64(expected.transpose(1, 2)))
