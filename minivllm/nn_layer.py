"""The decoder layer of minivllm.nn, and the two that it is made of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ._C import decode_attention, qk_norm_rope, rms_norm_gate_up
from .nn_modules import FusedModule, LinearAdd, Projections, RMSNorm, Rounding, checked_head_dim, new_linears, tensor_of

Activation = Literal["silu", "gelu_tanh", "gelu"]
APPROXIMATE = {"gelu_tanh": "tanh", "gelu": "none"}  # as torch calls them


class GatedMLP(FusedModule):
    """The second half of a decoder layer: x + down_proj(activation(gate) * up), gate and up of the normed x.

        x = mlp(x, post_attention_layernorm)        [..., hidden] of x [..., hidden], norm: a minivllm.nn.RMSNorm

    Norm, gate, up and activation are one call, down_proj and the residual another. It holds gate_proj, up_proj and
    down_proj, or with packed=True a gate_up_proj in place of the first two, gate first. The rounding and weight_offset
    are the norm's. static_weights: see minivllm.rms_norm_gate_up.

    Where one of these modules is more than it seems, they are called one by one, and a NotFusedWarning says so, once.
    TypeError, ValueError: what minivllm.rms_norm_gate_up and linear_add refuse; activation.
    """

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        *,
        activation: Activation = "silu",
        bias: bool = False,
        packed: bool = False,
        rounding: Rounding = "hf",
        static_weights: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if activation != "silu" and activation not in APPROXIMATE:
            raise ValueError(f"GatedMLP: activation is {activation!r}, expected 'silu', 'gelu_tanh' or 'gelu'")
        self.activation, self.static_weights = activation, static_weights
        self.names = ("gate_up_proj",) if packed else ("gate_proj", "up_proj")
        place: Any = {"device": device, "dtype": dtype}
        for name in self.names:
            self.add_module(name, torch.nn.Linear(hidden, intermediate * (2 if packed else 1), bias=bias, **place))
        self.down_proj = LinearAdd(
            intermediate, hidden, bias, rounding=rounding, static_weights=static_weights, **place
        )

    def forward(self, x: Tensor, norm: RMSNorm) -> Tensor:
        linears: list[Any] = [self._modules[name] for name in self.names]
        biases = [tensor_of(linear, "bias") for linear in linears]
        parts = [(name, linear, torch.nn.Linear) for name, linear in zip(self.names, linears)]
        if not self._are_plain(("norm", norm, RMSNorm), *parts) or (biases[0] is None) != (biases[-1] is None):
            y = norm(x)
            gate, up = torch.cat([linear(y) for linear in linears], -1).chunk(2, -1)
            return self._down(x, self._activated(gate) * up)
        weights: Any = tuple(tensor_of(linear, "weight") for linear in linears)
        bias: Any = None if biases[0] is None else tuple(biases)
        if len(weights) == 1:
            weights, bias = weights[0], biases[0]
        h = rms_norm_gate_up(
            x, tensor_of(norm, "weight"), weights, norm.eps, activation=self.activation, bias=bias,
            weight_layout="out_in", rounding=norm.rounding, weight_offset=norm.weight_offset,
            static_weights=self.static_weights)  # fmt: skip
        return self._down(x, h)

    if TYPE_CHECKING:
        __call__ = forward

    def _down(self, x: Tensor, h: Tensor) -> Tensor:
        total: Tensor = self.down_proj(h, x)
        return total

    def _activated(self, gate: Tensor) -> Tensor:
        if self.activation == "silu":
            return torch.nn.functional.silu(gate)
        return torch.nn.functional.gelu(gate, approximate=APPROXIMATE[self.activation])

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"


class Attention(Projections):
    """The first half of a decoder layer: x + o_proj(attention of q, k and v), which are of the normed x.

        x = attention(x, input_layernorm, cos, sin)                                             no cache: trainable
        x = attention(x, input_layernorm, cos, sin, key_cache, value_cache)                     a prompt, from row 0 on
        x = attention(x, input_layernorm, cos, sin, key_cache, value_cache, positions)          one token per sequence

    x: [batch, tokens, hidden], as the result is. norm: a minivllm.nn.RMSNorm. cos, sin: [batch or 1, tokens, R], the
    rows of the rotary embedding for these tokens, R even and at most head_dim; None: no rotary embedding. The caches:
    [batch, num_kv_heads, rows, head_dim] in x's dtype, which get the new keys and values. positions: int32 or int64
    [batch], how many tokens each sequence has in them. window: how many keys a token sees, itself included.

    Norm, q, k and v are one call; the norms of heads, the rotary embedding, the cache and, for one token, the attention
    another (minivllm.decode_attention); o_proj and the residual the third. A prompt's attention is torch's.

    It holds q_proj, k_proj and v_proj, or with packed=True a qkv_proj, and o_proj; with qk_norm a q_norm and a k_norm
    of [head_dim]. bias: of q, k and v. scale: of the scores, 1 / sqrt(head_dim) unless given. static_weights,
    static_rows: what the caller vouches for, see minivllm.decode_attention.

    Where a module is more than it seems, it is called, and a NotFusedWarning says so, once. With caches it carries no
    gradients: RuntimeError. TypeError, ValueError: what the ops refuse, one cache without the other, and positions
    without caches.
    """

    def __init__(
        self,
        hidden: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int | None = None,
        eps: float = 1e-6,
        *,
        bias: bool = False,
        qk_norm: bool = False,
        packed: bool = False,
        scale: float | None = None,
        window: int | None = None,
        rounding: Rounding = "hf",
        weight_offset: float = 0.0,
        static_weights: bool = False,
        static_rows: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        head_dim = checked_head_dim("Attention", hidden, num_heads, head_dim)
        counts, place = (num_heads, num_kv_heads, num_kv_heads), {"device": device, "dtype": dtype}
        self._hold_projections(new_linears(hidden, counts, head_dim, bias, packed, place), counts)
        self.o_proj = LinearAdd(
            num_heads * head_dim, hidden, rounding=rounding, static_weights=static_weights, device=device, dtype=dtype
        )
        self.scale, self.window, self.rounding = scale, window, rounding
        self.static_weights, self.static_rows = static_weights, static_rows
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        if qk_norm:
            self.q_norm, self.k_norm = (
                RMSNorm(head_dim, eps, rounding=rounding, weight_offset=weight_offset, device=device, dtype=dtype)
                for _ in range(2)
            )

    def forward(
        self,
        x: Tensor,
        norm: RMSNorm,
        cos: Tensor | None,
        sin: Tensor | None,
        key_cache: Tensor | None = None,
        value_cache: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        if (key_cache is None) != (value_cache is None) or (positions is not None and key_cache is None):
            raise ValueError("Attention: key_cache and value_cache go together, and positions only with them")
        options = {
            "rounding": norm.rounding,
            "weight_offset": norm.weight_offset,
            "static_weights": self.static_weights,
        }
        q, k, v = self._norm_qkv(x, None, norm, RMSNorm, norm.eps, options)
        norms: dict[str, Any] = {"rounding": self.rounding}
        if self.q_norm is not None and self.k_norm is not None:
            if self._are_plain(("q_norm", self.q_norm, RMSNorm), ("k_norm", self.k_norm, RMSNorm)):
                norms |= {"q_norm_weight": tensor_of(self.q_norm, "weight"), "eps": self.q_norm.eps}
                norms |= {"k_norm_weight": tensor_of(self.k_norm, "weight"), "weight_offset": self.q_norm.weight_offset}
            else:
                q, k = self.q_norm(q), self.k_norm(k)
        if positions is not None and key_cache is not None and value_cache is not None:
            out = decode_attention(
                q, k, v, key_cache, value_cache, positions, cos=cos, sin=sin, scale=self.scale, window=self.window,
                static_weights=self.static_weights, static_rows=self.static_rows, **norms)  # fmt: skip
        else:
            if key_cache is not None:
                batch, tokens, rows = *x.shape[:2], key_cache.shape[2]
                starts = torch.arange(batch, device=x.device)[:, None] * rows
                slots = starts + torch.arange(tokens, device=x.device)
                norms |= {"v": v, "key_cache": key_cache, "value_cache": value_cache, "slots": slots}
            q, k = qk_norm_rope(q, k, cos, sin, **norms)
            out = self._attend(q, k, v)
        total: Tensor = self.o_proj(out.flatten(2), x)
        return total

    if TYPE_CHECKING:
        __call__ = forward

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The attention of a prompt to itself, [batch, tokens, heads, head_dim]."""
        tokens, mask = q.shape[1], None
        if self.window is not None and tokens > self.window:
            ones = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device)
            mask = ones.tril() & ones.triu(1 - self.window)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scale, enable_gqa=True
        )
        return out.transpose(1, 2)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}"


