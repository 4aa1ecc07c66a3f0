"""The ops as modules of torch, which own their Parameters or stand around modules that do.

    from minivllm.nn import FusedRMSNormQKV
    layer = FusedRMSNormQKV(1024, num_heads=16, num_kv_heads=8, head_dim=128)
    q, k, v = layer(x)

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

from ._C import rms_norm, rms_norm_qkv

__all__ = ["FusedRMSNormQKV", "NotFusedWarning", "RMSNorm"]

_Rounding = Literal["hf", "hf_once", "fp32"]
_PACKED = ("qkv_proj",)
_SEPARATE = ("q_proj", "k_proj", "v_proj")


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


class FusedRMSNormQKV(torch.nn.Module):
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
        if head_dim is None:
            if num_heads < 1 or hidden % num_heads:
                raise ValueError(
                    f"FusedRMSNormQKV: hidden is {hidden}, expected a multiple of num_heads, which is {num_heads}; or "
                    "pass head_dim"
                )
            head_dim = hidden // num_heads
        counts = (num_heads, num_kv_heads, num_kv_heads)
        place: Any = {"device": device, "dtype": dtype}
        self._hold(
            RMSNorm(hidden, eps, rounding=rounding, weight_offset=weight_offset, **place),
            [
                torch.nn.Linear(hidden, heads * head_dim, bias=bias, **place)
                for heads in ((sum(counts),) if packed else counts)
            ],
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
        names = {1: _PACKED, 3: _SEPARATE}.get(len(projections), ())
        if not names:
            raise TypeError(f"FusedRMSNormQKV: {len(projections)} projections were given, expected one or three")
        if not isinstance(getattr(norm, "weight", None), Tensor) or getattr(norm, "bias", None) is not None:
            raise TypeError(
                f"FusedRMSNormQKV: norm is a {type(norm).__qualname__}, expected an RMSNorm: a module with a weight "
                "and without a bias"
            )
        self.num_heads, self.num_kv_heads = counts[:2]
        self.eps, self.norm_class = eps, type_before_parametrizations(norm)
        self.__dict__.update(options)
        self.has_warned = False
        self.norm = norm
        head_dim: int | None = None
        for name, projection, heads in zip(names, projections, counts if len(names) == 3 else (sum(counts),)):
            if type_before_parametrizations(projection) is not torch.nn.Linear:
                raise TypeError(
                    f"FusedRMSNormQKV: {name} is a {type(projection).__module__}.{type(projection).__qualname__}, "
                    "expected a torch.nn.Linear"
                )
            outputs: Any = projection.out_features
            if heads < 1 or outputs % heads or head_dim not in (None, outputs // heads):
                of_one_size = "heads of one size" if head_dim is None else f"heads of {head_dim}, as q_proj has them"
                raise ValueError(
                    f"FusedRMSNormQKV: {name} has {outputs} outputs, expected {heads} {of_one_size} (num_heads is "
                    f"{counts[0]}, num_kv_heads {counts[1]})"
                )
            head_dim = outputs // heads
            self.add_module(name, projection)
        self.head_dim, self.names = head_dim, names

    if TYPE_CHECKING:

        @overload
        def __call__(self, x: Tensor, residual: None = None) -> tuple[Tensor, Tensor, Tensor]: ...
        @overload
        def __call__(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...
        def __call__(self, x: Any, residual: Any = None) -> Any: ...

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, ...]:
        modules = self._modules
        norm: Any = modules["norm"]
        projections: list[Any] = [modules[name] for name in self.names]
        biases = [_tensor(projection, "bias") for projection in projections]
        if (why := self._why_not(norm, projections, biases)) is not None:
            return self._one_by_one(x, residual, norm, projections, why)
        weight: Any = [_tensor(projection, "weight") for projection in projections]
        bias: Any = None if biases[0] is None else biases
        if len(weight) == 1:
            weight, bias = weight[0], biases[0]
        some: Any = residual
        return rms_norm_qkv(
            x, _tensor(norm, "weight"), weight, self.num_heads, self.num_kv_heads, self.eps, bias=bias, residual=some,
            head_dim=self.head_dim, weight_layout="out_in", rounding=self.rounding, weight_offset=self.weight_offset,
            batch_invariant=self.batch_invariant, allow_tf32=self.allow_tf32,
            static_weights=self.static_weights)  # fmt: skip

    def _why_not(self, norm: Any, projections: list[Any], biases: list[Tensor | None]) -> str | None:
        """Why the modules have to be called themselves."""
        if _has_any_global_hook():  # type: ignore[no-untyped-call]
            return "a hook on all modules is registered"
        if why := _why_not_plain("norm", norm, self.norm_class):
            return why
        for name, projection in zip(self.names, projections):
            if why := _why_not_plain(name, projection, torch.nn.Linear):
                return why
        if any((bias is None) != (biases[0] is None) for bias in biases):
            return "some of q_proj, k_proj and v_proj have a bias and some have none"
        return None

    def _one_by_one(
        self, x: Tensor, residual: Tensor | None, norm: Any, projections: list[Any], why: str
    ) -> tuple[Tensor, ...]:
        if not self.has_warned and not torch.compiler.is_compiling():
            self.has_warned = True
            warnings.warn(
                f"FusedRMSNormQKV calls its modules one by one, from now on and as long as that holds: {why}",
                NotFusedWarning,
                stacklevel=2,
            )
        total = x if residual is None else x + residual
        y = norm(total)
        parts = [projection(y) for projection in projections]
        packed = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        heads = packed.unflatten(-1, (-1, self.head_dim))
        q, k, v = heads.split_with_sizes([self.num_heads, self.num_kv_heads, self.num_kv_heads], -2)
        return (q, k, v) if residual is None else (q, k, v, total)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, eps={self.eps}"


def _tensor(module: torch.nn.Module, name: str) -> Any:
    """module.<name>: nearly always a Parameter, which torch finds only after looking everywhere else."""
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name)


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
