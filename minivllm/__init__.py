"""Fused decoder-layer kernels for torch, NumPy, CuPy and JAX tensors, on NVIDIA GPUs and on the CPU.

    from minivllm import FusedRMSNormQKV
    q, k, v = FusedRMSNormQKV.forward(hidden_states, input_layernorm.weight, qkv_proj.weight.t(), num_heads, num_kv_heads)

Importing this package imports no framework and touches no GPU.
"""

from typing import NamedTuple, Optional

try:
    from minivllm import _C
except ImportError as error:
    raise ImportError(
        f"minivllm's extension module cannot be loaded: {error}. Where it is missing, build it: `pip install .` in the "
        "source tree (or `python setup.py build_ext --inplace` to build in place; both need a C compiler). "
        "`python -m minivllm` says more."
    ) from error

from minivllm._C import (
    add_rms_norm,
    fused_add_rms_norm,
    get_num_threads,
    rms_norm,
    rms_norm_qkv,
    set_num_threads,
)
from minivllm.device_array import DeviceArray, empty, to_device
from minivllm.layers import FusedRMSNormQKV

__version__ = _C.version

__all__ = [
    "DeviceArray",
    "FusedRMSNormQKV",
    "Kernel",
    "Ran",
    "add_rms_norm",
    "empty",
    "fused_add_rms_norm",
    "get_num_threads",
    "kernels",
    "last_kernel",
    "rms_norm",
    "rms_norm_qkv",
    "set_num_threads",
    "to_device",
]


class Kernel(NamedTuple):
    """A kernel of an op: `kernel=name` forces it. `why_not` says why it cannot run here; empty when `usable`."""

    op: str
    name: str
    dtype: str
    isa: str
    usable: bool
    why_not: str


class Ran(NamedTuple):
    """The kernel that a call ran, and why it was chosen."""

    op: str
    name: str
    why: str


def kernels(op: Optional[str] = None) -> list[Kernel]:
    """The kernels of `op`, or of all ops, in the order in which they are listed.

    add_rms_norm and fused_add_rms_norm are served by the kernels of rms_norm. ValueError for an op that does not exist.
    """
    rows = [Kernel(*row) for row in _C.kernels()]
    if op is None:
        return rows
    listed = {"add_rms_norm": "rms_norm", "fused_add_rms_norm": "rms_norm"}.get(op, op)
    of_op = [row for row in rows if row.op == listed]
    if not of_op:
        raise ValueError(f"kernels: there is no op {op!r}; the ops are {', '.join(dict.fromkeys(r.op for r in rows))}")
    return of_op


def last_kernel() -> Optional[Ran]:
    """What the last call in this thread ran, or None when nothing has run."""
    ran = _C.last_kernel()
    return Ran(*ran) if ran else None
