"""Tensor parallelism: what one rank of several computes. The ranks and what goes between them are the caller's own."""

import operator
import sys
from typing import Any, Literal, NamedTuple, SupportsIndex

_FRAMEWORKS = ("torch", "numpy", "cupy", "jax", "jaxlib")


class QKVShard(NamedTuple):
    """One rank's part of a q, k, v projection, under the names that `rms_norm_qkv` and `FusedRMSNormQKV` give it:
    `rms_norm_qkv(x, norm_weight, **shard._asdict())`."""

    qkv_weight: Any
    num_heads: int
    num_kv_heads: int
    bias: Any
    weight_layout: Literal["out_in", "in_out"]


def shard_qkv(
    weight: Any,
    bias: Any = None,
    *,
    num_heads: SupportsIndex,
    num_kv_heads: SupportsIndex,
    rank: SupportsIndex,
    world_size: SupportsIndex,
    weight_layout: Literal["out_in", "in_out"] | None = None,
) -> QKVShard:
    """The column-parallel part of a q, k, v projection that rank `rank` of `world_size` computes.

    Rank r takes the query heads [r n, (r + 1) n) of n = num_heads / world_size, and the key and value heads that these
    attend to: num_kv_heads / world_size of them, or, where there are fewer than ranks, one that
    world_size / num_kv_heads ranks have in common.

    weight: [qkv, hidden] with qkv = (num_heads + 2 num_kv_heads) head_dim, or with weight_layout="in_out" its transpose
    [hidden, qkv]; or a tuple (wq, wk, wv) of such matrices. Where these are all square, weight_layout has to be given:
    "out_in" for a Linear's .weight, "in_out" for its .t(). bias: [qkv], a tuple of three, or None. Arrays of torch,
    NumPy, CuPy or JAX, tracers included, of any dtype and on any device.

    The parts of a tuple are slices: views, where the framework has them. Those of a packed weight are concatenated into
    a new array of the shard's size, so that the whole weight may go; a single rank gets back what it gave.

    ValueError: num_heads is no multiple of world_size or of num_kv_heads; num_kv_heads is neither a multiple nor a
    divisor of world_size; no such rank; a shape that fits no head_dim; a layout that is open. TypeError: no array, or a
    count that is no integer.
    """
    num_heads = _count("num_heads", num_heads, 1)
    num_kv_heads = _count("num_kv_heads", num_kv_heads, 1)
    world_size = _count("world_size", world_size, 1)
    rank = _count("rank", rank, 0)
    if weight_layout not in (None, "out_in", "in_out"):
        raise ValueError(f'shard_qkv: weight_layout is {weight_layout!r}, expected "out_in" or "in_out"')
    if rank >= world_size:
        raise ValueError(f"shard_qkv: rank is {rank}, expected less than world_size, which is {world_size}")
    if num_heads % world_size:
        raise ValueError(
            f"shard_qkv: num_heads is {num_heads}, expected a multiple of world_size, which is {world_size}"
        )
    if num_kv_heads % world_size and world_size % num_kv_heads:
        raise ValueError(
            f"shard_qkv: num_kv_heads is {num_kv_heads}, expected a multiple of world_size, which is {world_size}, or "
            "a divisor of it (each then goes to several ranks)"
        )
    if num_heads % num_kv_heads:
        swapped = "; are the two swapped?" if num_kv_heads % num_heads == 0 else ""
        raise ValueError(
            f"shard_qkv: num_heads is {num_heads}, expected a multiple of num_kv_heads, which is {num_kv_heads}, "
            f"because each key head of a whole model serves equally many query heads{swapped}"
        )
    heads, kv_heads = num_heads // world_size, max(1, num_kv_heads // world_size)
    first_kv = rank * num_kv_heads // world_size
    totals = (num_heads, num_kv_heads, num_kv_heads)
    wanted = ((rank * heads, (rank + 1) * heads), *[(first_kv, first_kv + kv_heads)] * 2)
    axis = 1 if weight_layout == "in_out" else 0
    head_dim = _head_dim("weight", weight, totals, ndim=2, axis=axis)
    if weight_layout is None and all(len(set(member.shape)) == 1 for member in _members(weight)):
        raise ValueError(
            f"shard_qkv: weight is square (shape {tuple(_members(weight)[0].shape)}), so it could be [qkv, hidden] or "
            '[hidden, qkv]; pass weight_layout="out_in" for a Linear\'s .weight, "in_out" for its .t()'
        )
    if bias is not None and (bias_dim := _head_dim("bias", bias, totals, ndim=1, axis=0)) != head_dim:
        raise ValueError(f"shard_qkv: bias has {bias_dim} elements per head, expected {head_dim} (as weight has)")
    return QKVShard(
        _take(weight, totals, wanted, head_dim, axis),
        heads,
        kv_heads,
        None if bias is None else _take(bias, totals, wanted, head_dim, 0),
        weight_layout or "out_in",
    )


