"""The ops as modules of torch, which own their Parameters or stand around modules that do.

    from minivllm.nn import FusedRMSNormQKV
    layer = FusedRMSNormQKV(1024, num_heads=16, num_kv_heads=8, head_dim=128)
    q, k, v = layer(x)

A whole decoder layer is DecoderLayer, made of Attention and GatedMLP, whose Parameters have the names that they have
in the checkpoints of Llama, Qwen2, Qwen3 and Mistral. Those two are handed the norm in front of them, because there it
stands beside them.

They look up what they compute with in every call and hand it to a stateless op, so that nothing goes stale, whoever
replaces it and by whatever means: load_state_dict(assign=True), functional_call, a parametrization, another module.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Literal, overload

try:
    import torch
except ImportError as error:
    raise ImportError(
        f"minivllm.nn holds modules of torch, which cannot be imported here ({error}); install it by `pip install "
        "torch`, or use minivllm.FusedRMSNormQKV, which needs no framework"
    ) from error
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils.parametrize import type_before_parametrizations

from ._C import decode_attention, linear_add, qk_norm_rope, rms_norm, rms_norm_gate_up, rms_norm_qkv

__all__ = ["Attention", "DecoderLayer", "FusedRMSNormQKV", "GatedMLP", "LinearAdd", "NotFusedWarning", "RMSNorm"]

_Rounding = Literal["hf", "hf_once", "fp32"]
_Activation = Literal["silu", "gelu_tanh", "gelu"]
_PACKED = ("qkv_proj",)
_SEPARATE = ("q_proj", "k_proj", "v_proj")
_APPROXIMATE = {"gelu_tanh": "tanh", "gelu": "none"}  # as torch calls them


class NotFusedWarning(UserWarning):
    """A module runs, but not on the fused ops, where one would expect it to."""


class RMSNorm(torch.nn.Module):
    """RMSNorm over the last dimension, which has `hidden` elements; see minivllm.rms_norm.

    Its Parameter is `weight`, [hidden], such that weight_offset + weight is one at first."""

    def __init__(
        self,
        hidden: int,
        eps: float = 1e-6,
        *,
        rounding: _Rounding = "hf",
        weight_offset: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps, self.rounding, self.weight_offset = eps, rounding, weight_offset
        self.weight = torch.nn.Parameter(torch.empty(hidden, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        torch.nn.init.constant_(self.weight, 1.0 - self.weight_offset)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, rounding=self.rounding, weight_offset=self.weight_offset)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}, rounding={self.rounding!r}, weight_offset={self.weight_offset}"


class _Module(torch.nn.Module):
    """One that computes with its modules' Parameters, and calls the modules where one is more than it seems."""

    def __init__(self) -> None:
        super().__init__()
        self.has_warned = False

    def _are_plain(self, *modules: tuple[str, torch.nn.Module, type]) -> bool:
        """Whether each of them, by its name and with the class that it should be of, may be passed over."""
        why = _why_not_all_plain(*modules)
        if why is not None:
            self._warn(why)
        return why is None

    def _warn(self, why: str) -> None:
        if not self.has_warned and not torch.compiler.is_compiling():
            self.has_warned = True
            warnings.warn(
                f"{type(self).__name__} calls its modules one by one, from now on and as long as that holds: {why}",
                NotFusedWarning,
                stacklevel=2,
            )


