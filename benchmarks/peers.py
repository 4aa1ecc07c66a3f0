"""What minivllm is measured against: torch eager, torch.compile, NumPy. And what torch needs to know to make inputs."""

import numpy as np

from minivllm.testing.points import DTYPES as DTYPES

EPS = 1e-6
COMPILE_MODES = {"torch.compile": "default", "torch.compile max-autotune": "max-autotune-no-cudagraphs"}


def torch_dtype(dtype: str):
    import torch

    return getattr(torch, DTYPES[dtype])


def normal(*shape: int, dtype: str, device: str, scale: float = 1.0, mean: float = 0.0):
    """A torch tensor of normal numbers."""
    import torch

    return torch.empty(*shape, device=device, dtype=torch_dtype(dtype)).normal_(mean, scale)


def rms_norm(x, weight):
    import torch.nn.functional as F

    return F.rms_norm(x, weight.shape, weight, EPS)


def add_rms_norm(x, residual, weight):
    added = x + residual
    return rms_norm(added, weight), added


def rms_norm_qkv(x, norm_weight, weight, bias):
    import torch.nn.functional as F

    return F.linear(rms_norm(x, norm_weight), weight, bias)


def silu_and_mul(x):
    import torch.nn.functional as F

    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def gelu_and_mul(x):
    import torch.nn.functional as F

    gate, up = x.chunk(2, -1)
    return F.gelu(gate, approximate="tanh") * up


def hf_rms_norm(x, weight):
    """The norm as HF Llama and Qwen write it: rounded before the weight is applied, and after."""
    import torch

    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * wide.to(x.dtype)


def hf_rms_norm_qkv(x, norm_weight, weight, bias):
    import torch.nn.functional as F

    return F.linear(hf_rms_norm(x, norm_weight), weight, bias)


def hf_add_rms_norm(x, residual, weight):
    added = x + residual
    return hf_rms_norm(added, weight), added


def compiled(function, modes: list[str] | None) -> dict:
    """The function under torch.compile for one shape, by variant name; modes: some, [] for all, None for no variant.

    What was compiled before is dropped.
    """
    import torch

    if modes is None:
        return {}
    torch.compiler.reset()
    return {
        name: torch.compile(function, mode=mode, dynamic=False)
        for name, mode in COMPILE_MODES.items()
        if not modes or mode in modes
    }


def numpy_rms_norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    mean_square = np.einsum("...k,...k->...", x, x)[..., None] / x.shape[-1]
    return x * (1 / np.sqrt(mean_square + np.float32(EPS))) * weight


def numpy_rms_norm_qkv(
    x: np.ndarray, norm_weight: np.ndarray, weight: np.ndarray, bias: np.ndarray | None
) -> np.ndarray:
    out = numpy_rms_norm(x, norm_weight) @ weight.T
    return out if bias is None else out + bias