def _count(name, value, least):
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"shard_qkv: {name} must be an integer, got {type(value).__name__}") from None
    if number < least:
        raise ValueError(f"shard_qkv: {name} is {number}, expected at least {least}")
    return number


def _members(given):
    return given if isinstance(given, (tuple, list)) else (given,)


def _head_dim(name, given, totals, ndim, axis):
    """Outputs per head, of a packed array or of all three members."""
    is_tuple, members = isinstance(given, (tuple, list)), _members(given)
    if is_tuple and len(given) != 3:
        raise ValueError(f"shard_qkv: {name} has {len(given)} members, expected one packed array or three (q, k, v)")
    counts = totals if is_tuple else (sum(totals),)
    names = [f"{name}[{i}]" for i in range(3)] if is_tuple else [name]
    head_dim = None
    for each, member, heads in zip(names, members, counts):
        _namespace(each, member)
        shape = tuple(member.shape)
        if len(shape) != ndim:
            raise ValueError(f"shard_qkv: {each} has shape {shape}, expected {ndim} dimension{'s' * (ndim > 1)}")
        outputs = shape[axis]
        if outputs == 0 or outputs % heads or head_dim not in (None, outputs // heads):
            expected = f"a multiple of {heads}" if head_dim is None else f"{heads * head_dim}"
            raise ValueError(
                f"shard_qkv: {each} has {outputs} outputs (shape {shape}), expected {expected}: {heads} heads of "
                + ("one size" if head_dim is None else f"{head_dim}, as {names[0]} has them")
                + (', or pass weight_layout="in_out" if it is [hidden, qkv]' if ndim == 2 and axis == 0 else "")
            )
        head_dim = outputs // heads
    return head_dim


def _take(given, totals, wanted, head_dim, axis):
    """The heads [first, last) of q, k and v each, out of a packed array or of three."""
    if isinstance(given, (tuple, list)):
        starts, sources = (0, 0, 0), given
    else:
        if wanted == tuple((0, total) for total in totals):
            return given
        starts, sources = (0, totals[0], totals[0] + totals[1]), (given,) * 3
    before = (slice(None),) * axis
    parts = [
        source[(*before, slice((start + first) * head_dim, (start + last) * head_dim))]
        for source, start, (first, last) in zip(sources, starts, wanted)
    ]
    return tuple(parts) if sources is given else _namespace("weight", given).concatenate(parts, axis=axis)


def _namespace(name, array):
    """The module whose functions work on the array, or on its base class."""
    for base in type(array).__mro__:
        root = base.__module__.partition(".")[0]
        if root in _FRAMEWORKS and hasattr(array, "shape"):
            return sys.modules["jax.numpy"] if root in ("jax", "jaxlib") else sys.modules[root]
    raise TypeError(
        f"shard_qkv: {name} must be an array of torch, NumPy, CuPy or JAX, got {type(array).__name__}; a DeviceArray "
        "is made of the shard of a NumPy array"
    )