class DecoderLayer(torch.nn.Module):
    """A decoder layer of Llama, Qwen2, Qwen3 or Mistral: an Attention and a GatedMLP with the norms in front of them.

        x = layer(x, cos, sin, key_cache, value_cache, positions)

    The arguments and the result are those of Attention, without its norm. Its Parameters are named as in checkpoints:
    input_layernorm, self_attn.q_proj (or qkv_proj with packed=True), self_attn.o_proj, post_attention_layernorm,
    mlp.gate_proj (or gate_up_proj) and so on, and with qk_norm self_attn.q_norm and k_norm. One token per sequence is
    five calls of the ops. TypeError, ValueError, RuntimeError: as Attention and GatedMLP.
    """

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int | None = None,
        eps: float = 1e-6,
        *,
        bias: bool = False,
        qk_norm: bool = False,
        packed: bool = False,
        activation: Activation = "silu",
        scale: float | None = None,
        window: int | None = None,
        rounding: Rounding = "hf",
        static_weights: bool = False,
        static_rows: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        place: Any = {"device": device, "dtype": dtype}
        linears: Any = {"packed": packed, "rounding": rounding, "static_weights": static_weights} | place
        self.input_layernorm = RMSNorm(hidden, eps, rounding=rounding, **place)
        self.self_attn = Attention(
            hidden, num_heads, num_kv_heads, head_dim, eps, bias=bias, qk_norm=qk_norm, scale=scale, window=window,
            static_rows=static_rows, **linears)  # fmt: skip
        self.post_attention_layernorm = RMSNorm(hidden, eps, rounding=rounding, **place)
        self.mlp = GatedMLP(hidden, intermediate, activation=activation, **linears)

    def forward(
        self,
        x: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        key_cache: Tensor | None = None,
        value_cache: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        x = self.self_attn(x, self.input_layernorm, cos, sin, key_cache, value_cache, positions)
        return self.mlp(x, self.post_attention_layernorm)

    if TYPE_CHECKING:
        __call__ = forward
