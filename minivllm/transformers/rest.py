"""The rest of a decoder layer, behind norm and q, k, v, on ops that join the residual to a product:

    out   = decode_attention(q, k, v, keys, values)          a decode step: norms of heads, rotary embedding, cache
    total = linear_add(out, o_proj, total)
    h     = rms_norm_gate_up(total, (gate_proj, up_proj))
    total = linear_add(h, down_proj, total)                  in place

where norms stand behind attention and MLP as well, with linear and norm_add in place of linear_add. Of a model that
shard has cut, the products are parts of sums over ranks; the next norm joins the residual then:

    h, total = rms_norm_gate_up(all_reduce(linear(out, o_proj)), (gate_proj, up_proj), residual=total)
    hidden   = all_reduce(linear(h, down_proj))              and total stays pending for the next layer

The modules that this skips are looked at in every call, as layer.py does with its own. Where one of them is not what it
is taken for, or has a hook, the layer calls all of them as transformers does.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.activations import GELUTanh, SiLUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .. import _C as ops
from .code import Family, Rounding, is_replaced
from .room import Room
from .sharding import SummedLinear

# By class: its forward, and what the ops call it.
ACTIVATIONS: dict[type, tuple[object, str]] = {
    SiLUActivation: (SiLUActivation.forward, "silu"),
    torch.nn.SiLU: (torch.nn.SiLU.forward, "silu"),
    GELUTanh: (GELUTanh.forward, "gelu_tanh"),
}
LINEARS = (torch.nn.Linear, SummedLinear)  # what o_proj and down_proj may be
SILU, ATTENTION = F.silu, F.scaled_dot_product_attention


class Rest:
    """o_proj and the MLP of a layer as `apply` found them. Every layer asks in every call whether they are so still,
    and reads what torch's modules would look up."""

    def __init__(self, layer: Any, family: Family) -> None:
        self.family, self.layer, self.mlp, self.o_proj = family, layer, layer.mlp, layer.self_attn.o_proj
        self.norms = tuple(getattr(layer, name) for name in family.traits.norms[1:])
        self.activation: Any = getattr(self.mlp, family.traits.activation, None)
        linears = (*family.traits.gate_up, "down_proj")
        self.linears: tuple[Any, ...] = tuple(getattr(self.mlp, name, None) for name in linears)
        self.parts = tuple(self.mlp._modules.values())
        self.modules = (self.mlp, *self.parts, self.o_proj)
        self.hooks = [hooks for module in self.modules for hooks in (module._forward_pre_hooks, module._forward_hooks)]

    def is_usable(self, dtype: torch.dtype) -> bool:
        """Whether the ops may stand in for these modules in a call with hidden states of this dtype."""
        mlp, family = self.mlp, self.family
        kind: Any = type(self.activation)
        if type(mlp) is not family.mlp or family.mlp.forward is not family.mlp_forward or F.silu is not SILU:
            return False
        if kind not in ACTIVATIONS or ACTIVATIONS[kind][0] is not kind.forward or any(self.hooks):
            return False
        if tuple(mlp._modules.values()) != self.parts:
            return False
        for module in self.modules:
            if "forward" in module.__dict__ and is_replaced(module):
                return False
        ends = (self.o_proj, self.linears[-1])
        for linear in (self.o_proj, *self.linears):
            if type(linear) is not torch.nn.Linear and not (type(linear) is SummedLinear and linear in ends):
                return False
            for parameter in linear._parameters.values():
                if parameter is not None and (type(parameter) is not torch.nn.Parameter or parameter.dtype != dtype):
                    return False
            if "weight" not in linear._parameters:
                return False
        gate, up = self.linears[0], self.linears[-2]  # the same one where the two are packed
        return gate.weight.stride() == up.weight.stride() and (gate.bias is None) == (up.bias is None)

    def scaled(self, x: Tensor) -> Tensor:
        """What joins the residual, of what attention or MLP gave."""
        multiplier = self.family.multiplier(self.layer)
        return x if multiplier == 1.0 else x * multiplier


