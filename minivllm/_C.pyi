"""Types of the extension module. The docstrings of the ops themselves say what they compute."""

from collections.abc import Sequence
from typing import Any, Literal, Protocol, SupportsFloat, SupportsIndex, TypeVar, overload

from typing_extensions import Buffer

class _Tensor(Protocol):
    """What every framework's tensors have in common; at run time more is asked for (see rms_norm)."""

    @property
    def shape(self) -> Any: ...
    @property
    def dtype(self) -> Any: ...

_T = TypeVar("_T", bound=_Tensor)  # results are of x's framework
_Class = TypeVar("_Class")
_Rounding = Literal["hf", "hf_once", "fp32"]
_WeightLayout = Literal["auto", "out_in", "in_out"]
_Tensors = _Tensor | tuple[_Tensor, _Tensor, _Tensor] | list[_Tensor]
_Pair = _Tensor | tuple[_Tensor, _Tensor] | list[_Tensor]

version: str

def rms_norm(
    x: _T,
    weight: _Tensor | None,
    eps: SupportsFloat = 1e-6,
    *,
    out: _T | None = None,
    rounding: _Rounding = "hf",
    weight_offset: SupportsFloat = 0.0,
    kernel: str | None = None,
) -> _T: ...
def add_rms_norm(
    x: _T,
    residual: _Tensor,
    weight: _Tensor | None,
    eps: SupportsFloat = 1e-6,
    *,
    out: _T | None = None,
    residual_out: _T | None = None,
    rounding: _Rounding = "hf",
    weight_offset: SupportsFloat = 0.0,
    kernel: str | None = None,
) -> tuple[_T, _T]: ...
def norm_add(
    x: _T,
    weight: _Tensor | None,
    residual: _Tensor,
    eps: SupportsFloat = 1e-6,
    *,
    out: _T | None = None,
    rounding: _Rounding = "hf",
    weight_offset: SupportsFloat = 0.0,
    kernel: str | None = None,
) -> _T: ...
def fused_add_rms_norm(
    x: _T,
    residual: _T,
    weight: _Tensor | None,
    eps: SupportsFloat = 1e-6,
    *,
    rounding: _Rounding = "hf",
    weight_offset: SupportsFloat = 0.0,
) -> tuple[_T, _T]: ...

class _RMSNormQKV(Protocol):
    @overload
    def __call__(
        self,
        x: _T,
        norm_weight: _Tensor,
        qkv_weight: _Tensors,
        num_heads: SupportsIndex,
        num_kv_heads: SupportsIndex,
        eps: SupportsFloat = 1e-6,
        *,
        bias: _Tensors | None = None,
        residual: None = None,
        head_dim: SupportsIndex | None = None,
        out: _T | None = None,
        residual_out: None = None,
        weight_layout: _WeightLayout = "auto",
        rounding: _Rounding = "hf",
        weight_offset: SupportsFloat = 0.0,
        batch_invariant: bool = False,
        allow_tf32: bool = False,
        static_weights: bool = False,
        kernel: str | None = None,
    ) -> tuple[_T, _T, _T]: ...
    @overload
    def __call__(
        self,
        x: _T,
        norm_weight: _Tensor,
        qkv_weight: _Tensors,
        num_heads: SupportsIndex,
        num_kv_heads: SupportsIndex,
        eps: SupportsFloat = 1e-6,
        *,
        bias: _Tensors | None = None,
        residual: _Tensor,
        head_dim: SupportsIndex | None = None,
        out: _T | None = None,
        residual_out: _T | None = None,
        weight_layout: _WeightLayout = "auto",
        rounding: _Rounding = "hf",
        weight_offset: SupportsFloat = 0.0,
        batch_invariant: bool = False,
        allow_tf32: bool = False,
        static_weights: bool = False,
        kernel: str | None = None,
    ) -> tuple[_T, _T, _T, _T]: ...

rms_norm_qkv: _RMSNormQKV  # a function; so that FusedRMSNormQKV.forward is one with both variants, too

