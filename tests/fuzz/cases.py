"""A call of each op, drawn from a seed and an index: arguments, where its tensors lie, and whether it must be refused.

OPS names every op; tests/test_fuzz.py holds it to the registry and to what the package exports, and holds the draws to
the ops' signatures. A new op needs a function here and one in expect.py.
"""

import functools
import math
import random
from collections.abc import Callable
from typing import NamedTuple

from fuzz import expect, spoil
from fuzz.drawing import Case, Drawing, Refused, members
from fuzz.layouts import Spec

# ---- the norms ---------------------------------------------------------------------------------------------------------


OUTPUTS = {"x": "out", "residual": "residual_out"}


def norm(d: Drawing, inputs=("x",), outputs=OUTPUTS):
    """rms_norm and its kin: `inputs` are of x's shape, and so is the output that some of them have."""
    rng = d.rng
    hidden = d.hidden()
    lead = d.lead(d.most_elements // hidden)
    shape = (*lead, hidden)
    in_place = d.op.startswith("fused")
    given = {} if in_place else {argument: rng.random() for argument in inputs if argument in outputs}
    beside = [outputs[argument] for argument in inputs if 0.3 <= given.get(argument, 0) < 0.6]
    if rng.random() < 0.2:  # everything in one buffer
        names = [*inputs, *beside]
        specs = d.at.beside(lead, [hidden] * len(names), d.dtype)
        d.tensors |= dict(zip(names, specs))
    else:
        for argument in inputs:
            d.tensors[argument] = d.at.rows(shape, d.dtype, distinct=in_place)
        for argument in beside:
            d.tensors[argument] = d.at.rows(shape, d.dtype, distinct=True)
    free = [argument for argument in inputs if is_distinct(d.tensors[argument])]
    rng.shuffle(free)
    for argument in inputs:  # exactly an input, either one
        if given.get(argument, 0) >= 0.6 and free:
            d.tensors[outputs[argument]] = d.tensors[free.pop()]
    if len(inputs) == 2 and len(d.tensors) == 2 and not in_place and rng.random() < 0.05:
        d.tensors["residual"] = d.tensors["x"]
    for argument in inputs:
        d.at.fill(d.tensors[argument])
    if d.spoil or rng.random() >= 0.1:
        d.tensors["weight"] = d.vector(hidden)
    else:
        d.give(weight=None)
    d.numbers()
    if d.spoil:
        spoil.norm(d, shape)
    return dict(zip(("out", "residual_out"), inputs)) if in_place else None


def is_distinct(spec: Spec) -> bool:
    """No two elements share memory; by the strides alone, sorted."""
    reach = 0
    for stride, size in sorted((abs(stride), size) for stride, size in zip(spec.strides, spec.shape) if size > 1):
        if stride <= reach:
            return False
        reach += (size - 1) * stride
    return True


# ---- the projection --------------------------------------------------------------------------------------------------


def matrix(d: Drawing, outputs: int, hidden: int, in_out: bool, dtype: str) -> Spec:
    """A weight, [outputs, hidden] or with in_out [hidden, outputs], whichever of the two is contiguous."""
    rng = d.rng
    by_column = rng.random() < 0.3 and not d.tidy
    outer, inner = (hidden, outputs) if by_column else (outputs, hidden)
    step = rng.choice((1, 1, 1, 1, 1, 2))
    row = inner * step + rng.choice((0, 0, 0, 1, 3, 8))
    if d.tidy:
        row, step = inner, 1
    elif rng.random() < 0.04:
        row = 0
    elif rng.random() < 0.08:
        row = -row
    spec = d.at.place((outer, inner), dtype, (row, step))
    if by_column != in_out:
        spec = spec._replace(shape=spec.shape[::-1], strides=spec.strides[::-1])
    return d.at.fill(spec, "small" if rng.random() < 0.7 else d.parameter_kind())


def weights(d: Drawing, sizes, hidden: int):
    """The weight and weight_layout: one matrix, one for each size, or as many slices of one."""
    rng, in_out, kind = d.rng, d.chance(0.4) and not d.tidy, d.rng.random()
    name = {1: "weight", 2: "gate_up_weight", 3: "qkv_weight"}[len(sizes)]
    if kind < 0.5 or len(sizes) == 1:
        kind = 0.0
        weight = matrix(d, sum(sizes), hidden, in_out, d.parameter_dtype())
    elif kind < 0.8:
        weight = tuple(matrix(d, size, hidden, in_out, d.parameter_dtype()) for size in sizes)
        if len(sizes) == 2:  # which lie alike, and are of one dtype
            first = weight[0]
            weight = (first, d.at.fill(d.at.place(first.shape, first.dtype, first.strides), "small"))
    else:
        packed = matrix(d, sum(sizes), hidden, in_out, d.parameter_dtype())
        dim = 1 if in_out else 0
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        weight = tuple(
            packed._replace(
                shape=(hidden, size) if in_out else (size, hidden),
                offset=packed.offset + start * packed.strides[dim],
            )
            for start, size in zip(starts, sizes)
        )
    members = weight if kind >= 0.5 else (weight,)
    d.tensors[name] = weight
    if all(member.shape[0] == member.shape[1] for member in members):
        if d.spoil and hidden > 1:
            d.refused = Refused(ValueError, r"weight_layout")
            return
        d.give(weight_layout="in_out" if in_out else "out_in")
    elif rng.random() < 0.3:
        d.give(weight_layout="in_out" if in_out else "out_in")


def projection(d: Drawing):
    """rms_norm_linear, rms_norm_gate_up, rms_norm_qkv, and the layer object."""
    rng, one, gated = d.rng, d.op == "rms_norm_linear", d.op == "rms_norm_gate_up"
    hidden = d.hidden()
    heads, kv_heads, head_dim = d.heads(hidden)
    total = heads + 2 * kv_heads
    products, is_small = d.most_products, hidden * hidden <= d.most_weights
    if rng.random() < 0.1 and hidden % total == 0 and hidden * hidden <= products and not d.model_like:
        head_dim = hidden // total  # a square weight
    elif rng.random() < 0.05 and is_small:
        heads = kv_heads = 1  # three square ones
        total, head_dim = 3, hidden
    sizes = (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim)
    if d.model_like and (one or gated):
        sizes = (d.outputs(hidden),) if one else (d.outputs(2 * hidden),) * 2
    elif one:
        sizes = (hidden if rng.random() < 0.05 and is_small else sum(sizes) + rng.randint(0, 7),)
    elif gated:
        sizes = (sizes[0] + rng.randint(0, 3),) * 2
        if rng.random() < 0.05 and is_small:
            sizes = (hidden, hidden)
    qkv = sum(sizes)
    columns = sizes[0] if gated else qkv  # of out
    lead = d.lead(max(1, min(products // (hidden * qkv), d.most_elements // max(hidden, qkv))))
    shape, tokens = (*lead, hidden), math.prod(lead)
    residual, out = rng.random() < 0.3, rng.random() < 0.5
    residual_out = residual and rng.random() < 0.5
    if rng.random() < 0.15:
        names = ["x", *["residual"] * residual, *["out"] * out, *["residual_out"] * residual_out]
        widths = [columns if name == "out" else hidden for name in names]
        d.tensors |= dict(zip(names, d.at.beside(lead, widths, d.dtype)))
    else:
        d.tensors["x"] = d.at.rows(shape, d.dtype, distinct=False)
        if residual:
            d.tensors["residual"] = d.at.rows(shape, d.dtype, distinct=False)
        if out:
            d.tensors["out"] = d.at.rows((*lead, columns), d.dtype, distinct=True)
        if residual_out:
            d.tensors["residual_out"] = d.at.rows(shape, d.dtype, distinct=True)
    d.at.fill(d.tensors["x"])
    if residual:
        d.at.fill(d.tensors["residual"])
    d.tensors["norm_weight"] = d.vector(hidden)
    weights(d, sizes, hidden)
    if rng.random() < 0.4:
        if one or rng.random() < 0.6:
            d.tensors["bias"] = d.vector(qkv)
        else:
            d.tensors["bias"] = tuple(d.vector(size) for size in sizes)
    if gated and rng.random() < 0.7:
        d.give(activation=rng.choice(("silu", "gelu_tanh", "gelu")))
    if not one and not gated:
        d.options |= {"num_heads": heads, "num_kv_heads": kv_heads}
        if rng.random() < 0.2:
            d.give(head_dim=head_dim)
    d.numbers()
    d.layer_options()
    if (
        not one
        and not gated
        and len({spec.dtype for spec in members(d.tensors["qkv_weight"])}) == 1
        and rng.random() < 0.3
    ):
        d.give(prepack=True)
    if d.spoil and not d.refused:
        spoil.projection(d, shape, tokens, qkv, columns)


# ---- the activations -------------------------------------------------------------------------------------------------


def act_and_mul(d: Drawing):
    """silu_and_mul and gelu_and_mul."""
    rng, columns = d.rng, d.hidden()
    lead = d.lead(d.most_elements // (2 * columns))
    out = rng.random() < 0.5
    if rng.random() < 0.2:
        d.tensors |= dict(zip(("x", "out")[: 1 + out], d.at.beside(lead, [2 * columns, columns][: 1 + out], d.dtype)))
    else:
        d.tensors["x"] = d.at.rows((*lead, 2 * columns), d.dtype, distinct=False)
        if out:
            d.tensors["out"] = d.at.rows((*lead, columns), d.dtype, distinct=True)
    d.at.fill(d.tensors["x"])
    if rng.random() < 0.7:
        d.give(approximate=rng.choice(("tanh", "none")))
    d.numbers()
    if d.spoil:
        spoil.act_and_mul(d, lead, columns)


def linear(d: Drawing):
    """linear and linear_add."""
    rng, adds = d.rng, d.op == "linear_add"
    hidden = d.hidden()
    outputs = d.outputs(hidden)
    lead = d.lead(max(1, min(d.most_products // (hidden * outputs), d.most_elements // max(hidden, outputs))))
    shape = (*lead, hidden)
    given = rng.random()
    in_place, out = adds and given < 0.3, 0.3 <= given < 0.7
    names = ["x", *["residual"] * adds, *["out"] * out]
    if rng.random() < 0.15:
        d.tensors |= dict(zip(names, d.at.beside(lead, [hidden, *[outputs] * (len(names) - 1)], d.dtype)))
    else:
        d.tensors["x"] = d.at.rows(shape, d.dtype, distinct=False)
        if adds:
            d.tensors["residual"] = d.at.rows((*lead, outputs), d.dtype, distinct=in_place)
        if out:
            d.tensors["out"] = d.at.rows((*lead, outputs), d.dtype, distinct=True)
    if in_place:
        d.tensors["out"] = d.tensors["residual"]
    for name in ("x", "residual") if adds else ("x",):
        d.at.fill(d.tensors[name])
    weights(d, (outputs,), hidden)
    if rng.random() < 0.4:
        d.tensors["bias"] = d.vector(outputs)
    d.numbers()
    if rng.random() < 0.5:
        d.give(scale=rng.choice((1.0, 0.22, 0.22, -1.5, 0.0, 1000)))
    d.layer_options()
    if d.spoil and not d.refused:
        spoil.linear(d, shape, outputs)


# ---- the table --------------------------------------------------------------------------------------------------------


class Op(NamedTuple):
    draw: Callable[[Drawing], dict | None]  # fills a drawing; gives back `outputs` where they are no arguments
    expect: Callable  # (inputs, options, dtype, wild) -> Expected, for its first output


OPS = {
    "rms_norm": Op(norm, expect.norm),
    "add_rms_norm": Op(functools.partial(norm, inputs=("x", "residual")), expect.norm),
    "norm_add": Op(functools.partial(norm, inputs=("x", "residual"), outputs={"x": "out"}), expect.norm_add),
    "fused_add_rms_norm": Op(functools.partial(norm, inputs=("x", "residual")), expect.norm),
    "rms_norm_linear": Op(projection, expect.projection),
    "rms_norm_gate_up": Op(projection, expect.gate_up),
    "rms_norm_qkv": Op(projection, expect.projection),
    "linear": Op(linear, expect.linear),
    "linear_add": Op(linear, expect.linear),
    "FusedRMSNormQKV": Op(projection, expect.projection),
    "silu_and_mul": Op(act_and_mul, functools.partial(expect.act_and_mul, kind="silu")),
    "gelu_and_mul": Op(act_and_mul, expect.act_and_mul),
}
# Ops whose tests draw cases of their own: of caches, integers, and results that depend on both.
DRAWN_ELSEWHERE = frozenset(  # by test_<op>.py, attention.py
    ("decode_attention", "qk_norm_rope", "greedy_tokens")
)
# What the package exports besides: no op, nothing to draw.
NO_OPS = frozenset(("DeviceArray", "Kernel", "QKVShard", "Ran", "empty", "get_num_threads", "kernels", "last_kernel",
                    "set_num_threads", "shard_qkv", "to_device"))  # fmt: skip


def draw(seed: int, index: int, device: str = "cpu", op: str | None = None, allowed=None) -> Case:
    """The case of a seed and an index: ops take turns. `allowed`: the first from there on for which this holds."""
    op = op or list(OPS)[index % len(OPS)]
    while True:
        d = Drawing(op, random.Random((seed << 40) + index), device)
        case = d.case(f"{seed}:{index}", OPS[op].draw(d))
        if allowed is None or allowed(case):
            return case
        index += 1 << 36