def is_known_attention(attention: Any, family: Family) -> bool:
    """Whether the attention of transformers is the one that decode_attention computes."""
    implementation = attention.config._attn_implementation
    if implementation == "sdpa":
        return ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward and F.scaled_dot_product_attention is ATTENTION
    eager = family.module.eager_attention_forward
    return implementation == "eager" and getattr(eager, "__globals__", None) is vars(family.module)


def attend(
    attention: Any,
    family: Family,
    head_norms: tuple[Any, ...],
    room: Room,
    qkv: tuple[Tensor, Tensor, Tensor],
    embeddings: tuple[Tensor, Tensor] | tuple[None, None],
    rounding: Any,
    **options: Any,
) -> Tensor:
    """[batch, 1, heads * head_dim]: the attention of a decode step, from q, k and v as they come out of the projection,
    [batch, 1, heads, head_dim]. The one of transformers for SDPA knows no soft cap."""
    q, k, v = qkv
    places: tuple[Any, ...] = room[:3]
    # A Decoder vouches for its rows: its steps begin with torch's kernels, which wait for all of the step before.
    options |= {"static_rows": room.is_decoders} | family.head_options(head_norms, rounding)
    if family.traits.soft_cap and attention.config._attn_implementation == "eager":
        options["soft_cap"] = family.soft_cap(attention)
    out: Tensor = ops.decode_attention(
        q, k, v, *places, starts=cast(Any, room.starts), cos=embeddings[0], sin=embeddings[1],
        scale=attention.scaling, window=room.window, **options)  # fmt: skip
    return out.view(q.shape[0], 1, -1)


def finish(rest: Rest, out: Tensor, total: Tensor, rounding: Rounding, **options: Any) -> tuple[Tensor, Tensor | None]:
    """o_proj, the norm behind it and the MLP: (the layer's hidden states, None), or where these are a sum over ranks
    (the MLP's output, the residual that belongs to it). total stays as it is."""
    options["weight_layout"] = "out_in"
    family, norms, down = rest.family, rest.norms, rest.linears[-1]
    if len(norms) > 1:
        after, before, last = norms
        out = project(rest.o_proj, out, rounding, **options)
        total = ops.norm_add(out, after.weight, total, **family.norm_options(after, rounding))
        out = project(down, gated(rest, before, total, rounding, **options), rounding, **options)
        return ops.norm_add(out, last.weight, total, out=total, **family.norm_options(last, rounding)), None
    if SummedLinear in (type(rest.o_proj), type(down)):
        out = rest.scaled(project(rest.o_proj, out, rounding, **options))
        h, total = gated(rest, norms[0], out, rounding, residual=total, **options)
        return rest.scaled(project(down, h, rounding, **options)), total
    scaled = options | {"rounding": rounding, "scale": family.multiplier(rest.layer)}
    total = ops.linear_add(out, rest.o_proj.weight, total, bias=rest.o_proj.bias, **scaled)
    h = gated(rest, norms[0], total, rounding, **options)
    return ops.linear_add(h, down.weight, total, bias=down.bias, out=total, **scaled), None


def project(linear: Any, x: Tensor, rounding: Rounding, **options: Any) -> Tensor:
    """What o_proj or down_proj makes of x, of all ranks where it is one of several."""
    y: Tensor = ops.linear(x, linear.weight, bias=linear.bias, rounding=rounding, **options)
    return linear.sum_over_ranks(y) if type(linear) is SummedLinear else y


def gated(rest: Rest, norm: Any, x: Tensor, rounding: Rounding, **options: Any) -> Any:
    """What down_proj takes: the norm, gate and up, and the activation of the gate times up. With a residual, which x
    joins before the norm, the sum too."""
    linears, (_, activation) = rest.linears[:-1], ACTIVATIONS[type(rest.activation)]
    options |= rest.family.norm_options(norm, rounding)
    weights, biases = tuple(linear.weight for linear in linears), tuple(linear.bias for linear in linears)
    weight: Any = weights if len(weights) > 1 else weights[0]
    bias: Any = None if biases[0] is None else biases if len(biases) > 1 else biases[0]
    return ops.rms_norm_gate_up(x, norm.weight, weight, bias=bias, activation=cast(Any, activation), **options)