@overload
def rms_norm_linear(
    x: _T,
    norm_weight: _Tensor,
    weight: _Tensor,
    eps: SupportsFloat = 1e-6,
    *,
    bias: _Tensor | None = None,
    residual: None = None,
    out: _T | None = None,
    residual_out: None = None,
    weight_layout: _WeightLayout = "auto",
    rounding: _Rounding = "hf",
    weight_offset: SupportsFloat = 0.0,
    batch_invariant: bool = False,
    allow_tf32: bool = False,
    static_weights: bool = False,
    kernel: str | None = None,
) -> _T: ...
@overload
def rms_norm_linear(
    x: _T,
    norm_weight: _Tensor,
    weight: _Tensor,
    eps: SupportsFloat = 1e-6,
    *,
    bias: _Tensor | None = None,
    residual: _Tensor,
    out: _T | None = None,
    residual_out: _T | None = None,
    weight_layout: _WeightLayout = "auto",
    rounding: _Rounding = "hf",
    weight_offset: SupportsFloat = 0.0,
    batch_invariant: bool = False,
    allow_tf32: bool = False,
    static_weights: bool = False,
    kernel: str | None = None,
) -> tuple[_T, _T]: ...
@overload
def rms_norm_gate_up(
    x: _T,
    norm_weight: _Tensor,
    gate_up_weight: _Pair,
    eps: SupportsFloat = 1e-6,
    *,
    activation: Literal["silu", "gelu_tanh", "gelu"] = "silu",
    bias: _Pair | None = None,
    residual: None = None,
    out: _T | None = None,
    residual_out: None = None,
    weight_layout: _WeightLayout = "auto",
    rounding: _Rounding = "hf",
    weight_offset: SupportsFloat = 0.0,
    batch_invariant: bool = False,
    allow_tf32: bool = False,
    static_weights: bool = False,
    kernel: str | None = None,
) -> _T: ...
@overload
def rms_norm_gate_up(
    x: _T,
    norm_weight: _Tensor,
    gate_up_weight: _Pair,
    eps: SupportsFloat = 1e-6,
    *,
    activation: Literal["silu", "gelu_tanh", "gelu"] = "silu",
    bias: _Pair | None = None,
    residual: _Tensor,
    out: _T | None = None,
    residual_out: _T | None = None,
    weight_layout: _WeightLayout = "auto",
    rounding: _Rounding = "hf",
    weight_offset: SupportsFloat = 0.0,
    batch_invariant: bool = False,
    allow_tf32: bool = False,
    static_weights: bool = False,
    kernel: str | None = None,
) -> tuple[_T, _T]: ...
def silu_and_mul(x: _T, *, out: _T | None = None, rounding: _Rounding = "hf", kernel: str | None = None) -> _T: ...
def gelu_and_mul(
    x: _T,
    *,
    approximate: Literal["tanh", "none"] = "tanh",
    out: _T | None = None,
    rounding: _Rounding = "hf",
    kernel: str | None = None,
) -> _T: ...
def linear(
    x: _T,
    weight: _Tensor,
    *,
    bias: _Tensor | None = None,
    out: _T | None = None,
    weight_layout: _WeightLayout = "auto",
    rounding: _Rounding = "hf",
    batch_invariant: bool = False,
    allow_tf32: bool = False,
    static_weights: bool = False,
    kernel: str | None = None,
) -> _T: ...
def linear_add(
    x: _T,
    weight: _Tensor,
    residual: _T,
    *,
    bias: _Tensor | None = None,
    scale: SupportsFloat = 1.0,
    out: _T | None = None,
    weight_layout: _WeightLayout = "auto",
    rounding: _Rounding = "hf",
    batch_invariant: bool = False,
    allow_tf32: bool = False,
    static_weights: bool = False,
    kernel: str | None = None,
) -> _T: ...
def decode_attention(
    q: _T,
    k: _Tensor,
    v: _Tensor,
    key_cache: _Tensor,
    value_cache: _Tensor,
    positions: _Tensor,
    *,
    cos: _Tensor | None = None,
    sin: _Tensor | None = None,
    q_norm_weight: _Tensor | None = None,
    k_norm_weight: _Tensor | None = None,
    eps: SupportsFloat = 1e-6,
    weight_offset: SupportsFloat = 0.0,
    interleaved: bool = False,
    block_table: _Tensor | None = None,
    cache_layout: Literal["NHD", "HND"] | None = None,
    ring: bool = False,
    starts: _Tensor | None = None,
    scale: SupportsFloat | None = None,
    window: SupportsIndex | None = None,
    soft_cap: SupportsFloat | None = None,
    out: _T | None = None,
    rounding: _Rounding = "hf",
    batch_invariant: bool = False,
    static_weights: bool = False,
    static_rows: bool = False,
    kernel: str | None = None,
) -> _T: ...
def qk_norm_rope(
    q: _T,
    k: _T,
    cos: _Tensor | None = None,
    sin: _Tensor | None = None,
    *,
    q_norm_weight: _Tensor | None = None,
    k_norm_weight: _Tensor | None = None,
    eps: SupportsFloat = 1e-6,
    weight_offset: SupportsFloat = 0.0,
    interleaved: bool = False,
    rounding: _Rounding = "hf",
    out_q: _T | None = None,
    out_k: _T | None = None,
    v: _Tensor | None = None,
    key_cache: _Tensor | None = None,
    value_cache: _Tensor | None = None,
    slots: _Tensor | None = None,
    cache_layout: Literal["NHD", "HND"] | None = None,
    kernel: str | None = None,
) -> tuple[_T, _T]: ...
def greedy_tokens(
    logits: _T,
    *,
    finished: _Tensor | None = None,
    ends: _Tensor | None = None,
    pad: _Tensor | None = None,
    history: _Tensor | None = None,
    counts: _Tensor | None = None,
    positions: _Tensor | None = None,
    out: _T | None = None,
    kernel: str | None = None,
) -> _T: ...
def _ops() -> dict[str, tuple[tuple[str, str, str, bool, bool, bool, Any, tuple[str, ...]], ...]]: ...
def kernels() -> list[tuple[str, str, str, str, bool, str]]: ...
def last_kernel() -> tuple[str, str, str] | None: ...
def set_num_threads(n: SupportsIndex) -> None: ...
def get_num_threads() -> int: ...
def cpu_features() -> str: ...
def cuda_archs() -> str: ...
def cuda_device_count() -> int: ...
def cuda_device_info(device: int, /) -> dict[str, Any]: ...
def _check_rms_norm_qkv(
    norm_weight: _Tensor,
    qkv_weight: _Tensors,
    num_heads: SupportsIndex,
    num_kv_heads: SupportsIndex,
    eps: SupportsFloat = 1e-6,
    *,
    bias: _Tensors | None = None,
    head_dim: SupportsIndex | None = None,
    weight_layout: _WeightLayout = "auto",
    rounding: _Rounding = "hf",
    weight_offset: SupportsFloat = 0.0,
    batch_invariant: bool = False,
    allow_tf32: bool = False,
    static_weights: bool | None = False,
) -> tuple[int, int, int, bool, bytes]: ...
def _call_layer(
    layer: Any, x: _T, *, residual: _T | None = None, out: _T | None = None, residual_out: _T | None = None
) -> tuple[_T, ...]: ...
def _callable_layer(layer: type[_Class], /) -> type[_Class]: ...
def _plan(
    op: str, gpu: int, /, *args: Any, **options: Any
) -> tuple[tuple[tuple[tuple[int, ...], str], ...], bool, int, dict[str, Any]]: ...
def _xla_handlers() -> list[tuple[str, str, object]]: ...
def _allocate(device: int, bytes: int, /) -> object: ...
def _address(memory: object, /) -> int: ...
def _copy_from_host(device: int, address: int, host: Buffer, stream: int, /) -> None: ...
def _copy_to_host(device: int, address: int, host: Buffer, stream: int, /) -> None: ...
def _stream_wait(device: int, waiting: int, producing: int, /) -> None: ...
def _to_dlpack(
    owner: object,
    device: int,
    address: int,
    dtype: str,
    shape: Sequence[int],
    strides: Sequence[int],
    versioned: bool,
    /,
) -> object: ...
def _kind(array: _Tensor, /) -> tuple[str, str]: ...
def _view(array: _Tensor, /) -> tuple[int, tuple[int, ...], tuple[int, ...], str, str, bool, object]: ...
def _steps(on: bool, /) -> tuple[int, int, int, int, int]: ...
def _launch_nothing(device: int, /) -> None: ...
def _empty(like: _T, shape: Sequence[int], /) -> _T: ...