class _Projections(_Module):
    """A module that holds q_proj, k_proj and v_proj, or the three in one, and the numbers of their heads."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    names: tuple[str, ...]

    def _hold_projections(self, projections: list[torch.nn.Module], counts: tuple[int, int, int]) -> None:
        kind = type(self).__name__
        names = {1: _PACKED, 3: _SEPARATE}.get(len(projections), ())
        if not names:
            raise TypeError(f"{kind}: {len(projections)} projections were given, expected one or three")
        head_dim: int | None = None
        for name, projection, heads in zip(names, projections, counts if len(names) == 3 else (sum(counts),)):
            if type_before_parametrizations(projection) is not torch.nn.Linear:
                raise TypeError(
                    f"{kind}: {name} is a {type(projection).__module__}.{type(projection).__qualname__}, expected a "
                    "torch.nn.Linear"
                )
            outputs: Any = projection.out_features
            if heads < 1 or outputs % heads or head_dim not in (None, outputs // heads):
                of_one_size = "heads of one size" if head_dim is None else f"heads of {head_dim}, as q_proj has them"
                raise ValueError(
                    f"{kind}: {name} has {outputs} outputs, expected {heads} {of_one_size} (num_heads is {counts[0]}, "
                    f"num_kv_heads {counts[1]})"
                )
            head_dim = outputs // heads
            self.add_module(name, projection)
        assert head_dim is not None
        self.num_heads, self.num_kv_heads = counts[:2]
        self.head_dim, self.names = head_dim, names

    def _norm_qkv(
        self, x: Tensor, residual: Tensor | None, norm: Any, norm_class: type, eps: float, options: dict[str, Any]
    ) -> tuple[Tensor, ...]:
        """(q, k, v), and with a residual the sum: [..., heads, head_dim] each, views of one buffer."""
        projections: list[Any] = [self._modules[name] for name in self.names]
        biases = [_tensor(projection, "bias") for projection in projections]
        linears = [(name, projection, torch.nn.Linear) for name, projection in zip(self.names, projections)]
        why = _why_not_all_plain(("norm", norm, norm_class), *linears)
        if why is None and any((bias is None) != (biases[0] is None) for bias in biases):
            why = "some of q_proj, k_proj and v_proj have a bias and some have none"
        if why is not None:
            self._warn(why)
            return self._one_by_one(x, residual, norm, projections)
        weight: Any = [_tensor(projection, "weight") for projection in projections]
        bias: Any = None if biases[0] is None else biases
        if len(weight) == 1:
            weight, bias = weight[0], biases[0]
        some: Any = residual
        return rms_norm_qkv(
            x, _tensor(norm, "weight"), weight, self.num_heads, self.num_kv_heads, eps, bias=bias, residual=some,
            head_dim=self.head_dim, weight_layout="out_in", **options)  # fmt: skip

    def _one_by_one(self, x: Tensor, residual: Tensor | None, norm: Any, projections: list[Any]) -> tuple[Tensor, ...]:
        total = x if residual is None else x + residual
        y = norm(total)
        parts = [projection(y) for projection in projections]
        packed = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        heads = packed.unflatten(-1, (-1, self.head_dim))
        q, k, v = heads.split_with_sizes([self.num_heads, self.num_kv_heads, self.num_kv_heads], -2)
        return (q, k, v) if residual is None else (q, k, v, total)


class FusedRMSNormQKV(_Projections):
    """RMSNorm and the q, k, v projection of an attention layer, in one kernel; see minivllm.rms_norm_qkv.

        q, k, v = layer(x)                              [..., heads, head_dim] of x [..., hidden]
        q, k, v, total = layer(x, residual)             of x + residual, which is `total`

    It holds a `norm` and a `qkv_proj`, or with packed=False a `q_proj`, `k_proj` and `v_proj` as the checkpoints of
    Hugging Face have them; so its Parameters are norm.weight, qkv_proj.weight and so on. `from_modules` takes those of
    a model instead. head_dim is hidden / num_heads unless given. static_weights: see minivllm.rms_norm_qkv.

    Where one of these modules is more than it seems (it has hooks, an adapter took its place, its forward was
    replaced), the modules are called one by one, and a NotFusedWarning says so, once.

    ValueError, TypeError: sizes and modules that do not fit, each by name; and what rms_norm_qkv refuses.
    """

    rounding: _Rounding
    weight_offset: float
    batch_invariant: bool
    allow_tf32: bool
    static_weights: bool

    def __init__(
        self,
        hidden: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int | None = None,
        eps: float = 1e-6,
        *,
        bias: bool = False,
        packed: bool = True,
        rounding: _Rounding = "hf",
        weight_offset: float = 0.0,
        batch_invariant: bool = False,
        allow_tf32: bool = False,
        static_weights: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        head_dim = _checked_head_dim("FusedRMSNormQKV", hidden, num_heads, head_dim)
        counts = (num_heads, num_kv_heads, num_kv_heads)
        place: Any = {"device": device, "dtype": dtype}
        self._hold(
            RMSNorm(hidden, eps, rounding=rounding, weight_offset=weight_offset, **place),
            _linears(hidden, counts, head_dim, bias, packed, place),
            counts,
            eps,
            {
                "rounding": rounding,
                "weight_offset": weight_offset,
                "batch_invariant": batch_invariant,
                "allow_tf32": allow_tf32,
                "static_weights": static_weights,
            },
        )

    @classmethod
    def from_modules(
        cls,
        norm: torch.nn.Module,
        *projections: torch.nn.Module,
        num_heads: int,
        num_kv_heads: int,
        eps: float | None = None,
        rounding: _Rounding = "hf",
        weight_offset: float = 0.0,
        batch_invariant: bool = False,
        allow_tf32: bool = False,
        static_weights: bool = False,
    ) -> FusedRMSNormQKV:
        """The layer around modules that there are: an RMSNorm of whatever class, whose weight and eps are taken, and
        one torch.nn.Linear (q, k and v packed) or three. They stay modules of this one, under the names `norm` and
        `qkv_proj`, or `q_proj`, `k_proj` and `v_proj`, and their Parameters stay theirs.

        eps: where the norm has none, as a `variance_epsilon` or an `eps`. weight_offset: 1.0 for a norm as Gemma's.
        """
        layer = cls.__new__(cls)
        if eps is None:
            eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
        if eps is None:
            raise ValueError(
                f"FusedRMSNormQKV.from_modules: norm, a {type(norm).__qualname__}, has no variance_epsilon or eps; "
                "pass eps"
            )
        layer._hold(
            norm,
            list(projections),
            (num_heads, num_kv_heads, num_kv_heads),
            eps,
            {
                "rounding": rounding,
                "weight_offset": weight_offset,
                "batch_invariant": batch_invariant,
                "allow_tf32": allow_tf32,
                "static_weights": static_weights,
            },
        )
        return layer

    def _hold(
        self,
        norm: torch.nn.Module,
        projections: list[torch.nn.Module],
        counts: tuple[int, int, int],
        eps: float,
        options: dict[str, Any],
    ) -> None:
        super().__init__()
        if not isinstance(getattr(norm, "weight", None), Tensor) or getattr(norm, "bias", None) is not None:
            raise TypeError(
                f"FusedRMSNormQKV: norm is a {type(norm).__qualname__}, expected an RMSNorm: a module with a weight "
                "and without a bias"
            )
        self.eps, self.norm_class = eps, type_before_parametrizations(norm)
        self.__dict__.update(options)
        self.norm = norm
        self._hold_projections(projections, counts)

    if TYPE_CHECKING:

        @overload
        def __call__(self, x: Tensor, residual: None = None) -> tuple[Tensor, Tensor, Tensor]: ...
        @overload
        def __call__(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...
        def __call__(self, x: Any, residual: Any = None) -> Any: ...

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, ...]:
        options = {
            "rounding": self.rounding, "weight_offset": self.weight_offset, "batch_invariant": self.batch_invariant,
            "allow_tf32": self.allow_tf32, "static_weights": self.static_weights}  # fmt: skip
        return self._norm_qkv(x, residual, self._modules["norm"], self.norm_class, self.eps, options)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, eps={self.eps}"


class LinearAdd(torch.nn.Linear):
    """A linear with the residual in the same call, residual + scale * (x W^T + b); see minivllm.linear_add.

        total = o_proj(x, residual)     [..., out_features] of x [..., in_features], residual [..., out_features]

    Its Parameters are those of torch.nn.Linear, without a bias by default. TypeError, ValueError: what
    minivllm.linear_add refuses.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        scale: float = 1.0,
        rounding: _Rounding = "hf",
        static_weights: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.scale, self.rounding, self.static_weights = scale, rounding, static_weights

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:  # type: ignore[override]
        return linear_add(
            x, self.weight, residual, bias=self.bias, scale=self.scale, weight_layout="out_in", rounding=self.rounding,
            static_weights=self.static_weights)  # fmt: skip

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scale={self.scale}, rounding={self.rounding!r}"


