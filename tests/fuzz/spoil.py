"""What the contract refuses, planted into a drawing: one thing, or nothing where the shape has no room for it."""

import math

from fuzz.drawing import Drawing, Refused, parameters
from fuzz.layouts import Spec, c_strides


def stepping(spec: Spec, d: Drawing) -> Spec:
    """The same shape, each row over every second element."""
    strides = tuple(2 * stride for stride in c_strides(spec.shape))
    return d.at.fill(d.at.place(spec.shape, spec.dtype, strides), "normal")


def norm(d: Drawing, shape):
    """One thing that the contract refuses; nothing where the shape has no room for it."""
    hidden, tokens = shape[-1], math.prod(shape[:-1])
    what = d.rng.choice(("x steps", "weight steps", "weight is long", "out overlaps", "out shares"))
    if what == "weight is long":
        d.tensors["weight"] = d.vector(hidden + 1)
        d.refused = Refused(ValueError, rf"weight has {hidden + 1} elements, expected {hidden} ")
    elif hidden > 1 and tokens and what == "x steps":
        d.tensors["x"] = stepping(d.tensors["x"], d)
        d.tensors.pop("out", None)
        d.tensors.pop("residual_out", None)
        d.refused = Refused(ValueError, r"x must be contiguous in its last dimension")
    elif hidden > 1 and what == "weight steps":
        d.tensors["weight"] = stepping(d.tensors["weight"], d)
        d.refused = Refused(ValueError, r"weight must be contiguous in its last dimension")
    elif hidden > 1 and tokens and "out" in parameters(d.op) and what == "out overlaps":
        wide = d.at.place((*shape[:-1], hidden + 1), d.dtype, c_strides((*shape[:-1], hidden + 1)))
        d.tensors["x"] = d.at.fill(wide._replace(shape=shape), "normal")
        d.tensors["out"] = wide._replace(shape=shape, offset=wide.offset + 1)
        d.tensors.pop("residual_out", None)
        d.refused = Refused(ValueError, r"out overlaps x")
    elif tokens > 1 and "out" in parameters(d.op) and what == "out shares":
        strides = tuple(0 if size > 1 else 1 for size in shape[:-1]) + (1,)
        d.tensors["out"] = d.at.place(shape, d.dtype, strides)
        d.tensors.pop("residual_out", None)
        d.refused = Refused(ValueError, r"out has elements that share memory")


def act_and_mul(d: Drawing, lead, columns: int):
    tokens = math.prod(lead)
    what = d.rng.choice(("x steps", "odd", "out overlaps", "out is the gate", "out is wide"))
    if what == "odd":
        d.tensors["x"] = d.at.fill(d.at.rows((*lead, 2 * columns + 1), d.dtype, distinct=False), "normal")
        d.refused = Refused(ValueError, r"x has shape .*, expected an even last dimension")
    elif what == "out is wide":
        d.tensors["out"] = d.at.rows((*lead, columns + 1), d.dtype, distinct=True)
        d.refused = Refused(ValueError, r"out has shape .*, expected ")
    elif tokens and what == "x steps":
        d.tensors["x"] = stepping(d.tensors["x"], d)
        d.refused = Refused(ValueError, r"x must be contiguous in its last dimension")
    elif tokens and what.startswith("out"):
        shape = (*lead, 2 * columns + 1)
        wide = d.at.place(shape, d.dtype, c_strides(shape))
        d.tensors["x"] = d.at.fill(wide._replace(shape=(*lead, 2 * columns)), "normal")
        offset = wide.offset + (columns + 1 if what == "out overlaps" else 0)
        d.tensors["out"] = wide._replace(shape=(*lead, columns), offset=offset)
        if what == "out is the gate" or columns > 1:
            d.refused = Refused(ValueError, r"out overlaps x")


def linear(d: Drawing, shape, outputs: int):
    tokens, what = (
        math.prod(shape[:-1]),
        d.rng.choice(("x steps", "residual is wide", "out is residual in part", "bias is long")),
    )
    if what == "bias is long":
        d.tensors["bias"] = d.vector(outputs + 1)
        d.refused = Refused(ValueError, rf"bias has {outputs + 1} elements, expected {outputs} ")
    elif shape[-1] > 1 and tokens and what == "x steps":
        d.tensors["x"] = stepping(d.tensors["x"], d)
        d.refused = Refused(ValueError, r"x must be contiguous in its last dimension")
    elif "residual" in d.tensors and what == "residual is wide":
        wide = (*shape[:-1], outputs + 1)
        d.tensors["residual"] = d.at.fill(d.at.place(wide, d.dtype, c_strides(wide)), "normal")
        d.tensors.pop("out", None)
        d.refused = Refused(ValueError, r"residual has shape .*, expected")
    elif "residual" in d.tensors and tokens and outputs > 1 and what == "out is residual in part":
        wide = d.at.place((*shape[:-1], outputs + 1), d.dtype, c_strides((*shape[:-1], outputs + 1)))
        d.tensors["residual"] = d.at.fill(wide, "normal")._replace(shape=(*shape[:-1], outputs))
        d.tensors["out"] = wide._replace(shape=(*shape[:-1], outputs), offset=wide.offset + 1)
        d.refused = Refused(ValueError, r"out overlaps residual in part")


def projection(d: Drawing, shape, tokens: int, qkv: int, columns: int):
    hidden = shape[-1]
    heads = ("heads",) if "num_heads" in d.options else ()
    what = d.rng.choice(("x steps", "norm_weight is long", *heads, "out overlaps", "out is x", "bias is long"))
    if what == "norm_weight is long":
        d.tensors["norm_weight"] = d.vector(hidden + 1)
        of_layer = "|qkv_weight" if d.op == "FusedRMSNormQKV" else ""  # to it norm_weight says what is hidden
        d.refused = Refused(ValueError, rf"norm_weight has {hidden + 1} elements, expected {hidden} {of_layer}")
    elif what == "heads":
        d.options["num_heads"] = d.rng.choice((0, -1, -(2**40), qkv + 1))
        d.refused = Refused(ValueError, r"num_heads")
    elif what == "bias is long":
        d.tensors["bias"] = d.vector(qkv + 1)
        d.refused = Refused(ValueError, rf"bias has {qkv + 1} elements, expected {qkv} ")
    elif hidden > 1 and tokens and what == "x steps":
        d.tensors["x"] = stepping(d.tensors["x"], d)
        d.refused = Refused(ValueError, r"x must be contiguous in its last dimension")
    elif tokens and what.startswith("out"):
        width = max(hidden, columns) + 1
        wide = d.at.place((*shape[:-1], width), d.dtype, c_strides((*shape[:-1], width)))
        d.tensors["x"] = d.at.fill(wide._replace(shape=shape), "normal")
        offset = wide.offset + (hidden - 1 if what == "out overlaps" and hidden - 1 + columns <= width else 0)
        d.tensors["out"] = wide._replace(shape=(*shape[:-1], columns), offset=offset)
        d.tensors.pop("residual_out", None)
        d.refused = Refused(ValueError, r"out overlaps x")
