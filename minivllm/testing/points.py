"""Calls of every op at points of a grid: an op, a shape of a real model, tokens and a dtype.

OPS has one line for each op with kernels; a test holds it to the list of ops, so that a new op has one too. A line
names the op's arguments as Normal and Constant, which say what stands in them; `Calls` makes them, as arrays of NumPy
on the CPU and as tensors of torch on a GPU.

Weights and caches walk over more memory than a cache holds. What has a row for each token is the same in all calls,
since the op in front has just written it: but where many tokens meet no matrix it walks too, as in the other
benchmarks.
"""

import itertools
import math
import random
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from .. import _C, signatures
from .shapes import GATE_UPS, HEADS, MODELS, PROJECTIONS, LinearShape, QKVShape
from .timing import copies_needed

DTYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}
ELEMENT_BYTES = {"bf16": 2, "f16": 2, "f32": 4}
CONTEXTS = (512, 4096)  # keys of a sequence, of decode_attention
MANY_TOKENS = 128  # from here on the rows of an op without a matrix walk
CUDA_CACHE_BYTES = 100_000_000  # more than the L2 cache of any GPU tried; the copies are four times this
MOST_BYTES = {"cpu": 1 << 30, "cuda": 8 << 30}  # of one call's arguments; what needs more is left out
PROMISES = ("static_weights", "static_rows")  # which hold here: nothing writes what is promised to be static
BLOCK = 65_537  # random numbers that fill an array on the CPU, over and over


class Point(NamedTuple):
    """One task. context: keys in each sequence's cache, of decode_attention alone, whose tokens are sequences."""

    op: str
    shape: str
    tokens: int
    dtype: str
    context: int | None = None

    def __str__(self) -> str:
        context = f", {self.context} keys" if self.context else ""
        return f"{self.op} {self.shape} {self.dtype}, {self.tokens} token{'s' if self.tokens > 1 else ''}{context}"


class Normal(NamedTuple):
    """A tensor of the point's dtype with normal numbers."""

    shape: tuple[int, ...]
    mean: float = 0.0
    scale: float = 1.0


class Constant(NamedTuple):
    """A tensor of int64 with the same number everywhere."""

    shape: tuple[int, ...]
    value: int


def gain(width: int) -> Normal:
    """The weight of a norm."""
    return Normal((width,), 1.0, 0.1)


def matrix(outputs: int, hidden: int) -> Normal:
    """The weight of a linear layer."""
    return Normal((outputs, hidden), 0.0, 0.02)


def rows(shape: LinearShape | QKVShape, tokens: int, *names: str) -> dict:
    """Tensors [tokens, hidden]."""
    return {name: Normal((tokens, shape.hidden)) for name in names}


def heads(tokens: int, count: int, dim: int) -> Normal:
    return Normal((tokens, count, dim))


def norm(shape: QKVShape, tokens: int, *names: str) -> dict:
    return rows(shape, tokens, "x", "out", *names) | {"weight": gain(shape.hidden)}


def qkv(shape: QKVShape, tokens: int) -> dict:
    bias = {"bias": Normal((shape.qkv,), 0.0, 0.1)} if shape.bias else {}
    weights = {"norm_weight": gain(shape.hidden), "qkv_weight": matrix(shape.qkv, shape.hidden)}
    counts = {"num_heads": shape.num_heads, "num_kv_heads": shape.num_kv_heads}
    return rows(shape, tokens, "x") | weights | counts | bias | {"out": Normal((tokens, shape.qkv))}


def linear(shape: LinearShape, tokens: int, *names: str, norm: bool = False) -> dict:
    weights = {"weight": matrix(shape.outputs, shape.hidden)} | ({"norm_weight": gain(shape.hidden)} if norm else {})
    return rows(shape, tokens, "x") | weights | {name: Normal((tokens, shape.outputs)) for name in ("out", *names)}