class GatedMLP(_Module):
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
        activation: _Activation = "silu",
        bias: bool = False,
        packed: bool = False,
        rounding: _Rounding = "hf",
        static_weights: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if activation != "silu" and activation not in _APPROXIMATE:
            raise ValueError(f"GatedMLP: activation is {activation!r}, expected 'silu', 'gelu_tanh' or 'gelu'")
        self.activation, self.static_weights = activation, static_weights
        self.names = ("gate_up_proj",) if packed else ("gate_proj", "up_proj")
        place: Any = {"device": device, "dtype": dtype}
        for name in self.names:
            self.add_module(name, torch.nn.Linear(hidden, intermediate * (2 if packed else 1), bias=bias, **place))
        self.down_proj = LinearAdd(
            intermediate, hidden, bias, rounding=rounding, static_weights=static_weights, **place
        )

    if TYPE_CHECKING:

        def __call__(self, x: Tensor, norm: RMSNorm) -> Tensor: ...

    def forward(self, x: Tensor, norm: RMSNorm) -> Tensor:
        linears: list[Any] = [self._modules[name] for name in self.names]
        biases = [_tensor(linear, "bias") for linear in linears]
        parts = [(name, linear, torch.nn.Linear) for name, linear in zip(self.names, linears)]
        if not self._are_plain(("norm", norm, RMSNorm), *parts) or (biases[0] is None) != (biases[-1] is None):
            y = norm(x)
            gate, up = torch.cat([linear(y) for linear in linears], -1).chunk(2, -1)
            return self._down(x, self._activated(gate) * up)
        weights: Any = tuple(_tensor(linear, "weight") for linear in linears)
        bias: Any = None if biases[0] is None else tuple(biases)
        if len(weights) == 1:
            weights, bias = weights[0], biases[0]
        h = rms_norm_gate_up(
            x, _tensor(norm, "weight"), weights, norm.eps, activation=self.activation, bias=bias,
            weight_layout="out_in", rounding=norm.rounding, weight_offset=norm.weight_offset,
            static_weights=self.static_weights)  # fmt: skip
        return self._down(x, h)

    def _down(self, x: Tensor, h: Tensor) -> Tensor:
        total: Tensor = self.down_proj(h, x)
        return total

    def _activated(self, gate: Tensor) -> Tensor:
        if self.activation == "silu":
            return torch.nn.functional.silu(gate)
        return torch.nn.functional.gelu(gate, approximate=_APPROXIMATE[self.activation])

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"


