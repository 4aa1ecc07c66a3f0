"""The rest of a decoder layer for few tokens, behind norm and q, k, v, on ops that join the residual to a product:

    out   = decode_attention(q, k, v, keys, values)          a Decoder's step: norms of heads, rotary embedding, cache
    total = linear_add(out, o_proj, total)
    h     = rms_norm_gate_up(total, (gate_proj, up_proj))    of more than PAIR_TOKENS the norm and product for each of
                                                             the two, then silu_and_mul
    total = linear_add(h, down_proj, total)                  in place

The modules that this skips are looked at in every call, as layer.py does with its own. Where one of them is not what it
is taken for, or has a hook, the layer calls all of them as transformers does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.activations import SiLUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .. import _C as ops
from .cache import Rows
from .code import Family, is_replaced

PAIR_TOKENS = 8  # in one call up to so many: with more of them two products, each on wgmma, are faster on a Hopper GPU
LINEARS = ("gate_proj", "up_proj", "down_proj")
ACTIVATIONS: dict[type, object] = {kind: kind.forward for kind in (SiLUActivation, torch.nn.SiLU)}
SILU, ATTENTION = F.silu, F.scaled_dot_product_attention


class Few:
    """o_proj and the MLP of a layer as `apply` found them. Every layer asks in every call whether they are so still,
    and reads what torch's modules would look up."""

    def __init__(self, layer: Any, family: Family) -> None:
        self.family, self.mlp, self.o_proj = family, layer.mlp, layer.self_attn.o_proj
        self.activation: Any = getattr(self.mlp, "act_fn", None)
        self.linears: tuple[Any, ...] = tuple(getattr(self.mlp, name, None) for name in LINEARS)
        self.parts = tuple(self.mlp._modules.values())
        self.modules = (self.mlp, *self.parts, self.o_proj)
        self.hooks = [hooks for module in self.modules for hooks in (module._forward_pre_hooks, module._forward_hooks)]

    def is_usable(self, dtype: torch.dtype) -> bool:
        """Whether the ops may stand in for these modules in a call with hidden states of this dtype."""
        mlp, family = self.mlp, self.family
        kind: Any = type(self.activation)
        if type(mlp) is not family.mlp or family.mlp.forward is not family.mlp_forward or F.silu is not SILU:
            return False
        if ACTIVATIONS.get(kind) is None or ACTIVATIONS[kind] is not kind.forward or any(self.hooks):
            return False
        if tuple(mlp._modules.values()) != self.parts:
            return False
        for module in self.modules:
            if "forward" in module.__dict__ and is_replaced(module):
                return False
        for linear in (self.o_proj, *self.linears):
            if type(linear) is not torch.nn.Linear:
                return False
            for parameter in linear._parameters.values():
                if parameter is not None and (type(parameter) is not torch.nn.Parameter or parameter.dtype != dtype):
                    return False
            if "weight" not in linear._parameters:
                return False
        gate, up, _ = self.linears
        return gate.weight.stride() == up.weight.stride() and (gate.bias is None) == (up.bias is None)


def decoded_rows(attention: Any, family: Family, cache: Any, tokens: int) -> Rows | None:
    """The Decoder's rows that this call appends a token to; None where it is no step of a Decoder, or where the
    attention is not the one that decode_attention computes."""
    layers = getattr(cache, "layers", ())
    rows = layers[attention.layer_idx] if attention.layer_idx < len(layers) else None
    if type(rows) is not Rows or rows.cursor.positions is None or tokens != 1:
        return None
    if attention.config._attn_implementation == "sdpa":
        own = ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward and F.scaled_dot_product_attention is ATTENTION
        return rows if own else None
    eager = family.module.eager_attention_forward
    return rows if getattr(eager, "__globals__", None) is vars(family.module) else None


def attend(
    attention: Any,
    head_norms: Sequence[Any],
    rows: Rows,
    qkv: tuple[Tensor, Tensor, Tensor],
    embeddings: tuple[Tensor, Tensor],
    **options: Any,
) -> Tensor:
    """[batch, 1, heads * head_dim]: the attention of a Decoder's step, from q, k and v as they come out of the
    projection, [batch, 1, heads, head_dim]."""
    q, k, v = qkv
    positions: Any = rows.cursor.positions
    if head_norms:
        q_norm, k_norm = head_norms
        options |= {"q_norm_weight": q_norm.weight, "k_norm_weight": k_norm.weight, "eps": q_norm.variance_epsilon}
    out: Tensor = ops.decode_attention(
        q, k, v, rows.keys, rows.values, positions, cos=embeddings[0], sin=embeddings[1],
        scale=attention.scaling, window=getattr(attention, "sliding_window", None), **options)  # fmt: skip
    return out.view(len(q), 1, -1)


def finish(few: Few, norm: Any, out: Tensor, total: Tensor, rounding: Any, **options: Any) -> Tensor:
    """The layer's hidden states: o_proj, the norm behind it and the MLP, with both residuals. total stays as it is."""
    options |= {"weight_layout": "out_in", "rounding": rounding}
    o_proj, (gate, up, down) = few.o_proj, few.linears
    total = ops.linear_add(out, o_proj.weight, total, bias=o_proj.bias, **options)
    h = gated(norm, gate, up, total, **options)
    return ops.linear_add(h, down.weight, total, bias=down.bias, out=total, **options)


def gated(norm: Any, gate: Any, up: Any, total: Tensor, **options: Any) -> Tensor:
    """What down_proj takes: the norm, gate and up, and silu of the gate times up."""
    eps = norm.variance_epsilon
    if total.shape[:-1].numel() <= PAIR_TOKENS:
        biases = None if gate.bias is None else (gate.bias, up.bias)
        h: Tensor = ops.rms_norm_gate_up(total, norm.weight, (gate.weight, up.weight), eps, bias=biases, **options)
        return h
    columns = gate.out_features
    gate_up = total.new_empty(*total.shape[:-1], columns + up.out_features)
    for linear, half in ((gate, gate_up[..., :columns]), (up, gate_up[..., columns:])):
        ops.rms_norm_linear(total, norm.weight, linear.weight, eps, bias=linear.bias, out=half, **options)
    product: Tensor = ops.silu_and_mul(gate_up, rounding=options["rounding"])
    return product
