"""Fused decoder-layer kernels for torch, NumPy, CuPy and JAX tensors, on NVIDIA GPUs and on the CPU.

    from minivllm import FusedRMSNormQKV
    q, k, v = FusedRMSNormQKV.forward(x, norm_weight, qkv_weight, heads, kv_heads)

Importing this package imports no framework and touches no GPU.
"""

try:
    from ._C import version as _version
except ImportError as error:
    # `python -m minivllm`, which says what is wrong, imports this too: so the refusal waits for the first name used.
    _cause = error

    def _why():
        from pathlib import Path

        package = Path(__file__).resolve().parent
        if (package.parent / "csrc").is_dir() and not list(package.glob("_C*.so")):
            return (
                f"minivllm was imported from its source tree {package.parent}, which hides an installed minivllm and "
                "has no extension module _C of its own. Run Python from another directory, or build it here: "
                "`pip install -e .`, or without a network `python setup.py build_ext --inplace`."
            )
        return (
            f"minivllm's extension module cannot be loaded ({_cause}). Where it is missing, build it: `pip install .` "
            "in the source tree, or `python setup.py build_ext --inplace`; both need a C compiler. "
            "`python -m minivllm` says more."
        )

    def __getattr__(name):
        if name.startswith("__") and name not in ("__version__", "__all__"):  # what Python itself looks for
            raise AttributeError(name)
        raise ImportError(_why()) from _cause

else:
    from . import dynamo
    from ._C import (
        add_rms_norm,
        decode_attention,
        fused_add_rms_norm,
        gelu_and_mul,
        get_num_threads,
        greedy_tokens,
        linear,
        linear_add,
        norm_add,
        qk_norm_rope,
        rms_norm,
        rms_norm_gate_up,
        rms_norm_linear,
        rms_norm_qkv,
        set_num_threads,
        silu_and_mul,
    )
    from .device_array import DeviceArray, empty, to_device
    from .layers import FusedRMSNormQKV
    from .parallel import QKVShard, shard_qkv
    from .selection import Kernel, Ran, kernels, last_kernel

    dynamo.watch()
    __version__ = _version
    __all__ = [
        "DeviceArray",
        "FusedRMSNormQKV",
        "Kernel",
        "QKVShard",
        "Ran",
        "add_rms_norm",
        "decode_attention",
        "empty",
        "fused_add_rms_norm",
        "gelu_and_mul",
        "get_num_threads",
        "greedy_tokens",
        "kernels",
        "last_kernel",
        "linear",
        "linear_add",
        "norm_add",
        "qk_norm_rope",
        "rms_norm",
        "rms_norm_gate_up",
        "rms_norm_linear",
        "rms_norm_qkv",
        "set_num_threads",
        "shard_qkv",
        "silu_and_mul",
        "to_device",
    ]
