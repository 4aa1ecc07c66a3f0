"""decode_attention in the soak: sequences as long as those of models, in every kind of cache, without the norms and the
rotary embedding of heads, which tests/test_decode_attention.py covers.

The variants of a program move positions and pages from one sequence to another, so all of them are valid anywhere: a
block table has no holes, and a cache has values in every row."""

import random

import numpy as np

import minivllm
from fuzz import calls, expect
from fuzz.drawing import Case, Drawing
from fuzz.layouts import Layouts, Spec, c_strides
from fuzz.program import Program
from fuzz.values import ITEMSIZE, PRIME
from minivllm.testing import numeric, reference

OP = "decode_attention"
CACHES = ("key_cache", "value_cache")
KINDS = ("normal", "normal", "near one", "small")  # scores that a softmax does not make one and zeros of
CACHE_BYTES = 16 << 20  # of the keys at most


def draw(seed: int, index: int, device: str) -> Case:
    rng = random.Random((seed << 40) + index)
    d = Drawing(OP, rng, device)
    d.at, d.wild = Layouts(rng, KINDS, False, period=PRIME), False
    most = 32 if device == "cuda" else 4
    batch, kv_heads = rng.choice((1, rng.randint(2, 4), rng.randint(2, most))), rng.choice((1, 2, 4, 8))
    heads, dim = kv_heads * rng.randint(1, 8), rng.choice((64, 80, 96, 128, 128, 256))
    most = CACHE_BYTES // (batch * kv_heads * dim * ITEMSIZE[d.dtype])
    longest = min(most, rng.choice((70, 1000, 8000) if device == "cuda" else (5, 70, 200)))
    positions = [rng.randrange(longest) for _ in range(batch)]

    shape = (batch, heads + 2 * kv_heads, dim)
    packed = d.at.fill(d.at.place(shape, d.dtype, c_strides(shape)))
    for name, start, count in (("q", 0, heads), ("k", heads, kv_heads), ("v", heads + kv_heads, kv_heads)):
        d.tensors[name] = packed._replace(shape=(batch, count, dim), offset=packed.offset + start * dim)

    def integers(values, dtype: str) -> Spec:
        spec = d.at.place(np.shape(values), dtype, c_strides(np.shape(values)))
        d.at.values(spec)[...] = values
        return spec

    kind, page = rng.choice(("static", "ring", "NHD", "HND")), rng.choice((1, 16, 16, 64))
    rows = max(positions) + 1
    if kind in ("NHD", "HND"):
        blocks = -(-rows // page)
        pages = list(range(batch * blocks))
        rng.shuffle(pages)
        d.tensors["block_table"] = integers(np.reshape(pages, (batch, blocks)), "i32")
        shape = (batch * blocks, page, kv_heads, dim) if kind == "NHD" else (batch * blocks, kv_heads, page, dim)
        d.give(cache_layout=kind)
    else:
        rows = rng.randint(1, rows) if kind == "ring" else rows
        shape = (batch, kv_heads, rows, dim)
    for name in CACHES:
        d.tensors[name] = d.at.fill(d.at.place(shape, d.dtype, c_strides(shape)))
    wide = rng.choice(("i32", "i64"))
    d.tensors["positions"] = integers(positions, wide)
    if rng.random() < 0.2:
        d.tensors["starts"] = integers([rng.randint(0, min(positions)) for _ in range(batch)], wide)
    if kind == "ring":
        d.give(ring=True, window=rng.randint(1, rows))
    elif rng.random() < 0.3:
        d.give(window=rng.randint(1, longest))
    d.give(soft_cap=rng.choice((None, None, 30.0)), scale=rng.choice((None, 0.3)))
    d.numbers()
    d.layer_options()
    return d.case(f"{seed}:{index}", None)


class Attention(Program):
    """A program whose results are `out` and both caches. One that vouches for the rows keeps the positions, too: where
    they change, a row that one call wrote is an old row of the next."""

    PROMISES = ("static_rows",)

    def promised(self):
        return frozenset(self.case.tensors) - {"q", "k", "v"}

    def written(self):
        return CACHES

    def call(self):
        return (minivllm.decode_attention(**self.arguments), *(self.arguments[name] for name in CACHES))

    def judge(self, variant: int, results):
        inputs = calls.inputs_of(self.case, self.memory, self.masters[variant])
        what = f"variant {variant}, first call, by {minivllm.last_kernel()}: "
        exact, bound = self.expected(inputs)
        numeric.assert_within(results[0].double(), exact, bound, f"{what}out")
        for name, cache in zip(CACHES, results[1:]):
            numeric.assert_equal(cache.double(), inputs[name], f"{what}{name}")

    def expected(self, inputs: dict):
        """(out, bound); puts the new keys and values into the caches among the inputs."""
        options, q, dtype = self.case.options, inputs["q"], self.case.tensors["q"].dtype
        nhd = options.get("cache_layout") == "NHD"
        caches = [inputs[name] if nhd else inputs[name].transpose(1, 2) for name in CACHES]  # [.., rows, kv_heads, dim]
        scale, exact, bound = options["scale"] or q.shape[-1] ** -0.5, q.clone(), q.clone()
        for sequence, position in enumerate(inputs["positions"].long().tolist()):
            first = max(0, position + 1 - options.get("window", position + 1))
            if "starts" in inputs:
                first = max(first, int(inputs["starts"][sequence]))
            at, rows = self.torch.arange(first, position + 1, device=q.device), caches[0].shape[1]
            page = self.torch.full_like(at, sequence)
            if "block_table" in inputs:
                page = inputs["block_table"][sequence].long()[at // rows]
            for cache, new in zip(caches, ("k", "v")):
                cache[page[-1], position % rows] = inputs[new][sequence]
            given = q[sequence], *(cache[page, at % rows] for cache in caches)
            found = reference.attention(*given, scale=scale, soft_cap=options["soft_cap"])
            allowed = numeric.attention_tolerance(*found, *given, dtype, scale=scale)
            exact[sequence], bound[sequence] = found[0], allowed + expect.steady(found[0], len(at), dtype)
        return exact, bound
