"""The modules of minivllm.nn with one op each, and what those with several share: whether the modules that they hold
may be passed over, and the projections of q, k and v."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils.parametrize import type_before_parametrizations

from ._C import linear_add, rms_norm, rms_norm_qkv

Rounding = Literal["hf", "hf_once", "fp32"]
_PROJECTIONS = {1: ("qkv_proj",), 3: ("q_proj", "k_proj", "v_proj")}  # by how many there are


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
        rounding: Rounding = "hf",
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


class FusedModule(torch.nn.Module):
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


class Projections(FusedModule):
    """A module that holds q_proj, k_proj and v_proj, or the three in one, and the numbers of their heads."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    names: tuple[str, ...]

    def _hold_projections(self, projections: list[torch.nn.Module], counts: tuple[int, int, int]) -> None:
        kind = type(self).__name__
        names = _PROJECTIONS.get(len(projections), ())
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
        biases = [tensor_of(projection, "bias") for projection in projections]
        linears = [(name, projection, torch.nn.Linear) for name, projection in zip(self.names, projections)]
        why = _why_not_all_plain(("norm", norm, norm_class), *linears)
        if why is None and any((bias is None) != (biases[0] is None) for bias in biases):
            why = "some of q_proj, k_proj and v_proj have a bias and some have none"
        if why is not None:
            self._warn(why)
            return self._one_by_one(x, residual, norm, projections)
        weight: Any = [tensor_of(projection, "weight") for projection in projections]
        bias: Any = None if biases[0] is None else biases
        if len(weight) == 1:
            weight, bias = weight[0], biases[0]
        some: Any = residual
        return rms_norm_qkv(
            x, tensor_of(norm, "weight"), weight, self.num_heads, self.num_kv_heads, eps, bias=bias, residual=some,
            head_dim=self.head_dim, weight_layout="out_in", **options)  # fmt: skip

    def _one_by_one(self, x: Tensor, residual: Tensor | None, norm: Any, projections: list[Any]) -> tuple[Tensor, ...]:
        total = x if residual is None else x + residual
        y = norm(total)
        parts = [projection(y) for projection in projections]
        packed = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        heads = packed.unflatten(-1, (-1, self.head_dim))
        q, k, v = heads.split_with_sizes([self.num_heads, self.num_kv_heads, self.num_kv_heads], -2)
        return (q, k, v) if residual is None else (q, k, v, total)


class FusedRMSNormQKV(Projections):
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

    rounding: Rounding
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
        rounding: Rounding = "hf",
        weight_offset: float = 0.0,
        batch_invariant: bool = False,
        allow_tf32: bool = False,
        static_weights: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        head_dim = checked_head_dim("FusedRMSNormQKV", hidden, num_heads, head_dim)
        counts, place = (num_heads, num_kv_heads, num_kv_heads), {"device": device, "dtype": dtype}
        norm = RMSNorm(hidden, eps, rounding=rounding, weight_offset=weight_offset, device=device, dtype=dtype)
        self._hold(
            norm, new_linears(hidden, counts, head_dim, bias, packed, place), counts, eps, rounding=rounding,
            weight_offset=weight_offset, batch_invariant=batch_invariant, allow_tf32=allow_tf32,
            static_weights=static_weights)  # fmt: skip

    @classmethod
    def from_modules(
        cls,
        norm: torch.nn.Module,
        *projections: torch.nn.Module,
        num_heads: int,
        num_kv_heads: int,
        eps: float | None = None,
        rounding: Rounding = "hf",
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
            norm, list(projections), (num_heads, num_kv_heads, num_kv_heads), eps, rounding=rounding,
            weight_offset=weight_offset, batch_invariant=batch_invariant, allow_tf32=allow_tf32,
            static_weights=static_weights)  # fmt: skip
        return layer

    def _hold(
        self,
        norm: torch.nn.Module,
        projections: list[torch.nn.Module],
        counts: tuple[int, int, int],
        eps: float,
        **options: Any,
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
        rounding: Rounding = "hf",
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


def checked_head_dim(kind: str, hidden: int, num_heads: int, head_dim: int | None) -> int:
    if head_dim is not None:
        return head_dim
    if num_heads < 1 or hidden % num_heads:
        raise ValueError(
            f"{kind}: hidden is {hidden}, expected a multiple of num_heads, which is {num_heads}; or pass head_dim"
        )
    return hidden // num_heads


def new_linears(
    hidden: int, counts: tuple[int, int, int], head_dim: int, bias: bool, packed: bool, place: Any
) -> list[torch.nn.Module]:
    """q_proj, k_proj and v_proj, or the three in one."""
    sizes = (sum(counts),) if packed else counts
    return [torch.nn.Linear(hidden, heads * head_dim, bias=bias, **place) for heads in sizes]


def tensor_of(module: torch.nn.Module, name: str) -> Any:
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