def gate_up(shape: LinearShape, tokens: int) -> dict:
    weights = {"norm_weight": gain(shape.hidden), "gate_up_weight": matrix(shape.outputs, shape.hidden)}
    return rows(shape, tokens, "x") | weights | {"out": Normal((tokens, shape.outputs // 2))}


def activation(shape: LinearShape, tokens: int) -> dict:
    return {"x": Normal((tokens, shape.outputs)), "out": Normal((tokens, shape.outputs // 2))}


def qk(shape: QKVShape, tokens: int) -> dict:
    """q and k with their norms and the rotary embedding, as Qwen3 has them; of all models alike."""
    dim = shape.head_dim
    q, k = heads(tokens, shape.num_heads, dim), heads(tokens, shape.num_kv_heads, dim)
    rotary = {"cos": Normal((tokens, dim), 0.0, 0.5), "sin": Normal((tokens, dim), 0.0, 0.5)}
    return {"q": q, "k": k, "q_norm_weight": gain(dim), "k_norm_weight": gain(dim)} | rotary


def turned(shape: QKVShape, tokens: int) -> dict:
    arguments = qk(shape, tokens)
    return arguments | {"out_q": arguments["q"], "out_k": arguments["k"]}


def attention(shape: QKVShape, tokens: int, context: int) -> dict:
    cache = Normal((tokens, shape.num_kv_heads, context, shape.head_dim))
    new = heads(tokens, shape.num_kv_heads, shape.head_dim)
    arguments = qk(shape, tokens) | {"v": new, "key_cache": cache, "value_cache": cache}
    return arguments | {"positions": Constant((tokens,), context - 1), "out": arguments["q"]}


def greedy(shape: LinearShape, tokens: int) -> dict:
    return {"logits": Normal((tokens, shape.outputs)), "out": Constant((tokens,), 0)}


class Op(NamedTuple):
    """arguments(shape, tokens), or with contexts (shape, tokens, context)."""

    shapes: tuple[Any, ...]
    arguments: Callable[..., dict]
    contexts: tuple[int | None, ...] = (None,)


OPS = {
    "rms_norm": Op(MODELS, norm),
    "add_rms_norm": Op(MODELS, lambda shape, tokens: norm(shape, tokens, "residual", "residual_out")),
    "norm_add": Op(MODELS, lambda shape, tokens: norm(shape, tokens, "residual")),
    "rms_norm_qkv": Op(MODELS, qkv),
    "rms_norm_linear": Op((*GATE_UPS, *HEADS), lambda shape, tokens: linear(shape, tokens, norm=True)),
    "rms_norm_gate_up": Op(GATE_UPS, gate_up),
    "linear": Op(PROJECTIONS, linear),
    "linear_add": Op(PROJECTIONS, lambda shape, tokens: linear(shape, tokens, "residual")),
    "silu_and_mul": Op(GATE_UPS, activation),
    "gelu_and_mul": Op(GATE_UPS, activation),
    "qk_norm_rope": Op(MODELS, turned),
    "decode_attention": Op(MODELS, attention, CONTEXTS),
    "greedy_tokens": Op(HEADS, greedy),
}


def arguments(point: Point) -> dict:
    """The arguments of a point by name: Normal, Constant, or what they are."""
    op = OPS[point.op]
    shape = next(shape for shape in op.shapes if shape.name == point.shape)
    return op.arguments(shape, point.tokens, *([] if point.context is None else [point.context]))


def bytes_of(specs: Iterable[Any], dtype: str) -> int:
    """Of those that are tensors, but for the few integers."""
    return sum(math.prod(spec.shape) * ELEMENT_BYTES[dtype] for spec in specs if isinstance(spec, Normal))


def grid(
    device: str, dtypes: Iterable[str], tokens: Iterable[int], *, ops=(), shapes=(), contexts=(), seed: int = 0
) -> list[Point]:
    """The points of some dtypes and token counts, of all ops, shapes and contexts or of those named, that fit into
    MOST_BYTES. Ops and dtypes take turns and each one's points are shuffled, always alike for a seed: however many one
    takes from the front, they cover the grid evenly."""
    shuffled = random.Random(seed)
    groups = []
    for name in ops or OPS:
        op = OPS[name]
        for dtype in dtypes:
            points = [
                Point(name, shape.name, count, dtype, context)
                for shape in op.shapes
                if not shapes or shape.name in shapes
                for count in tokens
                for context in (op.contexts if op.contexts == (None,) else contexts or op.contexts)
            ]
            points = [p for p in points if bytes_of(arguments(p).values(), dtype) <= MOST_BYTES[device]]
            shuffled.shuffle(points)
            groups.append(points)
    shuffled.shuffle(groups)
    return [point for turn in itertools.zip_longest(*groups) for point in turn if point is not None]


def numpy_tensor(spec: Normal | Constant, dtype: str):
    """An array of NumPy; bfloat16 is ml_dtypes'."""
    import numpy as np

    if isinstance(spec, Constant):
        return np.full(spec.shape, spec.value, np.int64)
    if dtype == "bf16":
        import ml_dtypes

        kind = ml_dtypes.bfloat16
    else:
        kind = DTYPES[dtype]
    block = np.random.default_rng(0).standard_normal(min(BLOCK, math.prod(spec.shape)), dtype=np.float32)
    return np.resize((spec.mean + spec.scale * block).astype(kind), spec.shape)


def torch_tensor(spec: Normal | Constant, dtype: str):
    """A tensor of torch on its current GPU."""
    import torch

    if isinstance(spec, Constant):
        return torch.full(spec.shape, spec.value, device="cuda")
    tensor = torch.empty(spec.shape, device="cuda", dtype=getattr(torch, DTYPES[dtype]))
    return tensor.normal_(spec.mean, spec.scale)


class Calls:
    """The calls of a point, call(i) with the arguments of copy i; and how large they are. device: "cpu", for a cache of
    cache_bytes, or "cuda"."""

    def __init__(self, point: Point, device: str, cache_bytes: int):
        self.point, self.device = point, device
        parameters = {parameter.name: parameter.role for parameter in signatures.OPS[point.op]}
        specs = arguments(point)
        self.by_token = [name for name, spec in specs.items() if is_tensor(spec) and parameters[name] != "weight"]
        matrices = [spec for name, spec in specs.items() if parameters[name] == "weight" and len(spec.shape) > 1]
        caches = [name for name in specs if parameters[name] == "in place"]
        walks = {name for name in specs if parameters[name] == "weight" or name in caches}
        if point.tokens >= MANY_TOKENS and not matrices and not caches:
            walks |= set(self.by_token)
        self.bytes = bytes_of(specs.values(), point.dtype)
        self.flops = 2 * point.tokens * sum(math.prod(spec.shape) for spec in matrices)
        walked = bytes_of((specs[name] for name in walks), point.dtype)
        least, cached = (2, CUDA_CACHE_BYTES) if device == "cuda" else (1, cache_bytes)
        self.copies = copies_needed(walked, cached, least=least, most=64)
        make = torch_tensor if device == "cuda" else numpy_tensor

        def made(names) -> dict:
            return {name: make(spec, point.dtype) if is_tensor(spec := specs[name]) else spec for name in names}

        kept = made(name for name in specs if name not in walks)
        kept |= {name: True for name in PROMISES if name in parameters}
        kept |= {"weight_layout": "out_in"} if "weight_layout" in parameters else {}
        self.arguments = [kept | made(walks) for _ in range(self.copies)]
        self.function = getattr(_C, point.op)

    def __call__(self, i: int = 0, **options) -> None:
        """options: such as kernel, beside the arguments."""
        self.function(**self.arguments[i % self.copies], **options)

    def part(self, tokens: int, **options) -> None:
        """A call of the first tokens alone."""
        first = self.arguments[0]
        self.function(**first | {name: first[name][:tokens] for name in self.by_token}, **options)


def is_tensor(spec: Any) -> bool:
    return isinstance(spec, (Normal, Constant))
