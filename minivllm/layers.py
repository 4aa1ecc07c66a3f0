"""Layers: an op together with its weights."""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Any, ClassVar, SupportsFloat, SupportsIndex, overload

from . import _C
from .device_array import DeviceArray, to_device
from .signatures import names

if TYPE_CHECKING:
    from ._C import _T, _RMSNormQKV, _Rounding, _Tensor, _Tensors, _WeightLayout

_OPTIONS = tuple(name for name in names("rms_norm_qkv", "option") if name != "kernel")
_TENSORS = frozenset((*names("rms_norm_qkv", "weight"), "_packed"))


@_C._callable_layer
class FusedRMSNormQKV:
    """RMSNorm and the q, k, v projection of an attention layer, in one kernel.

        q, k, v = split(rms_norm(x, norm_weight) @ qkv_weight.T + bias)

    `FusedRMSNormQKV.forward` is `minivllm.rms_norm_qkv`, for calls that bring their own weights. An instance holds
    them: it checks shapes and dtypes once, and then `layer(x, *, residual=None, out=None, residual_out=None)`, which
    is (q, k, v) or with a residual (q, k, v, residual_out), is cheap.

    norm_weight: [hidden]. qkv_weight: [qkv, hidden] or [hidden, qkv], with qkv = (num_heads + 2 num_kv_heads) head_dim,
    or a tuple (wq, wk, wv); where these are all square, weight_layout says which: "out_in" for a Linear's .weight,
    "in_out" for its .t(). bias: [qkv], or a tuple of three. All float32, float16 or bfloat16: x's dtype or float32.

    The layer keeps the very tensors it was given and reads their addresses anew at each call, so weights that are
    updated in place, or whose storage is replaced, are seen. It is no torch.nn.Module: a Parameter or a module that is
    put in the place of another one (load_state_dict(assign=True), functional_call, a parametrization) does not reach
    it. minivllm.nn.FusedRMSNormQKV is one. With `prepack=True` the projection is instead copied once
    into one contiguous [qkv, hidden] matrix of `prepacked_bytes` bytes; `refresh()` renews that copy.

    static_weights: on a GPU, may a call read the weights while the work in front of it on its stream is still running?
    True: yes, you vouch that this work does not write them. False: no. None (default): where they are torch tensors,
    yes as long as torch's counter of writes to each (`tensor._version`) has not moved since the last call; else no.
    What torch does not count, such as writes through `.data`, DLPack, NCCL or Triton, needs static_weights=False, or
    a finished stream before the next call.
    """

    if not TYPE_CHECKING:
        forward = staticmethod(_C.rms_norm_qkv)
    else:
        forward: ClassVar[_RMSNormQKV]

        # C adds them: see _callable_layer.
        @overload
        def __call__(
            self, x: _T, *, residual: None = None, out: _T | None = None, residual_out: None = None
        ) -> tuple[_T, _T, _T]: ...
        @overload
        def __call__(
            self, x: _T, *, residual: _Tensor, out: _T | None = None, residual_out: _T | None = None
        ) -> tuple[_T, _T, _T, _T]: ...
        def __call__(self, x: Any, *, residual: Any = None, out: Any = None, residual_out: Any = None) -> Any: ...
        def _forget(self) -> None: ...
        def _vouches(self) -> bool: ...

    def __init__(
        self,
        *,
        norm_weight: _Tensor,
        qkv_weight: _Tensors,
        num_heads: SupportsIndex,
        num_kv_heads: SupportsIndex,
        eps: SupportsFloat = 1e-6,
        bias: _Tensors | None = None,
        head_dim: SupportsIndex | None = None,
        weight_layout: _WeightLayout = "auto",
        rounding: _Rounding = "hf",
        weight_offset: SupportsFloat = 0.0,
        batch_invariant: bool = False,
        allow_tf32: bool = False,
        static_weights: bool | None = None,
        prepack: bool = False,
    ) -> None:
        if not isinstance(prepack, bool):
            raise TypeError(f"FusedRMSNormQKV: prepack must be True or False, got {type(prepack).__name__}")
        self.norm_weight = norm_weight
        self.qkv_weight = qkv_weight
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.eps = eps
        self.bias = bias
        self.weight_layout = weight_layout
        self.rounding = rounding
        self.weight_offset = weight_offset
        self.batch_invariant = batch_invariant
        self.allow_tf32 = allow_tf32
        self.static_weights = static_weights
        self.prepack = prepack
        self.prepacked_bytes = 0
        self._packed: Any = None
        self.hidden, self.qkv, self.head_dim, _, self._numbers = self._checked(qkv_weight, head_dim, weight_layout)
        self.refresh()

    def __setattr__(self, name: str, value: object) -> None:
        if name in _OPTIONS and name in self.__dict__:
            raise AttributeError(f"FusedRMSNormQKV: {name} was read when the layer was made; make another layer")
        super().__setattr__(name, value)
        if name in _TENSORS:
            self._forget()

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: all there is, but for the bytes of a C struct that another build may lay out
        otherwise."""
        return {name: value for name, value in self.__dict__.items() if name != "_numbers"}

    @functools.cached_property
    def _numbers(self) -> bytes:
        """What calls read in place of the arguments that are no tensors. Of a copy, at its first call: its weights may
        come later."""
        weight, layout = self._projection()
        *_, numbers = self._checked(weight, self.head_dim, layout)
        return numbers

    def _checked(
        self, qkv_weight: _Tensors, head_dim: SupportsIndex | None, weight_layout: _WeightLayout
    ) -> tuple[int, int, int, bool, bytes]:
        options = self._options(head_dim=head_dim, weight_layout=weight_layout)
        return _C._check_rms_norm_qkv(self.norm_weight, qkv_weight, bias=self.bias, **options)

    def _options(self, **instead: Any) -> dict[str, Any]:
        """What the layer was told that is no tensor, but for some of it."""
        return {name: instead[name] if name in instead else getattr(self, name) for name in _OPTIONS}

    def _projection(self) -> tuple[Any, _WeightLayout]:
        """The weights to compute with and their layout: those of the copy, where there is one."""
        return (self.qkv_weight, self.weight_layout) if self._packed is None else (self._packed, "out_in")

    def spelled_out(self, x: Any, residual: Any = None, out: Any = None, residual_out: Any = None) -> Any:
        """The same call with every argument by its name: for what traces or transforms it."""
        weight, layout = self._projection()
        options = self._options(weight_layout=layout, static_weights=self.static_weights is True)
        return _C.rms_norm_qkv(
            x,
            self.norm_weight,
            weight,
            bias=self.bias,
            residual=residual,
            out=out,
            residual_out=residual_out,
            **options,
        )

    def refresh(self) -> None:
        """Renews the copy of the weights that `prepack=True` made, at the same address (as a CUDA graph needs it) for
        torch, NumPy and CuPy. Without a copy: does nothing."""
        if not self.prepack:
            return
        members = self.qkv_weight if isinstance(self.qkv_weight, (tuple, list)) else (self.qkv_weight,)
        dtypes = [_C._kind(weight)[0] for weight in members]
        if len(set(dtypes)) > 1:
            raise TypeError(
                f"FusedRMSNormQKV: prepack=True makes one matrix of qkv_weight, whose members are {', '.join(dtypes)}; "
                "pass them in one dtype, or leave prepack away"
            )
        for weight in members:
            if not (hasattr(weight, "T") or isinstance(weight, DeviceArray)):
                raise TypeError(
                    "FusedRMSNormQKV: prepack=True copies qkv_weight, which must be a tensor of torch, NumPy, CuPy or "
                    f"JAX, got {type(weight).__name__}; leave prepack away"
                )
        *_, in_out, _ = self._checked(self.qkv_weight, self.head_dim, self.weight_layout)
        if isinstance(members[0], DeviceArray):
            blocks = [weight.numpy() for weight in members]
            host = _concatenate([block.T if in_out else block for block in blocks], (self.qkv, self.hidden))
            self._packed = to_device(host, members[0].device, members[0].dtype)
        else:
            blocks = [weight.T if in_out else weight for weight in members]
            self._packed = _concatenate(blocks, (self.qkv, self.hidden), self._packed)
            if hasattr(members[0], "requires_grad"):
                from .torch_prepack import packed

                self._packed = packed(self._packed, members)
        *_, self._numbers = self._checked(self._packed, self.head_dim, "out_in")
        self.prepacked_bytes = self.qkv * self.hidden * (4 if _C._kind(self._packed)[0] == "float32" else 2)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(hidden={self.hidden}, num_heads={self.num_heads}, "
            f"num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, eps={self.eps}, rounding={self.rounding!r}, "
            f"prepacked_bytes={self.prepacked_bytes})"
        )


if not TYPE_CHECKING:

    def __getattr__(name):
        """minivllm.layers.RMSNorm, by which name the package `kernels` finds it; torch is imported only for that."""
        if name != "RMSNorm":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from .torch_layers import RMSNorm

        return RMSNorm


def _concatenate(blocks, shape, packed=None):
    """The blocks' rows below each other in one C-contiguous array of their framework: `packed`, where there is one of
    their dtype and device."""
    if type(blocks[0]).__module__.partition(".")[0] in ("jax", "jaxlib"):  # immutable
        return sys.modules["jax"].numpy.concatenate(blocks)
    if packed is None or _C._kind(packed) != _C._kind(blocks[0]):
        packed = _C._empty(blocks[0], shape)
    row = 0
    for block in blocks:
        rows = block.shape[0]
        _detached(packed)[row : row + rows] = _detached(block)
        row += rows
    return packed


def _detached(array):
    return array.detach() if hasattr(array, "detach") else array