class Attention(_Projections):
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
        rounding: _Rounding = "hf",
        weight_offset: float = 0.0,
        static_weights: bool = False,
        static_rows: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        head_dim = _checked_head_dim("Attention", hidden, num_heads, head_dim)
        counts, place = (num_heads, num_kv_heads, num_kv_heads), {"device": device, "dtype": dtype}
        self._hold_projections(_linears(hidden, counts, head_dim, bias, packed, place), counts)
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

    if TYPE_CHECKING:

        def __call__(
            self,
            x: Tensor,
            norm: RMSNorm,
            cos: Tensor | None,
            sin: Tensor | None,
            key_cache: Tensor | None = None,
            value_cache: Tensor | None = None,
            positions: Tensor | None = None,
        ) -> Tensor: ...

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
                norms |= {"q_norm_weight": _tensor(self.q_norm, "weight"), "eps": self.q_norm.eps}
                norms |= {"k_norm_weight": _tensor(self.k_norm, "weight"), "weight_offset": self.q_norm.weight_offset}
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
        activation: _Activation = "silu",
        scale: float | None = None,
        window: int | None = None,
        rounding: _Rounding = "hf",
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

    if TYPE_CHECKING:

        def __call__(
            self,
            x: Tensor,
            cos: Tensor | None,
            sin: Tensor | None,
            key_cache: Tensor | None = None,
            value_cache: Tensor | None = None,
            positions: Tensor | None = None,
        ) -> Tensor: ...

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


def _checked_head_dim(kind: str, hidden: int, num_heads: int, head_dim: int | None) -> int:
    if head_dim is not None:
        return head_dim
    if num_heads < 1 or hidden % num_heads:
        raise ValueError(
            f"{kind}: hidden is {hidden}, expected a multiple of num_heads, which is {num_heads}; or pass head_dim"
        )
    return hidden // num_heads


def _linears(
    hidden: int, counts: tuple[int, int, int], head_dim: int, bias: bool, packed: bool, place: Any
) -> list[torch.nn.Module]:
    """q_proj, k_proj and v_proj, or the three in one."""
    sizes = (sum(counts),) if packed else counts
    return [torch.nn.Linear(hidden, heads * head_dim, bias=bias, **place) for heads in sizes]


def _tensor(module: torch.nn.Module, name: str) -> Any:
    """module.<name>: nearly always a Parameter, which torch finds only after looking everywhere else."""
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name)


def _why_not_all_plain(*modules: tuple[str, torch.nn.Module, type]) -> str | None:
    """Why one of them, by its name and with the class that it should be of, may not be passed over; None if all may."""
    if _has_any_global_hook():  # type: ignore[no-untyped-call]
        return "a hook on all modules is registered"
    return next((why for each in modules if (why := _why_not_plain(*each)) is not None), None)


def _why_not_plain(name: str, module: torch.nn.Module, kind: type) -> str | None:
    """Why a call of the module may be more than what its class computes of its Parameters; None if it is not."""
    if type(module) is not kind and type_before_parametrizations(module) is not kind:
        return f"{name} is a {type(module).__module__}.{type(module).__qualname__}, expected {kind.__qualname__}"
    forward = module.__dict__.get("forward")
    if forward is not None and getattr(forward, "__func__", None) is not type(module).forward:
        return f"the forward of {name} was replaced"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return f"{name} has a hook"
    return None
